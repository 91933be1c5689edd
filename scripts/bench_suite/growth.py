"""How the cost of an answer grows with clients, rows and work.

Each hands out the figures of one point after the other, so that those of the first points remain
where a server does not get to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

from . import load, tpch
from .answers import ONE, Query, counted
from .load import Sample, Stream
from .plan import CLIENTS, Effort
from .servers import Server

HEAVY_CLIENTS = 16
# Enough for all threads, and few enough for every server.
WARM_UP_CLIENTS = 16
# Small answers are asked for again, as long as that takes no longer than this.
REPEAT_SECONDS = 0.5
REPEAT_MOST = 20


def clients(server: Server, effort: Effort, _: bool) -> Iterator[Sample]:
    """`select 1`, one at a time on each of many connections: rate `q` and p99 in ms `p`."""
    load.many_at_once(server, ONE, effort.warm_up, WARM_UP_CLIENTS, 1)
    p99: dict[int, float] = {}
    for count in CLIENTS:
        found = load.many_at_once(server, ONE, effort.window / 2, count, 1).sample()
        p99[count] = found["p99"]
        yield {f"q{count}": found["qps"], f"p{count}": p99[count]}
    yield {"p99": p99[512] / p99[64]}


def heavy(server: Server, effort: Effort, _: bool) -> Iterator[Sample]:
    """Queries of TPC-H, each asked by 16 clients one at a time."""
    for name, query in tpch.QUERIES.items():
        load.many_at_once(server, query, 0, 1, 1, late=True)
        asked = load.many_at_once(server, query, effort.window, HEAVY_CLIENTS, 1, late=True)
        yield {name: asked.sample()["qps"]}


def rows(server: Server, effort: Effort, _: bool) -> Iterator[Sample]:
    """Two columns of integers: MB/s `r` and ms `s` of answers with so many rows."""
    with server.connect() as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up, server.answers(ONE))
        yield from by_rows(
            effort, lambda query: server.stream(connection, server.version_of(query))
        )


def by_rows(effort: Effort, ask: Callable[[Query], Stream]) -> Iterator[Sample]:
    """The figures of `rows`, from whatever answers."""
    for count in effort.rows:
        query, found = counted(count), list[Stream]()
        until = perf_counter() + REPEAT_SECONDS
        while not found or (perf_counter() < until and len(found) < REPEAT_MOST):
            found.append(ask(query))
        yield {
            f"r{count}": median(answer.megabytes_per_second for answer in found),
            f"s{count}": median(answer.seconds for answer in found) * 1e3,
        }
