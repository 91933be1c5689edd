"""Load for what follows from changes: cached results, watched tables and live queries."""

from __future__ import annotations

import json
import selectors
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from .answers import WrongAnswer
from .load import as_message, execute
from .replies import Message, Whole, arrow_header
from .servers import Usage
from .websocket import SILENCE, Connection, Disconnected

_TABLE = "create table numbers as select range as a, range % 500000 as g from range(5000000)"
_AGGREGATE = "select g, sum(a) as total, max(a) as most from numbers group by g"
_SLOW = "select sum(sqrt(a) * sin(a)) as total from numbers"


def from_disk(connection: Connection, repetitions: int) -> dict[str, float]:
    """A result of 12 MB that is computed, and that is read from disk: seconds of both."""
    execute(connection, _TABLE)
    ran, hit = [], []
    _ask(connection, _AGGREGATE, persist=True)
    for _ in range(repetitions):
        seconds, header, size = _ask(connection, _AGGREGATE)
        ran.append(seconds)
        seconds, header, cached_size = _ask(connection, _AGGREGATE, persist=True)
        if not header.get("cached") or cached_size < 10e6 or abs(cached_size - size) > size / 10:
            raise WrongAnswer(f"{cached_size} bytes beside {size}, {header}")
        hit.append(seconds)
    return {"run": median(ran), "hit": median(hit)}


def burst(port: int, count: int) -> tuple[float, float]:
    """Seconds of one slow query, and of `count` equal ones at once, which run once."""
    connections = 20
    with ExitStack() as stack:
        clients = [stack.enter_context(Connection(port)) for _ in range(connections)]
        execute(clients[0], _TABLE)
        alone, _, _ = _ask(clients[0], _SLOW)
        asked = perf_counter()
        for number in range(count):
            question = as_message("arrow", sql=_SLOW, queryId=str(number), persist=True)
            clients[number % connections].send(question)
        with _selected(clients) as replies:
            for _ in range(count):
                _header(next(replies)[1])
        together = perf_counter() - asked
        clients[0].send(as_message("cacheStats"))
        stats = json.loads(_next(clients[0])[1])
    if stats["misses"] != 1 or stats["hits"] + stats["joined"] != count - 1:
        raise WrongAnswer(f"{count} equal queries did not run once: {stats}")
    return alone, together


@dataclass(frozen=True)
class Told:
    """When each of many clients heard of a change, in seconds after it was asked for."""

    latencies: list[float]

    def median(self) -> float:
        return median(self.latencies)

    def last(self) -> float:
        return max(self.latencies)


def watch(port: int, watchers: int, changes: int) -> list[Told]:
    """Change a table that many connections watch, again when all of them know."""
    with ExitStack() as stack:
        writer = stack.enter_context(Connection(port))
        execute(writer, "create table watched (n integer)")
        clients = [stack.enter_context(Connection(port)) for _ in range(watchers)]
        for client in clients:
            client.send(as_message("watch", tables=["watched"]))
            if json.loads(_next(client)[1])["type"] != "watching":
                raise WrongAnswer("watch was not answered")
        with _selected([writer, *clients]) as replies:
            return [_change(replies, writer, "watched", watchers) for _ in range(changes)]


def live(port: int, usage: Usage, subscribers: int, changes: int) -> tuple[list[Told], float]:
    """Change what a live query reads that many connections follow; and CPU seconds a change."""
    sql = f"select (select count(*) from followed) as n, ({_SLOW}) as total"
    with ExitStack() as stack:
        writer = stack.enter_context(Connection(port))
        execute(writer, f"{_TABLE}; create table followed (n integer)")
        clients = [stack.enter_context(Connection(port)) for _ in range(subscribers)]
        for client in clients:
            client.send(as_message("live", sql=sql, queryId="live"))
        with _selected([writer, *clients]) as replies:
            for _ in clients:
                _header(next(replies)[1])
            before = usage.cpu_seconds()
            told = [_change(replies, writer, "followed", subscribers) for _ in range(changes)]
            return told, (usage.cpu_seconds() - before) / changes


def _change(
    replies: Iterator[tuple[Connection, Message]], writer: Connection, table: str, clients: int
) -> Told:
    """Insert a row into `table`; every one of `clients` must get one message."""
    told: dict[Connection, float] = {}
    acknowledged = False
    asked = perf_counter()
    writer.send(as_message("exec", sql=f"insert into {table} values (1)", queryId="change"))
    while len(told) < clients or not acknowledged:
        connection, (binary, data) = next(replies)
        if connection is writer:
            acknowledged = json.loads(data)["type"] == "ok"
            continue
        if connection in told or (not binary and table not in json.loads(data)["tables"]):
            raise WrongAnswer(f"a change was followed by {bytes(data[:300])!r}")
        told[connection] = perf_counter() - asked
    return Told(list(told.values()))


def _ask(connection: Connection, sql: str, **options: Any) -> tuple[float, dict[str, Any], int]:
    """Seconds, header and size of the answer."""
    asked = perf_counter()
    connection.send(as_message("arrow", sql=sql, queryId="ask", **options))
    reply = _next(connection)
    seconds = perf_counter() - asked
    return seconds, _header(reply), len(reply[1])


def _next(connection: Connection) -> Message:
    whole = Whole()
    while not whole.messages:
        connection.receive(whole)
    return whole.messages[0]


def _header(reply: Message) -> dict[str, Any]:
    binary, data = reply
    if not binary:
        raise WrongAnswer(f"a query was answered with {bytes(data[:300])!r}")
    return arrow_header(data[: 4 + int.from_bytes(data[:4], "big")])


@contextmanager
def _selected(
    connections: Sequence[Connection],
) -> Iterator[Iterator[tuple[Connection, Message]]]:
    """The messages of many connections, as they come."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ, Whole())

        def arriving() -> Iterator[tuple[Connection, Message]]:
            while True:
                ready = selector.select(SILENCE)
                if not ready:
                    raise Disconnected(f"no answer within {SILENCE:.0f} s")
                for key, _ in ready:
                    connection: Any = key.fileobj
                    connection.receive(key.data)
                    for reply in key.data.take():
                        yield connection, reply

        yield arriving()
