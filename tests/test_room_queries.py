"""``room(name)`` and ``rooms()`` in SQL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from loro import LoroMap

from sqlrooms_server.db.room_macros import wanted_rooms
from sqlrooms_server.db.room_store import Line
from sqlrooms_server.errors import Busy
from sqlrooms_server.features import room_queries
from sqlrooms_server.rooms.room import Document
from tests.conftest import LocalServer
from tests.loro_client import Client, large_document, updates_of
from tests.wire import Wire


@pytest.fixture
def server(launch: Callable[..., LocalServer]) -> LocalServer:
    return launch(sync=True)


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    """A client in the room "plan"."""
    with server.connect() as wire:
        client = Client(wire, "plan")
        client.join()
        yield client


def documents(wire: Wire, sql: str = "select * from room('plan')", **options: Any) -> list[Any]:
    reply = wire.request(type="json", sql=sql, queryId="j", **options)
    assert reply["type"] == "json", reply
    return [json.loads(row["document"]) for row in json.loads(reply["data"])]


def test_a_row_or_none(wire: Wire, client: Client) -> None:
    assert documents(wire) == []
    for number in range(50):
        client.write("n", number)
        # What was acked is in it.
        assert documents(wire) == [{"m": {"n": number}}]
    assert documents(wire, "select * from room('other')") == []
    (row,) = wire.rows("select room_id, updated_at from room('plan')")
    assert row["room_id"] == "plan"
    assert row["updated_at"] > 1_600_000_000_000
    table = wire.table("select * from Room ( 'plan' )")
    assert table.column_names == ["room_id", "document", "updated_at"]
    (listed,) = wire.rows("select * from rooms()")
    assert listed["room_id"] == "plan"
    assert listed["bytes"] > 0


def test_when_it_changed(wire: Wire, client: Client) -> None:
    client.write("a", 1)
    sql = "select updated_at from room('plan')"
    before = wire.rows(sql)
    # What the room has already is no change.
    client.send(updates_of(client.doc))
    assert client.ack()["type"] == "crdt-update-ack"
    assert wire.rows(sql) == before


def test_when_a_large_one_changed(server: LocalServer, wire: Wire, client: Client) -> None:
    """What is written as a snapshot has no row in the log that says when."""
    times = []
    for number in range(2):
        client.doc.import_(updates_of(large_document(6 << 20, seed=number)))
        client.send_snapshot()
        assert client.ack()["type"] == "crdt-snapshot-ack"
        (row,) = wire.rows("select updated_at from rooms()")
        times.append(row["updated_at"])
    assert times[0] < times[1]


def test_joins_parameters_and_copies(wire: Wire, client: Client) -> None:
    client.write("city", "Oslo")
    wire.exec("create table visits as select 'Oslo' as city, 2 as n union all select 'Rome', 1")
    sql = "select n from visits join room('plan') on city = (document->'m'->>'city')"
    assert wire.rows(sql) == [{"n": 2}]
    assert documents(wire, "select * from room(?)", params=["plan"]) == [{"m": {"city": "Oslo"}}]
    assert documents(wire, "select * from room($r)", params={"r": "plan"}) != []
    assert documents(wire, "select * from room('pl' || 'an')") != []
    wire.exec("create table copy as select * from room('plan')")
    assert wire.rows("select count(*)::int as n from copy") == [{"n": 1}]
    wire.exec("insert into copy select * from room('plan')")
    assert wire.rows("select count(*)::int as n from copy") == [{"n": 2}]


def test_sessions(wire: Wire, client: Client) -> None:
    client.write("a", 1)
    assert documents(wire, session="s") == [{"m": {"a": 1}}]
    client.write("a", 2)
    assert documents(wire, session="s") == [{"m": {"a": 2}}]
    for sql in ("begin", "create table t as select 1 as a"):
        assert wire.request(type="exec", sql=sql, queryId=1, session="s")["type"] == "ok"
    client.write("a", 3)
    assert documents(wire, session="s") == [{"m": {"a": 3}}]
    wire.request(type="exec", sql="select error('x')", queryId=1, session="s")
    failed = wire.request(type="json", sql="from room('plan')", queryId=1, session="s")
    assert (failed["type"], failed["code"]) == ("error", "query_error")
    assert wire.request(type="exec", sql="rollback", queryId=1, session="s")["type"] == "ok"
    assert documents(wire, session="s") == [{"m": {"a": 3}}]


def test_it_is_never_cached_nor_live(wire: Wire, client: Client) -> None:
    for number in range(3):
        client.write("n", number)
        assert documents(wire, persist=True) == [{"m": {"n": number}}]
    error = wire.request(type="live", sql="select * from room('plan')", queryId="l")
    assert (error["type"], error["code"]) == ("error", "bad_request")
    assert "room" in error["error"]


def test_nobody_can_write_it(wire: Wire, client: Client) -> None:
    client.write("a", 1)
    for sql in (
        "insert into room('plan') values (1, 2, 3)",
        "from room('plan'); delete from temp.__sqlrooms_room",
        "from room('plan'); insert into temp.__sqlrooms_room values ('x', '1', now())",
    ):
        assert wire.request(type="exec", sql=sql, queryId="q")["type"] == "error"
    assert documents(wire) == [{"m": {"a": 1}}]
    # It is of the query that asks, and of no other.
    assert "room" in wire.request(type="exec", sql='select * from "room"(1)', queryId=1)["error"]
    assert wire.rows("select count(*)::int as n from duckdb_views() where view_name ~ 'sqlrooms'")


def test_a_function_of_the_same_name_wins(wire: Wire, client: Client) -> None:
    client.write("a", 1)
    assert documents(wire, session="s") != []
    wire.exec("create macro room(n) as table select '{\"mine\": 1}' as document")
    assert documents(wire) == [{"mine": 1}]
    assert documents(wire, session="s") == [{"mine": 1}]
    wire.exec("drop macro table room")
    assert documents(wire) == [{"m": {"a": 1}}]


def test_a_function_of_a_session_wins(wire: Wire, client: Client) -> None:
    client.write("a", 1)
    mine = "create or replace temp macro room(n) as table select '{\"mine\": 1}' as document"
    for session in ("s", "t"):
        if session == "s":
            assert documents(wire, session=session) == [{"m": {"a": 1}}]
        wire.request(type="exec", sql=mine, queryId=1, session=session)
        for _ in range(2):
            assert documents(wire, session=session) == [{"mine": 1}]
    # One that is no table takes no place.
    wire.exec("create macro room(n) as 5")
    sql = "select document from room('plan') where room(1) = 5"
    for options in ({}, {"session": "u"}):
        assert documents(wire, sql, **options) == [{"m": {"a": 1}}]


def test_documents_that_are_too_large_together(
    wire: Wire, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        with server.connect() as other:
            one = Client(other, name)
            one.join()
            one.write("text", "x" * 1000)
    size = len(json.dumps({"m": {"text": "x" * 1000}}))
    monkeypatch.setattr(room_queries, "_MAX_BYTES", 2 * size)
    assert len(documents(wire, "from room('a') union all from room('b')")) == 2
    sql = "select document from room('a'), room('b'), room('c')"
    error = wire.request(type="json", sql=sql, queryId=1)
    assert (error["code"], str(3 * size) in error["error"]) == ("too_large", True)


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_queries, "_MAX_BYTES", 25)
    requests, resumed = Mock(), Mock()
    reading = room_queries._Reading(resumed, requests, 5)
    kept = []
    for name in "abcd":
        reading.add(Document(name, bytes(10), 0))
        kept.append(len(reading.documents))
    assert kept == [1, 2, 0, 0]
    assert not reading.is_over
    reading.add(Busy("no"))
    assert reading.is_over
    assert (reading.size, str(reading.error)) == (40, "no")
    requests.post.assert_called_once_with(resumed.resume)


def test_a_room_that_cannot_be_read(server: LocalServer, wire: Wire, client: Client) -> None:
    client.write("a", 1)
    store: Any = server.server.main.room_store
    store.append("bad", [b"x"], Line(), lambda error: None)
    store.set_aside("bad", (), "because")
    assert store.flush(10)
    error = wire.request(type="json", sql="from room('bad')", queryId="j")
    assert (error["type"], error["code"], error["queryId"]) == ("error", "internal", "j")
    assert "because" in error["error"]
    assert documents(wire) == [{"m": {"a": 1}}]


def test_nothing_waits_after_a_query(server: LocalServer, wire: Wire, client: Client) -> None:
    client.write("a", 1)
    assert documents(wire) == [{"m": {"a": 1}}]
    feature: Any = server.server.rooms
    assert feature._entries["plan"].room.waiting_bytes == 0


def test_a_room_that_is_nested_deeply(server: LocalServer, wire: Wire, client: Client) -> None:
    one = client.doc.get_map("m")
    for _ in range(900):
        one = one.insert_container("m", LoroMap())
    client.doc.commit()
    client.write("a", 1)
    client.send(updates_of(client.doc))
    assert client.ack()["type"] == "crdt-update-ack"
    pids = server.server.rooms.pool.pids  # type: ignore[union-attr]
    error = wire.request(type="json", sql="from room('plan')", queryId="j")
    assert (error["type"], error["code"], error["queryId"]) == ("error", "bad_request", "j")
    assert "nested too deeply" in error["error"]
    assert server.server.rooms.pool.pids == pids  # type: ignore[union-attr]
    client.write("a", 2)


def test_a_value_that_names_another_part(server: LocalServer, wire: Wire, client: Client) -> None:
    """Loro takes such an update when its checksum is right."""
    client.send(
        bytes.fromhex(
            "6c6f726f0000000000000000000000004d45317300044e0002000201100101000000000000000101000000"
            "0000050100000100060104010000060b0163046576696c0161016d000f01040204000303000202040b0204"
            "01000c090007020901080102050162"
        )
    )
    assert client.ack()["type"] == "crdt-update-ack"
    pids = server.server.rooms.pool.pids  # type: ignore[union-attr]
    (document,) = documents(wire)
    assert document["m"]["evil"][1] == {"a": "b"}
    assert server.server.rooms.pool.pids == pids  # type: ignore[union-attr]


def test_without_sync(launch: Callable[..., LocalServer]) -> None:
    with launch().connect() as wire:
        error = wire.request(type="json", sql="select * from room('plan')", queryId=1)
        assert error["code"] == "query_error"


@pytest.mark.parametrize(
    ("sql", "names", "is_all"),
    [
        ("from room('a') join ROOM ( 'it''s' )", {"a", "it's"}, False),
        ("from room(?)", {"p"}, False),
        ("from room($x)", {"p"}, False),
        ("from room(lower('A'))", set(), True),
        ("from room('a' || 'b')", set(), True),
        ("from rooms()", set(), False),
    ],
)
def test_what_is_wanted(sql: str, names: set[str], is_all: bool) -> None:
    wanted = wanted_rooms(sql, ["p", 1])
    assert wanted is not None
    assert set(wanted.names) == names
    assert wanted.all == is_all


@pytest.mark.parametrize(
    "sql",
    [
        "select 1",
        "select 'room(1)'",
        "select 1 -- room('a')",
        "from bathroom('a')",
        "from x.room(1)",
    ],
)
def test_what_is_not_wanted(sql: str) -> None:
    assert wanted_rooms(sql, None) is None
