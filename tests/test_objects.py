"""Objects of plugins: listed, fetched and opened, with references, and what is said of bad ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from sqlrooms_server import Forbidden, ObjectType, Plugin, StartupError
from sqlrooms_server.app_config import AppConfig
from sqlrooms_server.plugins.object_streams import WINDOW_BYTES
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import DEADLINE, Arrow, Wire, framed

Launch = Callable[..., LocalServer]
TABLE = pa.table({"a": [1, 2, 3]})


class Note:
    """What the tests publish: a text, and what is done with it."""

    def __init__(self, text: str = "hello", **how: Any) -> None:
        self.text = text
        self.how = how
        self.heard: list[Any] = []
        self.closed: list[str] = []
        self.streams: list[Any] = []
        self.is_closed = threading.Event()

    def wait_closed(self) -> None:
        assert self.is_closed.wait(DEADLINE)


class FetchType(ObjectType):
    name = "fetched"

    def is_type(self, obj: Any) -> bool:
        return isinstance(obj, Note) and "fetch" in obj.how

    def to_bytes(self, obj: Note) -> Any:
        return obj.how["fetch"](obj)


class Echo:
    """A connection that sends back what it hears, or does what its note says."""

    def __init__(self, note: Note, stream: Any) -> None:
        self.note, self.stream = note, stream

    def on_data(self, payload: bytes, references: list[Any]) -> None:
        self.note.heard.append((payload, references))
        react = self.note.how.get("on_data")
        if react is not None:
            react(self.stream, payload, references)
        else:
            self.stream.send(payload.upper(), references)

    def on_close(self) -> None:
        self.note.closed.append(threading.current_thread().name)
        self.note.is_closed.set()
        if "on_close" in self.note.how:
            self.note.how["on_close"]()


class AsyncEcho(Echo):
    async def on_data(self, payload: bytes, references: list[Any]) -> None:  # type: ignore[override]
        self.note.heard.append((payload, references))
        if payload == b"hang":
            await asyncio.sleep(DEADLINE)
        self.stream.send(payload.upper())

    async def on_close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        Echo.on_close(self)


class EchoType(ObjectType):
    name = "echo"

    def is_type(self, obj: Any) -> bool:
        return isinstance(obj, Note) and "fetch" not in obj.how

    def create_client_connection(self, obj: Note, stream: Any) -> Any:
        obj.streams.append(stream)
        if "create" in obj.how:
            obj.how["create"](stream)
        return (AsyncEcho if obj.how.get("is_async") else Echo)(obj, stream)


class Notes(Plugin):
    object_types = (FetchType, EchoType())


@pytest.fixture(scope="module")
def local() -> Iterator[LocalServer]:
    made = LocalServer(Settings(port=0, max_object_references=5, max_object_streams=3), [Notes()])
    yield made
    made.server.stop()


@pytest.fixture
def wire(local: LocalServer) -> Iterator[Wire]:
    with local.connect() as connected:
        yield connected


@pytest.fixture
def publish(local: LocalServer) -> Iterator[Callable[..., Any]]:
    """Publishes until the test ends, and returns the object."""
    names = []

    def publish(name: str, obj: Any, **options: Any) -> Any:
        local.server.publish(name, obj, **options)
        names.append(name)
        return obj

    yield publish
    for name in names:
        local.server.objects.unpublish(name)


def fetch(wire: Wire, name: str, **more: Any) -> Any:
    return wire.request(type="object-fetch", object=name, queryId="f", **more)


def fetched(wire: Wire, name: str, **more: Any) -> Arrow:
    """A table as a whole, which may have come in chunks."""
    reply = fetch(wire, name, **more)
    body = reply.body
    while not reply.header.get("last", True):
        reply = wire.receive()
        body += reply.body
    return Arrow(reply.header, body)


def open_object(wire: Wire, name: str, query_id: Any = "s", **more: Any) -> Any:
    return wire.request(type="object-open", object=name, queryId=query_id, **more)


def say(wire: Wire, payload: bytes, query_id: Any = "s", **more: Any) -> None:
    wire.send_raw(framed({"type": "object-data", "queryId": query_id, **more}, payload))


def data(wire: Wire) -> Any:
    """The next message of a stream, after acknowledgements."""
    while isinstance(reply := wire.receive(), dict) and reply["type"] == "object-ack":
        pass
    return reply


def listed(wire: Wire) -> list[str]:
    return [one["name"] for one in wire.request(type="object-list")["objects"]]


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not is_so():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_clients_list_objects_and_hear_of_others(
    local: LocalServer, wire: Wire, publish: Callable[..., Any]
) -> None:
    publish("z", Note())
    publish("a", TABLE)
    reply = wire.request(type="object-list", watch=True, queryId=1)
    assert reply == {
        "type": "object-list",
        "queryId": 1,
        "objects": [
            {"name": "a", "objectType": "table", "canFetch": True, "canOpen": False},
            {"name": "z", "objectType": "echo", "canFetch": False, "canOpen": True},
        ],
    }
    changes: dict[str, list[str]] = {"added": [], "replaced": [], "removed": []}

    def hear(kind: str, name: str) -> None:
        while name not in changes[kind]:
            message = wire.receive()
            assert message["type"] == "object-changes"
            changes["removed"] += message["removed"]
            for told in ("added", "replaced"):
                changes[told] += [one["name"] for one in message[told]]

    publish("b", Note())
    hear("added", "b")
    publish("b", TABLE)
    hear("replaced", "b")
    assert local.server.objects.unpublish("b") and not local.server.objects.unpublish("b")
    hear("removed", "b")
    wire.request(type="object-list", watch=False)
    publish("c", Note())
    assert listed(wire) == ["a", "c", "z"]


def test_names_and_types_are_checked_where_they_are_given(local: LocalServer) -> None:
    publish = local.server.publish
    for name in ("", "x" * 256, "a\nb", 7):
        with pytest.raises(ValueError, match="1 to 255"):
            publish(name, TABLE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"No object type knows a builtins\.int; there are fetched"):
        publish("n", 7)
    with pytest.raises(TypeError, match="only once"):
        publish("n", TABLE.to_reader())
    with pytest.raises(TypeError, match="users must be a list"):
        publish("n", TABLE, users="ada")
    with pytest.raises(TypeError, match="roles must be a list"):
        publish("n", TABLE, roles=[""])
    relation = local.server.objects.relation
    with pytest.raises(ValueError, match="one SELECT"):
        relation("create table t(a int)")
    with pytest.raises(Exception, match="nowhere"):
        relation("from nowhere")


def test_types_of_plugins_are_checked_when_the_server_is_made() -> None:
    twice = Plugin("twice")
    twice.object_type(EchoType)
    with pytest.raises(StartupError, match="'Notes' and 'twice' both have the object type 'echo'"):
        Server(Settings(port=0), [Notes(), twice])
    plugin = Plugin("mine")
    with pytest.raises(TypeError, match=r"not a sqlrooms_server\.ObjectType"):
        plugin.object_type(Note)

    class Mute(ObjectType):
        def is_type(self, obj: Any) -> bool:
            return True

    plugin.object_types = [Mute]
    with pytest.raises(StartupError, match="'mine': The object type 'Mute' needs to_bytes"):
        Server(Settings(port=0), [plugin])


def dataset_in(folder: Path) -> Any:
    dataset: Any = import_module("pyarrow.dataset")
    dataset.write_dataset(TABLE, folder, format="parquet")
    return dataset.dataset(folder)


@pytest.mark.parametrize("kind", ["table", "batch", "pandas", "dataset", "duckdb", "relation"])
@pytest.mark.parametrize("chunked", [False, True])
def test_tables_are_fetched_as_arrow(
    local: LocalServer,
    wire: Wire,
    publish: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    chunked: bool,
) -> None:
    if kind == "pandas":
        pytest.importorskip("pandas")
    made: dict[str, Callable[[], Any]] = {
        "table": lambda: TABLE,
        "batch": lambda: TABLE.to_batches()[0],
        "pandas": lambda: import_module("pandas").DataFrame({"a": [1, 2, 3]}),
        "dataset": lambda: dataset_in(tmp_path / "set"),
        "duckdb": lambda: duckdb.connect().sql("select unnest([1, 2, 3]) as a"),
        "relation": lambda: local.server.objects.relation(
            "select unnest($1) as a", [{"$type": "INTEGER[]", "value": "[1, 2, 3]"}]
        ),
    }
    publish("t", made[kind]())
    for _ in range(2):
        reply = fetched(wire, "t", stream=chunked, compression="zstd")
        assert reply.header["type"] == "arrow" and reply.header["queryId"] == "f"
        assert reply.header.get("rows") == (3 if chunked else None)
        assert reply.table().column("a").to_pylist() == [1, 2, 3]


def test_a_relation_is_asked_by_many_at_once_and_again(
    local: LocalServer, publish: Callable[..., Any]
) -> None:
    with local.connect() as one, local.connect() as other:
        one.exec("create or replace table numbers as from range(200000) t(a)")
        publish("r", local.server.objects.relation("select sum(a) as s from numbers"))
        for number in range(20):
            for wire in (one, other):
                wire.send(type="object-fetch", object="r", queryId=number)
        for _ in range(20):
            for wire in (one, other):
                assert wire.receive().table().to_pylist() == [{"s": 19999900000}]
        one.exec("delete from numbers")
        assert fetch(other, "r").table().to_pylist() == [{"s": None}]
        one.exec("drop table numbers")
        assert fetch(other, "r")["code"] == "query_error"


def test_a_large_relation_waits_for_acks_and_can_be_cancelled(
    local: LocalServer, wire: Wire, publish: Callable[..., Any]
) -> None:
    publish("r", local.server.objects.relation("select * from range(10000000000) t(a)"))
    wire.send(type="object-fetch", object="r", queryId="f", stream=True, window=1 << 20)
    got = 0
    while got < 1 << 20:
        got += len(wire.receive().body)
    assert wire.rows("select 1 as a") == [{"a": 1}]
    wire.send(type="cancel", queryId="f")
    assert {wire.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
    slow = "select count(*) from range(100000000000) t(a) where a % 3 = 1"
    publish("r", local.server.objects.relation(slow))
    reply = fetch(wire, "r", timeoutMs=50)
    assert reply["code"] == "timeout" and "timeoutMs" in reply["error"]
    eventually(lambda: not local.server.scheduler.running())


def test_bytes_are_fetched_with_references(wire: Wire, publish: Callable[..., Any]) -> None:
    publish("n", Note(fetch=lambda note: (note.text, [TABLE, Note()])))
    reply = fetch(wire, "n")
    assert reply.header["type"] == "object" and reply.body == b"hello"
    table, note = reply.header["references"]
    assert (table["objectType"], table["canFetch"], table["canOpen"]) == ("table", True, False)
    assert (note["objectType"], note["canFetch"], note["canOpen"]) == ("echo", False, True)
    resolved = wire.request(type="object-fetch", ticket=table["ticket"], queryId=2)
    assert resolved.table() == TABLE
    opened = wire.request(type="object-open", ticket=note["ticket"], queryId=3)
    assert opened["type"] == "object-opened"
    say(wire, b"hi", 3)
    assert data(wire).body == b"HI"


@pytest.mark.parametrize("chunked", [False, True])
def test_what_to_bytes_makes_is_sent_as_it_is(
    wire: Wire, publish: Callable[..., Any], chunked: bool
) -> None:
    async def later(note: Note) -> bytes:
        return b"x" * 5_000_000

    publish("big", Note(fetch=later))
    assert fetch(wire, "big", stream=chunked).body == b"x" * 5_000_000
    publish("table", Note(fetch=lambda note: TABLE))
    assert fetched(wire, "table", stream=chunked).table() == TABLE


def test_a_failing_fetch_names_the_plugin(wire: Wire, publish: Callable[..., Any]) -> None:
    publish("n", Note(fetch=lambda note: 1 / 0))
    reply = fetch(wire, "n")
    assert reply["code"] == "internal" and "'Notes'" in reply["error"] and "'n'" in reply["error"]
    publish("n", Note(fetch=lambda note: 7))
    assert fetch(wire, "n")["code"] == "internal"
    publish("n", Note(fetch=lambda note: threading.Event().wait(1)))
    assert fetch(wire, "n", timeoutMs=50)["code"] == "timeout"


def test_what_clients_ask_wrongly_is_told(wire: Wire, publish: Callable[..., Any]) -> None:
    publish("t", TABLE)
    publish("n", Note())
    for fields, code in (
        ({"type": "object-fetch", "object": "nothing"}, "not_found"),
        ({"type": "object-fetch", "object": "n"}, "bad_request"),
        ({"type": "object-open", "object": "t"}, "bad_request"),
        ({"type": "object-open"}, "bad_request"),
        ({"type": "object-open", "object": "n", "ticket": "x"}, "bad_request"),
        ({"type": "object-open", "object": 7}, "bad_request"),
        ({"type": "object-open", "ticket": 7}, "bad_request"),
        ({"type": "object-open", "ticket": "x"}, "gone"),
        ({"type": "object-open", "object": "n", "clientWindow": -1}, "bad_request"),
        ({"type": "object-release", "tickets": [7]}, "bad_request"),
        ({"type": "object-release"}, "bad_request"),
        ({"type": "object-list", "watch": 7}, "bad_request"),
    ):
        reply = wire.request(queryId="w", **fields)
        assert (reply["queryId"], reply["code"]) == ("w", code), fields
    # Nobody listens, so that nothing is said.
    say(wire, b"", "unknown")
    wire.send(type="object-close", queryId="unknown")
    assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize("is_async", [False, True])
def test_messages_go_both_ways_in_order(
    wire: Wire, publish: Callable[..., Any], is_async: bool
) -> None:
    note = publish("n", Note(is_async=is_async))
    reply = open_object(wire, "n")
    assert (reply["type"], reply["object"], reply["objectType"]) == ("object-opened", "n", "echo")
    for number in range(100):
        say(wire, b"m%d" % number)
    assert [data(wire).body for _ in range(100)] == [b"M%d" % number for number in range(100)]
    wire.send(type="object-close", queryId="s")
    assert data(wire) == {"type": "object-closed", "queryId": "s"}
    note.wait_closed()
    assert [payload for payload, _ in note.heard] == [b"m%d" % number for number in range(100)]
    assert len(note.closed) == 1
    # Its id is free again.
    assert open_object(wire, "n")["type"] == "object-opened"


def test_what_is_sent_before_the_client_closes_is_answered(
    wire: Wire, publish: Callable[..., Any]
) -> None:
    publish("n", Note())
    wire.send(type="object-open", object="n", queryId="s")
    say(wire, b"early")
    wire.send(type="object-close", queryId="s")
    assert wire.receive()["type"] == "object-opened"
    assert data(wire).body == b"EARLY"
    assert data(wire)["type"] == "object-closed"


def test_a_plugin_closes_after_what_it_sent(wire: Wire, publish: Callable[..., Any]) -> None:
    def create(stream: Any) -> None:
        stream.send("x" * 3_000_000)
        stream.send(b"last")
        stream.close()
        stream.send(b"too late")

    note = publish("n", Note(create=create))
    assert open_object(wire, "n")["type"] == "object-opened"
    assert len(data(wire).body) == 3_000_000 and data(wire).body == b"last"
    assert data(wire)["type"] == "object-closed"
    note.wait_closed()
    assert not note.streams[0].is_open and note.streams[0].waiting_bytes == 0


def end_by_cancel(local: LocalServer, wire: Wire) -> None:
    wire.send(type="cancel", queryId="s")


def end_by_leaving(local: LocalServer, wire: Wire) -> None:
    wire.socket.close()


def end_by_kill(local: LocalServer, wire: Wire) -> None:
    wire.socket.socket.close()


def end_by_unpublish(local: LocalServer, wire: Wire) -> None:
    local.server.objects.unpublish("n")


def end_by_replacing(local: LocalServer, wire: Wire) -> None:
    local.server.publish("n", TABLE)


def end_by_failing(local: LocalServer, wire: Wire) -> None:
    say(wire, b"fail")


def end_by_bad_message(local: LocalServer, wire: Wire) -> None:
    wire.send(type="object-data", queryId="s")


def end_by_bad_ticket(local: LocalServer, wire: Wire) -> None:
    say(wire, b"", references=["guessed"])


ENDS = {
    end_by_cancel: "cancelled",
    end_by_leaving: None,
    end_by_kill: None,
    end_by_unpublish: "gone",
    end_by_replacing: "gone",
    end_by_failing: "internal",
    end_by_bad_message: "bad_request",
    end_by_bad_ticket: "gone",
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("is_async", [False, True])
def test_on_close_is_called_once_however_it_ends(
    local: LocalServer, publish: Callable[..., Any], end: Callable[..., None], is_async: bool
) -> None:
    def on_data(stream: Any, payload: bytes, references: Any) -> None:
        if payload == b"fail":
            raise ValueError("a secret")

    note = publish("n", Note(on_data=on_data))
    if is_async and end is not end_by_failing:
        note.how["is_async"] = True
    with local.connect() as wire:
        open_object(wire, "n")
        end(local, wire)
        code = ENDS[end]
        if code is not None:
            reply = data(wire)
            if end is end_by_cancel:
                assert wire.receive()["type"] == "cancelAck"
            assert (reply["type"], reply["queryId"], reply["code"]) == ("error", "s", code)
            assert "secret" not in reply["error"]
            assert wire.rows("select 1 as a") == [{"a": 1}]
        note.wait_closed()
    eventually(lambda: not note.streams[0].is_open)
    assert len(note.closed) == 1
    # Whatever it does now is for nobody.
    note.streams[0].send(b"x", [TABLE])
    note.streams[0].close()


def test_on_close_waits_for_a_running_on_data_but_not_for_ever(
    local: LocalServer, publish: Callable[..., Any]
) -> None:
    release, begun = threading.Event(), threading.Event()

    def on_data(stream: Any, payload: bytes, references: Any) -> None:
        begun.set()
        release.wait(DEADLINE if payload == b"hang" else 0.05)
        ended.append(payload)

    ended: list[bytes] = []
    closed: list[list[bytes]] = []
    note = publish("n", Note(on_data=on_data, on_close=lambda: closed.append(list(ended))))
    for number, (payload, expected) in enumerate(((b"brief", [b"brief"]), (b"hang", [])), 1):
        ended.clear()
        begun.clear()
        with local.connect() as wire:
            open_object(wire, "n")
            say(wire, payload)
            assert begun.wait(DEADLINE)
        eventually(lambda number=number: len(closed) == number)  # type: ignore[misc]
        assert closed[-1] == expected
    assert len(note.closed) == 2
    release.set()


def test_a_coroutine_is_cancelled_with_its_stream(
    local: LocalServer, publish: Callable[..., Any]
) -> None:
    note = publish("n", Note(is_async=True))
    with local.connect() as wire:
        open_object(wire, "n")
        say(wire, b"hang")
        eventually(lambda: bool(note.heard))
    note.wait_closed()


def test_a_connection_that_is_made_too_late_is_closed(
    wire: Wire, publish: Callable[..., Any]
) -> None:
    release = threading.Event()
    note = publish("n", Note(create=lambda stream: release.wait(DEADLINE)))
    wire.send(type="object-open", object="n", queryId="s")
    eventually(lambda: bool(note.streams))
    wire.send(type="cancel", queryId="s")
    assert {wire.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
    assert not note.closed
    release.set()
    note.wait_closed()
    publish("n", Note(create=lambda stream: 1 / 0))
    reply = open_object(wire, "n")
    assert reply["code"] == "internal" and "'Notes'" in reply["error"]


@pytest.mark.parametrize("is_async", [False, True])
def test_the_end_of_the_server_is_told(launch: Launch, is_async: bool) -> None:
    local = launch(Notes())
    begun, release = threading.Event(), threading.Event()

    def on_data(stream: Any, payload: bytes, references: Any) -> None:
        begun.set()
        release.wait(DEADLINE)

    quiet, busy = Note(is_async=is_async), Note(on_data=on_data)
    local.server.publish("quiet", quiet)
    local.server.publish("busy", busy)
    with local.connect() as wire:
        open_object(wire, "quiet", 1)
        open_object(wire, "busy", 2)
        say(wire, b"x", 2)
        assert begun.wait(DEADLINE)
        threading.Timer(0.3, release.set).start()
        local.server.stop()
        assert {wire.receive()["code"] for _ in range(2)} == {"shutting_down"}
    assert len(quiet.closed) == len(busy.closed) == 1


def test_references_of_a_stream_end_with_it(
    local: LocalServer, wire: Wire, publish: Callable[..., Any]
) -> None:
    def on_data(stream: Any, payload: bytes, references: Any) -> None:
        if payload == b"release":
            stream.release()
        elif payload == b"back":
            stream.send(json.dumps([obj.num_rows for obj in references]))
        else:
            stream.send(payload, [TABLE])

    publish("n", Note(on_data=on_data))

    def ticket() -> str:
        say(wire, b"give")
        given: str = data(wire).header["references"][0]["ticket"]
        return given

    def resolve(ticket: str, by: Wire = wire) -> Any:
        by.send(type="object-fetch", ticket=ticket, queryId="r")
        return data(by)

    open_object(wire, "n")
    first, second = ticket(), ticket()
    assert first != second and len(first) >= 20
    assert resolve(first).table() == TABLE
    say(wire, b"back", references=[first, second])
    assert json.loads(data(wire).body) == [3, 3]
    with local.connect() as stranger:
        foreign = resolve(first, stranger)
    wire.send(type="object-release", tickets=[first, "unknown"], queryId=1)
    assert data(wire) == {"type": "object-released", "queryId": 1, "released": 1}
    released = resolve(first)
    assert released["code"] == foreign["code"] == "gone" and released["error"] == foreign["error"]
    say(wire, b"release")
    third = ticket()
    assert resolve(second)["code"] == "gone" and resolve(third).table() == TABLE
    wire.send(type="object-close", queryId="s")
    assert data(wire)["type"] == "object-closed"
    assert resolve(third)["code"] == "gone"


def test_too_many_references_and_streams_are_refused(
    wire: Wire, publish: Callable[..., Any]
) -> None:
    publish("f", Note(fetch=lambda note: (b"", [TABLE, TABLE])))
    tickets = []
    for _ in range(2):
        tickets += [one["ticket"] for one in fetch(wire, "f").header["references"]]
    reply = fetch(wire, "f")
    assert reply["code"] == "busy" and "--max-object-references" in reply["error"]
    wire.request(type="object-release", tickets=tickets)
    assert fetch(wire, "f").header["type"] == "object"
    publish("n", Note())
    for number in range(3):
        assert open_object(wire, "n", number)["type"] == "object-opened"
    reply = open_object(wire, "n", 3)
    assert reply["code"] == "busy" and "--max-object-streams" in reply["error"]
    reply = open_object(wire, "n", 0)
    assert reply["code"] in ("busy", "conflict")


def test_a_flood_ends_its_own_stream(wire: Wire, publish: Callable[..., Any]) -> None:
    release = threading.Event()
    publish("n", Note(on_data=lambda *_: release.wait(DEADLINE)))
    publish("other", Note())
    window = open_object(wire, "n")["window"]
    assert window == WINDOW_BYTES
    open_object(wire, "other", "o")
    for _ in range(3):
        say(wire, b"x" * (window - 1000))
    reply = data(wire)
    assert (reply["queryId"], reply["code"]) == ("s", "busy") and "object-ack" in reply["error"]
    say(wire, b"still here", "o")
    assert data(wire).body == b"STILL HERE"
    release.set()


def test_who_waits_for_acks_sends_any_amount(wire: Wire, publish: Callable[..., Any]) -> None:
    heard: list[int] = []
    publish("n", Note(on_data=lambda stream, payload, _: heard.append(len(payload))))
    window = open_object(wire, "n")["window"]
    sent = acked = 0
    message = framed({"type": "object-data", "queryId": "s"}, b"x" * 300_000)
    for _ in range(30):
        while sent - acked >= window:
            acked = wire.receive()["bytes"]
        wire.send_raw(message)
        sent += len(message)
    while acked < sent:
        acked = wire.receive()["bytes"]
    assert heard == [300_000] * 30


def test_a_window_of_the_client_holds_messages_back(
    wire: Wire, publish: Callable[..., Any]
) -> None:
    note = publish("n", Note(create=lambda stream: [stream.send(b"x" * 1000) for _ in range(10)]))
    open_object(wire, "n", clientWindow=1500)
    got = 0
    for number in range(10):
        reply = data(wire)
        got += len(reply.body) + 4 + len(json.dumps(reply.header))
        if number % 2:
            # Only two fit; an answer that comes instead of a third tells so.
            assert wire.rows("select 1 as a") == [{"a": 1}]
            wire.send(type="object-ack", queryId="s", bytes=10_000)
    eventually(lambda: note.streams[0].waiting_bytes == 0)


def test_who_does_not_read_loses_the_stream_and_no_more(launch: Launch) -> None:
    stopped: list[Any] = []

    def create(stream: Any) -> None:
        for _ in range(100):
            stream.send(b"x" * (1 << 20))

    note = Note(create=lambda stream: threading.Thread(target=flood, args=(stream,)).start())

    def flood(stream: Any) -> None:
        try:
            create(stream)
        except Exception as error:
            stopped.append(error)
            note.is_closed.wait(DEADLINE)

    local = launch(Notes(), max_queued_bytes=8 << 20)
    local.server.publish("n", note)
    with local.connect(max_queue=1) as wire:
        wire.send(type="object-open", object="n", queryId="s")
        note.wait_closed()
        eventually(lambda: bool(stopped))
        assert stopped[0].code == "busy" and "--max-queued-bytes" in str(stopped[0])
        reply = data(wire)
        while not isinstance(reply, dict) or reply["type"] != "error":
            reply = data(wire)
        assert reply["code"] == "busy"
        assert wire.rows("select 1 as a") == [{"a": 1}]


TOKENS = """
[roles.reader]
[roles.narrow]
schemas = ["main"]
[roles.mute]
statements = []
"""


def test_who_may_use_which_objects(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    text = TOKENS
    for user, role in (("ada", "reader"), ("ned", "narrow"), ("mo", "mute"), ("al", "admin")):
        digest = hashlib.sha256(user.encode()).hexdigest()
        text += f'[tokens.{user}]\nrole = "{role}"\nhash = "sha256:{digest}"\n'
    path.write_text(text)
    local = launch(Notes(), tokens=str(path))
    publish = local.server.publish
    publish("all", TABLE)
    publish("ada", TABLE, users=["ada"])
    publish("mute", local.server.objects.relation("select 1 as a"), roles=["mute"])
    publish("both", Note(), users=["ned"], roles=["reader"])
    publish("nobody", TABLE, users=[])
    seen = {
        "ada": ["ada", "all", "both"],
        "ned": ["both"],
        "mo": ["mute"],
        "al": ["ada", "all", "both", "mute", "nobody"],
    }
    for user, names in seen.items():
        with local.connect(f"/?token={user}") as wire:
            # What it calls itself counts for nothing.
            wire.request(type="hello", user="ada")
            reply = wire.request(type="object-list", watch=True)
            assert [one["name"] for one in reply["objects"]] == names
            for name in seen["al"]:
                kind = "object-open" if name == "both" else "object-fetch"
                reply = wire.request(type=kind, object=name, queryId=name)
                is_error = isinstance(reply, dict) and reply["type"] == "error"
                assert is_error == (name not in names), (user, name)
                assert not is_error or reply["code"] == "not_found"
            publish("hidden", TABLE, users=["nobody"])
            publish("shown", TABLE, roles=["reader", "narrow", "mute"])
            added = wire.receive()["added"]
            told = [one["name"] for one in added]
            assert (("hidden" in told) == (user == "al") and "shown" in told) or user == "al"
            local.server.objects.unpublish("hidden")
            local.server.objects.unpublish("shown")


def test_limits_of_queries_hold_for_tables_of_objects(launch: Launch) -> None:
    local = launch(Notes(), max_result_rows=2)
    local.server.publish("t", TABLE)
    local.server.publish("r", local.server.objects.relation("from range(3)"))
    with local.connect() as wire:
        for name in ("t", "r"):
            reply = fetch(wire, name)
            assert reply["code"] == "too_large" and "--max-result-rows" in reply["error"]


def test_plugins_publish_in_any_order(launch: Launch) -> None:
    class First(Plugin):
        def starting(self) -> None:
            self.server.publish("note", Note())

        def started(self) -> None:
            self.server.publish("one", self.server.relation("select 1 as a"))

    for plugins in ([First(), Notes()], [Notes(), First()]):
        with launch(*plugins).connect() as wire:
            assert listed(wire) == ["note", "one"]


def test_nothing_is_left_behind(local: LocalServer, publish: Callable[..., Any]) -> None:
    notes = [publish(f"n{number}", Note(is_async=bool(number % 2))) for number in range(3)]
    for _ in range(10):
        with local.connect() as wire:
            for number in range(3):
                open_object(wire, f"n{number}", number)
                say(wire, b"x", number)
    for note in notes:
        # Of one that a client did not wait for, no connection may have been made.
        eventually(lambda note=note: len(note.closed) == len(note.streams))  # type: ignore[misc]
    objects = local.server.objects
    eventually(lambda: not objects._holders and not objects._watches._told)


def test_plugins_are_asked_about_objects_but_not_each_message(launch: Launch) -> None:
    asked: list[tuple[str, str]] = []

    class Guard(Plugin):
        def authorize(self, client: Any, action: Any) -> None:
            asked.append((action.kind, action.resource))
            if action.resource == "secret":
                raise Forbidden("Not that one.")

    local = launch(Notes(), Guard())
    local.server.publish("open", Note())
    local.server.publish("secret", Note())
    with local.connect() as wire:
        assert open_object(wire, "secret")["code"] == "forbidden"
        open_object(wire, "open")
        for _ in range(3):
            say(wire, b"hi")
            assert data(wire).body == b"HI"
        wire.send(type="object-close", queryId="s")
        assert data(wire)["type"] == "object-closed"
    assert asked == [("object-open", "secret"), ("object-open", "open")]


def test_objects_are_those_of_their_app() -> None:
    apps = [AppConfig("a", plugins=[Notes()]), AppConfig("b", plugins=[Notes()])]
    server = Server(Settings(port=0), apps=apps)
    url = f"ws://127.0.0.1:{server.start()}"
    try:
        server.apps["a"].objects.publish("n", Note(fetch=lambda note: (b"", [TABLE])))
        server.publish("main", TABLE)
        with Wire(f"{url}/a") as a, Wire(f"{url}/b") as b, Wire(url) as main:
            assert (listed(a), listed(b), listed(main)) == (["n"], [], ["main"])
            assert fetch(b, "n")["code"] == "not_found"
            ticket = fetch(a, "n").header["references"][0]["ticket"]
            assert b.request(type="object-fetch", ticket=ticket)["code"] == "gone"
            assert a.request(type="object-fetch", ticket=ticket).table() == TABLE
    finally:
        server.stop()
