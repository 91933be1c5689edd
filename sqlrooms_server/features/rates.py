"""How often somebody may do something."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# Those who have not been seen for longer may do as much as anybody; they are forgotten together.
_MAX_KNOWN = 10_000


class Rates(Generic[K]):
    """A token bucket for each key: ``per_second`` on average, twice as many at once; 0 is any.

    For one thread.
    """

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._most = 2 * per_second
        # What is left, and when that was.
        self._left: dict[K, tuple[float, float]] = {}

    def allows(self, key: K) -> bool:
        """Whether ``key`` may now; counts it if so."""
        if not self._per_second:
            return True
        now = time.monotonic()
        left, then = self._left.get(key, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_second)
        if left < 1:
            return False
        if len(self._left) >= _MAX_KNOWN and key not in self._left:
            # A bucket is full again after two seconds.
            self._left = {k: v for k, v in self._left.items() if now - v[1] < 2}
        self._left[key] = (left - 1, now)
        return True

    def forget(self, key: K) -> None:
        """``key`` is gone."""
        self._left.pop(key, None)
