"""Load for channels: many subscribers, one publisher. Times are in seconds.

A subscriber costs this process one call of the kernel for each time it has something to read:
what it got is counted in bytes, of messages that are all of one size, and checked at the end.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from .answers import WrongAnswer
from .load import as_message
from .replies import Whole
from .servers import Usage
from .websocket import SILENCE, Connection, Disconnected

CHANNEL = "bench"
BURST = 100


@dataclass(frozen=True)
class FanOut:
    """Deliveries per second, and when each of them arrived after it was sent."""

    rate: float
    latencies: list[float]

    def p99(self) -> float:
        return sorted(self.latencies)[len(self.latencies) * 99 // 100]


def fan_out(port: int, subscribers: int, seconds: float) -> FanOut:
    """Publish one message after the other, each when all subscribers have the one before."""
    with ExitStack() as stack:
        publisher = _Publisher(stack.enter_context(Connection(port)))
        hearers = _Hearers([stack.enter_context(Connection(port)) for _ in range(subscribers)])
        hearers.subscribe()
        asked = publisher.publish(0, 1)
        publisher.settle()
        hearers.expect(publisher.size, asked)
        latencies: list[float] = []
        began = perf_counter()
        number = 0
        while perf_counter() < began + seconds:
            number += 1
            asked = publisher.publish(number, 1)
            latencies += hearers.expect(publisher.size, asked)
            publisher.settle()
        took = perf_counter() - began
        hearers.check(number)
    return FanOut(len(latencies) / took, latencies)


def stalled(port: int, subscribers: int, stalled_ones: int, messages: int) -> float:
    """Publish while some subscribers do not read; seconds until all others have everything.

    The stalled ones read afterwards. Nobody may miss a message or get one twice.
    """
    with ExitStack() as stack:
        publisher = _Publisher(stack.enter_context(Connection(port)))
        connections = [stack.enter_context(Connection(port)) for _ in range(subscribers)]
        hearers = _Hearers(connections[stalled_ones:])
        asleep = connections[:stalled_ones]
        hearers.subscribe()
        _Hearers(asleep).subscribe()
        began = publisher.publish(0, 1)
        publisher.settle()
        hearers.expect(publisher.size, began)
        for first in range(1, messages, BURST):
            count = min(BURST, messages - first)
            asked = publisher.publish(first, count)
            hearers.expect(count * publisher.size, asked)
            publisher.settle()
        took = perf_counter() - began
        for connection in asleep:
            whole = Whole()
            while len(whole.messages) < messages:
                connection.receive(whole)
            said = [json.loads(data)["payload"] for _, data in whole.messages]
            if said != [_numbered(number) for number in range(messages)]:
                raise WrongAnswer("a stalled subscriber missed a message or got one twice")
    return took


def subscribed(port: int, usage: Usage, connections: int, seconds: float) -> tuple[float, float]:
    """Bytes that each of many idle subscribers costs, and CPU seconds a second of all of them."""
    with ExitStack() as stack:
        idle = stack.enter_context(Connection(port))
        idle.idle(0.5, Whole())
        before = usage.memory()
        hearers = _Hearers([stack.enter_context(Connection(port)) for _ in range(connections)])
        hearers.subscribe()
        grown = usage.memory() - before
        idle.idle(0.5, Whole())
        used = usage.cpu_seconds()
        idle.idle(seconds, Whole())
        return grown / connections, (usage.cpu_seconds() - used) / seconds


class _Hearers:
    """Subscribers that read what is there and count it."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._last: dict[int, bytes] = {}

    def subscribe(self) -> None:
        for connection in self._connections:
            connection.send(as_message("subscribe", channel=CHANNEL))
        for connection in self._connections:
            whole = Whole()
            while not whole.messages:
                connection.receive(whole)
            answer = json.loads(whole.messages[0][1])
            if answer != {"type": "subscribed", "channel": CHANNEL}:
                raise WrongAnswer(f"subscribe was answered with {answer}")

    def expect(self, size: int, asked: float) -> list[float]:
        """Read until each has `size` bytes more; when after `asked` the last of them came."""
        missing = dict.fromkeys((one.fileno() for one in self._connections), size)
        latencies: list[float] = []
        with select.epoll() as epoll:
            for number in missing:
                epoll.register(number, select.EPOLLIN)
            while missing:
                ready = epoll.poll(SILENCE)
                if not ready:
                    raise Disconnected(f"no message within {SILENCE:.0f} s")
                for number, _ in ready:
                    data = os.read(number, 1 << 20)
                    self._last[number] = data
                    missing[number] -= len(data)
                    if missing[number] <= 0:
                        latencies.append(perf_counter() - asked)
                        if not data or missing.pop(number) < 0:
                            raise WrongAnswer("a message came twice, or the connection was closed")
        return latencies

    def check(self, number: int) -> None:
        """The last message that each got is that one."""
        if any(_numbered(number).encode() not in data for data in self._last.values()):
            raise WrongAnswer("a subscriber got another message")


class _Publisher:
    """Says numbered messages, all of one size."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._whole = Whole()
        self._owed = 0
        self.size = 0

    def publish(self, first: int, count: int) -> float:
        """Send `count` messages; when that began."""
        messages = [
            as_message("notify", channel=CHANNEL, payload=_numbered(first + number))
            for number in range(count)
        ]
        asked = perf_counter()
        for message in messages:
            self._connection.send(message)
        self._owed += 2 * count
        return asked

    def settle(self) -> None:
        """Take its own copies, from which the size of a message is known, and the acks."""
        while len(self._whole.messages) < self._owed:
            self._connection.receive(self._whole)
        for _, data in self._whole.take():
            fields: dict[str, Any] = json.loads(data)
            if fields["type"] == "notify":
                self.size = len(data) + (2 if len(data) < 126 else 4)
        self._owed = 0


def _numbered(number: int) -> str:
    return f"message {number:08d} " + "x" * 80
