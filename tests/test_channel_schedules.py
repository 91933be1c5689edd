"""Random schedules of subscribing, saying, querying, reading late and leaving.

``SQLROOMS_HUB=200`` runs that many of them.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.channel_model import Client, check, masked, pump
from tests.conftest import ServerProcess
from tests.wire import DEADLINE

SCHEDULES = int(os.environ.get("SQLROOMS_HUB", "2"))
STEPS = 150
SIZES = [1] * 20 + [16_000, 16_300, 16_384, 16_500, 50_000, 65_400, 200_000, 589_700, 589_900]
LARGE = [1_100_000, 1_500_000]
QUERIES: list[dict[str, Any]] = [
    {"type": "json", "sql": "select 1 as a"},
    {"type": "arrow", "sql": "select 1 as a"},
    {"type": "arrow", "sql": "select range as a from range(300000)"},
    {"type": "arrow", "sql": "select range as a from range(300000)", "stream": True},
    {"type": "json", "sql": "select range as a from range(50000)"},
]


class Schedule:
    """One of them. All it decides follows from its seed."""

    def __init__(self, seed: int, port: int) -> None:
        self.random = random.Random(seed)
        self.port = port
        self.prefix = f"s{seed}-"
        self.channels = [f"{self.prefix}{number}" for number in range(self.random.choice((1, 3)))]
        if self.random.random() < 0.3:
            self.channels += [f"{self.prefix}many-{number}" for number in range(70)]
        self.said = 0
        self.bytes = 0
        self.observer = self.client()
        for channel in self.channels:
            self.observer.send(self.observer.ask(type="subscribe", channel=channel, recover=True))
        self.clients = [self.client() for _ in range(self.random.randint(2, 7))]
        self.gone: list[Client] = []
        self.ids = {client: self.hello(client) for client in self.clients}

    def client(self) -> Client:
        return Client(f"c{self.random.getrandbits(40)}", self.port)

    def hello(self, client: Client) -> str:
        client.send(masked(1, b'{"type": "hello"}'))
        self.until(lambda: bool(client.heard))
        name: str = client.heard[-1]["connectionId"]
        return name

    @property
    def everybody(self) -> list[Client]:
        return [self.observer, *self.clients]

    def until(self, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not is_done():
            assert time.monotonic() < end, "something never came"
            pump([self.observer, *getattr(self, "clients", [])], 0.1)

    def payload(self, sender: str) -> list[Any]:
        self.said += 1
        size = self.random.choice(SIZES if self.random.random() < 0.97 else LARGE)
        # What waits for those who read late must stay below what may wait.
        if self.bytes > 12 << 20:
            size = 1
        self.bytes += size
        return [sender, self.said, "x" * size]

    def step(self) -> None:
        choose = self.random
        client = choose.choice(self.clients)
        done = choose.random()
        if done < 0.85:
            count = choose.choice((1, 1, 2, 3, 8, 40))
            client.send(b"".join(self.action(client) for _ in range(count)))
        elif done < 0.93:
            client.reads = not client.reads
            if client.reads:
                self.bytes = 0
                for other in self.clients:
                    other.reads = True
                self.until(lambda: not any(one.waits for one in self.everybody))
        elif done < 0.96:
            self.leave(client)
            self.clients.append(self.client())
            self.ids[self.clients[-1]] = self.hello(self.clients[-1])
        pump(self.everybody, 0.001)

    def action(self, client: Client) -> bytes:
        choose = self.random
        channel = choose.choice(self.channels)
        done = choose.random()
        if done < 0.5:
            return client.ask(type="notify", channel=channel, payload=self.payload(client.name))
        if done < 0.6:
            to = {"connection": self.ids[choose.choice(self.clients)]}
            payload = self.payload(client.name)
            return client.ask(type="notify", channel=channel, payload=payload, to=to)
        if done < 0.75:
            recover = choose.random() < 0.4
            return client.ask(type="subscribe", channel=channel, recover=recover)
        if done < 0.8:
            return self.resume(client, channel)
        if done < 0.92:
            said = client.ask(type="notify", channel=channel, payload=self.payload(client.name))
            return said + client.ask(type="unsubscribe", channel=channel)
        if done < 0.97:
            return client.ask(**choose.choice(QUERIES))
        return b"".join(client.ping() for _ in range(choose.choice((1, 50))))

    def resume(self, client: Client, channel: str) -> bytes:
        leaves = client.ask(type="unsubscribe", channel=channel)
        offsets = [
            message["offset"]
            for message in self.observer.heard[-200:]
            if message.get("channel") == channel and "offset" in message
        ]
        since = {"since": self.random.choice(offsets)} if offsets else {}
        return leaves + client.ask(type="subscribe", channel=channel, recover=True, **since)

    def leave(self, client: Client) -> None:
        self.clients.remove(client)
        self.gone.append(client)
        client.end(reset=self.random.random() < 0.5)

    def post(self, bodies: list[tuple[str, str]]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        for channel, body in bodies:
            connection.request("POST", f"/channels/{channel}", body, JSON)
            assert connection.getresponse().read()
        connection.close()

    def run(self) -> None:
        self.until(lambda: not self.observer.waits)
        choose = self.random
        bodies = [
            (choose.choice(self.channels), json.dumps(["http", number, "x"]))
            for number in range(1, 60)
        ]
        poster = threading.Thread(target=self.post, args=(bodies,))
        poster.start()
        for _ in range(STEPS):
            self.step()
        for client in self.clients:
            client.reads = True
        self.until(lambda: not poster.is_alive())
        self.until(lambda: not any(client.waits for client in self.everybody))
        # Those that are answered now have been sent all before.
        for client in self.everybody:
            client.send(client.ask(type="json", sql="select 1"))
        self.until(lambda: not any(client.waits for client in self.everybody))
        self.check()
        for client in self.everybody:
            client.end()

    def check(self) -> None:
        order: dict[str, list[Any]] = {channel: [] for channel in self.channels}
        for message in self.observer.heard:
            if message["type"] == "notify":
                order[message["channel"]].append(message["payload"])
        for said in order.values():
            assert len(set(said)) == len(said)
            for sender in {sender for sender, _ in said}:
                numbers = [number for name, number in said if name == sender]
                assert numbers == sorted(numbers)
        for client in self.everybody:
            assert not client.is_over, (client.name, client.close_code)
        for client in [*self.everybody, *self.gone]:
            check(client, order)
            for message in client.heard:
                if "delivered" in message:
                    self.check_target(client.asked[message["queryId"]], message["delivered"])

    def check_target(self, asked: dict[str, Any], delivered: int) -> None:
        for client in self.clients:
            if self.ids[client] == asked["to"]["connection"]:
                said = tuple(asked["payload"][:2])
                heard = [one for one in client.heard if one.get("payload") == said]
                assert len(heard) == delivered, said


JSON = {"Content-Type": "application/json"}


@pytest.mark.timeout(60 + 20 * SCHEDULES)
def test_random_schedules(serve: Callable[..., ServerProcess]) -> None:
    options = ("--max-notify-size", "2MiB", "--notify-rate", "0", "--no-cache")
    server = serve(*options, "--channel-history", "50", "--max-in-flight", "10000")
    first = random.SystemRandom().getrandbits(30) if SCHEDULES > 2 else 1
    for seed in range(first, first + SCHEDULES):
        try:
            Schedule(seed, server.port).run()
        except BaseException as error:
            error.args = (f"seed {seed}: {error}",)
            raise
        assert server.process.poll() is None
    assert server.stop(signal.SIGTERM) == 0
    assert "Traceback" not in server.errors
