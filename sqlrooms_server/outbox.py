"""A reply under way: chunks from one worker to the loop thread, few at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull

# Above it the job parks; below the low mark it goes on. A fast reader takes this much in a
# millisecond, so that more would only be memory.
HIGH_BYTES = 2 << 20
LOW_BYTES = 1 << 20

# Where what is sent is cut into messages, one ends above it. Each costs a header, calls of the
# library and a wake-up of the client.
_FRAME_BYTES = 1 << 20


def _nothing() -> None:
    """In place of the callbacks of an outbox that nobody needs any more."""


class Outbox:
    """One message that is produced while it is sent; a :class:`transport.Source`.

    The worker calls ``put``, ``finish`` and ``fail``; the loop thread ``pull``, ``sent`` and
    ``dropped``, and ``fail`` too. It is full from ``high`` bytes on. ``on_room`` is called when a
    full outbox has room again, ``on_data`` when an empty one has something to send, ``on_sent``
    after the last fragment of a message that did not fail.
    """

    def __init__(
        self,
        *,
        on_room: Callable[[], None],
        on_data: Callable[[], None],
        on_sent: Callable[[], None],
        high: int = HIGH_BYTES,
    ) -> None:
        self._high = high
        self._low = min(LOW_BYTES, high // 2)
        self._on_room = on_room
        self._on_data = on_data
        self._on_sent = on_sent
        self._lock = threading.Lock()
        self._chunks: deque[Chunk] = deque()
        self._size = 0
        # Of all chunks.
        self.put_bytes = 0
        self._rest: memoryview | None = None
        self._begun = False
        self._full = False
        self._starving = False
        self._finished = False
        self._failed = False

    @property
    def is_starving(self) -> bool:
        """Whether the socket could take more than there is."""
        return self._starving

    def put(self, chunk: Chunk) -> bool:
        """Add a chunk; True when the outbox is full now, and ``on_room`` will follow."""
        with self._lock:
            if self._failed:
                return False
            self._chunks.append(chunk)
            self._size += len(chunk)
            self.put_bytes += len(chunk)
            self._full = self._size >= self._high
            wake = self._starving
            self._starving = False
            full = self._full
        if wake:
            self._on_data()
        return full

    def finish(self) -> None:
        """There will be no more chunks."""
        with self._lock:
            self._finished = True
            wake = self._starving
            self._starving = False
        if wake:
            self._on_data()

    def fail(self, broken_end: bytes) -> None:
        """End the message so that nobody takes it for complete.

        ``broken_end`` is what makes it invalid where a chunk ends; inside a chunk, which is one
        unit of its format, breaking off is enough.
        """
        with self._lock:
            self._failed = self._finished = True
            self._chunks.clear()
            self._size = 0
            if self._rest is None and self._begun:
                self._chunks.append(broken_end)
                self._size = len(broken_end)
            self._rest = None
            wake = self._starving
            self._starving = False
        if wake:
            self._on_data()

    def pull(self, limit: int = FRAGMENT_BYTES) -> tuple[Chunk, bool] | Pull:
        """The next fragment, of at most ``limit`` bytes, and whether it is the last."""
        room = False
        with self._lock:
            if self._failed and not self._begun:
                self._let_go()
                return Pull.WITHDRAWN
            if self._rest is None:
                if not self._chunks:
                    self._starving = not self._finished
                    return (b"", True) if self._finished else Pull.NOT_READY
                self._rest = memoryview(self._chunks.popleft())
            fragment = self._rest[:limit]
            rest = self._rest[limit:]
            self._rest = rest if len(rest) else None
            self._begun = True
            self._size -= len(fragment)
            if self._full and self._size < self._low:
                self._full = False
                room = True
            last = self._finished and self._rest is None and not self._chunks
        if room:
            self._on_room()
        return fragment, last

    def pull_frame(self, room: Callable[[int], int]) -> tuple[list[Chunk], int, bool]:
        """The pieces of the next message, their bytes, and whether they are the last; no pieces
        when there is nothing to send now.

        ``room`` tells how much can be sent behind so many bytes.
        """
        pieces: list[Chunk] = []
        size, last = 0, False
        while size < _FRAME_BYTES and not last:
            limit = room(size)
            if limit <= 0:
                break
            pulled = self.pull(limit)
            if isinstance(pulled, Pull):
                break
            piece, last = pulled
            pieces.append(piece)
            size += len(piece)
        return pieces, size, last

    def sent(self) -> None:
        """For the connection: the last fragment was handed to the socket."""
        on_sent = self._on_sent
        self._let_go()
        if not self._failed:
            on_sent()

    def dropped(self) -> None:
        """For the connection: it closed first."""
        self.fail(b"")
        self._let_go()

    def _let_go(self) -> None:
        """Forget who is called back, who knows this: nothing is left to the collector."""
        self._on_room = self._on_data = self._on_sent = _nothing
