"""A bare client of the protocol, for tests that look at every frame."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

DEADLINE = 30.0


@dataclass(frozen=True)
class Arrow:
    """A binary reply: its header and the bytes after it."""

    header: dict[str, Any]
    body: bytes

    def table(self) -> pa.Table:
        return pa.ipc.open_stream(self.body).read_all()


class Wire:
    """One WebSocket. Every receive has a deadline, so that a missing frame fails the test."""

    def __init__(self, url: str, **options: Any) -> None:
        self._stack = ExitStack()
        # With frames that nobody has read, it never sees the server's end, and waits that long.
        closing = 0.2
        opening = connect_websocket(
            url,
            max_size=None,
            compression=None,
            open_timeout=DEADLINE,
            close_timeout=closing,
            **options,
        )
        self.socket: ClientConnection = self._stack.enter_context(opening)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self, **fields: Any) -> None:
        self.socket.send(json.dumps(fields))

    def send_raw(self, data: str | bytes) -> None:
        self.socket.send(data)

    def upload(self, table: pa.Table | bytes, **header: Any) -> Any:
        self.send_raw(framed({"type": "uploadArrow", **header}, ipc(table)))
        return self.receive()

    def receive(self) -> Any:
        """The next frame: a dictionary for text, an :class:`Arrow` for binary."""
        message = self.socket.recv(timeout=DEADLINE)
        if isinstance(message, str):
            return json.loads(message)
        end = 4 + int.from_bytes(message[:4], "big")
        return Arrow(json.loads(message[4:end]), message[end:])

    def request(self, **fields: Any) -> Any:
        self.send(**fields)
        return self.receive()

    def arrow(self, sql: str, query_id: Any = "q") -> Any:
        return self.request(type="arrow", sql=sql, queryId=query_id)

    def table(self, sql: str) -> pa.Table:
        reply = self.arrow(sql)
        assert isinstance(reply, Arrow), reply
        return reply.table()

    def rows(self, sql: str) -> Any:
        reply = self.request(type="json", sql=sql, queryId="j")
        assert reply["type"] == "json", reply
        return json.loads(reply["data"])

    def exec(self, sql: str) -> Any:
        reply = self.request(type="exec", sql=sql, queryId="e")
        assert reply == {"type": "ok", "queryId": "e"}, reply
        return reply


def ipc(table: pa.Table | bytes) -> bytes:
    """``table`` as an Arrow IPC stream; bytes stay as they are."""
    if isinstance(table, bytes):
        return table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def framed(header: dict[str, Any], body: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(4, "big") + encoded + body
