"""Channels in both clients, against real servers."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sqlrooms_server.client import (
    AsyncClient,
    AsyncSubscription,
    Client,
    ConnectionLost,
    Heard,
    Joined,
    Left,
    Member,
    Message,
    Missed,
    RequestFailed,
    Subscription,
    connect,
    connect_async,
)
from tests.conftest import LocalServer
from tests.proxy import Proxy
from tests.test_async_client import connected, run
from tests.test_client import failure, in_thread
from tests.wire import DEADLINE

# Nobody listens there.
NOWHERE = 9


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlrooms_server.client.needs._FIRST_PAUSE_S", 0.02)


@pytest.fixture
def clients(server: LocalServer) -> Iterator[Callable[..., Client]]:
    """Connects as many as are wanted."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(connect(server.url, **options))


@pytest.fixture
def db(clients: Callable[..., Client]) -> Client:
    return clients()


@pytest.fixture
def proxy(server: LocalServer) -> Iterator[Proxy]:
    with Proxy(server.port) as forwarding:
        yield forwarding


def payloads(heard: Subscription, number: int) -> list[Any]:
    """What the next ``number`` messages say."""
    messages = [heard.next(DEADLINE) for _ in range(number)]
    assert all(isinstance(message, Message) for message in messages), messages
    return [message.payload for message in messages if isinstance(message, Message)]


def hears_nothing_more(heard: Subscription) -> None:
    """Right after an answer of the server to the same client, nothing else can be under way."""
    with pytest.raises(TimeoutError):
        heard.next(0)


def numbers(stop: int) -> Iterator[Any]:
    yield from ({"n": number} for number in range(stop))


# Saying and hearing


@pytest.mark.parametrize(
    "payload",
    [None, False, 0, "", [], {}, {"a": [1, 2.5, None, "é/😀"]}, 10**30, 0.1 + 0.2, -0.0, "\0"],
)
def test_every_json_value_comes_back(db: Client, payload: Any) -> None:
    with db.subscribe("c") as heard:
        assert db.notify("c", payload) is None
        message = heard.next(DEADLINE)
        assert isinstance(message, Message)
        assert message.payload == payload
        assert type(message.payload) is type(payload)
        hears_nothing_more(heard)


@pytest.mark.parametrize("payload", [object(), {1, 2}, b"x", float("nan"), [float("inf")]])
def test_what_is_no_json_value_is_refused_here(db: Client, payload: Any) -> None:
    with pytest.raises(TypeError, match="payload"):
        db.notify("c", payload)


def test_each_hears_each_message_once_and_in_order(clients: Callable[..., Client]) -> None:
    hearer, *senders = (clients() for _ in range(4))
    with hearer.subscribe("c") as heard, senders[0].subscribe("c") as own:

        def send(index: int) -> None:
            for number in range(100):
                assert senders[index].notify("c", [index, number]) is None

        sending = [in_thread(lambda index=index: send(index)) for index in range(3)]  # type: ignore[misc]
        assert [failure(future) for future in sending] == [None] * 3
        told = payloads(heard, 300)
        assert payloads(own, 300) == told
        for index in range(3):
            assert [n for sender, n in told if sender == index] == list(range(100))
        for client, feed in ((hearer, heard), (senders[0], own)):
            client.members("c")
            hears_nothing_more(feed)


def test_the_copy_of_a_sender_that_does_not_hear_is_dropped(db: Client) -> None:
    with db.subscribe("other") as other:
        for payload in numbers(20):
            db.notify("c", payload)
        # Not what was said before it began, either.
        with db.subscribe("c", recover=True) as heard:
            db.notify("c", "mine")
            assert payloads(heard, 1) == ["mine"]
            hears_nothing_more(heard)
        hears_nothing_more(other)


def test_several_subscriptions_of_one_client(server: LocalServer, db: Client) -> None:
    channels_of = {"first": ("c",), "last": ()}
    one, two, other = db.subscribe("c"), db.subscribe("c", recover=True), db.subscribe("d")
    for payload in numbers(10):
        db.notify("c", payload)
    # This one also gets what was said before, which the others are not told again.
    late = db.subscribe("c", since=two.offset, presence=True)
    db.notify("c", "last")
    for heard in (one, two, late):
        assert payloads(heard, 11) == [*numbers(10), "last"]
        hears_nothing_more(heard)
    hears_nothing_more(other)
    other.close()
    for heard, channels in (
        (late, channels_of["first"]),
        (one, channels_of["first"]),
        (two, channels_of["last"]),
    ):
        heard.close()
        assert list(heard) == []
        # It was told before this is answered.
        db.notify("c", "to those that are left")
        (info,) = server.server.connections.all()
        assert info.channels == channels
    with pytest.raises(RuntimeError, match="closed"):
        two.next()


def test_one_that_begins_while_another_ends(server: LocalServer, db: Client) -> None:
    """The end of the one must not end the other on the server."""
    heard = db.subscribe("c")
    for number in range(100):
        ending = in_thread(heard.close)
        heard = db.subscribe("c")
        assert failure(ending) is None
        db.notify("c", number)
        assert payloads(heard, 1) == [number]


def test_a_subscription_that_is_dropped_ends(server: LocalServer, db: Client) -> None:
    heard = db.subscribe("c")
    del heard
    gc.collect()
    db.notify("c", 1)
    assert server.server.connections.all()[0].channels == ()
    assert db._wire is not None
    assert not db._wire.link._exchanges
    assert not db._wire.link.channels._hearings


def test_another_thread_closes_what_waits(db: Client) -> None:
    heard = db.subscribe("c")
    entered = threading.Event()

    def consume() -> list[Heard]:
        heard.next(DEADLINE)
        entered.set()
        return list(heard)

    waiting = in_thread(consume)
    db.notify("c", 1)
    assert entered.wait(DEADLINE)
    heard.close()
    assert waiting.result(DEADLINE) == []


def test_messages_over_http_and_from_the_server(server: LocalServer, db: Client) -> None:
    with db.subscribe("c") as heard:
        for payload in numbers(100):
            server.server.channels.publish("c", payload)
        assert payloads(heard, 100) == list(numbers(100))


# Refusals


def test_what_the_server_refuses(launch: Callable[..., LocalServer]) -> None:
    server = launch(max_channels_per_connection=1, notify_rate=5)
    with connect(server.url) as db, db.subscribe("c") as heard:
        refused: list[tuple[str, Callable[[], Any]]] = [
            ("busy", lambda: db.subscribe("d")),
            ("bad_request", lambda: db.subscribe("")),
            ("bad_request", lambda: db.notify("", 1)),
            ("bad_request", lambda: db.notify("c", 1, to={"name": "ada"})),
            ("too_large", lambda: db.notify("c", "x" * 100_000)),
            ("not_found", lambda: db.members("d")),
            ("bad_request", lambda: connect(server.url, user="")),
        ]
        for code, call in refused:
            with pytest.raises(RequestFailed) as failed:
                call()
            assert failed.value.code == code
        with pytest.raises(RequestFailed, match="--notify-rate"):
            for _ in range(100):
                db.notify("c", "often")
        assert payloads(heard, 1) == ["often"]
        assert len(db.members("c")) == 1


# Who is there


def test_presence_and_targets(clients: Callable[..., Client]) -> None:
    ada, bob = clients(user="ada"), clients(user="bob")
    here = Member(str(ada.connection_id), "ada")
    there = Member(str(bob.connection_id), "bob")
    with ada.subscribe("c", presence=True) as heard, ada.subscribe("c") as plain:
        assert ada.members("c") == [here]
        with bob.subscribe("c", recover=True) as of_bob:
            assert heard.next(DEADLINE) == Joined(there)
            members = bob.members("c")
            assert (members, members.total) == ([here, there], 2)
            assert bob.notify("c", "to ada", to={"user": "ada"}) == 1
            assert bob.notify("c", "to me", to={"connection": there.connection_id}) == 1
            assert bob.notify("c", "to nobody", to={"user": "eve"}) == 0
            for feed in (heard, plain):
                assert feed.next(DEADLINE) == Message("to ada", None)
            assert payloads(of_bob, 1) == ["to me"]
        assert heard.next(DEADLINE) == Left(there)
        ada.members("c")
        hears_nothing_more(plain)


# Lost connections


def test_with_recover_nothing_is_lost_and_nothing_comes_twice(proxy: Proxy, db: Client) -> None:
    with connect(proxy.url) as away:
        feeds = [away.subscribe("c", recover=True) for _ in range(3)]
        hearing = [in_thread(lambda heard=heard: payloads(heard, 60)) for heard in feeds]  # type: ignore[misc]
        for number, payload in enumerate(numbers(60)):
            if number % 10 == 3:
                # Away for some messages.
                proxy.port = NOWHERE
                proxy.cut()
            if number % 10 == 6:
                proxy.port = int(db._url.rpartition(":")[2])
            if number % 10 == 8:
                # And back at once.
                proxy.cut()
            db.notify("c", payload)
        for future in hearing:
            assert future.result(DEADLINE) == list(numbers(60))
        away.members("c")
        for heard in feeds:
            hears_nothing_more(heard)


def test_those_who_have_read_more_are_told_less(proxy: Proxy, db: Client) -> None:
    """Each goes on where it is, though the connection is one."""
    with connect(proxy.url) as away:
        fast, slow = (away.subscribe("c", recover=True) for _ in range(2))
        for payload in numbers(10):
            db.notify("c", payload)
        assert payloads(fast, 10) == list(numbers(10))
        proxy.cut()
        db.notify("c", "missed")
        assert payloads(fast, 1) == ["missed"]
        db.notify("c", "later")
        assert payloads(slow, 12) == [*numbers(10), "missed", "later"]
        assert payloads(fast, 1) == ["later"]
        away.members("c")
        hears_nothing_more(fast)
        hears_nothing_more(slow)


def test_what_is_gone_is_told(launch: Callable[..., LocalServer]) -> None:
    server = launch(channel_history=3)
    with Proxy(server.port) as proxy, connect(server.url) as db, connect(proxy.url) as away:
        # Somebody stays, so that the channel does.
        staying = db.subscribe("c", recover=True)
        begun = staying.offset
        heard = away.subscribe("c", recover=True)
        proxy.cut()
        for payload in numbers(5):
            db.notify("c", payload)
        assert heard.next(DEADLINE) == Missed()
        assert payloads(heard, 3) == list(numbers(5))[2:]
        away.members("c")
        hears_nothing_more(heard)
        with db.subscribe("c", since=begun) as again:
            assert again.next(DEADLINE) == Missed()
            assert payloads(again, 3) == list(numbers(5))[2:]
        with db.subscribe("c", since=heard.offset) as again:
            hears_nothing_more(again)
        with db.subscribe("c", since="nonsense") as again:
            assert again.next(DEADLINE) == Missed()
            hears_nothing_more(again)
        assert payloads(staying, 5) == list(numbers(5))


def test_without_recover_it_goes_on_with_what_is_said_then(proxy: Proxy, db: Client) -> None:
    with connect(proxy.url, user="away") as away:
        heard = away.subscribe("c")
        with db.subscribe("c", presence=True) as told:
            proxy.port = NOWHERE
            proxy.cut()
            left = told.next(DEADLINE)
            assert isinstance(left, Left)
            db.notify("c", "missed")
            proxy.port = int(db._url.rpartition(":")[2])
            hearing = in_thread(lambda: payloads(heard, 1))
            assert payloads(told, 1) == ["missed"]
            joined = told.next(DEADLINE)
            assert isinstance(joined, Joined)
            assert joined.member.user == left.member.user == "away"
            db.notify("c", "then")
            assert hearing.result(DEADLINE) == ["then"]


@pytest.mark.parametrize("recover", [False, True])
def test_joins_and_leaves_may_be_missed(proxy: Proxy, db: Client, recover: bool) -> None:
    with connect(proxy.url) as away, db.subscribe("c"):
        heard = away.subscribe("c", presence=True, recover=recover)
        proxy.cut()
        assert heard.next(DEADLINE) == Missed(messages=not recover)
        assert len(away.members("c")) == 2


def test_another_server_has_forgotten(launch: Callable[..., LocalServer]) -> None:
    first, second = launch(), launch()
    with Proxy(first.port) as proxy, connect(proxy.url) as away:
        heard = away.subscribe("c", recover=True)
        away.notify("c", 1)
        assert payloads(heard, 1) == [1]
        proxy.port = second.port
        first.server.stop()
        assert heard.next(DEADLINE) == Missed()
        away.notify("c", 2)
        assert payloads(heard, 1) == [2]


def test_nobody_is_there_any_more(
    launch: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.needs._LONGEST_PAUSE_S", 0.01)
    server = launch()
    with connect(server.url) as db:
        heard = db.subscribe("c")
        server.server.stop()
        with pytest.raises(ConnectionLost):
            heard.next(DEADLINE)
        with pytest.raises(ConnectionLost):
            db.notify("c", 1)
        with pytest.raises(ConnectionLost):
            db.subscribe("d")


def test_who_reads_slowly_is_treated_as_lost(
    launch: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.channels._MAX_UNREAD_BYTES", 10_000)
    server = launch(channel_history=5)
    with connect(server.url) as db:
        slow, plain = db.subscribe("c", recover=True), db.subscribe("c")
        for number in range(100):
            db.notify("c", number)
        told = [slow.next(DEADLINE)]
        while told[-1] != Missed():
            told.append(slow.next(DEADLINE))
        before = [message.payload for message in told if isinstance(message, Message)]
        assert before == list(range(len(before)))
        assert 10 < len(before) < 60
        assert payloads(slow, 5) == [95, 96, 97, 98, 99]
        assert payloads(plain, len(before)) == before
        hearing = in_thread(lambda: payloads(plain, 1))
        while not hearing.done():
            db.notify("c", "then")
        assert hearing.result(DEADLINE) == ["then"]


def test_an_interrupt_loses_nothing(db: Client) -> None:
    heard = db.subscribe("c")
    feed: Any = heard._feed
    inbox = feed._hearing.inbox
    while not inbox.empty():
        inbox.get_nowait()
    for number in range(10):
        flow = heard._feed.next(None)
        next(flow)
        db.notify("c", number)
        # Ctrl+C comes when it was taken from the inbox that there is something.
        inbox.get_nowait()
        with pytest.raises(KeyboardInterrupt):
            flow.throw(KeyboardInterrupt())
        assert payloads(heard, 1) == [number]


# asyncio


async def async_payloads(heard: AsyncSubscription, number: int) -> list[Any]:
    messages = [await heard.next(DEADLINE) for _ in range(number)]
    return [getattr(message, "payload", message) for message in messages]


def test_async_channels(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        async with (
            connect_async(server.url, user="bob") as bob,
            db.subscribe("c", recover=True, presence=True) as heard,
            db.subscribe("c") as also,
        ):
            of_bob = await bob.subscribe("c")
            bob_is = Member(str(bob.connection_id), "bob")
            assert await heard.next(DEADLINE) == Joined(bob_is)
            assert bob_is in await db.members("c")
            await asyncio.gather(*(bob.notify("c", number) for number in range(100)))
            for feed in (heard, also, of_bob):
                assert sorted(await async_payloads(feed, 100)) == list(range(100))
            assert await db.notify("c", "hi", to={"user": "bob"}) == 1
            assert await async_payloads(of_bob, 1) == ["hi"]
            await db.notify("nobody hears", 1)
            with pytest.raises(TypeError):
                await db.notify("c", object())
            with pytest.raises(RequestFailed):
                await db.members("d")
            with pytest.raises(RequestFailed):
                await db.subscribe("")

            # A task that is cancelled loses nothing.
            for number in range(10):
                waiting = asyncio.create_task(also.next())
                await bob.members("c")
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                await bob.notify("c", number)
                assert await async_payloads(also, 1) == [number]
            assert await async_payloads(heard, 10) == list(range(10))

            # Another task closes it.
            consuming = asyncio.create_task(consume(also))
            await db.members("c")
            await also.close()
            assert await consuming == 0
            await of_bob.close()
            assert await heard.next(DEADLINE) == Left(bob_is)
            with pytest.raises(TimeoutError):
                await heard.next(0)
        async for _ in heard:
            raise AssertionError

    async def consume(heard: AsyncSubscription) -> int:
        return len([item async for item in heard])

    connected(server.url, test)


def test_async_subscriptions_outlast_cut_connections(proxy: Proxy, db: Client) -> None:
    # The channel stays while somebody hears it.
    staying = db.subscribe("c")

    async def test() -> None:
        async with connect_async(proxy.url) as away:
            # Without with or await, it begins with the first message.
            plain = away.subscribe("c")
            async with away.subscribe("c", recover=True) as heard:
                for number in range(5):
                    proxy.cut()
                    await asyncio.to_thread(db.notify, "c", number)
                    assert await async_payloads(heard, 1) == [number]
                begin = asyncio.create_task(plain.next())
                while not begin.done():
                    await away.notify("c", "then")
                assert getattr(await begin, "payload", None) == "then"

    run(test())
    assert payloads(staying, 6) == [*range(5), "then"]
