"""Arrow IPC streams to tables: validated batch by batch, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pyarrow as pa

from sqlrooms_server.db.columns import Column, unique_names
from sqlrooms_server.db.engine import Cursor, Engine
from sqlrooms_server.db.statements import quote_identifier
from sqlrooms_server.errors import BadRequest

# Registered names belong to the cursor, so uploads at one time do not meet.
_SOURCE = "__sqlrooms_upload"


def create_table(engine: Engine, cursor: Cursor, table: tuple[str, ...], body: memoryview) -> None:
    """Create or replace ``table`` (one to three name parts) from the Arrow IPC stream ``body``.

    Raises ``BadRequest`` when the stream is not one; then, as after any error, a table that was
    there before is as it was. Columns of one name are numbered: ``a``, ``a_1``.
    """
    target = ".".join(quote_identifier(part) for part in table)
    statement = f"CREATE OR REPLACE TABLE {target} AS SELECT * FROM {_SOURCE}"

    def attempt() -> None:
        # A reader can be read once; a second try with a spent one would empty the table.
        source = _Source(body)
        cursor.native.register(_SOURCE, source.reader())
        try:
            cursor.native.execute(statement)
            cursor.has_written = True
        except (duckdb.Error, pa.ArrowException) as error:
            if source.failure is not None:
                raise _broken(source.failure) from error
            raise
        finally:
            cursor.native.unregister(_SOURCE)

    cursor.check()
    engine.retrying(cursor, attempt)


def _broken(error: BaseException) -> BadRequest:
    return BadRequest(f"The body of uploadArrow is not a valid Arrow IPC stream: {error}")


class _Source:
    """One reading of an Arrow IPC stream. ``failure`` is what was wrong with it, if anything."""

    def __init__(self, body: memoryview) -> None:
        self.failure: Exception | None = None
        try:
            # The body stands behind a header of any length; Arrow data must be aligned.
            self._stream = pa.ipc.open_stream(pa.py_buffer(bytes(body)))
        except (pa.ArrowException, OSError) as error:
            raise _broken(error) from error
        if not self._stream.schema.names:
            raise BadRequest("The Arrow IPC stream has no columns; a table needs at least one.")

    def reader(self) -> pa.RecordBatchReader:
        """Its batches, each validated: DuckDB trusts offsets, and a bad one ends the process."""
        schema = self._stream.schema
        names = unique_names(tuple(Column(name, None) for name in schema.names))
        schema = pa.schema(
            [field.with_name(name) for field, name in zip(schema, names, strict=True)]
        )
        return pa.RecordBatchReader.from_batches(schema, self._batches(schema))

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._stream:
                batch.validate(full=True)
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)
        except (pa.ArrowException, OSError) as error:
            self.failure = error
            raise
