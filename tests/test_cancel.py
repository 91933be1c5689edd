"""Cancelling in every state of a query, and what a client leaves behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pyarrow as pa
import pytest

from sqlrooms_server.jobs import State
from tests.conftest import LocalServer
from tests.test_queries import ENDLESS
from tests.wire import Arrow, Wire

STREAM = "select i, i * 2 as j, 'some text ' || i as s from range(50000000) t(i)"


def replies_until_idle(wire: Wire, count: int) -> dict[str, dict[str, object]]:
    """The next ``count`` text replies by type; halves of broken results are passed over."""
    replies: dict[str, dict[str, object]] = {}
    while len(replies) < count:
        reply = wire.receive()
        if isinstance(reply, Arrow):
            with pytest.raises((pa.ArrowInvalid, OSError)):
                reply.table()
        else:
            replies[reply["type"]] = reply
    return replies


def assert_cancelled(wire: Wire, query_id: object) -> None:
    wire.send(type="cancel", queryId=query_id)
    replies = replies_until_idle(wire, 2)
    assert replies["cancelAck"] == {"type": "cancelAck", "queryId": query_id, "cancelled": True}
    assert replies["error"]["queryId"] == query_id
    assert replies["error"]["code"] == "cancelled"


@pytest.mark.parametrize("kind", ["arrow", "json", "exec"])
def test_cancel_while_running(wire: Wire, kind: str) -> None:
    wire.send(type=kind, sql=ENDLESS, queryId="long")
    # Queries of one connection start in order, so that the long one runs when this is answered.
    wire.table("select 1")
    assert_cancelled(wire, "long")
    assert wire.table("select 1 as a").to_pydict() == {"a": [1]}


def test_cancel_while_queued_never_runs(launch: Callable[..., LocalServer]) -> None:
    with launch(workers=1).connect() as wire:
        wire.send(type="exec", sql=ENDLESS, queryId="runs")
        wire.send(type="exec", sql="create table never as select 1", queryId="waits")
        assert_cancelled(wire, "waits")
        assert_cancelled(wire, "runs")
        assert "does not exist" in wire.arrow("from never")["error"]


def test_cancel_while_the_client_reads_slowly(wire: Wire) -> None:
    """The query is parked: its outbox is full and the socket takes no more."""
    wire.send(type="arrow", sql=STREAM, queryId="parked")
    with wire_beside(wire) as other:
        other.table("select 1")
    assert_cancelled(wire, "parked")
    assert wire.table("select 1 as a").to_pydict() == {"a": [1]}


def wire_beside(wire: Wire) -> Wire:
    host, port = wire.socket.remote_address[:2]
    return Wire(f"ws://{host}:{port}")


def test_cancel_while_streaming_json(wire: Wire) -> None:
    wire.send(type="json", sql=STREAM, queryId="json")
    wire.send(type="cancel", queryId="json")
    seen: list[str] = []
    while len(seen) < 2:
        message = wire.socket.recv()
        assert isinstance(message, str)
        if not message.startswith('{"type":"json"') or message.endswith(']"}'):
            seen.append(message)
    assert any('"cancelled":true' in text for text in seen)
    assert any('"code":"cancelled"' in text for text in seen)


def test_cancel_after_the_work_is_done_but_not_yet_sent(server: LocalServer, wire: Wire) -> None:
    """A result that fits into the outbox waits for a client that does not read."""
    wire.exec("create table wide as select i, repeat('x', 100) as s from range(60000) t(i)")
    sql = "insert into wide select i + 60000, s from wide returning *"
    wire.send(type="arrow", sql=STREAM, queryId="first")
    wire.send(type="arrow", sql=sql, queryId="second")
    with wire_beside(wire) as other:
        while other.rows("select count(*) as n from wide")[0]["n"] != 120_000:
            pass
    requests = server.server.main.requests
    # The commit is seen a moment before the work is done, or waits for the reader.
    ran = (State.DONE, State.PARKED)
    while not any(
        request.query_id == "second" and request.job and request.job.state in ran
        for client in list(requests._clients.values())
        for request in list(client.requests.values())
    ):
        pass
    wire.send(type="cancel", queryId="second")
    wire.send(type="cancel", queryId="first")
    errors: dict[object, str] = {}
    while len(errors) < 2:
        reply = wire.receive()
        if isinstance(reply, dict) and reply["type"] == "error":
            assert reply["code"] == "cancelled"
            errors[reply["queryId"]] = reply["error"]
    assert "its changes stand" in errors["second"]
    assert "its changes stand" not in errors["first"]


def test_cancel_of_an_unknown_id(wire: Wire) -> None:
    assert wire.request(type="cancel", queryId="nobody") == {
        "type": "cancelAck",
        "queryId": "nobody",
        "cancelled": False,
    }


def test_nobody_cancels_the_query_of_another(server: LocalServer) -> None:
    with server.connect() as owner, server.connect() as other:
        owner.send(type="exec", sql=ENDLESS, queryId="mine")
        assert other.request(type="cancel", queryId="mine")["cancelled"] is False
        other.send(type="exec", sql=ENDLESS, queryId="mine")
        assert_cancelled(other, "mine")
        assert_cancelled(owner, "mine")


def test_a_write_that_finished_says_so(wire: Wire) -> None:
    """Whoever wins the race, the reply tells the truth about the table."""
    for number in range(30):
        wire.exec("create or replace table t(i int)")
        wire.send(type="exec", sql="insert into t select range from range(20000)", queryId=number)
        wire.send(type="cancel", queryId=number)
        replies = replies_until_idle(wire, 2)
        rows = wire.rows("select count(*) as n from t")[0]["n"]
        if "ok" in replies:
            assert rows == 20_000
        else:
            assert rows == 0, replies


def test_two_hundred_cancels_at_random_moments_lose_none(wire: Wire) -> None:
    for number in range(200):
        wire.send(type="exec", sql=ENDLESS, queryId=number)
        for _ in range(number % 7):
            wire.request(type="hello")
        assert_cancelled(wire, number)


def test_cancel_of_common_operators_is_prompt(wire: Wire) -> None:
    """Bounded generously here; ``scripts/bench`` measures it."""
    for sql in (
        ENDLESS,
        "select count(*) from (select range as r, random() as x from range(50000000) order by x)",
        "create table big as select range, random() as x from range(200000000)",
        "select x from (select range % 1000 as x from range(100000000)) group by all",
    ):
        wire.send(type="exec", sql=sql, queryId="op")
        wire.table("select 1")
        began = time.monotonic()
        assert_cancelled(wire, "op")
        assert time.monotonic() - began < 10


def test_a_disconnect_cancels_what_it_left_behind(launch: Callable[..., LocalServer]) -> None:
    server = launch(workers=1)
    with server.connect() as leaver:
        leaver.send(type="exec", sql=ENDLESS, queryId="left")
        leaver.send(type="exec", sql="create table never as select 1", queryId="queued")
        leaver.request(type="hello")
        leaver.socket.socket.close()
    with server.connect() as wire:
        # With one worker this answers only once the abandoned query is gone.
        assert "does not exist" in wire.arrow("from never")["error"]


def test_a_disconnect_in_mid_result_frees_its_worker(launch: Callable[..., LocalServer]) -> None:
    server = launch(workers=1)
    for _ in range(20):
        with server.connect() as leaver:
            for number in range(4):
                leaver.send(type="arrow", sql=STREAM, queryId=number)
            leaver.socket.socket.close()
    with server.connect() as wire:
        assert wire.table("select 1 as a").to_pydict() == {"a": [1]}


def test_a_cancelled_stream_ends_its_transaction(wire: Wire) -> None:
    """Or the database could not be checkpointed before the next garbage collection."""
    gc.disable()
    try:
        wire.exec("create table t as select 1 as i")
        wire.send(type="arrow", sql="from range(300000000)", queryId="stream")
        assert_cancelled(wire, "stream")
        wire.exec("update t set i = 2")
        assert wire.arrow("checkpoint")["type"] == "ok"
    finally:
        gc.enable()
