"""One WebSocket connection: what it is sent, in order and with bounded memory.

All methods belong to the loop thread. A message longer than a fragment, and every stream, goes
out as fragments of one message, taken from its source only while the socket keeps up.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from sqlrooms_server.transport import native

Chunk = bytes | memoryview

# A batch of 64 Ki values of 8 bytes, with its metadata, is one fragment. Larger ones are no faster
# and would enlarge the buffers of each connection.
FRAGMENT_BYTES = 576 << 10

# No fragment is written above this, so that the buffer of uWebSockets, which does not shrink
# before it closes, holds at most this and one fragment.
NATIVE_HIGH_BYTES = 1 << 20

# A fast reader never fills the socket; without a budget it would starve the other connections.
TURN_BYTES = 1 << 20

# What a queued reply costs besides its bytes.
_ENTRY_BYTES = 200


class Pull(enum.Enum):
    """Why a source has no fragment to give."""

    NOT_READY = "not ready"
    """The producer calls :meth:`Connection.pump` once there is one."""
    WITHDRAWN = "withdrawn"
    """It ended before its first byte left; there is nothing to send."""


class Source(Protocol):
    """A message that is produced while it is sent."""

    def pull(self) -> tuple[Chunk, bool] | Pull:
        """At most ``FRAGMENT_BYTES`` and whether they are the last of the message."""

    def sent(self) -> None:
        """The last fragment was handed to the socket."""

    def dropped(self) -> None:
        """The connection closed first."""


class _Whole:
    """A complete message as a source."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def pull(self) -> tuple[Chunk, bool]:
        fragment, self._rest = self._rest[:FRAGMENT_BYTES], self._rest[FRAGMENT_BYTES:]
        return fragment, not self._rest

    def sent(self) -> None:
        pass

    def dropped(self) -> None:
        pass


class Connection:
    """An open WebSocket. After it closed, every method does nothing."""

    __slots__ = (
        "_close_when_sent",
        "_max_queued",
        "_post",
        "_queue",
        "_queued",
        "_repost",
        "_started",
        "_ws",
        "handler_data",
        "remote_address",
    )

    def __init__(
        self,
        post: Callable[..., None],
        *,
        remote_address: str,
        max_queued: int,
        handler_data: Any,
    ) -> None:
        self.remote_address = remote_address
        self.handler_data = handler_data
        self._post = post
        self._max_queued = max_queued
        self._ws: Any = None
        self._queue: deque[tuple[Source, int, int]] = deque()
        self._queued = 0
        self._started = False
        self._repost = False
        self._close_when_sent: tuple[int, bytes] | None = None

    @property
    def is_open(self) -> bool:
        return self._ws is not None

    def send(self, data: bytes, *, is_text: bool) -> None:
        """Send one message, after those before it. A client that does not read is cut off."""
        if self._ws is None:
            return
        opcode = native.TEXT if is_text else native.BINARY
        if (
            not self._queue
            and len(data) <= FRAGMENT_BYTES
            and native.ws_buffered(native.PLAIN, self._ws) < NATIVE_HIGH_BYTES
        ):
            self._write(data, opcode, last=True)
            return
        size = len(data) + _ENTRY_BYTES
        self._queued += size
        if self._queued > self._max_queued:
            self.abort()
            return
        self._queue.append((_Whole(data), opcode, size))
        self.pump()

    def stream(self, source: Source, *, is_text: bool) -> None:
        """Send the message that ``source`` produces, after those before it."""
        if self._ws is None:
            source.dropped()
            return
        self._queue.append((source, native.TEXT if is_text else native.BINARY, 0))
        self.pump()

    def close(self, code: int, reason: str) -> None:
        """Close with ``code`` once everything before was sent."""
        self._close_when_sent = (code, reason.encode())
        self.pump()

    def abort(self) -> None:
        """Close at once and without a closing handshake."""
        if self._ws is not None:
            native.ws_close(native.PLAIN, self._ws)

    def pump(self) -> None:
        """Send as much as the socket takes. For sources that have data again."""
        budget = TURN_BYTES
        while self._queue and self._ws is not None:
            source, opcode, size = self._queue[0]
            if budget <= 0:
                self._pump_later()
                return
            if native.ws_buffered(native.PLAIN, self._ws) >= NATIVE_HIGH_BYTES:
                return
            pulled = source.pull()
            if pulled is Pull.NOT_READY:
                return
            if pulled is Pull.WITHDRAWN:
                self._queue.popleft()
                continue
            data, last = pulled
            self._write(data, native.CONTINUATION if self._started else opcode, last=last)
            budget -= len(data)
            self._started = not last
            if last and self._ws is not None:
                self._queue.popleft()
                self._queued -= size
                source.sent()
        if self._close_when_sent is None or self._ws is None:
            return
        # What uWebSockets still holds would be lost; the drain callback comes back here.
        if native.ws_buffered(native.PLAIN, self._ws) == 0:
            code, reason = self._close_when_sent
            native.ws_end(native.PLAIN, self._ws, code, reason, len(reason))

    def opened(self, ws: Any) -> None:
        """For the transport: the socket is ``ws``."""
        self._ws = ws

    def closed(self) -> None:
        """For the transport: the socket is gone. Nothing may touch it from here on."""
        self._ws = None
        queue, self._queue = self._queue, deque()
        for source, _, _ in queue:
            source.dropped()

    def _pump_later(self) -> None:
        if not self._repost:
            self._repost = True
            self._post(self._pump_again)

    def _pump_again(self) -> None:
        self._repost = False
        self.pump()

    def _write(self, data: Chunk, opcode: int, *, last: bool) -> None:
        length = len(data)
        if type(data) is not bytes:
            data = native.ffi.from_buffer("char[]", data)
        # "compress" on a route without compression takes the path that copies. The other one
        # loses the payload of 16 KiB and more when the kernel's buffer is full.
        native.ws_send(native.PLAIN, self._ws, data, length, opcode, True, last)
