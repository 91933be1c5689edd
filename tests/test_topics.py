"""Channel messages that the library sends by itself, between everything else a client is sent."""

from __future__ import annotations

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from sqlrooms_server.transport import Connection, Topic
from tests.conftest import LocalServer
from tests.recorder import Recorder, open_connection
from tests.test_channels import said, subscribe
from tests.wire import DEADLINE, Arrow, Wire

LARGE = "select range as a, repeat('x', 20) as b from range(200000)"


def test_between_replies_of_every_kind(server: LocalServer) -> None:
    """Nothing comes between the fragments of a reply, and each channel keeps its order."""
    channels = ["a", "b", "c"]
    messages, replies = 600, 6
    with server.connect() as hearer, server.connect() as sender:
        for channel in channels:
            subscribe(hearer, channel, recover=channel == "b")

        def speak() -> None:
            for number in range(messages):
                payload = [number, "x" * (10, 20_000, 50_000)[number % 3]]
                sender.send(type="notify", channel=channels[number % 3], payload=payload)
                sender.receive(), sender.receive()

        speaker = threading.Thread(target=speak)
        speaker.start()
        for number in range(replies):
            hearer.send(type="arrow", sql=LARGE, queryId=f"whole {number}")
            hearer.send(type="arrow", sql=LARGE, queryId=f"chunks {number}", stream=True)
            hearer.send(type="json", sql="select 1 as a", queryId=f"small {number}")
        heard: dict[str, list[int]] = defaultdict(list)
        ended: set[str] = set()
        while sum(map(len, heard.values())) < messages or len(ended) < 3 * replies:
            frame = hearer.receive()
            if isinstance(frame, Arrow):
                if "seq" not in frame.header:
                    assert frame.table().num_rows == 200_000
                if frame.header.get("last", True):
                    ended.add(frame.header["queryId"])
            elif frame["type"] == "json":
                ended.add(frame["queryId"])
            else:
                heard[frame["channel"]].append(frame["payload"][0])
        speaker.join(DEADLINE)
    assert heard == {c: list(range(i, messages, 3)) for i, c in enumerate(channels)}


def test_much_at_once_to_one_who_reads_late(launch: Callable[..., LocalServer]) -> None:
    """More in one turn than the library may hold for a connection."""
    server = launch(max_notify_size=1 << 20, channel_history=0)
    with server.connect() as hearer, server.connect() as late:
        subscribe(hearer)
        subscribe(late)
        sizes = [50_000, 10, 700_000, 300] * 12
        for number, size in enumerate(sizes):
            server.server.channels.publish("c", [number, "x" * size])
        for wire in (hearer, late):
            for number, size in enumerate(sizes):
                assert wire.receive() == said([number, "x" * size])


@pytest.mark.parametrize(
    "leave",
    [
        lambda connection, topic: topic.discard(connection),
        lambda connection, topic: connection.leave_topics(),
        lambda connection, topic: connection.close(1000, ""),
    ],
    ids=["discard", "serve apart", "close"],
)
def test_who_leaves_hears_what_was_sent_before(
    recorder: Recorder, leave: Callable[[Connection, Topic], None]
) -> None:
    """The library forgets what it has not sent yet to a connection that leaves its last topic."""
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)

        def turn() -> None:
            topic = recorder.transport.topic()
            topic.add(connection)
            topic.send([b"one", b"two"])
            leave(connection, topic)
            connection.send(b"after", is_text=True)

        recorder.transport.post(turn)
        received = [wire.socket.recv(timeout=DEADLINE) for _ in range(3)]
        assert received == ["one", "two", "after"]


def test_who_is_closed_hears_what_was_said_before(server: LocalServer) -> None:
    for number in range(10):
        with server.connect() as wire:
            name = wire.request(type="hello")["connectionId"]
            subscribe(wire)
            server.server.channels.publish("c", number)
            assert server.server.connections.close(name)
            assert wire.receive() == said(number)
            with pytest.raises(ConnectionClosed):
                wire.receive()


def test_another_way_to_hear_the_same_channel(server: LocalServer) -> None:
    with server.connect() as hearer:
        for recover in (False, True, False, True):
            subscribe(hearer, recover=recover)
            server.server.channels.publish("c", recover)
            message = hearer.receive()
            assert message["payload"] is recover
            assert ("offset" in message) is recover


def test_targets_and_answers_keep_the_order(server: LocalServer) -> None:
    with server.connect() as hearer:
        hearer.request(type="hello", user="ada")
        subscribe(hearer)
        for number in range(300):
            hearer.send(type="notify", channel="c", payload=number)
            hearer.send(type="notify", channel="c", payload=-number, to={"user": "ada"})
            hearer.send(type="json", sql="select 1", queryId=number)
        others = [hearer.receive() for _ in range(5 * 300)]
        told = [frame["payload"] for frame in others if frame["type"] == "notify"]
        assert told == [sign * number for number in range(300) for sign in (1, -1)]


def test_a_hundred_thousand_subscriptions_leave_nothing(server: LocalServer) -> None:
    def frame(text: bytes) -> bytes:
        return struct.pack("!BB4x", 0x81, 0x80 | len(text)) + text

    burst = 1000 * b"".join(
        frame(b'{"type":"%s","channel":"c"}' % kind) for kind in (b"subscribe", b"unsubscribe")
    )
    answers = 1000 * sum(
        2 + len(b'{"type":"%s","channel":"c"}' % kind) for kind in (b"subscribed", b"unsubscribed")
    )
    memory = psutil.Process().memory_info
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        assert b" 101 " in head
        for number in range(100):
            if number == 20:
                before = memory().rss
            client.sendall(burst)
            missing = answers
            while missing:
                missing -= len(client.recv(min(missing, 1 << 20)))
        assert memory().rss - before < 4 << 20
        channels = server.server.channels
        assert len(channels._hub) == 0
        assert not channels._audiences
