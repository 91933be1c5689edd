"""Rooms: one document for all, in both parts of the protocol, with real documents."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from loro import EphemeralStore, ExportMode, VersionVector
from websockets.exceptions import ConnectionClosed

from sqlrooms_server.db.room_store import Line
from sqlrooms_server.features.membership import Member
from sqlrooms_server.messages import RoomSnapshot
from sqlrooms_server.protocol import Limits, decode
from tests.conftest import LocalServer
from tests.loro_client import EMPTY, Client, checksum, encoded, large_document, updates_of
from tests.wire import DEADLINE, Wire


@pytest.fixture
def rooms(launch: Callable[..., LocalServer]) -> LocalServer:
    """A server with rooms in memory."""
    return launch(sync=True)


@pytest.fixture
def client(rooms: LocalServer) -> Iterator[Callable[..., Client]]:
    """Makes clients of ``rooms``, which did not join yet."""
    with ExitStack() as stack:
        yield lambda room="r", doc=None: Client(stack.enter_context(rooms.connect()), room, doc)


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ACK = {"type": "crdt-update-ack", "roomId": "r"}


def test_without_sync(wire: Wire) -> None:
    for fields in (
        {"type": "crdt-join", "roomId": "r"},
        {"type": "crdt-snapshot", "roomId": "r", "data": encoded(EMPTY)},
        {"type": "crdt-leave", "roomId": "r"},
        {"type": "crdt-presence", "roomId": "r", "data": ""},
    ):
        error = wire.request(**fields)
        assert (error["code"], error["roomId"]) == ("bad_request", "r")
        assert "--sync" in error["error"]
    assert "rooms" not in wire.request(type="hello")["features"]


def test_welcome_says_so(rooms: LocalServer) -> None:
    with rooms.connect() as wire:
        assert "rooms" in wire.request(type="hello")["features"]


def test_join_update_ack(client: Callable[..., Client]) -> None:
    one, two = client(), client()
    # The published connector knows an empty room by the size of its document.
    assert one.join() == two.join() == EMPTY
    one.write("a", 1)
    two.await_value("a", 1)
    two.write("b", 2)
    one.await_value("b", 2)
    # Whatever comes next to the sender is not its own update.
    one.write("a", 3)
    one.wire.send(type="hello")
    assert one.next()["type"] == "welcome"
    late = client()
    assert len(late.join()) > len(EMPTY) + 32
    assert late.values == {"a": 3, "b": 2}


def test_a_client_that_does_not_wait(client: Callable[..., Client]) -> None:
    """The published connector sends its snapshot with the join, and ignores the answer."""
    one, two = client(), client()
    one.change("offline", 1)
    one.wire.send(type="crdt-join", roomId="r")
    one.send_snapshot()
    one.send(one.change("a", 2))
    kinds = [one.next()["type"] for _ in range(4)]
    assert kinds == ["crdt-joined", "crdt-snapshot", "crdt-snapshot-ack", "crdt-update-ack"]
    two.join()
    assert two.values == {"offline": 1, "a": 2}


@pytest.mark.parametrize("where", ["memory", "file"])
def test_snapshots_of_clients_are_merged(
    launch: Callable[..., LocalServer], tmp_path: Any, where: str
) -> None:
    path = str(tmp_path / "my.duckdb") if where == "file" else ":memory:"
    server = launch(sync=True, db_path=path)
    with server.connect() as a, server.connect() as b, server.connect() as c:
        one, two, three = Client(a), Client(b), Client(c)
        one.change("one", 1)
        two.change("two", 2)
        one.join(), three.join()
        one.send_snapshot()
        assert one.ack() == {"type": "crdt-snapshot-ack", "roomId": "r"}
        three.await_value("one", 1)
        two.wire.send(type="crdt-join", roomId="r")
        two.send_snapshot()
        two.next(), two.next()
        assert two.ack() == {"type": "crdt-snapshot-ack", "roomId": "r"}
        three.await_value("two", 2)
        one.await_value("two", 2)
        # An empty one wipes nothing, and nothing is new in it.
        three.send_snapshot(EMPTY)
        assert three.ack()["type"] == "crdt-snapshot-ack"
        late = Client(b)
        late.join()
        assert late.values == {"one": 1, "two": 2}


def test_others_get_what_was_new(client: Callable[..., Client]) -> None:
    one, two = client(), client()
    one.join()
    one.write("text", "x" * 5000)
    two.join()
    one.change("more", 1)
    one.send_snapshot()
    assert len(two.receive()) < 1000
    assert two.values["more"] == 1


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda update: update[:-3],
    "header": lambda update: update[:22],
    "magic": lambda update: b"loro",
    "garbage": lambda update: update[:22] + bytes(40),
    "checksum": lambda update: update[:-1] + bytes([update[-1] ^ 1]),
    "random": lambda update: b"loro" + random.Random(1).randbytes(60),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_updates(client: Callable[..., Client], kind: str) -> None:
    one, two = client(), client()
    one.join(), two.join()
    one.send(MALFORMED[kind](Client(one.wire).change("bad", 1)))
    error = one.next()
    assert (error["type"], error["roomId"], error["code"]) == ("error", "r", "bad_request")
    one.wire.send(type="crdt-snapshot", roomId="r", data="?")
    assert one.next()["code"] == "bad_request"
    one.write("good", 1)
    two.await_value("good", 1)
    assert two.values == {"good": 1}


def test_updates_that_break_documents(client: Callable[..., Client]) -> None:
    """Loro takes some updates with a right checksum, and panics later."""
    one, two = client(), client()
    one.join(), two.join()
    rng = random.Random(5)
    original = bytearray(Client(one.wire).change("evil", [1, {"a": "b"}, None]))
    for number in range(150):
        update = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            update[rng.randrange(22, len(update))] = rng.randrange(256)
        update[16:20] = struct.pack("<I", checksum(bytes(update[20:])))
        one.send(bytes(update))
        one.send(one.change("good", number))
    acks = 0
    while acks < 150:
        acks += one.ack()["type"] == "crdt-update-ack"
    one.wire.send(type="crdt-leave", roomId="r")
    while one.ack()["type"] != "crdt-left":
        pass
    late = client()
    late.join()
    assert late.values["good"] == 149
    late.write("still", "there")


def test_who_is_not_in_the_room(client: Callable[..., Client]) -> None:
    one, two = client(), client()
    one.join()
    two.send(two.change("a", 1))
    assert "joined no room" in two.next()["error"]
    two.send_snapshot()
    error = two.next()
    assert (error["code"], error["roomId"]) == ("bad_request", "r")
    two.send_framed(two.change("a", 1))
    assert two.next()["code"] == "bad_request"
    # A channel of the same name is something else.
    two.wire.send(type="subscribe", channel="r")
    assert two.next()["type"] == "subscribed"
    two.wire.send(type="notify", channel="r", payload={"type": "crdt-update-ack"})
    assert two.next()["type"] == "notify"
    assert two.next()["type"] == "notifyAck"
    one.write("b", 1)
    two.wire.send(type="hello")
    assert two.next()["type"] == "welcome"
    assert one.values == {"b": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "crdt-join"},
        {"type": "crdt-join", "roomId": ""},
        {"type": "crdt-join", "roomId": "é" * 128},
        {"type": "crdt-join", "roomId": 7},
        {"type": "crdt-join", "roomId": "r", "version": 7},
        {"type": "crdt-join", "roomId": "r", "version": "?"},
        {"type": "crdt-join", "roomId": "r", "version": "////"},
        {"type": "crdt-snapshot", "roomId": "r"},
        {"type": "crdt-leave", "roomId": None},
        {"type": "crdt-presence", "roomId": "r", "data": {}},
    ],
)
def test_bad_messages(client: Callable[..., Client], fields: dict[str, Any]) -> None:
    one = client()
    error = one.wire.request(**fields)
    assert (error["type"], error["code"]) == ("error", "bad_request")
    one.join()


@pytest.mark.parametrize("more", [{}, {"at": "now"}])
@pytest.mark.parametrize("slash", ["/", "\\/"])
def test_large_snapshots_in_any_writing(more: dict[str, str], slash: str) -> None:
    data = "/+AB" * 20_000
    text = json.dumps({"type": "crdt-snapshot", "roomId": "r", "data": data, **more})
    limits = Limits(max_message_size=1 << 20, max_sql_length=1 << 20)
    message = decode(text.replace("/", slash).encode(), is_text=True, limits=limits)
    assert isinstance(message, RoomSnapshot)
    assert (message.room, bytes(message.data)) == ("r", data.encode())


def test_several_rooms_of_one_connection(client: Callable[..., Client]) -> None:
    a, other = client("a"), client("b")
    b = Client(a.wire, "b")
    a.join_with_version(), b.join_with_version(), other.join_with_version()
    a.send(a.change("x", 1))
    error = a.next()
    assert "2 rooms" in error["error"]
    assert "crdt-update" in error["error"]
    b.send_framed(b.change("y", 2), id="first")
    ack = b.next()
    assert ack == {"type": "crdt-update-ack", "roomId": "b", "id": "first", "status": "applied"}
    header, body = other.next()
    assert header == {"type": "crdt-update", "roomId": "b"}
    other.doc.import_(body)
    assert other.values == {"y": 2}
    a.wire.send(type="crdt-leave", roomId="b")
    assert a.next() == {"type": "crdt-left", "roomId": "b"}
    other.send_framed(other.change("z", 3))
    other.next()
    # What it changed before it is sent now; it is in one room only.
    a.send(updates_of(a.doc))
    assert a.next() == {"type": "crdt-update-ack", "roomId": "a"}
    a.wire.send(type="crdt-leave", roomId="nowhere")
    assert a.next() == {"type": "crdt-left", "roomId": "nowhere"}


def test_only_what_is_missing_travels_both_ways(client: Callable[..., Client]) -> None:
    one, two = client(), client()
    joined, header, _ = one.join_with_version("")
    assert header == {"type": "crdt-snapshot", "roomId": "r"}
    one.send_framed(one.change("text", random.Random(1).randbytes(20_000).hex()))
    assert one.next()["status"] == "applied"
    two.doc.import_(updates_of(one.doc))
    two.change("offline", 1)
    one.send_framed(one.change("online", 1))
    assert one.next()["status"] == "applied"
    joined, header, body = two.join_with_version()
    assert header == {"type": "crdt-update", "roomId": "r"}
    assert len(body) < 300
    assert two.values["online"] == 1
    # What the server lacks is for the client to send.
    version = VersionVector.decode(base64.b64decode(joined["version"]))
    rest = bytes(two.doc.export(ExportMode.Updates(version)))
    assert len(rest) < 300
    two.send_framed(rest, id=7)
    assert two.next() == {**ACK, "id": 7, "status": "applied"}
    header, body = one.next()
    one.doc.import_(body)
    assert one.values == two.values
    # Nothing is missing now, and that is said, too.
    _, header, body = one.join_with_version()
    assert header["type"] == "crdt-update"
    assert len(body) < 50


def test_pending(client: Callable[..., Client]) -> None:
    one, two, three = client(), client(), client()
    one.join_with_version(), two.join(), three.join_with_version()
    first, second = two.change("a", 1), two.change("b", 2)
    two.send(second)
    assert two.next() == ACK
    one.send_framed(second, id=1)
    assert one.next() == {**ACK, "id": 1, "status": "pending"}
    late = client()
    late.join()
    assert late.values == {}
    one.send_framed(first, id=2)
    assert one.next() == {**ACK, "id": 2, "status": "applied"}
    for member in (three, late):
        member.await_value("b", 2)
        assert member.values == {"a": 1, "b": 2}


def test_pending_that_somebody_else_unlocks(client: Callable[..., Client]) -> None:
    """Who sends what was missing gets what waited for it."""
    one, two, three = client(), client(), client()
    one.join_with_version(), two.join(), three.join()
    first, second = one.change("a", 1), one.change("b", 2)
    one.send_framed(second)
    assert one.next() == {**ACK, "status": "pending"}
    two.doc.import_(first)
    two.send(first)
    assert two.next() == ACK
    for member in (two, three):
        member.await_value("b", 2)
        assert member.values == {"a": 1, "b": 2}
    # What comes by itself goes to the others only.
    two.send(two.change("c", 3))
    assert two.next() == ACK
    two.wire.send(type="hello")
    assert two.next()["type"] == "welcome"


def test_acks_of_a_burst(client: Callable[..., Client]) -> None:
    one = client()
    one.join_with_version()
    for number in range(500):
        one.send_framed(one.change("n", number), id=number)
    one.send_framed(b"loro", id="bad")
    one.send_framed(one.change("n", 500), id=500)
    acks = []
    total = 0
    while total < 502:
        acks.append(one.next())
        total += acks[-1].get("count", 1)
    applied = [ack["id"] for ack in acks if ack["status"] == "applied"]
    assert applied == sorted(applied)
    assert applied[-1] == 500
    (rejected,) = [ack for ack in acks if ack["status"] == "rejected"]
    assert (rejected["id"], rejected["code"]) == ("bad", "bad_request")
    assert sum(ack.get("count", 1) for ack in acks[: acks.index(rejected)]) == 500


def test_presence(client: Callable[..., Client]) -> None:
    one, two, old = client(), client(), client()
    one.join_with_version(), two.join_with_version(), old.join()
    store = EphemeralStore(30_000)
    store.set("ada", {"x": 1})
    one.wire.send(type="crdt-presence", roomId="r", data=encoded(store.encode_all()))
    message = two.next()
    assert message["type"] == "crdt-presence"
    found = EphemeralStore(30_000)
    found.apply(base64.b64decode(message["data"]))
    assert found.get_all_states() == {"ada": {"x": 1}}
    # Neither the sender nor who does not know of it hears of it.
    for member in (one, old):
        member.wire.send(type="hello")
        assert member.next()["type"] == "welcome"
    late = client()
    late.join_with_version()
    message = late.next()
    found = EphemeralStore(30_000)
    found.apply(base64.b64decode(message["data"]))
    assert found.get_all_states() == {"ada": {"x": 1}}
    for data in ("?", encoded(b"zz")):
        error = one.wire.request(type="crdt-presence", roomId="r", data=data)
        assert (error["code"], error["roomId"]) == ("bad_request", "r")
    error = one.wire.request(type="crdt-presence", roomId="r", data="A" * 100_000)
    assert error["code"] == "too_large"


def test_limits(launch: Callable[..., LocalServer]) -> None:
    server = launch(
        sync=True,
        max_rooms=2,
        max_rooms_per_connection=1,
        max_room_size=4000,
        max_update_size=2000,
        update_rate=5,
    )
    with ExitStack() as stack:
        one, two, three = (
            Client(stack.enter_context(server.connect()), room) for room in ("a", "b", "c")
        )
        one.join(), two.join()

        def refused(answer: Any, code: str, flag: str, room: str) -> None:
            assert (answer["type"], answer["code"], answer["roomId"]) == ("error", code, room)
            assert flag in answer["error"]

        refused(
            one.wire.request(type="crdt-join", roomId="b"),
            "busy",
            "--max-rooms-per-connection",
            "b",
        )
        refused(three.wire.request(type="crdt-join", roomId="c"), "busy", "--max-rooms)", "c")
        one.send(b"loro" + bytes(3000))
        refused(one.next(), "too_large", "--max-update-size", "a")
        one.write("x", os.urandom(800).hex())
        one.write("y", os.urandom(800).hex())
        one.send(one.change("z", os.urandom(800).hex()))
        refused(one.next(), "too_large", "--max-room-size", "a")
        # Whoever speaks the second part is told, the others are closed: they connect again.
        two.join_with_version()
        for number in range(20):
            two.send_framed(b"no update", id=number)
        answers: list[Any] = []
        while sum(answer.get("count", 1) for answer in answers) < 20:
            answers.append(two.next())
        busy = [answer for answer in answers if answer["code"] == "busy"]
        assert 5 <= len(busy) <= 10
        assert "--update-rate" in busy[0]["error"]
        with contextlib.suppress(ConnectionClosed):
            for _ in range(20):
                one.send(b"loro no update")
        codes = []
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                codes.append(one.next()["code"])
        assert "busy" in codes
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


def test_joins_whose_answers_nobody_awaits(client: Callable[..., Client]) -> None:
    one = client()
    for _ in range(300):
        one.wire.send(type="crdt-join", roomId="r", version="")
    joined = refused = 0
    while joined + refused < 300:
        reply = one.next()
        if isinstance(reply, tuple):
            continue
        if reply["type"] == "crdt-joined":
            joined += 1
        else:
            refused += 1
            assert reply["code"] == "busy"
    assert joined >= 32


def test_snapshots_count_with_what_is_new_in_them(launch: Callable[..., LocalServer]) -> None:
    """Those who connect again send all that they have, and all at once."""
    server = launch(sync=True, max_room_size=1 << 20)
    with ExitStack() as stack:
        clients = [Client(stack.enter_context(server.connect())) for _ in range(4)]
        one = clients[0]
        one.doc = large_document(700 << 10)
        for client in clients:
            client.join()
            client.doc.import_(updates_of(one.doc))
        for _ in range(3):
            for number, client in enumerate(clients):
                client.change(f"offline {number}", number)
                client.send_snapshot()
            for client in clients:
                assert client.ack() == {"type": "crdt-snapshot-ack", "roomId": "r"}
        one.change("too much", os.urandom(400 << 10).hex())
        one.send_snapshot()
        error = one.ack()
        assert (error["code"], error["roomId"]) == ("too_large", "r")
        assert "--max-room-size" in error["error"]
        late = Client(stack.enter_context(server.connect()))
        late.join()
        assert late.values == {f"offline {number}": number for number in range(4)}


def test_refusals_do_not_overtake_acks(
    launch: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients without ids tell by the order which of their updates was acked."""
    server = launch(sync=True, max_room_size=4000)
    pool = server.server.rooms.pool  # type: ignore[union-attr]
    go_on, is_closing = threading.Event(), threading.Event()
    join = pool._small.join

    def joining(deadline: float) -> None:
        is_closing.set()
        join(deadline)

    def waiting(error: BaseException | None) -> None:
        go_on.wait(DEADLINE)

    monkeypatch.setattr(pool._small, "join", joining)
    with server.connect() as wire:
        one = Client(wire)
        one.join()
        # The ack waits for what is written before it.
        pool.store.append("r", (), Line(), waiting)
        one.send(one.change("a", 1))
        one.send_snapshot(bytes(8000))
        wire.send(type="hello")
        assert one.next()["type"] == "welcome"
        stopping = threading.Thread(target=server.server.stop)
        stopping.start()
        assert is_closing.wait(DEADLINE)
        one.send(one.change("b", 2))
        wire.send(type="hello")
        assert one.next()["type"] == "welcome"
        go_on.set()
        answers = [one.next() for _ in range(3)]
        stopping.join()
    assert answers[0] == {"type": "crdt-update-ack", "roomId": "r"}
    assert [answer["code"] for answer in answers[1:]] == ["too_large", "shutting_down"]


def test_leaving_and_joining_without_waiting(client: Callable[..., Client]) -> None:
    one, two = client(), client()
    two.join()
    one.join_with_version("")
    for kind in ("crdt-leave", "crdt-join", "crdt-leave"):
        one.wire.send(type=kind, roomId="r", version="")
    assert one.next()["type"] == "crdt-left"
    # By now it is neither in nor out.
    one.wire.send(type="crdt-join", roomId="r", version="")
    for kind in ("crdt-joined", "crdt-left", "crdt-joined"):
        assert one.next()["type"] == kind
        if kind == "crdt-joined":
            assert one.next()[0]["type"] == "crdt-snapshot"
    two.write("a", 1)
    one.await_value("a", 1)


def test_rooms_without_members_leave_the_memory(launch: Callable[..., LocalServer]) -> None:
    server = launch(sync=True, max_rooms=3, room_idle_timeout=0)
    with server.connect() as wire:
        for number in range(30):
            one = Client(wire, f"room {number}")
            one.join()
            one.write("n", number)
            wire.send(type="crdt-leave", roomId=one.room)
            assert one.ack()["type"] == "crdt-left"
        for number in range(30):
            again = Client(wire, f"room {number}")
            again.join()
            assert again.values == {"n": number}
            wire.send(type="crdt-leave", roomId=again.room)
            assert again.ack()["type"] == "crdt-left"
        entries = server.server.rooms._entries  # type: ignore[union-attr]
        await_that(lambda: not entries)


def test_rooms_that_are_to_leave_the_memory_twice(
    launch: Callable[..., LocalServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = launch(sync=True, max_rooms=3)
    feature: Any = server.server.rooms
    with server.connect() as wire:
        one = Client(wire)
        for name in "abc":
            wire.send(type="crdt-join", roomId=name)
            one.next(), one.next()
            wire.send(type="crdt-leave", roomId=name)
            assert one.next()["type"] == "crdt-left"
        idle = [entry.room for entry in feature._entries.values()]
        (pid,) = feature.pool.pids
        os.kill(pid, signal.SIGSTOP)
        try:
            for number in range(5):
                wire.send(type="crdt-join", roomId=str(number))
            wire.send(type="hello")
            assert one.next()["type"] == "welcome"
        finally:
            os.kill(pid, signal.SIGCONT)
        for _ in range(5):
            assert one.next()["type"] == "crdt-joined"
            assert one.next()["type"] == "crdt-snapshot"
        while any(room.queue or room.is_scheduled for room in idle):
            time.sleep(0.01)
        # What came of all that was told before this.
        wire.send(type="crdt-join", roomId="4")
        assert one.next()["type"] == "crdt-joined"
    assert not {"a", "b", "c"} & set(feature._entries)
    assert not caplog.records


def test_a_process_that_is_killed(client: Callable[..., Client], rooms: LocalServer) -> None:
    one, two = client(), client()
    one.join(), two.join()
    pool = rooms.server.rooms.pool  # type: ignore[union-attr]
    for number in range(100):
        one.send(one.change("n", number))
        if number % 40 == 20:
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
    for _ in range(100):
        assert one.ack() == ACK
    two.await_value("n", 99)
    late = client()
    late.join()
    assert late.values == {"n": 99}


def test_a_process_of_little_memory(launch: Callable[..., LocalServer]) -> None:
    server = launch(sync=True, room_memory=120 << 20, max_update_size=64 << 20)
    with server.connect() as a, server.connect() as b:
        one, two = Client(a), Client(b)
        one.join(), two.join()
        one.write("a", 1)
        two.await_value("a", 1)
        one.send(updates_of(large_document(60 << 20)))
        error = one.next()
        assert (error["code"], error["roomId"]) == ("bad_request", "r")
        one.write("b", 2)
        two.await_value("b", 2)
        assert two.values == {"a": 1, "b": 2}


def test_a_large_room_stalls_nobody(launch: Callable[..., LocalServer]) -> None:
    server = launch(sync=True)
    with ExitStack() as stack:
        wires = [stack.enter_context(server.connect()) for _ in range(5)]
        large, joiner = Client(wires[0], "large"), Client(wires[1], "large")
        one, two = Client(wires[2]), Client(wires[3])
        one.join(), two.join(), large.join()
        snapshot = large_document(50 << 20).export(ExportMode.Snapshot())
        assert len(snapshot) > 48 << 20
        data = encoded(snapshot)
        large.wire.send(type="crdt-snapshot", roomId="large", data=data)
        joiner.wire.send(type="crdt-join", roomId="large")

        def receive() -> None:
            # In the snapshot, or as an update after it: whoever came first.
            while len(joiner.wire.socket.recv(timeout=DEADLINE)) < 24 << 20:
                pass

        thread = threading.Thread(target=receive)
        thread.start()
        times: list[float] = []
        while thread.is_alive():
            began = time.monotonic()
            one.write("n", len(times))
            two.await_value("n", len(times))
            wires[4].rows("select 1 as a")
            times.append(time.monotonic() - began)
        thread.join()
        assert large.ack() == {"type": "crdt-snapshot-ack", "roomId": "large"}
        assert len(times) > 20
        # Nobody waited for most of it. The client on the same interpreter takes some of it.
        assert max(times) < sum(times) / 2


def test_a_large_update_is_imported_away_from_other_rooms(
    client: Callable[..., Client], rooms: LocalServer
) -> None:
    one, other = client(), client("other")
    one.join(), other.join()
    one.write("a", 1)
    other.write("a", 1)
    pool = rooms.server.rooms.pool  # type: ignore[union-attr]
    (small,) = pool.pids
    one.write("b", os.urandom(100_000).hex())
    assert len(pool.pids) == 2
    one.write("c", 3)
    other.write("c", 3)
    late = client()
    late.join()
    assert late.values == one.values
    assert small in pool.pids


def test_a_member_that_does_not_read(launch: Callable[..., LocalServer]) -> None:
    server = launch(sync=True, max_queued_bytes=1 << 20)
    with server.connect() as a, server.connect() as b, server.connect() as c:
        stalled, one, two = Client(a), Client(b), Client(c)
        stalled.wire.send(type="crdt-join", roomId="r")
        one.join(), two.join()
        text = os.urandom(1 << 20).hex()
        for number in range(10):
            one.write("t", [number, text])
            two.receive()
        assert two.values["t"][0] == 9


def test_members_leave_with_their_connection(
    client: Callable[..., Client], rooms: LocalServer
) -> None:
    for _ in range(3):
        with rooms.connect() as wire:
            for number in range(20):
                wire.send(type="crdt-join", roomId=f"r{number}")
    one = client()
    one.join()
    feature: Any = rooms.server.rooms
    await_that(lambda: rooms.server.connections.count() == 1)
    one.write("a", 1)
    assert [len(entry.members) for entry in feature._entries.values()].count(1) == 1
    assert sum(len(entry.members) for entry in feature._entries.values()) == 1
    assert len(feature._of_peer) == 1


def test_leaving_while_the_document_is_sent(client: Callable[..., Client]) -> None:
    """What a client hears of a room comes in the order of what it asked."""
    one, two = client(), client()
    one.doc = large_document(4 << 20)
    one.join()
    one.send_snapshot()
    assert one.ack()["type"] == "crdt-snapshot-ack"
    for _ in range(3):
        two.wire.send(type="crdt-join", roomId="r", version="")
        two.wire.send(type="crdt-leave", roomId="r")
    for _ in range(3):
        assert two.next()["type"] == "crdt-joined"
        assert two.next()[0] == {"type": "crdt-snapshot", "roomId": "r"}
        assert two.next() == {"type": "crdt-left", "roomId": "r"}
    two.join()
    two.write("a", 1)


def test_documents_that_wait_have_a_limit() -> None:
    class Slow:
        closed = 0

        def stream(self, source: Any, *, is_text: bool) -> None:
            pass

        def close(self, code: int, reason: str) -> None:
            self.closed = code

    slow: Any = Slow()
    member = Member(slow, "r", 1 << 20, lambda member: None)
    document = bytes(2 << 20)
    member.send_document("crdt-snapshot", document)
    member.send_document("crdt-snapshot", document)
    assert slow.closed == 0
    member.send_document("crdt-snapshot", document)
    assert slow.closed == 1013


def test_a_join_behind_one_that_is_refused(client: Callable[..., Client]) -> None:
    one, two = client(), client()
    one.wire.send(type="crdt-join", roomId="r", version="////")
    one.wire.send(type="crdt-join", roomId="r", version="")
    assert one.next()["code"] == "bad_request"
    assert one.next()["type"] == "crdt-joined"
    one.receive()
    two.wire.send(type="crdt-join", roomId="r", version="////")
    two.wire.send(type="crdt-leave", roomId="r")
    assert two.next()["code"] == "bad_request"
    assert two.next() == {"type": "crdt-left", "roomId": "r"}
    two.join()
    two.write("a", 1)
    one.await_value("a", 1)


def test_versions_that_wait_have_a_limit(client: Callable[..., Client], rooms: LocalServer) -> None:
    one = client()
    one.join()
    (pid,) = rooms.server.rooms.pool.pids  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(30):
            version = encoded(bytes(3 << 20))
            one.wire.send(type="crdt-join", roomId=f"r{number}", version=version)
        error = one.next()
        assert (error["type"], error["roomId"], error["code"]) == ("error", "r21", "busy")
    finally:
        os.kill(pid, signal.SIGCONT)


def test_joining_again_while_the_document_is_sent(rooms: LocalServer) -> None:
    with rooms.connect() as a, rooms.connect() as b:
        one, two = Client(a), Client(b)
        one.doc = large_document(8 << 20)
        one.join()
        one.send_snapshot()
        assert one.ack()["type"] == "crdt-snapshot-ack"
        for _ in range(3):
            two.wire.send(type="crdt-join", roomId="r")
        for number in range(20):
            one.write("n", number)
        joins = 0
        while two.values.get("n") != 19 or joins < 3:
            reply = two.next()
            if isinstance(reply, tuple):
                assert joins, "an update came before the document"
                assert two.doc.import_(reply[1]).pending is None
            elif reply["type"] == "crdt-snapshot":
                joins += 1
                two.doc.import_(base64.b64decode(reply["data"], validate=True))
