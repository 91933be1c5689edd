"""A socket that says anything: frames right and wrong, and ends of every kind."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from typing import Any

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(
    opcode: int,
    payload: bytes,
    *,
    last: bool = True,
    reserved: int = 0,
    masked: bool = True,
    length: int | None = None,
) -> bytes:
    """A frame of a client; ``length`` is what it says of its payload."""
    length = len(payload) if length is None else length
    head = bytes(((0x80 if last else 0) | reserved << 4 | opcode,))
    bit = 0x80 if masked else 0
    if length < 126:
        head += bytes((bit | length,))
    elif length < 1 << 16:
        head += bytes((bit | 126,)) + struct.pack(">H", length)
    else:
        head += bytes((bit | 127,)) + struct.pack(">Q", length)
    # A mask of zeros is one, and leaves the payload as it is.
    return head + (bytes(4) if masked else b"") + payload


def text(**fields: Any) -> bytes:
    return frame(TEXT, json.dumps(fields).encode())


def upload(body: bytes, **header: Any) -> bytes:
    head = json.dumps({"type": "uploadArrow", **header}).encode()
    return frame(BINARY, len(head).to_bytes(4, "big") + head + body)


class Raw:
    """A connection as an ``async with`` block, whose end is a reset unless :meth:`finish` was."""

    def __init__(self, port: int, *, receive_buffer: int = 0) -> None:
        self._port = port
        self._receive_buffer = receive_buffer

    async def __aenter__(self) -> Raw:
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if self._receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        self._loop = asyncio.get_running_loop()
        try:
            await self._loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        except BaseException:
            self._socket.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reset()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def receive(self, size: int = 1 << 16) -> bytes:
        """What has come, nothing after the end. Raises ``TimeoutError`` after five seconds."""
        return await asyncio.wait_for(self._loop.sock_recv(self._socket, size), 5)

    async def open(self) -> None:
        """Become a WebSocket."""
        await self.send(UPGRADE)
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = await self.receive()
            if not part:
                raise ConnectionError("the upgrade was not answered")
            answer += part
        if not answer.startswith(b"HTTP/1.1 101"):
            raise ConnectionError(answer[:60].decode("latin-1"))

    async def drain(self, seconds: float = 1.0) -> int:
        """Read until nothing comes for that long; the bytes that came.

        Somebody who hears of every change may never have silence: five times that long is enough.
        """
        count = 0
        until = time.monotonic() + 5 * seconds
        while time.monotonic() < until:
            try:
                part = await asyncio.wait_for(self._loop.sock_recv(self._socket, 1 << 18), seconds)
            except asyncio.TimeoutError:
                return count
            if not part:
                return count
            count += len(part)
        return count

    def finish(self) -> None:
        """End it in order: what is under way still arrives."""
        self._socket.close()

    def reset(self) -> None:
        if self._socket.fileno() >= 0:
            linger = struct.pack("ii", 1, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._socket.close()
