"""Counts what an answer costs, for `guard.py`: `python -m bench_suite.counts` prints JSON.

The server runs in this process, with every call of its threads counted by the profiler; those of
the client, on this thread, are not.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sqlrooms_server import Server, Settings

from . import load
from .answers import ONE, counted
from .servers import running
from .websocket import Connection

WARM_UP, QUERIES = 200, 500
ROWS = 1_000_000


class _Calls:
    """Counts the calls that all threads make, of Python's functions and of C's."""

    def __init__(self) -> None:
        self._by_thread: defaultdict[int, int] = defaultdict(int)

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            # A key for each thread: two that add to one would lose calls.
            self._by_thread[threading.get_ident()] += 1

    def total(self) -> int:
        return sum(self._by_thread.copy().values())


def _in_this_process() -> dict[str, float]:
    calls = _Calls()
    threading.setprofile(calls.profile)
    server = Server(Settings(port=0, host="127.0.0.1"))
    port = server.start()
    threading.setprofile(None)
    try:
        with Connection(port) as connection:

            def asked(times: int) -> None:
                load.one_at_a_time(connection, ONE, 0, least=times)

            asked(WARM_UP)
            small, blocks = _grown(calls.total, lambda: asked(QUERIES)), _blocks(asked)
            load.stream(connection, counted(ROWS))
            large = _grown(calls.total, lambda: load.stream(connection, counted(ROWS)))
    finally:
        server.stop()
    return {"calls": small / QUERIES, "blocks": blocks / QUERIES, "rows": float(large)}


def _grown(count: Callable[[], int], work: Callable[[], object]) -> int:
    before = count()
    work()
    return count() - before


def _blocks(ask: Callable[[int], None]) -> int:
    """How many blocks of Python's allocator many queries leave behind."""

    def settled() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    return _grown(settled, lambda: ask(QUERIES))


def _switches(environment: Path) -> float:
    """How often threads of a server give up their core for one answer."""
    with running(environment) as server, Connection(server.port) as connection:
        load.one_at_a_time(connection, ONE, 0, least=WARM_UP)
        return (
            _grown(
                server.usage.switches,
                lambda: load.one_at_a_time(connection, ONE, 0, least=QUERIES),
            )
            / QUERIES
        )


def _modules() -> int:
    """How many modules are loaded in a process when its server has answered `/readyz`."""
    code = (
        "import sys; from sqlrooms_server import Server, Settings; "
        "server = Server(Settings(port=0, host='127.0.0.1')); server.start(); "
        "print(len(sys.modules)); server.stop()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60.0, check=True
    )
    return int(done.stdout)


def main() -> None:
    found = _in_this_process()
    found["switches"] = _switches(Path(sys.prefix))
    found["modules"] = _modules()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
