"""The output formats. Each writes batch by batch, and so in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from sqlrooms_server.query_command.cells import json_texts, texts
from sqlrooms_server.query_command.table import TablePreview

# Readers of Parquet skip and parallelise by row groups; DuckDB's own have this many rows.
_ROW_GROUP_ROWS = 122_880
_ROW_GROUP_BYTES = 64 << 20


class Writer(Protocol):
    """Gets the batches of a result, then ``end``."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def end(self, truncated: bool) -> None: ...


class TableWriter:
    """A table for people, and a line that counts and ends with what ``note`` says then."""

    def __init__(
        self,
        schema: pa.Schema,
        out: BinaryIO,
        width: int | None,
        is_styled: bool,
        note: Callable[[], str],
    ) -> None:
        self._schema = schema
        self._out = out
        self._width = width
        self._is_styled = is_styled
        self._note = note
        self._preview = TablePreview(schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self._preview.add(batch)

    def end(self, truncated: bool) -> None:
        lines = self._preview.lines(self._width, self._is_styled)
        if len(self._schema):
            rows = _count(self._preview.num_rows, "row")
            columns = _count(len(self._schema), "column")
            more = ", there are more" if truncated else ""
            lines.append(f"{rows}, {columns}, {self._note()}{more}")
        else:
            lines.append(f"ok, {self._note()}")
        self._out.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))


class CsvWriter:
    """A line of names, then the rows. NULL is empty, an empty string is ``""``; what CSV has no
    form for, such as lists, is JSON."""

    def __init__(self, schema: pa.Schema, out: BinaryIO) -> None:
        from pyarrow import csv

        self._as_text = [_is_foreign_to_csv(field.type) for field in schema]
        kinds = [
            pa.string() if as_text else field.type
            for field, as_text in zip(schema, self._as_text, strict=True)
        ]
        self._schema = pa.schema(list(zip(schema.names, kinds, strict=True)))
        self._writer = csv.CSVWriter(out, self._schema) if len(schema) else None

    def write(self, batch: pa.RecordBatch) -> None:
        columns = [
            pa.array(texts(column), pa.string()) if as_text else column
            for column, as_text in zip(batch.columns, self._as_text, strict=True)
        ]
        assert self._writer is not None
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def end(self, truncated: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class JsonWriter:
    """One JSON array, with one object on each line, or all of it on one."""

    def __init__(self, schema: pa.Schema, out: BinaryIO, is_one_line: bool) -> None:
        self._keys = [json.dumps(name, ensure_ascii=False) for name in _distinct(schema.names)]
        self._out = out
        self._break = "" if is_one_line else "\n"
        self._before = self._first = f"[{self._break}"

    def write(self, batch: pa.RecordBatch) -> None:
        columns = [
            [f"{key}:{value}" for value in json_texts(column)]
            for key, column in zip(self._keys, batch.columns, strict=True)
        ]
        between = f",{self._break}"
        rows = between.join(f"{{{','.join(row)}}}" for row in zip(*columns, strict=True))
        self._out.write((self._before + rows).encode())
        self._before = between

    def end(self, truncated: bool) -> None:
        is_empty = self._before == self._first
        self._out.write(b"[]\n" if is_empty else f"{self._break}]\n".encode())


class ArrowWriter:
    """An Arrow IPC stream."""

    def __init__(self, schema: pa.Schema, out: BinaryIO) -> None:
        self._writer = pa.ipc.new_stream(out, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def end(self, truncated: bool) -> None:
        self._writer.close()


class ParquetWriter:
    """A Parquet file, in row groups of a useful size."""

    def __init__(self, schema: pa.Schema, out: BinaryIO) -> None:
        from pyarrow import parquet

        self._schema = schema
        self._writer = parquet.ParquetWriter(_Counting(out), schema, compression="zstd")
        self._group: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._group.append(batch)
        rows = sum(part.num_rows for part in self._group)
        size = sum(part.nbytes for part in self._group)
        if rows >= _ROW_GROUP_ROWS or size >= _ROW_GROUP_BYTES:
            self._flush()

    def end(self, truncated: bool) -> None:
        if self._group:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._group, self._schema))
        self._group = []


class _Counting:
    """A pipe cannot tell where it is, which the Parquet writer wants to know."""

    closed = False

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._position = 0

    def write(self, data: Any) -> int:
        self._position += len(data)
        return self._out.write(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None: ...


def _is_foreign_to_csv(kind: pa.DataType) -> bool:
    return (
        pa.types.is_nested(kind)
        or pa.types.is_dictionary(kind)
        or pa.types.is_interval(kind)
        or pa.types.is_duration(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_null(kind)
        or isinstance(kind, pa.BaseExtensionType)
    )


def _distinct(names: list[str]) -> list[str]:
    """Names of a JSON object; those that are there already are numbered, as the server does."""
    distinct: list[str] = []
    for name in names:
        number, free = 0, name
        while free in distinct:
            number += 1
            free = f"{name}_{number}"
        distinct.append(free)
    return distinct


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
