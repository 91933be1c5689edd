"""Which changes a statement makes: told before it runs, recorded when it has committed."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import duckdb

from sqlrooms_server.db.effects import Effect
from sqlrooms_server.db.library import IS_2
from sqlrooms_server.db.plans import MAX_PLANNED_LENGTH, Unplannable, plan_of
from sqlrooms_server.db.statements import Statements
from sqlrooms_server.db.versions import Change, Table, Versions, combined, key_of
from sqlrooms_server.errors import ServerError

_MEMO_ENTRIES = 1024

# What a change is called that nobody looks into.
_SOMETHING = Change("change", catalog=True, unknown=True)

# After any other of DuckDB's errors a single statement has certainly not committed.
_UNCERTAIN = (
    duckdb.InterruptException,
    duckdb.FatalException,
    duckdb.InternalException,
    duckdb.IOException,
    duckdb.OutOfMemoryException,
)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a text is going to change, as far as could be told at ``epoch``."""

    epoch: int
    change: Change


def joined(one: Expected | None, other: Expected | None) -> Expected | None:
    """Both in one. The older epoch makes it void sooner."""
    if one is None or other is None:
        return one or other
    change = combined((one.change, other.change))
    assert change is not None
    return Expected(min(one.epoch, other.epoch), change)


class Changes:
    """Records in ``versions`` what statements change. Safe from any thread."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        # Epoch, and the table behind each name.
        self._memo: tuple[int, dict[str, Table]] = (-1, {})
        self._triggers: tuple[int, bool] = (-1, False)

    def expect(
        self, native: duckdb.DuckDBPyConnection, statements: Statements, *, own_names: bool
    ) -> Expected | None:
        """What ``statements`` are going to change; None for nothing.

        ``own_names``: names may mean something else on this cursor than on others.
        """
        if not statements.effects:
            return None
        epoch = self._versions.epoch
        if not self._versions.in_use:
            settings = any(effect.settings for effect in statements.effects)
            return Expected(epoch, dataclasses.replace(_SOMETHING, settings=settings))
        found = (
            self._expected(native, effect, statements, epoch, own_names)
            for effect in statements.effects
        )
        change = combined(change for change in found if change is not None)
        if own_names and _may_unshadow(statements):
            return Expected(epoch, _SOMETHING if change is None else _with_all(change))
        return None if change is None else Expected(epoch, change)

    def _expected(
        self,
        native: duckdb.DuckDBPyConnection,
        effect: Effect,
        statements: Statements,
        epoch: int,
        own_names: bool,
    ) -> Change | None:
        unknown = effect.unknown
        if effect.catalog:
            tables = [_named(native, name) for name in effect.targets]
            tables += [_named(native, name, is_new=True) for name in effect.created]
            if effect.renamed and tables[-1] is not None:
                tables.append((*tables[-1][:2], _parts(effect.renamed)[0]))
            unknown = unknown or None in tables
        else:
            tables = _planned(native, statements) if effect.by_plan else []
            for name in effect.targets:
                tables.append(self._table(native, name, epoch, own_names=own_names))
            unknown = bool(tables) and (
                None in tables or self._has_trigger(native, epoch, own_names=own_names)
            )
        told = tuple(table for table in tables if table is not None and not _is_temporary(table))
        if not told and not unknown and not effect.catalog:
            return None
        return Change(
            effect.op,
            told,
            catalog=effect.catalog or unknown,
            unknown=unknown,
            settings=effect.settings,
        )

    def record(self, expected: Expected) -> None:
        """What was expected is committed."""
        self._versions.record(self.settled(expected))

    @contextlib.contextmanager
    def under_way(self, expected: Expected | None, statements: Statements) -> Iterator[None]:
        """While ``statements`` run, which are going to change what is ``expected``."""
        is_one = statements.kinds is not None and len(statements.kinds) == 1
        if expected is None or is_one:
            yield
            return
        with self._versions.under_way(self.settled(expected)):
            yield

    def settled(self, expected: Expected) -> Change:
        """What has changed, now that the statements ran."""
        change = expected.change
        if change.catalog or expected.epoch == self._versions.epoch:
            return change
        # The catalog has changed since the names were looked up.
        return _with_all(change)

    @contextlib.contextmanager
    def of_upload(
        self, native: duckdb.DuckDBPyConnection, name: str, *, new: bool
    ) -> Iterator[None]:
        """Record what the block commits: an upload to ``name``, as it is written in SQL.

        ``new``: it makes the table.
        """
        try:
            yield
        except BaseException as error:
            # An interrupt that execute() reports came before the commit.
            if may_have_committed(error) and not isinstance(error, duckdb.InterruptException):
                self._uploaded(native, name, new=new)
            raise
        self._uploaded(native, name, new=new)

    def _uploaded(self, native: duckdb.DuckDBPyConnection, name: str, *, new: bool) -> None:
        epoch = self._versions.epoch
        if not self._versions.in_use:
            self._versions.record(_SOMETHING)
            return
        table = None
        # The commit must not go untold, whatever becomes of the cursor.
        with contextlib.suppress(duckdb.Error):
            table = self._table(native, name, epoch, own_names=new)
        unknown = table is None or self._has_trigger(native, epoch, own_names=new)
        told = () if table is None else (table,)
        self._versions.record(Change("upload", told, catalog=new or unknown, unknown=unknown))

    def _table(
        self, native: duckdb.DuckDBPyConnection, name: str, epoch: int, *, own_names: bool
    ) -> Table | None:
        """The table that a statement writes to which names ``name``; None when nobody knows."""
        known_at, names = self._memo
        if known_at != epoch:
            names = {}
            self._memo = (epoch, names)
        table = None if own_names else names.get(name)
        if table is None:
            table = _written(native, f"DELETE FROM {name}")
            if table is not None and not own_names:
                if len(names) >= _MEMO_ENTRIES:
                    names.clear()
                names[name] = table
        return table

    def _has_trigger(
        self, native: duckdb.DuckDBPyConnection, epoch: int, *, own_names: bool
    ) -> bool:
        """Whether writing one table may write another. 2.x has triggers."""
        if not IS_2:
            return False
        known_at, has_trigger = self._triggers
        # A transaction sees its own triggers, and not those that came after it began.
        if own_names or known_at != epoch:
            try:
                rows = native.execute("SELECT 1 FROM duckdb_triggers() LIMIT 1").fetchall()
                has_trigger = bool(rows)
            except duckdb.Error:
                return True
            if not own_names:
                self._triggers = (epoch, has_trigger)
        return has_trigger


def is_uncertain(error: BaseException, statements: Statements) -> bool:
    """Whether something may have been committed though ``error`` was raised."""
    if statements.kinds is None:
        # 2.x runs what comes before a statement that it cannot parse.
        is_one = ";" not in statements.sql.rstrip().rstrip(";")
        return not (is_one and isinstance(error, duckdb.ParserException | duckdb.SyntaxException))
    if len(statements.kinds) > 1:
        return True
    return may_have_committed(error)


def may_have_committed(error: BaseException) -> bool:
    """Whether a statement that raised ``error`` may have committed all the same."""
    is_certain = isinstance(error, duckdb.Error | ServerError)
    return isinstance(error, _UNCERTAIN) or not is_certain


def _with_all(change: Change) -> Change:
    """``change``, and perhaps of any other table."""
    return dataclasses.replace(change, catalog=True, unknown=True)


def _may_unshadow(statements: Statements) -> bool:
    """Whether a name may mean a temporary table before and another one on the way."""
    kinds = statements.kinds
    if not statements.effects or kinds is None or len(kinds) < 2:
        return False
    ends = not {"rollback", ""}.isdisjoint(statements.transactions)
    return ends or not {"DROP", "ALTER"}.isdisjoint(kinds)


def _is_temporary(table: Table) -> bool:
    return table[0].lower() == "temp"


def _written(native: duckdb.DuckDBPyConnection, statement: str) -> Table | None:
    try:
        plan = plan_of(native, statement)
    except Unplannable:
        return None
    return plan.writes[0] if len(plan.writes) == 1 else None


def _planned(native: duckdb.DuckDBPyConnection, statements: Statements) -> list[Table | None]:
    """What the plan of a single statement writes; [None] when it tells nothing."""
    text = statements.sql
    if statements.kinds is None or len(statements.kinds) != 1 or len(text) > MAX_PLANNED_LENGTH:
        return [None]
    try:
        plan = plan_of(native, text)
    except Unplannable:
        return [None]
    unknown = plan.nodes - {"SAMPLE"}
    return [*plan.writes, None] if unknown else [*plan.writes]


_PART = re.compile(r'"((?:[^"]|"")+)"|([^."]+)')


def _parts(name: str) -> list[str]:
    return [quoted.replace('""', '"') or plain for quoted, plain in _PART.findall(name)]


def _named(native: duckdb.DuckDBPyConnection, name: str, *, is_new: bool = False) -> Table | None:
    """The full name of the table or view ``name``, there or not; None when that cannot be told.

    ``is_new``: the one that ``CREATE`` makes or replaces, which need not be the one that others
    mean by the name.
    """
    there = _written(native, f"DELETE FROM {name}")
    if there is not None and not is_new:
        return there
    parts = _parts(name)
    if len(parts) == 3:
        return there or (parts[0], parts[1], parts[2])
    try:
        rows = native.execute(
            "SELECT current_database(), current_schema(), "
            "EXISTS (FROM duckdb_databases() WHERE lower(database_name) = lower($1)), "
            "contains(current_setting('search_path'), ',')",
            [parts[0]],
        ).fetchall()
    except duckdb.Error:
        return None
    catalog, schema, begins_with_catalog, has_more_schemas = rows[0]
    if has_more_schemas:
        return None
    table = catalog, schema, parts[-1]
    if len(parts) == 2:
        table = (parts[0], "main", parts[1]) if begins_with_catalog else (catalog, *parts)
    # In the case of the catalog, if that is the one.
    return there if there is not None and key_of(there) == key_of(table) else table
