"""Results in chunks: many messages, within a window, while others go between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlrooms_server.errors import BadRequest, QueryId, Timeout
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.messages import Ack
from sqlrooms_server.outbox import Outbox
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import arrow_prefix
from sqlrooms_server.timers import Timer
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull


class ChunkedRequest(Request):
    """A request whose result is a sequence of messages; a :class:`transport.FrameSource`.

    ``window`` is how many bytes may be under way, None for any number. ``summary`` is for the
    worker, which fills it in before its work ends. A client that does not acknowledge for
    ``idle_timeout`` seconds while the window is full loses the result.
    """

    is_chunked = True

    def __init__(
        self,
        requests: Requests,
        peer: Peer,
        query_id: QueryId,
        *,
        size: int,
        window: int | None,
        idle_timeout: float,
    ) -> None:
        super().__init__(requests, peer, query_id, size=size)
        self.is_text = False
        self.summary: dict[str, Any] = {}
        self._window = window
        self._idle_timeout = idle_timeout
        self._seq = 0
        self._sent_bytes = 0
        self._acked_bytes = 0
        self._stalled: Timer | None = None

    def put(self, chunk: Chunk) -> bool:
        if self._outbox is None:
            self._outbox = Outbox(on_room=self.resume, on_data=self._wake, on_sent=self._answered)
            self._requests.post(self._start_stream)
        return self._outbox.put(chunk)

    def acknowledge(self, size: int, *, has_last: bool = False) -> None:
        """The client consumed ``size`` bytes in all. More than it got ends the result."""
        if size > self._sent_bytes:
            self.stop(BadRequest(f"ack of {size} bytes, but only {self._sent_bytes} were sent."))
            return
        if size <= self._acked_bytes:
            return
        self._acked_bytes = size
        self._has_moved()
        self._start_stream()

    def pull_frame(self) -> list[Chunk] | Pull:
        if self.answered or self._outbox is None:
            return Pull.WITHDRAWN
        pieces, size, last = self._outbox.pull_frame(self._room)
        if not pieces:
            return Pull.NOT_READY
        self._sent_bytes += size
        more = self._final_fields() if last else {}
        head = arrow_prefix(self.query_id, seq=self._seq, last=last, **more)
        self._cut(pieces, size, last, more)
        self._seq += 1
        if last:
            self._outbox.sent()
        return [head, *pieces]

    def _cut(self, pieces: list[Chunk], size: int, last: bool, more: dict[str, Any]) -> None:
        """The message ``_seq`` is about to be sent."""

    def _room(self, size: int) -> int:
        """How much can be sent after ``size`` bytes that are not counted yet."""
        if self._window is None:
            return FRAGMENT_BYTES
        room = self._window - (self._sent_bytes - self._acked_bytes) - size
        if room <= 0 and not size:
            self._wait_for_acks()
        return min(FRAGMENT_BYTES, room)

    def dropped(self) -> None:
        if self._outbox is not None:
            self._outbox.dropped()

    def _final_fields(self) -> dict[str, Any]:
        assert self.job is not None and self.job.began is not None
        queued = self.job.began - self.job.submitted
        total = time.monotonic() - self.job.submitted
        seconds = {
            "queued": queued,
            "running": self.job.worked,
            "sending": max(0.0, total - queued - self.job.worked),
        }
        milliseconds = {name: round(1000 * value, 3) for name, value in seconds.items()}
        return {**self.summary, "bytes": self._sent_bytes, "ms": milliseconds}

    def _wait_for_acks(self) -> None:
        if self._stalled is None:
            acked = self._acked_bytes
            self._stalled = self._requests.timers.after(
                self._idle_timeout, lambda: self._requests.post(self._give_up, acked)
            )

    def _has_moved(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _give_up(self, acked: int) -> None:
        """The time is over that began when ``acked`` bytes were acknowledged."""
        if self._acked_bytes == acked:
            self.stop(
                Timeout(
                    f"The client did not acknowledge a chunk for {self._idle_timeout:g} s "
                    "(--stream-idle-timeout)."
                )
            )

    def _start_stream(self) -> None:
        if self.answered:
            self.dropped()
        else:
            self.peer.stream_frames(self)

    def _wake(self) -> None:
        self._requests.post(self._start_stream)

    @property
    def _begins_no_more_messages(self) -> bool:
        return False

    def _answered(self) -> None:
        self._has_moved()
        super()._answered()


class Acks(Feature):
    """A feature: it answers nothing to ``ack``, but lets chunked results go on.

    ``on_late`` is told of those that are for nothing in flight: the result has ended, and they
    were under way.
    """

    def __init__(
        self, requests: Requests, on_late: Callable[[Peer, Ack], None] | None = None
    ) -> None:
        self._requests = requests
        self._on_late = on_late

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Ack: self._ack}

    def _ack(self, peer: Peer, ack: Ack) -> None:
        request = self._requests.find(peer, ack.query_id)
        if isinstance(request, ChunkedRequest):
            request.acknowledge(ack.size, has_last=ack.last)
        elif request is None and self._on_late is not None:
            self._on_late(peer, ack)
