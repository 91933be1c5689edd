"""Streams of batches through handlers of plugins: both ways, bounded, ended in every state."""

from __future__ import annotations

import asyncio
import re
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from sqlrooms_server import Plugin, StartupError, stream
from sqlrooms_server.errors import Cancelled, Forbidden
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.leaks import assert_leaks_nothing
from tests.wire import DEADLINE, Arrow, Wire, framed, ipc

Launch = Callable[..., LocalServer]

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})


class Streaming:
    """A stream as a client sees it."""

    def __init__(self, wire: Wire, kind: str, query_id: Any = "s", **fields: Any) -> None:
        self.wire = wire
        self.query_id = query_id
        self.seqs: dict[str, int] = defaultdict(int)
        self.sent: dict[str, int] = defaultdict(int)
        self.bodies: dict[str, bytes] = defaultdict(bytes)
        self.received: dict[str, int] = defaultdict(int)
        self.last: dict[str, dict[str, Any]] = {}
        self.consumed: dict[str, int] = defaultdict(int)
        self.events: list[Any] = []
        self.end: dict[str, Any] | None = None
        wire.send(type=kind, queryId=query_id, **fields)

    def send(self, name: str, body: bytes, last: bool = False, **more: Any) -> None:
        header = {"type": "streamData", "queryId": self.query_id, "input": name, "last": last}
        self.wire.send_raw(framed({**header, "seq": self.sent[name], **more}, body))
        self.sent[name] += 1

    def ack(self, output: str) -> None:
        size = self.received[output]
        self.wire.send(type="streamAck", queryId=self.query_id, output=output, bytes=size)

    def receive(self) -> Any:
        """The next message, which is remembered."""
        message = self.wire.receive()
        if isinstance(message, Arrow):
            header = message.header
            name = header["output"]
            assert header["type"] == "streamData" and header["queryId"] == self.query_id
            assert header["seq"] == self.seqs[name] and name not in self.last
            self.seqs[name] += 1
            self.bodies[name] += message.body
            self.received[name] += len(message.body)
            if header["last"]:
                self.last[name] = header
                assert header["bytes"] == self.received[name]
        elif message["type"] == "streamAck":
            self.consumed[message["input"]] = message["bytes"]
        elif message["type"] == "event":
            self.events.append(message["data"])
        elif message["type"] in ("streamEnd", "error"):
            assert message["queryId"] == self.query_id
            self.end = message
        return message

    def finish(self) -> dict[str, Any]:
        """Receive up to the end."""
        while self.end is None:
            self.receive()
        return self.end

    def table(self, output: str) -> pa.Table:
        return pa.ipc.open_stream(self.bodies[output]).read_all()


class Recording:
    """What handlers of :func:`plugin` have lived through, by the name that their client gave."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.seen: dict[str, list[Any]] = defaultdict(list)
        self.release = threading.Event()

    def note(self, call: Any, *what: Any) -> None:
        with self.lock:
            self.seen[call.message.get("name", "")].append(what)
            self.lock.notify_all()

    def wait_for(self, name: str, what: str, count: int = 1) -> None:
        def has_come() -> bool:
            return [entry[0] for entry in self.seen[name]].count(what) >= count

        with self.lock:
            assert self.lock.wait_for(has_come, DEADLINE), (name, what, self.seen[name])


def echoing(recording: Recording) -> Plugin:
    """Two inputs, two outputs, in each of the forms that a handler can have."""
    plugin = Plugin("mine")
    names: Any = {"inputs": ["one", "two"], "outputs": ["line", "log"]}

    @plugin.stream("plain", **names)
    class Plain:
        def __init__(self, call: Any) -> None:
            self.call = call
            self.rows = 0
            recording.note(call, "init", threading.current_thread().name)

        def on_batch(self, batch: Any, name: str) -> None:
            recording.note(self.call, "batch", name, batch.num_rows)
            self.rows += batch.num_rows
            self.call.write("line" if name == "one" else "log", batch)

        def on_end(self, name: str) -> None:
            recording.note(self.call, "end", name)

        def on_close(self) -> None:
            recording.note(self.call, "close", threading.current_thread().name)

    @plugin.stream("async", **names)
    class Async:
        def __init__(self, call: Any) -> None:
            self.call = call

        async def on_batch(self, batch: Any, name: str) -> None:
            recording.note(self.call, "batch", name, batch.num_rows)
            await self.call.write("line" if name == "one" else "log", batch)

        async def on_end(self, name: str) -> None:
            recording.note(self.call, "end", name)

        async def on_close(self) -> None:
            recording.note(self.call, "close", threading.current_thread().name)

    @plugin.stream("function", **names)
    async def function(call: Any) -> None:
        async def copy(name: str, output: str) -> None:
            async for batch in call.inputs[name]:
                recording.note(call, "batch", name, batch.num_rows)
                await call.write(output, batch)
            recording.note(call, "end", name)

        try:
            await asyncio.gather(copy("one", "line"), copy("two", "log"))
        finally:
            recording.note(call, "close", threading.current_thread().name)

    @plugin.stream("fail", inputs=["one"], outputs=["line"])
    class Fail:
        def __init__(self, call: Any) -> None:
            self.call = call
            self.fail("init")

        def fail(self, place: str) -> None:
            if self.call.message.get("at") == place:
                raise ValueError("a secret")
            if self.call.message.get("refuse") == place:
                raise Forbidden("Not you.")

        def on_batch(self, batch: Any, name: str) -> None:
            self.fail("batch")

        async def on_end(self, name: str) -> None:
            self.fail("end")

        def on_close(self) -> None:
            recording.note(self.call, "close")
            self.fail("close")

    @plugin.stream("hang", inputs=["one"], outputs=["line"])
    class Hang:
        def __init__(self, call: Any) -> None:
            self.call = call

        def on_batch(self, batch: Any, name: str) -> None:
            recording.note(self.call, "batch")
            assert recording.release.wait(DEADLINE)

        def on_close(self) -> None:
            recording.note(self.call, "close")

    @plugin.stream("hang async", inputs=["one"], outputs=["line"])
    class HangAsync:
        def __init__(self, call: Any) -> None:
            self.call = call

        async def on_batch(self, batch: Any, name: str) -> None:
            recording.note(self.call, "batch")
            try:
                await asyncio.sleep(DEADLINE)
            finally:
                await asyncio.sleep(0.01)
                recording.note(self.call, "left")

        def on_close(self) -> None:
            recording.note(self.call, "close")

    @plugin.stream("deaf", inputs=["one"], outputs=["line"])
    async def deaf(call: Any) -> None:
        recording.note(call, "batch")
        try:
            await asyncio.sleep(DEADLINE)
        finally:
            recording.note(call, "close")

    @plugin.stream("pour", inputs=["one"], outputs=["line"])
    class Pour:
        """Writes more than anybody takes."""

        def __init__(self, call: Any) -> None:
            self.call = call

        def on_batch(self, batch: Any, name: str) -> None:
            recording.note(self.call, "batch")
            try:
                for _ in range(1000):
                    self.call.write("line", MEBIBYTE)
                    recording.note(self.call, "written")
            except Exception as error:
                recording.note(self.call, type(error).__name__)
                raise

        def on_close(self) -> None:
            recording.note(self.call, "close")

    @plugin.stream("pour async", outputs=["line"])
    async def pour_async(call: Any) -> None:
        recording.note(call, "batch")
        try:
            for _ in range(1000):
                await call.write("line", MEBIBYTE)
                recording.note(call, "written")
        except (asyncio.CancelledError, Cancelled):
            recording.note(call, "Cancelled")
            raise
        finally:
            recording.note(call, "close")

    @plugin.stream("make", outputs=["line", "log"])
    async def make(call: Any) -> None:
        for value in WRITTEN[call.message["what"]]:
            await call.write("line", value() if callable(value) else value)
        await call.write(call.message.get("to", "log"), TABLE)

    return plugin


MEBIBYTE = pa.table({"a": pa.array(range(1 << 17), pa.int64())})
LARGE = pa.table({"a": pa.array(range(1 << 19), pa.int64())})
WORDS = pa.table({"d": pa.array(["x", "y", "x"]).dictionary_encode()})
MORE_WORDS = pa.table({"d": pa.array(["z", "y"]).dictionary_encode()})

# What "make" writes to "line", one after the other.
WRITTEN: dict[str, list[Any]] = {
    "nothing": [],
    "table": [TABLE],
    "batches": TABLE.to_batches() * 3,
    "empty": [TABLE.slice(0, 0)],
    "reader": [TABLE.to_reader, TABLE],
    "large": [LARGE],
    "dictionaries": [WORDS, MORE_WORDS, WORDS],
    "other columns": [TABLE, pa.table({"c": [1]})],
    "no table": [[1, 2]],
}

FORMS = pytest.mark.parametrize("form", ["plain", "async", "function"])


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording()


@pytest.fixture(scope="module")
def local(recording: Recording) -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0), [echoing(recording)])
    yield local
    local.server.stop()


@pytest.fixture
def wire(local: LocalServer) -> Iterator[Wire]:
    with local.connect() as connected:
        yield connected


@FORMS
def test_batches_go_through(wire: Wire, recording: Recording, form: str) -> None:
    stream = Streaming(wire, form, name=f"through {form}")
    begin = stream.receive()
    assert begin == {
        "type": "streamBegin",
        "queryId": "s",
        "inputs": ["one", "two"],
        "outputs": ["line", "log"],
        "window": 8 << 20,
    }
    stream.send("one", ipc(TABLE))
    # Before the upload ends.
    while not stream.bodies["line"]:
        stream.receive()
    stream.send("one", b"", last=True)
    stream.send("two", ipc(TABLE.slice(1)), last=True)
    assert stream.finish() == {"type": "streamEnd", "queryId": "s"}
    assert stream.table("line") == TABLE and stream.table("log") == TABLE.slice(1)
    assert stream.last["line"]["rows"] == 3
    assert stream.consumed["one"] == len(ipc(TABLE))
    recording.wait_for(f"through {form}", "close")
    seen = recording.seen[f"through {form}"]
    assert seen.count(("batch", "one", 3)) == seen.count(("end", "one")) == 1


@FORMS
def test_cut_at_every_byte_in_both_directions(wire: Wire, form: str) -> None:
    stream = Streaming(wire, form, window=1)
    body = ipc(TABLE.slice(0, 1))
    for place in range(len(body)):
        stream.send("one", body[place : place + 1], last=place + 1 == len(body))
    stream.send("two", b"", last=True)
    while stream.end is None:
        before = len(stream.bodies["line"])
        stream.receive()
        if len(stream.bodies["line"]) > before:
            assert len(stream.bodies["line"]) == before + 1
            stream.ack("line")
    assert stream.end["type"] == "streamEnd"
    assert stream.table("line").to_pylist() == TABLE.slice(0, 1).to_pylist()
    # Nothing was written to it, so it has no columns either.
    assert stream.last["log"]["bytes"] == 0 == stream.last["log"]["rows"]


@FORMS
def test_inputs_and_outputs_interleave(wire: Wire, form: str) -> None:
    stream = Streaming(wire, form)
    parts = {name: several_batches(TABLE, 50) for name in ("one", "two")}
    step = 1000
    for start in range(0, len(parts["one"]), step):
        for name, body in parts.items():
            stream.send(name, body[start : start + step], last=start + step >= len(body))
    assert stream.finish()["type"] == "streamEnd"
    for output in ("line", "log"):
        assert stream.table(output).to_pylist() == TABLE.to_pylist() * 50


def several_batches(table: pa.Table, count: int) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for _ in range(count):
            writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("form", ["plain", "function"])
def test_a_hundred_megabytes_both_ways_at_once(wire: Wire, form: str) -> None:
    count, window = 100, 4 << 20
    stream = Streaming(wire, form, window=window)
    start, batch, end = cut(MEBIBYTE)
    before = peak = psutil.Process().memory_info().rss
    stream.send("two", b"", last=True)
    sent, acked, number = 0, 0, 0
    while stream.end is None:
        while number < count and sent - stream.consumed["one"] <= window:
            body = (start if number == 0 else b"") + batch
            number += 1
            stream.send("one", body + (end if number == count else b""), last=number == count)
            sent += len(body)
        stream.receive()
        if stream.bodies.pop("line", b""):
            peak = max(peak, psutil.Process().memory_info().rss)
        if stream.received["line"] - acked > window // 2:
            acked = stream.received["line"]
            stream.ack("line")
        if "line" in stream.last:
            assert stream.last["line"]["rows"] == count * MEBIBYTE.num_rows
    assert stream.end["type"] == "streamEnd" and stream.received["line"] > 100e6
    # Client and server together: what either has sent ahead, and what allocators keep.
    assert peak - before < 60e6


def cut(table: pa.Table) -> tuple[bytes, bytes, bytes]:
    """The schema, the batch and the end of ``table`` as a stream."""
    schema = table.schema.serialize().to_pybytes()
    (batch,) = table.combine_chunks().to_batches()
    return schema, batch.serialize().to_pybytes(), b"\xff\xff\xff\xff\0\0\0\0"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("table", TABLE),
        ("batches", pa.concat_tables([TABLE] * 3)),
        ("empty", TABLE.slice(0, 0)),
        ("reader", pa.concat_tables([TABLE] * 2)),
        ("large", LARGE),
        ("dictionaries", pa.concat_tables([WORDS, MORE_WORDS, WORDS])),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_can_be_written(
    wire: Wire, what: str, expected: pa.Table, compression: str | None
) -> None:
    stream = Streaming(wire, "make", what=what, compression=compression)
    assert stream.finish()["type"] == "streamEnd"
    table = stream.table("line").unify_dictionaries().combine_chunks()
    assert table == expected.unify_dictionaries().combine_chunks()
    batches = pa.ipc.open_stream(stream.bodies["line"])
    assert all(batch.nbytes <= 1 << 20 for batch in batches)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"what": "other columns"}, "'line' of 'make': its columns are (c: int64), those of the"),
        ({"what": "no table"}, "'line' of 'make': it is of type list"),
        ({"what": "table", "to": "x"}, "'x' of 'make': there is no such output; the stream has"),
    ],
)
def test_what_cannot_be_written(wire: Wire, fields: dict[str, Any], text: str) -> None:
    end = Streaming(wire, "make", **fields).finish()
    assert end["code"] == "internal" and "'mine'" in end["error"] and text in end["error"]


BATCH = ipc(TABLE)
SCHEMA, ONE_BATCH, END = cut(TABLE)


def broken_offsets() -> bytes:
    """A batch whose strings would be read far outside of it."""
    array = pa.array(["abc", "def"])
    offsets = pa.py_buffer(struct.pack("<3i", 0, 1 << 28, 6))
    buffers = [None, offsets, array.buffers()[2]]
    return ipc(pa.table({"b": pa.Array.from_buffers(pa.string(), 2, buffers)}))


@FORMS
@pytest.mark.parametrize(
    ("sent", "text"),
    [
        ([("one", b"not Arrow at all")], "Input 'one' is not a valid Arrow IPC stream"),
        ([("one", broken_offsets())], "Input 'one' is not a valid Arrow IPC stream"),
        ([("one", SCHEMA + SCHEMA)], "it must begin with a schema, and have one"),
        ([("one", BATCH + b"more")], "Input 'one' goes on after the end of its stream"),
        ([("one", SCHEMA + ONE_BATCH[:50], True)], "Input 'one' ends in the middle of a message"),
        ([("two", SCHEMA[:50], True)], "Input 'two' ends before its schema does"),
        ([("three", BATCH)], "There is no input 'three'; the stream has 'one', 'two'."),
        ([("one", BATCH, True), ("one", BATCH)], "Data of input 'one' came after the last"),
        ([("one", SCHEMA, False, 0), ("one", b"", False, 2)], "seq 1 was expected, not 2"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_data_ends_the_stream(wire: Wire, form: str, sent: list[Any], text: str) -> None:
    stream = Streaming(wire, form)
    for input_name, body, *rest in sent:
        last = bool(rest and rest[0])
        stream.send(input_name, body, last, **({"seq": rest[1]} if len(rest) > 1 else {}))
    end = stream.finish()
    assert end["code"] == "bad_request" and text in end["error"]
    # What was under way is ignored, and its id can be used again.
    stream.send("two", BATCH)
    assert Streaming(wire, "make", what="table").finish()["type"] == "streamEnd"


def test_messages_about_no_stream(wire: Wire) -> None:
    stream = Streaming(wire, "plain", "other")
    stream.receive()
    unknown: list[tuple[dict[str, Any], str]] = [
        ({"queryId": "x", "input": "one", "seq": 0}, "No stream 'x' is under way"),
        ({"queryId": "x", "input": "one"}, "streamData needs a field seq"),
        ({"input": "one"}, "streamData needs a field queryId"),
        ({"queryId": "x"}, "streamData needs a field input"),
        ({"queryId": "x", "input": "one", "seq": -1}, "seq must be a whole number"),
    ]
    for header, text in unknown:
        wire.send_raw(framed({"type": "streamData", **header}, b""))
        reply = wire.receive()
        assert reply["code"] == "bad_request" and text in reply["error"]
    bad_acks: list[tuple[dict[str, Any], str]] = [
        ({"queryId": "other", "output": "line"}, "streamAck needs a field bytes"),
        ({"queryId": "other", "bytes": 0}, "streamAck needs a field output"),
    ]
    for fields, text in bad_acks:
        reply = wire.request(type="streamAck", **fields)
        assert "queryId" not in reply and text in reply["error"]
    assert wire.request(type="plain", queryId="other")["code"] == "conflict"
    # What belongs to it, and cannot be read, ends it.
    wire.send_raw(framed({"type": "streamData", "queryId": "other", "input": 1}, b""))
    assert stream.finish()["code"] == "bad_request"


@pytest.mark.parametrize("where", ["init", "batch", "end"])
def test_what_a_handler_raises_ends_its_stream(
    wire: Wire, recording: Recording, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    called = {"init": "the constructor", "batch": "on_batch", "end": "on_end"}[where]
    stream = Streaming(wire, "fail", name=f"at {where}", at=where)
    stream.send("one", BATCH, last=True)
    end = stream.finish()
    assert end["code"] == "internal" and f"'mine' failed on {called} of 'fail'" in end["error"]
    assert "a secret" not in end["error"] and "a secret" in caplog.text
    stream = Streaming(wire, "fail", name=f"refuse {where}", refuse=where)
    stream.send("one", BATCH, last=True)
    end = stream.finish()
    assert (end["code"], end["error"]) == ("forbidden", "Not you.")
    for name in (f"at {where}", f"refuse {where}"):
        if where != "init":
            recording.wait_for(name, "close")
        assert len(recording.seen[name]) == (where != "init")


def test_what_on_close_raises_is_only_logged(
    wire: Wire, recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Streaming(wire, "fail", name="close", at="close")
    stream.send("one", b"", last=True)
    assert stream.finish()["type"] == "streamEnd"
    wait_until(lambda: "'mine' failed on on_close of 'fail'" in caplog.text)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# How a client may leave a stream, and the states that it can be in then.
def cancel(wire: Wire, stream: Streaming) -> None:
    wire.send(type="cancel", queryId=stream.query_id)
    assert stream.finish()["code"] == "cancelled"
    assert wire.receive() == {"type": "cancelAck", "queryId": "s", "cancelled": True}
    assert wire.rows("select 1 as a") == [{"a": 1}]


def close(wire: Wire, stream: Streaming) -> None:
    wire.socket.close()


def kill(wire: Wire, stream: Streaming) -> None:
    wire.socket.socket.close()


STATES = {
    "plain waits for input": ("plain", "init", False),
    "async waits for input": ("async", "batch", True),
    "function waits for input": ("function", "batch", True),
    "plain is called": ("hang", "batch", True),
    "async is called": ("hang async", "batch", True),
    "plain writes": ("pour", "written", True),
    "function writes": ("pour async", "written", False),
}


@pytest.mark.parametrize("leave", [cancel, close, kill])
@pytest.mark.parametrize("state", STATES)
def test_a_client_leaves(
    local: LocalServer, recording: Recording, state: str, leave: Callable[..., None]
) -> None:
    kind, until, sends = STATES[state]
    name = f"{state} {leave.__name__}"
    with local.connect() as wire:
        stream = Streaming(wire, kind, name=name, window=1 << 20)
        if sends:
            stream.send("one", BATCH)
        recording.wait_for(name, until)
        leave(wire, stream)
    if kind == "hang":
        recording.release.set()
    recording.wait_for(name, "close")
    recording.release.clear()
    seen = [entry[0] for entry in recording.seen[name]]
    assert seen.count("close") == 1 and seen[-1] == "close"
    if kind.startswith("pour"):
        assert seen[-2] == "Cancelled" and seen.count("written") < 10
    if kind == "hang async":
        assert seen[-2] == "left"


def test_one_that_does_not_read_stops_its_handler_and_nothing_else(
    wire: Wire, recording: Recording
) -> None:
    stream = Streaming(wire, "pour", name="slow", window=1 << 20)
    stream.send("one", BATCH)
    recording.wait_for("slow", "written")
    for number in range(100):
        wire.send(type="json", sql="select 1 as a", queryId=number)
    answered = 0
    while answered < 100:
        message = stream.receive()
        answered += isinstance(message, dict) and message["type"] == "json"
    # The window, the outbox, and the one that waits.
    assert len(recording.seen["slow"]) < 8
    written = len(recording.seen["slow"])
    for mebibytes in (1, 2, 3):
        while stream.received["line"] < mebibytes << 20:
            stream.receive()
        assert stream.received["line"] == mebibytes << 20
        stream.ack("line")
    recording.wait_for("slow", "written", written)
    cancel(wire, stream)


@pytest.mark.parametrize("kind", ["hang", "deaf"])
def test_a_flood_is_ended(wire: Wire, recording: Recording, kind: str) -> None:
    name = f"flood {kind}"
    stream = Streaming(wire, kind, name=name)
    start, batch, _ = cut(MEBIBYTE)
    stream.send("one", start + batch)
    recording.wait_for(name, "batch")
    for _ in range(9):
        stream.send("one", batch)
    end = stream.finish()
    assert end["code"] == "too_large" and "--stream-window" in end["error"]
    # It has not been told to end, and the rest is ignored.
    stream.send("one", batch, last=True)
    assert wire.rows("select 1 as a") == [{"a": 1}]
    recording.release.set()
    recording.wait_for(name, "close")
    recording.release.clear()


def test_small_pieces_that_wait_cost_little(wire: Wire, recording: Recording) -> None:
    stream = Streaming(wire, "hang", name="small")
    stream.send("one", SCHEMA + ONE_BATCH)
    recording.wait_for("small", "batch")
    body = several_batches(TABLE, 100)[len(SCHEMA) :]
    for place in range(0, len(body), 10):
        stream.send("one", body[place : place + 10], last=place + 10 >= len(body))
    recording.release.set()
    assert stream.finish()["type"] == "streamEnd"
    recording.wait_for("small", "close")
    recording.release.clear()
    assert len(recording.seen["small"]) == 102


def test_limits_of_time(launch: Launch) -> None:
    recording = Recording()
    local = launch(echoing(recording), stream_idle_timeout=1, plugin_timeout=1)
    with local.connect() as wire:
        # All at once, since each takes a second.
        wire.send(type="plain", queryId="no input")
        wire.send(type="function", queryId="no input for a coroutine")
        wire.send(type="pour async", queryId="no ack", window=1)
        wire.send(type="hang", queryId="slow")
        header = {"type": "streamData", "input": "one", "seq": 0}
        wire.send_raw(framed({**header, "queryId": "slow"}, BATCH))
        wire.send(type="hang async", queryId="slow coroutine")
        wire.send_raw(framed({**header, "queryId": "slow coroutine"}, BATCH))
        wire.send(type="plain", queryId="deadline", timeoutMs=200)
        # A write that waits for its reader is not late, and what is empty keeps a stream alive.
        wire.send(type="pour", queryId="patient", window=1)
        wire.send_raw(framed({**header, "queryId": "patient"}, BATCH))
        seq = 0
        ended: dict[str, str] = {}
        began = time.monotonic()
        while len(ended) < 6 or time.monotonic() < began + 1.5:
            seq += 1
            wire.send_raw(framed({**header, "queryId": "patient", "seq": seq}, b""))
            message = wire.receive() if len(ended) < 6 else {"type": ""}
            if isinstance(message, dict) and message["type"] == "error":
                assert message["code"] == "timeout"
                ended[message["queryId"]] = message["error"]
            time.sleep(0.01)
        assert "timeoutMs" in ended["deadline"]
        for name in ("no input", "no input for a coroutine", "no ack"):
            assert "--stream-idle-timeout" in ended[name]
        for name in ("slow", "slow coroutine"):
            assert "'mine'" in ended[name] and "on_batch" in ended[name]
            assert "--plugin-timeout" in ended[name]
        assert "patient" not in ended
        recording.release.set()


def test_a_server_that_stops_ends_them(recording: Recording) -> None:
    recording = Recording()
    local = LocalServer(Settings(port=0), [echoing(recording)])
    try:
        with local.connect() as wire:
            streams = {}
            for kind in ("plain", "async", "function", "pour"):
                stream = streams[kind] = Streaming(wire, kind, kind, name=kind, window=1)
                stream.send("one", BATCH)
                recording.wait_for(kind, "batch")
            stopping = threading.Thread(target=local.server.stop)
            stopping.start()
            ended: dict[str, str] = {}
            while len(ended) < len(streams):
                message = wire.receive()
                if isinstance(message, dict) and message["type"] == "error":
                    ended[message["queryId"]] = message["code"]
            assert set(ended.values()) == {"shutting_down"}
            stopping.join(DEADLINE)
            for kind in streams:
                assert [entry[0] for entry in recording.seen[kind]].count("close") == 1
    finally:
        local.server.stop()


def test_two_hundred_at_once(local: LocalServer) -> None:
    wires = [local.connect() for _ in range(10)]
    try:
        streams = []
        for number in range(200):
            form = ("plain", "async", "function")[number % 3]
            wire = wires[number % len(wires)]
            wire.send(type=form, queryId=number)
            streams.append(number)
        for seq, body in enumerate((BATCH[:100], BATCH[100:])):
            for number in streams:
                for name in ("one", "two"):
                    header = {"type": "streamData", "queryId": number, "input": name, "seq": seq}
                    wires[number % len(wires)].send_raw(framed({**header, "last": seq == 1}, body))
        for place, wire in enumerate(wires):
            bodies: dict[tuple[int, str], bytes] = defaultdict(bytes)
            ends = 0
            while ends < 20:
                message = wire.receive()
                if isinstance(message, Arrow):
                    bodies[message.header["queryId"], message.header["output"]] += message.body
                else:
                    assert message["type"] != "error", message
                    ends += message["type"] == "streamEnd"
            assert len(bodies) == 40 and all(key[0] % 10 == place for key in bodies)
            for body in bodies.values():
                assert pa.ipc.open_stream(body).read_all() == TABLE
    finally:
        for wire in wires:
            wire.__exit__()


def test_nothing_is_left_behind(local: LocalServer, recording: Recording) -> None:
    def cycle() -> None:
        with local.connect() as wire:
            for query_id in ("done", "failed", "left"):
                for form in ("plain", "async", "function"):
                    stream = Streaming(wire, form, f"{form} {query_id}", name="leaks")
                    stream.send("one", BATCH, last=query_id == "done")
                    if query_id == "done":
                        stream.send("two", b"", last=True)
                    elif query_id == "failed":
                        stream.send("one", b"bad")
                    if query_id != "left":
                        stream.finish()

    assert_leaks_nothing(cycle, ("plugin-worker", "asyncio", "timers"))
    app = local.server.main
    streams = app.plugins._streams
    assert streams is not None
    with local.connect() as wire:
        for form in ("plain", "async", "function"):
            stream = Streaming(wire, form, form)
            stream.send("one", BATCH + b"bad")
            stream.finish()
        wait_until(lambda: len(streams._clients) == 1)
        (client,) = streams._clients.values()
        wait_until(lambda: not client.held._size and not client.under_way)
        wait_until(lambda: not client.share._waiting and client.share._free == 4)
    wait_until(lambda: not app.runner._open and not app.runner.scheduler._jobs)
    wait_until(lambda: not streams._clients)
    wait_until(lambda: not app.requests._clients)


def test_those_of_one_connection_leave_threads_to_others(
    local: LocalServer, recording: Recording
) -> None:
    with local.connect() as many, local.connect() as wire:
        for number in range(12):
            stream = Streaming(many, "hang", number, name="many")
            stream.send("one", BATCH, last=True)
        recording.wait_for("many", "batch", 4)
        other = Streaming(wire, "plain", "other")
        other.send("one", BATCH, last=True)
        other.send("two", BATCH, last=True)
        while other.end is None:
            other.receive()
        assert len(recording.seen["many"]) == 4
        recording.release.set()
        ends = 0
        while ends < 12:
            message = many.receive()
            ends += isinstance(message, dict) and message["type"] == "streamEnd"
    recording.wait_for("many", "close", 12)
    recording.release.clear()


def test_the_examples_of_the_page(launch: Launch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text(encoding="utf-8")
    section = page.partition("\n## Streams\n")[2].partition("\n## ")[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
    points = pa.table({"y": [50.0, 150.0]})
    with launch(names["plugin"]).connect() as wire:
        stream = Streaming(wire, "smooth")
        stream.send("points", ipc(points), last=True)
        assert stream.finish()["type"] == "streamEnd"
        assert stream.table("line").to_pylist() == [
            {"y": 50.0, "mean": 50.0},
            {"y": 150.0, "mean": 50.0},
        ]
        stream = Streaming(wire, "split", "t")
        stream.send("points", ipc(points), last=True)
        stream.send("extra", b"", last=True)
        assert stream.finish()["type"] == "streamEnd"
        assert stream.table("small").to_pylist() == [{"y": 50.0}]
        assert stream.table("large").to_pylist() == [{"y": 150.0}]


def test_limits_of_a_connection(launch: Launch) -> None:
    recording = Recording()
    local = launch(echoing(recording), max_streams_per_connection=2, max_message_size=64 << 10)
    with local.connect() as wire:
        streams = [Streaming(wire, "plain", number) for number in range(3)]
        replies = [wire.receive() for _ in streams]
        busy = replies[2]
        assert (busy["queryId"], busy["code"]) == (2, "busy")
        assert "--max-streams-per-connection" in busy["error"]
        # The rest of what was refused is ignored, and others go on.
        streams[2].send("one", BATCH, last=True)
        streams[2].send("two", b"", last=True)
        # A batch that never becomes complete.
        start, batch, _ = cut(pa.table({"a": pa.array(range(8000), pa.int64())}))
        for stream in streams[:2]:
            for name in ("one", "two"):
                stream.send(name, start + batch[:40_000])
        reply = {"type": ""}
        while reply["type"] != "error":
            reply = wire.receive()
        assert reply["code"] == "busy" and "--max-message-size" in reply["error"]


def test_a_batch_may_not_be_too_large(launch: Launch) -> None:
    local = launch(echoing(Recording()), max_message_size=64 << 10)
    with local.connect() as wire:
        stream = Streaming(wire, "plain")
        start, batch, _ = cut(pa.table({"a": pa.array(range(10_000), pa.int64())}))
        stream.send("one", start + batch[:1000])
        end = stream.finish()
        assert end["code"] == "bad_request" and "A message in input 'one' has 80" in end["error"]


def test_classes_and_methods_of_a_plugin(launch: Launch) -> None:
    class Mine(Plugin):
        greeting = "Hello"

        @stream("class", inputs=["one"], outputs=["line"])
        class Handler:
            def __init__(self, call: Any) -> None:
                self.call = call

            def on_batch(self, batch: Any, name: str) -> None:
                rows = self.call.query("select 1 as a").num_rows + batch.num_rows
                columns = self.call.inputs[name].schema.names
                self.call.send([self.call.plugin.greeting, self.call.message["to"], rows, columns])

        @stream("method", inputs=["one"])
        async def method(self, call: Any) -> None:
            async for batch in call.inputs["one"]:
                call.send([self.greeting, call.message["to"], batch.num_rows + 1, ["a", "b"]])

    with launch(Mine()).connect() as wire:
        for kind in ("class", "method"):
            streaming = Streaming(wire, kind, to="Ada")
            streaming.send("one", BATCH, last=True)
            assert streaming.finish()["type"] == "streamEnd"
            assert streaming.events == [["Hello", "Ada", 4, ["a", "b"]]]


@pytest.mark.parametrize("is_allowed", [True, False])
def test_plugins_may_refuse_them(launch: Launch, is_allowed: bool) -> None:
    plugin = echoing(Recording())

    @plugin.hook
    async def authorize(client: Any, action: Any) -> None:
        assert action.kind == "plain"
        if not is_allowed:
            raise Forbidden("Not you.")

    with launch(plugin).connect() as wire:
        stream = Streaming(wire, "plain")
        if is_allowed:
            assert stream.receive()["type"] == "streamBegin"
            stream.send("one", BATCH, last=True)
            stream.send("two", b"", last=True)
            assert stream.finish()["type"] == "streamEnd" and stream.table("line") == TABLE
        else:
            assert stream.finish()["code"] == "forbidden"
            # It is no request of its own, so nobody is asked.
            stream.send("one", BATCH, last=True)
            assert "No stream 's' is under way" in wire.receive()["error"]


def test_one_may_end_before_its_inputs(launch: Launch) -> None:
    plugin = Plugin("mine")

    @plugin.stream("first", inputs=["one"], outputs=["line"])
    async def first(call: Any) -> None:
        async for batch in call.inputs["one"]:
            await call.write("line", batch)
            return

    with launch(plugin).connect() as wire:
        stream = Streaming(wire, "first")
        stream.send("one", BATCH)
        assert stream.finish()["type"] == "streamEnd" and stream.table("line") == TABLE
        stream.send("one", BATCH)
        stream.send("one", b"", last=True)
        assert wire.rows("select 1 as a") == [{"a": 1}]


def test_what_cannot_be_registered() -> None:
    plugin = Plugin("mine")
    for names in ("points", ["a", "a"], [""], [1]):
        with pytest.raises(ValueError, match="inputs"):
            plugin.stream("x", inputs=names)  # type: ignore[arg-type]

    def refused(handler: Any, *, inputs: list[str], kind: str = "x") -> str:
        plugin = Plugin("mine")
        plugin.stream(kind, inputs=inputs)(handler)
        with pytest.raises(StartupError) as caught:
            Server(Settings(port=0), [plugin])
        return str(caught.value)

    class NoMethods:
        pass

    class Handler:
        def on_batch(self, batch: Any, name: str) -> None:
            pass

    async def function(call: Any) -> None:
        pass

    assert "needs a method on_batch" in refused(NoMethods, inputs=["a"])
    assert "has no inputs" in refused(Handler, inputs=[])
    assert "an async function" in refused(lambda call: None, inputs=["a"])
    assert "those of the server" in refused(function, inputs=[], kind="streamData")
