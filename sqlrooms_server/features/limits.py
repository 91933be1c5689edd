"""How many rows a result may have, how long it may take, and what is said when it was more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlrooms_server.access.roles import Role
from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.errors import Timeout, TooLarge
from sqlrooms_server.messages import Options
from sqlrooms_server.settings import Settings


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a query may do, how many rows its result may have, how many seconds it may take.

    Of the numbers, 0 means any; each comes with the name of what sets it. Queries of equal bounds
    may share results.
    """

    policy: Policy
    rows: int
    rows_by: str
    seconds: float
    seconds_by: str


def bounds_of(role: Role, engine: Engine, settings: Settings) -> Bounds:
    """What ``role`` and the server both allow."""
    rows, rows_by = settings.max_result_rows, "--max-result-rows"
    if role.max_result_rows and not 0 < rows <= role.max_result_rows:
        rows, rows_by = role.max_result_rows, f"max_result_rows of role {role.name!r}"
    seconds, seconds_by = settings.query_timeout, "--query-timeout"
    if role.query_timeout and not 0 < seconds <= role.query_timeout:
        seconds, seconds_by = role.query_timeout, f"query_timeout of role {role.name!r}"
    return Bounds(engine.bounded(role.sql), rows, rows_by, seconds, seconds_by)


def bound_rows(result: Result, options: Options, bounds: Bounds, *, count: bool = False) -> str:
    """Bound the rows of ``result``; the name of the limit that would truncate it.

    The rows are counted when a limit, a chunked result or ``count`` asks for it.
    """
    cap = bounds.rows
    if options.max_rows is not None:
        is_capped = 0 < cap < options.max_rows
        result.count_rows(cap if is_capped else options.max_rows)
        return bounds.rows_by if is_capped else "maxRows"
    if cap:
        result.count_rows(
            cap,
            lambda: TooLarge(
                f"The result has more than {cap} rows ({bounds.rows_by}); add a LIMIT, or maxRows "
                "to get the first ones."
            ),
        )
    elif options.stream or count:
        result.count_rows()
    return ""


def truncation(result: Result, limit: str) -> dict[str, Any]:
    """What a reply says when rows were left out."""
    return {"truncated": True, "truncatedBy": limit} if result.truncated else {}


def deadline(options: Options, bounds: Bounds) -> tuple[float, str] | None:
    """Seconds that a query may take and what that limit is called, if there is one."""
    if options.timeout is not None and not 0 < bounds.seconds < options.timeout:
        return options.timeout, "timeoutMs"
    return (bounds.seconds, bounds.seconds_by) if bounds.seconds else None


def out_of_time(seconds: float, name: str) -> Timeout:
    """What a query ends with that took longer than the limit ``name``."""
    return Timeout(f"The query took longer than {seconds:g} s ({name}).")
