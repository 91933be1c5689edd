"""How the cost of an answer grows with clients, rows and work. Each returns the figures found."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from . import load, tpch
from .answers import ONE, Query, counted
from .load import Sample, Stream
from .plan import CLIENTS, Effort
from .servers import Server

HEAVY_CLIENTS = 16
# Small answers are asked for again, as long as that takes no longer than this.
REPEAT_SECONDS = 0.5
REPEAT_MOST = 20


def clients(server: Server, effort: Effort, _: bool) -> Sample:
    """`select 1`, one at a time on each of many connections: rate `q` and p99 in ms `p`."""
    load.many_at_once(server, ONE, effort.warm_up, CLIENTS[-1], 1)
    sample: Sample = {}
    for count in CLIENTS:
        found = load.many_at_once(server, ONE, effort.window, count, 1).sample()
        sample[f"q{count}"], sample[f"p{count}"] = found["qps"], found["p99"]
    sample["p99"] = sample["p512"] / sample["p64"]
    return sample


def heavy(server: Server, effort: Effort, _: bool) -> Sample:
    """Queries of TPC-H, each asked by 16 clients one at a time."""
    sample: Sample = {}
    for name, query in tpch.QUERIES.items():
        load.many_at_once(server, query, 0, 1, 1, late=True)
        asked = load.many_at_once(server, query, effort.window, HEAVY_CLIENTS, 1, late=True)
        sample[name] = asked.sample()["qps"]
    return sample


def rows(server: Server, effort: Effort, _: bool) -> Sample:
    """Two columns of integers: MB/s `r` and ms `s` of answers with so many rows."""
    with server.connect() as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up, server.answers(ONE))
        return by_rows(effort, lambda query: server.stream(connection, server.version_of(query)))


def by_rows(effort: Effort, ask: Callable[[Query], Stream]) -> Sample:
    """The figures of `rows`, from whatever answers."""
    sample: Sample = {}
    for count in effort.rows:
        query, found = counted(count), list[Stream]()
        until = perf_counter() + REPEAT_SECONDS
        while not found or (perf_counter() < until and len(found) < REPEAT_MOST):
            found.append(ask(query))
        sample[f"r{count}"] = median(answer.megabytes_per_second for answer in found)
        sample[f"s{count}"] = median(answer.seconds for answer in found) * 1e3
    return sample
