"""Streams of batches through plugins: begun, fed and read, as flows."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from sqlrooms_server.client.calls import CallRequest
from sqlrooms_server.client.errors import ConnectionLost, QueryTimeout, RequestFailed
from sqlrooms_server.client.exchanges import Exchange, StreamExchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import encode
from sqlrooms_server.client.needs import Flow, Receive, answer, checked, connected
from sqlrooms_server.client.plugin_replies import Event, OutputData, StreamBegun, StreamEnded
from sqlrooms_server.client.queries import GRACE_S, WINDOW
from sqlrooms_server.client.replies import Reply
from sqlrooms_server.client.stream_inputs import Feeding, Source
from sqlrooms_server.client.streams import BatchDecoder


class BatchStream:
    """One stream. Each output is for one thread or task at a time, and so is the stream as a whole.

    | state | |
    |---|---|
    | not begun | ``begin`` sends the message, and learns the names of inputs and outputs |
    | under way | each ``Feeding`` sends an input, outputs are read |
    | over | the server has ended it: what came before can still be read |
    | closed | here, by a failure or on purpose: every read raises why |
    """

    def __init__(
        self,
        request: CallRequest,
        inputs: Mapping[str, Any],
        on_event: Callable[[Any], None] | None,
    ) -> None:
        self.query_id = request.query_id
        self.outputs: dict[str, Output] = {}
        self.feedings: list[Feeding] = []
        self.is_over = False
        self._request = request
        self._sources = {name: Source(name, data) for name, data in inputs.items()}
        self._on_event = on_event
        self._closed_by: BaseException | None = None
        self._has_begun = False
        self._last_read = 0

    @property
    def has_async_inputs(self) -> bool:
        return any(source.is_async for source in self._sources.values())

    def begin(self) -> Flow[None]:
        """Begin it. Raises ``ValueError`` for an input that it does not have."""
        timeout = self._request.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        self.link: Link = yield from connected(deadline)
        self.exchange: StreamExchange = self.link.open_stream(self.query_id)
        self._has_begun = True
        with self.guarded():
            remaining = None if deadline is None else deadline - time.monotonic()
            self.link.send(self._request.message(remaining))
            reply = yield from answer(self.exchange, self._deadline())
            if not isinstance(reply, StreamBegun):
                raise ValueError(f"{self._request.kind!r} is no stream of batches; use call().")
            self._learn(reply)

    def _learn(self, begun: StreamBegun) -> None:
        unknown = next((name for name in self._sources if name not in begun.inputs), None)
        if unknown is not None:
            known = ", ".join(map(repr, begun.inputs)) or "none"
            raise ValueError(f"There is no input {unknown!r}; the stream has {known}.")
        self.window = begun.window
        lanes = self.exchange.outputs
        self.outputs = {name: Output(self, name, lanes[name]) for name in begun.outputs}
        self.feedings = [
            Feeding(self, self._sources.get(name) or Source(name, None)) for name in begun.inputs
        ]

    def next(self) -> Flow[tuple[str, pa.RecordBatch] | None]:
        """The next batch of any output, with the name of that; None when the stream has ended."""
        outputs = list(self.outputs.values())
        with self.guarded():
            while True:
                # One that always has something does not keep the others waiting.
                for turn in range(1, len(outputs) + 1):
                    index = (self._last_read + turn) % len(outputs)
                    batch = outputs[index].ready()
                    if batch is not None:
                        self._last_read = index
                        return outputs[index].name, batch
                if self.is_over:
                    return None
                self.note((yield from self.receive(self.exchange)))

    def finish(self) -> Flow[None]:
        """Drop what outputs still have, and wait until the stream has ended."""
        while (yield from self.next()) is not None:
            pass

    def abandon(self, reason: BaseException | None = None) -> None:
        """Cancel what is not complete. Never waits, and may be called by a finalizer."""
        if self._has_begun and not self.is_over and self._closed_by is None:
            self._closed_by = reason or RuntimeError("The stream was closed before its end.")
            self.link.abandon(self.exchange)

    def wake(self) -> None:
        """Let all who wait look whether it was abandoned."""
        if self._has_begun:
            self.exchange.finish(StreamEnded())

    # What outputs call.

    @contextmanager
    def guarded(self) -> Generator[None, None, None]:
        """What fails within ends the stream."""
        try:
            yield
        except BaseException as error:
            if self._closed_by is None and not self.is_over:
                self.abandon(error if isinstance(error, RequestFailed | ConnectionLost) else None)
                self.wake()
            raise

    def receive(self, exchange: Exchange) -> Flow[Reply]:
        """The next reply. Raises the error that it tells of, or why the stream was closed."""
        reply: Reply | None = yield Receive(exchange, self._deadline())
        return self.looked_at(reply)

    def looked_at(self, reply: Reply | None) -> Reply:
        if self._closed_by is not None:
            raise self._closed_by
        if reply is None:
            raise QueryTimeout("The server did not answer in time.")
        return checked(reply)

    def note(self, reply: Reply) -> None:
        """Learn what ``reply`` tells of the stream as a whole."""
        if isinstance(reply, StreamEnded):
            self.is_over = True
        elif isinstance(reply, Event):
            self._tell_events()

    def check(self) -> None:
        if self._closed_by is not None:
            raise self._closed_by

    def _tell_events(self) -> None:
        events = self.exchange.events
        while events:
            data = events.popleft()
            if self._on_event is not None:
                self._on_event(data)

    def _deadline(self) -> float | None:
        # The server counts its own time. Here it is only that something comes, time after time.
        timeout = self._request.timeout
        return None if timeout is None else time.monotonic() + timeout + GRACE_S


class Output:
    """The batches of one output, as they come.

    The server is told of chunks when they are taken from the inbox, and they are taken only when
    the consumer asks for a batch: so at most ``WINDOW`` and a batch are held.
    """

    def __init__(self, stream: BatchStream, name: str, lane: Exchange) -> None:
        self.name = name
        self._stream = stream
        self._lane = lane
        self._decoder = BatchDecoder()
        self._seq = self._consumed = self._acknowledged = 0
        self._has_last = False

    @property
    def schema(self) -> pa.Schema | None:
        """Its columns; None before they have come."""
        if self._decoder.schema is None and self._has_last:
            return pa.schema([])
        return self._decoder.schema

    def next_batch(self) -> Flow[pa.RecordBatch | None]:
        """The next batch; None after the last."""
        stream = self._stream
        with stream.guarded():
            while True:
                batch = self.ready()
                if batch is not None:
                    return batch
                # After the last piece of all follows how the stream has ended.
                if self._has_last and (stream.is_over or stream.exchange.open_outputs):
                    return None
                self._take((yield from stream.receive(self._lane)))

    def table(self) -> Flow[pa.Table]:
        """What has not been read."""
        batches = []
        while (batch := (yield from self.next_batch())) is not None:
            batches.append(batch)
        return pa.Table.from_batches(batches, self.schema)

    def ready(self) -> pa.RecordBatch | None:
        """The next batch if it has come. Raises what ended the stream."""
        while True:
            self._stream.check()
            batch = self._decoder.next_batch()
            if batch is not None:
                return batch
            if self._has_last:
                self._decoder.check_end()
                return None
            self._acknowledge()
            if self._lane.inbox.empty():
                return None
            self._take(self._stream.looked_at(self._lane.inbox.get_nowait()))

    def _take(self, reply: Reply) -> None:
        if not isinstance(reply, OutputData):
            self._stream.note(reply)
            if self._stream.is_over and not self._has_last:
                raise ConnectionLost(f"The server sent output {self.name!r} without its end.")
            return
        if reply.seq != self._seq:
            raise ConnectionLost(f"The server sent piece {reply.seq} for {self._seq}.")
        self._seq += 1
        self._consumed += len(reply.body)
        self._has_last = reply.is_last
        self._decoder.feed(reply.body)

    def _acknowledge(self) -> None:
        unacknowledged = self._consumed - self._acknowledged
        if unacknowledged and (self._lane.inbox.empty() or unacknowledged >= WINDOW // 4):
            self._acknowledged = self._consumed
            self._stream.link.send(
                encode(
                    type="streamAck",
                    queryId=self._stream.query_id,
                    output=self.name,
                    bytes=self._consumed,
                )
            )
