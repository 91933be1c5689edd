"""One query: how it is sent, sent again after a lost connection, and read."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sqlrooms_server.client.bar import Reporter
from sqlrooms_server.client.errors import ConnectionLost, RequestFailed, SessionEnded
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import Id, encode
from sqlrooms_server.client.needs import ClientState, Flow, Retries, answer, connected
from sqlrooms_server.client.reads import is_read
from sqlrooms_server.client.replies import Chunk, Reply, Resumable, Summary
from sqlrooms_server.client.resuming import Resumption
from sqlrooms_server.client.streams import BatchDecoder

# What of a result may be under way to a consumer that is slow: enough for a connection of
# 1 Gbit/s and 50 ms.
WINDOW = 8 << 20
# A server that is alive says itself that a query took too long; after this it is taken for dead.
GRACE_S = 2.0


class Session:
    """A name that is bound to the connection of its first use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.link: Link | None = None
        self.has_ended = False
        # The server ended it, and refuses the name until it is told that this was noticed.
        self.is_gone = False
        self.open_result: Stream | None = None

    def connected(self) -> Flow[Link]:
        """The link of this session. Raises ``SessionEnded`` when that is gone."""
        if self.link is not None and self.link.lost is not None:
            self.has_ended = True
        if self.has_ended:
            raise SessionEnded(f"The session {self.name} has ended; begin a new one.")
        if self.link is None:
            self.link = yield from connected()
        return self.link


@dataclass(slots=True)
class Request:
    """A query, and how it is made."""

    kind: str
    sql: str
    query_id: Id
    params: list[Any] | dict[str, Any] | None = None
    timeout: float | None = None
    max_rows: int | None = None
    compression: str | None = None
    session: Session | None = None
    persist: bool = False
    resume: bool = False
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def can_repeat(self) -> bool:
        return self.session is None and is_read(self.sql)

    def message(self, remaining: float | None) -> str | bytes:
        """The message; ``remaining`` is in seconds."""
        streams = self.kind == "arrow" or None
        return encode(
            type=self.kind,
            sql=self.sql,
            queryId=self.query_id,
            params=self.params,
            timeoutMs=None if remaining is None else max(1, round(1000 * remaining)),
            maxRows=self.max_rows,
            compression=self.compression,
            session=None if self.session is None else self.session.name,
            progress=self.reporter.is_wanted or None,
            persist=self.persist or None,
            stream=streams,
            window=streams and WINDOW,
            resumable=(streams and self.resume) or None,
        )


class Attempts:
    """One query, sent again after a lost connection when it only reads."""

    def __init__(self, client: ClientState, request: Request) -> None:
        self.request = request
        self.link: Link
        self._client = client
        timeout = request.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._retries = Retries(client, self._deadline, request.can_repeat)

    def first_reply(self) -> Flow[tuple[Exchange, Reply]]:
        """Send the query until it is answered. Raises what the server answers, or
        ``ConnectionLost``."""
        while True:
            try:
                return (yield from self._attempt())
            except ConnectionLost as error:
                yield from self.pause(error)

    def retries(self) -> Retries:
        """For a query that goes on where it was."""
        return Retries(self._client, self._deadline)

    def resume(self, token: str, seq: int, consumed: int) -> Flow[Exchange]:
        """Ask for the rest of the result, over a connection that is open."""
        query_id = self.request.query_id
        self.link = yield from connected(self._deadline)
        exchange = self.link.open(("query", query_id))
        self.link.send(
            encode(type="resume", queryId=query_id, token=token, seq=seq, bytes=consumed)
        )
        return exchange

    def pause(self, error: ConnectionLost) -> Flow[None]:
        """Wait before another attempt, or raise ``error``."""
        yield from self._retries.pause(error)

    def answer(self, exchange: Exchange) -> Flow[Reply]:
        """The next reply that tells more than progress."""
        request = self.request
        # The server counts its own time. Here it is only that something comes, time after time.
        deadline = None
        if request.timeout is not None:
            deadline = time.monotonic() + request.timeout + GRACE_S
        try:
            return (yield from answer(exchange, deadline, request.reporter))
        except SessionEnded:
            if request.session is not None:
                request.session.has_ended = request.session.is_gone = True
            raise

    def _attempt(self) -> Flow[tuple[Exchange, Reply]]:
        request = self.request
        session = request.session
        if session is None:
            self.link = yield from connected(self._deadline)
        else:
            self.link = yield from session.connected()
            # Queries of a session run one after the other: the next one waits for the last byte
            # of the one before.
            if session.open_result is not None:
                yield from session.open_result.read_ahead()
        exchange = self.link.open(("query", request.query_id))
        try:
            remaining = None if self._deadline is None else self._deadline - time.monotonic()
            self.link.send(request.message(remaining))
            return exchange, (yield from self.answer(exchange))
        except BaseException:
            self.link.abandon(exchange)
            raise


class Stream:
    """The batches of one result, as they come.

    The server is told of chunks when they are taken from the inbox, and they are taken only when
    the consumer asks for a batch: so at most ``WINDOW`` and a batch are held.
    """

    def __init__(self, attempts: Attempts) -> None:
        self.request = attempts.request
        self.summary: Summary | None = None
        self.schema: pa.Schema | None = None
        self.truncated = self.cached = False
        self.whole: pa.Table | None = None
        self.has_delivered = False
        self._attempts = attempts
        self._exchange: Exchange | None = None
        self._decoder = BatchDecoder()
        self._resumption = Resumption(attempts.retries, attempts.resume)
        self._seq = self._consumed = self._acknowledged = 0
        self._is_complete = False
        self._closed_by: Exception | None = None
        self._ahead: deque[pa.RecordBatch] = deque()

    @property
    def link(self) -> Link | None:
        """The connection that the query was sent over; None when it has ended for certain."""
        return self._attempts.link

    def begin(self) -> Flow[None]:
        """Send the query, and wait for its schema."""
        try:
            yield from self._begin()
        except BaseException:
            self.abandon()
            raise
        finally:
            self.request.reporter.clear()

    def next_batch(self) -> Flow[pa.RecordBatch | None]:
        """The next batch of rows; None after the last."""
        try:
            return (yield from self._next_batch())
        finally:
            self.request.reporter.clear()

    def table(self) -> Flow[pa.Table]:
        """All batches. Raises ``RuntimeError`` when some were taken already."""
        if self.has_delivered and self._closed_by is None:
            raise RuntimeError("Batches of this result were taken already; run the query again.")
        batches = []
        try:
            while (batch := (yield from self._next_batch())) is not None:
                batches.append(batch)
        finally:
            self.request.reporter.clear()
        return pa.Table.from_batches(batches, self.schema)

    def read_ahead(self) -> Flow[None]:
        """Read what is left into memory. A failure is kept for who asks for the next batch."""
        try:
            while (batch := (yield from self._read_batch())) is not None:
                self._ahead.append(batch)
        except (RequestFailed, ConnectionLost) as error:
            self.abandon(error)

    def abandon(self, reason: Exception | None = None) -> None:
        """Cancel what is not complete. Never waits, and may be called by a finalizer."""
        if not self._is_complete and self._closed_by is None:
            self._closed_by = reason or RuntimeError("The result was closed before its end.")
            if self._exchange is not None:
                self._attempts.link.abandon(self._exchange)
            self._leave_session()

    def _begin(self) -> Flow[None]:
        while True:
            self._decoder = BatchDecoder()
            self._resumption = Resumption(self._attempts.retries, self._attempts.resume)
            self._seq = self._consumed = self._acknowledged = 0
            self._exchange, reply = yield from self._attempts.first_reply()
            try:
                self._take(reply)
                while self._decoder.schema is None and not self._is_complete:
                    yield from self._more()
                break
            except ConnectionLost as error:
                yield from self._attempts.pause(error)
        schema = self._decoder.schema or pa.schema([])
        if self.schema is not None and schema != self.schema:
            raise ConnectionLost("The connection was lost, and the result is another one now.")
        self.schema = schema
        if self.request.session is not None and not self._is_complete:
            self.request.session.open_result = self

    def _next_batch(self) -> Flow[pa.RecordBatch | None]:
        if self._ahead:
            return self._ahead.popleft()
        try:
            batch = yield from self._read_batch()
        except (RequestFailed, ConnectionLost) as error:
            self.abandon(error)
            raise
        except BaseException:
            self.abandon()
            raise
        self.has_delivered = True
        return batch

    def _read_batch(self) -> Flow[pa.RecordBatch | None]:
        while True:
            if self._closed_by is not None:
                raise self._closed_by
            batch = self._decoder.next_batch()
            # A result without rows has a batch without rows, which nobody wants to see.
            if batch is not None and batch.num_rows:
                return batch
            if batch is not None:
                continue
            if self._is_complete:
                self._decoder.check_end()
                return None
            try:
                yield from self._more()
            except ConnectionLost as error:
                if self.has_delivered:
                    raise
                yield from self._attempts.pause(error)
                yield from self._begin()

    def _more(self) -> Flow[None]:
        assert self._exchange is not None
        unacknowledged = self._consumed - self._acknowledged
        if unacknowledged and (self._exchange.inbox.empty() or unacknowledged >= WINDOW // 4):
            self._acknowledged = self._consumed
            query_id = self.request.query_id
            self._attempts.link.send(encode(type="ack", queryId=query_id, bytes=self._consumed))
        try:
            reply = yield from self._attempts.answer(self._exchange)
        except (ConnectionLost, RequestFailed) as error:
            went_on = self._resumption.go_on(error, self._seq, self._consumed)
            self._exchange = yield from went_on
            self._acknowledged = self._consumed
            return
        self._take(reply)

    def _take(self, reply: Reply) -> None:
        if isinstance(reply, Resumable):
            self._resumption.offer(reply.token)
            return
        if isinstance(reply, Chunk):
            self._resumption.went_on()
            if reply.seq != self._seq:
                raise ConnectionLost(f"The server sent chunk {reply.seq} for {self._seq}.")
            self._seq += 1
            self._consumed += len(reply.body)
            self._decoder.feed(reply.body)
            self.summary = reply.summary
            self.truncated, self.cached = reply.truncated, reply.cached
            self._is_complete = reply.is_last
            if reply.is_last and self._resumption.is_offered:
                # So that the server does not keep it any longer.
                query_id, size = self.request.query_id, self._consumed
                self._attempts.link.send(
                    encode(type="ack", queryId=query_id, bytes=size, last=True)
                )
        else:
            self._is_complete = True
        if self._is_complete:
            self._leave_session()

    def _leave_session(self) -> None:
        session = self.request.session
        if session is not None and session.open_result is self:
            session.open_result = None


class Snapshot(Stream):
    """A result that has arrived as a whole; there is nothing to cancel."""

    link = None

    def __init__(self, attempts: Attempts, table: pa.Table, truncated: bool) -> None:
        super().__init__(attempts)
        self.schema = table.schema
        self.whole = table
        self.truncated = truncated
        self._is_complete = True
