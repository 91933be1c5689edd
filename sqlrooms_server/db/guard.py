"""Whether a policy lets a text run, remembered."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from sqlrooms_server.db.checks import Check, listed
from sqlrooms_server.db.paths import Directories
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.statements import Classifier, Statements
from sqlrooms_server.db.versions import Versions

_MEMO_ENTRIES = 1024
_MEMO_TEXT_LENGTH = 16 << 10


class Guard:
    """The one of a server. Safe from any thread."""

    def __init__(
        self,
        versions: Versions,
        classifier: Classifier,
        catalog: str,
        directories: Directories,
        functions: Sequence[str] = (),
    ) -> None:
        """``catalog``: the main database. ``directories`` can be read by those who otherwise reach
        no files, ``functions`` be called besides DuckDB's own."""
        self._versions = versions
        self.classifier = classifier
        self._main = catalog.lower()
        self.catalogs = {"temp", "system", self._main}
        self.directories = directories
        self._functions = frozenset(name.lower() for name in functions)
        self._closed: frozenset[tuple[str, ...]] = frozenset()
        self._fixed: frozenset[tuple[str, ...]] = frozenset()
        self._reserved: frozenset[str] | None = None
        self._memo: dict[tuple[str, Policy], tuple[int, Statements]] = {}

    def add_catalog(self, name: str) -> None:
        """The database ``name`` belongs to the main one."""
        self.catalogs.add(name.lower())

    def protect(self, schema: str, *, is_catalog: bool, closed: str, kept: Sequence[str]) -> None:
        """Of ``schema`` of the main database, or ``main`` of the database of that name, the table
        ``closed`` is out of bounds, and it and those ``kept`` are neither dropped nor altered."""
        name = schema.lower()
        place = (name, "main") if is_catalog else (self._main, name)
        self._closed = frozenset({(*place, closed)})
        names = [*kept, closed]
        # A statement may name them after USE, and leave out what follows from that.
        self._fixed = frozenset(
            {place, (name,), *((*place, one) for one in names), *((name, one) for one in names)}
            | {(one,) for one in names}
        )

    def is_fixed(self, target: Sequence[str]) -> bool:
        """Whether a statement must not drop or alter what it calls ``target``."""
        return tuple(part.lower() for part in target) in self._fixed

    def reserved_words(self, native: duckdb.DuckDBPyConnection) -> frozenset[str]:
        """The keywords that can be no names of functions."""
        if self._reserved is None:
            rows = native.execute(
                "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'"
            ).fetchall()
            self._reserved = frozenset(name for (name,) in rows)
        return self._reserved

    def check(
        self, native: duckdb.DuckDBPyConnection, sql: str, policy: Policy, *, own_names: bool
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
        statements = Check(self, native, policy).text(sql)
        if not own_names and len(sql) <= _MEMO_TEXT_LENGTH:
            if len(self._memo) >= _MEMO_ENTRIES:
                self._memo.clear()
            self._memo[key] = (epoch, statements)
        return statements

    def check_upload(self, table: Sequence[str], policy: Policy, *, new: bool) -> None:
        """Raise ``Forbidden`` when ``table``, of one to three names, must not be written.

        ``new``: it is made or replaced."""
        kind = "CREATE" if new else "INSERT"
        if policy.read_only:
            policy.refuse("An upload", "it changes the database")
        if policy.kinds is not None and kind not in policy.kinds:
            policy.refuse(f"An upload with a statement {kind}", "that kind is not listed")
        if new and self.is_fixed(table):
            policy.refuse(f"An upload to {'.'.join(table)}", "it is of the server")
        names = [name.lower() for name in table]
        if len(names) == 1:
            path: tuple[str, ...] = (self._main, "main", names[0])
        elif len(names) == 3 or names[0] in self.catalogs:
            path = (names[0], *(("main",) if len(names) == 2 else ()), *names[1:])
        else:
            path = (self._main, *names)
        self.check_table(path, policy, "An upload to")

    def check_table(self, path: Sequence[str], policy: Policy, what: str) -> None:
        """Raise ``Forbidden`` when the table of this full name is out of bounds."""
        if tuple(part.lower() for part in path) in self._closed:
            policy.refuse(f"{what} {'.'.join(path)}", "it is of the server; try room()")
        if not self.reaches(path, policy):
            name = ".".join(path)
            if policy.schemas is None:
                policy.refuse(f"{what} {name}", "it is in another database")
            policy.refuse(f"{what} {name}", f"open are the schemas {listed(policy.schemas)}")

    def reaches(self, path: Sequence[str], policy: Policy) -> bool:
        """Whether a table of this full name, or what begins with it, may be read and changed."""
        if not policy.is_inside:
            return True
        catalog = path[0].lower()
        if catalog not in self.catalogs:
            return False
        if policy.schemas is None or catalog == "temp":
            return True
        # The meta tables have a file of their own, or a schema of the same name.
        schema = path[1].lower() if catalog == self._main and len(path) > 1 else catalog
        return schema in policy.schemas

    def has_function(self, name: str) -> bool:
        """Whether the operator has opened ``name``."""
        return name in self._functions
