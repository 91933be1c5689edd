"""The workloads, as they are put on a running server. Each returns the figures of its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from . import changes, footprint, growth, hooks, hub, load, rooms, soak
from .answers import LARGE, MIXED, ONE, gigabyte, numbered
from .load import Sample
from .plan import Effort
from .replies import Whole
from .servers import Server, apart, run_module, running
from .websocket import Connection

CONNECTIONS, IN_FLIGHT = 8, 4
STREAMS = 50
OTHER_STREAMS = 10
CHUNKED_PAIRS = 3
DISK_PAIRS = 5
EQUAL_QUERIES = 1000
WATCHERS = 1000
SUBSCRIBERS = 200
CHANGES = 10
SUBSCRIBED = 1000
STALLED_OF = 100
STALLED_MESSAGES = 10_000
IDLE_SUBSCRIBED = 2000
SYNC = ("--sync", "--db-path", "bench.duckdb")
ROOM_SIZE = 5_000_000

# Bytes under way: of a chunked result, and of an upload, where the server allows 32 MiB.
WINDOW = 16 << 20
UPLOAD_WINDOW = 32 << 20

Run = Callable[[Server, Effort, bool], Sample | Iterator[Sample]]
"""Takes a fresh server, the effort, and whether to decode the answer even where that is dear.

Returns all figures, or hands out some after others.
"""


def _one(server: Server, effort: Effort, _: bool) -> Sample:
    answers = server.answers(ONE)
    with server.connect() as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up, answers)
        return load.one_at_a_time(connection, ONE, effort.window, answers).sample()


def _many(server: Server, effort: Effort, _: bool) -> Sample:
    load.many_at_once(server, ONE, effort.warm_up, CONNECTIONS, IN_FLIGHT)
    return load.many_at_once(server, ONE, effort.window, CONNECTIONS, IN_FLIGHT).sample()


def _mixed(server: Server, effort: Effort, _: bool) -> Sample:
    with server.connect() as connection:
        server.decode(connection, MIXED)
        answers = [server.stream(connection, MIXED) for _ in range(effort.mixed_answers)]
    return {
        "mbps": median(answer.megabytes_per_second for answer in answers),
        "seconds": median(answer.seconds for answer in answers),
    }


def _large(server: Server, effort: Effort, decode: bool) -> Sample:
    query = server.version_of(LARGE)
    with server.connect() as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up, server.answers(ONE))
        before = server.usage.memory()
        server.usage.reset_peak()
        answer = server.stream(connection, query)
        growth = server.usage.peak_memory() - before
        if decode:
            server.decode(connection, query)
    return large_sample(answer, growth)


def large_sample(answer: load.Stream, growth: int) -> Sample:
    """The figures of a large answer that made a process grow by so many bytes."""
    return {
        "first": answer.first_byte * 1e3,
        "rows": answer.first_rows * 1e3,
        "mbps": answer.megabytes_per_second,
        "growth": growth / 1e6,
    }


def _chunked(server: Server, effort: Effort, _: bool) -> Sample:
    with Connection(server.port) as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up)
        pairs = [
            (load.stream(connection, LARGE), load.chunked_stream(connection, LARGE, WINDOW))
            for _ in range(CHUNKED_PAIRS)
        ]
    one = median(first.megabytes_per_second for first, _ in pairs)
    chunked = median(second.megabytes_per_second for _, second in pairs)
    client = load.first_rows_of_client(server.port, LARGE)
    return {"mbps": chunked, "share": chunked / one, "client": client}


def _streams(server: Server, effort: Effort, _: bool) -> Sample:
    with Connection(server.port) as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up)
        queries = [numbered(number) for number in range(STREAMS)]
        rate = load.streams_at_once(connection, queries)
    with Connection(server.port) as connection:
        cancelled = load.cancel_among_streams(connection, LARGE, OTHER_STREAMS)
    return {"mbps": rate, "cancel": cancelled * 1e3}


def _upload(server: Server, effort: Effort, _: bool) -> Sample:
    with Connection(server.port) as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up)
        return {"mbps": load.upload(connection, gigabyte(), UPLOAD_WINDOW)}


def _cached(server: Server, effort: Effort, _: bool) -> Sample:
    def rate(seconds: float, **options: bool) -> float:
        asked = load.many_at_once(server, ONE, seconds, CONNECTIONS, IN_FLIGHT, **options)
        return asked.sample()["qps"]

    load.many_at_once(server, ONE, effort.warm_up, CONNECTIONS, IN_FLIGHT)
    run = rate(effort.window)
    load.many_at_once(server, ONE, effort.warm_up, CONNECTIONS, IN_FLIGHT, persist=True)
    hit = rate(effort.window, persist=True)
    with Connection(server.port) as connection:
        disk = changes.from_disk(connection, DISK_PAIRS)
    return {
        "qps": hit,
        "share": hit / run,
        "aggregate": disk["run"] * 1e3,
        "disk": disk["run"] / disk["hit"],
    }


def _burst(server: Server, effort: Effort, _: bool) -> Sample:
    alone, together = changes.burst(server.port, EQUAL_QUERIES)
    return {"seconds": together, "share": together / alone}


def _watch(server: Server, effort: Effort, _: bool) -> Sample:
    told = changes.watch(server.port, WATCHERS, CHANGES)
    return {
        "median": median(one.median() for one in told) * 1e3,
        "last": median(one.last() for one in told) * 1e3,
    }


def _live(server: Server, effort: Effort, _: bool) -> Sample:
    alone = changes.live(server.port, server.usage, 1, CHANGES)[1]
    with running(server.environment) as another:
        told, together = changes.live(another.port, another.usage, SUBSCRIBERS, CHANGES)
    return {"last": median(one.last() for one in told) * 1e3, "cpu": together / alone}


def _fan_out(server: Server, effort: Effort, _: bool) -> Sample:
    with apart(server.usage):
        return hub.fan_out(server.port, SUBSCRIBED, effort.window).sample()


def _stalled(server: Server, effort: Effort, _: bool) -> Sample:
    seconds = hub.stalled(server.port, STALLED_OF, STALLED_OF // 10, STALLED_MESSAGES)
    return {"rate": STALLED_MESSAGES / seconds}


def _subscribed(server: Server, effort: Effort, _: bool) -> Sample:
    size, cpu = hub.subscribed(server.port, server.usage, IDLE_SUBSCRIBED, effort.idle)
    return {"size": size / 1e3, "cpu": cpu * 100}


def _rooms(server: Server, effort: Effort, _: bool) -> Sample:
    def edits(each: int, in_flight: int, *, in_batches: bool = False) -> float:
        with running(server.environment, *SYNC) as kept:
            return rooms.edits(kept.port, each, in_flight=in_flight, in_batches=in_batches)

    with running(server.environment, *SYNC) as kept:
        size, seconds = rooms.join(kept.port, ROOM_SIZE, with_version=server.is_ours)
    return {
        "rate": edits(2 * effort.edits, 16),
        "lone": edits(effort.edits, 1),
        # Ours acknowledges several at once; the other one takes as many, and acks each.
        "flood": edits(8 * effort.edits, 256, in_batches=server.is_ours),
        "size": size / 1e3,
        "join": seconds * 1e3,
    }


def _plugins(server: Server, effort: Effort, _: bool) -> Sample:
    def plugin(name: str) -> tuple[str, str]:
        return "--plugin", f"{hooks.PLUGINS}:{name}"

    with (
        running(server.environment, *plugin("hooks")) as hooked,
        running(server.environment, *plugin("guard")) as guarded,
        running(server.environment, *plugin("sleeper")) as sleeping,
    ):
        ports = (server.port, hooked.port, guarded.port)
        alone, chain, guard = hooks.in_turn(ports, effort.window)
        quiet, beside = hooks.beside_sleepers(sleeping.port, effort.window)
    return {
        "none": median(alone) * 1e3,
        "hooks": hooks.ratio(chain, alone),
        "authorize": hooks.ratio(guard, alone),
        "quiet": load.p99(quiet) * 1e3,
        "sleeps": load.p99(beside) * 1e3,
    }


def _parts(server: Server, effort: Effort, _: bool) -> Sample:
    return run_module(server.environment, "timeline", seconds=90.0)


def _idle(server: Server, effort: Effort, _: bool) -> Sample:
    with server.connect() as connection:
        load.one_at_a_time(connection, ONE, effort.warm_up, server.answers(ONE))
        connection.idle(effort.settle, Whole())
        before = server.usage.cpu_seconds()
        connection.idle(effort.idle, Whole())
        used = server.usage.cpu_seconds() - before
    return {"cpu": used / effort.idle * 100}


RUNS: dict[str, Run] = {
    "one": _one,
    "many": _many,
    "clients": growth.clients,
    "mixed": _mixed,
    "tpch": growth.heavy,
    "large": _large,
    "rows": growth.rows,
    "chunked": _chunked,
    "streams": _streams,
    "upload": _upload,
    "cached": _cached,
    "burst": _burst,
    "watch": _watch,
    "live": _live,
    "fanout": _fan_out,
    "stalled": _stalled,
    "subscribed": _subscribed,
    "rooms": _rooms,
    "plugins": _plugins,
    "parts": _parts,
    "idle": _idle,
    "start": footprint.start,
    "memory": footprint.memory,
    "soak": soak.soak,
}
