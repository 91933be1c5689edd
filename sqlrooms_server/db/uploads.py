"""Arrow IPC streams to tables: validated batch by batch, whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db.cursor import CHANGES_STAND, Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.ipc import READ_OPTIONS, STREAM_ERRORS, broken, check_stream, numbered
from sqlrooms_server.db.statements import quote_identifier
from sqlrooms_server.errors import Conflict
from sqlrooms_server.messages import UploadMode

# Registered names belong to the cursor, so uploads at one time do not meet.
_SOURCE = "__sqlrooms_upload"


def write_table(
    engine: Engine,
    cursor: Cursor,
    table: tuple[str, ...],
    mode: UploadMode,
    body: memoryview,
    max_message: int = 128 << 20,
) -> None:
    """Write the Arrow IPC stream ``body`` to ``table`` (one to three name parts).

    What is compressed in it may grow to a multiple of ``max_message``.

    Raises ``BadRequest`` when the stream is not one and ``Conflict`` when a table to create is
    there; then, as after any error, a table that was there before is as it was. Columns of one
    name are numbered: ``a``, ``a_1``.
    """
    target = _qualified(table)
    statement = {
        "replace": f"CREATE OR REPLACE TABLE {target} AS SELECT * FROM {_SOURCE}",
        "create": f"CREATE TABLE {target} AS SELECT * FROM {_SOURCE}",
        "append": f"INSERT INTO {target} BY NAME SELECT * FROM {_SOURCE}",
    }[mode]

    def attempt() -> None:
        # A reader can be read once; a second try with a spent one would empty the table.
        source = _Source(aligned)
        cursor.native.register(_SOURCE, source.reader())
        try:
            cursor.native.execute(statement)
            cursor.aftermath = CHANGES_STAND
        except (duckdb.Error, pa.ArrowException) as error:
            if source.failure is not None:
                raise broken(source.failure) from error
            raise _explained(error, mode) from error
        finally:
            cursor.native.unregister(_SOURCE)

    cursor.check()
    # The body stands behind a header of any length; Arrow data must be aligned.
    aligned = pa.py_buffer(bytes(body))
    check_stream(aligned, max_message)
    with engine.changes.of_upload(cursor.native, target, new=mode != "append"):
        engine.retrying(cursor, attempt)


class TableWriter:
    """Writes a table batch by batch, in one transaction of ``cursor``.

    A table to replace is made under another name, so that the transaction holds on to the old
    one only at the end. Closing the cursor before :meth:`finish` rolls everything back.
    """

    def __init__(
        self, engine: Engine, cursor: Cursor, table: tuple[str, ...], mode: UploadMode
    ) -> None:
        self.rows = 0
        self._engine = engine
        self._cursor = cursor
        self._mode = mode
        self._target = table
        self._written = table
        if mode == "replace":
            self._written = (*table[:-1], f"__sqlrooms_upload_{secrets.token_hex(8)}")
        self._schema: pa.Schema | None = None

    def begin(self, schema: pa.Schema) -> None:
        """Begin the transaction and find out whether ``schema`` fits. Later calls do nothing."""
        if self._schema is not None:
            return
        self._schema = schema
        self._cursor.check()
        self._cursor.native.execute("BEGIN")
        # Neither CREATE TABLE AS nor INSERT of no rows: what the same transaction inserts then is
        # invisible to 1.5.6 until a checkpoint, and has no statistics on 2.0.0: sum() is NULL.
        if self._mode == "append":
            self._run(f"EXPLAIN {self._insertion}", iter(()))
        else:
            described = self._run(f"DESCRIBE SELECT * FROM {_SOURCE}", iter(()))
            columns = ", ".join(f"{quote_identifier(row[0])} {row[1]}" for row in described)
            statement = f"CREATE TABLE {_qualified(self._written)} ({columns})"
            try:
                self._cursor.native.execute(statement)
            except duckdb.Error as error:
                raise _explained(error, self._mode) from error

    def insert(self, batches: Iterator[pa.RecordBatch]) -> None:
        """Write ``batches``, at least one and all with rows, as DuckDB asks for them."""
        self.rows += self._run(self._insertion, batches)[0][0]

    def finish(self) -> None:
        """Commit: the table appears."""
        native = self._cursor.native
        if self._written != self._target:
            name = quote_identifier(self._target[-1])
            native.execute(f"DROP TABLE IF EXISTS {_qualified(self._target)}")
            native.execute(f"ALTER TABLE {_qualified(self._written)} RENAME TO {name}")
        self._cursor.check()
        changes, new = self._engine.changes, self._mode != "append"
        with changes.of_upload(native, _qualified(self._target), new=new):
            native.execute("COMMIT")
        self._cursor.aftermath = CHANGES_STAND

    @property
    def _insertion(self) -> str:
        by_name = " BY NAME" if self._mode == "append" else ""
        return f"INSERT INTO {_qualified(self._written)}{by_name} SELECT * FROM {_SOURCE}"

    def _run(self, statement: str, batches: Iterator[pa.RecordBatch]) -> list[Any]:
        self._cursor.check()
        native = self._cursor.native
        source = _Guarded(batches)
        native.register(_SOURCE, pa.RecordBatchReader.from_batches(self._schema, source))
        # After an error the name goes with the cursor; 2.x refuses to do anything in between.
        try:
            rows = native.execute(statement).fetchall()
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if source.failure is not None:
                raise source.failure from error
            raise
        if source.failure is not None:
            raise source.failure
        native.unregister(_SOURCE)
        return rows


class _Guarded:
    """Batches for DuckDB, and why there are no more of them."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self.failure: Exception | None = None
        self._batches = batches

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches
        except Exception as error:  # re-raised; DuckDB would keep only its text
            self.failure = error
            raise


def _qualified(table: tuple[str, ...]) -> str:
    return ".".join(quote_identifier(part) for part in table)


def _explained(error: Exception, mode: UploadMode) -> Exception:
    """``error``, or what it means for an upload."""
    if mode == "create" and isinstance(error, duckdb.CatalogException):
        if "already exists" in str(error):
            return Conflict(f"{error} Use mode replace or append.")
    return error


class _Source:
    """One reading of an Arrow IPC stream. ``failure`` is what was wrong with it, if anything."""

    def __init__(self, body: pa.Buffer) -> None:
        self.failure: Exception | None = None
        try:
            self._stream = pa.ipc.open_stream(body, options=READ_OPTIONS)
            self._schema = numbered(self._stream.schema)
        except STREAM_ERRORS as error:
            raise broken(error) from error

    def reader(self) -> pa.RecordBatchReader:
        """Its batches, each validated: DuckDB trusts offsets, and a bad one ends the process."""
        return pa.RecordBatchReader.from_batches(self._schema, self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._stream:
                batch.validate(full=True)
                yield pa.RecordBatch.from_arrays(batch.columns, schema=self._schema)
        except STREAM_ERRORS as error:
            self.failure = error
            raise
