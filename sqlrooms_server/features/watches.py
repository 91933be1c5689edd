"""``watch`` and ``unwatch``: telling clients which tables have changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.versions import Recorded, Table, key_of
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.messages import TableName, Unwatch, Watch
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode, encode_reply, table_text
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull

# Changes within this time are told together.
_INTERVAL_SECONDS = 0.01
# Of the loop's time, telling may take this part.
_SHARE = 0.4


@dataclass(eq=False)
class _Watcher:
    """One client that watches ``keys``, or with None every table. ``told``: what it knows."""

    peer: Peer
    keys: frozenset[str] | None
    told: int
    policy: Policy
    # It reads slowly; what it missed is told when it has read what was sent.
    is_behind: bool = False


class Watches(Feature):
    """A feature: tells of changes in the order of their commits, each exactly once."""

    def __init__(
        self,
        engine: Engine,
        timers: Timers,
        post: Callable[..., None],
        *,
        meta_namespace: str,
    ) -> None:
        self._engine = engine
        self._versions = engine.versions
        self._catalog = engine.catalog
        self._meta_namespace = meta_namespace.lower()
        self._timers = timers
        self._post = post
        self._watchers: dict[Peer, _Watcher] = {}
        self._untold: list[Recorded] = []
        self._is_scheduled = False
        self._next_flush = 0.0
        engine.versions.listen(self._listen)

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Watch: self._watch, Unwatch: self._unwatch}

    def closed(self, peer: Peer) -> None:
        self._watchers.pop(peer, None)

    def _watch(self, peer: Peer, message: Watch) -> None:
        self._versions.in_use = True
        policy = self._engine.bounded(peer.role.sql)
        keys = None
        if message.tables is not None:
            keys = frozenset(key for name in message.tables for key in self._keys(name))
        # Before the clock is read, so that what is untold then is told to those before, and what
        # comes right afterwards is heard.
        self._flush()
        watcher = self._watchers[peer] = _Watcher(peer, keys, told=0, policy=policy)
        clock, everything = self._versions.known()
        watcher.told = clock
        answer: dict[str, Any] = {
            "versions": self._current(message.tables, everything, policy),
            "version": self._token(clock),
        }
        missed: dict[str, int] | None = {}
        if message.since is not None:
            missed = self._missed(watcher, message.since)
            answer["resync"] = missed is None
        peer.send(encode_reply("watching", message.query_id, **answer))
        if missed:
            peer.send(self._changed(missed, "change", clock))

    def _unwatch(self, peer: Peer, message: Unwatch) -> None:
        self._watchers.pop(peer, None)
        peer.send(encode_reply("unwatched", message.query_id))

    def _missed(self, watcher: _Watcher, since: str) -> dict[str, int] | None:
        """What ``watcher`` has to be told that knows ``since``; None when that is not known."""
        run, _, text = since.partition("-")
        # No clock has more digits.
        if run != self._versions.run or not text.isascii() or not text.isdigit() or len(text) > 18:
            return None
        clock = int(text)
        if clock > watcher.told:
            return None
        _, tables = self._versions.known(since=clock)
        if not self._versions.is_complete(since=clock):
            return None
        # What is newer still is told like any change.
        missed = ((table, version) for table, version in tables.items() if version <= watcher.told)
        return self._told(watcher.keys, missed, watcher.policy)

    def _keys(self, name: TableName) -> tuple[str, ...]:
        """What ``name`` may mean: in a message, two parts are a schema or a database first."""
        if len(name) == 1:
            return (key_of((self._catalog, "main", name[0])),)
        if len(name) == 2:
            return key_of((self._catalog, *name)), key_of((name[0], "main", name[1]))
        return (key_of((name[0], name[1], name[2])),)

    def _current(
        self, names: Iterable[TableName] | None, everything: dict[Table, int], policy: Policy
    ) -> dict[str, int]:
        """The versions of ``names``, by what ``changed`` calls those that are known."""
        if names is None:
            return self._told(None, everything.items(), policy)
        includes = self._engine.reach.includes
        known = {key_of(table): table for table in everything if includes(table, policy)}
        current = {}
        for name in names:
            keys = [key for key in self._keys(name) if key in known]
            if not keys:
                current[table_text(name)] = 0
            for key in keys:
                current[self._text(known[key])] = everything[known[key]]
        return current

    def _token(self, clock: int) -> str:
        return f"{self._versions.run}-{clock}"

    def _listen(self, recorded: Recorded) -> None:
        """From any thread, for each change."""
        if self._watchers:
            self._post(self._add, recorded)

    def _add(self, recorded: Recorded) -> None:
        self._untold.append(recorded)
        if self._is_scheduled:
            return
        wait = self._next_flush - time.monotonic()
        if wait <= 0:
            self._flush()
        else:
            self._is_scheduled = True
            self._timers.after(wait, lambda: self._post(self._flush_later))

    def _flush_later(self) -> None:
        self._is_scheduled = False
        self._flush()

    def _flush(self) -> None:
        """Tell what is untold, and encode it once for all who watch the same tables."""
        untold, self._untold = self._untold, []
        if not untold:
            return
        began = time.monotonic()
        first, last = untold[0].version, untold[-1].version
        messages: dict[tuple[frozenset[str] | None, Policy], bytes | None] = {}
        for watcher in list(self._watchers.values()):
            if watcher.is_behind or watcher.told >= last:
                continue
            if watcher.peer.is_behind or watcher.told >= first:
                self._catch_up(watcher)
                continue
            group = watcher.keys, watcher.policy
            if group not in messages:
                messages[group] = self._message(*group, untold)
            message = messages[group]
            watcher.told = last
            if message is not None:
                watcher.peer.send(message)
        took = time.monotonic() - began
        self._next_flush = began + took + max(_INTERVAL_SECONDS, took / _SHARE)

    def _message(
        self, keys: frozenset[str] | None, policy: Policy, untold: list[Recorded]
    ) -> bytes | None:
        tables: dict[str, int] = {}
        ops = set()
        resync = False
        for recorded in untold:
            change = recorded.change
            changed = ((table, recorded.version) for table in change.tables)
            told = self._told(keys, changed, policy)
            if told or change.unknown:
                ops.add(change.op)
                tables.update(told)
                resync = resync or change.unknown
        if not ops:
            return None
        op = ops.pop() if len(ops) == 1 else "change"
        return self._changed(tables, op, untold[-1].version, resync=resync)

    def _told(
        self,
        keys: frozenset[str] | None,
        versions: Iterable[tuple[Table, int]],
        policy: Policy,
    ) -> dict[str, int]:
        """Those of ``versions`` that somebody who watches ``keys`` is told, by their names."""
        includes = self._engine.reach.includes
        return {
            self._text(table): version
            for table, version in versions
            if (keys is None or key_of(table) in keys)
            and not self._is_meta(table)
            and includes(table, policy)
        }

    def _changed(
        self, tables: dict[str, int], op: str, clock: int, *, resync: bool = False
    ) -> bytes:
        fields: dict[str, Any] = {
            "type": "changed",
            "tables": tables,
            "op": op,
            "version": self._token(clock),
        }
        if resync:
            fields["resync"] = True
        return encode(fields)

    def _text(self, table: Table) -> str:
        if table[0].lower() != self._catalog.lower():
            return table_text(table)
        return table_text(table[2:] if table[1].lower() == "main" else table[1:])

    def _is_meta(self, table: Table) -> bool:
        is_schema = table[0] == self._catalog and table[1].lower() == self._meta_namespace
        return is_schema or table[0].lower() == self._meta_namespace

    def _catch_up(self, watcher: _Watcher) -> None:
        """Tell what ``watcher`` does not know yet, as soon as it reads."""
        watcher.is_behind = True
        watcher.peer.stream(_Missed(lambda: self._news(watcher)), is_text=True)

    def _news(self, watcher: _Watcher) -> bytes | None:
        """What ``watcher`` is told when its turn has come."""
        watcher.is_behind = False
        if self._watchers.get(watcher.peer) is not watcher:
            return None
        since = watcher.told
        watcher.told, tables = self._versions.known(since)
        # Asked afterwards: what is not known of by then comes after what is told.
        resync = not self._versions.is_complete(since)
        told = self._told(watcher.keys, tables.items(), watcher.policy)
        if not told and not resync:
            return None
        return self._changed(told, "change", watcher.told, resync=resync)


class _Missed:
    """A message that is written when it can be sent; a :class:`transport.Source`."""

    def __init__(self, write: Callable[[], bytes | None]) -> None:
        self._write = write
        self._rest: memoryview | None = None

    def pull(self) -> tuple[Chunk, bool] | Pull:
        if self._rest is None:
            message = self._write()
            if message is None:
                return Pull.WITHDRAWN
            self._rest = memoryview(message)
        fragment, self._rest = self._rest[:FRAGMENT_BYTES], self._rest[FRAGMENT_BYTES:]
        return fragment, not self._rest

    def sent(self) -> None:
        pass

    def dropped(self) -> None:
        pass
