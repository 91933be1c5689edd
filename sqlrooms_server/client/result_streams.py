"""The result of one query, as it comes, over several connections if need be."""

from __future__ import annotations

from collections import deque

import pyarrow as pa

from sqlrooms_server.client.errors import ConnectionLost, RequestFailed
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import encode
from sqlrooms_server.client.needs import Flow
from sqlrooms_server.client.queries import WINDOW, Attempts
from sqlrooms_server.client.replies import Chunk, Reply, Resumable, Summary
from sqlrooms_server.client.resuming import Resumption
from sqlrooms_server.client.streams import BatchDecoder


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
        self._resumption = self._new_resumption()
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
            self._resumption = self._new_resumption()
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

    def _new_resumption(self) -> Resumption:
        attempts = self._attempts
        return Resumption(attempts.retries, attempts.resume, self.request.resume)

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
