"""Who has presented too many wrong tokens lately."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlrooms_server.access.key_files import digest_of
from sqlrooms_server.transport.addresses import place_of

# Seconds for which failures count, from the first one on.
WINDOW_SECONDS = 60.0

# Addresses that are remembered; those that failed first are forgotten first.
_MAX_ADDRESSES = 10_000

# Tokens that were right, remembered for each address: those who share it go on.
_MAX_KNOWN = 64


@dataclass(slots=True)
class _Record:
    began: float
    count: int = 0
    # Digests of tokens that were right.
    known: dict[bytes, None] = field(default_factory=dict)


class Failures:
    """Counts wrong tokens for each address. Over ``limit`` in a minute, no more are looked at, but
    for those that were right there before. For one thread. ``clock`` gives seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def wait(self, address: str, token: str) -> int:
        """Seconds until ``token`` from ``address`` is looked at; 0 when it is now."""
        record = self._records.get(place_of(address))
        if record is None or record.count < self._limit or digest_of(token) in record.known:
            return 0
        left = record.began + WINDOW_SECONDS - self._clock()
        if left > 0:
            return int(left) + 1
        record.count = 0
        return 0

    def count(self, address: str) -> None:
        """A token from ``address`` was wrong."""
        now = self._clock()
        record = self._record(address, now)
        if not record.count or now - record.began > WINDOW_SECONDS:
            record.began, record.count = now, 0
        record.count += 1

    def remember(self, address: str, token: str) -> None:
        """``token`` from ``address`` was right."""
        known = self._record(address, self._clock()).known
        digest = digest_of(token)
        known.pop(digest, None)
        known[digest] = None
        if len(known) > _MAX_KNOWN:
            del known[next(iter(known))]

    def forget_known(self) -> None:
        """Other tokens may be right from here on."""
        for record in self._records.values():
            record.known.clear()

    def _record(self, address: str, now: float) -> _Record:
        place = place_of(address)
        record = self._records.get(place)
        if record is None:
            if len(self._records) >= _MAX_ADDRESSES:
                del self._records[next(iter(self._records))]
            record = self._records[place] = _Record(now)
        return record
