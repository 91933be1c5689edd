"""What a client is told about errors of DuckDB and Arrow."""

from __future__ import annotations

import duckdb
import pyarrow as pa

from sqlrooms_server.errors import Conflict, QueryError

# OSError: what a half-read Arrow reader raises for an error of the query.
DATABASE_ERRORS = (duckdb.Error, pa.ArrowException, OSError)

_CONFLICT_WORDS = ("conflict", "another transaction", "different transaction")


def query_failure(error: BaseException) -> QueryError | Conflict:
    """What a client is told about ``error`` of DuckDB or Arrow."""
    if isinstance(error, duckdb.TransactionException) and is_conflict(error):
        return Conflict(str(error))
    if isinstance(error, duckdb.OutOfMemoryException):
        return QueryError(f"{error} (--memory-limit and --temp-directory of the server)")
    return QueryError(str(error))


def is_conflict(error: duckdb.TransactionException) -> bool:
    """Whether a concurrent transaction won, so that a second try may succeed."""
    text = str(error).lower()
    # The same key inserted twice is reported at commit in the same words, but is no accident.
    return "duplicate key" not in text and any(word in text for word in _CONFLICT_WORDS)
