"""A database that is open, and the results that are kept of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlrooms_server import __version__
from sqlrooms_server.cache import ResultCache, fingerprint
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.engine import environment as engine_environment
from sqlrooms_server.db.sandbox import Sandbox
from sqlrooms_server.db.store import create_meta_tables
from sqlrooms_server.settings import Settings


class Database:
    """What ``settings`` say of one database. Opened by the constructor, which raises
    ``StartupError``; :meth:`close` ends all of it.

    ``cache`` is None when results are not kept. ``others`` are settings of other databases, whose
    files no client of this one may read.
    """

    def __init__(self, settings: Settings, others: Sequence[Settings] = ()) -> None:
        self._settings = settings
        self.cache: ResultCache | None = None
        with contextlib.ExitStack() as undo:
            restore_cache = self._open_cache()
            undo.callback(self._close_cache, None)
            self.engine = Engine(
                settings.db_path,
                read_only=settings.read_only,
                extensions=settings.extensions,
                limits=settings.duckdb_limits,
                sandbox=Sandbox.of(settings, others),
                max_nesting=settings.max_sql_nesting,
            )
            undo.callback(lambda: self.engine.close(time.monotonic() + 1.0))
            restore_cache()
            create_meta_tables(self.engine, settings.meta_namespace, settings.meta_db)
            self.engine.lock()
            undo.pop_all()

    def close(self, deadline: float, cache_deadline: float, *, is_quiet: bool) -> bool:
        """Close all; False when that was not done in time. Nothing is lost then.

        ``is_quiet`` tells that no query runs any more; otherwise what the cache keeps is of no use
        to the next start. Deadlines are on the clock of ``time.monotonic``.
        """
        closed = self.engine.close(deadline) and is_quiet
        self._close_cache(self._fingerprint() if closed else None, cache_deadline)
        return closed

    def _fingerprint(self) -> dict[str, Any] | None:
        """What tells that the database file is as this server, or the last one, left it."""
        environment = {
            "server": __version__,
            # Part of what is remembered: it truncates results.
            "max-result-rows": self._settings.max_result_rows,
            **engine_environment(self._settings.extensions),
        }
        return fingerprint(self._settings.db_path, environment)

    def _open_cache(self) -> Callable[[], None]:
        """Before the database is opened. What it returns is to be called after that."""
        settings = self._settings
        if settings.no_cache:
            return lambda: None
        cache = ResultCache(settings.cache_dir, settings.cache_size, name=settings.db_path)
        self.cache = cache
        before = self._fingerprint()
        state = cache.recover(before)

        def restore() -> None:
            # Another process may have written to the file until this one locked it.
            if state is not None and self._fingerprint() == before:
                self.engine.versions.restore(state)
            else:
                cache.forget()

        return restore

    def _close_cache(self, fingerprint: dict[str, Any] | None, deadline: float = 0.0) -> None:
        if self.cache is None:
            return
        state = None if fingerprint is None else self.engine.versions.state()
        self.cache.close(
            None if state is None else fingerprint,
            state,
            deadline=max(0.0, deadline - time.monotonic()),
        )
