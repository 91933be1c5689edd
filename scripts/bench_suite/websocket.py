"""A WebSocket client (RFC 6455) that costs a load generator as little as possible.

It knows just what a server on the same machine makes it know: it offers no extension, joins the
fragments of a message, and answers pings. Payload bytes are handed on where the kernel put them.
"""

from __future__ import annotations

import base64
import os
import select
import selectors
import socket
import struct
from time import perf_counter
from typing import Protocol, TypeVar

# No byte for this long from a server that owes an answer means that none will come.
SILENCE = 120.0

READ_SIZE = 1 << 20

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING = 0, 1, 2, 8, 9
_FIN, _MASKED = 0x80, 0x80


class Disconnected(ConnectionError):
    """The server refused, closed or garbled the connection."""


class Receiver(Protocol):
    """Takes the messages of a connection, piece by piece."""

    def piece(self, data: memoryview) -> None:
        """Take the next bytes of the message. They are gone when this returns."""

    def end(self, binary: bool) -> None:
        """Take note that the message is complete."""


class Conversation(Protocol):
    """A connection of any kind: it takes the questions of this benchmark, and hands on answers.

    `generation` counts its sockets, of which `fileno` is to be watched for `events`.
    """

    generation: int
    events: int

    def __enter__(self) -> Conversation: ...

    def __exit__(self, *_: object) -> None: ...

    def fileno(self) -> int: ...

    def send(self, text: bytes) -> None: ...

    def receive(self, receiver: Receiver) -> None: ...

    def idle(self, seconds: float, receiver: Receiver) -> None: ...


def limit_silence(of: socket.socket) -> None:
    """Have calls on a socket that is connected block for `SILENCE` at most."""
    of.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The kernel's own timeouts: Python's would add a poll() to every read.
    of.settimeout(None)
    limit = struct.pack("ll", int(SILENCE), 0)
    of.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    of.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


S = TypeVar("S", bound="OneSocket")


class OneSocket:
    """One connection to 127.0.0.1:`port`, a `with` block. Calls block, for `SILENCE` at most."""

    # It is never renewed.
    generation = 1
    events: int = selectors.EVENT_READ

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=SILENCE)
        self._buffer = memoryview(bytearray(READ_SIZE))

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def _read(self) -> memoryview:
        """What one read brings, until the next one."""
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            raise Disconnected(f"no answer within {SILENCE:.0f} s") from None
        if not size:
            raise Disconnected("the server closed the connection")
        return self._buffer[:size]


class Connection(OneSocket):
    """A WebSocket."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._shake_hands(port)
            limit_silence(self._socket)
        except BaseException:
            self._socket.close()
            raise
        self._head = bytearray()
        self._opcode = 0
        self._final = False
        self._left = 0
        self._binary = False
        self._control = bytearray()

    def send(self, text: bytes) -> None:
        """Send one text message."""
        self._socket.sendall(_frame(_TEXT, text))

    def send_binary(self, head: bytes, body: bytes) -> None:
        """Send one binary message in two parts, so that a large body is not copied."""
        # Always with a length of 8 bytes, which any receiver accepts.
        size = len(head) + len(body)
        frame = struct.pack("!BBQI", _FIN | _BINARY, _MASKED | 127, size, 0)
        self._socket.sendall(frame + head)
        self._socket.sendall(body)

    def send_all(self, messages: list[bytes]) -> None:
        """Send small binary messages together."""
        self._socket.sendall(b"".join(_frame(_BINARY, message) for message in messages))

    def receive(self, receiver: Receiver) -> None:
        """Hand on what one read brings. May be none, one or several messages."""
        self._feed(self._read(), receiver)

    def idle(self, seconds: float, receiver: Receiver) -> None:
        """Say nothing for `seconds`, but answer pings."""
        until = perf_counter() + seconds
        while (left := until - perf_counter()) > 0:
            if select.select([self], [], [], left)[0]:
                self.receive(receiver)

    def _shake_hands(self, port: int) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        answer = b""
        # Byte by byte: what follows the blank line is already a frame.
        while not answer.endswith(b"\r\n\r\n"):
            byte = self._socket.recv(1)
            if not byte:
                raise Disconnected("the server closed the connection during the handshake")
            answer += byte
        status = answer.split(b"\r\n", 1)[0].decode("latin-1")
        if " 101 " not in f"{status} ":
            raise Disconnected(f"the server refused the upgrade: {status}")

    def _feed(self, data: memoryview, receiver: Receiver) -> None:
        at, end = 0, len(data)
        while at < end:
            if not self._left:
                at = self._read_head(data, at)
            if self._left and at < end:
                size = min(self._left, end - at)
                part = data[at : at + size]
                if self._opcode < _CLOSE:
                    receiver.piece(part)
                else:
                    self._control += part
                at += size
                self._left -= size
            if not self._left and not self._head:
                self._end_frame(receiver)

    def _read_head(self, data: memoryview, at: int) -> int:
        """Read the head of a frame, as far as it came; `_head` is empty when it came whole."""
        head = self._head
        while True:
            need = 2
            if len(head) >= 2:
                need += {126: 2, 127: 8}.get(head[1], 0)
            missing = need - len(head)
            if not missing:
                break
            if at == len(data):
                return at
            part = data[at : at + missing]
            head += part
            at += len(part)
        if head[1] & _MASKED:
            raise Disconnected("the server sent a masked frame")
        self._final = bool(head[0] & _FIN)
        self._opcode = head[0] & 0x0F
        self._left = head[1] if len(head) == 2 else int.from_bytes(head[2:], "big")
        if self._opcode in (_TEXT, _BINARY):
            self._binary = self._opcode == _BINARY
        head.clear()
        return at

    def _end_frame(self, receiver: Receiver) -> None:
        if self._opcode in (_CONTINUATION, _TEXT, _BINARY):
            if self._final:
                receiver.end(self._binary)
            return
        content = bytes(self._control)
        self._control.clear()
        if self._opcode == _PING:
            self._socket.sendall(_frame(10, content))
        elif self._opcode == _CLOSE:
            code, reason = int.from_bytes(content[:2], "big"), content[2:].decode(errors="replace")
            raise Disconnected(f"the server closed the connection: {code} {reason}")


def _frame(opcode: int, payload: bytes) -> bytes:
    # A mask of zeros leaves the payload as it is, so masking is free.
    size = len(payload)
    if size < 126:
        return struct.pack("!BBI", _FIN | opcode, _MASKED | size, 0) + payload
    if size < 1 << 16:
        return struct.pack("!BBHI", _FIN | opcode, _MASKED | 126, size, 0) + payload
    return struct.pack("!BBQI", _FIN | opcode, _MASKED | 127, size, 0) + payload
