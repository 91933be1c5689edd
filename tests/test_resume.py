"""Streams that go on after a lost connection, or say that they cannot."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import Plugin
from sqlrooms_server.app_config import AppConfig
from sqlrooms_server.client import ConnectionLost, connect, connect_async
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.features.resumable import ResumableRequest
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.jobs import Pause, State, Work
from sqlrooms_server.messages import Ack
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.cutting import CuttingProxy
from tests.resumer import Resumer
from tests.streams import Streams, stream
from tests.test_apps import Local as ServerOfApps
from tests.test_requests import Loop, SlowPeer, loop, requests
from tests.test_tokens import digest
from tests.wire import DEADLINE, Wire

__all__ = ["loop", "requests"]

Launch = Callable[..., LocalServer]
Come = Callable[..., Resumer]

# 12 MB: more than the outbox and the socket hold.
BIG = "select i, i * 2 as j from range(800000) t(i)"
ENDLESS = "select i, 'some text ' || i as s from range(10000000000) t(i)"
WINDOW = 4 << 20

plugin = Plugin("mine")
go_on = threading.Event()


@plugin.on("table")
def table(call: Any) -> Any:
    return call.query("select range as a from range(1000000)")


@plugin.on("later")
def later(call: Any) -> Any:
    go_on.wait(DEADLINE)
    if call.message["ending"] == "error":
        raise ValueError("half-way")
    if call.message["ending"] == "table":
        return pa.table({"a": [1]})
    return {"queryId": "attempt 0"}


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0, resume_window=WINDOW), [plugin])
    yield local
    local.server.stop()


@pytest.fixture
def come() -> Iterator[Come]:
    """Makes clients, which leave with the test."""
    with ExitStack() as stack:

        def come(url: str, **options: Any) -> Resumer:
            resumer = Resumer(url, **options)
            stack.callback(resumer.close)
            return resumer

        yield come


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of streams that were acknowledged to their end, or given up."""
    yield
    if "server" in request.fixturenames:
        server: LocalServer = request.getfixturevalue("server")
        resuming = of(server)
        wait_until(lambda: not server.server.main.requests._clients)
        server.server.main._shared.post(resuming._discard_all)
        for stream in list(resuming._waiting):
            server.server.main._shared.post(resuming.give_up, stream)
        wait_until(lambda: is_empty(server))


def of(server: LocalServer) -> Resuming:
    resuming = server.server.main.resuming
    assert resuming is not None
    return resuming


def is_empty(server: LocalServer) -> bool:
    resuming = of(server)
    places = (resuming._streams, resuming._waiting, resuming._kept, resuming._answered)
    return not any(places) and not resuming.held and not server.server.scheduler._jobs


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lost(server: LocalServer, resumer: Resumer) -> None:
    """Lose the connection, and wait until the server knows."""
    stream = of(server)._streams[resumer.token]
    resumer.lose()
    wait_until(lambda: stream in of(server)._waiting)


def whole(server: LocalServer, sql: str = BIG, **options: Any) -> bytes:
    with server.connect() as wire:
        return bytes(stream(wire, sql, **options).body)


@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere_again_and_again(server: LocalServer, seed: int, come: Come) -> None:
    choose = random.Random(seed)
    budgets = [choose.choice((2000, 60_000, 1_500_000)) + choose.randrange(1000) for _ in range(30)]
    every: list[dict[str, Any]] = [{}, {"compression": "lz4"}, {"persist": True}]
    options = every[seed]
    sql = f"select i, i * {seed} as j from range(700000) t(i)"
    with CuttingProxy(server.port, budgets) as proxy:
        resumer = come(proxy.url)
        resumer.ask(sql, window=1 << 20, **options)
        resumer.finish()
        assert proxy.cuts > 15
    assert resumer.body == whole(server, sql, **options)
    assert resumer.summary is not None and resumer.summary["rows"] == 700_000
    # Acknowledged to its end: nothing is kept.
    wait_until(lambda: is_empty(server))


def test_cut_without_acknowledging(launch: Launch, come: Come) -> None:
    """What is under way has no bound but buffers, which are smaller than the window."""
    server = launch(resume_window=64 << 20)
    with CuttingProxy(server.port, [3_000_000] * 3) as proxy:
        resumer = come(proxy.url, acks=False)
        resumer.ask(BIG)
        resumer.finish()
        assert proxy.cuts == 3
    assert resumer.body == whole(server)


def test_a_table_of_a_plugin(server: LocalServer, come: Come) -> None:
    with CuttingProxy(server.port, [100_000, 1_200_000, 2_500_000]) as proxy:
        resumer = come(proxy.url)
        resumer.ask(type="table", window=1 << 20)
        resumer.finish()
        assert proxy.cuts == 3
    assert resumer.table()["a"].equals(pa.chunked_array([pa.array(range(1_000_000))]))


def test_windows_of_a_few_bytes(server: LocalServer, come: Come) -> None:
    sql = "select range as a from range(30)"
    resumer = come(server.url)
    resumer.ask(sql, window=7)
    while not resumer.is_over:
        if len(resumer.body) > 100 * resumer.attempts:
            resumer.lose()
            resumer.resume()
        resumer.receive()
    assert resumer.attempts > 3
    assert resumer.body == whole(server, sql)


def test_the_last_message_was_lost(server: LocalServer, come: Come) -> None:
    """Without acknowledgement it is sent again, to whoever comes, as often as that happens."""
    sql = "select 42 as a"
    resumer = come(server.url, acks=False)
    resumer.ask(sql)
    wait_until(lambda: bool(of(server)._kept))
    for _ in range(3):
        resumer.lose()
        resumer.resume()
        wait_until(lambda: bool(of(server)._kept))
    resumer.finish()
    assert resumer.body == whole(server, sql)


class OpenPeer(SlowPeer):
    __slots__ = ()
    is_open = True


def test_the_last_message_is_empty(loop: Loop, requests: Requests) -> None:
    """All bytes are acknowledged, and still the end may be lost."""
    resuming = Resuming(Settings(resume_window=WINDOW), requests.timers, loop.post)
    peers = [OpenPeer(), OpenPeer()]
    options: dict[str, Any] = {"size": 0, "window": None, "idle_timeout": DEADLINE}
    request = ResumableRequest(requests, resuming, peers[0], "q", **options)

    def work() -> Work:
        request.put(b"body")
        yield Pause.FULL

    requests.submit(request, work())
    job = request.job
    assert job is not None
    loop.run_until(lambda: job.state is State.PARKED)
    first = pulled(request)
    assert first[1:] == [b"body"] and b'"last":false' in first[0]
    job.resume()
    loop.run_until(lambda: job.state is State.DONE)
    last = pulled(request)
    assert last[1:] == [b""] and b'"last":true' in last[0]
    assert request.answered
    resuming.acknowledge(peers[0], Ack("q", 4))
    resuming.resume(peers[1], "q", request.token, 1, 4)
    assert pulled(request) == last
    resuming.acknowledge(peers[1], Ack("q", 4, last=True))
    assert not resuming._streams and not resuming.held


def pulled(request: ResumableRequest) -> Any:
    assert request._sender is not None
    return request.pull_for(request._sender)


@pytest.mark.parametrize("ending", ["text", "table", "error", "timeout", "none"])
def test_answered_while_nobody_is_there(server: LocalServer, come: Come, ending: str) -> None:
    """The token comes before anything else of the answer."""
    go_on.clear()
    resumer = come(server.url)
    if ending == "timeout":
        resumer.ask(ENDLESS, timeoutMs=200, window=1000)
    elif ending == "none":
        resumer.ask("set threads = 2")
    else:
        resumer.ask(type="later", ending=ending)
    if ending == "none":
        resumer.lose()
    else:
        lost(server, resumer)
    go_on.set()
    if ending != "table":
        wait_until(lambda: bool(of(server)._kept))
    resumer.finish()
    if ending == "table":
        assert resumer.table().to_pydict() == {"a": [1]}
        return
    assert resumer.answer is not None
    expected = {"text": "reply", "none": "ok"}.get(ending, "error")
    assert (resumer.answer["type"], resumer.answer["queryId"]) == (expected, "attempt 1")
    assert resumer.answer.get("data") == ({"queryId": "attempt 0"} if ending == "text" else None)


def refused(wire: Wire, token: Any, seq: Any = 0, **more: Any) -> dict[str, Any]:
    reply = wire.request(type="resume", queryId="r", token=token, seq=seq, **more)
    assert (reply["type"], reply["queryId"]) == ("error", "r")
    return {"code": reply["code"], "text": reply["error"]}


def test_what_cannot_be_resumed(server: LocalServer, come: Come) -> None:
    resumer = come(server.url)
    resumer.ask("select range as a from range(1000)", window=1000)
    resumer.read(1000)
    with server.connect() as wire:
        unknown = refused(wire, "unknown")
        assert unknown["code"] == "gone" and "--resume-timeout" in unknown["text"]
        for token, seq in ((None, 0), (5, 0), (resumer.token, None), (resumer.token, -1)):
            assert refused(wire, token, seq)["code"] == "bad_request"
        assert "were sent" in refused(wire, resumer.token, 1000)["text"]
        assert "bytes" in refused(wire, resumer.token, 1, bytes=10**6)["text"]
        # None of these has harmed it.
        resumer.finish()
        assert resumer.table().num_rows == 1000
        wait_until(lambda: is_empty(server))
        assert refused(wire, resumer.token) == unknown
    with server.connect() as wire:
        session = {"stream": True, "resumable": True, "session": "s"}
        for options in ({"resumable": True}, {"stream": True, "resumable": 1}, session):
            reply = wire.request(type="arrow", sql="select 1", queryId=1, **options)
            assert reply["code"] == "bad_request" and "resumable" in reply["error"]


def test_what_was_sent_long_ago_is_gone(server: LocalServer, come: Come) -> None:
    resumer = come(server.url, acks=False)
    resumer.ask(ENDLESS)
    resumer.read(10 << 20)
    with server.connect() as wire:
        error = refused(wire, resumer.token, 1)
        assert error["code"] == "gone" and "--resume-window" in error["text"]
    # Whoever cannot go on begins again; nobody else can go on either.
    resumer.answer = None
    while resumer.answer is None:
        resumer.receive()
    assert resumer.answer["code"] == "cancelled"
    wait_until(lambda: is_empty(server))


def test_another_connection_takes_over(server: LocalServer, come: Come) -> None:
    """A server may not have noticed yet that the old one is dead."""
    resumer = come(server.url)
    resumer.ask(BIG, window=1 << 20)
    resumer.read(1 << 20)
    old, old_id = resumer.wire, resumer.query_id
    assert old is not None
    with old:
        same = {"type": "resume", "token": resumer.token, "seq": resumer.seq}
        resumer.send(**same, queryId="again")
        streams = Streams(old)
        error = streams.until("error")
        assert (error["code"], error["queryId"]) == ("conflict", "again")
        resumer.resume()
        error = streams.until("error")
        assert (error["code"], error["queryId"]) == ("gone", old_id)
        # Its id is free, and nothing else comes for it.
        assert stream(old, "select 1 as a", query_id=old_id).table().num_rows == 1
        resumer.read(3 << 20)
    resumer.finish()
    assert resumer.body == whole(server)


def test_an_id_that_is_in_use_and_a_full_connection(launch: Launch, come: Come) -> None:
    server = launch(resume_window=WINDOW, max_in_flight=2)
    resumer = come(server.url)
    resumer.ask(BIG, window=1 << 20)
    resumer.read(1 << 20)
    lost(server, resumer)
    with server.connect() as wire:
        streams = Streams(wire)
        streams.ask(ENDLESS, "r", window=10)
        streams.receive()
        assert refused(wire, resumer.token, resumer.seq)["code"] == "conflict"
        streams.ask(ENDLESS, "s", window=10)
        reply = wire.receive()
        while reply.header["queryId"] != "s":
            reply = wire.receive()
        wire.send(type="resume", queryId="t", token=resumer.token, seq=resumer.seq)
        assert streams.until("error")["code"] == "busy"
    resumer.finish()
    assert resumer.body == whole(server)


def test_cancel_of_a_stream_that_was_resumed(server: LocalServer, come: Come) -> None:
    resumer = come(server.url)
    resumer.ask(ENDLESS, window=1 << 20)
    resumer.read(1 << 20)
    lost(server, resumer)
    resumer.resume()
    resumer.read(3 << 20)
    resumer.send(type="cancel", queryId=resumer.query_id)
    resumer.finish()
    assert resumer.answer is not None and resumer.answer["code"] == "cancelled"
    assert {"type": "cancelAck", "queryId": resumer.query_id, "cancelled": True} in resumer.others
    wait_until(lambda: not server.server.scheduler._jobs)


def test_nobody_comes_back(launch: Launch, come: Come) -> None:
    """Its cursor and what was kept are freed; the time of a client does not count meanwhile."""
    server = launch(resume_window=WINDOW, resume_timeout=1)
    resumers = [come(server.url, acks=acks) for acks in (True, False)]
    for resumer, sql in zip(resumers, (ENDLESS, "select 1 as a"), strict=True):
        resumer.ask(sql, window=1 << 20)
        resumer.read(1)
    waiting = next(iter(of(server)._streams.values()))
    for resumer in resumers:
        resumer.lose()
    wait_until(lambda: waiting in of(server)._waiting)
    assert of(server).held > 0 and waiting._stalled is None
    wait_until(lambda: is_empty(server))
    with server.connect() as wire:
        for resumer in resumers:
            assert refused(wire, resumer.token, resumer.seq)["code"] == "gone"
        wire.exec("create table t as select 1 as i")
        wire.exec("force checkpoint")


def test_too_many_wait(launch: Launch, come: Come) -> None:
    server = launch(resume_window=WINDOW, max_waiting_streams_per_user=2)
    resumers = []
    for _ in range(4):
        resumers.append(come(server.url))
        resumers[-1].ask(ENDLESS, window=1 << 20)
        resumers[-1].read(1 << 20)
    for resumer in resumers:
        lost(server, resumer)
    assert len(of(server)._streams) == 2
    wait_until(lambda: len(server.server.scheduler._jobs) == 2)
    codes = []
    for resumer in resumers:
        resumer.resume()
        resumer.receive()
        codes.append(resumer.answer and resumer.answer["code"])
        resumer.close()
    assert codes == ["gone", "gone", None, None]


def test_all_of_them_together_keep_no_more_than_allowed(launch: Launch, come: Come) -> None:
    server = launch(resume_window=WINDOW, resume_memory=3 << 20)
    complete, first, second = (come(server.url, acks=False) for _ in range(3))
    complete.ask("select range as a from range(100000)")
    complete.read(800_000)
    for resumer in (first, second):
        resumer.ask(BIG, window=2 << 20)
        resumer.read(2 << 20)
        assert 2 << 20 <= of(server).held <= 3 << 20
    texts = []
    for resumer in (complete, first, second):
        resumer.lose()
        resumer.seq, resumer.body = 0, bytearray()
        resumer.resume()
        resumer.receive()
        texts.append("" if resumer.answer is None else resumer.answer["error"])
    assert "no such stream" in texts[0] and not texts[1] and "--resume-memory" in texts[2]


def test_a_client_is_told_what_its_window_is(server: LocalServer) -> None:
    with server.connect() as wire:
        assert "resume" in wire.request(type="hello")["features"]
        for window, bound in ((1000, 1000), (WINDOW * 2, WINDOW), (None, WINDOW)):
            wire.send(
                **{"type": "arrow", "sql": BIG, "queryId": "w", "stream": True},
                **{"resumable": True, "window": window},
            )
            told = wire.receive()
            token = told.pop("token")
            assert len(token) > 20
            assert told == {
                **{"type": "resumable", "queryId": "w", "window": bound, "timeoutMs": 60_000},
            }
            wire.send(type="cancel", queryId="w")
            streams = Streams(wire)
            assert streams.until("error")["code"] == "cancelled"


def test_without_a_window_the_option_has_no_effect(launch: Launch) -> None:
    server = launch()
    with CuttingProxy(server.port) as proxy, connect(proxy.url) as client:
        batches = iter(client.query(ENDLESS, resume=True))
        # Before anybody has seen something of it, it would just be asked again.
        next(batches)
        proxy.cut()
        with pytest.raises(ConnectionLost, match="keeps no results to go on with"):
            list(batches)
    with server.connect() as wire:
        assert "resume" not in wire.request(type="hello")["features"]
        assert stream(wire, "select 1 as a", resumable=True).table().num_rows == 1
        reply = wire.request(type="resume", queryId=1, token="t", seq=0)
        assert reply["code"] == "bad_request" and "--resume-window" in reply["error"]


TOKENS = f"""
[roles.reader]
read_channels = ["*"]

[tokens.ada]
role = "reader"
hash = "{digest("ada-token")}"

[tokens.bob]
role = "reader"
hash = "{digest("bob-token")}"
"""


BUDGETS = [2000, 300_000, 1_200_000, 2_000_000, 3_000_000]


def test_the_client_goes_on_by_itself(server: LocalServer) -> None:
    with CuttingProxy(server.port, BUDGETS) as proxy, connect(proxy.url) as client:
        with client.query(BIG, resume=True) as result:
            batches = list(result)
        assert proxy.cuts > 2
        assert result.summary is not None and result.summary.rows == 800_000
        wait_until(lambda: is_empty(server))
    assert pa.Table.from_batches(batches).equals(pa.ipc.open_stream(whole(server)).read_all())


def test_the_client_for_asyncio_goes_on_by_itself(server: LocalServer) -> None:
    async def run(url: str) -> pa.Table:
        async with connect_async(url) as client:
            result = await client.query(BIG, resume=True)
            return pa.Table.from_batches([batch async for batch in result])

    with CuttingProxy(server.port, BUDGETS) as proxy:
        table = asyncio.run(run(proxy.url))
        assert proxy.cuts > 2
    assert table.equals(pa.ipc.open_stream(whole(server)).read_all())


def test_the_client_when_the_server_has_not_kept_it(server: LocalServer) -> None:
    with CuttingProxy(server.port) as proxy, connect(proxy.url) as client:
        batches = iter(client.query(BIG, resume=True))
        next(batches)
        of(server).close()
        wait_until(lambda: not of(server)._streams)
        proxy.cut()
        with pytest.raises(ConnectionLost, match="has not kept the result"):
            list(batches)
        # A query that reads is sent again when nobody has seen anything of its result.
        assert client.query(BIG, resume=True).to_arrow().num_rows == 800_000


def test_only_the_same_identity_resumes(launch: Launch, tmp_path: Path, come: Come) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS)
    server = launch(resume_window=WINDOW, tokens=str(path))
    resumers = [come(f"{server.url}/?token=ada-token") for _ in range(2)]
    for resumer in resumers:
        resumer.ask(BIG, window=1 << 20)
        resumer.read(1 << 20)
    first, second = resumers
    with server.connect("/?token=bob-token") as wire:
        unknown = refused(wire, "unknown")
        assert refused(wire, first.token, first.seq) == unknown
    lost(server, first)
    with server.connect("/?token=bob-token") as wire:
        assert refused(wire, first.token, first.seq) == unknown
    first.finish()
    with server.connect("/?token=ada-token") as wire:
        assert first.body == stream(wire, BIG).body
    lost(server, second)
    path.write_text(TOKENS.replace('read_channels = ["*"]', "read_channels = []"))
    server.server.reload()
    with server.connect("/?token=ada-token") as wire:
        assert refused(wire, second.token, second.seq) == unknown


def test_a_stream_of_another_app_is_unknown(come: Come) -> None:
    server = ServerOfApps(AppConfig("a"), resume_window=WINDOW)
    try:
        resumer = come(f"ws://127.0.0.1:{server.port}/a")
        resumer.ask(BIG, window=1 << 20)
        resumer.read(1 << 20)
        resumer.lose()
        with server.connect("/") as wire:
            assert refused(wire, resumer.token, resumer.seq) == refused(wire, "unknown")
        resumer.finish()
        assert resumer.summary is not None and resumer.summary["rows"] == 800_000
    finally:
        server.server.stop()


def test_the_server_stops(launch: Launch, come: Come) -> None:
    server = launch(resume_window=WINDOW)
    resumers = [come(server.url) for _ in range(3)]
    for resumer in resumers:
        resumer.ask(ENDLESS, window=1 << 20)
        resumer.read(1 << 20)
    lost(server, resumers[0])
    lost(server, resumers[1])
    resuming = of(server)
    began = time.monotonic()
    assert server.server.stop()
    assert time.monotonic() - began < 5
    assert not resuming._streams and not resuming.held
    while resumers[2].answer is None:
        resumers[2].receive()
    assert resumers[2].answer["code"] == "shutting_down"
