"""Arrow IPC streams in pieces: batches from chunks that come in, chunks from batches to send."""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sqlrooms_server.client.errors import ConnectionLost

# Small enough that other messages get their turn, large enough that headers do not count.
UPLOAD_CHUNK = 1 << 20
# One IPC message is held whole by the server, and by this client, before it is used.
_LARGEST_MESSAGE = 8 << 20

# What a damaged stream makes the readers raise.
_BROKEN = (pa.ArrowException, OSError, ValueError, struct.error, IndexError)

# The kinds of messages of a stream, in Arrow's Message.fbs.
_SCHEMA, _DICTIONARY, _RECORD_BATCH = 1, 2, 3


class BatchDecoder:
    """Record batches of one IPC stream whose chunks may be cut at any byte.

    pyarrow reads streams only from a source that can wait. So whole messages are found here, by
    the lengths in front of them, and the reader is asked only for what has come.
    """

    def __init__(self) -> None:
        self.schema: pa.Schema | None = None
        self._parts: deque[memoryview] = deque()
        self._size = 0
        self._needed = 8
        self._has_ended = False
        self._source = _Source()
        self._reader: Any = None

    def feed(self, chunk: memoryview) -> None:
        """Take the next chunk. Raises ``ConnectionLost`` for what is no Arrow stream."""
        if chunk:
            self._parts.append(chunk)
            self._size += len(chunk)
        if self._reader is None:
            try:
                self._open()
            except ConnectionLost:
                raise
            except _BROKEN as error:
                raise ConnectionLost(f"The server sent what is no Arrow stream: {error}") from error

    def _open(self) -> None:
        message = self._message()
        if message is not None:
            self._source.add(message[1])
            self._reader = pa.ipc.open_stream(pa.PythonFile(self._source, mode="r"))
            self.schema = self._reader.schema

    def next_batch(self) -> pa.RecordBatch | None:
        """The next batch, or None when it has not come or the stream has ended.

        Raises ``ConnectionLost`` for what is no Arrow stream.
        """
        try:
            return self._next_batch()
        except ConnectionLost:
            raise
        except _BROKEN as error:
            raise ConnectionLost(f"The server sent what is no Arrow stream: {error}") from error

    def _next_batch(self) -> pa.RecordBatch | None:
        while self._reader is not None:
            message = self._message()
            if message is None:
                break
            kind, data = message
            self._source.add(data)
            if kind == _RECORD_BATCH:
                return self._reader.read_next_batch()
        return None

    def check_end(self) -> None:
        """Raises ``ConnectionLost`` when a stream began and is not complete."""
        if (self._reader is not None and not self._has_ended) or self._size:
            raise ConnectionLost("The server sent a result that is cut.")

    def _message(self) -> tuple[int, bytes] | None:
        if self._has_ended or self._size < self._needed:
            return None
        marker, length = struct.unpack("<Ii", self._peek(8))
        if marker != 0xFFFFFFFF or length < 0:
            raise ConnectionLost("The server sent what is no Arrow stream.")
        if length == 0:
            self._take(8)
            self._has_ended = True
            return None
        if self._size < 8 + length:
            self._needed = 8 + length
            return None
        kind, body = _kind_and_body_length(self._peek(8 + length)[8:])
        self._needed = 8 + length + body
        if self._size < self._needed:
            return None
        data = self._take(self._needed)
        self._needed = 8
        return kind, data

    def _peek(self, size: int) -> bytes:
        first = self._parts[0]
        if len(first) >= size:
            return bytes(first[:size])
        data = bytearray()
        for part in self._parts:
            data += part[: size - len(data)]
            if len(data) == size:
                break
        return bytes(data)

    def _take(self, size: int) -> bytes:
        # Always a copy: a buffer must be aligned, and must not keep the chunk around it alive.
        taken = []
        self._size -= size
        while size:
            part = self._parts.popleft()
            if len(part) > size:
                self._parts.appendleft(part[size:])
                part = part[:size]
            taken.append(part)
            size -= len(part)
        return b"".join(taken)


def decoded(stream: memoryview) -> pa.Table:
    """The table of a whole IPC stream. Raises ``ConnectionLost`` for what is none."""
    decoder = BatchDecoder()
    decoder.feed(stream)
    batches = []
    while (batch := decoder.next_batch()) is not None:
        batches.append(batch)
    decoder.check_end()
    if decoder.schema is None:
        raise ConnectionLost("The server sent a result that is cut.")
    return pa.Table.from_batches(batches, decoder.schema)


def is_same(table: pa.Table, other: pa.Table) -> bool:
    """Whether both hold the same rows in the same order."""
    # To pyarrow NaN is unlike itself; as bytes it is not.
    return bool(table.equals(other)) or (
        table.schema.equals(other.schema)
        and table.num_rows == other.num_rows
        and _as_bytes(table) == _as_bytes(other)
    )


def _as_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


class _Source:
    """The file of which pyarrow's reader reads: messages that are there already."""

    closed = False

    def __init__(self) -> None:
        self._messages: deque[memoryview] = deque()

    def add(self, message: bytes) -> None:
        self._messages.append(memoryview(message))

    def read(self, size: int) -> memoryview:
        if not self._messages:
            return memoryview(b"")
        message = self._messages[0]
        if len(message) <= size:
            return self._messages.popleft()
        self._messages[0] = message[size:]
        return message[:size]

    def close(self) -> None:
        self._messages.clear()


def _kind_and_body_length(metadata: bytes) -> tuple[int, int]:
    """Two fields of the flatbuffer table ``Message``: its second and its fourth."""
    (table,) = struct.unpack_from("<I", metadata)
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", metadata, vtable)
    offsets = struct.unpack_from(f"<{(size - 4) // 2}H", metadata, vtable + 4)
    kind = metadata[table + offsets[1]]
    body = 0
    if len(offsets) > 3 and offsets[3]:
        (body,) = struct.unpack_from("<q", metadata, table + offsets[3])
    return kind, body


def as_reader(data: Any) -> pa.RecordBatchReader:
    """``data`` as batches: a Table, RecordBatch, RecordBatchReader, pandas DataFrame, or anything
    with ``__arrow_c_stream__``. The index of a DataFrame is left out.

    Raises ``TypeError`` for what is nothing of that.
    """
    if isinstance(data, pa.RecordBatchReader):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.RecordBatchReader.from_batches(data.schema, [data])
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(data, pandas.DataFrame):
        data = pa.Table.from_pandas(data, preserve_index=False)
    if isinstance(data, pa.Table):
        return data.to_reader()
    if hasattr(data, "__arrow_c_stream__"):
        return pa.RecordBatchReader.from_stream(data)
    raise TypeError(
        f"Cannot upload a {type(data).__name__}; give an Arrow table or reader, or a DataFrame."
    )


def upload_chunks(reader: pa.RecordBatchReader) -> Iterator[tuple[bytes, bool]]:
    """The IPC stream of ``reader`` in chunks of ``UPLOAD_CHUNK`` bytes, the last marked as such."""
    sink = Sink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), reader.schema) as writer:
        for batch in reader:
            for part in slices(batch):
                writer.write_batch(part)
                yield from ((chunk, False) for chunk in sink.chunks())
    # The end of the stream is still in the sink, so that this is never empty.
    yield from ((chunk, False) for chunk in sink.chunks())
    yield bytes(sink.data), True


class Sink:
    """The file into which pyarrow's writer writes, taken out in chunks of ``UPLOAD_CHUNK``."""

    closed = False

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)

    def chunks(self) -> Iterator[bytes]:
        while len(self.data) > UPLOAD_CHUNK:
            chunk = bytes(self.data[:UPLOAD_CHUNK])
            del self.data[:UPLOAD_CHUNK]
            yield chunk

    def flush(self) -> None: ...

    def close(self) -> None: ...


def slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """``batch`` in parts that are not too large for one message of a stream."""
    if batch.num_rows < 2 or _size(batch) <= _LARGEST_MESSAGE:
        yield batch
        return
    half = batch.num_rows // 2
    yield from slices(batch.slice(0, half))
    yield from slices(batch.slice(half))


def _size(batch: pa.RecordBatch) -> int:
    # A dictionary is a message of its own, which slicing does not shorten.
    return sum(
        (column.indices if pa.types.is_dictionary(column.type) else column).nbytes
        for column in batch.columns
    )
