"""Messages of clients: what is decoded, and how what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from typing import Any, get_args

from sqlrooms_server.errors import BadRequest, ServerError, TooLarge
from sqlrooms_server.messages import Message, Notify, RoomUpdate, Upload, UploadChunk, Watch
from sqlrooms_server.protocol import (
    Limits,
    arrow_prefix,
    decode,
    encode_error,
    encode_reply,
    encode_said,
    json_prefix,
    parse_table_name,
    table_text,
)

from . import mutation
from .targets import in_linear_time, require

LIMITS = Limits(max_message_size=200_000, max_sql_length=8192)

_MAX_ERROR_BYTES = 4096

# The first byte of an input says what the others are.
_TEXT, _BINARY, _LONG_TEXT, _LONG_BINARY = range(4)

SEEDS: tuple[dict[str, Any], ...] = (
    {"type": "auth", "token": "t"},
    {"type": "hello", "user": "ada"},
    {"type": "arrow", "sql": "select 1", "queryId": "q"},
    {"type": "json", "sql": "select 1 as a", "queryId": 7, "maxRows": 5, "persist": True},
    {"type": "exec", "sql": "create or replace table t(i int)", "queryId": "e", "session": "s"},
    {
        "type": "arrow",
        "sql": "select ?",
        "params": [1, "a", None, {"$type": "DATE", "value": "2026-01-01"}],
    },
    {"type": "json", "sql": "select $a", "params": {"a": [1.5, {"b": True}]}, "timeoutMs": 1000},
    {"type": "arrow", "sql": "from range(10)", "stream": True, "window": 1000, "queryId": "w"},
    {"type": "arrow", "sql": "from range(9)", "format": ["arrow", "json"], "compression": "lz4"},
    {"type": "arrow", "sql": "from range(9)", "progress": True, "queryId": "p"},
    {"type": "cancel", "queryId": "q"},
    {"type": "ack", "queryId": "w", "bytes": 1000},
    {"type": "closeSession", "session": "s"},
    {"type": "watch", "tables": "*", "since": "1-2", "queryId": 1},
    {"type": "watch", "tables": ["t", "main.t", '"a b"."c""d".e']},
    {"type": "unwatch", "queryId": 2},
    {"type": "live", "sql": "from t", "queryId": "l", "maxRows": 3},
    {"type": "cacheStats"},
    {"type": "subscribe", "channel": "c", "recover": True, "since": "1-2", "presence": True},
    {"type": "unsubscribe", "channel": "c", "queryId": 3},
    {"type": "notify", "channel": "c", "payload": {"a": [1, "b", None]}, "to": {"user": "ada"}},
    {"type": "notify", "channel": "c", "payload": 1e300, "to": {"connection": "x"}, "queryId": 4},
    {"type": "presence", "channel": "c"},
    {"type": "crdt-join", "roomId": "r", "version": "AAAA"},
    {"type": "crdt-leave", "roomId": "r"},
    {"type": "crdt-snapshot", "roomId": "r", "data": "bG9ybw=="},
    {"type": "crdt-presence", "roomId": "r", "data": "AAAA"},
)
HEADERS: tuple[dict[str, Any], ...] = (
    {"type": "uploadArrow", "tableName": "t", "queryId": "u", "mode": "append"},
    {"type": "uploadArrow", "tableName": 'a."b""c".d', "queryId": "u", "seq": 0, "last": False},
    {"type": "uploadArrow", "queryId": "u", "seq": 1, "last": True},
    {"type": "crdt-update", "roomId": "r", "id": 5},
)
NAMES = tuple(sorted({name for message in (*SEEDS, *HEADERS) for name in message}))

_NAMED = re.compile("|".join((*NAMES, "message", "header", "JSON", "after", "object")))


class Protocol:
    max_size = 4096

    def seeds(self) -> Iterator[bytes]:
        for fields in SEEDS:
            text = json.dumps(fields).encode()
            yield bytes((_TEXT,)) + text
            yield bytes((_LONG_TEXT, 100, 140)) + text
        for header in HEADERS:
            yield bytes((_BINARY,)) + framed(json.dumps(header).encode(), b"body of eight")
            yield bytes((_LONG_BINARY, 30, 60)) + framed(json.dumps(header).encode(), b"")
        yield bytes((_BINARY,)) + b"loro update"
        # The part that is repeated lies in the middle of a text.
        snapshot = {"type": "crdt-snapshot", "roomId": "r", "data": "A" * 200}
        for fields in (snapshot, {"type": "exec", "sql": "a" * 200, "queryId": "q"}):
            yield bytes((_LONG_TEXT, 130, 160)) + json.dumps(fields).encode()

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        if not data or chance.random() < 0.1:
            return mutation.of_bytes(data, chance)
        kind, head = data[:1], 3 if data[0] % 4 >= _LONG_TEXT else 1
        if data[0] % 2 == _TEXT:
            return kind + data[1:head] + mutation.of_json(data[head:], chance, NAMES)
        return kind + data[1:head] + mutated_frame(data[head:], chance)

    def try_one(self, data: bytes) -> None:
        if not data:
            return
        kind, body = data[0] % 4, data[1:]
        if kind >= _LONG_TEXT:
            body = mutation.stretched(body, LIMITS.max_message_size + 1000)
        is_text = kind % 2 == _TEXT
        with in_linear_time(f"decoding {len(body)} bytes"):
            try:
                message = decode(body, is_text=is_text, limits=LIMITS)
            except (BadRequest, TooLarge) as error:
                check_error(error)
                return
        require(isinstance(message, get_args(Message)), f"{type(message)} is no message")
        check_message(message)
        if is_text:
            check_same(message, body)


def check_error(error: ServerError) -> None:
    """It fits into a small frame that names what was wrong."""
    text = str(error)
    require(_NAMED.search(text) and text.endswith((".", "…")), f"names nothing: {text!a}")
    require(error.code in ("bad_request", "too_large"), f"{error.code}: {text!a}")
    frame = encode_error(error)
    require(len(frame) <= _MAX_ERROR_BYTES + 6 * 256, f"an error of {len(frame)} bytes")
    fields = json.loads(frame)
    require(fields["error"] == text and fields.get("queryId") == error.query_id, "error changed")


def check_message(message: Message) -> None:
    """What came in can go out."""
    query_id = getattr(message, "query_id", None)
    if query_id is not None:
        require(hash(query_id) is not None, "id")
        require(json.loads(encode_reply("ok", query_id))["queryId"] == query_id, "id changed")
        prefix = arrow_prefix(query_id)
        require(json.loads(prefix[4:])["queryId"] == query_id and len(prefix) % 8 == 0, "prefix")
        require(json.loads(json_prefix(query_id) + b'"}')["queryId"] == query_id, "json prefix")
    if isinstance(message, Notify):
        check_notify(message)
    elif isinstance(message, Watch) and message.tables is not None:
        for table in message.tables:
            check_table(table)
    elif isinstance(message, Upload | UploadChunk) and message.table is not None:
        check_table(message.table)
    elif isinstance(message, RoomUpdate):
        require(isinstance(message.data, bytes | memoryview), "data of an update")


def check_notify(message: Notify) -> None:
    try:
        said = encode_said(message.channel, message.payload)
    except BadRequest as error:
        check_error(error)
        return
    again = decode(said, is_text=True, limits=LIMITS) if len(said) < LIMITS.max_sql_length else None
    if isinstance(again, Notify):
        require(repr(again.payload) == repr(message.payload), "the payload changed")


def check_table(table: tuple[str, ...]) -> None:
    require(parse_table_name(table_text(table)) == table, f"{table!a} is not what its text says")


def check_same(message: Message, body: bytes) -> None:
    """Another writer of the same JSON means the same message."""
    try:
        fields = json.loads(body, parse_float=_no_float, parse_constant=_no_float)
        if not isinstance(fields, dict) or len(body) > LIMITS.max_sql_length:
            return
        written = json.dumps(fields, indent=1).encode()
    except (ValueError, RecursionError):
        return
    again = decode(written, is_text=True, limits=LIMITS)
    require(comparable(again) == comparable(message), f"{again!a} is not {message!a}")


def comparable(message: Any) -> Any:
    """``message`` without its size, and without an id that the server made."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    fields.pop("size", None)
    if dataclasses.is_dataclass(fields.get("options")):
        fields["options"] = dataclasses.replace(fields["options"], size=0)  # type: ignore[type-var]
    if re.fullmatch(r"[0-9a-f]{8}-.{27}", str(fields.get("query_id"))):
        fields["query_id"] = "made"
    return type(message), repr(fields)


def framed(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(4, "big") + header + body


def mutated_frame(frame: bytes, chance: random.Random) -> bytes:
    """A binary message with another header or body; its length still fits mostly."""
    end = 4 + int.from_bytes(frame[:4], "big")
    if len(frame) < 4 or end > len(frame) or chance.random() < 0.2:
        return mutation.of_bytes(frame, chance)
    header = mutation.of_json(frame[4:end], chance, NAMES)
    body = mutation.of_bytes(frame[end:], chance) if chance.random() < 0.2 else frame[end:]
    return framed(header, body)


def _no_float(text: str) -> Any:
    raise ValueError("writers may write numbers otherwise")


def make() -> Protocol:
    return Protocol()
