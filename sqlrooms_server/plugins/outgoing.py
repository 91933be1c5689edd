"""Messages of a stream to its client, each sent when the socket and the client take it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from sqlrooms_server.errors import Busy, QueryId, ServerError
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import framed
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull


class Unsent:
    """What waits for one connection, of all its streams, in bytes. From any thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, size: int) -> bool:
        """Whether there was room; one message may always wait."""
        with self._lock:
            if self._bytes and self._bytes + size > self.most:
                return False
            self._bytes += size
            return True

    def remove(self, size: int) -> None:
        with self._lock:
            self._bytes -= size


class Outgoing:
    """What one stream has sent. ``put`` and ``end`` are for any thread, the rest for the loop.

    Nothing leaves before :meth:`begin`. With a ``window``, less than that is under way that the
    client has not acknowledged, or a single message.
    """

    def __init__(
        self,
        peer: Peer,
        unsent: Unsent,
        window: int | None,
        post: Callable[..., None],
        fail: Callable[[ServerError], Any],
    ) -> None:
        self.has_ended = False
        self.is_dropped = False
        self._peer = peer
        self._unsent = unsent
        self._window = window
        self._post = post
        self._fail = fail
        self._lock = threading.Lock()
        self._messages: deque[bytes] = deque()
        self._size = 0
        self._has_begun = False
        # Messages that the connection has.
        self._under_way = 0
        self._sent = self._acknowledged = 0
        self._on_finished: Callable[[], None] | None = None

    @property
    def waiting(self) -> int:
        """What has not left, in bytes."""
        return self._size

    def put(self, query_id: QueryId, payload: bytes, references: list[dict[str, Any]]) -> None:
        """Send a message. Raises ``Busy`` when too much waits; then the stream ends, too."""
        head = {"type": "object-data", "queryId": query_id, "references": references}
        message = framed(head, payload)
        with self._lock:
            if self.has_ended:
                return
            has_room = self._unsent.add(len(message))
            if has_room:
                self._size += len(message)
                self._messages.append(message)
            else:
                self.has_ended = True
        if has_room:
            self._post(self._pump)
            return
        error = Busy(
            f"The client does not read what objects send: {self._unsent.most} bytes wait for it "
            "(--max-queued-bytes)."
        )
        self._post(self._fail, error)
        raise error

    def end(self) -> None:
        """Take no more."""
        with self._lock:
            self.has_ended = True

    def begin(self) -> None:
        """Let what waits leave."""
        self._has_begun = True
        self._pump()

    def acknowledge(self, size: int) -> None:
        """The client has taken ``size`` bytes in all."""
        self._acknowledged = max(self._acknowledged, min(size, self._sent))
        self._pump()

    def finish(self, then: Callable[[], None]) -> None:
        """Take no more, and call ``then`` when everything has left."""
        self.end()
        self._on_finished = then
        self._pump()

    def drop(self) -> None:
        """Take no more, and send nothing that has not begun to leave."""
        with self._lock:
            self.has_ended = True
            self.is_dropped = True
            dropped = sum(map(len, self._messages))
            self._messages.clear()
        self._gone(dropped)

    def _pump(self) -> None:
        while self._has_begun and self._has_window():
            with self._lock:
                if not self._messages:
                    break
                message = self._messages.popleft()
            self._sent += len(message)
            self._under_way += 1
            self._peer.stream(_Message(self, message), is_text=False)
        if self._on_finished is not None and not self._messages and not self._under_way:
            then, self._on_finished = self._on_finished, None
            then()

    def _has_window(self) -> bool:
        return self._window is None or self._sent - self._acknowledged < self._window

    def left(self, message: _Message) -> None:
        """For a message: the connection does not have it any more."""
        self._under_way -= 1
        self._gone(message.size)
        # Later, since the connection is in the middle of its work.
        self._post(self._pump)

    def _gone(self, size: int) -> None:
        with self._lock:
            self._size -= size
        self._unsent.remove(size)


class _Message:
    """One message, as a :class:`transport.Source`."""

    def __init__(self, outgoing: Outgoing, message: bytes) -> None:
        self.size = len(message)
        self._outgoing = outgoing
        self._rest: memoryview = memoryview(message)

    def pull(self) -> tuple[Chunk, bool] | Pull:
        if self._outgoing.is_dropped and len(self._rest) == self.size:
            self._rest = memoryview(b"")
            self._outgoing.left(self)
            return Pull.WITHDRAWN
        fragment, self._rest = self._rest[:FRAGMENT_BYTES], self._rest[FRAGMENT_BYTES:]
        return fragment, not len(self._rest)

    def sent(self) -> None:
        self._outgoing.left(self)

    def dropped(self) -> None:
        self._outgoing.left(self)
