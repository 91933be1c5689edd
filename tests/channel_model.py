"""Clients of channels at the level of frames, and what each of them must have heard."""

from __future__ import annotations

import json
import selectors
import socket
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.wire import DEADLINE

_REQUEST = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
)


def masked(opcode: int, data: bytes) -> bytes:
    """A frame of a client, with a mask of zeros."""
    if len(data) < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | len(data))
    elif len(data) < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0xFE, len(data))
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0xFF, len(data))
    return head + bytes(4) + data


@dataclass(eq=False)
class Client:
    """One connection. ``heard`` is what came, in order, with payloads cut down to their ids."""

    name: str
    port: int
    heard: list[dict[str, Any]] = field(default_factory=list)
    # What it asked, by queryId.
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    answered: Counter[str] = field(default_factory=Counter)
    reads: bool = True
    is_over: bool = False
    close_code: int | None = None
    pings: int = 0
    pongs: int = 0

    def __post_init__(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), DEADLINE)
        self.socket.sendall(_REQUEST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        assert b" 101 " in head
        self.socket.setblocking(False)
        self._out = bytearray()
        self._in = bytearray()
        self._parts: list[bytes] = []

    def ask(self, **fields: Any) -> bytes:
        """A message with an id of its own, for :meth:`send`."""
        query_id = f"{len(self.asked)}"
        self.asked[query_id] = fields
        return masked(1, json.dumps({**fields, "queryId": query_id}).encode())

    def ping(self) -> bytes:
        self.pings += 1
        return masked(9, b"p" * 125)

    def send(self, data: bytes) -> None:
        self._out += data
        self.write()

    @property
    def events(self) -> int:
        if self.is_over:
            return 0
        wanted = selectors.EVENT_READ if self.reads else 0
        return wanted | (selectors.EVENT_WRITE if self._out else 0)

    @property
    def waits(self) -> bool:
        """Whether it was not told all that it must be told."""
        return not self.is_over and (
            len(self.answered) < len(self.asked) or self.pongs < self.pings
        )

    def write(self) -> None:
        try:
            while self._out:
                del self._out[: self.socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            # What it was sent before is still to be read.
            self._out.clear()

    def read(self) -> None:
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end()
        self._in += data
        while not self.is_over and self._take_frame():
            pass

    def end(self, *, reset: bool = False) -> None:
        self.is_over = True
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _take_frame(self) -> bool:
        if len(self._in) < 2:
            return False
        size, start = self._in[1], 2
        assert size < 128, "a mask: the frames are out of step"
        if size > 125:
            start = 4 if size == 126 else 10
            size = int.from_bytes(self._in[2:start], "big")
        if len(self._in) < start + size:
            return False
        first, data = self._in[0], bytes(self._in[start : start + size])
        del self._in[: start + size]
        opcode = first & 15
        assert not first & 0x70 and opcode in (0, 1, 2, 8, 9, 10), hex(first)
        if opcode == 8:
            self.close_code = int.from_bytes(data[:2], "big")
        elif opcode == 10:
            assert data == b"p" * 125
            self.pongs += 1
        elif opcode < 3:
            # A message begins when no other is under way, and only then.
            assert (opcode == 0) == bool(self._parts), "fragments of two messages"
            self._parts.append(data)
            if first & 0x80:
                self._take_message(b"".join(self._parts))
                self._parts = []
        return True

    def _take_message(self, data: bytes) -> None:
        if data[:1] == b"{":
            message = json.loads(data)
        else:
            end = 4 + int.from_bytes(data[:4], "big")
            message = json.loads(data[4:end])
        if message["type"] == "notify":
            sender, number, filler = message["payload"]
            assert not filler.strip("x")
            message["payload"] = sender, number
        self.heard.append(message)
        assert message["type"] != "error", message
        if message.get("last", True) and "queryId" in message:
            self.answered[message["queryId"]] += 1


def pump(clients: list[Client], seconds: float) -> None:
    """Let those who want to read and write do so once."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            if client.events:
                selector.register(client.socket, client.events, client)
        if not selector.get_map():
            return
        for key, events in selector.select(seconds):
            if events & selectors.EVENT_WRITE:
                key.data.write()
            if events & selectors.EVENT_READ:
                key.data.read()


def check(client: Client, order: dict[str, list[Any]]) -> None:
    """Whether ``client`` heard what it must, once, in the ``order`` of each channel.

    All of it if the connection is still there, else all before its end.
    """
    assert set(client.answered.values()) <= {1}
    # By channel: how it is heard, and the number that comes next if it must be a certain one.
    ways: dict[str, str] = {}
    following: dict[str, int] = {}
    own: dict[str, set[Any]] = defaultdict(set)
    last_of: Counter[Any] = Counter()
    places = {
        channel: {said: number for number, said in enumerate(all_said, 1)}
        for channel, all_said in order.items()
    }
    asks = client.asked.values()
    subscriptions = [a for a in asks if a["type"] in ("subscribe", "unsubscribe")]
    for message in client.heard:
        asked = client.asked.get(message.get("queryId", ""), {})
        kind, channel = message["type"], message.get("channel", "")
        if kind == "notify":
            said = message["payload"]
            number = places[channel].get(said)
            was_missed = "offset" in message and channel not in ways
            if said[0] == client.name and not was_missed:
                assert said not in own[channel], f"{said} came twice"
                own[channel].add(said)
            if number is None:
                # To this client only: where it stands among those of its sender.
                assert channel in ways
                assert last_of[channel, said[0]] < said[1]
            elif "offset" in message:
                assert int(message["offset"].partition("-")[2]) == number
                # What it missed begins anywhere. The subscription tells whether that is all.
                assert was_missed or ways[channel] == "numbered"
                assert number == following.get(channel, number)
                following[channel] = number + 1
            elif channel in ways:
                assert ways[channel] == "plain"
                assert number == following.get(channel, number)
                following[channel] = number + 1
            else:
                assert said[0] == client.name
            if channel in ways:
                last_of[channel, said[0]] = said[1]
        elif kind == "notifyAck" and "to" not in asked:
            assert tuple(asked["payload"][:2]) in own[channel], "acknowledged before its copy"
        elif kind in ("subscribed", "unsubscribed"):
            assert subscriptions.pop(0) == asked
            if kind == "unsubscribed":
                ways.pop(channel, None)
                following.pop(channel, None)
            elif "offset" in message:
                number = int(message["offset"].partition("-")[2])
                if "since" in asked and message["recovered"]:
                    since = int(asked["since"].partition("-")[2])
                    assert following.get(channel, since + 1) == number + 1
                assert channel not in following or following[channel] == number + 1
                ways[channel], following[channel] = "numbered", number + 1
            else:
                ways[channel] = "plain"
    if client.is_over or client.close_code is not None:
        return
    assert client.answered.keys() == client.asked.keys()
    assert not subscriptions
    for channel in ways:
        if channel in following:
            assert following[channel] == len(order[channel]) + 1, "messages are missing at the end"
