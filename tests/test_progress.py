"""Progress: told only to those who asked, seldom, and never after the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import LocalServer
from tests.streams import Streams
from tests.test_chunked_results import ENDLESS_ROWS
from tests.test_queries import ENDLESS
from tests.wire import Arrow, Wire

FIELDS = {"type", "queryId", "state", "percent", "position", "queuedMs", "runningMs"}


def assert_progress(message: Any, query_id: Any, state: str) -> None:
    assert set(message) == FIELDS
    assert (message["type"], message["queryId"], message["state"]) == ("progress", query_id, state)
    if state == "queued":
        assert message["percent"] is None
        assert message["position"] >= 0
        assert message["runningMs"] == 0
    else:
        assert message["percent"] is None or 0 <= message["percent"] <= 100
        assert message["position"] is None


def cancelled(wire: Wire, query_id: Any) -> list[Any]:
    """Cancel and return the progress that still came before the answer."""
    wire.send(type="cancel", queryId=query_id)
    found = []
    seen: set[str] = set()
    while not {"cancelAck", "error"} <= seen:
        reply = wire.receive()
        if isinstance(reply, Arrow):
            continue
        seen.add(reply["type"])
        if reply["type"] == "progress":
            found.append(reply)
            assert "error" not in seen
    return found


@pytest.mark.parametrize("options", [{}, {"session": "s"}, {"stream": True}])
def test_a_query_that_runs(wire: Wire, options: Any) -> None:
    kind = "arrow" if "stream" in options else "exec"
    wire.send(type=kind, sql=ENDLESS, queryId="long", progress=True, **options)
    began = time.monotonic()
    messages = [wire.receive() for _ in range(4)]
    assert time.monotonic() - began > 0.75
    for message in messages:
        assert_progress(message, "long", "running")
    times = [message["runningMs"] for message in messages]
    assert times == sorted(times)
    assert 150 <= times[0]
    cancelled(wire, "long")
    wire.request(type="hello")


def test_percent_grows(wire: Wire) -> None:
    """A scan of a table is what DuckDB knows best."""
    wire.exec("create table t as select range as i from range(1500000)")
    sql = "select count(*) from t where sha256(i::varchar) like 'x%' or md5(i::varchar) like 'x%'"
    wire.exec("set global threads = 1")
    sql = " union all ".join([sql] * 2)
    wire.send(type="json", sql=sql, queryId=1, progress=True)
    found = []
    while (reply := wire.receive())["type"] == "progress":
        assert_progress(reply, 1, "running")
        found.append(reply["percent"])
    assert reply["type"] == "json"
    told = [percent for percent in found if percent is not None]
    assert told == sorted(told)
    assert told and told[-1] > 0


@pytest.mark.parametrize("progress", [None, False])
def test_nobody_else_is_told(server: LocalServer, progress: bool | None) -> None:
    with server.connect() as wire, server.connect() as other:
        wire.send(type="exec", sql=ENDLESS, queryId="told", progress=True)
        wire.send(type="exec", sql=ENDLESS, queryId="quiet", progress=progress)
        other.send(type="exec", sql=ENDLESS, queryId="other")
        assert {wire.receive()["queryId"] for _ in range(3)} == {"told"}
        other.send(type="cancel", queryId="other")
        assert {other.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}


def test_a_query_that_waits(launch: Callable[..., LocalServer]) -> None:
    with launch(workers=1).connect() as wire:
        wire.send(type="exec", sql=ENDLESS, queryId="runs")
        for number in range(3):
            wire.send(type="exec", sql="select 1", queryId=number, progress=True)
        found: dict[Any, Any] = {}
        while len(found) < 3:
            message = wire.receive()
            assert_progress(message, message["queryId"], "queued")
            assert message["queuedMs"] >= 150
            found[message["queryId"]] = message["position"]
        assert found == {0: 0, 1: 1, 2: 2}
        wire.send(type="cancel", queryId="runs")
        answered: list[Any] = []
        while len(answered) < 4:
            reply = wire.receive()
            if reply["type"] in ("ok", "error"):
                answered.append(reply["queryId"])
            elif reply["type"] == "progress":
                assert reply["queryId"] not in answered
        assert sorted(map(str, answered)) == ["0", "1", "2", "runs"]


def test_position_in_a_session(wire: Wire) -> None:
    wire.send(type="exec", sql=ENDLESS, queryId="runs", session="s")
    for number in range(2):
        wire.send(type="exec", sql="select 1", queryId=number, session="s", progress=True)
    found: dict[Any, Any] = {}
    while len(found) < 2:
        message = wire.receive()
        assert_progress(message, message["queryId"], "queued")
        found[message["queryId"]] = message["position"]
    assert found == {0: 0, 1: 1}


def test_none_after_the_answer(wire: Wire) -> None:
    """For short queries none at all; for others none behind their end."""
    answered = 0
    for number in range(100):
        wire.send(type="exec", sql="select 1", queryId=number, progress=True)
    while answered < 100:
        reply = wire.receive()
        if reply["type"] == "progress":
            # On a busy machine it was not short.
            assert reply["queuedMs"] + reply["runningMs"] >= 150
        else:
            assert reply["type"] == "ok"
            answered += 1
    ended: set[Any] = set()
    for number in range(8):
        rows = 3_000_000 * (number + 1)
        sql = f"select sum(hash(i)) from range({rows}) t(i)"
        wire.send(type="exec", sql=sql, queryId=number, progress=True)
    while len(ended) < 8:
        reply = wire.receive()
        assert reply["queryId"] not in ended
        if reply["type"] == "ok":
            ended.add(reply["queryId"])
    wire.request(type="hello")


def test_a_large_message_is_not_followed_by_progress(wire: Wire) -> None:
    sql = "select i, i * 2 as j from range(5000000) t(i)"
    wire.send(type="arrow", sql=sql, queryId=1, progress=True)
    while not isinstance(reply := wire.receive(), Arrow):
        assert_progress(reply, 1, "running")
    assert reply.table().num_rows == 5_000_000
    wire.send(type="hello")
    assert wire.receive()["type"] == "welcome"


def test_a_stream_that_stalls_is_told_about(wire: Wire) -> None:
    streams = Streams(wire)
    asked = streams.ask(ENDLESS_ROWS, 1, window=1000, progress=True)
    message = streams.until("progress")
    assert_progress(message, 1, "running")
    streams.ack(asked)
    wire.send(type="cancel", queryId=1)
    streams.finish()
    assert asked.code == "cancelled"
    streams.settle()
    streams.settle()
    assert all(other["type"] in ("progress", "cancelAck") for other in streams.others)


def test_at_most_five_a_second(wire: Wire) -> None:
    wire.send(type="exec", sql=ENDLESS, queryId=1, progress=True)
    wire.receive()
    began = time.monotonic()
    for _ in range(5):
        wire.receive()
    # The first of them may be late.
    assert time.monotonic() - began > 0.7
