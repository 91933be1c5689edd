"""Which DuckDB this is."""

from __future__ import annotations

import duckdb

DUCKDB_VERSION: str = duckdb.__version__
IS_2 = int(DUCKDB_VERSION.split(".")[0]) >= 2
