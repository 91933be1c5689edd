"""Attacks that worked on another server of this protocol, and are tested nowhere else.

Each is a real one, over sockets. Names of channels, rooms and connections are told apart, nothing
is handled before the token, and who leaves at the wrong moment takes nobody with them.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest
from websockets.exceptions import ConnectionClosed

from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess
from tests.loro_client import Client
from tests.test_queries import ENDLESS
from tests.wire import Arrow, Wire, framed, ipc


@pytest.fixture(scope="module")
def open_server() -> Iterator[LocalServer]:
    """With rooms, for whoever comes."""
    local = LocalServer(Settings(port=0, sync=True, workers=2))
    yield local
    local.server.stop()


@pytest.fixture(scope="module")
def guarded() -> Iterator[LocalServer]:
    """With rooms, for those who know the token."""
    local = LocalServer(Settings(port=0, sync=True, auth_token="secret"))
    yield local
    local.server.stop()


def settle(wire: Wire) -> None:
    """Return when the server has handled what was sent before."""
    wire.send(type="hello")
    while wire.receive()["type"] != "welcome":
        pass


def reset(wire: Wire) -> None:
    """Leave without a word: the socket is gone before the server looks at it again."""
    raw = wire.socket.socket
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.shutdown(socket.SHUT_RDWR)
    raw.close()


def test_a_stranger_neither_reads_nor_writes_rooms(guarded: LocalServer) -> None:
    """A document is data as a table is, and its messages are no less in need of a token."""
    edit = Client(guarded.connect("/?token=secret"), "r").change("owned", True)
    attempts: list[tuple[str | bytes, ...]] = [
        ('{"type":"crdt-join","roomId":"r"}', edit),
        ('{"type":"crdt-snapshot","roomId":"r","data":"bG9ybw=="}',),
        ('{"type":"crdt-presence","roomId":"r","data":"AAAA"}',),
        (edit,),
        (framed({"type": "crdt-update", "roomId": "r"}, edit),),
        (framed({"type": "uploadArrow", "tableName": "__sqlrooms.ui_state"}, ipc_of_one()),),
    ]
    for messages in attempts:
        with guarded.connect() as stranger:
            # The close may be here before the second one is on its way.
            with contextlib.suppress(ConnectionClosed):
                for message in messages:
                    stranger.send_raw(message)
            assert stranger.receive()["code"] == "unauthorized"
    with guarded.connect("/?token=secret") as wire:
        owner = Client(wire, "r")
        owner.join()
        assert owner.values == {}
        assert wire.rows("select count(*) as n from __sqlrooms.ui_state") == [{"n": 0}]


def ipc_of_one() -> bytes:
    return ipc(pa.table({"a": [1]}))


def test_one_that_leaves_takes_nobodys_token_with_it(guarded: LocalServer) -> None:
    """Who is known is a matter of the connection, not of the address that others share."""
    with guarded.connect() as stays:
        assert stays.request(type="auth", token="secret")["type"] == "authAck"
        for token in ("secret", "wrong"):
            with guarded.connect() as leaves:
                leaves.request(type="auth", token=token)
        assert stays.table("select 1 as a").num_rows == 1


def test_results_are_heard_by_nobody_else(open_server: LocalServer) -> None:
    """Whatever a connection may be called: as a channel and as a room that name is another."""
    with open_server.connect() as victim, open_server.connect() as spy:
        name = victim.request(type="hello")["connectionId"]
        names = [name, "__conn:1", "__conn:2", f"__conn:{name}", f"connection:{name}", "mine"]
        for guess in names:
            spy.request(type="subscribe", channel=guess)
            Client(spy, guess).join()
        assert victim.table("select 'private' as a").to_pydict() == {"a": ["private"]}
        assert victim.rows("select 'private' as a") == [{"a": "private"}]
        victim.upload(pa.table({"a": [1]}), tableName="mine", queryId="mine")
        spy.send(type="hello")
        assert spy.receive()["type"] == "welcome"


def test_a_channel_is_no_room(open_server: LocalServer) -> None:
    """Who hears a channel of the same name hears no edits, and can say nothing in the room."""
    with open_server.connect() as one, open_server.connect() as spy:
        member = Client(one, "shared name")
        member.join()
        spy.request(type="subscribe", channel="shared name")
        member.send(member.change("a", 1))
        assert member.ack()["type"] == "crdt-update-ack"
        spy.request(type="notify", channel="shared name", payload="to the room")
        assert spy.receive()["type"] == "notifyAck"
        spy.send(type="hello")
        assert spy.receive()["type"] == "welcome"
        one.send(type="hello")
        assert one.receive()["type"] == "welcome"


def test_ids_of_two_connections_do_not_meet(open_server: LocalServer) -> None:
    """Under one id on two connections: the end of the first query leaves the second one known."""
    with open_server.connect() as long, open_server.connect() as short:
        long.send(type="exec", sql=ENDLESS, queryId="same")
        settle(long)
        assert short.table("select 1 as a").num_rows == 1
        assert short.arrow("select 1 as a", "same").header["queryId"] == "same"
        assert long.request(type="cancel", queryId="same")["cancelled"] is True
        assert long.receive()["code"] == "cancelled"


def test_cancel_while_a_conflict_is_tried_again(open_server: LocalServer) -> None:
    """The query runs no statement then that could be interrupted."""
    with open_server.connect() as holder, open_server.connect() as other:
        holder.exec("create or replace table contested as select 0 as n")
        begin = "begin; update contested set n = 1"
        holder.request(type="exec", sql=begin, session="s", queryId="b")
        other.send(type="exec", sql="update contested set n = 2", queryId="loser")
        settle(other)
        assert other.request(type="cancel", queryId="loser")["cancelled"] is True
        assert other.receive()["code"] == "cancelled"
        holder.request(type="exec", sql="rollback", session="s", queryId="r")
        assert holder.rows("from contested") == [{"n": 0}]


def test_large_results_that_are_asked_for_at_once_all_arrive(open_server: LocalServer) -> None:
    """More than any buffer between holds, to a client that reads only when all were asked for."""
    count = 2_500_000
    with open_server.connect() as wire:
        for number in range(4):
            sql = f"select range + {number} as i from range({count})"
            wire.send(type="arrow", sql=sql, queryId=number)
        settled = []
        for _ in range(4):
            reply = wire.receive()
            assert isinstance(reply, Arrow)
            column = reply.table()["i"]
            number = reply.header["queryId"]
            assert len(column) == count
            assert column[count - 1].as_py() == count - 1 + number
            settled.append(number)
        assert sorted(settled) == [0, 1, 2, 3]


def test_joins_and_uploads_of_those_who_are_gone(serve: Callable[..., ServerProcess]) -> None:
    """Their answers are ready when their sockets are no more, and every worker is busy."""
    process = serve("--sync", "--workers", "1")
    upload = framed({"type": "uploadArrow", "tableName": "t"}, ipc_of_one())
    with process.connect() as beside:
        beside.send(type="exec", sql=ENDLESS, queryId="busy")
        for number in range(20):
            wire = process.connect()
            for room in range(5):
                wire.send(type="crdt-join", roomId=f"r{number % 3} {room}")
            wire.send(type="subscribe", channel="c", presence=True)
            wire.send_raw(upload)
            wire.send(type="json", sql="select 1", queryId="q")
            reset(wire)
        beside.send(type="cancel", queryId="busy")
        assert {beside.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
        assert beside.table("select 1 as a").num_rows == 1
        member = Client(beside, "r0 0")
        member.join()
        member.send(member.change("a", 1))
        assert member.ack()["type"] == "crdt-update-ack"
    assert process.stop() == 0
    assert "Traceback" not in process.errors


def test_scripts_of_users_own_their_transactions(open_server: LocalServer) -> None:
    """Nothing is wrapped around a text, so that it may begin and commit, and write to two files."""
    with open_server.connect() as wire:
        begun = wire.arrow(
            "begin; create or replace table mine as select 1 as a; commit; from mine"
        )
        assert begun.table().to_pydict() == {"a": [1]}
        reply = wire.arrow(
            "attach ':memory:' as other; create table other.t as select 2 as b; "
            "create or replace table here as select 3 as c; select b, c from other.t, here"
        )
        assert reply.table().to_pydict() == {"b": [2], "c": [3]}
        wire.exec("detach other")
