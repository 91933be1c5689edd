"""Channels: every subscriber and the sender, once, in order; history, presence and targets."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from sqlrooms_server.errors import BadRequest, TooLarge
from tests.conftest import LocalServer
from tests.wire import DEADLINE, Wire


@pytest.fixture
def connect(server: LocalServer) -> Iterator[Callable[[], Wire]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(server.connect())


def subscribe(wire: Wire, channel: str = "c", **options: Any) -> Any:
    answer = wire.request(type="subscribe", channel=channel, **options)
    assert answer["type"] == "subscribed", answer
    return answer


def said(payload: Any, channel: str = "c") -> dict[str, Any]:
    return {"type": "notify", "channel": channel, "payload": payload}


def ack(channel: str = "c") -> dict[str, Any]:
    return {"type": "notifyAck", "channel": channel}


def test_each_subscriber_and_the_sender_once(connect: Callable[[], Wire]) -> None:
    one, two, sender = connect(), connect(), connect()
    for _ in range(2):
        assert subscribe(one) == {"type": "subscribed", "channel": "c"}
    subscribe(two)
    payloads: list[Any] = [{"a": [1, 2.5, None, "é", "😀"]}, 10**17, "", None, [], False]
    for payload in payloads:
        sender.send(type="notify", channel="c", payload=payload)
        assert [sender.receive(), sender.receive()] == [said(payload), ack()]
        assert one.receive() == said(payload)
        assert two.receive() == said(payload)
    one.send(type="notify", channel="c", payload="mine")
    assert [one.receive(), one.receive()] == [said("mine"), ack()]
    assert two.receive() == said("mine")


def test_what_is_said_is_what_it_was_then(server: LocalServer, wire: Wire) -> None:
    subscribe(wire, recover=True)
    may_go_on = threading.Event()

    def hold() -> None:
        assert may_go_on.wait(DEADLINE)

    # The loop takes it up when the program has changed it already.
    server.server._transport.post(hold)
    payload = {"a": 1}
    server.server.channels.publish("c", payload)
    payload["a"] = 2
    may_go_on.set()
    assert wire.receive()["payload"] == {"a": 1}


def test_others_hear_nothing(connect: Callable[[], Wire]) -> None:
    one, sender = connect(), connect()
    subscribe(one, "a")
    subscribe(one, "b")
    answer = one.request(type="unsubscribe", channel="a")
    assert answer == {"type": "unsubscribed", "channel": "a"}
    assert one.request(type="unsubscribe", channel="a", queryId=7)["queryId"] == 7
    for channel in ("a", "A", "b ", "b"):
        sender.send(type="notify", channel=channel, payload=channel)
    assert one.receive() == said("b", "b")


def test_order_of_a_burst_from_many(connect: Callable[[], Wire]) -> None:
    hearer, senders = connect(), [connect() for _ in range(4)]
    subscribe(hearer)
    for number in range(500):
        for index, sender in enumerate(senders):
            sender.send(type="notify", channel="c", payload=[index, number])
    heard: list[list[int]] = [[] for _ in senders]
    for _ in range(2000):
        index, number = hearer.receive()["payload"]
        heard[index].append(number)
    assert heard == [list(range(500))] * 4
    for index, sender in enumerate(senders):
        for number in range(500):
            assert [sender.receive(), sender.receive()] == [said([index, number]), ack()]


def test_history(connect: Callable[[], Wire]) -> None:
    one, sender = connect(), connect()
    first = subscribe(one, recover=True)
    assert first["recovered"] is True
    offsets = []
    for number in range(5):
        sender.send(type="notify", channel="c", payload=number)
        message = one.receive()
        offsets.append(message.pop("offset"))
        assert message == said(number)
    late = connect()
    late.send(type="subscribe", channel="c", since=offsets[1])
    missed = [late.receive() for _ in range(3)]
    assert missed == [{**said(n), "offset": offsets[n]} for n in (2, 3, 4)]
    answer = {"type": "subscribed", "channel": "c", "offset": offsets[4], "recovered": True}
    assert late.receive() == answer
    assert subscribe(connect(), since=offsets[4]) == answer
    # What another server, or nobody, has said.
    epoch = offsets[4].split("-")[0]
    for since in ("", "x", f"{epoch}-6", f"{epoch}--1", f"{epoch}-²", "0000000000-2"):
        assert subscribe(connect(), since=since) == {**answer, "recovered": False}


def test_history_that_is_gone(launch: Callable[..., LocalServer]) -> None:
    server = launch(channel_history=3)
    with server.connect() as one, server.connect() as late:
        offset = subscribe(one, recover=True)["offset"]
        for number in range(5):
            one.send(type="notify", channel="c", payload=number)
            one.receive(), one.receive()
        late.send(type="subscribe", channel="c", since=offset)
        assert [late.receive()["payload"] for _ in range(3)] == [2, 3, 4]
        assert late.receive()["recovered"] is False


def test_presence(connect: Callable[[], Wire]) -> None:
    one, two = connect(), connect()
    ids = [wire.request(type="hello")["connectionId"] for wire in (one, two)]
    two.request(type="hello", user="ada")
    subscribe(one, presence=True)
    subscribe(two)
    ada = {"connectionId": ids[1], "user": "ada"}
    assert one.receive() == {"type": "presence", "channel": "c", "joined": ada}
    answer = one.request(type="presence", channel="c", queryId="p")
    assert answer["members"] == [{"connectionId": ids[0]}, ada]
    assert (answer["queryId"], answer["count"]) == ("p", 2)
    two.socket.close()
    assert one.receive() == {"type": "presence", "channel": "c", "left": ada}
    stranger = connect().request(type="presence", channel="c", queryId=1)
    assert (stranger["code"], stranger["channel"], stranger["queryId"]) == ("not_found", "c", 1)


def test_targets(connect: Callable[[], Wire]) -> None:
    ada, bob, sender = connect(), connect(), connect()
    for wire, user in ((ada, "ada"), (bob, "bob")):
        wire.request(type="hello", user=user)
        subscribe(wire)
    bob_id = bob.request(type="hello")["connectionId"]

    def tell(**to: str) -> Any:
        return sender.request(type="notify", channel="c", payload=to, to=to)

    assert tell(user="ada") == {**ack(), "delivered": 1}
    assert ada.receive() == said({"user": "ada"})
    assert tell(connection=bob_id)["delivered"] == 1
    assert bob.receive() == said({"connection": bob_id})
    assert tell(user="eve")["delivered"] == tell(connection="x")["delivered"] == 0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"type": "subscribe"}, "channel"),
        ({"type": "subscribe", "channel": ""}, "channel"),
        ({"type": "subscribe", "channel": "é" * 128}, "255 bytes"),
        ({"type": "subscribe", "channel": 1}, "channel"),
        ({"type": "subscribe", "channel": "c", "since": 3}, "since"),
        ({"type": "subscribe", "channel": "c", "presence": 1}, "presence"),
        ({"type": "notify", "channel": "c"}, "payload"),
        ({"type": "notify", "channel": "c", "payload": 1, "to": "ada"}, "to must"),
        ({"type": "notify", "channel": "c", "payload": 1, "to": {}}, "to must"),
        ({"type": "hello", "user": ""}, "user"),
    ],
)
def test_bad_messages(wire: Wire, fields: dict[str, Any], text: str) -> None:
    error = wire.request(**fields)
    assert (error["type"], error["code"]) == ("error", "bad_request")
    assert text in error["error"]
    assert subscribe(wire)


def test_limits(launch: Callable[..., LocalServer]) -> None:
    server = launch(
        max_channels_per_connection=2, max_channels=3, max_notify_size=1000, notify_rate=5
    )
    with server.connect() as one, server.connect() as two:
        for channel in ("a", "b", "a"):
            subscribe(one, channel)
        error = one.request(type="subscribe", channel="c", queryId="q")
        assert (error["code"], error["channel"], error["queryId"]) == ("busy", "c", "q")
        assert "--max-channels-per-connection" in error["error"]
        subscribe(two, "c")
        assert "--max-channels)" in two.request(type="subscribe", channel="d")["error"]
        error = two.request(type="notify", channel="c", payload="x" * 1000)
        assert (error["code"], error["channel"]) == ("too_large", "c")
        answers: list[Any] = []
        for _ in range(20):
            two.send(type="notify", channel="c", payload=1)
        while len(answers) < 20:
            message = two.receive()
            if message["type"] != "notify":
                answers.append(message)
        refused = [answer for answer in answers if answer["type"] == "error"]
        assert 5 <= len(refused) <= 10
        assert all(answer["code"] == "busy" for answer in refused)


def test_a_subscriber_that_does_not_read_loses_only_itself(
    launch: Callable[..., LocalServer],
) -> None:
    server = launch(max_queued_bytes=1 << 20, notify_rate=0, channel_history=0)
    payload = "x" * 10_000
    with server.connect() as stalled, server.connect() as hearer, server.connect() as sender:
        subscribe(stalled)
        subscribe(hearer)
        for number in range(2000):
            sender.send(type="notify", channel="c", payload=[number, payload])
            assert hearer.receive()["payload"][0] == number
            sender.receive(), sender.receive()
        numbers = []
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                numbers.append(stalled.receive()["payload"][0])
        assert numbers == list(range(len(numbers)))
        assert len(numbers) < 2000
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013
        assert "--max-queued-bytes" in closed.value.rcvd.reason


def test_subscriptions_end_with_the_connection(server: LocalServer) -> None:
    hub = server.server.channels._hub
    for _ in range(3):
        with server.connect() as wire:
            for number in range(100):
                subscribe(wire, f"c{number}")
    with server.connect() as wire:
        for _ in range(500):
            subscribe(wire)
            wire.request(type="unsubscribe", channel="c")
        # The connections before this one may still be closing.
        while server.server.connections.count() > 1:
            time.sleep(0.001)
        assert len(hub) == 0
        assert not hub._of_member


def post(server: LocalServer, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    fields = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, fields)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def test_http(server: LocalServer, wire: Wire) -> None:
    name = "a/b é?"
    subscribe(wire, name)
    path = f"/channels/{urllib.parse.quote(name, safe='')}"
    assert post(server, path, b'{"n": 1}') == (200, {"channel": name, "delivered": 1})
    assert wire.receive() == said({"n": 1}, name)
    assert post(server, f"{path}?user=ada", b"1")[1]["delivered"] == 0
    for status, code, arguments in (
        (400, "bad_request", (path, b"{")),
        (400, "bad_request", ("/channels/", b"1")),
        (400, "bad_request", (f"{path}?who=ada", b"1")),
        (400, "bad_request", ("/channels/%ff", b"1")),
    ):
        found, answer = post(server, *arguments)
        assert (found, answer["code"]) == (status, code)
    assert post(server, path, b"1", **{"Content-Type": "text/plain"})[0] == 400
    assert post(server, path, b"x" * 100_000)[0] == 413
    assert post(server, path, b"1", Origin="https://evil.example")[0] == 403
    assert post(server, "/channels", b"1")[0] == 404


def test_http_needs_the_token(launch: Callable[..., LocalServer]) -> None:
    server = launch(auth_token="secret")
    assert post(server, "/channels/c", b"1")[0] == 401
    assert post(server, "/channels/c", b"1", Authorization="Bearer wrong")[0] == 401
    assert post(server, "/channels/c", b"1", Authorization="Bearer secret")[0] == 200


def test_from_python(server: LocalServer, wire: Wire) -> None:
    subscribe(wire)
    for number in range(1000):
        server.server.channels.publish("c", {"n": number})
    assert [wire.receive()["payload"]["n"] for _ in range(1000)] == list(range(1000))
    wire.request(type="hello", user="ada")
    server.server.channels.publish("c", "hi", to={"user": "ada"})
    assert wire.receive() == said("hi")
    with pytest.raises(BadRequest):
        server.server.channels.publish("", 1)
    with pytest.raises(BadRequest):
        server.server.channels.publish("c", object())
    with pytest.raises(TooLarge):
        server.server.channels.publish("c", "x" * 100_000)


def test_connections(server: LocalServer, wire: Wire) -> None:
    welcome = wire.request(type="hello", user="ada")
    subscribe(wire)
    connections = server.server.connections
    assert connections.count() == 1
    (info,) = connections.all()
    assert (info.id, info.user, info.channels) == (welcome["connectionId"], "ada", ("c",))
    assert info.remote_address
    assert connections.all(user="bob") == []
    url = f"http://127.0.0.1:{server.port}/connections"
    with urllib.request.urlopen(url, timeout=DEADLINE) as response:
        (shown,) = json.load(response)["connections"]
    assert shown["connectionId"] == info.id
    assert shown["channels"] == ["c"]
    assert connections.close("nobody") is False
    assert connections.close(info.id) is True
    with pytest.raises(ConnectionClosed):
        wire.receive()
