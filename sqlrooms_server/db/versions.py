"""When each table last changed: the one counter behind the cache, the change feed and live queries.

All versions are readings of one clock, which every recorded change advances by one. A change of
anything but the rows of known tables also moves the epoch, which stands for the catalog and all
settings.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Table = tuple[str, str, str]
"""Catalog, schema and name, as the catalog spells them."""

# Tables that come and go leave their names behind; beyond this many, all are forgotten at once.
_MAX_TABLES = 100_000

Token = tuple[int, tuple[tuple[str, int], ...]]
"""The epoch, and the keys and versions of tables: what a result was computed from."""


def key_of(table: Table) -> str:
    """``table`` without its case, in which DuckDB's names do not differ."""
    return "\0".join(table).lower()


@dataclass(frozen=True, slots=True)
class Change:
    """What one commit changed.

    ``catalog``: more than the rows of ``tables``, so that no plan made before it holds.
    ``unknown``: any other table may have changed, too. ``settings``: something may have changed
    that a restart undoes. ``op`` names the change for those who watch.
    """

    op: str
    tables: tuple[Table, ...] = ()
    catalog: bool = False
    unknown: bool = False
    settings: bool = False


def combined(changes: Iterable[Change]) -> Change | None:
    """All ``changes`` in one; None when there are none."""
    changes = list(changes)
    if len(changes) < 2:
        return changes[0] if changes else None
    ops = {change.op for change in changes}
    return Change(
        ops.pop() if len(ops) == 1 else "change",
        tuple({table: None for change in changes for table in change.tables}),
        catalog=any(change.catalog for change in changes),
        unknown=any(change.unknown for change in changes),
        settings=any(change.settings for change in changes),
    )


@dataclass(frozen=True, slots=True)
class Recorded:
    """A change and the clock reading that became the version of its tables."""

    change: Change
    version: int


class Versions:
    """Counts changes. Safe from any thread.

    A change is recorded after its commit and before anybody is told of it. So a result whose
    token was taken before it was computed is current for as long as the token holds.
    """

    def __init__(self) -> None:
        # Another one after each start, because the clock begins again.
        self.run = secrets.token_hex(6)
        # Whether anybody asks for single tables. Until then no statement is looked into.
        self.in_use = False
        self._lock = threading.Lock()
        self._clock = 0
        self._epoch = 0
        self._unknown = 0
        self._settings_changed = False
        self._under_way: list[Change] = []
        self._versions: dict[str, int] = {}
        self._tables: dict[str, Table] = {}
        self._listeners: list[Callable[[Recorded], None]] = []

    @property
    def epoch(self) -> int:
        return self._epoch

    def listen(self, listener: Callable[[Recorded], None]) -> None:
        """Call ``listener`` for each change, in order, on the thread that made it."""
        self._listeners.append(listener)

    def record(self, change: Change) -> None:
        """A commit made ``change``."""
        with self._lock:
            self._clock += 1
            clock = self._clock
            if len(self._versions) > _MAX_TABLES:
                # First of all: others look without the lock, and 0 must not be taken for never.
                self._epoch = self._unknown = clock
                self._versions.clear()
                self._tables.clear()
            if change.catalog:
                self._epoch = clock
            if change.unknown:
                self._unknown = clock
            if change.settings:
                self._settings_changed = True
            for table in change.tables:
                key = key_of(table)
                self._versions[key] = clock
                self._tables[key] = table
            recorded = Recorded(change, clock)
            # Under the lock, so that all hear of changes in one order. Listeners only post.
            for listener in self._listeners:
                listener(recorded)

    @contextlib.contextmanager
    def under_way(self, change: Change) -> Iterator[None]:
        """While statements run that commit one by one, and make ``change`` in the end: others see
        the first of them long before that, so nothing holds that depends on any."""
        with self._lock:
            self._under_way.append(change)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.remove(change)

    def token(self, epoch: int, keys: Iterable[str]) -> Token:
        """What a result of these tables depends on now. ``epoch`` is that of the plan."""
        versions = self._versions
        return epoch, tuple((key, versions.get(key, 0)) for key in keys)

    def holds(self, token: Any) -> bool:
        """Whether nothing that ``token`` (or what JSON made of one) depends on has changed."""
        epoch, tables = token
        if epoch != self._epoch:
            return False
        versions = self._versions
        if any(versions.get(key, 0) != version for key, version in tables):
            return False
        if not self._under_way:
            return True
        keys = {key for key, _ in tables}
        return not any(
            change.catalog or not keys.isdisjoint(map(key_of, change.tables))
            for change in tuple(self._under_way)
        )

    def now(self) -> int:
        """The clock: versions up to it are recorded."""
        return self._clock

    def version(self, key: str) -> int:
        """When the table last changed; 0 is never."""
        return self._versions.get(key, 0)

    def known(self, since: int = 0) -> tuple[int, dict[Table, int]]:
        """The clock now, and the tables known to have changed after ``since``, with versions."""
        with self._lock:
            changed = {
                self._tables[key]: version
                for key, version in self._versions.items()
                if version > since
            }
            return self._clock, changed

    def is_complete(self, since: int) -> bool:
        """Whether :meth:`known` tells of every table that has changed after ``since``."""
        return self._unknown <= since

    def state(self) -> Any:
        """Everything, as a JSON value, for :meth:`restore` after a restart.

        None when results may depend on settings, which a restart undoes.
        """
        with self._lock:
            if self._settings_changed:
                return None
            return {
                "run": self.run,
                "clock": self._clock,
                "epoch": self._epoch,
                "unknown": self._unknown,
                "tables": [[*self._tables[key], self._versions[key]] for key in self._versions],
            }

    def restore(self, state: Any) -> None:
        """Go on where the server that gave ``state`` stopped. Before the first change."""
        with self._lock:
            self.in_use = True
            self.run = state["run"]
            self._clock, self._epoch = state["clock"], state["epoch"]
            self._unknown = state["unknown"]
            for *table, version in state["tables"]:
                key = key_of((table[0], table[1], table[2]))
                self._tables[key] = (table[0], table[1], table[2])
                self._versions[key] = version
