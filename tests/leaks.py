"""What many repetitions leave behind in this process."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable

CYCLES = 40


def assert_leaks_nothing(cycle: Callable[[], None], thread_names: tuple[str, ...]) -> None:
    """Repeat ``cycle``; file descriptors and threads of these names must not become more."""

    def held() -> tuple[int, int]:
        # Sockets that earlier tests left to the collector must not go in between.
        gc.collect()
        threads = [t for t in threading.enumerate() if t.name.startswith(thread_names)]
        return len(os.listdir("/proc/self/fd")), len(threads)

    cycle()
    files, threads = held()
    for _ in range(CYCLES):
        cycle()
    files_after, threads_after = held()
    # A client of an earlier test may still close; a leak would be 40 and more.
    assert files_after < files + 20
    assert threads_after <= threads
