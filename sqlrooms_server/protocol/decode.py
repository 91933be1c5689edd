"""Bytes to messages.

A malformed message raises :class:`BadRequest` or :class:`TooLarge`, which carries the query id
when the message had a valid one, so that its sender learns which of its requests failed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ujson

from sqlrooms_server.errors import BadRequest, QueryId, TooLarge
from sqlrooms_server.messages import (
    Ack,
    Auth,
    CacheStats,
    Cancel,
    CloseSession,
    Hello,
    Live,
    Message,
    Notify,
    Query,
    RoomUpdate,
    Unwatch,
    Upload,
    UploadChunk,
    UploadMode,
    Watch,
)
from sqlrooms_server.protocol.channels import (
    decode_notify,
    decode_presence,
    decode_subscribe,
    decode_unsubscribe,
    user_name,
)
from sqlrooms_server.protocol.fields import (
    bad_request,
    choice,
    flag,
    given_query_id,
    json_object,
    query_id_in,
    session_name,
    shown,
    whole_number,
)
from sqlrooms_server.protocol.names import parse_table_name
from sqlrooms_server.protocol.plugins import decode_plugin_message
from sqlrooms_server.protocol.queries import decode_live, decode_query
from sqlrooms_server.protocol.rooms import (
    LORO_MAGIC,
    decode_join,
    decode_leave,
    decode_room_presence,
    decode_room_update,
    decode_snapshot,
    large_snapshot,
)
from sqlrooms_server.protocol.streams import decode_stream_ack, decode_stream_data

# A framed header holds a type, an id and a table name.
MAX_HEADER_LENGTH = 64 << 10

MAX_WATCHED_TABLES = 1000
# What is off without a setting.
_NEEDED = {
    "named": "--queries",
    "namedQueries": "--queries",
    "resume": "--resume-window",
    "files-list": "--files",
    "files-read": "--files",
    "files-preview": "--files",
    "files-mkdir": "--files",
    "files-delete": "--files",
}

# A text message of more may be a snapshot that is passed on as it is.
_LARGE_TEXT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What a message may measure, in bytes."""

    max_message_size: int
    max_sql_length: int


def decode(data: bytes, *, is_text: bool, limits: Limits, kinds: Collection[str] = ()) -> Message:
    """The message in one WebSocket message. Raises ``BadRequest`` or ``TooLarge``.

    ``kinds`` are the types that plugins have.
    """
    if len(data) > limits.max_message_size:
        raise TooLarge(
            f"The message has {len(data)} bytes; at most {limits.max_message_size} are allowed "
            "(--max-message-size).",
            _id_in_oversize(data, is_text=is_text),
        )
    if not is_text:
        return _decode_binary(data, kinds)
    if len(data) > _LARGE_TEXT_BYTES:
        snapshot = large_snapshot(data)
        if snapshot is not None:
            return snapshot
    # A byte of SQL takes at most six of JSON (\u0000). Decoding more would only delay everybody.
    if len(data) > 6 * limits.max_sql_length + MAX_HEADER_LENGTH:
        raise TooLarge(
            f"The message has {len(data)} bytes, more than sql may have (--max-sql-length, "
            f"{limits.max_sql_length}). Send data with uploadArrow.",
            _id_in_oversize(data, is_text=True),
        )
    return _decode_text(data, limits, kinds)


def _decode_text(data: bytes, limits: Limits, kinds: Collection[str]) -> Message:
    fields = json_object(data, "The message")
    kind = fields.get("type")
    if not isinstance(kind, str):
        raise bad_request(fields, "The message needs a field type, a string.")
    decoder = TEXT_DECODERS.get(kind)
    if decoder is None:
        if kind in kinds:
            return decode_plugin_message(fields, len(data))
        if kind in _NEEDED:
            text = f"Messages of the type {kind!r} need a server that was started with"
            raise bad_request(fields, f"{text} {_NEEDED[kind]}.")
        known = ", ".join(sorted([*TEXT_DECODERS, *kinds]))
        raise bad_request(fields, f"Unknown message type {shown(kind)}; known are {known}.")
    message = decoder(fields, limits)
    if isinstance(message, Notify):
        return dataclasses.replace(message, size=len(data))
    if isinstance(message, Query) and message.options.params is not None:
        options = dataclasses.replace(message.options, size=len(data))
        return dataclasses.replace(message, options=options)
    return message


def _decode_binary(data: bytes, kinds: Collection[str]) -> Message:
    if data[:4] == LORO_MAGIC:
        return RoomUpdate(None, None, data)
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
    fields = json_object(data[4 : 4 + length], "The header of the binary message")
    kind = fields.get("type")
    if kind == "crdt-update":
        return decode_room_update(fields, memoryview(data)[4 + length :])
    if kind == "streamData":
        return decode_stream_data(fields, memoryview(data)[4 + length :])
    if isinstance(kind, str) and kind in kinds:
        return decode_plugin_message(fields, len(data), memoryview(data)[4 + length :])
    if kind != "uploadArrow":
        known = " or ".join(f'"{kind}"' for kind in (*BINARY_KINDS, *sorted(kinds)))
        raise bad_request(fields, f"The header of a binary message needs type {known}.")
    query_id = query_id_in(fields)
    try:
        body = memoryview(data)[4 + length :]
        # A short body must not keep a long header alive.
        return _upload(fields, query_id, body if len(body) > length else memoryview(bytes(body)))
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error


def _upload(fields: dict[str, Any], query_id: QueryId, body: memoryview) -> Upload | UploadChunk:
    mode: UploadMode = choice(fields, "mode", ("replace", "create", "append"), "replace")
    if "seq" not in fields and "last" not in fields:
        return Upload(parse_table_name(fields.get("tableName")), query_id, body, mode)
    seq = whole_number(fields, "seq", 0, 1 << 53)
    last = flag(fields, "last")
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
    return Hello(None if fields.get("user") is None else user_name(fields["user"]))


def _query(fields: dict[str, Any], limits: Limits) -> Query:
    return decode_query(fields, limits.max_sql_length)


def _live(fields: dict[str, Any], limits: Limits) -> Live:
    return decode_live(fields, limits.max_sql_length)


def _watch(fields: dict[str, Any], limits: Limits) -> Watch:
    query_id = given_query_id(fields)
    tables = fields.get("tables")
    since = fields.get("since")
    if since is not None and not isinstance(since, str):
        raise BadRequest("since must be the version of an earlier message, a string.", query_id)
    if tables == "*":
        return Watch(None, since, query_id)
    if not isinstance(tables, list) or not 0 < len(tables) <= MAX_WATCHED_TABLES:
        known = f'"*" or an array of 1 to {MAX_WATCHED_TABLES} names'
        raise BadRequest(f"tables must be {known}.", query_id)
    try:
        names = tuple(parse_table_name(name, "Each of tables") for name in tables)
    except BadRequest as error:
        raise BadRequest(str(error), query_id) from error
    return Watch(names, since, query_id)


def _unwatch(fields: dict[str, Any], limits: Limits) -> Unwatch:
    return Unwatch(given_query_id(fields))


def _cache_stats(fields: dict[str, Any], limits: Limits) -> CacheStats:
    return CacheStats(given_query_id(fields))


def _cancel(fields: dict[str, Any], limits: Limits) -> Cancel:
    if "queryId" not in fields:
        raise BadRequest("cancel needs a field queryId.")
    return Cancel(query_id_in(fields))


def _ack(fields: dict[str, Any], limits: Limits) -> Ack:
    if "queryId" not in fields:
        raise BadRequest("ack needs a field queryId.")
    # Its errors carry no query id: they would be taken for the answer of the query.
    size = whole_number(fields, "bytes", 0, 1 << 62)
    if size is None:
        raise BadRequest("ack needs a field bytes, the total consumed so far.")
    return Ack(query_id_in(fields), size, fields.get("last") is True)


def _close_session(fields: dict[str, Any], limits: Limits) -> CloseSession:
    return CloseSession(session_name(fields))


# Types of binary messages.
BINARY_KINDS = ("uploadArrow", "crdt-update", "streamData")

TEXT_DECODERS: dict[str, Callable[[dict[str, Any], Limits], Message]] = {
    "auth": _auth,
    "hello": _hello,
    "arrow": _query,
    "json": _query,
    "exec": _query,
    "cancel": _cancel,
    "ack": _ack,
    "closeSession": _close_session,
    "watch": _watch,
    "unwatch": _unwatch,
    "live": _live,
    "cacheStats": _cache_stats,
    "subscribe": lambda fields, _: decode_subscribe(fields),
    "unsubscribe": lambda fields, _: decode_unsubscribe(fields),
    "notify": lambda fields, _: decode_notify(fields),
    "presence": lambda fields, _: decode_presence(fields),
    "crdt-join": lambda fields, _: decode_join(fields),
    "crdt-leave": lambda fields, _: decode_leave(fields),
    "crdt-snapshot": lambda fields, _: decode_snapshot(fields),
    "crdt-presence": lambda fields, _: decode_room_presence(fields),
    "streamAck": lambda fields, _: decode_stream_ack(fields),
}


_ID_FIELD = re.compile(rb'"queryId"\s*:\s*("(?:[^"\\]|\\.){1,1024}"|-?\d{1,19})')


def _id_in_oversize(data: bytes, *, is_text: bool) -> QueryId | None:
    """The query id at either end of a message that is too large to be worth decoding."""
    if not is_text:
        ends = data[4 : 4 + min(int.from_bytes(data[:4], "big"), MAX_HEADER_LENGTH)]
    else:
        ends = data[:2048] + data[-2048:]
    match = _ID_FIELD.search(ends)
    try:
        return query_id_in({"queryId": ujson.loads(match[1])}) if match else None
    except (ValueError, BadRequest):
        return None
