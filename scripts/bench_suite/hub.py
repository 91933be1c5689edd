"""Load for channels: many subscribers, one publisher. Times are in seconds.

A subscriber costs this process one call of the kernel for each time it has something to read:
what it got is counted in bytes, of messages that are all of one size, and checked at the end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from .answers import WrongAnswer
from .load import Sample, as_message, p99
from .replies import Whole
from .servers import Usage, apart
from .websocket import READ_SIZE, SILENCE, Connection, Disconnected

CHANNEL = "bench"
# Messages that are sent before the next ones are: while some stall, and in a small burst.
STALLED_BURST = 100
SMALL_BURST = 8


@dataclass(frozen=True)
class FanOut:
    """Deliveries per second, and when each of them arrived after it was sent; then in bursts."""

    rate: float
    latencies: list[float]
    burst_rate: float

    def sample(self) -> Sample:
        return {"rate": self.rate, "p99": p99(self.latencies) * 1e3, "burst": self.burst_rate}


def fan_out(port: int, subscribers: int, seconds: float) -> FanOut:
    """Publish one message after the other, each when all subscribers have the one before."""
    with ExitStack() as stack:
        publisher = _Publisher(stack.enter_context(Connection(port)))
        connections = [stack.enter_context(Connection(port)) for _ in range(subscribers)]
        hearers = _Hearers(connections)
        _subscribe(connections)
        asked = publisher.publish(0, 1)
        publisher.settle()
        hearers.expect(publisher.size, asked)

        def say(first: int, count: int) -> list[float]:
            asked = publisher.publish(first, count)
            latencies = hearers.expect(count * publisher.size, asked)
            publisher.settle()
            return latencies

        return _repeat(say, hearers, seconds)


def bare_fan_out(subscribers: int, seconds: float) -> FanOut:
    """The same from a process that does nothing but hand each message to each socket."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=subscribers))
        sender = multiprocessing.get_context("fork").Process(
            target=_hand_on, args=(listener, subscribers), daemon=True
        )
        sender.start()
        stack.callback(sender.kill)
        assert sender.pid is not None
        stack.enter_context(apart(Usage(sender.pid)))

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(listener.getsockname()))

        hearers = _Hearers([connect() for _ in range(subscribers)])
        publisher = connect()

        def say(first: int, count: int) -> list[float]:
            messages = b"".join(_frame(number) for number in range(first, first + count))
            asked = perf_counter()
            publisher.sendall(messages)
            return hearers.expect(len(messages), asked)

        say(0, 1)
        return _repeat(say, hearers, seconds)


def _repeat(say: Callable[[int, int], list[float]], hearers: _Hearers, seconds: float) -> FanOut:
    """Let `say` send so and so many messages from a number on, one by one and in bursts."""
    number = 1
    latencies: list[float] = []
    began = perf_counter()
    while perf_counter() < began + seconds:
        latencies += say(number, 1)
        number += 1
    took = perf_counter() - began
    burst = 0
    began = perf_counter()
    while perf_counter() < began + seconds:
        burst += SMALL_BURST * len(say(number, SMALL_BURST))
        number += SMALL_BURST
    burst_took = perf_counter() - began
    hearers.check(number - 1)
    return FanOut(len(latencies) / took, latencies, burst / burst_took)


def _frame(number: int) -> bytes:
    """A message as a server sends it."""
    payload = json.dumps({"type": "notify", "channel": CHANNEL, "payload": _numbered(number)})
    return bytes([0x81, 126, 0, len(payload)]) + payload.encode()


def _hand_on(listener: socket.socket, subscribers: int) -> None:
    """Send what the last connection says to those before it."""
    hearers = [listener.accept()[0] for _ in range(subscribers)]
    for hearer in hearers:
        hearer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sends = [hearer.send for hearer in hearers]
    publisher = listener.accept()[0]
    while data := publisher.recv(1 << 20):
        for send in sends:
            send(data)


def stalled(port: int, subscribers: int, stalled_ones: int, messages: int) -> float:
    """Publish while some subscribers do not read; seconds until all others have everything.

    The stalled ones read afterwards. Nobody may miss a message or get one twice.
    """
    with ExitStack() as stack:
        publisher = _Publisher(stack.enter_context(Connection(port)))
        connections = [stack.enter_context(Connection(port)) for _ in range(subscribers)]
        hearers = _Hearers(connections[stalled_ones:])
        asleep = connections[:stalled_ones]
        _subscribe(connections)
        began = publisher.publish(0, 1)
        publisher.settle()
        hearers.expect(publisher.size, began)
        for first in range(1, messages, STALLED_BURST):
            count = min(STALLED_BURST, messages - first)
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
        _subscribe([stack.enter_context(Connection(port)) for _ in range(connections)])
        grown = usage.memory() - before
        idle.idle(0.5, Whole())
        used = usage.cpu_seconds()
        idle.idle(seconds, Whole())
        return grown / connections, (usage.cpu_seconds() - used) / seconds


def _subscribe(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.send(as_message("subscribe", channel=CHANNEL))
    for connection in connections:
        whole = Whole()
        while not whole.messages:
            connection.receive(whole)
        answer = json.loads(whole.messages[0][1])
        if answer != {"type": "subscribed", "channel": CHANNEL}:
            raise WrongAnswer(f"subscribe was answered with {answer}")


class _Socket(Protocol):
    """What can be read from."""

    def fileno(self) -> int: ...


class _Hearers:
    """Subscribers that read what is there and count it."""

    def __init__(self, connections: Sequence[_Socket]) -> None:
        self._numbers = [connection.fileno() for connection in connections]
        self._last: dict[int, bytes] = {}
        # One for all reads: to allocate as much for each costs more than the read.
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._epoll = select.epoll()
        for number in self._numbers:
            self._epoll.register(number, select.EPOLLIN)

    def expect(self, size: int, asked: float) -> list[float]:
        """Read until each has `size` bytes more; when after `asked` the last of them came."""
        missing = dict.fromkeys(self._numbers, size)
        latencies: list[float] = []
        while missing:
            # Without sleep: or the server pays, now and then, for waking this process each time.
            ready = self._epoll.poll(0)
            if not ready and perf_counter() > asked + SILENCE:
                raise Disconnected(f"no message within {SILENCE:.0f} s")
            for number, _ in ready:
                length = os.readv(number, [self._buffer])
                self._last[number] = bytes(self._buffer[:length])
                missing[number] -= length
                if missing[number] <= 0 or not length:
                    latencies.append(perf_counter() - asked)
                    if missing.pop(number):
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
