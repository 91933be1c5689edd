"""The engine alone, in a process of its own: the bound that no server around it can beat.

`python -m bench_suite.inprocess WORKLOAD full|quick [TABLE.parquet ...]` prints the figures as one
JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import duckdb
import pyarrow as pa

from . import tpch
from .answers import LARGE, MIXED, ONE, Query, Upload, WrongAnswer, gigabyte
from .bare_process import END_OF_STREAM, reader_of
from .growth import HEAVY_CLIENTS, by_rows
from .hub import bare_fan_out
from .load import Rate, Sample, Stream
from .plan import FULL, QUICK, Effort
from .servers import Usage
from .workloads import SUBSCRIBED, large_sample


def _chunks(database: duckdb.DuckDBPyConnection, query: Query) -> Iterator[pa.Buffer | bytes]:
    with database.cursor() as cursor:
        reader = reader_of(cursor, query.sql)
        yield reader.schema.serialize()
        for batch in reader:
            yield batch.serialize()
        yield END_OF_STREAM


def _joined(database: duckdb.DuckDBPyConnection, query: Query) -> bytes:
    return b"".join(_chunks(database, query))


def _repeat(
    database: duckdb.DuckDBPyConnection, query: Query, seconds: float, *, checked: bool = True
) -> Rate:
    right = _joined(database, query) if checked else b""
    if checked:
        query.decode(right)
    latencies = []
    start = perf_counter()
    until = start + seconds
    while (asked := perf_counter()) < until:
        answer = _joined(database, query)
        latencies.append(perf_counter() - asked)
        if answer != right:
            query.decode(answer)
            right = answer
    return Rate(asked - start, latencies)


def _stream(database: duckdb.DuckDBPyConnection, query: Query) -> Stream:
    rows = size = 0
    first_byte = first_rows = 0.0
    asked = perf_counter()
    with database.cursor() as cursor:
        reader = reader_of(cursor, query.sql)
        size += len(reader.schema.serialize())
        first_byte = perf_counter()
        for batch in reader:
            size += len(batch.serialize())
            rows += batch.num_rows
            first_rows = first_rows or perf_counter()
    done = perf_counter()
    query.expect_rows(rows)
    return Stream(size, first_byte - asked, first_rows - asked, done - asked)


def _one(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    _repeat(database, ONE, effort.warm_up)
    return _repeat(database, ONE, effort.window).sample()


def _mixed(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    MIXED.decode(_joined(database, MIXED))
    answers = [_stream(database, MIXED) for _ in range(effort.mixed_answers)]
    return {
        "mbps": median(answer.megabytes_per_second for answer in answers),
        "seconds": median(answer.seconds for answer in answers),
    }


def _large(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    _repeat(database, ONE, effort.warm_up)
    usage = Usage(os.getpid())
    before = usage.memory()
    usage.reset_peak()
    answer = _stream(database, LARGE)
    return large_sample(answer, usage.peak_memory() - before)


def _heavy(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    """The queries of TPC-H, each asked by 16 threads."""
    sample: Sample = {}
    for name, query in tpch.QUERIES.items():
        _repeat(database, query, 0)
        with ThreadPoolExecutor(HEAVY_CLIENTS) as pool:
            began = perf_counter()
            asked = [
                pool.submit(_repeat, database, query, effort.window, checked=False)
                for _ in range(HEAVY_CLIENTS)
            ]
            count = sum(len(future.result().latencies) for future in asked)
            sample[name] = count / (perf_counter() - began)
    return sample


def _rows(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    _repeat(database, ONE, effort.warm_up)
    sample: Sample = {}
    for point in by_rows(effort, lambda query: _stream(database, query)):
        sample |= point
    return sample


def _start(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    """Python from nothing to a first answer, and what it holds then."""
    code = (
        "from time import perf_counter as now; began = now(); import duckdb, pyarrow; "
        "took = now() - began; duckdb.sql('select 1').to_arrow_table(); "
        "print(took, [l.split()[1] for l in open('/proc/self/status') if 'VmRSS' in l][0])"
    )
    began = perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = perf_counter() - began
    took, memory = map(float, done.stdout.split())
    return {"first": seconds, "module": took, "memory": memory * 1024 / 1e6}


class _Pieces:
    """A file that Arrow reads an upload from."""

    closed = False

    def __init__(self, data: Upload) -> None:
        self._messages = data.messages()
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            if not self._rest:
                self._rest = memoryview(next(self._messages, (b"", True))[0])
                if not self._rest:
                    break
            parts.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        return b"".join(parts)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _upload(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    _repeat(database, ONE, effort.warm_up)
    data = gigabyte()
    size = sum(len(message) for message, _ in data.messages())
    began = perf_counter()
    database.register("source", pa.ipc.open_stream(pa.PythonFile(_Pieces(data), "r")))
    database.execute("create table t as from source")
    seconds = perf_counter() - began
    found = database.execute("select count(*) from t").fetchall()
    if found != [(data.rows,)]:
        raise WrongAnswer(f"{found} instead of {data.rows} rows")
    return {"mbps": size / 1e6 / seconds}


def _fan_out(database: duckdb.DuckDBPyConnection, effort: Effort) -> Sample:
    return bare_fan_out(SUBSCRIBED, effort.window).sample()


RUNS: dict[str, Callable[[duckdb.DuckDBPyConnection, Effort], Sample]] = {
    "one": _one,
    "mixed": _mixed,
    "tpch": _heavy,
    "large": _large,
    "rows": _rows,
    "start": _start,
    "upload": _upload,
    "fanout": _fan_out,
}


def main(name: str, effort: str, *tables: str) -> None:
    with duckdb.connect() as database:
        for table in tables:
            database.execute(f"create table {Path(table).stem} as from '{table}'")
        sample = RUNS[name](database, QUICK if effort == "quick" else FULL)
    print(json.dumps(sample))


if __name__ == "__main__":
    main(*sys.argv[1:])
