"""What other threads have handed to the loop and it has not taken yet."""

from __future__ import annotations

import threading


class Backlog:
    """At most ``max_count`` messages and ``max_bytes`` wait, or one message of any size."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._count = 0
        self._bytes = 0
        self._is_over = False
        self._changed = threading.Condition()

    def add(self, size: int) -> bool:
        """Wait for room and take it; False when nothing is taken any more."""
        with self._changed:
            while not self._is_over and not self._has_room(size):
                self._changed.wait()
            self._count += 1
            self._bytes += size
            return not self._is_over

    def remove(self, size: int) -> None:
        """A message of ``size`` bytes was taken."""
        with self._changed:
            self._count -= 1
            self._bytes -= size
            self._changed.notify()

    def end(self) -> None:
        """Nothing is taken from now on, and nobody waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        if not self._count:
            return True
        return self._count < self._max_count and self._bytes + size <= self._max_bytes
