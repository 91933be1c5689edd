"""Bodies of uploads: Arrow IPC streams, damaged, into a real DuckDB, whole and in chunks."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.ipc import PushedStream
from sqlrooms_server.db.uploads import TableWriter, write_table
from sqlrooms_server.errors import InternalError, ServerError
from sqlrooms_server.messages import UploadMode

from . import mutation
from .targets import require

_MODES: tuple[UploadMode, ...] = ("replace", "create", "append")
_ROWS = 24
_MAX_MESSAGE = 1 << 20

# Of what DuckDB says of values that it cannot take, and of texts that Arrow does not check.
_TABLE = ("t",)


def column(type_: pa.DataType, values: list[Any]) -> tuple[pa.DataType, pa.Array]:
    repeated = [values[n % len(values)] if n % 5 else None for n in range(_ROWS)]
    return type_, pa.array(repeated, type_)


def columns() -> dict[str, list[tuple[pa.DataType, pa.Array]]]:
    """Columns of all types that can be sent, a few for each seed."""
    integers = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
    unsigned = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    moments = [datetime(2026, 1, 2, 3, 4, 5), datetime(1, 1, 1), datetime(9999, 12, 31)]
    texts = ["", "text", "é" * 9, "a longer text that is not kept inline"]
    words = pa.array([texts[n % 4] for n in range(_ROWS)])
    lists = [[1, 2], [], [3, None]]
    return {
        "numbers": [column(t, [0, 1, 100]) for t in (*integers, *unsigned)],
        "floats": [column(t, [0.0, 1.5, float("nan")]) for t in (pa.float32(), pa.float64())],
        "bool": [column(pa.bool_(), [True, False]), (pa.null(), pa.nulls(_ROWS))],
        "decimals": [
            column(pa.decimal128(20, 3), [Decimal("1.5"), Decimal("-99.125")]),
            column(pa.decimal128(38, 0), [Decimal(10**37)]),
            column(pa.decimal32(5, 2), [Decimal("1.25")]),
            column(pa.decimal64(15, 2), [Decimal("1.25")]),
        ],
        "wide": [column(pa.decimal256(60, 3), [Decimal("1.5")])],
        "times": [
            *(column(pa.timestamp(unit), moments[:1]) for unit in ("s", "ms", "us", "ns")),
            column(pa.timestamp("us", "Europe/Berlin"), moments),
            column(pa.date32(), [date(2026, 1, 2)]),
            column(pa.date64(), [date(2026, 1, 2)]),
            column(pa.time32("s"), [time(1, 2)]),
            column(pa.time64("ns"), [time(1, 2, 3)]),
            column(pa.duration("us"), [timedelta(1)]),
        ],
        "intervals": [column(pa.month_day_nano_interval(), [(1, 2, 3)])],
        "texts": [column(t, texts) for t in (pa.string(), pa.large_string(), pa.string_view())],
        "bytes": [
            column(t, [b"", b"\xff" * 20])
            for t in (pa.binary(), pa.large_binary(), pa.binary_view())
        ],
        "fixed": [column(pa.binary(4), [b"1234"]), column(pa.list_(pa.int16(), 2), [[1, 2]])],
        "halves": [column(pa.float16(), [1.5])],
        "lists": [
            column(pa.list_(pa.int32()), lists),
            column(pa.large_list(pa.int32()), lists),
            column(pa.list_(pa.list_(pa.string())), [[["a"], []], []]),
        ],
        "list views": [column(pa.list_view(pa.int32()), lists)],
        "structs": [
            column(pa.struct({"a": pa.int32(), "b": pa.string()}), [{"a": 1, "b": "x"}]),
            column(pa.map_(pa.string(), pa.int32()), [[("k", 1)], []]),
        ],
        "dictionaries": [
            (pa.dictionary(pa.int32(), pa.string()), words.dictionary_encode()),
            (
                pa.dictionary(pa.int8(), pa.int64()),
                pa.DictionaryArray.from_arrays(
                    pa.array([n % 3 for n in range(_ROWS)], pa.int8()), pa.array([1, 2, 3])
                ),
            ),
        ],
        "unions": [
            (
                pa.int64(),
                pa.UnionArray.from_sparse(
                    pa.array([n % 2 for n in range(_ROWS)], pa.int8()),
                    [pa.array(range(_ROWS)), pa.array(["x"] * _ROWS)],
                ),
            )
        ],
        "runs": [
            (
                pa.int64(),
                pa.RunEndEncodedArray.from_arrays(
                    pa.array([10, _ROWS], pa.int32()), pa.array([1, 2])
                ),
            )
        ],
    }


def tables() -> Iterator[pa.Table]:
    for found in columns().values():
        yield pa.table([array for _, array in found], [f"c{n}" for n in range(len(found))])


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=10)
    return sink.getvalue()


def growing_dictionary() -> bytes:
    sink = io.BytesIO()
    schema = pa.schema({"d": pa.dictionary(pa.int32(), pa.string())})
    with pa.ipc.new_stream(
        sink, schema, options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    ) as writer:
        for words in (["a", "b"], ["a", "b", "c"], ["z"]):
            writer.write_batch(
                pa.record_batch([pa.array(words).dictionary_encode()], schema=schema)
            )
    return sink.getvalue()


def small_streams() -> Iterator[bytes]:
    for table in tables():
        yield stream(table)


class Uploads:
    max_size = 16 << 10

    def __init__(self) -> None:
        limits = {"memory_limit": "1GB", "threads": "1"}
        self._engine = Engine(":memory:", read_only=False, extensions=(), limits=limits)

    def seeds(self) -> Iterator[bytes]:
        for table in tables():
            for mode in range(3):
                yield bytes((mode, 0)) + stream(table)
            for codec in ("lz4", "zstd"):
                yield bytes((0, 9)) + stream(table, compression=codec)
        joined = pa.table({"i": [1, 2], "s": ["a", None]})
        yield bytes((0, 3)) + stream(joined, use_legacy_format=True)
        yield bytes((0, 3)) + stream(joined, metadata_version=pa.ipc.MetadataVersion.V4)
        yield bytes((0, 5)) + growing_dictionary()
        yield bytes((0, 5)) + stream(joined.schema.empty_table())
        yield bytes((0, 5)) + stream(joined.rename_columns(["a", "A"]))
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, joined.schema) as writer:
            writer.write_table(joined)
        yield bytes((0, 7)) + sink.getvalue()

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        head = bytes((chance.randrange(3), chance.randrange(256))) if data[2:] else b"\0\0"
        return head + mutation.of_bytes(data[2:], chance)

    def try_one(self, data: bytes) -> None:
        if len(data) < 3:
            return
        mode, cuts, body = _MODES[data[0] % 3], random.Random(data[1]), data[2:]
        whole = self._upload(mode, body, None)
        chunked = self._upload(mode, body, cuts)
        if whole is not None and chunked is not None:
            # By their texts, since values such as NaN are not even equal to themselves.
            require(repr(whole) == repr(chunked), "one message and many make other tables")

    def _upload(self, mode: UploadMode, body: bytes, cuts: random.Random | None) -> Any:
        """The rows of the table, None after an error."""
        self._prepare(mode)
        try:
            with self._engine.cursor() as cursor:
                if cuts is None:
                    write_table(self._engine, cursor, _TABLE, mode, memoryview(body))
                else:
                    writer = TableWriter(self._engine, cursor, _TABLE, mode)
                    write_pieces(writer, body, cuts)
        except ServerError as error:
            require(not isinstance(error, InternalError) and str(error), f"{error!r}")
            self._check_kept(mode)
            return None
        return self._rows()

    def _prepare(self, mode: UploadMode) -> None:
        with self._engine.cursor() as cursor:
            if mode == "replace":
                cursor.native.execute("CREATE OR REPLACE TABLE t AS SELECT 42 AS kept")
            elif mode == "create":
                cursor.native.execute("DROP TABLE IF EXISTS t")
            else:
                wanted = ", ".join(f"c{n} VARCHAR" for n in range(4))
                cursor.native.execute(f"CREATE OR REPLACE TABLE t (kept INTEGER, {wanted})")
                cursor.native.execute("INSERT INTO t (kept) VALUES (42)")

    def _check_kept(self, mode: UploadMode) -> None:
        with self._engine.cursor() as cursor:
            if mode == "create":
                found = cursor.native.execute("FROM duckdb_tables()").fetchall()
                require(not found, "a table is there after an error")
            else:
                rows = cursor.native.execute("SELECT kept FROM t").fetchall()
                require(rows == [(42,)], "the old table changed in spite of an error")

    def _rows(self) -> Any:
        """What was let in must be readable, by the way that results take, and as texts."""
        with contextlib.suppress(ServerError), self._engine.cursor() as cursor:
            result = cursor.run("FROM t")
            if result is not None:
                for batch in result.batches:
                    batch.validate(full=True)
        with self._engine.cursor() as cursor:
            return cursor.native.execute("SELECT t::VARCHAR FROM t").fetchall()


def write_pieces(writer: TableWriter, body: bytes, cuts: random.Random) -> None:
    """As a chunked upload does."""
    pushed = PushedStream(_MAX_MESSAGE)
    rest = memoryview(body)
    while rest:
        size = cuts.choice((1, 8, 100, 1000, 10_000))
        batches = [batch for batch in pushed.feed(rest[:size]) if batch.num_rows]
        rest = rest[size:]
        if pushed.schema is not None:
            writer.begin(pushed.schema)
        if batches:
            writer.insert(iter(batches))
    pushed.finish()
    writer.finish()


def make() -> Uploads:
    return Uploads()
