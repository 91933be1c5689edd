"""A cursor of one job: running SQL text, and recording what it changes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import duckdb

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.changes import Expected, is_uncertain
from sqlrooms_server.db.failures import DATABASE_ERRORS, query_failure
from sqlrooms_server.db.opening import execute, open_result, result_of_change
from sqlrooms_server.db.parameters import bindable, check_binds
from sqlrooms_server.db.policy import UNRESTRICTED, Policy
from sqlrooms_server.db.statements import Statements
from sqlrooms_server.db.transactions import Transaction
from sqlrooms_server.errors import Cancelled
from sqlrooms_server.messages import Params

if TYPE_CHECKING:
    from sqlrooms_server.db.engine import Engine
    from sqlrooms_server.db.shared_cursor import SharedCursor
    from sqlrooms_server.db.statements import Classifier

CHANGES_STAND = " The statement itself had finished; its changes stand."
_IN_SESSION = (
    " The statement itself had finished; its changes stand, or are part of the transaction that "
    "the session is in."
)


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
        # None as long as no text finds what another one left.
        self._transaction = None if session is None else session.transaction
        # Whether names may mean something else here than on other cursors.
        self.is_special = session is not None
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
            if isinstance(error, DATABASE_ERRORS):
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
        if self._session is None:
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
            self.native, sql, self._policy, self._classifier, own_names=self.is_special
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
        self.is_special = True
        if session is not None:
            session.is_prepared = True
        else:
            self._classifier = classifier(self._engine)

    def ask(
        self, sql: str, params: Params | None = None, formats: tuple[str, ...] = ("arrow",)
    ) -> Result | None:
        """As :meth:`run`, for code of plugins: errors of DuckDB are raised as ``ServerError``."""
        with self.explained():
            return self.run(sql, params, formats)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of DuckDB come out of the block as ``ServerError``."""
        try:
            yield
        except DATABASE_ERRORS as error:
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
            if self._transaction is None:
                self._transaction = Transaction()
                self.is_special = True
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
        if statements.effects or self._transaction is not None:
            self._result = self._run_change(sql, params, statements, formats)
        else:
            self._result = self._run(sql, params, statements, formats)
        if self._policy is not None and not self.is_special:
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
        transaction = self._transaction
        expected = changes.expect(self.native, statements, own_names=self.is_special)
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
                if transaction is not None:
                    expected = transaction.committed(expected, statements, failed=failed)
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
            if statements.may_retry and self._transaction is None:
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
        parsed = statements.parsed if self._transaction is None else None
        if not statements.end_in_change:
            return open_result(self.native, sql, params, statements, formats, parsed)
        execute(self.native, parsed or sql, params)
        self.aftermath = CHANGES_STAND if self._transaction is None else _IN_SESSION
        return result_of_change(self.native, statements)

    def _bindable(self, params: Params, statements: Statements) -> Params:
        if self._transaction is None:
            return bindable(self.native, params, statements)
        # The cursor of a session may be in a transaction that failed, and take no questions.
        with self._engine.cursor() as other:
            return bindable(other.native, params, statements)
