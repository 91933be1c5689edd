"""A cursor of one job: running SQL text and reading its result batch by batch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db.changes import Expected, is_uncertain, joined
from sqlrooms_server.db.columns import Column, columns_of, exact_for_json, has_variant
from sqlrooms_server.db.parameters import bindable, check_binds
from sqlrooms_server.db.policy import UNRESTRICTED, Policy
from sqlrooms_server.db.statements import Statements
from sqlrooms_server.errors import Cancelled, Conflict, QueryError, ServerError
from sqlrooms_server.messages import Params

if TYPE_CHECKING:
    from sqlrooms_server.db.engine import Engine
    from sqlrooms_server.db.statements import Classifier

DUCKDB_VERSION: str = duckdb.__version__

# 2.x streams Arrow from sql() and copies every row for execute(); 1.5 is the other way round in
# speed and returns None from sql() for anything but a query.
_STREAMS_FROM_SQL = int(DUCKDB_VERSION.split(".")[0]) >= 2

# What a relation of 2.x binds and runs its statement with. A small query takes a quarter to two
# fifths less time without the relation around it; sql() serves where these are missing.
_BIND: Callable[..., Any] | None = getattr(duckdb.DuckDBPyConnection, "_bind", None)
_SUBMIT: Callable[..., Any] | None = getattr(duckdb.DuckDBPyConnection, "_submit", None)

# Values of a batch, all columns together: about 1 MiB of Arrow data, so that the memory of a
# query does not grow with the number of its columns.
_BATCH_VALUES = 1 << 16
# DuckDB's vector size; a smaller batch saves nothing.
_MIN_BATCH_ROWS = 2048

CHANGES_STAND = " The statement itself had finished; its changes stand."
_IN_SESSION = (
    " The statement itself had finished; its changes stand, or are part of the transaction that "
    "the session is in."
)

_CONFLICT_WORDS = ("conflict", "another transaction", "different transaction")


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
            except _DATABASE_ERRORS as error:
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
        return formats[0] == "json" or ("json" in formats and not _fit_arrow(self.columns))

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


class Cursor:
    """A cursor of one job, closed at the end of its ``with`` block.

    DuckDB's errors come out of the block as ``QueryError`` with their text, or ``Conflict``. Only
    its worker uses a cursor; :meth:`interrupt` and :meth:`progress` are for other threads.

    The native cursor of a ``session`` outlives the job. ``policy`` bounds what :meth:`run` and
    :meth:`examine` take.
    """

    def __init__(
        self,
        native: duckdb.DuckDBPyConnection,
        engine: Engine,
        *,
        session: SharedCursor | None = None,
        policy: Policy = UNRESTRICTED,
    ) -> None:
        self.native = native
        self._policy = None if policy.is_open else policy
        self._session = session
        self._is_own = session is None
        # Names may mean something else here than on other cursors.
        self._is_special = session is not None
        self._classifier = engine.classifier if session is None else engine.classifier_of_sessions
        # What has happened by now that an error of the query does not undo: a sentence, or none.
        self.aftermath = ""
        self._shows_progress = False
        self._engine = engine
        self._interrupted = False
        self._result: Result | None = None
        self._late_change: Expected | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            if isinstance(error, _DATABASE_ERRORS):
                raise query_failure(error) from error
        finally:
            self.close()

    def interrupt(self) -> None:
        """Cut short what runs and refuse to run more. Never blocks."""
        self._interrupted = True
        with self._lock, contextlib.suppress(duckdb.Error):
            if not self._closed:
                self.native.interrupt()

    def show_progress(self) -> None:
        """Let DuckDB estimate how far the next statements are."""
        self._shows_progress = True
        # A transaction that failed takes no SET, but must take the ROLLBACK that follows.
        with contextlib.suppress(duckdb.Error):
            self.native.execute(
                "SET enable_progress_bar = true; SET enable_progress_bar_print = false"
            )

    def progress(self) -> float | None:
        """How far the statement is, in percent; None when DuckDB does not know, or says 0."""
        with self._lock, contextlib.suppress(duckdb.Error):
            percent = -1.0 if self._closed else self.native.query_progress()
            return percent if 0.0 < percent <= 100.0 else None
        return None

    def close(self) -> None:
        """Roll an open transaction back and free what the cursor holds."""
        with self._lock:
            self._closed = True
        if self._result is not None:
            self._result.close()
        if self._is_own:
            self.native.close()
        elif self._shows_progress:
            with contextlib.suppress(duckdb.Error):
                self.native.execute("RESET enable_progress_bar; RESET enable_progress_bar_print")
        if self._late_change is not None:
            self._engine.changes.record(self._late_change)

    def check(self) -> None:
        """Raise ``Cancelled`` when the cursor was interrupted."""
        if self._interrupted:
            raise Cancelled("The query was cancelled.")

    @property
    def is_restricted(self) -> bool:
        return self._policy is not None

    def examine(self, sql: str) -> Statements:
        """What ``sql`` is. Raises ``Forbidden`` when it must not run; see :class:`guard.Guard`."""
        if self._policy is None:
            return self._classifier.classify(self.native, sql)
        return self._engine.guard.check(
            self.native, sql, self._policy, self._classifier, own_names=self._is_special
        )

    def prepare(
        self,
        prepare: Callable[[duckdb.DuckDBPyConnection], None],
        classifier: Callable[[Engine], Classifier],
    ) -> None:
        """Let ``prepare`` set up the native cursor, unless an earlier job of the session did.

        ``classifier`` gives the one for such cursors, but those of sessions. When something is
        raised, the cursor of a session is given up: the next job gets another.
        """
        session = self._session
        if session is not None and session.is_prepared:
            return
        try:
            prepare(self.native)
        except BaseException:
            if session is not None:
                session.close()
            self.check()
            raise
        self._is_special = True
        if session is not None:
            session.is_prepared = True
        else:
            self._classifier = classifier(self._engine)

    @property
    def is_special(self) -> bool:
        """Whether names may mean something else here than on other cursors."""
        return self._is_special

    def ask(
        self, sql: str, params: Params | None = None, formats: tuple[str, ...] = ("arrow",)
    ) -> Result | None:
        """As :meth:`run`, for code of plugins: errors of DuckDB are raised as ``ServerError``."""
        try:
            return self.run(sql, params, formats)
        except _DATABASE_ERRORS as error:
            self.check()
            raise query_failure(error) from error

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of DuckDB come out of the block as ``ServerError``."""
        try:
            yield
        except _DATABASE_ERRORS as error:
            self.check()
            raise query_failure(error) from error

    def bind(self, sql: str) -> None:
        """Raise what DuckDB says about one SELECT that cannot run. Does not run it."""
        # Lazy, for a query.
        self.native.sql(sql)

    def run(
        self, sql: str, params: Params | None = None, formats: tuple[str, ...] = ("arrow",)
    ) -> Result | None:
        """Run ``sql`` and open its last result; None when the text holds no statement.

        A single statement that lost against a concurrent transaction is tried again, unless it
        may stand in a transaction of a session. ``formats`` are those that the result may be
        sent in, the best first: for JSON, columns that Arrow cannot carry exactly are cast by
        DuckDB.
        """
        self.check()
        if self._result is not None:
            self._result.close()
        epoch = self._engine.versions.epoch
        statements = self.examine(sql)
        if self._policy is not None and statements.is_several:
            # A later one may only be checked when those before it have run. What one leaves, the
            # next one finds, as in a session.
            if self._session is None:
                self._session = SharedCursor(self._engine)
                self._is_special = True
                self._classifier = self._engine.classifier_of_sessions
            *first, sql = statements.texts
            for text in first:
                self._run_through(text)
            return self.run(sql, params, formats)
        if statements.kinds == ():
            return None
        if params is not None:
            params = self._bindable(params, statements)
        if statements.kinds is None or len(statements.kinds) > 1:
            self.aftermath = " Statements before the last may have been carried out."
        if statements.effects or self._session is not None:
            self._result = self._run_change(sql, params, statements, formats)
        else:
            self._result = self._run(sql, params, statements, formats)
        if self._policy is not None and not self._is_special:
            if epoch != self._engine.versions.epoch and not statements.effects:
                # What it names may have become something else since it was checked. Nothing is
                # sent yet. Another cursor asks, since this one has a result open.
                with self._engine.cursor(self._policy) as other:
                    other.examine(sql)
        return self._result

    def _run_through(self, sql: str) -> None:
        """Run ``sql``, and drop what it returns."""
        result = self.run(sql)
        if result is not None:
            for _ in result.reader:
                self.check()
        self.aftermath = " Statements before the last may have been carried out."

    def _run_change(
        self, sql: str, params: Params | None, statements: Statements, formats: tuple[str, ...]
    ) -> Result | None:
        """Run ``sql`` and record what it changes, once it has committed."""
        changes = self._engine.changes
        session = self._session
        expected = changes.expect(self.native, statements, own_names=self._is_special)
        failed = True
        with changes.under_way(expected, statements):
            try:
                result = self._run(sql, params, statements, formats)
                failed = False
            except BaseException as error:
                if not is_uncertain(error, statements):
                    expected = None
                raise
            finally:
                if session is not None:
                    expected = session.committed(expected, statements, failed=failed)
                if expected is not None:
                    changes.record(expected)
        if statements.is_one_select:
            # It may commit with its last row.
            self._late_change = expected
        return result

    def _run(
        self, sql: str, params: Params | None, statements: Statements, formats: tuple[str, ...]
    ) -> Result | None:
        try:
            if statements.may_retry and self._session is None:
                return self._engine.retrying(self, self._open, sql, params, statements, formats)
            return self._open(sql, params, statements, formats)
        except duckdb.InvalidInputException:
            if params is not None:
                # On a cursor of its own: this one may be in a transaction that failed.
                with self._engine.cursor() as other:
                    check_binds(other.native, params)
            raise

    def _open(
        self,
        sql: str,
        params: Params | None,
        statements: Statements,
        formats: tuple[str, ...],
    ) -> Result | None:
        # The parser follows settings, and each session may have its own.
        statement = (statements.parsed if self._session is None else None) or sql
        if statements.end_in_change:
            return self._change(statement, params, statements)
        exact = formats[:1] == ("json",) and statements.is_one_select
        if _BIND and _SUBMIT and statements.is_one_select:
            return self._submit(_BIND, _SUBMIT, sql, params, statements, exact)
        # 1.5 makes the whole result of sql() with parameters before its first row.
        relation = _STREAMS_FROM_SQL or (exact and params is None)
        # Either a relation or the cursor itself; both tell their columns and give a reader.
        opened = self._ask(sql if relation else statement, params, relation)
        if opened is None:
            return None
        description = opened.description
        if "json" in formats and statements.is_one_select:
            columns = columns_of(description)
            cast = exact_for_json(sql, columns) if exact or not _fit_arrow(columns) else None
            if cast is not None:
                opened = self._ask(cast, params, relation)
        return Result(
            opened.to_arrow_reader(_batch_rows(len(description))), description, statements
        )

    def _bindable(self, params: Params, statements: Statements) -> Params:
        if self._session is None:
            return bindable(self.native, params, statements)
        # The cursor of a session may be in a transaction that failed, and take no questions.
        with self._engine.cursor() as other:
            return bindable(other.native, params, statements)

    def _ask(self, sql: str | duckdb.Statement, params: Params | None, relation: bool) -> Any:
        if relation:
            return self.native.sql(sql) if params is None else self.native.sql(sql, params=params)
        return self._execute(sql, params)

    def _execute(self, sql: str | duckdb.Statement, params: Params | None) -> Any:
        return self.native.execute(sql) if params is None else self.native.execute(sql, params)

    def _submit(
        self,
        bind: Callable[..., Any],
        submit: Callable[..., Any],
        sql: str,
        params: Params | None,
        statements: Statements,
        exact: bool,
    ) -> Result:
        """Run one SELECT of 2.x. The size of its batches must be known before its columns are."""
        width, text = statements.width, sql
        bound: list[Any] = []
        if width is None or exact:
            names, types = bind(self.native, sql, values=params)[:2]
            width = len(names)
            if exact:
                bound = list(zip(names, types, strict=True))
                text = exact_for_json(sql, columns_of(bound)) or sql
        opened = submit(self.native, text, params, "stream", _batch_rows(width))
        description = opened.description
        if len(description) > 2 * width:
            # The tables have changed since the last run.
            opened.close()
            opened = submit(self.native, text, params, "stream", _batch_rows(len(description)))
        statements.width = len(description)
        # The types before the casts tell how their texts are meant.
        return Result(opened.arrow_reader(), bound or description, statements)

    def _change(
        self, sql: str | duckdb.Statement, params: Params | None, statements: Statements
    ) -> Result:
        """Run a text whose last statement changes something.

        Its result is complete before the first row is read. Of all ways to run it, only
        execute() and fetchall() never report an interrupt for what was committed.
        """
        self._execute(sql, params)
        self.aftermath = CHANGES_STAND if self._session is None else _IN_SESSION
        description = self.native.description
        if len(description) == 1 and _is_count(*description[0][:2]):
            counts = pa.array([row[0] for row in self.native.fetchall()], pa.int64())
            batch = pa.RecordBatch.from_pydict({"Count": counts})
            reader = pa.RecordBatchReader.from_batches(batch.schema, [batch])
        else:
            reader = self.native.to_arrow_reader(_batch_rows(len(description)))
        return Result(reader, description, statements)


# OSError: what a half-read Arrow reader raises for an error of the query.
_DATABASE_ERRORS = (duckdb.Error, pa.ArrowException, OSError)


def query_failure(error: BaseException) -> QueryError | Conflict:
    """What a client is told about ``error`` of DuckDB or Arrow."""
    if isinstance(error, duckdb.TransactionException) and is_conflict(error):
        return Conflict(str(error))
    if isinstance(error, duckdb.OutOfMemoryException):
        return QueryError(f"{error} (--memory-limit and --temp-directory of the server)")
    return QueryError(str(error))


def _fit_arrow(columns: tuple[Column, ...]) -> bool:
    return _STREAMS_FROM_SQL or not any(has_variant(column.type) for column in columns)


def _is_count(name: str, type_: Any) -> bool:
    """Whether a column is DuckDB's count of changed rows, and none that RETURNING made."""
    return name == "Count" and str(type_) == "BIGINT"


def _batch_rows(width: int) -> int:
    return max(_MIN_BATCH_ROWS, _BATCH_VALUES // max(1, width))


class SharedCursor:
    """The native cursor of a session: what one job leaves in it, the next one finds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._native: duckdb.DuckDBPyConnection | None = None
        # Whether :meth:`Cursor.prepare` has set it up.
        self.is_prepared = False
        # None: nobody knows whether a transaction is open.
        self._in_transaction: bool | None = False
        # What the open transaction is going to change when it commits.
        self._pending: Expected | None = None

    def for_job(self, policy: Policy = UNRESTRICTED) -> Cursor:
        """The cursor for one job, made when the first one needs it. For one worker at a time."""
        if self._native is None:
            self._native = self._engine.native_cursor()
        return Cursor(self._native, self._engine, session=self, policy=policy)

    def committed(
        self, expected: Expected | None, statements: Statements, *, failed: bool
    ) -> Expected | None:
        """What is, or may be, committed now that ``statements`` ran; the rest is kept.

        ``expected`` is what they changed. More than was committed may be returned.
        """
        # Of a text that nobody looked into, it may do anything. "": nobody knows either.
        words = ("",) if statements.kinds is None else statements.transactions
        was_open = self._in_transaction
        if statements.kinds is None and failed and expected is None:
            words = ()
        if not words:
            if was_open is not False:
                self._pending = joined(self._pending, expected)
            return None if was_open else expected
        everything = joined(self._pending, expected)
        if statements.kinds is None or len(statements.kinds) > 1 or words == ("",):
            is_open = None if failed or not words[-1] else words[-1] == "begin"
            self._in_transaction = is_open
            self._pending = None if is_open is False else everything
            return everything
        if words == ("begin",):
            self._in_transaction = was_open if failed else True
            return None
        # A COMMIT that failed may leave the transaction open, which only ROLLBACK ends.
        self._in_transaction = None if failed else False
        self._pending = everything if failed else None
        return everything if words == ("commit",) else None

    def close(self) -> None:
        """Roll an open transaction back and free what the cursor holds."""
        if self._native is not None:
            with contextlib.suppress(duckdb.Error):
                self._native.close()
            self._native = None
        self.is_prepared = False
        self._in_transaction, self._pending = False, None


def is_conflict(error: duckdb.TransactionException) -> bool:
    """Whether a concurrent transaction won, so that a second try may succeed."""
    text = str(error).lower()
    # The same key inserted twice is reported at commit in the same words, but is no accident.
    return "duplicate key" not in text and any(word in text for word in _CONFLICT_WORDS)
