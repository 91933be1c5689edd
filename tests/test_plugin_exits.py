"""Plugins that end what is theirs with more than an ``Exception``: nobody else notices."""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import Plugin, Response, on, route, stream
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import DEADLINE, Wire, framed, ipc


class Worse(BaseException):
    """What no plugin should raise, and libraries do."""


ENDS: dict[str, type[BaseException]] = {
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
    "base": Worse,
}


class Body:
    """Of an answer; its end fails."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._count = 0

    def __next__(self) -> bytes:
        self._count += 1
        if self._count > 1:
            raise StopIteration
        return b"x"

    def close(self) -> None:
        raise self._error


class Ending(Plugin):
    """Ends at whatever a client names."""

    def __init__(self) -> None:
        super().__init__("ending")
        self.told: Queue[str] = Queue()

    @on("plain")
    def plain(self, call: Any) -> None:
        raise ENDS[call.message["how"]]

    @on("async")
    async def asynchronous(self, call: Any) -> Any:
        if "how" in call.message:
            raise ENDS[call.message["how"]]
        return "here"

    @on("task")
    async def task(self, call: Any) -> None:
        async def end() -> None:
            raise ENDS[call.message["how"]]

        self.server.create_task(end())

    @route("GET", "/plain/")
    def get(self, call: Any) -> Any:
        def body() -> Iterator[bytes]:
            yield b"x"
            raise ENDS[call.rest]

        return body()

    @route("GET", "/async/")
    async def get_async(self, call: Any) -> Any:
        async def body() -> Any:
            yield b"x"
            raise ENDS[call.rest]

        return body()

    @route("GET", "/close/")
    def get_closing(self, call: Any) -> Any:
        return Response(Body(ENDS[call.rest]()))

    @stream("one", inputs=["a"], outputs=["b"])
    async def one(self, call: Any) -> None:
        raise ENDS[call.message["how"]]

    @stream("many", inputs=["a"], outputs=["b"])
    class Many:
        def __init__(self, call: Any) -> None:
            self.error = ENDS[call.message["how"]]

        def on_batch(self, batch: Any, name: str) -> None:
            raise self.error

        def on_close(self) -> None:
            raise self.error

    def authorize(self, client: Any, action: Any) -> None:
        if action.kind == "exec" and action.resource in ENDS:
            raise ENDS[action.resource]

    def around_query(self, query: Any, run: Any) -> Any:
        for how, error in ENDS.items():
            if query.sql == f"select '{how}'":
                raise error
        return run(query)

    def query_done(self, query: Any, outcome: Any) -> None:
        self.told.put(query.sql)
        for how, error in ENDS.items():
            if query.sql == f"select '{how} done'":
                raise error

    def stopping(self) -> None:
        raise SystemExit

    async def stopped(self) -> None:
        raise SystemExit


@pytest.fixture(scope="module")
def ending() -> Ending:
    return Ending()


@pytest.fixture(scope="module")
def server(ending: Ending) -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0, plugin_workers=4), [ending])
    yield local
    assert local.server.stop()


@pytest.fixture(params=ENDS)
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wire(server: LocalServer) -> Iterator[Wire]:
    with server.connect() as wire:
        yield wire


def works(wire: Wire) -> None:
    """What plugins run on is still there: each thread, and the loop of asyncio."""
    assert wire.request(type="async", queryId="a")["data"] == "here"
    for _ in range(8):
        assert wire.request(type="plain", queryId="p", how="base")["code"] == "internal"


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_it_fails_its_own_message(wire: Wire, kind: str, how: str) -> None:
    error = wire.request(type=kind, queryId=1, how=how)
    assert error["code"] == "internal" and ENDS[how].__name__ in error["error"]
    works(wire)


def test_it_fails_its_own_task(wire: Wire, how: str) -> None:
    assert wire.request(type="task", how=how)["type"] == "ok"
    works(wire)


@pytest.mark.parametrize("path", ["plain", "async", "close"])
def test_it_ends_its_own_answer(server: LocalServer, wire: Wire, path: str, how: str) -> None:
    url = f"{server.url.replace('ws', 'http', 1)}/{path}/{how}"
    for _ in range(5):
        try:
            with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
                assert answer.read() == b"x"
            assert path == "close"
        except (http.client.IncompleteRead, ConnectionError):
            assert path != "close"
    works(wire)


@pytest.mark.parametrize("kind", ["one", "many"])
def test_it_ends_its_own_stream(wire: Wire, kind: str, how: str) -> None:
    assert wire.request(type=kind, queryId=1, how=how)["type"] == "streamBegin"
    head = {"type": "streamData", "queryId": 1, "input": "a", "seq": 0, "last": True}
    wire.send_raw(framed(head, ipc(pa.table({"a": [1]}))))
    while (error := wire.receive())["type"] == "streamAck":
        pass
    assert error["code"] == "internal" and ENDS[how].__name__ in error["error"]
    works(wire)


def test_it_fails_its_own_query(wire: Wire, how: str) -> None:
    for error in (
        wire.request(type="exec", queryId=1, sql=how),
        wire.arrow(f"select '{how}'"),
    ):
        assert error["code"] == "internal" and ENDS[how].__name__ in error["error"]
    works(wire)


def test_it_misses_no_later_query(ending: Ending, wire: Wire, how: str) -> None:
    wire.table(f"select '{how} done'")
    wire.table("select 1")
    while ending.told.get(timeout=DEADLINE) != "select 1":
        pass
