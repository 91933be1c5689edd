"""Puts the questions of this benchmark over HTTP, in place of `websocket.Connection`.

A question comes in as the message a `sqlrooms-server` takes, goes out as a request, and its answer
is handed on as that server's answer would be. So every kind of server meets the same load. What
that costs, a look into a dict and a header of some forty bytes, is far less than masking frames.
"""

from __future__ import annotations

import errno
import json
import os
import select
import selectors
import socket
import time
from typing import Protocol

from .replies import arrow_head
from .websocket import READ_SIZE, SILENCE, Disconnected, Receiver, limit_silence

# As often as DuckDB's client, by its setting http_retries.
RETRIES = 3


class Dialect(Protocol):
    """How a server is asked, and what of its answer counts.

    `renewed`: each question goes over a new socket. `suffix` is what follows every answer.
    """

    renewed: bool
    suffix: bytes

    def request(self, kind: str, sql: str) -> tuple[str, dict[str, str], bytes]:
        """The path, further headers and the body of a request."""

    def answer(self, body: memoryview) -> memoryview:
        """The part of an answer that is the same each time."""


class Mosaic:
    """Mosaic's `duckdb-server`: JSON in, an Arrow stream out."""

    renewed = False
    suffix = b""

    def request(self, kind: str, sql: str) -> tuple[str, dict[str, str], bytes]:
        return (
            "/",
            {"Content-Type": "application/json"},
            json.dumps({"type": kind, "sql": sql}).encode(),
        )

    def answer(self, body: memoryview) -> memoryview:
        return body


class Roapi:
    """`roapi`: SQL in, an Arrow stream out."""

    renewed = False
    # It leaves out the end mark of the stream; HTTP says where the end is.
    suffix = b"\xff\xff\xff\xff\0\0\0\0"

    def request(self, kind: str, sql: str) -> tuple[str, dict[str, str], bytes]:
        return "/api/sql", {"Accept": "application/vnd.apache.arrow.stream"}, sql.encode()

    def answer(self, body: memoryview) -> memoryview:
        return body


class HttpConnection:
    """One connection to 127.0.0.1:`port`, a `with` block. One question at a time.

    Calls block, for `SILENCE` at most. A new socket, of which `generation` is the number, connects
    in its own time, as a client on a thread of its own would: until then `receive` is to be called
    when it can be written to, which `events` says.
    """

    def __init__(self, port: int, dialect: Dialect) -> None:
        self._port = port
        self._dialect = dialect
        self._requests: dict[bytes, bytes] = {}
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._head = bytearray()
        self._body: bytearray | None = None
        self._left = -1
        self._ok = self._open = self._closing = self._used = False
        self._unsent = self._asked = self._prefix = self._kind = b""
        self._tries = 0
        self.generation = 0
        self.events: int = selectors.EVENT_READ
        self._socket = self._connect()

    def __enter__(self) -> HttpConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, text: bytes) -> None:
        """Send one question as a request, or keep it until the connection is there."""
        before, _, rest = text.partition(b'"queryId": "')
        query_id = rest[: rest.index(b'"')]
        if before not in self._requests:
            fields = json.loads(text)
            path, headers, body = self._dialect.request(fields["type"], fields["sql"])
            self._requests[before] = _request(self._port, path, headers, body)
        self._kind = b"exec" if before.startswith(b'{"type": "exec"') else b"arrow"
        self._prefix = arrow_head(query_id)
        if self._closing or (self._dialect.renewed and self._used):
            self._socket.close()
            self._socket = self._connect()
        self._used = self._open = True
        self._asked = self._requests[before]
        if self.events == selectors.EVENT_READ:
            self._socket.sendall(self._asked)
        else:
            self._unsent = self._asked

    def receive(self, receiver: Receiver) -> None:
        """Hand on what one read brings."""
        if self._unsent:
            self._finish_connecting()
            return
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            raise Disconnected(f"no answer within {SILENCE:.0f} s") from None
        except ConnectionResetError:
            size = 0
        if not size:
            self._again()
            return
        self._tries = 0
        data = self._buffer[:size]
        if self._left < 0:
            data = self._read_head(data)
            if self._left < 0:
                return
            if self._ok and self._kind == b"arrow":
                receiver.piece(memoryview(self._prefix))
        if len(data) > self._left:
            raise Disconnected("the server sent more than one answer")
        self._left -= len(data)
        if self._body is not None:
            self._body += data
        elif data:
            receiver.piece(data)
        if not self._left:
            self._end(receiver)

    def _again(self) -> None:
        """Ask again after the server closed the connection, as DuckDB's client does."""
        if not self._open:
            self._closing = True
            return
        if self._left >= 0 or self._head or not self._dialect.renewed or self._tries == RETRIES:
            raise Disconnected("the server closed the connection")
        self._tries += 1
        self._socket.close()
        self._socket = self._connect()
        self._used = True
        self._unsent = self._asked

    def idle(self, seconds: float, receiver: Receiver) -> None:
        """Say nothing for `seconds`."""
        time.sleep(seconds)

    def _end(self, receiver: Receiver) -> None:
        self._left, self._open = -1, False
        is_arrow = self._kind == b"arrow"
        if self._body is not None:
            receiver.piece(self._dialect.answer(memoryview(bytes(self._body))))
        if self._ok:
            receiver.piece(memoryview(self._dialect.suffix if is_arrow else b'{"type": "ok"}'))
        receiver.end(self._ok and is_arrow)

    def _read_head(self, data: memoryview) -> memoryview:
        """Take the head of the answer, as far as it came; `_left` is the size of its body then."""
        self._head += data
        head, end, body = bytes(self._head).partition(b"\r\n\r\n")
        if not end:
            return memoryview(b"")
        self._head.clear()
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if "content-length" not in headers:
            raise Disconnected(f"an answer without Content-Length: {status}")
        self._left = int(headers["content-length"])
        self._closing = headers.get("connection", "").lower() == "close"
        self._ok = status.split(" ")[1] == "200"
        # What is stripped of something at its end has to be there as a whole.
        self._body = bytearray() if self._dialect.renewed else None
        return memoryview(body)

    def _connect(self) -> socket.socket:
        opened = socket.socket()
        opened.setblocking(False)
        if opened.connect_ex(("127.0.0.1", self._port)) not in (0, errno.EINPROGRESS):
            raise Disconnected("the server refused the connection")
        self._closing = self._used = False
        self._watch_for(selectors.EVENT_WRITE)
        return opened

    def _finish_connecting(self) -> None:
        if not select.select([], [self._socket], [], SILENCE)[1]:
            raise Disconnected(f"no connection within {SILENCE:.0f} s")
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise Disconnected(f"no connection: {os.strerror(error)}")
        limit_silence(self._socket)
        self._watch_for(selectors.EVENT_READ)
        self._socket.sendall(self._unsent)
        self._unsent = b""

    def _watch_for(self, events: int) -> None:
        self.events = events
        self.generation += 1


def _request(port: int, path: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
