"""The only user of diskcache: writing, evicting and measuring what is on disk, in one thread.

diskcache unpickles what a row says is a pickle (CVE-2025-69872). Nothing here asks it for a value,
and its ``Disk`` is replaced by one that cannot read any.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import diskcache

from sqlrooms_server.cache.files import create_value, remove_value
from sqlrooms_server.cache.readers import DATABASE, INLINE_BYTES
from sqlrooms_server.cache.records import Record

# Waiting longer for a lock that nobody should hold only delays a stop of the server.
_LOCK_SECONDS = 1.0

_BLOCK_BYTES = 4096
# A value in a file mostly has its two folders to itself.
_FOLDERS_BYTES = 2 * _BLOCK_BYTES

# The log of the database counts for the size too; SQLite's own limit is 4 MiB.
_MAX_LOG_BYTES = 1 << 20


class _Write:
    """What diskcache is given as a value: a record, and who may break its writing off."""

    def __init__(self, record: Record, check: Callable[[], None]) -> None:
        self.record = record
        self._check = check

    def pieces(self) -> Iterator[bytes]:
        for piece in self.record.pieces():
            self._check()
            yield piece


class BytesDisk(diskcache.Disk):  # type: ignore[misc]
    """Stores records under texts; knows no other key, no other value and no pickles."""

    def put(self, key: Any) -> tuple[str, bool]:
        if type(key) is not str:
            raise ValueError("Keys on disk are texts.")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if type(key) is not str or not raw:
            raise ValueError("Keys on disk are texts.")
        return key

    def store(self, value: _Write, read: bool, key: Any = None) -> tuple[int, int, Any, Any]:
        size = value.record.size
        if size < INLINE_BYTES:
            return 0, diskcache.core.MODE_RAW, None, sqlite3.Binary(b"".join(value.pieces()))
        name, file = create_value(self._directory)
        try:
            for piece in value.pieces():
                file.append(piece)
        except BaseException:
            self.remove(name)
            raise
        return _on_disk(size), diskcache.core.MODE_BINARY, name, None

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        raise ValueError("Values are read by the readers, not by diskcache.")

    def remove(self, file_path: Any) -> None:
        remove_value(self._directory, file_path)


class Store:
    """The entries on disk, at most ``limit`` bytes. All of it is for one thread.

    Raises ``sqlite3.Error``, ``diskcache.Timeout``, ``OSError`` and ``ValueError``.
    """

    def __init__(self, directory: str, limit: int) -> None:
        log_bytes = min(_MAX_LOG_BYTES, limit // 8)
        # The log may have grown by one transaction more before it is written back.
        self._limit = limit - 2 * log_bytes
        self._cache = diskcache.Cache(
            directory,
            timeout=_LOCK_SECONDS,
            disk=BytesDisk,
            **_settings(log_bytes),
        )
        self._evict(0)

    @property
    def volume(self) -> int:
        return int(self._cache.volume())

    def __len__(self) -> int:
        return len(self._cache)

    def put(self, record: Record, digest: str, check: Callable[[], None]) -> None:
        """``check`` is called between pieces and may raise to break off."""
        self._evict(_on_disk(record.size))
        self._cache.delete(digest)
        self._cache.set(digest, _Write(record, check))

    def remove(self, digest: str) -> None:
        self._cache.delete(digest)

    def close(self) -> None:
        self._cache.close()

    def _evict(self, needed: int) -> None:
        # One at a time: diskcache removes ten at once, which may be everything.
        while self.volume + needed > self._limit:
            oldest = next(iter(self._cache), None)
            if oldest is None:
                return
            self._cache.delete(oldest)


def is_sound(directory: str, limit: int) -> bool:
    """Whether the database of ``directory`` is one that diskcache makes, and is not locked.

    diskcache believes settings it finds in a database, waits a minute for its lock and runs its
    triggers. So tables, triggers and settings must be those of a new one. A missing database is
    sound. Raises ``OSError``.
    """
    path = os.path.join(directory, DATABASE)
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path + suffix).st_mode):
                return False
    if not os.path.exists(path):
        return True
    with tempfile.TemporaryDirectory(dir=directory) as example:
        diskcache.Cache(example, disk=BytesDisk, **_settings(limit)).close()
        schema, settings = _content(os.path.join(example, DATABASE))
    try:
        found_schema, found_settings = _content(path)
    except sqlite3.Error:
        return False
    if found_schema != schema or found_settings.keys() != settings.keys():
        return False
    return all(
        (type(found) is int and found >= 0) if type(settings[name]) is int else found == value
        for name, found in found_settings.items()
        for value in (settings[name],)
    )


def _content(path: str) -> tuple[set[tuple[Any, ...]], dict[Any, Any]]:
    with contextlib.closing(sqlite3.connect(path, timeout=_LOCK_SECONDS)) as connection:
        schema = set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))
        is_table = any(row[:2] == ("table", "Settings") for row in schema)
        if not is_table:
            return schema, {}
        settings = dict(connection.execute("SELECT key, value FROM Settings LIMIT 100"))
        connection.execute("BEGIN IMMEDIATE")
        return schema, settings


def _settings(log_bytes: int) -> dict[str, Any]:
    return {
        "eviction_policy": "least-recently-stored",
        "statistics": 0,
        "cull_limit": 0,
        # After a crash the directory is emptied, so nothing needs to reach the disk in order.
        "sqlite_synchronous": 0,
        "sqlite_mmap_size": 0,
        "sqlite_wal_autocheckpoint": max(1, log_bytes // _BLOCK_BYTES),
        "sqlite_journal_size_limit": log_bytes,
    }


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES + _FOLDERS_BYTES
