"""Sequences of messages of two connections to a real server, and what each is answered."""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from sqlrooms_server.errors import QueryId, ServerError
from sqlrooms_server.messages import (
    Ack,
    Cancel,
    Live,
    Message,
    Query,
    RoomJoin,
    RoomLeave,
    RoomPresence,
    RoomSnapshot,
    RoomUpdate,
    Upload,
    UploadChunk,
)
from sqlrooms_server.protocol import Limits, decode
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings

from . import mutation, protocol, uploads
from .targets import Broken, require

# Seconds for everything that two connections wait for.
_DEADLINE = 30.0

# What a server closes with: 1013 for a client that does not read, or whose edits do not fit.
_CODES = frozenset({1013})

_ROOMS = RoomJoin | RoomLeave | RoomPresence | RoomSnapshot | RoomUpdate

# What comes without being asked for, or before the answer.
_UNASKED = frozenset({"progress", "uploadProgress", "changed", "notify"})

# Of errors and other replies that carry no id.
_NO_ID = object()

# As the server makes an id for a query without one.
_MADE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_TEXT, _BINARY = 0, 2


def _sql(sql: str, number: int, kind: str = "exec", **options: Any) -> dict[str, Any]:
    return {"type": kind, "sql": sql, "queryId": number, **options}


_SEQUENCES: tuple[tuple[Any, ...], ...] = (
    (
        _sql("create or replace table t as select 1 as i", 1),
        _sql("from t", 2, "live"),
        {"type": "watch", "tables": ["t"]},
        _sql("insert into t values (2)", 3),
        _sql("drop table t", 4),
        {"type": "unwatch"},
    ),
    (
        {"type": "subscribe", "channel": "c", "recover": True, "presence": True},
        {"type": "notify", "channel": "c", "payload": [1]},
        {"type": "presence", "channel": "c"},
        {"type": "notify", "channel": "c", "payload": 1, "to": {"user": "ada"}, "queryId": 5},
        {"type": "hello", "user": "ada"},
        {"type": "unsubscribe", "channel": "c"},
    ),
    (
        _sql("begin", 1, session="s"),
        _sql("create table x as select 1", 2, session="s"),
        {"type": "closeSession", "session": "s"},
        _sql("from x", 3, "json"),
    ),
    (
        _sql("from range(5000)", 1, "arrow", stream=True, window=100),
        {"type": "ack", "queryId": 1, "bytes": 100},
        {"type": "cancel", "queryId": 1},
        _sql("select 1", 1, "arrow"),
        {"type": "cancel", "queryId": 1},
    ),
    (
        *(_sql("select 1 as a", 1, "json", persist=True) for _ in range(3)),
        {"type": "cacheStats", "queryId": 2},
        {"type": "auth", "token": "x"},
    ),
    (
        {"type": "crdt-join", "roomId": "r", "version": ""},
        {"type": "crdt-join", "roomId": "s"},
        b"loro damaged",
        {"type": "crdt-presence", "roomId": "r", "data": "AAAA"},
        _sql("select * from room('r'), rooms()", 1, "json"),
        {"type": "crdt-leave", "roomId": "r"},
        b"loro damaged",
    ),
)

Step = tuple[int, bytes]
"""Connection, 0 or 1, plus ``_TEXT`` or ``_BINARY``; and what is sent there."""


class Expected:
    """How many answers each id may have at least and at most. ``_NO_ID`` is one of them."""

    def __init__(self) -> None:
        self._least: defaultdict[Any, int] = defaultdict(int)
        self._most: defaultdict[Any, int] = defaultdict(int)
        self._got: defaultdict[Any, int] = defaultdict(int)
        self.cancellable: dict[QueryId, None] = {}

    def add(self, query_id: Any, least: int = 1, most: int = 1) -> None:
        key = _NO_ID if query_id is None else _key(query_id)
        self._least[key] += least
        self._most[key] += most

    def got(self, query_id: Any) -> None:
        key = query_id if query_id is _NO_ID else _key(query_id)
        self._got[key] += 1
        require(self._got[key] <= self._most[key], f"{self._shown(key)}: {self._got[key]} answers")

    def knows(self, query_id: QueryId) -> bool:
        return _key(query_id) in self._most

    @property
    def missing(self) -> list[str]:
        return [
            f"{self._shown(key)}: {self._got[key]} of {least}"
            for key, least in self._least.items()
            if self._got[key] < least
        ]

    @staticmethod
    def _shown(key: Any) -> str:
        return "no id" if key is _NO_ID else f"id {key!r}"


def _key(query_id: Any) -> Any:
    """1 and true are one key of a dictionary, but not one id."""
    return type(query_id).__name__, query_id


class Client:
    """One connection that counts."""

    def __init__(self, port: int, limits: Limits) -> None:
        self._limits = limits
        self._expected = Expected()
        self.is_closed = False
        self._socket: ClientConnection = connect(
            f"ws://127.0.0.1:{port}", compression=None, max_size=None, close_timeout=1
        )

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes, *, is_text: bool) -> None:
        if is_text:
            data = with_id(data)
        self._expect(data, is_text=is_text)
        try:
            self._socket.send(data.decode() if is_text else data)
        except ConnectionClosed as closed:
            self._closed(closed)

    def ask(self, **fields: Any) -> None:
        self.send(json.dumps(fields).encode(), is_text=True)

    def settle(self) -> None:
        """Cancel what goes on, and return when all is answered."""
        for query_id in self._expected.cancellable:
            self.ask(type="cancel", queryId=query_id)
        self._receive_until(lambda: not self._expected.missing)
        # What comes too often comes before this.
        self.ask(type="json", sql="select 1 as a", queryId="the last")
        self._receive_until(lambda: not self._expected.missing)

    def _expect(self, data: bytes, *, is_text: bool) -> None:
        expected = self._expected
        try:
            message: Message = decode(data, is_text=is_text, limits=self._limits)
        except ServerError as error:
            # That of an upload under way is the answer of the upload.
            query_id = given(error.query_id, data)
            expected.add(query_id, least=0 if query_id is not None else 1)
            if error.room is not None:
                expected.add(None, least=-1, most=0)
            return
        query_id = given(getattr(message, "query_id", None), data)
        if isinstance(message, Ack):
            return
        if isinstance(message, _ROOMS):
            expected.add(None, least=0)
        elif isinstance(message, Cancel):
            expected.add(None)
        elif isinstance(message, UploadChunk) and message.table is None:
            expected.add(None, least=0)
        else:
            expected.add(query_id)
            if isinstance(message, Query | Upload | UploadChunk | Live) and query_id is not None:
                expected.cancellable[query_id] = None

    def _receive_until(self, condition: Any) -> None:
        until = time.monotonic() + _DEADLINE
        while not self.is_closed and not condition():
            try:
                reply = self._socket.recv(timeout=max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise Broken(f"no answer: {self._expected.missing}") from None
            except ConnectionClosed as closed:
                self._closed(closed)
                return
            self._count(reply)

    def _closed(self, closed: ConnectionClosed) -> None:
        self.is_closed = True
        code = None if closed.rcvd is None else closed.rcvd.code
        require(code in _CODES, f"closed with {code}")

    def _count(self, reply: str | bytes) -> None:
        if isinstance(reply, bytes):
            if reply[:4] == b"loro":
                return
            fields = json.loads(reply[4 : 4 + int.from_bytes(reply[:4], "big")])
            # A part of a result, or one of a live query, is not its end.
            if fields["type"] != "arrow" or ("seq" in fields and not fields.get("last")):
                return
        else:
            fields = json.loads(reply)
        kind = fields["type"]
        if kind in _UNASKED or (kind.startswith("crdt-")):
            return
        if kind == "presence" and ("joined" in fields or "left" in fields):
            return
        require(fields.get("code") != "internal", f"{fields}")
        if kind == "error" and "roomId" in fields:
            return
        is_about_id = "queryId" in fields and kind != "cancelAck"
        query_id = fields["queryId"] if is_about_id else _NO_ID
        if _MADE.fullmatch(str(query_id)) and not self._expected.knows(query_id):
            query_id = _NO_ID
        self._expected.got(query_id)


def given(query_id: QueryId | None, data: bytes) -> QueryId | None:
    """``query_id`` if the message in ``data`` has it, and no id was made for one without."""
    is_made = isinstance(query_id, str) and _MADE.fullmatch(query_id)
    return None if is_made and str(query_id).encode() not in data else query_id


def with_id(data: bytes) -> bytes:
    """A query or a live query gets an id, by which its answer is known."""
    text = data.decode("utf-8", "replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return text.encode("utf-8", "replace")
    if not isinstance(fields, dict) or fields.get("type") not in ("arrow", "json", "exec", "live"):
        return text.encode("utf-8", "replace")
    fields.setdefault("queryId", "given")
    return json.dumps(fields).encode()


class Session:
    max_size = 16 << 10

    def __init__(self) -> None:
        self._cache = tempfile.TemporaryDirectory(prefix="fuzz-")
        settings = Settings(
            port=0,
            sync=True,
            workers=2,
            query_timeout=5,
            stream_idle_timeout=5,
            room_idle_timeout=0,
            memory_limit="500MB",
            threads=1,
            cache_dir=self._cache.name,
            log_level="error",
        )
        self._limits = Limits(settings.max_message_size, settings.max_sql_length)
        self._server = Server(settings)
        self._port = self._server.start()

    def seeds(self) -> Iterator[bytes]:
        for sequence in _SEQUENCES:
            steps = [encoded(message) for message in sequence]
            yield joined([(kind, data) for kind, data in steps])
            yield joined([(kind | n % 2, data) for n, (kind, data) in enumerate(steps)])
        yield joined(
            [(_TEXT | n % 2, data) for n, (_, data) in enumerate(map(encoded, protocol.SEEDS))]
        )
        body = next(iter(uploads.small_streams()))
        header = {"type": "uploadArrow", "tableName": "up", "queryId": 1}
        parts: list[Step] = [(_BINARY, frame(header, body))]
        for seq, start in enumerate(range(0, len(body), 200)):
            part, last = body[start : start + 200], start + 200 >= len(body)
            parts.append((_BINARY | 1, frame({**header, "seq": seq, "last": last}, part)))
        yield joined(parts)
        yield joined([*parts[:3], *parts[1:], (_TEXT, b'{"type":"json","sql":"from up"}')])

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        steps = list(split(data))
        seeds = [encoded(message) for sequence in _SEQUENCES for message in sequence]
        for _ in range(chance.choice((1, 1, 2, 4))):
            if not steps:
                steps.append(chance.choice(seeds))
            at = chance.randrange(len(steps))
            kind, step = steps[at]
            match chance.randrange(7):
                case 0:
                    del steps[at]
                case 1:
                    steps.insert(at, steps[chance.randrange(len(steps))])
                case 2:
                    steps[at] = kind ^ 1, step
                case 3:
                    chosen, message = chance.choice(seeds)
                    steps.insert(at, (chosen | chance.randrange(2), message))
                case 4:
                    other = chance.randrange(len(steps))
                    steps[at], steps[other] = steps[other], steps[at]
                case _ if kind & _BINARY:
                    steps[at] = kind, protocol.mutated_frame(step, chance)
                case _:
                    steps[at] = kind, mutation.of_json(step, chance, protocol.NAMES)
        return joined(steps[:60])

    def try_one(self, data: bytes) -> None:
        clients: list[Client] = []
        try:
            for _ in range(2):
                clients.append(Client(self._port, self._limits))
            for kind, step in split(data):
                clients[kind % 2].send(step, is_text=not kind & _BINARY)
            for client in clients:
                client.settle()
        finally:
            for client in clients:
                client.close()
        late = Client(self._port, self._limits)
        try:
            late.settle()
            require(not late.is_closed, "the server takes no more connections")
        finally:
            late.close()


def encoded(message: Any) -> Step:
    return (
        (_BINARY, message) if isinstance(message, bytes) else (_TEXT, json.dumps(message).encode())
    )


def frame(header: dict[str, Any], body: bytes) -> bytes:
    return protocol.framed(json.dumps(header).encode(), body)


def joined(steps: list[Step]) -> bytes:
    short = ((kind, step[:0xFFFF]) for kind, step in steps)
    return b"".join(bytes((kind,)) + len(s).to_bytes(2, "big") + s for kind, s in short)


def split(data: bytes) -> Iterator[Step]:
    at = 0
    while at + 3 <= len(data):
        kind, size = data[at], int.from_bytes(data[at + 1 : at + 3], "big")
        yield kind & 3, data[at + 3 : at + 3 + size]
        at += 3 + size


def make() -> Session:
    return Session()
