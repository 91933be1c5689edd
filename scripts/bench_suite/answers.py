"""The queries that are measured, and what a right answer to each of them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from .arrow_scan import BrokenStream, StreamScan


class WrongAnswer(Exception):
    """A server answered, but not what was asked."""


@dataclass(frozen=True)
class Query:
    """A query, the number of rows it returns, and a check of the decoded table.

    `tables` are the stored tables that it reads; `elsewhere` is its text for a server that is not
    DuckDB, where that has to differ.
    """

    sql: str
    rows: int
    check: Callable[[pa.Table], None]
    tables: tuple[str, ...] = ()
    elsewhere: str = ""

    def decode(self, stream: bytes | bytearray | memoryview) -> None:
        """Decode an Arrow IPC stream and check it, or raise `WrongAnswer`."""
        scan = StreamScan()
        try:
            scan.feed(memoryview(stream))
            table = pa.ipc.open_stream(pa.py_buffer(stream)).read_all()
            table.validate(full=True)
        except (BrokenStream, pa.ArrowException, OSError) as error:
            raise WrongAnswer(f"not an Arrow stream: {error}") from error
        # Arrow itself does not mind when it is missing.
        _expect("end mark of the stream", scan.complete, True)
        self.expect_rows(table.num_rows)
        self.check(table)

    def expect_rows(self, rows: int) -> None:
        _expect("rows", rows, self.rows)


@dataclass(frozen=True)
class Upload:
    """An Arrow IPC stream of one batch, repeated."""

    batch: pa.RecordBatch
    count: int

    @property
    def rows(self) -> int:
        return int(self.batch.num_rows) * self.count

    def messages(self) -> Iterator[tuple[bytes, bool]]:
        """The messages of the stream, and whether each is the last."""
        yield self.batch.schema.serialize().to_pybytes(), False
        message = self.batch.serialize().to_pybytes()
        for _ in range(self.count):
            yield message, False
        yield b"\xff\xff\xff\xff\0\0\0\0", True


def _expect(what: str, found: object, right: object) -> None:
    if found != right:
        raise WrongAnswer(f"{what}: {found!r} instead of {right!r}")


def _sum_to(count: int) -> int:
    return count * (count - 1) // 2


def _check_one(table: pa.Table) -> None:
    _expect("columns", table.num_columns, 1)
    _expect("value", table.column(0).to_pylist(), [1])


_MIXED_ROWS = 1_000_000
_MIXED_START = datetime(2024, 1, 1)


def _check_mixed(table: pa.Table) -> None:
    rows = _MIXED_ROWS
    name_lengths = sum(len(f"name-{n}") for n in range(5000)) * (rows // 5000)
    _expect("types", table.schema.types, _MIXED_TYPES)
    _expect("sum of id", pc.sum(table["id"]).as_py(), _sum_to(rows))
    _expect("sum of small", pc.sum(table["small"]).as_py(), _sum_to(1000) * (rows // 1000))
    _expect("sum of price", pc.sum(table["price"]).as_py(), _sum_to(rows) / 2)
    _expect("length of names", pc.sum(pc.utf8_length(table["name"])).as_py(), name_lengths)
    _expect("distinct names", pc.count_distinct(table["name"]).as_py(), 5000)
    _expect("first seen", pc.min(table["seen"]).as_py(), _MIXED_START)
    last = _MIXED_START + timedelta(seconds=rows - 1)
    _expect("last seen", pc.max(table["seen"]).as_py(), last)
    _expect("true flags", pc.sum(table["flag"]).as_py(), (rows + 2) // 3)
    _expect("nulls in note", table["note"].null_count, rows * 9 // 10)
    _expect("sum of day", pc.sum(pc.day(table["day"])).as_py(), _day_sum())


def _day_sum() -> int:
    per_day = _MIXED_ROWS // 1000
    return per_day * sum((_MIXED_START + timedelta(days=n)).day for n in range(1000))


_MIXED_TYPES = [
    pa.int64(),
    pa.int32(),
    pa.float64(),
    pa.string(),
    pa.timestamp("us"),
    pa.bool_(),
    pa.string(),
    pa.date32(),
]

ONE = Query("select 1", 1, _check_one)

MIXED = Query("select * from mixed", _MIXED_ROWS, _check_mixed, tables=("mixed",))

MIXED_TABLE = f"""
    create table mixed as select
        range as id,
        (range % 1000)::integer as small,
        range * 0.5::double as price,
        'name-' || (range % 5000) as name,
        timestamp '{_MIXED_START}' + to_seconds(range) as seen,
        range % 3 = 0 as flag,
        case when range % 10 = 0 then 'note ' || range end as note,
        date '{_MIXED_START:%Y-%m-%d}' + (range % 1000)::integer as day
    from range({_MIXED_ROWS})
"""


def counted(rows: int) -> Query:
    """So many rows of two integers."""

    def check(table: pa.Table) -> None:
        _expect("types", table.schema.types, [pa.int64(), pa.int64()])
        _expect("sum of a", pc.sum(table["a"]).as_py(), _sum_to(rows))
        _expect("sum of b", pc.sum(table["b"]).as_py(), 2 * _sum_to(rows))

    return Query(
        f"select range as a, range * 2 as b from range({rows})",
        rows,
        check,
        elsewhere=f"select value as a, value * 2 as b from generate_series(0, {rows - 1})",
    )


LARGE = counted(30_000_000)


STREAM_ROWS = 200_000


def numbered(number: int) -> Query:
    """One of many queries whose answers differ."""

    def check(table: pa.Table) -> None:
        _expect(
            "sum", pc.sum(table.column("a")).as_py(), _sum_to(STREAM_ROWS) + number * STREAM_ROWS
        )

    return Query(f"select range + {number} as a from range({STREAM_ROWS})", STREAM_ROWS, check)


def gigabyte() -> Upload:
    """1 GB of integers, doubles and short texts."""
    rows = 1 << 16
    batch = pa.record_batch(
        {
            "i": pa.array(range(rows), pa.int64()),
            "d": pa.array([number / 2 for number in range(rows)]),
            "s": pa.array([f"t{number % 1000:04d}" for number in range(rows)]),
        }
    )
    return Upload(batch, round(1e9 / len(batch.serialize())))
