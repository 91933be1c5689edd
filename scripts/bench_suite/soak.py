"""A long mixture of everything that a server does at once, and whether it stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from statistics import median
from time import perf_counter, sleep

from . import changes, hub, load
from .answers import MIXED, ONE, WrongAnswer, counted
from .load import Sample
from .plan import Effort
from .replies import Whole
from .servers import Server, ServerFailed, Usage
from .websocket import Connection

# The part of the time that later figures are compared with.
FIRST = 0.1
ROUND_SECONDS = 1.0
LATE_AFTER = 0.9
# Nothing changed for so long, or not even then.
SETTLED_SECONDS = 0.5
SETTLE_SECONDS = 10.0


def soak(server: Server, effort: Effort, _: bool) -> Sample:
    """Small, cached, large and abandoned queries, watchers and channels, each in a thread."""
    latencies: list[tuple[float, list[float]]] = []
    memory: list[int] = []
    failed: list[str] = []
    load.many_at_once(server, ONE, effort.warm_up, 8, 4)
    load.many_at_once(server, ONE, effort.warm_up, 8, 4, persist=True)
    usage = server.usage
    quiet = _settled(usage)
    began = perf_counter()

    def passed() -> float:
        return (perf_counter() - began) / effort.soak

    def small() -> None:
        at = passed()
        asked = load.many_at_once(server, ONE, ROUND_SECONDS, 8, 4)
        latencies.append((at, asked.latencies))

    def repeated(name: str, work: Callable[[], object]) -> None:
        try:
            while passed() < 1 and not failed:
                work()
        except Exception as error:  # Whatever it is, the soak has failed and says with what.
            seconds = perf_counter() - began
            failed.append(f"{name} after {seconds:.0f} s: {type(error).__name__}: {error}")

    works: dict[str, Callable[[], object]] = {
        "small queries": small,
        "cached ones": lambda: load.many_at_once(server, ONE, ROUND_SECONDS, 4, 4, persist=True),
        "large ones": lambda: _large(server),
        "abandoned ones": lambda: _abandoned(server),
        "watchers": lambda: _watched(server),
        "channels": lambda: hub.fan_out(server.port, 100, ROUND_SECONDS),
    }
    threads = [threading.Thread(target=repeated, args=work, daemon=True) for work in works.items()]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(usage.memory())
        sleep(min(1.0, effort.soak / 50))
    if failed:
        raise ServerFailed("; ".join(failed))
    found = _summary(latencies, memory, perf_counter() - began)
    after = _settled(usage)
    return {
        **found,
        "descriptors": after[0] - quiet[0],
        "threads": after[1] - quiet[1],
    }


def _settled(usage: Usage) -> tuple[int, int]:
    """Its descriptors and threads when the clients that have gone are cleared away."""
    until = perf_counter() + SETTLE_SECONDS
    found = usage.descriptors(), usage.threads()
    since = perf_counter()
    while perf_counter() < min(until, since + SETTLED_SECONDS):
        sleep(0.05)
        now = usage.descriptors(), usage.threads()
        if now != found:
            found, since = now, perf_counter()
    return found


def _summary(
    latencies: list[tuple[float, list[float]]], memory: list[int], seconds: float
) -> Sample:
    if not latencies:
        raise WrongAnswer(f"no small answer within {seconds:.0f} s")
    early = load.p99([one for at, some in latencies if at <= FIRST for one in some])
    # On a busy machine the last round may have begun before.
    latest = min(LATE_AFTER, latencies[-1][0])
    late = load.p99([one for at, some in latencies if at >= latest for one in some])
    count = len(memory)
    first, half = memory[int(count * FIRST)], memory[count // 2 : count * 6 // 10]
    return {
        "rate": sum(len(some) for _, some in latencies) / seconds,
        "p99": late * 1e3,
        "late": late / early,
        "memory": first / 1e6,
        "growth": (median(memory[int(count * LATE_AFTER) :]) - median(half)) / 1e6,
    }


def _large(server: Server) -> None:
    with server.connect() as connection:
        server.stream(connection, MIXED)
        server.stream(connection, counted(2_000_000))
        server.decode(connection, counted(100_000))


def _abandoned(server: Server) -> None:
    """Clients that go while their answers are under way."""
    for _ in range(10):
        with Connection(server.port) as connection:
            sql = counted(30_000_000).sql
            connection.send(load.as_message("arrow", sql=sql, queryId="gone", stream=True))
            connection.receive(Whole())


def _watched(server: Server) -> None:
    with Connection(server.port) as connection:
        load.execute(connection, "drop table if exists watched")
    changes.watch(server.port, 50, 10)
