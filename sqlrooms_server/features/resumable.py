"""A chunked result that goes on over another connection when its own is lost.

The states of one and its allowed steps::

    sent    -> waiting   its connection was lost
    sent    -> sent      another connection took it over
    sent    -> kept      its answer is complete, and the client may not have got all of it
    waiting -> sent      its client came back
    waiting -> kept      it failed, or had nothing to tell
    kept    -> sent      its client came back for what it lacks
    any     -> gone      acknowledged to its end, cancelled, or nobody came in time

It is sent when it has a sender, kept when it is answered and has none, and gone without a token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlrooms_server.access.roles import Role
from sqlrooms_server.errors import BadRequest, Conflict, Gone, QueryId, ServerError
from sqlrooms_server.features.chunked import ChunkedRequest
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import arrow_prefix, encode_reply, with_query_id
from sqlrooms_server.transport.connection import Chunk, Pull

if TYPE_CHECKING:
    from sqlrooms_server.features.resuming import Resuming

# What a message that is kept costs besides its body, and how many of a stream are: a client may
# ask for bodies of a byte each.
FRAME_COST = 400
_MAX_FRAMES = 10_000

# A part of a chunk keeps all of it alive: of three columns of numbers, 3 MB. Copying, which takes a
# tenth of the time of sending, is for those that are larger.
_MAX_SHARED_BYTES = 4 << 20

# A stream that has ended, with all that belongs to it.
STREAM_COST = 4 << 10


@dataclass(frozen=True, slots=True)
class _Frame:
    """A message that was sent. ``start`` counts the bytes of the bodies before it."""

    seq: int
    start: int
    size: int
    pieces: list[Chunk]
    last: bool
    more: dict[str, Any]

    @property
    def end(self) -> int:
        return self.start + self.size


class _Sender:
    """What one connection is sent. It may outlive that it is this connection's turn: a server
    may learn that a connection is lost long after its client."""

    def __init__(self, stream: ResumableRequest) -> None:
        self._stream = stream

    def pull_frame(self) -> list[Chunk] | Pull:
        return self._stream.pull_for(self)

    def dropped(self) -> None:
        """Its connection is closed, which the stream is told by :meth:`Request.left`."""


def owner_of(peer: Peer) -> tuple[str, Role]:
    """Who may resume what ``peer`` asked for."""
    # Somebody who was disconnected in the meantime has a role that nobody comes back with.
    return peer.identity.user if peer.identity is not None else "", peer.role


def _bounded(piece: Chunk) -> Chunk:
    """``piece``, copied when it keeps a chunk alive that is much larger."""
    chunk = memoryview(piece).obj
    return bytes(piece) if memoryview(chunk).nbytes > _MAX_SHARED_BYTES else piece


class ResumableRequest(ChunkedRequest):
    """A chunked request that is cancelled by :class:`Resuming`, and not by a lost connection.

    What was sent is kept until the client acknowledges it: at least the last bytes of the window
    of the server, to which that of the client is bounded.
    """

    def __init__(
        self,
        requests: Requests,
        resuming: Resuming,
        peer: Peer,
        query_id: QueryId,
        *,
        size: int,
        window: int | None,
        idle_timeout: float,
    ) -> None:
        bounded = None if window is None else min(window, resuming.window)
        super().__init__(
            requests, peer, query_id, size=size, window=bounded, idle_timeout=idle_timeout
        )
        self.owner = owner_of(peer)
        # Those who share one name, or have none, are told apart by where they are.
        self.whose = self.owner[0] or peer.remote_address
        self.token = ""
        # What it keeps, in bytes.
        self.held = 0
        self._resuming = resuming
        # That of its reply when it is a text message: workers do not know of other connections.
        self._first_id = query_id
        self._sender: _Sender | None = _Sender(self)
        self._frames: deque[_Frame] = deque()
        # The message that its connection is sent next.
        self._next = 0

    @property
    def acknowledges(self) -> bool:
        """Whether the client says what it has got."""
        return self._window is not None

    @property
    def is_complete(self) -> bool:
        """Whether its last chunk was sent."""
        return self.answered and self.error is None and self._outbox is not None

    def taken_up(self) -> None:
        self.token = self._resuming.add(self)
        self.peer.send(
            encode_reply(
                "resumable",
                self.query_id,
                token=self.token,
                window=self._window or self._resuming.window,
                timeoutMs=1000 * self._resuming.timeout,
            )
        )

    # Connections come and go.

    def left(self) -> None:
        if not self.token:
            super().left()
            return
        self._sender = None
        self._has_moved()
        if self.answered:
            self._resuming.keep(self)
        else:
            self._resuming.wait_for(self)

    def go_on(self, peer: Peer, query_id: QueryId, seq: int, acked: int | None) -> None:
        """Send ``peer`` what comes from ``seq`` on. Raises ``ServerError`` when that cannot be."""
        if self._sender is not None and self.peer is peer:
            raise Conflict("This stream is being sent over this very connection.", query_id)
        is_over = self.answered and not self.is_complete
        if seq > self._seq or (self.is_complete and seq == self._seq):
            raise BadRequest(f"seq is {seq}, but only {self._seq} messages were sent.", query_id)
        first = self._seq - len(self._frames)
        if seq < first and not is_over:
            self._resuming.give_up(self)
            raise Gone(
                f"The stream cannot go on from {seq}: it is kept from {first} on "
                "(--resume-window, --resume-memory).",
                query_id,
            )
        start = 0 if is_over else self._start_of(seq)
        if acked is not None and acked > start and not is_over:
            raise BadRequest(f"bytes is {acked}, but before seq only {start} were sent.", query_id)
        old_peer, old_id = self.peer, self.query_id
        self._requests.move(self, peer, query_id)
        self._resuming.came_back(self, old_peer, old_id)
        if self._sender is not None:
            old_peer.send_error(Gone("Another connection has resumed this stream.", old_id))
        self._has_moved()
        self._sender, self._next = _Sender(self), seq
        self._drop_until(start)
        peer.send(encode_reply("resumed", query_id, seq=seq))
        if is_over:
            self._tell_end()
            return
        if acked is not None:
            self.acknowledge(acked)
        self._start_stream()

    def _tell_end(self) -> None:
        """Answer once more what is no chunk."""
        if self.error is not None:
            self.peer.send_error(type(self.error)(str(self.error), self.query_id))
        else:
            self.peer.send(with_query_id(self._reply, self._first_id, self.query_id))
        self._rest()

    def _rest(self) -> None:
        """All of the answer was sent."""
        self._sender = None
        self._requests.forget(self)
        self._resuming.keep(self)

    # What is sent, and what of it is kept.

    def pull_for(self, sender: _Sender) -> list[Chunk] | Pull:
        """The next message for the connection of ``sender``."""
        if sender is not self._sender:
            return Pull.WITHDRAWN
        if self._next == self._seq:
            pulled = self.pull_frame()
            self._next = self._seq
            return pulled
        frame = self._frames[self._next - self._seq]
        self._next += 1
        if frame.last:
            self._rest()
        head = arrow_prefix(self.query_id, seq=frame.seq, last=frame.last, **frame.more)
        return [head, *frame.pieces]

    def _cut(self, pieces: list[Chunk], size: int, last: bool, more: dict[str, Any]) -> None:
        if not self.token:
            return
        kept = [_bounded(piece) for piece in pieces]
        self._frames.append(_Frame(self._seq, self._sent_bytes - size, size, kept, last, more))
        self._hold(size + FRAME_COST)
        window = self._resuming.window
        while len(self._frames) > 1 and (
            self._sent_bytes - self._frames[0].end >= window or len(self._frames) > _MAX_FRAMES
        ):
            self._drop_first()
        while self._frames and not self._resuming.has_room():
            self._drop_first()

    def _hold(self, size: int) -> None:
        self.held += size
        self._resuming.held += size

    def _drop_first(self) -> None:
        self._hold(-self._frames.popleft().size - FRAME_COST)

    def _drop_until(self, position: int) -> None:
        """Forget what ends before so many bytes, or there."""
        while self._frames and self._frames[0].end <= position and not self._frames[0].last:
            self._drop_first()

    def _start_of(self, seq: int) -> int:
        """How many bytes were sent before the message ``seq``, which is kept or the next one."""
        return self._sent_bytes if seq >= self._seq else self._frames[seq - self._seq].start

    def forget_all(self) -> None:
        """For :class:`Resuming`: nobody can resume it any more."""
        self.token = ""
        self._frames.clear()
        self._hold(-self.held)

    def acknowledge(self, size: int, *, has_last: bool = False) -> None:
        sent = self._start_of(self._next)
        if size > sent:
            self.stop(BadRequest(f"ack of {size} bytes, but only {sent} were sent."))
            return
        self._drop_until(size)
        if self.is_complete and self._sender is None:
            # The last one may be empty, so that bytes do not tell whether it has arrived.
            if has_last or (size == self._sent_bytes and self._frames and self._frames[-1].size):
                self._resuming.discard(self)
        elif not self.answered:
            super().acknowledge(size)

    def _start_stream(self) -> None:
        if self._sender is not None:
            self.peer.stream_frames(self._sender)

    def _give_up(self, acked: int) -> None:
        # Whoever has no connection cannot acknowledge.
        if self._sender is not None:
            super()._give_up(acked)

    # How it ends.

    def stop(self, reason: ServerError) -> bool:
        if not self.answered:
            return super().stop(reason)
        if self._sender is None:
            return False
        self._sender = None
        self._requests.forget(self)
        self._resuming.discard(self)
        self.peer.send_error(type(reason)(str(reason), self.query_id))
        return True

    def _finish(self, error: BaseException | None) -> None:
        if error is None and not self.answered:
            self._reply = with_query_id(self._reply, self._first_id, self.query_id)
            self._first_id = self.query_id
        super()._finish(error)

    def _answered(self) -> None:
        super()._answered()
        self._sender = None
        if not self.token:
            return
        if not self.is_complete:
            # The rest of the result, if there was one, is of no use.
            while self._frames:
                self._drop_first()
            self._hold(len(self._reply))
        self._hold(STREAM_COST)
        self._resuming.keep(self)
