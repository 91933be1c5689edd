"""``arrow``, ``json``, ``exec`` and ``live``, and their options."""

from __future__ import annotations

import dataclasses
from typing import Any

import ujson

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.messages import (
    Compression,
    Format,
    Live,
    Options,
    PluginMessage,
    Query,
    QueryKind,
)
from sqlrooms_server.protocol.fields import (
    MAX_TIMEOUT_MS,
    check_sql,
    choice,
    flag,
    query_id_in,
    session_name,
    whole_number,
)

# DuckDB 1.5 without pandas takes 70 us to bind each, and cannot be interrupted while it does. And
# as long as a query waits, an empty object takes thirty times the memory of its text.
MAX_PARAMETERS = 100_000


def decode_query(fields: dict[str, Any], max_sql_length: int) -> Query:
    """The query in ``fields``. Raises ``BadRequest`` or ``TooLarge``."""
    kind: QueryKind = fields["type"]
    return _query(kind, kind, fields, max_sql_length)


def decode_live(fields: dict[str, Any], max_sql_length: int) -> Live:
    """The live query in ``fields``. Raises ``BadRequest`` or ``TooLarge``."""
    for name in _OPTIONS_OF_ONE_ANSWER:
        if fields.get(name) is not None:
            raise BadRequest(f"{name} is not for live queries.", query_id_in(fields))
    query = _query("arrow", "live", fields, max_sql_length)
    return Live(query.sql, query.query_id, query.options)


def _query(kind: QueryKind, name: str, fields: dict[str, Any], max_sql_length: int) -> Query:
    query_id = query_id_in(fields)
    sql = fields.get("sql")
    if not isinstance(sql, str):
        raise BadRequest(f"{name} needs a field sql, a string.", query_id)
    check_sql(sql, query_id, max_sql_length)
    formats: tuple[Format, ...] = () if kind == "exec" else (kind,)
    if fields.keys().isdisjoint(_QUERY_OPTIONS):
        return Query(kind, sql, query_id, formats)
    try:
        return _with_options(Query(kind, sql, query_id, formats), fields)
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error


_QUERY_OPTIONS = frozenset(
    (
        "params",
        "timeoutMs",
        "maxRows",
        "progress",
        "format",
        "compression",
        "stream",
        "window",
        "resumable",
        "session",
        "persist",
    )
)
_OPTIONS_OF_RESULTS = frozenset(
    ("maxRows", "format", "compression", "stream", "window", "resumable", "persist")
)
_OPTIONS_OF_ONE_ANSWER = (
    "session",
    "persist",
    "progress",
    "format",
    "stream",
    "window",
    "resumable",
)


def named_query(message: PluginMessage, sql: str) -> Query:
    """The query that ``message`` asks for, a message with the options of ``arrow`` whose text the
    server has. Raises ``BadRequest``."""
    query = Query("arrow", sql, message.query_id, ("arrow",))
    return _with(query, message.fields, message.options)


def _with_options(query: Query, fields: dict[str, Any]) -> Query:
    of_results = [name for name in sorted(_OPTIONS_OF_RESULTS) if fields.get(name) is not None]
    if query.kind == "exec" and of_results:
        raise BadRequest(f"{of_results[0]} is for results, and exec has none; use arrow or json.")
    timeout = whole_number(fields, "timeoutMs", 1, MAX_TIMEOUT_MS)
    compression: Compression | None = choice(fields, "compression", ("lz4", "zstd"), None)
    stream = flag(fields, "stream")
    window = whole_number(fields, "window", 1, 1 << 53)
    if window is not None and not stream:
        raise BadRequest("window is for chunked results; add stream: true.")
    options = Options(
        timeout=None if timeout is None else timeout / 1000,
        compression=compression,
        stream=stream,
        window=window,
        resumable=flag(fields, "resumable"),
    )
    return _with(query, fields, options)


def _with(query: Query, fields: dict[str, Any], options: Options) -> Query:
    """``query`` with ``options`` and those that ``fields`` have besides."""
    given = {name for name in ("format", "session") if fields.get(name) is not None}
    params = fields.get("params")
    if params is not None and not isinstance(params, list | dict):
        raise BadRequest("params must be an array or an object.")
    if params is not None and _has_more_values(params, MAX_PARAMETERS):
        raise BadRequest(
            f"params has more than {MAX_PARAMETERS} values; send that many with uploadArrow."
        )
    formats = _formats(fields["format"]) if "format" in given else query.formats
    if (options.compression is not None or options.stream) and formats:
        # Only an Arrow stream can be compressed or cut.
        if "arrow" not in formats:
            field = "stream" if options.stream else "compression"
            raise BadRequest(f"{field} is for the format arrow, which was not asked for.")
        formats = ("arrow",)
    if options.resumable and not options.stream:
        raise BadRequest("resumable is for chunked results; add stream: true.")
    if options.resumable and "session" in given:
        raise BadRequest("resumable is not for a session, which ends with its connection.")
    options = dataclasses.replace(
        options,
        params=params,
        max_rows=whole_number(fields, "maxRows", 0, 1 << 53),
        progress=flag(fields, "progress"),
        session=session_name(fields) if "session" in given else None,
        persist=flag(fields, "persist"),
    )
    return dataclasses.replace(query, formats=formats, options=options)


def _has_more_values(value: Any, most: int) -> bool:
    """Whether ``value``, itself not counted, holds more than ``most`` values."""
    waiting = [value]
    found = 0
    while waiting:
        value = waiting.pop()
        if not isinstance(value, list | dict):
            continue
        found += len(value)
        if found > most:
            return True
        waiting.extend(value.values() if isinstance(value, dict) else value)
    return False


def _formats(value: object) -> tuple[Format, ...]:
    """The known ones of ``value``, a name or a list of names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRequest('format must be "arrow", "json" or a list of them.')
    # Each once: as long as a query waits, a list of millions would, too.
    formats: tuple[Format, ...] = tuple(
        dict.fromkeys(name for name in names if name in ("arrow", "json"))
    )
    if not formats:
        raise BadRequest(f"format {ujson.dumps(value)[:80]} is not known; use arrow or json.")
    return formats
