"""Plugins by way of the Python client: calls, objects, and the example of a figure."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import ObjectType, Plugin
from sqlrooms_server.client import (
    AsyncResult,
    Client,
    ConnectionLost,
    Fetched,
    QueryTimeout,
    Reference,
    RequestFailed,
    Result,
    connect,
    connect_async,
)
from sqlrooms_server.plugins.loading import load
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import DEADLINE

DOCS = Path(__file__).parent.parent / "docs"
TABLE = pa.table({"a": [1, 2, 3]})
LARGE = pa.table({"a": range(2_000_000)})


class Shelf:
    """An object that is fetched, with references, or opened."""


class ShelfType(ObjectType):
    name = "shelf"

    def is_type(self, obj: Any) -> bool:
        return isinstance(obj, Shelf)

    def to_bytes(self, obj: Shelf) -> Any:
        return b"books", [TABLE, Shelf()]

    def create_client_connection(self, obj: Shelf, stream: Any) -> Any:
        return Echo(stream)


class Echo:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def on_data(self, payload: bytes, references: list[Any]) -> None:
        if payload == b"end":
            self.stream.close()
        elif payload == b"fail":
            raise ValueError
        elif payload == b"large":
            for _ in range(20):
                self.stream.send(bytes(1 << 20))
        elif payload == b"give":
            self.stream.send(b"given", [TABLE])
        elif payload != b"quiet":
            self.stream.send(json.dumps([len(payload), [type(obj).__name__ for obj in references]]))

    def on_close(self) -> None: ...


def made() -> Plugin:
    plugin = Plugin("mine")
    plugin.object_type(ShelfType)

    @plugin.on("greet")
    def greet(call: Any) -> Any:
        return {"text": f"Hello {call.message['name']}", "fields": call.message}

    @plugin.on("shout")
    async def shout(call: Any) -> bytes:
        return bytes(call.body).upper()

    @plugin.on("table")
    def table(call: Any) -> Any:
        return LARGE

    @plugin.on("nothing")
    def nothing(call: Any) -> None:
        for number in range(3):
            call.send(number)

    @plugin.on("hang")
    async def hang(call: Any) -> None:
        try:
            await asyncio.sleep(DEADLINE)
        except asyncio.CancelledError:
            call.client.state["cancelled"].set()
            raise

    @plugin.on("arm")
    def arm(call: Any) -> None:
        call.client.state["cancelled"] = threading.Event()

    @plugin.on("wait")
    def wait(call: Any) -> Any:
        return call.client.state["cancelled"].wait(DEADLINE)

    return plugin


@pytest.fixture(scope="module")
def local() -> Iterator[LocalServer]:
    server = LocalServer(Settings(port=0, max_object_references=4), [made()])
    for name, obj in (("table", TABLE), ("large", LARGE), ("shelf", Shelf())):
        server.server.publish(name, obj)
    yield server
    server.server.stop()


@pytest.fixture
def db(local: LocalServer) -> Iterator[Client]:
    with connect(local.url) as client:
        yield client


def test_calls_return_what_the_plugin_does(db: Client) -> None:
    answer = db.call("greet", {"from": 1}, name="Ada", none=None)
    assert answer["text"] == "Hello Ada"
    assert answer["fields"] == {"from": 1, "name": "Ada", "none": None}
    assert db.call("shout", body=b"x" * 200_000) == b"X" * 200_000
    assert db.call("table", compression="lz4") == LARGE
    events: list[Any] = []
    assert db.call("nothing", on_event=events.append) is None and events == [0, 1, 2]
    with pytest.raises(RequestFailed, match="Unknown message type"):
        db.call("unknown")
    with pytest.raises(ValueError, match="'stream' is of the protocol"):
        db.call("greet", stream=1)
    with pytest.raises(TypeError, match="no JSON value"):
        db.call("greet", name=object())


def test_a_call_that_takes_too_long_is_cancelled(db: Client) -> None:
    db.call("arm")
    with pytest.raises(QueryTimeout):
        db.call("hang", timeout=0.05)
    assert db.call("wait") is True


def test_an_interrupted_call_is_cancelled(local: LocalServer) -> None:
    async def run() -> None:
        async with connect_async(local.url) as db:
            await db.call("arm")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(db.call("hang"), 0.05)
            assert await db.call("wait") is True
            assert await db.call("table") == LARGE

    asyncio.run(run())


def test_objects_are_listed_and_fetched(db: Client) -> None:
    objects = {one.name: one for one in db.objects()}
    assert list(objects) == ["large", "shelf", "table"]
    assert objects["shelf"].object_type == "shelf" and objects["shelf"].can_open
    for which in ("table", objects["table"]):
        table = db.fetch(which)
        assert isinstance(table, Result) and table.to_arrow() == TABLE
    large = db.fetch("large", compression="zstd")
    assert isinstance(large, Result)
    assert sum(batch.num_rows for batch in large) == 2_000_000
    assert large.summary is not None and large.summary.rows == 2_000_000
    with pytest.raises(RequestFailed, match="no object 'nothing'") as raised:
        db.fetch("nothing")
    assert raised.value.code == "not_found"


def test_references_are_used_and_dropped(db: Client) -> None:
    # More often than the server would let one connection hold on to them.
    for _ in range(10):
        shelf = db.fetch("shelf")
        assert isinstance(shelf, Fetched) and shelf.payload == b"books"
        table, inner = shelf.references
        found = db.fetch(table)
        assert isinstance(found, Result) and found.to_arrow() == TABLE
        with db.open(inner) as stream:
            stream.send(b"hi", [table])
            message = stream.receive(DEADLINE)
            assert message is not None and json.loads(message.payload) == [2, ["Table"]]
        del shelf, table, inner, found
        gc.collect()
    kept = db.fetch("shelf")
    assert isinstance(kept, Fetched)
    kept.references[0].release()
    with pytest.raises(RequestFailed) as raised:
        db.fetch(kept.references[0])
    assert raised.value.code == "gone"


def test_an_open_object_is_talked_to(db: Client) -> None:
    with db.open("shelf") as stream:
        for number in range(50):
            stream.send("x" * number)
        for number in range(50):
            message = stream.receive(DEADLINE)
            assert message is not None and json.loads(message.payload) == [number, []]
        with pytest.raises(TimeoutError):
            stream.receive(0.01)
        stream.send(b"give")
        message = stream.receive(DEADLINE)
        assert message is not None
        (reference,) = message.references
        assert isinstance(reference, Reference) and reference.can_fetch
        stream.send(b"end")
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="closed"):
            while True:
                stream.send(b"more")
    with db.open("shelf") as stream, pytest.raises(RequestFailed, match="'mine' failed on on_data"):
        stream.send(b"fail")
        list(stream)
    with pytest.raises(RequestFailed):
        db.open("table")


def test_windows_hold_both_sides_back(db: Client) -> None:
    with db.open("shelf") as stream:
        for _ in range(40):
            stream.send(b"quiet" if _ % 2 else bytes(300_000))
        for _ in range(20):
            assert stream.receive(DEADLINE) is not None
        stream.send(b"large")
        # The client takes 8 MiB, and the rest when those are read.
        assert sum(len((stream.receive(DEADLINE) or (b"",))[0]) for _ in range(20)) == 20 << 20


def test_a_reader_and_a_sender_share_an_object(db: Client) -> None:
    got: list[Any] = []
    with db.open("shelf") as stream:
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        for _ in range(100):
            stream.send(bytes(50_000))
        stream.send(b"end")
        reader.join(DEADLINE)
    assert len(got) == 100


def test_a_lost_connection_ends_what_is_open(db: Client, local: LocalServer) -> None:
    stream = db.open("shelf")
    assert db.connection_id is not None
    local.server.connections.close(db.connection_id)
    with pytest.raises(ConnectionLost):
        stream.receive(DEADLINE)
    with pytest.raises((ConnectionLost, RuntimeError)):
        stream.send(b"x")
    assert len(db.objects()) == 3


def test_a_watch_tells_what_is_published_and_goes_on(db: Client, local: LocalServer) -> None:
    always = ["large", "shelf", "table"]
    with db.watch_objects() as watch:
        assert [one.name for one in watch.next(DEADLINE)] == always
        with pytest.raises(RuntimeError, match="already"):
            db.watch_objects()
        local.server.publish("b", TABLE)
        assert [one.name for one in watch.next(DEADLINE)] == ["b", *always]
        # What nobody reads is told as one.
        for number in range(100):
            local.server.publish("b", TABLE if number % 2 else Shelf())
        local.server.publish("a", TABLE)
        local.server.objects.unpublish("b")
        while (found := [one.name for one in watch.next(DEADLINE)]) != ["a", *always]:
            assert set(found) <= {"a", "b", *always}
        assert db.connection_id is not None
        local.server.connections.close(db.connection_id)
        assert [one.name for one in watch.next(DEADLINE)] == ["a", *always]
        local.server.objects.unpublish("a")
        assert [one.name for one in watch.next(DEADLINE)] == always
    local.server.publish("c", TABLE)
    assert len(db.objects()) == 4
    local.server.objects.unpublish("c")


def test_asyncio_does_the_same(local: LocalServer) -> None:
    async def run() -> None:
        async with connect_async(local.url) as db:
            assert (await db.call("greet", name="Ada"))["text"] == "Hello Ada"
            assert [one.name for one in await db.objects()] == ["large", "shelf", "table"]
            async with db.watch_objects() as watch:
                assert len(await watch.next(DEADLINE)) == 3
            table = await db.fetch("table")
            assert isinstance(table, AsyncResult) and await table.to_arrow() == TABLE
            shelf = await db.fetch("shelf")
            assert isinstance(shelf, Fetched)
            async with db.open(shelf.references[1]) as stream:
                for number in range(10):
                    await stream.send(b"x" * number, [shelf.references[0]])
                for number in range(10):
                    message = await stream.receive(DEADLINE)
                    assert message is not None
                    assert json.loads(message.payload) == [number, ["Table"]]
                with pytest.raises(TimeoutError):
                    await stream.receive(0.01)
                await stream.send(b"end")
                assert [one async for one in stream] == []
            stream = await db.open("shelf")
            await stream.close()
            assert await stream.receive() is None

    asyncio.run(run())


def test_the_figure_of_the_docs_draws(launch: Callable[..., LocalServer]) -> None:
    path = DOCS / "examples" / "figure.py"
    local = launch(*load([str(path)]))
    with connect(local.url) as db, db.open("wave") as figure:

        def drawn() -> Any:
            drawing, references = figure.receive(DEADLINE) or (b"", [])
            reference, column = json.loads(drawing)["data"][0]["x"]
            points = db.fetch(references[reference])
            assert isinstance(points, Result)
            return points.to_arrow().column(column).to_pylist()

        assert len(drawn()) == 1000
        figure.send(json.dumps({"range": [10, 11]}))
        assert drawn() == pytest.approx([10 + number / 10 for number in range(11)])
