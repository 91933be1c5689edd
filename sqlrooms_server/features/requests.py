"""Requests under way: each id once for each connection, each request answered exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from sqlrooms_server.db.engine import Cursor
from sqlrooms_server.errors import (
    Busy,
    Cancelled,
    Conflict,
    InternalError,
    QueryId,
    ServerError,
    ShuttingDown,
)
from sqlrooms_server.features import MessageHandler, Route
from sqlrooms_server.jobs import Job, Scheduler, Work
from sqlrooms_server.outbox import Outbox
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import Cancel, encode
from sqlrooms_server.transport.connection import Chunk

log = logging.getLogger(__name__)

# A reply that is complete below this is sent as one frame, so that an error after the first rows
# can still be just an error.
_STREAM_BYTES = 64 << 10


class Request:
    """One request: the worker's side of its reply, and what cancels it.

    The worker calls ``put`` and ``reply``; everything else belongs to the loop thread.
    """

    def __init__(
        self, requests: Requests, peer: Peer, query_id: QueryId, size: int, broken_end: bytes
    ) -> None:
        self.peer = peer
        self.size = size
        self.query_id = query_id
        self.cursor: Cursor | None = None
        self.is_text = True
        self.answered = False
        self.job: Job | None = None
        self._requests = requests
        self._broken_end = broken_end
        self._outbox: Outbox | None = None
        self._reply: bytes = b""

    def put(self, chunk: Chunk) -> bool:
        """Add a part of the reply; True when there is no room for more now."""
        if self._outbox is None:
            if not self._reply and len(chunk) < _STREAM_BYTES:
                self._reply = bytes(chunk)
                return False
            self._outbox = Outbox(on_room=self._resume, on_data=self._wake, on_sent=self._answered)
            if self._reply:
                self._outbox.put(self._reply)
            self._requests.post(self._start_stream)
        return self._outbox.put(chunk)

    def reply(self, message: bytes) -> None:
        """Set the whole reply."""
        self._reply = message

    @property
    def _has_written(self) -> bool:
        return self.cursor is not None and self.cursor.has_written

    def interrupt(self) -> None:
        """Cut short what the worker does. From any thread."""
        if self.cursor is not None:
            self.cursor.interrupt()

    def stop(self, reason: ServerError) -> bool:
        """Give up with ``reason``; False when the reply has left already."""
        if self.answered or self.job is None:
            return False
        if self.job.stop(reason):
            return True
        if self._outbox is None:
            return False
        # The work is done, but a client that reads slowly has not got all of it.
        self.fail(reason)
        return True

    def done(self, error: BaseException | None) -> None:
        """The job ended. From any thread."""
        if error is None and self._outbox is not None:
            self._outbox.finish()
        else:
            self._requests.post(self._finish, error)

    def fail(self, error: ServerError) -> None:
        """Break off what was sent of the reply and send ``error`` after it."""
        if self.answered:
            return
        if self._outbox is not None:
            self._outbox.fail(self._broken_end)
        text = str(error)
        if self._has_written and isinstance(error, Cancelled | ShuttingDown):
            text += " The statement itself had finished; its changes stand."
        self.peer.send_error(type(error)(text, self.query_id))
        self._answered()

    def _finish(self, error: BaseException | None) -> None:
        if error is not None:
            self.fail(as_server_error(error))
        elif not self.answered:
            if self.is_text:
                self.peer.send(self._reply)
            else:
                self.peer.send_binary(self._reply)
            self._answered()

    def _start_stream(self) -> None:
        assert self._outbox is not None
        if self.answered:
            self._outbox.dropped()
        else:
            self.peer.stream(self._outbox, is_text=self.is_text)

    def _resume(self) -> None:
        assert self.job is not None
        self.job.resume()

    def _wake(self) -> None:
        self._requests.post(self.peer.pump)

    def _answered(self) -> None:
        self.answered = True
        self._requests.forget(self)


class Requests:
    """The requests of all connections. A feature: it answers ``cancel``."""

    def __init__(
        self,
        scheduler: Scheduler,
        post: Callable[..., None],
        *,
        max_in_flight: int,
        max_held: int,
    ) -> None:
        self.post = post
        self._scheduler = scheduler
        self._max_in_flight = max_in_flight
        self._max_held = max_held
        self._of_peer: dict[Peer, dict[QueryId, Request]] = {}

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Cancel: self._cancel}

    @property
    def routes(self) -> Mapping[str, Route]:
        return {}

    def submit(
        self,
        peer: Peer,
        query_id: QueryId,
        work: Callable[[Request], Work],
        *,
        size: int,
        broken_end: bytes = b"",
    ) -> None:
        """Queue ``work`` as a request of ``peer``, or answer it with why not.

        ``size`` is what the request holds in memory, in bytes. ``broken_end`` is what makes a
        half-sent reply invalid, see :meth:`Outbox.fail`.
        """
        requests = self._of_peer.setdefault(peer, {})
        if query_id in requests:
            peer.send_error(
                Conflict(f"queryId {query_id!r} is in use by a query in flight.", query_id)
            )
            return
        if len(requests) >= self._max_in_flight:
            peer.send_error(
                Busy(
                    f"This connection has {len(requests)} unanswered requests, which is the "
                    "limit (--max-in-flight).",
                    query_id,
                )
            )
            return
        held = sum(request.size for request in requests.values())
        if requests and held + size > self._max_held:
            peer.send_error(
                Busy(
                    f"The unanswered requests of this connection hold {held} bytes; with this one "
                    f"they would pass {self._max_held}, twice --max-message-size.",
                    query_id,
                )
            )
            return
        request = Request(self, peer, query_id, size, broken_end)
        requests[query_id] = request
        try:
            request.job = self._scheduler.submit(
                peer, work(request), request.interrupt, request.done
            )
        except ServerError as error:
            request.fail(error)

    def forget(self, request: Request) -> None:
        """The request was answered; its id is free again."""
        requests = self._of_peer.get(request.peer)
        if requests is not None and requests.get(request.query_id) is request:
            del requests[request.query_id]
            if not requests:
                del self._of_peer[request.peer]

    def closed(self, peer: Peer) -> None:
        """Stop what a client left behind."""
        # The newest first: ending one that runs would let a worker start one that waits.
        for request in reversed(list(self._of_peer.pop(peer, {}).values())):
            request.stop(Cancelled("The connection was closed."))

    def abandon(self, reason: ServerError) -> None:
        """Answer everything that is left with ``reason``, whether it ended or not."""
        for requests in list(self._of_peer.values()):
            for request in list(requests.values()):
                request.fail(reason)

    def _cancel(self, peer: Peer, cancel: Cancel) -> None:
        request = self._of_peer.get(peer, {}).get(cancel.query_id)
        cancelled = request is not None and request.stop(Cancelled("The query was cancelled."))
        peer.send(encode({"type": "cancelAck", "queryId": cancel.query_id, "cancelled": cancelled}))


def as_server_error(error: BaseException) -> ServerError:
    """What a client is told about ``error``: the one place that decides it."""
    if isinstance(error, ServerError):
        return error
    log.error("A request failed for a reason the server does not know.", exc_info=error)
    return InternalError("The server failed on this request; its log tells more.")
