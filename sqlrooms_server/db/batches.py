"""A result that is read batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from sqlrooms_server.db.columns import Column, columns_of, fits_arrow
from sqlrooms_server.db.failures import DATABASE_ERRORS, query_failure
from sqlrooms_server.db.statements import Statements
from sqlrooms_server.errors import ServerError


class Result:
    """A result that is read batch by batch from ``batches``; ``reader`` knows its schema."""

    __slots__ = (
        "_description",
        "_is_closed",
        "_table",
        "batches",
        "reader",
        "rows",
        "statements",
        "truncated",
    )

    def __init__(
        self, reader: pa.RecordBatchReader, description: list[Any], statements: Statements
    ) -> None:
        self.reader = reader
        self.batches: Iterable[pa.RecordBatch] = reader
        self.statements = statements
        # What count_rows() found so far.
        self.rows = 0
        self.truncated = False
        self._description = description
        self._table: pa.Table | None = None
        self._is_closed = False

    def table(self) -> pa.Table:
        """All rows, in memory. The result can be sent all the same, and the table be kept.

        Raises ``QueryError``.
        """
        if self._table is None:
            try:
                self._table = pa.Table.from_batches(list(self.batches), self.reader.schema)
            except DATABASE_ERRORS as error:
                raise query_failure(error) from error
            self.batches = iter(self._table.to_batches())
        return self._table

    def close(self) -> None:
        """Let go of what DuckDB holds. A reader that is not closed keeps a transaction open."""
        self._is_closed = True
        self.reader.close()

    @property
    def is_lost(self) -> bool:
        """Whether its rows can be read no more."""
        return self._is_closed and self._table is None

    def count_rows(
        self, max_rows: int | None = None, refuse: Callable[[], ServerError] | None = None
    ) -> None:
        """Count the rows as they are read.

        When there are more than ``max_rows``, raise what ``refuse`` returns, or without it, end
        there and note that the result is truncated.
        """
        self.batches = self._counted(self.batches, max_rows, refuse)

    def _counted(
        self,
        batches: Iterable[pa.RecordBatch],
        max_rows: int | None,
        refuse: Callable[[], ServerError] | None,
    ) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if max_rows is not None and self.rows + batch.num_rows > max_rows:
                if refuse is not None:
                    raise refuse()
                self.truncated = True
                batch = batch.slice(0, max_rows - self.rows)
            self.rows += batch.num_rows
            yield batch
            if self.truncated:
                return

    @property
    def columns(self) -> tuple[Column, ...]:
        """Names and DuckDB types of the columns."""
        return columns_of(self._description)

    def goes_as_json(self, formats: tuple[str, ...]) -> bool:
        """Whether JSON is the first of ``formats`` to carry it. Arrow of 1.5 has no VARIANT."""
        return formats[0] == "json" or ("json" in formats and not fits_arrow(self.columns))

    def first_batch(self) -> pa.RecordBatch | None:
        """The first batch that has rows; None when there is none."""
        for batch in self.batches:
            if batch.num_rows:
                return batch
        return None

    @property
    def tells_nothing(self) -> bool:
        """Whether the result, if it has no rows, stands for "done" rather than for a table.

        DuckDB reports statements without a result as an empty column ``Success`` or ``Count``.
        """
        if self.statements.returns_rows or len(self._description) != 1:
            return False
        name, type_ = self._description[0][:2]
        return (name, str(type_)) in (("Success", "BOOLEAN"), ("Count", "BIGINT"))
