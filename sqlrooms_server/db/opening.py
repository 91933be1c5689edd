"""Opening the result of a statement on a native cursor: the fastest way that each DuckDB has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.columns import columns_of, exact_for_json, fits_arrow
from sqlrooms_server.db.library import IS_2
from sqlrooms_server.db.statements import Statements
from sqlrooms_server.messages import Params

# 2.x streams Arrow from sql() and copies every row for execute(); 1.5 is the other way round in
# speed and returns None from sql() for anything but a query.
_STREAMS_FROM_SQL = IS_2

# What a relation of 2.x binds and runs its statement with. A small query takes a quarter to two
# fifths less time without the relation around it; sql() serves where these are missing.
_BIND: Callable[..., Any] | None = getattr(duckdb.DuckDBPyConnection, "_bind", None)
_SUBMIT: Callable[..., Any] | None = getattr(duckdb.DuckDBPyConnection, "_submit", None)

# Values of a batch, all columns together: about 1 MiB of Arrow data, so that the memory of a
# query does not grow with the number of its columns.
_BATCH_VALUES = 1 << 16
# DuckDB's vector size; a smaller batch saves nothing.
_MIN_BATCH_ROWS = 2048


def open_result(
    native: duckdb.DuckDBPyConnection,
    sql: str,
    params: Params | None,
    statements: Statements,
    formats: tuple[str, ...],
    parsed: duckdb.Statement | None,
) -> Result | None:
    """Run ``sql``, which is ``statements``, and open what its last one returns.

    ``parsed`` is ``sql`` as DuckDB parsed it, where that may be used. The result may be sent in
    ``formats``, the best first.
    """
    exact = formats[:1] == ("json",) and statements.is_one_select
    if _BIND and _SUBMIT and statements.is_one_select:
        return _submit(_BIND, _SUBMIT, native, sql, params, statements, exact)
    # 1.5 makes the whole result of sql() with parameters before its first row.
    as_relation = _STREAMS_FROM_SQL or (exact and params is None)
    # Either a relation or the cursor itself; both tell their columns and give a reader.
    opened = _ask(native, sql if as_relation else parsed or sql, params, as_relation)
    if opened is None:
        return None
    description = opened.description
    if "json" in formats and statements.is_one_select:
        columns = columns_of(description)
        cast = exact_for_json(sql, columns) if exact or not fits_arrow(columns) else None
        if cast is not None:
            opened = _ask(native, cast, params, as_relation)
    return Result(opened.to_arrow_reader(_batch_rows(len(description))), description, statements)


def result_of_change(native: duckdb.DuckDBPyConnection, statements: Statements) -> Result:
    """What a text returns that :func:`execute` ran, and whose last statement changes something.

    It is complete before the first row is read. Of all ways to run such a text, only execute()
    and fetchall() never report an interrupt for what was committed.
    """
    description = native.description
    if len(description) == 1 and _is_count(*description[0][:2]):
        counts = pa.array([row[0] for row in native.fetchall()], pa.int64())
        batch = pa.RecordBatch.from_pydict({"Count": counts})
        reader = pa.RecordBatchReader.from_batches(batch.schema, [batch])
    else:
        reader = native.to_arrow_reader(_batch_rows(len(description)))
    return Result(reader, description, statements)


def execute(
    native: duckdb.DuckDBPyConnection, sql: str | duckdb.Statement, params: Params | None
) -> Any:
    return native.execute(sql) if params is None else native.execute(sql, params)


def _ask(
    native: duckdb.DuckDBPyConnection,
    sql: str | duckdb.Statement,
    params: Params | None,
    as_relation: bool,
) -> Any:
    if as_relation:
        return native.sql(sql) if params is None else native.sql(sql, params=params)
    return execute(native, sql, params)


def _submit(
    bind: Callable[..., Any],
    submit: Callable[..., Any],
    native: duckdb.DuckDBPyConnection,
    sql: str,
    params: Params | None,
    statements: Statements,
    exact: bool,
) -> Result:
    """Run one SELECT of 2.x. The size of its batches must be known before its columns are."""
    width, text = statements.width, sql
    bound: list[Any] = []
    if width is None or exact:
        names, types = bind(native, sql, values=params)[:2]
        width = len(names)
        if exact:
            bound = list(zip(names, types, strict=True))
            text = exact_for_json(sql, columns_of(bound)) or sql
    opened = submit(native, text, params, "stream", _batch_rows(width))
    description = opened.description
    if len(description) > 2 * width:
        # The tables have changed since the last run.
        opened.close()
        opened = submit(native, text, params, "stream", _batch_rows(len(description)))
    statements.width = len(description)
    # The types before the casts tell how their texts are meant.
    return Result(opened.arrow_reader(), bound or description, statements)


def _is_count(name: str, type_: Any) -> bool:
    """Whether a column is DuckDB's count of changed rows, and none that RETURNING made."""
    return name == "Count" and str(type_) == "BIGINT"


def _batch_rows(width: int) -> int:
    return max(_MIN_BATCH_ROWS, _BATCH_VALUES // max(1, width))
