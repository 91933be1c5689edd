"""The outputs of a stream: batches of handlers to messages, as the client takes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Protocol

from sqlrooms_server.db.outputs import StreamEncoder
from sqlrooms_server.errors import BadRequest, Cancelled, QueryId, ServerError
from sqlrooms_server.outbox import Outbox
from sqlrooms_server.plugins.waiting import Waiting
from sqlrooms_server.protocol.streams import stream_data_head
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull


class Receiver(Protocol):
    """The request that an output belongs to."""

    query_id: QueryId
    answered: bool

    def begin_sending(self, output: Output) -> None:
        """There is something to send. From any thread."""

    def moved(self) -> None:
        """The client took something."""

    def has_room(self) -> None:
        """A full output is not full any more. From any thread."""

    def sent_all(self) -> None:
        """An output has been handed to the socket."""


class Output:
    """One output; a :class:`transport.FrameSource`.

    ``window`` is how many bytes may be under way, None for any number. ``write`` and ``finish``
    are for handlers, ``pull_frame``, ``dropped`` and ``acknowledge`` for the loop thread.
    """

    def __init__(
        self, name: str, receiver: Receiver, window: int | None, compression: str | None
    ) -> None:
        self.name = name
        self.is_full = False
        self.waiting = Waiting()
        self._receiver = receiver
        self._window = window
        self._encoder = StreamEncoder(compression)
        # Of several who write, one at a time: the order of what is encoded is the order sent.
        self._writing = threading.Lock()
        self._outbox = Outbox(
            on_room=self._on_room, on_data=self._begin_sending, on_sent=receiver.sent_all
        )
        self._has_begun = False
        self._is_dropped = False
        self._is_finished = False
        self._is_sent = False
        self._seq = 0
        self._put_bytes = 0
        self._sent_bytes = 0
        self._acked_bytes = 0

    @property
    def has_unsent(self) -> bool:
        """Whether the client has something to take."""
        return self._put_bytes > self._sent_bytes or (self._is_finished and not self._is_sent)

    def write(self, batches: Iterator[Any]) -> bool:
        """Add the next of ``batches``; False when there is none.

        Raises ``OtherColumns``, and ``Cancelled`` after :meth:`finish`.
        """
        with self._writing:
            if self._is_finished:
                raise Cancelled("The stream has ended.")
            batch = next(batches, None)
            if batch is None:
                return False
            for chunk in self._encoder.encode(batch):
                self._put(chunk)
        return True

    def finish(self) -> None:
        """There will be no more batches."""
        with self._writing:
            end = self._encoder.end()
            if end:
                self._put(end)
            self._is_finished = True
            self._outbox.finish()
        self._begin_sending()

    def _put(self, chunk: Chunk) -> None:
        self._put_bytes += len(chunk)
        with self.waiting:
            self.is_full = self._outbox.put(chunk) or self._is_dropped
        if not self._has_begun:
            self._has_begun = True
            self._begin_sending()

    def _begin_sending(self) -> None:
        self._receiver.begin_sending(self)

    def _on_room(self) -> None:
        with self.waiting:
            self.is_full = False
        self.waiting.changed()
        self._receiver.has_room()

    def acknowledge(self, size: int) -> ServerError | None:
        """The client consumed ``size`` bytes in all; why that cannot be."""
        if size > self._sent_bytes:
            return BadRequest(
                f"streamAck of {size} bytes of output {self.name!r}, but only {self._sent_bytes} "
                "were sent."
            )
        if size > self._acked_bytes:
            self._acked_bytes = size
            self._begin_sending()
        return None

    def pull_frame(self) -> list[Chunk] | Pull:
        if self._receiver.answered or self._is_sent:
            return Pull.WITHDRAWN
        pieces, size, last = self._outbox.pull_frame(self._room)
        if not pieces:
            return Pull.NOT_READY
        self._receiver.moved()
        self._sent_bytes += size
        more = {"rows": self._encoder.rows, "bytes": self._sent_bytes} if last else {}
        head = stream_data_head(self._receiver.query_id, self.name, self._seq, last, **more)
        self._seq += 1
        if last:
            self._is_sent = True
            self._outbox.sent()
        return [head, *pieces]

    def _room(self, size: int) -> int:
        """How much can be sent after ``size`` bytes that are not counted yet."""
        if self._window is None:
            return FRAGMENT_BYTES
        return min(FRAGMENT_BYTES, self._window - (self._sent_bytes - self._acked_bytes) - size)

    def dropped(self) -> None:
        # Who writes waits for the end of the stream, which follows.
        with self.waiting:
            self._is_dropped = self.is_full = True
        self._outbox.dropped()

    def release(self) -> None:
        """The stream has ended: nobody waits to write any more."""
        self._outbox.dropped()
        with self.waiting:
            self._is_dropped = self.is_full = False
        self.waiting.changed()
