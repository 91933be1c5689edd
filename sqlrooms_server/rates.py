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
        # What is left, and when it was last filled up.
        self._buckets: dict[K, list[float]] = {}

    def allows(self, key: K) -> bool:
        """Whether ``key`` may now; counts it if so."""
        if not self._per_second:
            return True
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._new_bucket(key)
        # It is filled up when it is empty, so that most calls need no clock.
        if bucket[0] < 1:
            now = time.monotonic()
            bucket[0] = min(self._most, bucket[0] + (now - bucket[1]) * self._per_second)
            bucket[1] = now
            if bucket[0] < 1:
                return False
        bucket[0] -= 1
        return True

    def _new_bucket(self, key: K) -> list[float]:
        now = time.monotonic()
        if len(self._buckets) >= _MAX_KNOWN:
            # One that was not filled up for two seconds would be full again.
            self._buckets = {k: b for k, b in self._buckets.items() if now - b[1] < 2}
        bucket = self._buckets[key] = [self._most, now]
        return bucket

    def forget(self, key: K) -> None:
        """``key`` is gone."""
        self._buckets.pop(key, None)
