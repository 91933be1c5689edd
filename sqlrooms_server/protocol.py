"""Bytes to frozen dataclasses and back. Knows neither sockets nor DuckDB.

The contract is ``docs/protocol.md``. A malformed message raises :class:`BadRequest` or
:class:`TooLarge`, which carries the query id when the message had a valid one, so that its
sender learns which of its requests failed.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ujson

from sqlrooms_server.errors import BadRequest, QueryId, ServerError, TooLarge
from sqlrooms_server.messages import (
    Ack,
    Auth,
    Cancel,
    CloseSession,
    Compression,
    Format,
    Hello,
    Message,
    Options,
    Query,
    QueryKind,
    TableName,
    Upload,
    UploadChunk,
    UploadMode,
)

PROTOCOL_VERSION = 1

MAX_QUERY_ID_LENGTH = 256
MAX_IDENTIFIER_LENGTH = 255

# A framed header holds a type, an id and a table name.
MAX_HEADER_LENGTH = 64 << 10

# A bare Loro update begins with this, which no framed header length can equal.
_LORO_MAGIC = b"loro"

MAX_SESSION_NAME_LENGTH = 64

# Longer than any deadline somebody means, and safe to add to a clock.
MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a message may measure, in bytes."""

    max_message_size: int
    max_sql_length: int


def decode(data: bytes, *, is_text: bool, limits: Limits) -> Message:
    """The message in one WebSocket message. Raises ``BadRequest`` or ``TooLarge``."""
    if len(data) > limits.max_message_size:
        raise TooLarge(
            f"The message has {len(data)} bytes; at most {limits.max_message_size} are allowed "
            "(--max-message-size).",
            _id_in_oversize(data, is_text=is_text),
        )
    if not is_text:
        return _decode_binary(data)
    # A byte of SQL takes at most six of JSON (\u0000). Decoding more would only delay everybody.
    if len(data) > 6 * limits.max_sql_length + MAX_HEADER_LENGTH:
        raise TooLarge(
            f"The message has {len(data)} bytes, more than sql may have (--max-sql-length, "
            f"{limits.max_sql_length}). Send data with uploadArrow.",
            _id_in_oversize(data, is_text=True),
        )
    return _decode_text(data, limits)


def _decode_text(data: bytes, limits: Limits) -> Message:
    fields = _json_object(data, "The message")
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise _bad(fields, "The message needs a field type, a string.")
    decoder = _TEXT_DECODERS.get(kind)
    if decoder is None:
        known = ", ".join(sorted(_TEXT_DECODERS))
        raise _bad(fields, f"Unknown message type {_shown(kind)}; known are {known}.")
    message = decoder(fields, limits)
    if isinstance(message, Query) and message.options.params is not None:
        options = dataclasses.replace(message.options, size=len(data))
        return dataclasses.replace(message, options=options)
    return message


def _decode_binary(data: bytes) -> Message:
    if data[:4] == _LORO_MAGIC:
        raise BadRequest("A Loro update was sent, but this connection joined no room.")
    if len(data) < 4:
        raise BadRequest(
            "A binary message begins with a 4-byte header length; this one is shorter."
        )
    length = int.from_bytes(data[:4], "big")
    if length > MAX_HEADER_LENGTH or 4 + length > len(data):
        raise BadRequest(
            f"The header length of the binary message is {length}, but at most "
            f"{min(MAX_HEADER_LENGTH, len(data) - 4)} bytes can follow."
        )
    fields = _json_object(data[4 : 4 + length], "The header of the binary message")
    if fields.get("type") != "uploadArrow":
        raise _bad(fields, 'The header of a binary message needs type "uploadArrow".')
    query_id = _query_id(fields)
    try:
        body = memoryview(data)[4 + length :]
        # A short body must not keep a long header alive.
        return _upload(fields, query_id, body if len(body) > length else memoryview(bytes(body)))
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error


def _upload(fields: dict[str, Any], query_id: QueryId, body: memoryview) -> Upload | UploadChunk:
    mode: UploadMode = _choice(fields, "mode", ("replace", "create", "append"), "replace")
    if "seq" not in fields and "last" not in fields:
        return Upload(parse_table_name(fields.get("tableName")), query_id, body, mode)
    seq = _whole_number(fields, "seq", 0, 1 << 53)
    last = _flag(fields, "last")
    if seq is None:
        raise BadRequest("A chunk of uploadArrow needs a field seq, a whole number from 0.")
    if "queryId" not in fields:
        raise BadRequest("A chunk of uploadArrow needs a field queryId.")
    if not len(body) and not last:
        raise BadRequest("A chunk of uploadArrow needs a body, unless it is the last.")
    table = parse_table_name(fields.get("tableName")) if seq == 0 else None
    return UploadChunk(table, query_id, body, mode, seq, last)


def _auth(fields: dict[str, Any], limits: Limits) -> Auth:
    token = fields.get("token")
    if not isinstance(token, str):
        raise BadRequest("auth needs a field token, a string.")
    return Auth(token)


def _hello(fields: dict[str, Any], limits: Limits) -> Hello:
    return Hello()


def _query(fields: dict[str, Any], limits: Limits) -> Query:
    query_id = _query_id(fields)
    kind: QueryKind = fields["type"]
    sql = fields.get("sql")
    if not isinstance(sql, str):
        raise BadRequest(f"{kind} needs a field sql, a string.", query_id)
    _check_sql(sql, query_id, limits)
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
        "session",
    )
)
_OPTIONS_OF_RESULTS = frozenset(("maxRows", "format", "compression", "stream", "window"))


def _with_options(query: Query, fields: dict[str, Any]) -> Query:
    given = {name for name in _QUERY_OPTIONS if fields.get(name) is not None}
    if query.kind == "exec" and not given.isdisjoint(_OPTIONS_OF_RESULTS):
        field = min(given & _OPTIONS_OF_RESULTS)
        raise BadRequest(f"{field} is for results, and exec has none; use arrow or json.")
    params = fields.get("params")
    if params is not None and not isinstance(params, list | dict):
        raise BadRequest("params must be an array or an object.")
    timeout = _whole_number(fields, "timeoutMs", 1, MAX_TIMEOUT_MS)
    formats = _formats(fields["format"]) if "format" in given else query.formats
    compression: Compression | None = _choice(fields, "compression", ("lz4", "zstd"), None)
    stream = _flag(fields, "stream")
    if (compression is not None or stream) and formats:
        # Only an Arrow stream can be compressed or cut.
        if "arrow" not in formats:
            field = "stream" if stream else "compression"
            raise BadRequest(f"{field} is for the format arrow, which was not asked for.")
        formats = ("arrow",)
    window = _whole_number(fields, "window", 1, 1 << 53)
    if window is not None and not stream:
        raise BadRequest("window is for chunked results; add stream: true.")
    options = Options(
        params=params,
        timeout=None if timeout is None else timeout / 1000,
        max_rows=_whole_number(fields, "maxRows", 0, 1 << 53),
        progress=_flag(fields, "progress"),
        compression=compression,
        stream=stream,
        window=window,
        session=_session_name(fields) if "session" in given else None,
    )
    return dataclasses.replace(query, formats=formats, options=options)


def _formats(value: object) -> tuple[Format, ...]:
    """The known ones of ``value``, a name or a list of names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRequest('format must be "arrow", "json" or a list of them.')
    formats: tuple[Format, ...] = tuple(name for name in names if name in ("arrow", "json"))
    if not formats:
        raise BadRequest(f"format {ujson.dumps(value)[:80]} is not known; use arrow or json.")
    return formats


def _session_name(fields: dict[str, Any]) -> str:
    name = fields.get("session")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_SESSION_NAME_LENGTH:
        raise BadRequest(f"session must be a string of 1 to {MAX_SESSION_NAME_LENGTH} characters.")
    return name


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise BadRequest(f"{name} must be true or false.")


def _whole_number(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise BadRequest(f"{name} must be a whole number from {low} to {high}.")


def _choice(fields: dict[str, Any], name: str, choices: tuple[str, ...], default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if value not in choices:
        known = ", ".join(f'"{choice}"' for choice in choices)
        raise BadRequest(f"{name} must be one of {known}.")
    return value


def _cancel(fields: dict[str, Any], limits: Limits) -> Cancel:
    if "queryId" not in fields:
        raise BadRequest("cancel needs a field queryId.")
    return Cancel(_query_id(fields))


def _ack(fields: dict[str, Any], limits: Limits) -> Ack:
    if "queryId" not in fields:
        raise BadRequest("ack needs a field queryId.")
    # Its errors carry no query id: they would be taken for the answer of the query.
    size = _whole_number(fields, "bytes", 0, 1 << 62)
    if size is None:
        raise BadRequest("ack needs a field bytes, the total consumed so far.")
    return Ack(_query_id(fields), size)


def _close_session(fields: dict[str, Any], limits: Limits) -> CloseSession:
    return CloseSession(_session_name(fields))


_TEXT_DECODERS: dict[str, Callable[[dict[str, Any], Limits], Message]] = {
    "auth": _auth,
    "hello": _hello,
    "arrow": _query,
    "json": _query,
    "exec": _query,
    "cancel": _cancel,
    "ack": _ack,
    "closeSession": _close_session,
}


def _check_sql(sql: str, query_id: QueryId, limits: Limits) -> None:
    try:
        length = len(sql) if sql.isascii() else len(sql.encode())
    except UnicodeEncodeError as error:
        raise BadRequest("sql holds half of a surrogate pair.", query_id) from error
    if length > limits.max_sql_length:
        raise TooLarge(
            f"sql has {length} bytes; at most {limits.max_sql_length} are allowed "
            "(--max-sql-length). Send data with uploadArrow.",
            query_id,
        )
    if "\0" in sql:
        raise BadRequest("sql holds a NUL character.", query_id)


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        fields = ujson.loads(data)
    except ValueError as error:
        raise BadRequest(f"{what} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"{what} must be a JSON object.")
    return fields


def _query_id(fields: dict[str, Any]) -> QueryId:
    if "queryId" not in fields:
        return str(uuid.uuid4())
    value = fields["queryId"]
    if isinstance(value, str):
        if 0 < len(value) and len(value.encode("utf-8", "surrogatepass")) <= MAX_QUERY_ID_LENGTH:
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise BadRequest(
        f"queryId must be a non-empty string of at most {MAX_QUERY_ID_LENGTH} bytes or an integer."
    )


def _bad(fields: dict[str, Any], text: str) -> BadRequest:
    """The error for ``fields``, with their query id if that at least is valid."""
    try:
        query_id = _query_id(fields) if "queryId" in fields else None
    except BadRequest:
        query_id = None
    return BadRequest(text, query_id)


_ID_FIELD = re.compile(rb'"queryId"\s*:\s*("(?:[^"\\]|\\.){1,1024}"|-?\d{1,19})')


def _id_in_oversize(data: bytes, *, is_text: bool) -> QueryId | None:
    """The query id at either end of a message that is too large to be worth decoding."""
    if not is_text:
        ends = data[4 : 4 + min(int.from_bytes(data[:4], "big"), MAX_HEADER_LENGTH)]
    else:
        ends = data[:2048] + data[-2048:]
    match = _ID_FIELD.search(ends)
    try:
        return _query_id({"queryId": ujson.loads(match[1])}) if match else None
    except (ValueError, BadRequest):
        return None


def _shown(text: str) -> str:
    """``text`` quoted and cut, for an error message."""
    return ujson.dumps(text if len(text) <= 40 else text[:40] + "…", ensure_ascii=False)


_TABLE_PART = re.compile(r'([^\W\d]\w*)|"((?:[^"]|"")+)"')


def parse_table_name(text: object) -> TableName:
    """The parts of ``table``, ``schema.table`` or ``catalog.schema.table``.

    Each part is plain (a letter or underscore, then letters, digits and underscores) or in
    double quotes, where a double quote is written twice. Anything else is ``BadRequest``.
    """
    refused = BadRequest(
        "tableName must be table, schema.table or catalog.schema.table; a part that is not "
        "letters, digits and underscores stands in double quotes."
    )
    if not isinstance(text, str) or "\0" in text:
        raise refused
    parts = []
    position = 0
    while True:
        match = _TABLE_PART.match(text, position)
        if match is None:
            raise refused
        part = match[1] or match[2].replace('""', '"')
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            raise refused from None
        if length > MAX_IDENTIFIER_LENGTH:
            raise BadRequest(f"A part of tableName is over {MAX_IDENTIFIER_LENGTH} bytes long.")
        parts.append(part)
        position = match.end()
        if position == len(text) and len(parts) <= 3:
            return tuple(parts)
        if text[position : position + 1] != ".":
            raise refused
        position += 1


def encode(fields: dict[str, Any]) -> bytes:
    """A text message."""
    return ujson.dumps(fields, escape_forward_slashes=False).encode()


def encode_error(error: ServerError) -> bytes:
    """The error frame of ``error``; the query id is left out when it is not known."""
    fields: dict[str, Any] = {"type": "error"}
    if error.query_id is not None:
        fields["queryId"] = error.query_id
    fields["error"] = str(error)
    fields["code"] = error.code
    return encode(fields)


def encode_ok(query_id: QueryId) -> bytes:
    """The reply to a statement that has nothing to tell."""
    return encode({"type": "ok", "queryId": query_id})


def arrow_prefix(query_id: QueryId, **more: Any) -> bytes:
    """What stands before an Arrow body: header length and header, with the fields ``more``.

    The header is padded with spaces to a multiple of 8 bytes with its length, so that a client
    can read the columns in place.
    """
    header = encode({"type": "arrow", "queryId": query_id, **more})
    header += b" " * (-(4 + len(header)) % 8)
    return len(header).to_bytes(4, "big") + header


def json_prefix(query_id: QueryId) -> bytes:
    """What stands before the escaped rows of a JSON result."""
    return encode({"type": "json", "queryId": query_id})[:-1] + b',"data":"'


def json_suffix(**more: Any) -> bytes:
    """What stands after the rows, with the fields ``more``."""
    return b'"' + (b"," + encode(more)[1:] if more else b"}")
