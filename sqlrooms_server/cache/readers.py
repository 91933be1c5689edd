"""Looking entries up on disk, from any number of threads, without ever waiting for a writer.

diskcache reads through a connection per thread that may write, that waits up to a minute and that
only its own thread can close. These connections can do none of that.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from urllib.parse import quote

from sqlrooms_server.cache import records
from sqlrooms_server.cache.entries import Entry
from sqlrooms_server.cache.files import open_value

DATABASE = "cache.db"

# Values below it are rows of the database, as is usual with diskcache.
INLINE_BYTES = 32 << 10

_MODE_RAW, _MODE_BINARY = 1, 2

# The log of the database lets readers and a writer pass each other; a lock means something is odd.
_LOCK_SECONDS = 0.02
# A lookup takes microseconds. Only a database that was made to hang reaches it.
_LOOKUP_SECONDS = 0.25
_STEPS_BETWEEN_CHECKS = 100_000

_SELECT = f"""
    SELECT mode, filename, CASE WHEN length(value) <= {INLINE_BYTES} THEN value END
    FROM Cache WHERE key = ? AND raw = 1 LIMIT 1
"""


class _Reader:
    def __init__(self, directory: str, inode: int | None) -> None:
        found = os.lstat(os.path.join(directory, DATABASE))
        # A pipe would block SQLite for ever.
        if not stat.S_ISREG(found.st_mode):
            raise OSError("its database is not a file")
        # SQLite would cut what the writer has mapped of the files beside it: a bus error.
        if inode not in (None, found.st_ino):
            raise OSError("its database is another file than the one that was opened")
        uri = f"file:{quote(directory)}/{DATABASE}?mode=ro"
        self._connection = sqlite3.connect(
            uri, uri=True, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._deadline = 0.0
        self._connection.set_progress_handler(self._is_late, _STEPS_BETWEEN_CHECKS)

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def row(self, digest: str) -> tuple[object, object, object] | None:
        self._deadline = time.monotonic() + _LOOKUP_SECONDS
        rows = self._connection.execute(_SELECT, (digest,)).fetchall()
        return rows[0] if rows else None

    def close(self) -> None:
        self._connection.close()


class Readers:
    """Connections that are not in use, and those in use come back."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._idle: list[_Reader] = []
        self._generation = 0
        # That of the database which the writer has open.
        self._inode: int | None = None
        self._closed = False

    def find(self, digest: str) -> Entry | None:
        """The entry stored under ``digest``.

        Raises ``sqlite3.Error`` and ``OSError`` when the directory is damaged, ``ValueError``
        when the entry is; ``FileNotFoundError`` when it was evicted at this moment.
        """
        row = self._row(digest)
        if row is None:
            return None
        mode, filename, value = row
        if mode == _MODE_RAW and isinstance(value, bytes):
            return records.load(digest, value)
        if mode == _MODE_BINARY:
            return records.load(digest, open_value(self._directory, filename))
        raise records.Damaged("A row of the result cache was not written by it.")

    def opened(self) -> None:
        """The writer has opened the database, and from here on no other file is read."""
        self._inode = os.lstat(os.path.join(self._directory, DATABASE)).st_ino

    def reset(self) -> None:
        """Forget the connections: the database is a new one."""
        self._inode = None
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()

    def close(self) -> None:
        self._closed = True
        self.reset()

    def _row(self, digest: str) -> tuple[object, object, object] | None:
        with self._lock:
            if self._closed:
                return None
            generation = self._generation
            reader = self._idle.pop() if self._idle else None
        reader = reader or _Reader(self._directory, self._inode)
        is_good = False
        try:
            row = reader.row(digest)
            is_good = True
        finally:
            with self._lock:
                is_kept = is_good and generation == self._generation
                if is_kept:
                    self._idle.append(reader)
            if not is_kept:
                reader.close()
        return row
