"""DuckDB's Quack as a server, and its own client. Run by the Python of the environment `quack`::

    python quack_process.py serve PORT [TABLE.parquet ...]
    python quack_process.py ask PORT FILE    # SQL on standard input, an Arrow stream to FILE
    python quack_process.py time PORT        # figures of one answer as JSON on standard output

It imports nothing of this package, so that the server is small.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

TOKEN = "benchmark"
# httpfs first: without it Quack has no HTTP client, which its server asks for too.
EXTENSIONS = ("httpfs", "quack")
BATCH_ROWS = 100_000
# Small answers are asked for again, as long as that takes no longer than this.
REPEAT_SECONDS = 0.3


def load(database: duckdb.DuckDBPyConnection, *extensions: str) -> None:
    """Load extensions from the wheels `duckdb-extension-*`."""
    for name in extensions:
        package = importlib.util.find_spec(f"duckdb_extension_{name}")
        if package is None or package.origin is None:
            sys.exit(f"the wheel duckdb-extension-{name} is not installed")
        [file] = Path(package.origin).parent.glob(f"extensions/*/{name}.duckdb_extension")
        database.execute(f"load '{file}'")


def _serve(port: str, *tables: str) -> None:
    import duckdb

    database = duckdb.connect()
    load(database, *EXTENSIONS)
    for table in tables:
        database.execute(f"create table {Path(table).stem} as from '{table}'")
    database.execute(f"call quack_serve('quack:localhost:{port}', token = '{TOKEN}')")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def _remote(port: str) -> duckdb.DuckDBPyConnection:
    import duckdb

    database = duckdb.connect()
    load(database, *EXTENSIONS)
    database.execute(f"attach 'quack:localhost:{port}' as remote (token '{TOKEN}')")
    return database


def _question() -> str:
    return f"from remote.query($question${sys.stdin.read()}$question$)"


def _ask(port: str, file: str) -> None:
    import pyarrow as pa

    with _remote(port) as remote:
        reader = remote.execute(_question()).to_arrow_reader(BATCH_ROWS)
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, reader.schema) as stream:
            for batch in reader:
                stream.write_batch(batch)


def _time(port: str) -> None:
    question = _question()
    with _remote(port) as remote:
        remote.execute("from remote.query('select 1')").fetchall()
        until = perf_counter() + REPEAT_SECONDS
        found = [_timed(remote, question)]
        while perf_counter() < until:
            found.append(_timed(remote, question))
    found.sort(key=lambda one: one["seconds"])
    print(json.dumps(found[len(found) // 2]))


def _timed(remote: duckdb.DuckDBPyConnection, question: str) -> dict[str, float]:
    rows = size = 0
    first_rows = 0.0
    asked = perf_counter()
    for batch in remote.execute(question).to_arrow_reader(BATCH_ROWS):
        first_rows = first_rows or perf_counter() - asked
        rows += batch.num_rows
        size += batch.nbytes
    return {"rows": rows, "size": size, "first": first_rows, "seconds": perf_counter() - asked}


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"serve": _serve, "ask": _ask, "time": _time}
    commands[sys.argv[1]](*sys.argv[2:])
