"""The entries in memory: the least recently used go first."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable

from sqlrooms_server.cache.entries import SMALL_BYTES, Entry

# What an entry costs besides its body and its key: token and facts, roughly.
OVERHEAD_BYTES = 1024


class Memory:
    """At most ``budget`` bytes of entries, none larger than ``largest``."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        # One entry must not drive everything else out.
        self.largest = min(SMALL_BYTES, budget // 4)
        self.size = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Entry | None:
        # A lookup alone is atomic. Who holds the lock may have lost the interpreter, and the loop
        # thread does not wait for that: then this use does not count.
        entry = self._entries.get(key)
        if entry is not None and self._lock.acquire(blocking=False):
            try:
                if key in self._entries:
                    self._entries.move_to_end(key)
            finally:
                self._lock.release()
        return entry

    def put(self, key: Hashable, entry: Entry, *, replace: bool = True) -> None:
        """Keep ``entry`` if it is small enough; what it replaces is out of date in any case."""
        with self._lock:
            if not replace and key in self._entries:
                return
            self._drop(key)
            if entry.body is None or _cost(key, entry) > self.largest:
                return
            self._entries[key] = entry
            self.size += _cost(key, entry)
            while self.size > self._budget:
                self._drop(next(iter(self._entries)))

    def discard(self, key: Hashable) -> None:
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.size = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= _cost(key, entry)


def _cost(key: Hashable, entry: Entry) -> int:
    # A key holds a SQL text and its parameters, and may be larger than the body.
    parts = key if isinstance(key, tuple) else (key,)
    texts = sum(sys.getsizeof(part) for part in parts if isinstance(part, str))
    return entry.size + texts + OVERHEAD_BYTES
