"""Whether a policy lets a text run, remembered."""

from __future__ import annotations

import duckdb

from sqlrooms_server.db.checks import Check
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.reach import Reach
from sqlrooms_server.db.statements import Classifier, Statements
from sqlrooms_server.db.versions import Versions

_MEMO_ENTRIES = 1024
_MEMO_TEXT_LENGTH = 16 << 10


class Guard:
    """The one of a server. Safe from any thread."""

    def __init__(self, versions: Versions, reach: Reach) -> None:
        self._versions = versions
        self._reach = reach
        self._reserved: frozenset[str] | None = None
        self._memo: dict[tuple[str, Policy], tuple[int, Statements]] = {}

    def check(
        self,
        native: duckdb.DuckDBPyConnection,
        sql: str,
        policy: Policy,
        classifier: Classifier,
        *,
        own_names: bool,
    ) -> Statements:
        """What ``sql`` is. Raises ``Forbidden`` for what ``policy`` does not allow, and
        ``QueryError`` for what DuckDB would refuse.

        The plans of several statements are not looked at: each must be checked once more, alone,
        when those before it have run. ``own_names``: names may mean something else on this cursor
        than on others.
        """
        key = (sql, policy)
        known = None if own_names else self._memo.get(key)
        if known is not None and known[0] == self._versions.epoch:
            return known[1]
        # Without it every change, also of rows, would move the epoch.
        self._versions.in_use = True
        epoch = self._versions.epoch
        reserved = self._reserved_words(native)
        check = Check(self._reach, classifier, reserved, native, policy)
        statements = check.text(sql)
        if not own_names and len(sql) <= _MEMO_TEXT_LENGTH:
            if len(self._memo) >= _MEMO_ENTRIES:
                self._memo.clear()
            self._memo[key] = (epoch, statements)
        return statements

    def _reserved_words(self, native: duckdb.DuckDBPyConnection) -> frozenset[str]:
        """The keywords that can be no names of functions."""
        if self._reserved is None:
            rows = native.execute(
                "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'"
            ).fetchall()
            self._reserved = frozenset(name for (name,) in rows)
        return self._reserved
