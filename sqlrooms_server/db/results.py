"""Results to chunks of bytes that, joined, are one reply.

A chunk over :data:`WHOLE_MESSAGE_BYTES` is exactly one Arrow IPC message, so that whoever cuts a
reply short knows that a reader will notice: either the message is incomplete, or
:data:`BROKEN_ARROW` can follow it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.columns import unique_names

Chunk = bytes | memoryview

# Smaller pieces are joined: each chunk costs a lock and a frame.
WHOLE_MESSAGE_BYTES = 64 << 10

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

# Announces a message of 2 GiB and is followed by less, which every Arrow reader refuses.
# Some readers take a stream that merely ends for a complete one.
BROKEN_ARROW = b"\xff\xff\xff\xff\xff\xff\xff\x7fThe query failed; its error follows."


def arrow_chunks(
    result: Result,
    first: pa.RecordBatch | None,
    prefix: bytes,
    compression: str | None = None,
) -> Iterator[Chunk]:
    """``prefix`` and the Arrow IPC stream of ``result``, whose first batch was read already.

    A result without rows holds one empty batch: some clients drop the schema otherwise.
    ``compression`` of its buffers is ``"lz4"`` or ``"zstd"``.
    """
    schema = _SchemaMessage.of(result)
    if first is None:
        empty = [pa.array([], field.type) for field in schema.schema]
        first = pa.RecordBatch.from_arrays(empty, schema=schema.schema)
    batches = itertools.chain([first], result.batches)
    if schema.has_dictionary or compression is not None:
        return _coalesced(prefix, _written_pieces(schema.schema, batches, compression))
    return _coalesced(prefix, _plain_pieces(schema.message, batches))


def json_chunks(
    result: Result, first: pa.RecordBatch | None, prefix: bytes, suffix: Callable[[], bytes]
) -> Iterator[Chunk]:
    """``prefix``, the rows of ``result`` as JSON text escaped for a JSON string, and what
    ``suffix`` returns after the last row."""
    return _coalesced(prefix, _json_pieces(result, first, suffix))


class _SchemaMessage:
    """The IPC message that begins a stream. Making it costs as much as a small batch does."""

    __slots__ = ("has_dictionary", "message", "schema")

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.message = schema.serialize().to_pybytes()
        self.has_dictionary = any(has_dictionary(type_) for type_ in schema.types)

    @classmethod
    def of(cls, result: Result) -> _SchemaMessage:
        """That of ``result``: the one of the last run of the same text when it still holds."""
        schema = result.reader.schema
        known = result.statements.schema_message
        if not isinstance(known, cls) or not known.schema.equals(schema, check_metadata=True):
            known = result.statements.schema_message = cls(schema)
        return known


def _plain_pieces(schema_message: bytes, batches: Iterable[pa.RecordBatch]) -> Iterator[Chunk]:
    yield schema_message
    for batch in batches:
        yield memoryview(batch.serialize())
    yield END_OF_STREAM


def _written_pieces(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], compression: str | None
) -> Iterator[Chunk]:
    """As Arrow's stream writer does it, which alone knows when a dictionary must be sent."""
    sink = Sink()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
            yield from sink.messages()
    yield from sink.messages()


def has_dictionary(type_: Any) -> bool:
    return pa.types.is_dictionary(type_) or any(
        has_dictionary(type_.field(index).type) for index in range(type_.num_fields)
    )


class Sink:
    """A file for Arrow's writer whose content can be taken away."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def messages(self) -> Iterator[Chunk]:
        """What was written since the last call, one piece per IPC message."""
        data = b"".join(self._parts)
        self._parts.clear()
        if len(data) <= WHOLE_MESSAGE_BYTES:
            yield data
            return
        for message in pa.ipc.MessageReader.open_stream(data):
            yield memoryview(message.serialize())


def _json_pieces(
    result: Result, first: pa.RecordBatch | None, suffix: Callable[[], bytes]
) -> Iterator[Chunk]:
    # Not at the top: it loads Arrow's compute functions, which results in Arrow do not need.
    from sqlrooms_server.db.json_rows import RowEncoder

    columns = result.columns
    encoder = RowEncoder(unique_names(columns), [column.type for column in columns])
    separator = b"["
    if first is not None:
        for batch in itertools.chain([first], result.batches):
            if batch.num_rows:
                rows = encoder.encode(batch).replace(b"\\", b"\\\\").replace(b'"', b'\\"')
                yield separator + rows
                separator = b","
    yield (b"[]" if first is None else b"]") + suffix()


def _coalesced(prefix: bytes, pieces: Iterable[Chunk]) -> Iterator[Chunk]:
    """``prefix`` and ``pieces``, small ones joined; a large one stays alone."""
    waiting: list[Chunk] = [prefix]
    size = len(prefix)
    for piece in pieces:
        is_large = len(piece) > WHOLE_MESSAGE_BYTES
        if not is_large:
            waiting.append(piece)
            size += len(piece)
        if waiting and (is_large or size >= WHOLE_MESSAGE_BYTES):
            yield b"".join(waiting)
            waiting, size = [], 0
        if is_large:
            yield piece
    if waiting:
        yield b"".join(waiting)
