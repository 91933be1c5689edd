"""Tables of other libraries: whatever speaks Arrow's C stream interface.

That is pyarrow, pandas, polars, and relations of DuckDB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db.cursor import Cursor, Result
from sqlrooms_server.db.engine import Engine

_NAME = "__sqlrooms_value"


def is_table(value: object) -> bool:
    """Whether ``value`` is a table, or a stream of batches."""
    return hasattr(value, "__arrow_c_stream__")


def reader_of(value: Any) -> pa.RecordBatchReader:
    """The batches of ``value``, which :func:`is_table`."""
    if isinstance(value, pa.RecordBatchReader):
        return value
    if isinstance(value, duckdb.DuckDBPyRelation):
        return value.to_arrow_reader()
    return pa.RecordBatchReader.from_stream(value)


@contextmanager
def opened(
    engine: Engine,
    value: Any,
    formats: tuple[str, ...] = ("arrow",),
    began: Callable[[Cursor], None] = lambda cursor: None,
) -> Iterator[Result]:
    """The rows of ``value`` as a result of DuckDB, which gives every client what it understands.

    ``began`` is told of the cursor that reads them, to interrupt it. Raises ``QueryError`` for
    types that DuckDB does not have.
    """
    with engine.cursor() as cursor:
        began(cursor)
        cursor.native.register(_NAME, reader_of(value))
        result = cursor.run(f"SELECT * FROM {_NAME}", None, formats)
        assert result is not None
        yield result


def table_of(result: Result | None) -> pa.Table:
    """All rows of ``result``; of none, a table without columns."""
    if result is None:
        return pa.table({})
    return result.table()
