"""Requests under way: each id once for each connection, each request answered exactly once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.errors import (
    Busy,
    Cancelled,
    Conflict,
    InternalError,
    QueryError,
    QueryId,
    ServerError,
    Timeout,
)
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.limits import out_of_time
from sqlrooms_server.jobs import Job, Lane, Scheduler, State, Work
from sqlrooms_server.messages import Cancel
from sqlrooms_server.outbox import Outbox
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode, encode_reply
from sqlrooms_server.timers import Timer, Timers
from sqlrooms_server.transport.connection import Chunk

log = logging.getLogger(__name__)

# A reply that is complete below this is sent as one frame, so that an error after the first rows
# can still be just an error.
_STREAM_BYTES = 64 << 10

# Chunked results of one connection at one time. They leave side by side, and the client decides
# when each goes on, so those that wait for it must leave room for others. Each holds about 8 MiB,
# most of it in DuckDB.
_MAX_OPEN_CHUNKED = 32

# At most five progress messages a second.
PROGRESS_SECONDS = 0.2


@dataclass
class _Client:
    """What is under way for one connection."""

    requests: dict[QueryId, Request] = field(default_factory=dict)
    lane: Lane = field(default_factory=Lane)
    chunked: Lane = field(default_factory=lambda: Lane(_MAX_OPEN_CHUNKED))
    held: int = 0


class SharedRun(Protocol):
    """What does the work of several requests."""

    @property
    def job(self) -> Job | None: ...

    @property
    def cursor(self) -> Cursor | None: ...


class Request:
    """One request: the worker's side of its reply, and what cancels it.

    ``size`` is what it holds in memory, in bytes. ``broken_end`` is what makes a half-sent reply
    invalid, see :meth:`Outbox.fail`. The worker calls ``put`` and ``reply``; everything else
    belongs to the loop thread.
    """

    is_chunked = False
    # Whether more messages of the client belong to it.
    goes_on = False

    def __init__(
        self,
        requests: Requests,
        peer: Peer,
        query_id: QueryId,
        *,
        size: int = 0,
        broken_end: bytes = b"",
    ) -> None:
        self.peer = peer
        self.size = size
        self.query_id = query_id
        self.cursor: Cursor | None = None
        self.is_text = True
        self.answered = False
        self.on_answered: Callable[[], None] | None = None
        # The same, for whoever only looks on.
        self.on_told: Callable[[], None] | None = None
        # What the client was told, if not its result; and the rows of that, where somebody counts.
        self.error: ServerError | None = None
        self.rows: int | None = None
        self.job: Job | None = None
        # The run that answers it together with others.
        self.shared_run: SharedRun | None = None
        self._requests = requests
        self._broken_end = broken_end
        self._outbox: Outbox | None = None
        self._reply: bytes = b""
        self._deadline: Timer | None = None
        self._progress: Timer | None = None

    def put(self, chunk: Chunk) -> bool:
        """Add a part of the reply; True when there is no room for more now."""
        if self._outbox is None:
            if not self._reply and len(chunk) < _STREAM_BYTES:
                self._reply = bytes(chunk)
                return False
            self._outbox = Outbox(on_room=self.resume, on_data=self._wake, on_sent=self._answered)
            if self._reply:
                self._outbox.put(self._reply)
            self._requests.post(self._start_stream)
        return self._outbox.put(chunk)

    def reply(self, message: bytes, *, is_text: bool = True) -> None:
        """Set the whole reply, one message."""
        self._reply = message
        self.is_text = is_text

    @property
    def reply_size(self) -> int:
        """The bytes of the reply so far."""
        return len(self._reply) if self._outbox is None else self._outbox.put_bytes

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

    def taken_up(self) -> None:
        """It waits for a worker now, or has one. Called for results in chunks."""

    def left(self) -> None:
        """Its client is gone."""
        self.stop(Cancelled("The connection was closed."))

    def done(self, error: BaseException | None) -> None:
        """The job ended. From any thread."""
        # The job may end before ``submit`` has set it here; then nobody could stop it.
        stopped = None if self.job is None else self.job.stopped
        if error is not None or self._outbox is None:
            self._requests.post(self._finish, error)
        elif stopped is not None:
            # The work ended anyway, but the client has not got all of it, and may never ask.
            self._requests.post(self.fail, stopped)
        else:
            self._outbox.finish()

    def fail(self, error: ServerError) -> None:
        """Break off what was sent of the reply and send ``error`` after it."""
        if self.answered:
            return
        if self._outbox is not None:
            self._outbox.fail(self._broken_end)
        self.refuse(error)

    def refuse(self, error: ServerError) -> None:
        """Answer with ``error`` alone."""
        text = str(error)
        if self.cursor is not None and not isinstance(error, QueryError):
            text += self.cursor.aftermath
        self.error = type(error)(text, self.query_id)
        self.peer.send_error(self.error)
        self._answered()

    def limit(self, seconds: float, name: str) -> None:
        """End with ``timeout``, which calls the limit ``name``, if this takes ``seconds``."""
        self.limit_with(seconds, out_of_time(seconds, name))

    def limit_with(self, seconds: float, error: Timeout) -> None:
        """End with ``error`` if this takes ``seconds``."""
        # From the thread of the timers, so that a busy loop does not hold up what relieves it.
        self._deadline = self._requests.timers.after(seconds, lambda: self._time_out(error))

    def _time_out(self, error: Timeout) -> None:
        if self.job is not None:
            self.job.stop(error)

    def tell_progress(self) -> None:
        """Send ``progress`` from time to time until the reply begins."""
        self._progress = self._requests.timers.after(PROGRESS_SECONDS, self._look_at_progress)

    def _look_at_progress(self) -> None:
        """On the thread of the timers: DuckDB's estimate may wait for a lock."""
        run = self.shared_run or self
        job, cursor = run.job, run.cursor
        if self.answered or job is None or self.job is None or self.job.state is State.DONE:
            return
        now = time.monotonic()
        queued = job.began is None
        message = {
            "state": "queued" if queued else "running",
            "percent": None if queued or cursor is None else cursor.progress(),
            "position": job.position() if queued else None,
            "queuedMs": round(1000 * ((job.began or now) - job.submitted)),
            "runningMs": round(1000 * (now - job.began)) if job.began else 0,
        }
        self._requests.post(self._send_progress, message)

    def _send_progress(self, message: dict[str, Any]) -> None:
        if self.answered or self._begins_no_more_messages:
            return
        if not self.peer.is_behind:
            self.peer.send(encode_reply("progress", self.query_id, **message))
        self.tell_progress()

    @property
    def _begins_no_more_messages(self) -> bool:
        """Whether what is sent now would come after the reply."""
        return self._outbox is not None

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

    def resume(self) -> None:
        """Let the work go on that yielded ``Pause.FULL``."""
        assert self.job is not None
        self.job.resume()

    def resume_soon(self) -> None:
        """The same from any thread, also before ``job`` is known."""
        self._requests.post(self.resume)

    def _wake(self) -> None:
        self._requests.post(self.peer.pump)

    def _answered(self) -> None:
        self.answered = True
        for timer in (self._deadline, self._progress):
            if timer is not None:
                timer.cancel()
        self._requests.forget(self)
        if self.on_answered is not None:
            self.on_answered()
        if self.on_told is not None:
            # Which refers to this request, and would keep it until a collection.
            on_told, self.on_told = self.on_told, None
            on_told()


class Requests(Feature):
    """The requests of all connections. A feature: it answers ``cancel``."""

    def __init__(
        self,
        scheduler: Scheduler,
        timers: Timers,
        post: Callable[..., None],
        *,
        max_in_flight: int,
        max_held: int,
    ) -> None:
        self.post = post
        self.timers = timers
        self._scheduler = scheduler
        self._max_in_flight = max_in_flight
        self._max_held = max_held
        self._clients: dict[Peer, _Client] = {}

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Cancel: self._cancel}

    def submit(
        self,
        request: Request,
        work: Work,
        lane: Lane | None = None,
        scheduler: Scheduler | None = None,
    ) -> bool:
        """Queue ``work`` for ``request``; False when it was answered with why not.

        ``lane`` is one of the connection unless given: chunked results have their own, where
        those that their client lets wait hold up nothing else. ``scheduler`` is that of queries
        unless given.
        """
        if not self.register(request):
            return False
        if lane is None:
            client = self._clients[request.peer]
            lane = client.chunked if request.is_chunked else client.lane
        try:
            scheduler = scheduler or self._scheduler
            request.job = scheduler.submit(lane, work, request.interrupt, request.done)
        except ServerError as error:
            request.fail(error)
            return False
        if request.is_chunked:
            request.taken_up()
        return True

    def register(self, request: Request) -> bool:
        """Take up ``request``; False when it was answered with why not."""
        client = self._client_of(request.peer)
        refusal = self._refusal(client, request.query_id, request.size)
        if refusal is not None:
            request.refuse(refusal)
            return False
        client.requests[request.query_id] = request
        client.held += request.size
        return True

    def move(self, request: Request, peer: Peer, query_id: QueryId) -> None:
        """Let ``request`` be one of ``peer`` from here on, whoever's it was.

        Raises ``Conflict`` or ``Busy``, and then it stays where it is.
        """
        client = self._client_of(peer)
        refusal = self._refusal(client, query_id, request.size)
        if refusal is not None:
            raise refusal
        self.forget(request)
        request.peer, request.query_id = peer, query_id
        client.requests[query_id] = request
        client.held += request.size

    def _client_of(self, peer: Peer) -> _Client:
        client = self._clients.get(peer)
        if client is None:
            client = self._clients[peer] = _Client()
        return client

    def _refusal(self, client: _Client, query_id: QueryId, size: int) -> ServerError | None:
        if query_id in client.requests:
            return Conflict(f"queryId {query_id!r} is in use by a query in flight.", query_id)
        if len(client.requests) >= self._max_in_flight:
            return Busy(
                f"This connection has {len(client.requests)} unanswered requests, which is the "
                "limit (--max-in-flight).",
                query_id,
            )
        if client.requests and client.held + size > self._max_held:
            return Busy(
                f"The unanswered requests of this connection hold {client.held} bytes; with this "
                f"one they would pass {self._max_held}, twice --max-message-size.",
                query_id,
            )
        return None

    def find(self, peer: Peer, query_id: QueryId) -> Request | None:
        """The request of ``peer`` under ``query_id`` that is in flight."""
        client = self._clients.get(peer)
        return None if client is None else client.requests.get(query_id)

    def forget(self, request: Request) -> None:
        """The request was answered; its id is free again."""
        client = self._clients.get(request.peer)
        if client is not None and client.requests.get(request.query_id) is request:
            del client.requests[request.query_id]
            client.held -= request.size

    def reject(self, peer: Peer, error: ServerError) -> None:
        """Answer a message that could not be read. A request that it is a part of has failed."""
        request = None if error.query_id is None else self.find(peer, error.query_id)
        if request is not None and request.goes_on:
            request.stop(error)
        else:
            peer.send_error(error)

    def closed(self, peer: Peer) -> None:
        """Stop what a client left behind."""
        client = self._clients.pop(peer, None)
        if client is None:
            return
        # The newest first: ending one that runs would let a worker start one that waits.
        for request in reversed(list(client.requests.values())):
            request.left()

    def abandon(self, reason: ServerError) -> None:
        """Answer everything that is left with ``reason``, whether it ended or not."""
        for client in list(self._clients.values()):
            for request in list(client.requests.values()):
                request.stop(reason)
                request.fail(reason)

    def _cancel(self, peer: Peer, cancel: Cancel) -> None:
        request = self.find(peer, cancel.query_id)
        cancelled = request is not None and request.stop(Cancelled("The query was cancelled."))
        peer.send(encode({"type": "cancelAck", "queryId": cancel.query_id, "cancelled": cancelled}))


def as_server_error(error: BaseException) -> ServerError:
    """What a client is told about ``error``: the one place that decides it."""
    if isinstance(error, ServerError):
        return error
    log.error("A request failed for a reason the server does not know.", exc_info=error)
    return InternalError("The server failed on this request; its log tells more.")
