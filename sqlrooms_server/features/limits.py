"""How many rows a result may have, how long it may take, and what is said when it was more."""

from __future__ import annotations

from typing import Any

from sqlrooms_server.db.cursor import Result
from sqlrooms_server.errors import Timeout, TooLarge
from sqlrooms_server.messages import Options


def bound_rows(result: Result, options: Options, cap: int, *, count: bool = False) -> str:
    """Bound the rows of ``result``; the name of the limit that would truncate it.

    ``cap`` is ``--max-result-rows``. The rows are counted when a limit, a chunked result or
    ``count`` asks for it.
    """
    if options.max_rows is not None:
        is_capped = 0 < cap < options.max_rows
        result.count_rows(cap if is_capped else options.max_rows)
        return "--max-result-rows" if is_capped else "maxRows"
    if cap:
        result.count_rows(
            cap,
            lambda: TooLarge(
                f"The result has more than {cap} rows (--max-result-rows); add a LIMIT, or "
                "maxRows to get the first ones."
            ),
        )
    elif options.stream or count:
        result.count_rows()
    return ""


def truncation(result: Result, limit: str) -> dict[str, Any]:
    """What a reply says when rows were left out."""
    return {"truncated": True, "truncatedBy": limit} if result.truncated else {}


def deadline(options: Options, limit: float) -> tuple[float, str] | None:
    """Seconds that a query may take and what that limit is called, if there is one.

    ``limit`` is ``--query-timeout``, or 0.
    """
    if options.timeout is not None and not 0 < limit < options.timeout:
        return options.timeout, "timeoutMs"
    return (limit, "--query-timeout") if limit else None


def out_of_time(seconds: float, name: str) -> Timeout:
    """What a query ends with that took longer than the limit ``name``."""
    return Timeout(f"The query took longer than {seconds:g} s ({name}).")
