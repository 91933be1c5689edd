"""Tables to the bytes of one Arrow IPC stream, as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sqlrooms_server.db.results import END_OF_STREAM, Chunk, Sink, has_dictionary
from sqlrooms_server.db.values import is_table, reader_of

# Larger batches are cut, so that a client within its window gets whole ones soon.
_PIECE_BYTES = 1 << 20


class OtherColumns(Exception):
    """A batch has other columns than the first one of its stream."""


def is_in_memory(value: object) -> bool:
    """Whether the batches of ``value`` are there without waiting for anybody."""
    return isinstance(value, pa.Table | pa.RecordBatch)


def batches_of(value: Any) -> Iterator[pa.RecordBatch]:
    """The batches of a table, a batch, or whatever speaks Arrow's C interface; at least one.

    Raises ``TypeError`` for anything else.
    """
    if isinstance(value, pa.RecordBatch):
        return _cut(iter((value,)), value.schema)
    if not is_table(value):
        raise TypeError(f"it is of type {type(value).__name__}, neither a table nor a batch")
    reader = reader_of(value)
    return _cut(reader, reader.schema)


def _cut(batches: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    count = 0
    for batch in batches:
        count += 1
        rows = max(1, -(-batch.num_rows // _parts(batch)))
        for start in range(0, max(1, batch.num_rows), rows):
            yield batch.slice(start, rows)
    if not count:
        # Whoever reads the stream learns of its columns all the same.
        yield pa.RecordBatch.from_arrays(
            [pa.array([], type) for type in schema.types], schema=schema
        )


def _parts(batch: pa.RecordBatch) -> int:
    """Into how many pieces ``batch`` is cut."""
    if _holds_dictionary(batch.schema):
        # It would count for each of them.
        return 1
    try:
        return max(1, -(-int(batch.nbytes) // _PIECE_BYTES))
    except pa.ArrowException:
        # Not every version knows the size of every type.
        return 1


def _holds_dictionary(schema: pa.Schema) -> bool:
    return any(has_dictionary(type) for type in schema.types)


class StreamEncoder:
    """One Arrow IPC stream. Batches have the schema of the first one."""

    def __init__(self, compression: str | None) -> None:
        self.rows = 0
        self._options = pa.ipc.IpcWriteOptions(compression=compression)
        self._is_compressed = compression is not None
        self._schema: pa.Schema | None = None
        self._sink = Sink()
        # Knows when a dictionary must be sent; others are encoded without it, and without copies.
        self._writer: Any = None

    def encode(self, batch: pa.RecordBatch) -> list[Chunk]:
        """The bytes that ``batch`` adds. Raises :class:`OtherColumns`."""
        chunks: list[Chunk] = []
        if self._schema is None:
            self._schema = batch.schema
            if self._is_compressed or _holds_dictionary(batch.schema):
                self._writer = pa.ipc.new_stream(self._sink, batch.schema, options=self._options)
            else:
                chunks.append(batch.schema.serialize().to_pybytes())
        elif not batch.schema.equals(self._schema):
            raise OtherColumns(
                f"its columns are {_shown(batch.schema)}, those of the first batch were "
                f"{_shown(self._schema)}"
            )
        self.rows += batch.num_rows
        if self._writer is None:
            chunks.append(memoryview(batch.serialize()))
        else:
            self._writer.write_batch(batch)
            chunks.extend(self._sink.messages())
        return chunks

    def end(self) -> bytes:
        """The bytes after the last batch; none when there was no batch."""
        return b"" if self._schema is None else END_OF_STREAM


def _shown(schema: pa.Schema) -> str:
    """``schema`` in one line, cut."""
    text = ", ".join(f"{field.name}: {field.type}" for field in schema) or "none"
    return f"({text if len(text) <= 200 else text[:200] + '…'})"
