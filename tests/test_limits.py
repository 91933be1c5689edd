"""Deadlines, limits of rows, and limits of DuckDB itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.errors import StartupError
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.streams import Streams, stream
from tests.test_chunked_results import BIG, ENDLESS_ROWS, wait_until
from tests.test_queries import ENDLESS
from tests.wire import Arrow, Wire


def assert_timeout(reply: Any, limit: str, query_id: Any = "q") -> None:
    assert reply["type"] == "error", reply
    assert (reply["queryId"], reply["code"]) == (query_id, "timeout")
    assert limit in reply["error"]


@pytest.mark.parametrize("kind", ["arrow", "json", "exec"])
@pytest.mark.parametrize("options", [{}, {"session": "s"}])
def test_a_query_that_runs_too_long(wire: Wire, kind: str, options: Any) -> None:
    reply = wire.request(type=kind, sql=ENDLESS, queryId="q", timeoutMs=50, **options)
    assert_timeout(reply, "0.05 s (timeoutMs)")
    assert wire.request(type="exec", sql="select 1", queryId=1, **options)["type"] == "ok"


def test_a_query_that_waits_too_long(launch: Callable[..., LocalServer]) -> None:
    with launch(workers=1).connect() as wire:
        wire.send(type="exec", sql=ENDLESS, queryId="long")
        sql = "create table never as select 1"
        assert_timeout(wire.request(type="exec", sql=sql, queryId="q", timeoutMs=50), "timeoutMs")
        wire.send(type="cancel", queryId="long")
        assert {wire.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
        assert "does not exist" in wire.arrow("from never")["error"]


def test_a_result_that_its_client_does_not_read_in_time(wire: Wire) -> None:
    """The time runs on while the job is parked."""
    streams = Streams(wire)
    chunked = streams.ask(ENDLESS_ROWS, "chunks", window=1000, timeoutMs=200)
    streams.finish()
    assert_timeout(chunked.error, "timeoutMs", "chunks")
    wire.send(type="arrow", sql=ENDLESS_ROWS, queryId="q", timeoutMs=200)
    broken = wire.receive()
    with pytest.raises((pa.ArrowInvalid, OSError)):
        broken.table()
    assert_timeout(wire.receive(), "timeoutMs")
    wire.send(type="json", sql=ENDLESS_ROWS, queryId="q", timeoutMs=200)
    text = wire.socket.recv()
    assert isinstance(text, str)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    assert_timeout(wire.receive(), "timeoutMs")


def test_the_server_has_a_limit_too(launch: Callable[..., LocalServer]) -> None:
    with launch(query_timeout=1, threads=1).connect() as wire:
        asked: tuple[dict[str, Any], ...] = (
            {},
            {"timeoutMs": 60_000},
            {"timeoutMs": None},
            {"session": "s"},
        )
        for number, options in enumerate(asked):
            wire.send(type="exec", sql=ENDLESS, queryId=number, **options)
        replies = sorted((wire.receive() for _ in asked), key=lambda reply: str(reply["queryId"]))
        for number, reply in enumerate(replies):
            assert_timeout(reply, "1 s (--query-timeout)", number)
        reply = wire.request(type="exec", sql=ENDLESS, queryId="q", timeoutMs=100)
        assert_timeout(reply, "0.1 s (timeoutMs)")


def test_a_change_that_stood_says_so(launch: Callable[..., LocalServer]) -> None:
    """Its rows are parked when the time is over."""
    with launch().connect() as wire:
        wire.exec("create table t(i int, s varchar)")
        sql = "insert into t select i, repeat('x', 100) from range(60000) t(i) returning *"
        streams = Streams(wire)
        asked = streams.ask(sql, window=1000, timeoutMs=2000)
        while len(asked.body) < 1000 and not asked.ended:
            streams.receive()
        streams.finish()
        assert_timeout(asked.error, "timeoutMs", "s")
        assert asked.error is not None
        assert "its changes stand" in asked.error["error"]
        assert wire.rows("select count(*) as n from t") == [{"n": 60_000}]


def test_a_time_that_is_enough(wire: Wire) -> None:
    for number in range(50):
        reply = wire.request(type="arrow", sql=f"select {number} as a", timeoutMs=30_000)
        assert reply.table().to_pydict() == {"a": [number]}
    assert wire.request(type="exec", sql="select 1", queryId=1, timeoutMs=5000.0)["type"] == "ok"


def test_deadlines_are_forgotten_with_their_queries(server: LocalServer) -> None:
    with server.connect() as wire:
        for number in range(2000):
            wire.send(type="exec", sql="select 1", queryId=number, timeoutMs=600_000)
            assert wire.receive()["type"] == "ok"
        assert len(server.server._timers._heap) < 1000


CUTS = [(0, True), (1, True), (99, True), (100, False), (101, False), (10**15, False)]


@pytest.mark.parametrize(("most", "truncated"), CUTS)
def test_max_rows(wire: Wire, most: int, truncated: bool) -> None:
    sql = "select range as a from range(100)"
    expected = list(range(min(most, 100)))
    fields = {"truncated": True, "truncatedBy": "maxRows"} if truncated else {}
    arrow = wire.request(type="arrow", sql=sql, queryId=1, maxRows=most)
    assert arrow.table()["a"].to_pylist() == expected
    assert arrow.header == {"type": "arrow", "queryId": 1, **fields}
    reply = wire.request(type="json", sql=sql, queryId=1, maxRows=most)
    data = reply.pop("data")
    assert [row["a"] for row in json.loads(data)] == expected
    assert reply == {"type": "json", "queryId": 1, **fields}
    chunked = stream(wire, sql, maxRows=most)
    assert chunked.table()["a"].to_pylist() == expected
    assert chunked.summary is not None
    assert {k: v for k, v in chunked.summary.items() if k.startswith("trunc")} == fields
    assert chunked.summary["rows"] == len(expected)


def test_max_rows_at_the_end_of_a_batch(wire: Wire) -> None:
    sql = "select range as a from range(200000)"
    for most in (65535, 65536, 65537, 122880, 131072, 199_999, 200_000):
        reply = wire.request(type="arrow", sql=sql, queryId=1, maxRows=most)
        assert reply.table()["a"].to_pylist() == list(range(most))
        assert ("truncated" in reply.header) == (most < 200_000)


def test_max_rows_of_an_endless_result(wire: Wire) -> None:
    """Only what is sent is made."""
    reply = wire.request(type="arrow", sql=ENDLESS_ROWS, queryId=1, maxRows=1000)
    assert reply.table().num_rows == 1000
    reply = wire.request(type="json", sql=ENDLESS_ROWS, queryId=1, maxRows=1000)
    assert reply["truncated"] is True
    assert stream(wire, ENDLESS_ROWS, maxRows=1000).table().num_rows == 1000


def test_max_rows_of_changes(wire: Wire) -> None:
    """They are made whole; only what is told of them is cut."""
    wire.exec("create table t(i int)")
    sql = "insert into t select range from range(10) returning i"
    reply = wire.request(type="arrow", sql=sql, queryId=1, maxRows=3)
    assert reply.table().num_rows == 3
    assert reply.header["truncated"] is True
    for kind in ("arrow", "json"):
        reply = wire.request(type=kind, sql="insert into t values (1)", queryId=1, maxRows=1)
        assert isinstance(reply, Arrow) or json.loads(reply["data"]) == [{"Count": 1}]
    reply = wire.request(type="json", sql="insert into t values (1)", queryId=1, maxRows=0)
    assert (reply["type"], reply["data"], reply["truncated"]) == ("json", "[]", True)
    assert wire.request(type="arrow", sql="drop table t", queryId=1, maxRows=0)["type"] == "ok"


def test_a_large_result_with_max_rows_comes_whole(wire: Wire) -> None:
    """Over what is kept in memory until its header is known."""
    whole = wire.arrow(BIG)
    reply = wire.request(type="arrow", sql=BIG, queryId=1, maxRows=10**9)
    assert len(reply.body) > 12 << 20
    assert reply.body == whole.body
    cut = wire.request(type="arrow", sql=BIG, queryId=1, maxRows=700_001)
    assert cut.header["truncated"] is True
    assert cut.table().equals(whole.table().slice(0, 700_001))
    cut = wire.request(type="arrow", sql=BIG, queryId=1, maxRows=700_001, compression="zstd")
    assert cut.table().equals(whole.table().slice(0, 700_001))


def test_cancel_of_a_large_result_with_max_rows(server: LocalServer) -> None:
    """While it is kept, and while it is sent."""
    with server.connect() as wire:
        wire.send(type="arrow", sql=ENDLESS_ROWS, queryId="kept", maxRows=10**12)
        wire.request(type="hello")
        wire.send(type="cancel", queryId="kept")
        replies = {reply["type"]: reply for reply in (wire.receive(), wire.receive())}
        assert replies["cancelAck"]["cancelled"] is True
        assert replies["error"]["code"] == "cancelled"
        wire.send(type="arrow", sql=BIG, queryId="sent", maxRows=10**12)
        requests = server.server.main.requests
        wait_until(
            lambda: any(
                request._outbox is not None
                for client in list(requests._clients.values())
                for request in list(client.requests.values())
            )
        )
        wire.send(type="cancel", queryId="sent")
        seen: dict[str, Any] = {}
        while "cancelAck" not in seen or (seen["cancelAck"]["cancelled"] and "error" not in seen):
            reply = wire.receive()
            if isinstance(reply, Arrow):
                if len(reply.body) < 12 << 20:
                    with pytest.raises((pa.ArrowInvalid, OSError)):
                        reply.table()
            else:
                seen[reply["type"]] = reply
        assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize("kind", ["arrow", "json", "stream"])
def test_max_result_rows(launch: Callable[..., LocalServer], kind: str) -> None:
    with launch(max_result_rows=10).connect() as wire:

        def ask(rows: int, **options: Any) -> tuple[int | None, Any]:
            """How many rows came, and the header or the error."""
            sql = f"select range as a from range({rows})"
            if kind == "stream":
                chunked = stream(wire, sql, **options)
                if chunked.error:
                    return None, chunked.error
                return chunked.table().num_rows, chunked.summary
            reply = wire.request(type=kind, sql=sql, queryId=1, **options)
            if isinstance(reply, Arrow):
                return reply.table().num_rows, reply.header
            if reply["type"] == "json":
                return len(json.loads(reply["data"])), reply
            return None, reply

        for rows in (0, 1, 10):
            assert ask(rows)[0] == rows
            assert "truncated" not in ask(rows)[1]
        for rows in (11, 1_000_000, 10**10):
            number, error = ask(rows)
            assert number is None
            assert error["code"] == "too_large"
            assert "more than 10 rows (--max-result-rows)" in error["error"]
        for most, limit in ((5, "maxRows"), (10, "maxRows"), (11, "--max-result-rows")):
            number, header = ask(1000, maxRows=most)
            assert number == min(most, 10)
            assert (header["truncated"], header["truncatedBy"]) == (True, limit)
        assert wire.request(type="exec", sql="from range(1000)", queryId=1)["type"] == "ok"


def test_limits_of_duckdb(launch: Callable[..., LocalServer], tmp_path: Path) -> None:
    directory = tmp_path / "spill"
    limits = {"memory_limit": "64MB", "threads": 3, "temp_directory": str(directory)}
    with launch(**limits).connect() as wire:
        names = ("memory_limit", "threads", "temp_directory")
        columns = ", ".join(f"current_setting('{name}') as {name}" for name in names)
        row = wire.rows(f"select {columns}")[0]
        assert row["memory_limit"] == "61.0 MiB"
        assert row["threads"] == 3
        assert row["temp_directory"] == str(directory)
        # More than fits, unless it is put there.
        sql = "select count(*) as n from (select distinct hash(i) from range(8000000) t(i))"
        assert wire.rows(sql) == [{"n": 8_000_000}]


def test_too_little_memory_names_the_flag(launch: Callable[..., LocalServer]) -> None:
    with launch(memory_limit="32MB").connect() as wire:
        wire.exec("set global max_temp_directory_size = '1MB'")
        sql = "select list(i || 'some longer text that takes room') as l from range(5000000) t(i)"
        for kind in ("arrow", "json", "exec"):
            reply = wire.request(type=kind, sql=sql, queryId=1)
            assert (reply["type"], reply["code"]) == ("error", "query_error"), reply
            assert "Out of Memory" in reply["error"]
            assert "--memory-limit" in reply["error"]
        assert stream(wire, sql).code == "query_error"
        assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"memory_limit": "much"}, "--memory-limit 'much' was refused"),
        ({"memory_limit": "'; drop table t"}, "--memory-limit"),
        ({"memory_limit": "4 parsecs"}, "--memory-limit"),
        ({"threads": -1}, "--threads must be from 0 to 1024"),
        ({"query_timeout": -1}, "--query-timeout must be"),
        ({"max_result_rows": -1}, "--max-result-rows must be"),
        ({"stream_idle_timeout": 0}, "--stream-idle-timeout must be"),
        ({"session_idle_timeout": 0}, "--session-idle-timeout must be"),
        ({"max_sessions": 0}, "--max-sessions must be"),
        ({"max_sessions_per_connection": 0}, "--max-sessions-per-connection must be"),
    ],
)
def test_limits_that_are_none(settings: Any, flag: str) -> None:
    with pytest.raises(StartupError) as refused:
        Server(Settings(port=0, **settings)).start()
    assert flag in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
