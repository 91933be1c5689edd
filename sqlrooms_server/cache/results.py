"""The cache of results: memory before disk, and one thread that writes."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

from sqlrooms_server.cache.directory import Directory, Place
from sqlrooms_server.cache.entries import Entry, OpenFile, Spool
from sqlrooms_server.cache.files import open_unnamed
from sqlrooms_server.cache.memory import Memory
from sqlrooms_server.cache.readers import Readers
from sqlrooms_server.cache.writer import Writer

if TYPE_CHECKING:
    from sqlrooms_server.cache.disk import Store

log = logging.getLogger(__name__)

# No booleans and no floats: Python takes True for 1.
Key = tuple[str | int | None, ...]

# What memory may take of a large cache.
_MAX_MEMORY_BYTES = 256 << 20

# An empty database with its log takes a good part of less.
_MIN_DISK_BYTES = 1 << 20

_FORMAT = 1


class ResultCache:
    """At most ``size`` bytes of results of the database ``name``, in memory and on disk together.

    A quarter, at most 256 MiB, is for memory, which holds results up to 1 MiB (or a quarter of
    that). The rest is for disk; below 1 MiB there is none. Results under way, those that wait to be
    written and evicted ones that are still being read come on top.

    The directory is created when it is first needed. Methods may be called from any thread; only
    :meth:`recover` and the constructor raise something other than ``Overflow``.
    """

    def __init__(self, directory: str, size: int, *, name: str) -> None:
        memory = min(size // 4, _MAX_MEMORY_BYTES)
        self._memory = Memory(memory)
        self._disk_bytes = size - memory if size - memory >= _MIN_DISK_BYTES else 0
        self._largest = self._disk_bytes // 4 or self._memory.largest
        self._place = Place(directory, name)
        self._opening = threading.Lock()
        self._is_open = False
        self._is_kept = False
        self._is_closed = False
        self._directory: Directory | None = None
        self._readers: Readers | None = None
        self._writer = Writer(self._open_store, _digest, self._warn)
        self._has_database = False
        self._has_warned = False

    def recover(self, fingerprint: dict[str, Any] | None) -> Any:
        """What :meth:`close` was given as ``state``, and then its entries too, if the cache was
        last closed with this ``fingerprint``; else None, and it starts empty.

        Call it once, before the database is opened and before anything else. It creates nothing.
        Raises ``StartupError`` when the directory the user named cannot be used.
        """
        directory = self._directory = self._place.existing()
        if directory is None:
            return None
        saved = directory.take_manifest()
        if fingerprint is None or not isinstance(saved, dict):
            return None
        # As it was written: with lists for tuples and texts for the names of members.
        wanted = json.loads(json.dumps(fingerprint))
        if saved.get("format") != _FORMAT or saved.get("fingerprint") != wanted:
            return None
        self._is_kept = True
        self._has_database = True
        volume, count = saved.get("volume"), saved.get("count")
        self._writer.volume = volume if type(volume) is int else 0
        self._writer.count = count if type(count) is int else 0
        return saved.get("state")

    def forget(self) -> None:
        """Start empty after all. Only between :meth:`recover` and the first use."""
        self._is_kept = self._has_database = False
        self._writer.volume = self._writer.count = 0

    def spool(self) -> Spool:
        """To collect a result."""
        return Spool(self._largest, self._open_file)

    def peek(self, key: Key) -> Entry | None:
        """The entry in memory. Never waits."""
        return self._memory.get(key)

    def find(self, key: Key) -> Entry | None:
        """The entry in memory or on disk. For workers: it may read a large file to verify it."""
        entry = self._memory.get(key) or self._writer.waiting(key)
        if entry is not None or not self._has_database:
            return entry
        try:
            readers = self._opened()[1]
            entry = readers.find(_digest(key)) if readers else None
        except (sqlite3.Error, OSError, ValueError) as error:
            # An entry that was evicted at this moment is nothing to tell.
            if not isinstance(error, FileNotFoundError):
                self._warn(error)
            self._writer.put(key, None)
            return None
        if entry is not None:
            self._memory.put(key, entry, replace=False)
        return entry

    def store(self, key: Key, entry: Entry) -> None:
        """Remember ``entry``: at once in memory if it is small, on disk a little later."""
        if self._is_closed:
            return
        self._memory.put(key, entry)
        if self._disk_bytes:
            self._writer.put(key, entry)

    def discard(self, key: Key) -> None:
        """Forget the entry in memory. What is on disk stays until another one is stored."""
        self._memory.discard(key)

    def flush(self) -> None:
        """Wait until everything is on disk."""
        self._writer.flush()

    def sizes(self) -> dict[str, int]:
        """``entries``, ``memoryBytes`` and ``diskBytes``, as of the last write. Never waits."""
        return {
            "entries": max(len(self._memory), self._writer.count),
            "memoryBytes": self._memory.size,
            "diskBytes": self._writer.volume,
        }

    def close(
        self, fingerprint: dict[str, Any] | None, state: Any = None, *, deadline: float = 2.0
    ) -> None:
        """Write what waits, for at most ``deadline`` seconds, and close. With a ``fingerprint``,
        that of the database after it was closed, the entries outlive the process."""
        with self._opening:
            if self._is_closed:
                return
            self._is_closed = True
        # The last connection tidies the database up, which those for reading cannot.
        if self._readers is not None:
            self._readers.close()
        is_complete = self._writer.stop(deadline)
        self._memory.clear()
        directory = self._directory
        if directory is None:
            return
        is_worth_it = self._is_kept or self._is_open
        if fingerprint is not None and is_complete and is_worth_it and not directory.is_temporary:
            manifest = {
                "format": _FORMAT,
                "fingerprint": fingerprint,
                "state": state,
                "volume": self._writer.volume,
                "count": self._writer.count,
            }
            try:
                directory.write_manifest(manifest)
            except (OSError, ValueError, TypeError) as error:
                self._warn(error)
        directory.close()

    def _open_file(self) -> OpenFile:
        directory = self._opened()[0]
        if directory is None:
            raise OSError("the directory of the result cache cannot be used")
        return open_unnamed(directory.path)

    def _opened(self) -> tuple[Directory | None, Readers | None]:
        if not self._is_open:
            with self._opening:
                if not self._is_open and not self._is_closed:
                    self._open()
        return self._directory, self._readers

    def _open(self) -> None:
        try:
            if self._directory is None:
                self._directory = self._place.create()
            if not self._is_kept:
                self._directory.clear()
            self._readers = Readers(self._directory.path)
        except OSError as error:
            self._warn(error)
        self._is_open = True

    def _open_store(self, is_damaged: bool) -> Store:
        # Importing it takes a while, and many servers never need it.
        from sqlrooms_server.cache.disk import Store, is_sound

        directory, readers = self._opened()
        if directory is None or readers is None:
            raise OSError("the directory cannot be used")
        directory.check()
        if is_damaged or not is_sound(directory.path, self._disk_bytes):
            directory.clear()
            readers.reset()
        store = Store(directory.path, self._disk_bytes)
        readers.opened()
        self._has_database = True
        return store

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = f"{type(error).__name__} {error}".strip()
            log.warning(
                "The result cache in %s is damaged or full: %s. It goes on without what it lost; "
                "this is told once.",
                self._where(),
                reason,
            )

    def _where(self) -> str:
        return self._directory.path if self._directory else self._place.parent


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, separators=(",", ":")).encode()).hexdigest()
