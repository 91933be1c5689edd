"""A guard over the memory of the process: it cancels the query that makes it grow too much.

DuckDB's own limit does not count single large values, results on their way, or Python. A limit of
the system would: but allocations fail then in whoever comes next, and where DuckDB or the WebSocket
library do not expect that, the process ends (four hostile queries did it within seconds).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlrooms_server.errors import StartupError, TooLarge
from sqlrooms_server.jobs import Job, Scheduler, State
from sqlrooms_server.timers import Timers

log = logging.getLogger(__name__)

# One query writes some gigabytes a second at most. Looking takes some microseconds.
_INTERVAL = 0.05

# Growth counts half after as many looks: what a query took long ago, it was allowed to.
_HALF_LIFE = 0.5 ** (1 / 10)

# A plateau above the limit is nobody's fault; what DuckDB caches, it was given with --memory-limit.
_LEAST_GROWTH = 16 << 20

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """What this process has in memory. Raises ``StartupError`` where that cannot be asked."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError as error:
        raise StartupError("--process-memory works on Linux only; drop it.") from error


class MemoryGuard:
    """Watches until the timers are closed. ``resident`` tells how much the process takes."""

    def __init__(
        self,
        scheduler: Scheduler,
        timers: Timers,
        limit: int,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        self._scheduler = scheduler
        self._timers = timers
        self._limit = limit
        self._resident = resident
        self._before = resident()
        # How much the process has lately grown while each job ran.
        self._growth: dict[Job, float] = {}
        self._cancelled: Job | None = None
        timers.after(_INTERVAL, self._watch)

    def _watch(self) -> None:
        self._timers.after(_INTERVAL, self._watch)
        self.look(self._scheduler.running())

    def look(self, running: Sequence[Job]) -> None:
        """Share what was taken since the last look among ``running``; cancel one when needed."""
        now = self._resident()
        grown, self._before = max(0, now - self._before), now
        if self._cancelled is not None and self._cancelled.state is State.DONE:
            self._cancelled = None
        self._growth = {job: self._growth.get(job, 0.0) * _HALF_LIFE for job in running}
        for job in running:
            self._growth[job] += grown / len(running)
        # Until the one that was cancelled notices, it may be the one that still grows.
        if now > self._limit and self._cancelled is None:
            self._cancel_one(now)

    def _cancel_one(self, now: int) -> None:
        most = max(self._growth.values(), default=0.0)
        if most < _LEAST_GROWTH:
            return
        # Those that run together share; what began last is what was too much.
        suspects = [job for job, growth in self._growth.items() if growth >= most / 2]
        worst = max(suspects, key=lambda job: job.began or 0.0)
        error = TooLarge(
            f"The query was cancelled: the server took {now >> 20} MiB of memory, more than the "
            f"{self._limit >> 20} MiB of --process-memory, and grew while this query ran."
        )
        if worst.stop(error):
            self._cancelled = worst
            log.warning("Cancelled a query that made the process take %d MiB.", now >> 20)
