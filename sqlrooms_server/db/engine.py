"""The database: one connection, a fresh cursor for each job.

A fresh cursor keeps ``USE``, ``SET``, variables and temporary tables of one request from the next,
lets an interrupt hit only its own query, and rolls a forgotten ``BEGIN`` back when it is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from sqlrooms_server.db import files
from sqlrooms_server.db.changes import Changes
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.failures import is_conflict, query_failure
from sqlrooms_server.db.guard import Guard
from sqlrooms_server.db.plans import Readings
from sqlrooms_server.db.policy import UNRESTRICTED, Policy
from sqlrooms_server.db.reach import Reach
from sqlrooms_server.db.sandbox import Sandbox
from sqlrooms_server.db.statements import MAX_NESTING, Classifier, quote_identifier, quote_literal
from sqlrooms_server.db.versions import Versions

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long a statement is tried again while a concurrent transaction holds what it changes.
_RETRY_SECONDS = 2.0
# How long such a wait may go without looking whether the query was cancelled.
_LOCK_POLL_SECONDS = 0.02


def environment(extensions: tuple[str, ...]) -> dict[str, Any]:
    """What the results of a query depend on besides the database, as a JSON object."""
    local_time = Path("/etc/localtime")
    return {
        "duckdb": duckdb.__version__,
        "pyarrow": pa.__version__,
        "extensions": list(extensions),
        "time zone": [os.environ.get("TZ"), str(local_time.resolve()), list(time.tzname)],
    }


class Engine:
    """Owns the DuckDB connection. Raises ``StartupError`` when it cannot open what was asked."""

    def __init__(
        self,
        path: str,
        *,
        read_only: bool,
        extensions: tuple[str, ...],
        limits: Mapping[str, str] | None = None,
        sandbox: Sandbox | None = None,
        max_nesting: int = MAX_NESTING,
    ) -> None:
        """``limits`` are settings of DuckDB, such as ``memory_limit``, and their values.

        ``max_nesting`` is of the brackets in a text.
        """
        self.read_only = read_only
        self._sandbox = sandbox or Sandbox()
        self._locks = contextlib.ExitStack()
        self._max_nesting = max_nesting
        self.classifier = self.new_classifier()
        self.classifier_of_sessions = self.new_classifier()
        self.versions = Versions()
        self.changes = Changes(self.versions)
        self._writer = threading.Lock()
        self._connection = files.open_database(
            path,
            read_only=read_only,
            config={
                # Or SQL reads the variables of this process as tables.
                "python_enable_replacements": "false",
                # Nothing is fetched that was not asked for.
                "autoinstall_known_extensions": "false",
                **self._sandbox.config,
            },
        )
        try:
            for name, value in (limits or {}).items():
                files.limit(self._connection, name, value)
            for extension in extensions:
                files.load_extension(self._connection, extension)
            self.catalog: str = self._connection.execute("SELECT current_database()").fetchall()[0][
                0
            ]
        except BaseException:
            self._connection.close()
            raise

        self.readings = Readings(self.versions, self.catalog)
        self.reach = Reach(self.catalog, self._sandbox.directories, self._sandbox.functions)
        self.guard = Guard(self.versions, self.reach)

    def new_classifier(self) -> Classifier:
        """One for cursors of their own kind: what a text is parsed to follows settings, which
        sessions may change, and plugins on the cursors that they prepare."""
        return Classifier(self._max_nesting)

    def bounded(self, policy: Policy) -> Policy:
        """``policy`` of somebody within what the sandbox allows everybody."""
        base = self._sandbox.policy
        return policy if base.is_open else policy.within(base)

    def cursor(self, policy: Policy = UNRESTRICTED) -> Cursor:
        """A fresh cursor for one job, of the server itself unless ``policy``, as :meth:`bounded`
        returned it, says what it may do. Raises ``QueryError`` when the database is closed."""
        return Cursor(self.native_cursor(), self, policy=policy)

    def native_cursor(self) -> duckdb.DuckDBPyConnection:
        """A fresh cursor of DuckDB. Raises ``QueryError`` when the database is closed."""
        try:
            return self._connection.cursor()
        except duckdb.Error as error:
            raise query_failure(error) from error

    def retrying(self, cursor: Cursor, attempt: Callable[..., _T], *arguments: Any) -> _T:
        """What ``attempt`` returns, tried again when a concurrent write won.

        An attempt must apply as a whole or not at all. The first one is optimistic; the
        following ones hold a lock, so that those who retry do not defeat each other, and end
        after 2 s.
        """
        try:
            return attempt(*arguments)
        except duckdb.TransactionException as error:
            if not is_conflict(error):
                raise
        while not self._writer.acquire(timeout=_LOCK_POLL_SECONDS):
            cursor.check()
        try:
            deadline = time.monotonic() + _RETRY_SECONDS
            pause = 0.001
            while True:
                cursor.check()
                try:
                    return attempt(*arguments)
                except duckdb.TransactionException as error:
                    if not is_conflict(error) or time.monotonic() > deadline:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, _LOCK_POLL_SECONDS)
        finally:
            self._writer.release()

    def attach(self, path: str, name: str) -> None:
        """Attach a database file under ``name``. Raises ``StartupError``."""
        files.prepare(Path(path), read_only=self.read_only)
        with files.explained(path):
            mode = " (READ_ONLY)" if self.read_only else ""
            self._connection.execute(
                f"ATTACH {quote_literal(path)} AS {quote_identifier(name)}{mode}"
            )

        self.reach.add_catalog(name)

    def lock(self) -> None:
        """Before the first client, and after everything else: lock DuckDB, if it is to be."""
        self._locks.enter_context(self._sandbox.locked(self._connection))

    def ping(self) -> None:
        """Run a small query. Raises ``QueryError`` when DuckDB does not answer it.

        SELECT 1 would not do: it needs no transaction, and so no lock that may be held.
        """
        with self.cursor() as cursor:
            cursor.native.execute("SELECT txid_current()").fetchall()

    def close(self, deadline: float) -> bool:
        """Checkpoint and close; False when that was not done by ``deadline`` (``time.monotonic``).

        Nothing is lost without the checkpoint: DuckDB replays its log at the next start.
        """
        thread = threading.Thread(target=self._checkpoint_and_close, name="checkpoint", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            # It may close just now.
            with contextlib.suppress(duckdb.Error):
                self._connection.interrupt()
            thread.join(0.1)
        return not thread.is_alive()

    def _checkpoint_and_close(self) -> None:
        try:
            if not self.read_only:
                self._connection.execute("CHECKPOINT")
        except duckdb.Error as error:
            log.warning("The final checkpoint failed (nothing is lost): %s", error)
        try:
            self._connection.close()
        except duckdb.Error as error:
            log.warning("The database was not closed cleanly (nothing is lost): %s", error)
        self._locks.close()
