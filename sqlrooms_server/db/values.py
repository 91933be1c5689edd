"""Tables of other libraries: whatever speaks Arrow's C stream interface.

That is pyarrow, pandas, polars, and relations of DuckDB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.messages import Params

_NAME = "__sqlrooms_value"


def is_table(value: object) -> bool:
    """Whether ``value`` is a table, or a stream of batches."""
    return hasattr(value, "__arrow_c_stream__") or is_dataset(value)


def reader_of(value: Any) -> pa.RecordBatchReader:
    """The batches of ``value``, which :func:`is_table`."""
    if isinstance(value, pa.RecordBatchReader):
        return value
    if isinstance(value, duckdb.DuckDBPyRelation):
        return value.to_arrow_reader()
    if is_dataset(value):
        return value.scanner().to_reader()
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


@dataclass(frozen=True, slots=True)
class Relation:
    """A query that can be asked again and again, by several threads at once.

    Each time it is run on a cursor of its own, as the server, which may do anything.
    """

    sql: str
    params: Params | None = None

    @classmethod
    def of(cls, engine: Engine, sql: str, params: Params | None = None) -> Relation:
        """The relation of ``sql``, one SELECT. Raises ``ValueError``, ``QueryError``."""
        with engine.cursor() as cursor:
            if not cursor.examine(sql).is_one_select:
                raise ValueError(f"A relation is one SELECT, and this is not: {sql[:200]}")
            if params is None:
                cursor.bind(sql)
        return cls(sql, params)


def is_relation(value: object) -> bool:
    """Whether ``value`` is a relation of DuckDB, which belongs to the connection that made it."""
    return isinstance(value, duckdb.DuckDBPyRelation)


def is_dataset(value: object) -> bool:
    """Whether ``value`` is a ``pyarrow.dataset.Dataset``."""
    # Whoever has one has loaded the module, which takes a while.
    module = sys.modules.get("pyarrow.dataset")
    return module is not None and isinstance(value, module.Dataset)


def is_read_once(value: object) -> bool:
    """Whether ``value`` is a table whose batches can be read only once."""
    return isinstance(value, pa.RecordBatchReader)
