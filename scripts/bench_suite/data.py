"""Makes the tables that the workloads read, as Parquet files.

`python -m bench_suite.data mixed|tpch DIRECTORY`, with a DuckDB. `tpch` takes DuckDB's generator,
the extension `tpch` of the wheel `duckdb-extension-tpch`, at scale factor 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb

from .answers import MIXED_TABLE
from .quack_process import load

TPCH_TABLES = ("customer", "lineitem", "orders")


def _mixed(database: duckdb.DuckDBPyConnection) -> list[str]:
    database.execute(MIXED_TABLE)
    # For a server that does not start without a table.
    database.execute("create table one as select 1 as n")
    return ["mixed", "one"]


def _tpch(database: duckdb.DuckDBPyConnection) -> list[str]:
    load(database, "tpch")
    database.execute("call dbgen(sf = 1)")
    return list(TPCH_TABLES)


def main(what: str, directory: str) -> None:
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as database:
        for table in {"mixed": _mixed, "tpch": _tpch}[what](database):
            made = home / f"{table}.parquet.new"
            database.execute(f"copy {table} to '{made}' (format parquet)")
            made.rename(home / f"{table}.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
