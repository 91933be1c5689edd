"""The guard over the memory of the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil
import pytest

from sqlrooms_server.errors import StartupError
from sqlrooms_server.jobs import Job, Lane, Scheduler, Work
from sqlrooms_server.memory import MemoryGuard, resident_bytes
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers
from tests.conftest import LocalServer
from tests.test_queries import ENDLESS
from tests.wire import DEADLINE

MIB = 1 << 20


def test_the_query_that_grows_is_cancelled_and_others_go_on(
    launch: Callable[..., LocalServer],
) -> None:
    limit = resident_bytes() + 200 * MIB
    server = launch(process_memory=limit, memory_limit="6GB", threads=2)
    with server.connect() as innocent, server.connect() as hungry:
        innocent.send(type="exec", sql=ENDLESS, queryId="i", progress=True)
        while innocent.receive()["state"] != "running":
            pass
        hungry.send(type="json", sql="select list(i) from range(1000000000) t(i)", queryId="h")
        refusal = hungry.receive()
        assert refusal["code"] == "too_large"
        assert "--process-memory" in refusal["error"]
        assert hungry.rows("select 1 as a") == [{"a": 1}]
        innocent.send(type="cancel", queryId="i")
        while (reply := innocent.receive())["type"] != "error":
            pass
        assert reply["code"] == "cancelled"


def test_who_is_chosen() -> None:
    """Of those that ran while it grew, the one that began last; none for a plateau."""
    timers = Timers()
    scheduler = Scheduler(4, 10, timers)
    ends = {}

    def work(end: threading.Event) -> Work:
        end.wait(DEADLINE)
        return
        yield

    try:
        taken = [0]
        guard = MemoryGuard(scheduler, timers, 1000 * MIB, lambda: taken[0])
        timers.close()

        def begin() -> Job:
            end = threading.Event()
            job = scheduler.submit(Lane(), work(end), lambda: None, lambda error: None)
            ends[job] = end
            while job not in scheduler.running():
                pass
            return job

        def grow(size: int, *running: Job) -> list[bool]:
            taken[0] += size * MIB
            guard.look(running)
            return [job.stopped is not None for job in running]

        first, second = begin(), begin()
        # It fills up under the limit, and stays there.
        assert grow(900, first) == [False]
        for _ in range(100):
            assert grow(0, first, second) == [False, False]
        assert grow(110, second) == [True]
        # As long as that goes on, it may be the one that grows.
        third = begin()
        assert grow(500, first, second, third) == [False, True, False]
        ends[second].set()
        while second in scheduler.running():
            pass
        assert grow(100, first, third) == [False, True]
    finally:
        for end in ends.values():
            end.set()
        scheduler.close(time.monotonic() + DEADLINE)


def test_settings() -> None:
    assert Settings(process_memory=1024 * MIB).duckdb_limits == {"memory_limit": "512MiB"}
    limits = Settings(process_memory=1024 * MIB, memory_limit="700MB").duckdb_limits
    assert limits == {"memory_limit": "700MB"}
    with pytest.raises(StartupError, match="--process-memory must be 256MiB or more"):
        Settings(process_memory=100 * MIB)
    assert abs(resident_bytes() - psutil.Process().memory_info().rss) < 50 * MIB
