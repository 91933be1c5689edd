"""The thread that writes to disk, so that nobody else waits for it."""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from sqlrooms_server.cache.entries import Entry
from sqlrooms_server.cache.records import Record

if TYPE_CHECKING:
    from sqlrooms_server.cache.disk import Store

# What may wait. More comes when results are made faster than the disk takes them; those are not
# written then.
QUEUE_BYTES = 64 << 20
_QUEUE_LENGTH = 10_000

# After the queue was given up: how long a single write or the close of the database may take.
_GRACE_SECONDS = 2.0


class Writer:
    """Writes and removes entries in order, the last one of each key only.

    ``open_store`` is called in the thread before its first write, and again with True, for an empty
    one, when the database turned out to be damaged. ``warn`` is told what failed.
    """

    def __init__(
        self,
        open_store: Callable[[bool], Store],
        digest: Callable[[Hashable], str],
        warn: Callable[[Exception], None],
    ) -> None:
        self._open_store = open_store
        self._digest = digest
        self._warn = warn
        self._changed = threading.Condition()
        self._queue: OrderedDict[Hashable, Entry | None] = OrderedDict()
        self._queued_bytes = 0
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._abandoned = False
        self.volume = 0
        self.count = 0

    def put(self, key: Hashable, entry: Entry | None) -> None:
        """Write ``entry`` later, or with None remove what is stored."""
        size = entry.size if entry else 0
        with self._changed:
            is_full = self._queued_bytes > 0 and self._queued_bytes + size > QUEUE_BYTES
            if self._stopping or is_full or len(self._queue) >= _QUEUE_LENGTH:
                return
            if entry is None and key in self._queue:
                return
            self._forget(key)
            self._queue[key] = entry
            self._queued_bytes += size
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="cache")
                try:
                    thread.start()
                except RuntimeError as error:
                    self._forget(key)
                    self._warn(error)
                    return
                self._thread = thread
            self._changed.notify_all()

    def waiting(self, key: Hashable) -> Entry | None:
        """The entry that is to be written."""
        return self._queue.get(key)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits; whether that came about."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout)

    def stop(self, deadline: float) -> bool:
        """Write what waits for ``deadline`` seconds, give the rest up. Whether the thread ended:
        only then is what is on disk complete."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue, deadline)
            self._abandoned = bool(self._queue)
            self._queue.clear()
        if self._thread is not None:
            self._thread.join(_GRACE_SECONDS)
            return not self._thread.is_alive()
        return True

    def _forget(self, key: Hashable) -> None:
        entry = self._queue.pop(key, None)
        if entry is not None:
            self._queued_bytes -= entry.size

    def _run(self) -> None:
        store: Store | None = None
        is_damaged = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    break
                key = next(iter(self._queue))
                entry = self._queue[key]
            try:
                if store is None:
                    store = self._open_store(is_damaged)
                self._write(store, key, entry)
            except sqlite3.DatabaseError as error:
                self._warn(error)
                self._close(store)
                store, is_damaged = None, True
            except Exception as error:  # guard: the top of a worker
                if not self._abandoned:
                    self._warn(error)
            with self._changed:
                if self._queue.get(key) is entry:
                    self._forget(key)
                self._changed.notify_all()
        self._close(store)

    def _close(self, store: Store | None) -> None:
        if store is not None:
            try:
                store.close()
            except sqlite3.Error as error:
                self._warn(error)

    def _write(self, store: Store, key: Hashable, entry: Entry | None) -> None:
        digest = self._digest(key)
        if entry is None:
            store.remove(digest)
        else:
            store.put(Record.of(digest, entry), digest, self._check)
        self.volume = store.volume
        self.count = len(store)

    def _check(self) -> None:
        if self._abandoned:
            raise InterruptedError("The result cache is closing.")
