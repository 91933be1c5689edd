"""Streams of batches by way of the Python client: both ways, bounded, ended in every state."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import Plugin
from sqlrooms_server.client import (
    Client,
    ConnectionLost,
    QueryTimeout,
    RequestFailed,
    connect,
    connect_async,
)
from sqlrooms_server.errors import Forbidden
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import DEADLINE

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
# 16 MB: more than any window of this module.
LARGE = pa.table({"a": range(2_000_000)})
BATCH = TABLE.to_batches()[0]


class Handlers:
    """How often streams of a name have begun and closed.

    One that is cancelled before its handler is called has neither begun nor closed.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.begun: dict[str, int] = defaultdict(int)
        self.closed: dict[str, int] = defaultdict(int)
        self.rows: dict[str, int] = defaultdict(int)

    def note(self, counts: dict[str, int], call: Any) -> None:
        if "name" in call.message:
            with self.changed:
                counts[call.message["name"]] += 1
                self.changed.notify_all()

    def wait_for(self, name: str) -> None:
        self._wait_for(self.closed, name)

    def wait_for_begin(self, name: str) -> None:
        self._wait_for(self.begun, name)

    def _wait_for(self, counts: dict[str, int], name: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: counts[name], DEADLINE)


def made(handlers: Handlers) -> Plugin:
    plugin = Plugin("mine")

    @plugin.stream("echo", inputs=["one", "two"], outputs=["first", "second"])
    class Echo:
        def __init__(self, call: Any) -> None:
            self.call = call
            handlers.note(handlers.begun, call)

        def on_batch(self, batch: Any, name: str) -> None:
            handlers.rows[self.call.message.get("name", "")] += batch.num_rows
            self.call.write("first" if name == "one" else "second", batch)

        def on_close(self) -> None:
            handlers.note(handlers.closed, self.call)

    @plugin.stream("sink", inputs=["one"])
    async def sink(call: Any) -> None:
        async for batch in call.inputs["one"]:
            handlers.rows[call.message["name"]] += batch.num_rows
            call.send(batch.num_rows)

    @plugin.stream("source", outputs=["out", "none", "empty"])
    async def source(call: Any) -> None:
        await call.write("empty", TABLE.slice(0, 0))
        await call.write("out", LARGE)

    @plugin.stream("forever", outputs=["out"])
    async def forever(call: Any) -> None:
        handlers.note(handlers.begun, call)
        try:
            while True:
                await call.write("out", BATCH)
        finally:
            handlers.note(handlers.closed, call)

    @plugin.stream("fail", inputs=["one"], outputs=["out"])
    async def fail(call: Any) -> None:
        async for batch in call.inputs["one"]:
            await call.write("out", batch)
            raise Forbidden("not this one")

    @plugin.stream("hang", outputs=["out"])
    async def hang(call: Any) -> None:
        await asyncio.sleep(DEADLINE)

    @plugin.on("greet")
    def greet(call: Any) -> str:
        return "Hello"

    return plugin


@pytest.fixture(scope="module")
def handlers() -> Handlers:
    return Handlers()


@pytest.fixture(scope="module")
def local(handlers: Handlers) -> Iterator[LocalServer]:
    server = LocalServer(Settings(port=0, stream_window=1 << 20), [made(handlers)])
    yield server
    server.server.stop()


@pytest.fixture
def db(local: LocalServer) -> Iterator[Client]:
    with connect(local.url) as client:
        yield client


def endless(count: list[int]) -> Iterator[pa.RecordBatch]:
    try:
        while True:
            count[0] += 1
            yield LARGE.slice(0, 20_000).to_batches()[0]
    finally:
        count.append(-1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (TABLE, TABLE),
        (TABLE.to_reader(), TABLE),
        (BATCH, TABLE),
        ([TABLE, BATCH], pa.concat_tables([TABLE, TABLE])),
        ((TABLE.slice(row, 1) for row in range(3)), TABLE),
        (BATCH.slice(0, 0), TABLE.slice(0, 0)),
        ([], pa.table({})),
        (None, pa.table({})),
    ],
    ids=["table", "reader", "batch", "list", "generator", "no rows", "no batches", "none"],
)
def test_inputs_are_whatever_has_batches(db: Client, data: Any, expected: pa.Table) -> None:
    with db.stream("echo", inputs={"one": data}) as stream:
        assert stream.inputs == ("one", "two") and stream.outputs == ("first", "second")
        assert stream["first"].to_arrow() == expected
        assert stream["first"].schema == expected.schema
        assert stream["second"].to_arrow() == pa.table({})
        assert list(stream["first"]) == []


def test_a_data_frame_is_an_input(db: Client) -> None:
    pandas = pytest.importorskip("pandas")
    with db.stream("echo", inputs={"one": pandas.DataFrame({"a": [1, 2]})}) as stream:
        assert stream["first"].to_pandas()["a"].tolist() == [1, 2]


def test_outputs_come_before_inputs_have_ended(db: Client) -> None:
    seen: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(5):
            # Goes on when the batch before has come back.
            assert has_come.acquire(timeout=DEADLINE)
            yield pa.RecordBatch.from_pydict({"n": [number]})

    has_come = threading.Semaphore(1)
    with db.stream("echo", inputs={"one": batches()}) as stream:
        for batch in stream["first"]:
            seen.append(batch["n"][0].as_py())
            has_come.release()
    assert seen == list(range(5))


def test_large_inputs_and_outputs_go_through_small_windows(db: Client) -> None:
    rows = {"first": 0, "second": 0}
    with db.stream("echo", inputs={"one": LARGE, "two": LARGE}, compression="lz4") as stream:
        for name, batch in stream:
            rows[name] += batch.num_rows
    assert rows == {"first": 2_000_000, "second": 2_000_000}
    # Each output in a thread of its own.
    with db.stream("echo", inputs={"one": LARGE, "two": LARGE}) as stream:
        got: list[pa.Table] = []
        thread = threading.Thread(target=lambda: got.append(stream["second"].to_arrow()))
        thread.start()
        assert stream["first"].to_arrow() == LARGE
        thread.join(DEADLINE)
    assert got == [LARGE]


def test_what_nobody_reads_is_neither_sent_nor_asked_for(db: Client, handlers: Handlers) -> None:
    count = [0]
    with db.stream("echo", inputs={"one": endless(count)}, name="unread") as stream:
        assert next(iter(stream["first"])).num_rows
        # Until no more is asked for: 160 kB each, of which windows and buffers hold no 30 MB.
        same = before = 0
        while same < 100:
            db.call("greet")
            same, before = (same + 1 if count[0] == before else 0), count[0]
            assert before < 200
    handlers.wait_for("unread")


def test_closing_and_dropping_a_stream_cancels_it(db: Client, handlers: Handlers) -> None:
    stream = db.stream("forever", name="closed")
    batches = iter(stream["out"])
    assert next(batches) == BATCH
    stream.close()
    handlers.wait_for("closed")
    with pytest.raises(RuntimeError, match="closed before its end"):
        list(stream["out"])
    output = db.stream("forever", name="dropped")["out"]
    assert next(iter(output)) == BATCH
    gc.collect()
    assert not handlers.closed["dropped"]
    del output
    gc.collect()
    handlers.wait_for("dropped")
    count = [0]
    with db.stream("echo", inputs={"one": endless(count)}, name="input") as stream:
        next(iter(stream))
    handlers.wait_for("input")
    assert db.call("greet") == "Hello"


def test_an_interrupt_cancels_a_stream(
    db: Client, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = db.stream("forever", name="interrupted")
    get = db._get

    def interrupted(need: Any) -> Any:
        handlers.wait_for_begin("interrupted")
        monkeypatch.setattr(db, "_get", get)
        raise KeyboardInterrupt

    monkeypatch.setattr(db, "_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream["out"].to_arrow()
    handlers.wait_for("interrupted")
    assert db.call("greet") == "Hello"


def test_what_an_input_raises_ends_the_stream(db: Client, handlers: Handlers) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield BATCH
        handlers.wait_for_begin("raised")
        raise ZeroDivisionError

    with db.stream("echo", inputs={"one": batches()}, name="raised") as stream:
        with pytest.raises(ZeroDivisionError):
            list(stream)
        with pytest.raises(ZeroDivisionError):
            list(stream["first"])
    handlers.wait_for("raised")
    others = [BATCH, pa.table({"other": [1]})]
    with db.stream("echo", inputs={"one": others}) as stream:
        with pytest.raises(ValueError, match=r"Input 'one': .* different schema"):
            list(stream)
    with db.stream("echo", inputs={"one": [BATCH, 3]}) as stream:
        with pytest.raises(TypeError, match="gave a int, which is no batch"):
            stream.finish()


def test_what_cannot_be_is_refused(db: Client) -> None:
    for data in ("text", 3, {"a": 1}):
        with pytest.raises(TypeError, match="Input 'one' is a"):
            db.stream("echo", inputs={"one": data})
    with pytest.raises(ValueError, match="no input 'three'; the stream has 'one', 'two'"):
        db.stream("echo", inputs={"three": TABLE})
    with pytest.raises(KeyError, match="no output 'third'; the stream has 'first', 'second'"):
        db.stream("echo")["third"]
    with pytest.raises(ValueError, match="'window' is of the protocol"):
        db.stream("echo", window=3)
    with pytest.raises(ValueError, match="'greet' is no stream"):
        db.stream("greet")
    with pytest.raises(ValueError, match="'echo' is a stream of batches"):
        db.call("echo")
    with pytest.raises(RequestFailed, match="Unknown message type"):
        db.stream("unknown")

    async def later() -> AsyncIterator[pa.RecordBatch]:
        yield BATCH

    with pytest.raises(TypeError, match="Only the client for asyncio"):
        db.stream("echo", inputs={"one": later()})
    assert db.call("greet") == "Hello"


def test_errors_of_the_server_are_raised(db: Client) -> None:
    count = [0]
    with db.stream("fail", inputs={"one": endless(count)}) as stream:
        with pytest.raises(RequestFailed, match="not this one") as raised:
            list(stream["out"])
        assert raised.value.code == "forbidden"
    with db.stream("hang", timeout=0.05) as stream, pytest.raises(QueryTimeout):
        list(stream["out"])


def test_a_stream_without_outputs_is_waited_for(db: Client, handlers: Handlers) -> None:
    events: list[Any] = []
    inputs = {"one": [BATCH] * 3}
    with db.stream("sink", inputs=inputs, name="sink", on_event=events.append) as stream:
        stream.finish()
        stream.finish()
        assert list(stream) == []
    assert handlers.rows["sink"] == 9 and sum(events) == 9


def test_outputs_without_batches_or_rows(db: Client) -> None:
    with db.stream("source") as stream:
        found: dict[str, int] = defaultdict(int)
        for name, batch in stream:
            found[name] += batch.num_rows
    assert found == {"out": 2_000_000, "empty": 0}
    with db.stream("source") as stream:
        assert stream["out"].to_arrow() == LARGE
        assert stream["none"].to_arrow() == pa.table({})
        assert stream["empty"].to_arrow() == TABLE.slice(0, 0)


def test_a_lost_connection_ends_a_stream(db: Client, local: LocalServer) -> None:
    count = [0]
    stream = db.stream("echo", inputs={"one": endless(count)})
    assert db.connection_id is not None
    local.server.connections.close(db.connection_id)
    with pytest.raises(ConnectionLost):
        list(stream)
    with pytest.raises(ConnectionLost):
        list(stream["second"])
    assert db.call("greet") == "Hello"


def test_asyncio_does_the_same(local: LocalServer, handlers: Handlers) -> None:
    is_closed = asyncio.Event()

    async def batches(count: int) -> AsyncIterator[pa.RecordBatch]:
        try:
            for _ in range(count):
                yield BATCH
            if count == 1:
                await asyncio.sleep(DEADLINE)
        finally:
            is_closed.set()

    async def run() -> None:
        async with connect_async(local.url) as db:
            inputs = {"one": LARGE, "two": batches(5)}
            async with db.stream("echo", inputs=inputs) as stream:
                first, second = await asyncio.gather(
                    stream["first"].to_arrow(), stream["second"].to_arrow()
                )
            assert first == LARGE and second == pa.concat_tables([TABLE] * 5)
            is_closed.clear()
            # One that waits for its input is let go.
            stream = await db.stream("echo", inputs={"one": batches(1)}, name="aio")
            async for name, batch in stream:
                assert name == "first" and batch == BATCH
                break
            await stream.close()
            assert is_closed.is_set()
            handlers.wait_for("aio")
            output = (await db.stream("forever", name="aio dropped"))["out"]
            await asyncio.to_thread(handlers.wait_for_begin, "aio dropped")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(output.to_arrow(), 0.05)
            await asyncio.to_thread(handlers.wait_for, "aio dropped")
            stream = await db.stream("forever", name="aio lost")
            await asyncio.to_thread(handlers.wait_for_begin, "aio lost")
            del stream
            gc.collect()
            await asyncio.to_thread(handlers.wait_for, "aio lost")
            with pytest.raises(RequestFailed, match="not this one"):
                async with db.stream("fail", inputs={"one": [BATCH]}) as failing:
                    await failing.finish()
            with pytest.raises(ValueError, match="no input"):
                await db.stream("echo", inputs={"three": TABLE})
            assert await db.call("greet") == "Hello"

    asyncio.run(run())
