"""A cursor that one job after the other uses."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import duckdb

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.policy import UNRESTRICTED, Policy
from sqlrooms_server.db.transactions import Transaction

if TYPE_CHECKING:
    from sqlrooms_server.db.engine import Engine


class SharedCursor:
    """The native cursor of a session: what one job leaves in it, the next one finds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._native: duckdb.DuckDBPyConnection | None = None
        # Whether :meth:`Cursor.prepare` has set it up.
        self.is_prepared = False
        self.transaction = Transaction()

    def for_job(self, policy: Policy = UNRESTRICTED) -> Cursor:
        """The cursor for one job, made when the first one needs it. For one worker at a time."""
        if self._native is None:
            self._native = self._engine.native_cursor()
        return Cursor(self._native, self._engine, session=self, policy=policy)

    def close(self) -> None:
        """Roll an open transaction back and free what the cursor holds."""
        if self._native is not None:
            with contextlib.suppress(duckdb.Error):
                self._native.close()
            self._native = None
        self.is_prepared = False
        self.transaction = Transaction()
