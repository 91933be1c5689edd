"""How long, and with how much memory, a server is let be, and why one has no figures."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .answers import WrongAnswer

# A repetition of a workload, by one of PEERS; others may take long on a busy machine.
PEER_SECONDS = 60.0
OTHERS_SECONDS = 300.0
# Who takes longer than this is not asked again: a run of all workloads has to end.
SLOW_SECONDS = 15.0

# Of the memory that is free when a server starts. The rest is for the one who asks.
_MEMORY_SHARE = 0.8

_OUT_OF_MEMORY = (
    "ended with code -9",
    "MemoryError",
    "bad_alloc",
    "memory allocation of",
    "OutOfMemory",
    "Out of Memory",
    "Cannot allocate memory",
    "malloc of size",
)


class TookTooLong(Exception):
    """What was waited for did not come in time."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the block with `TookTooLong` after so many seconds. For the main thread."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"> {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sacrifice(pid: int, *, limited: bool) -> None:
    """Have this process die, and not the benchmark, when memory runs out.

    With `limited`, it is refused more memory of its own than what is free now: `RLIMIT_DATA`, which
    counts no address space that is only reserved.
    """
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    if limited:
        most = int(_free_memory() * _MEMORY_SHARE)
        hard = resource.prlimit(pid, resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))


def reason(error: Exception) -> str:
    """In two or three words, why there is no figure."""
    text = str(error)
    if isinstance(error, TookTooLong):
        return text
    if any(sign in text for sign in _OUT_OF_MEMORY):
        return "out of memory"
    if "no answer within" in text:
        return "no answer"
    if "is not installed" in text or "did not start" in text:
        return "did not start"
    if text.startswith("a query was answered with"):
        return "an error"
    return "wrong answer" if isinstance(error, WrongAnswer) else "failed"


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
