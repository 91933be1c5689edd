"""Which tables, files and functions those reach whom a policy bounds."""

from __future__ import annotations

from collections.abc import Sequence

from sqlrooms_server.db.paths import Directories
from sqlrooms_server.db.policy import Policy


def listed(names: frozenset[str] | None) -> str:
    """``names`` for people."""
    return ", ".join(sorted(names or ())) or "none"


class Reach:
    """The reach of one server's clients. Safe from any thread once it serves."""

    def __init__(
        self, catalog: str, directories: Directories, functions: Sequence[str] = ()
    ) -> None:
        """``catalog``: the main database. ``directories`` can be read by those who otherwise reach
        no files, ``functions`` be called besides DuckDB's own."""
        self._main = catalog.lower()
        self.catalogs = {"temp", "system", self._main}
        self.directories = directories
        self._functions = frozenset(name.lower() for name in functions)
        self._closed: frozenset[tuple[str, ...]] = frozenset()
        self._fixed: frozenset[tuple[str, ...]] = frozenset()

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
        if not self.includes(path, policy):
            name = ".".join(path)
            if policy.schemas is None:
                policy.refuse(f"{what} {name}", "it is in another database")
            policy.refuse(f"{what} {name}", f"open are the schemas {listed(policy.schemas)}")

    def includes(self, path: Sequence[str], policy: Policy) -> bool:
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
