"""Inputs of streams of batches: what programs give, as the chunks of an Arrow IPC stream."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from sqlrooms_server.client.messages import encode, framed
from sqlrooms_server.client.needs import Flow, Next, Receive
from sqlrooms_server.client.plugin_replies import InputAck
from sqlrooms_server.client.replies import Reply
from sqlrooms_server.client.streams import Sink, as_reader, slices

if TYPE_CHECKING:
    from sqlrooms_server.client.batch_streams import BatchStream


class Source:
    """The batches of one input. ``schema`` is None as long as none has come."""

    def __init__(self, name: str, data: Any) -> None:
        """Raises ``TypeError`` for what has no batches."""
        self.name = name
        self.schema: pa.Schema | None = None
        self.is_empty = data is None
        self.batches: Iterator[Any] | AsyncIterator[Any]
        if data is None:
            self.batches = iter(())
        elif isinstance(data, AsyncIterable):
            self.batches = aiter(data)
        else:
            self.batches = self._iterator(data)

    @property
    def is_async(self) -> bool:
        """Whether only asyncio can read it."""
        return isinstance(self.batches, AsyncIterator)

    def _iterator(self, data: Any) -> Iterator[Any]:
        try:
            reader = as_reader(data)
        except TypeError:
            if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
                return iter(data)
            raise TypeError(
                f"Input {self.name!r} is a {type(data).__name__}; give an Arrow table or reader, a "
                "DataFrame, or an iterable of batches."
            ) from None
        self.schema = reader.schema
        return cast(Iterator[Any], reader)

    def next(self) -> Flow[pa.RecordBatchReader | None]:
        """What comes next, None after the last."""
        if isinstance(self.batches, Iterator):
            item = next(self.batches, None)
        else:
            item = yield Next(self.batches)
        if item is None:
            return None
        try:
            return as_reader(item)
        except TypeError:
            raise TypeError(
                f"Input {self.name!r} gave a {type(item).__name__}, which is no batch."
            ) from None

    def close(self) -> None:
        """Nothing more is wanted of it."""
        if isinstance(self.batches, Generator):
            self.batches.close()


class Encoder:
    """One Arrow IPC stream. What is written leaves at once: the next batch may be long to come."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sink = Sink()
        self._writer: Any = None

    def begin(self, schema: pa.Schema) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), schema)

    def encode(self, batch: pa.RecordBatch) -> Iterator[bytes]:
        """The chunks of ``batch``. Raises ``ValueError`` for other columns than before."""
        for part in slices(batch):
            try:
                self._writer.write_batch(part)
            except pa.ArrowInvalid as error:
                raise ValueError(f"Input {self._name!r}: {error}") from error
            yield from self._sink.chunks()
        yield self._rest()

    def end(self) -> bytes:
        """The last chunk; empty when nothing was written."""
        if self._writer is not None:
            self._writer.close()
        return self._rest()

    def _rest(self) -> bytes:
        data = bytes(self._sink.data)
        self._sink.data.clear()
        return data


class Feeding:
    """Sends one input, as far as the server takes it."""

    def __init__(self, stream: BatchStream, source: Source) -> None:
        self.source = source
        self._stream = stream
        self._lane = stream.exchange.inputs[source.name]
        self._seq = self._sent = self._consumed = 0

    def run(self) -> Flow[None]:
        """Send all of it. A failure ends the stream, for those who read that to raise."""
        try:
            yield from self._send_all()
        except BaseException as error:  # handed to whoever reads the stream
            self._stream.abandon(error if isinstance(error, Exception) else None)
            self._stream.wake()
        finally:
            self.source.close()

    def _send_all(self) -> Flow[None]:
        source = self.source
        encoder = Encoder(source.name)
        if source.schema is not None:
            encoder.begin(source.schema)
        while (reader := (yield from source.next())) is not None:
            encoder.begin(reader.schema)
            for batch in reader:
                for chunk in encoder.encode(batch):
                    if not (yield from self._send(chunk, is_last=False)):
                        return
        yield from self._send(encoder.end(), is_last=True)

    def _send(self, chunk: bytes, is_last: bool) -> Flow[bool]:
        """Send ``chunk`` when there is room; False when the stream has ended."""
        window = self._stream.window
        while not self._lane.inbox.empty() or (
            self._sent > self._consumed and self._sent + len(chunk) - self._consumed > window
        ):
            reply: Reply = yield Receive(self._lane)
            if not isinstance(reply, InputAck):
                return False
            self._consumed = reply.bytes
        header = encode(
            type="streamData",
            queryId=self._stream.query_id,
            input=self.source.name,
            seq=self._seq,
            last=is_last,
        )
        self._stream.link.send(framed(header, chunk))
        self._seq += 1
        self._sent += len(chunk)
        return True
