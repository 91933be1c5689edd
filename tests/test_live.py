"""Queries that answer again when their result has changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from sqlrooms_server.features.live import LiveQueries
from tests.conftest import LocalServer, ServerProcess
from tests.test_chunked_results import jobs_of, wait_until
from tests.test_large_results import abort
from tests.test_queries import ENDLESS
from tests.test_sessions import Session
from tests.wire import Arrow, Wire

IS_2X = int(duckdb.__version__.split(".")[0]) >= 2


class Runs:
    """Counts the runs of the live queries of a server."""

    def __init__(self, server: LocalServer) -> None:
        self.started: list[str] = []
        self.ended = 0
        self.most_at_once = 0
        features = server.server.main._features
        self.live = next(one for one in features if isinstance(one, LiveQueries))
        self._work = self.live._work
        self.live._work = self._counted  # type: ignore[method-assign, assignment]

    def _counted(self, query: Any, result: Any) -> Iterator[Any]:
        self.started.append(query.sql)
        self.most_at_once = max(self.most_at_once, len(self.started) - self.ended)
        try:
            yield from self._work(query, result)
        finally:
            self.ended += 1

    def settle(self) -> None:
        """Return when all queries are as current as their tables."""
        queries = self.live._queries
        wait_until(
            lambda: all(
                one.job is None and self.live._is_current(one) for one in [*queries.values()]
            )
        )


@pytest.fixture
def runs(server: LocalServer) -> Runs:
    return Runs(server)


@pytest.fixture
def both(server: LocalServer) -> Iterator[tuple[Wire, Wire]]:
    """One who changes and one who follows."""
    with server.connect() as writer, server.connect() as follower:
        writer.exec("create table t as select 1::bigint as i; create table u as select 1 as i")
        yield writer, follower


def follow(wire: Wire, sql: str, query_id: Any = "l", **options: Any) -> Arrow:
    wire.send(type="live", sql=sql, queryId=query_id, **options)
    return answer(wire, query_id, 0)


def answer(wire: Wire, query_id: Any = "l", seq: int | None = None) -> Arrow:
    frame = wire.receive()
    assert isinstance(frame, Arrow), frame
    assert frame.header["type"] == "arrow"
    assert frame.header["queryId"] == query_id
    assert seq is None or frame.header["seq"] == seq
    return frame


def value(frame: Arrow) -> Any:
    return frame.table().column(0)[0].as_py()


def fails(wire: Wire, code: str, query_id: Any = "l") -> str:
    frame = wire.receive()
    assert isinstance(frame, dict), frame.header
    assert (frame["type"], frame["queryId"], frame["code"]) == ("error", query_id, code), frame
    return str(frame["error"])


def test_it_answers_at_once_and_after_each_change(both: tuple[Wire, Wire]) -> None:
    writer, follower = both
    sql = "select sum(i)::bigint as n from t"
    first = follow(follower, sql)
    assert set(first.header) == {"type", "queryId", "seq"}
    assert first.body == writer.arrow(sql).body
    for seq in range(1, 20):
        writer.exec("insert into t values (1)")
        assert value(answer(follower, seq=seq)) == seq + 1
    writer.exec("truncate t")
    assert value(answer(follower, seq=20)) is None


def test_not_when_the_result_is_the_same(both: tuple[Wire, Wire], runs: Runs) -> None:
    writer, follower = both
    assert value(follow(follower, "select max(i) as n from t")) == 1
    writer.exec("insert into u values (5)")
    runs.settle()
    assert len(runs.started) == 1
    for sql in (
        "insert into t values (0)",
        "update t set i = i",
        "create table other(i int)",
        "call pragma_version()",
    ):
        before = len(runs.started)
        writer.arrow(sql)
        runs.settle()
        assert len(runs.started) > before
    writer.exec("insert into t values (7)")
    assert value(answer(follower, seq=1)) == 7


@pytest.mark.parametrize(
    "sql",
    [
        "select sum(i)::bigint from v",
        "with x as (from t) select sum(i)::bigint from x",
        "select total()",
        "select sum(i)::bigint from rows_of()",
        "select sum(t.i)::bigint from t join u on u.i = 1",
        "select (select sum(i) from t)::bigint from u",
        "from query('select sum(i)::bigint from t')",
        "select sum(i)::bigint from query_table('t')",
        "select sum(i)::bigint from range(1), memory.main.t",
        "select sum(i)::bigint from t where i > $1 and $1 < 1",
    ],
)
def test_what_counts_as_the_tables_behind_it(both: tuple[Wire, Wire], sql: str) -> None:
    writer, follower = both
    writer.exec("create view w as from t; create view v as from w")
    writer.exec("create macro total() as (select sum(i)::bigint from t)")
    writer.exec("create macro rows_of() as table from v")
    options = {"params": [0]} if "$" in sql else {}
    assert value(follow(follower, sql, **options)) == 1
    writer.exec("insert into t values (2)")
    assert value(answer(follower, seq=1)) == 3
    if "v" in sql.split():
        writer.exec("create or replace view v as select 40 as i")
        assert value(answer(follower, seq=2)) == 40


def test_every_kind_of_change(both: tuple[Wire, Wire], tmp_path: Path) -> None:
    writer, follower = both
    (tmp_path / "rows.csv").write_text("10\n")
    assert value(follow(follower, "select sum(i)::bigint from t")) == 1
    session = Session(writer)
    session.run("begin", "insert into t values (100)", "rollback", "begin")
    session.run("insert into t values (1)", "commit")
    assert value(answer(follower)) == 2
    writer.exec(f"copy t from '{tmp_path / 'rows.csv'}'")
    assert value(answer(follower)) == 12
    table = pa.table({"i": pa.array([5], pa.int64())})
    assert writer.upload(table, tableName="t", mode="append")["type"] == "uploadAck"
    assert value(answer(follower)) == 17
    assert writer.upload(table, tableName="t")["type"] == "uploadAck"
    assert value(answer(follower)) == 5
    writer.exec("alter table t rename to s; create table t as select 6::bigint as i")
    assert value(answer(follower)) == 6
    writer.exec("prepare p as insert into t values (1); execute p")
    assert value(answer(follower)) == 7
    writer.exec("attach ':memory:' as o; create table o.t as select 1 as i")
    assert value(follow(follower, "select sum(i)::bigint from o.t", "other")) == 1
    writer.exec("insert into o.t values (1)")
    assert value(answer(follower, "other")) == 2


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("from read_csv('{rows}')", "CSV"),
        ("from '{rows}'", ""),
        ("from read_text('{rows}')", ""),
        ("from glob('*')", "glob"),
        ("from duckdb_tables()", "duckdb_tables"),
        ("from information_schema.tables", ""),
        ("select nextval('q')", "nextval"),
        ("select setseed(0.5)", "setseed"),
        ("insert into t values (1)", "one SELECT"),
        ("insert into t values (1) returning i", "one SELECT"),
        ("create table n as select 1", "one SELECT"),
        ("select 1; select 2", "one SELECT"),
        ("set threads = 2", "one SELECT"),
        ("begin", "one SELECT"),
        ("explain select 1", "one SELECT"),
        ("", "one SELECT"),
        ("-- nothing", "one SELECT"),
    ],
)
def test_refusals(both: tuple[Wire, Wire], tmp_path: Path, sql: str, reason: str) -> None:
    writer, follower = both
    (tmp_path / "rows.csv").write_text("i\n10\n")
    writer.exec("create sequence q")
    text = sql.replace("{rows}", str(tmp_path / "rows.csv"))
    follower.send(type="live", sql=text, queryId="l")
    assert reason in fails(follower, "bad_request")
    assert writer.rows("select count(*) as n from t") == [{"n": 1}]
    # The id is free again.
    assert value(follow(follower, "select 1")) == 1


def test_what_would_not_run_is_refused_with_its_own_error(wire: Wire) -> None:
    wire.send(type="live", sql="select x from nowhere", queryId="l")
    assert "Table with name nowhere does not exist" in fails(wire, "query_error")


@pytest.mark.skipif(not IS_2X, reason="DuckDB 1.5 has no WITH that writes")
def test_a_with_that_writes_is_refused(both: tuple[Wire, Wire]) -> None:
    writer, follower = both
    sql = "with x as (insert into t values (2) returning i) from x"
    follower.send(type="live", sql=sql, queryId="l")
    assert "changes data" in fails(follower, "bad_request")
    assert writer.rows("select count(*) as n from t") == [{"n": 1}]


@pytest.mark.parametrize(
    "fields",
    [
        {"sql": 1},
        {"queryId": ""},
        {"queryId": {}},
        {"stream": True},
        {"session": "s"},
        {"format": "json"},
        {"progress": True},
        {"persist": True},
        {"maxRows": -1},
        {"timeoutMs": "x"},
        {"compression": "gzip"},
        {"params": 1},
        {"params": [1]},
    ],
)
def test_bad_messages(wire: Wire, fields: dict[str, Any]) -> None:
    reply = wire.request(**{"type": "live", "sql": "select 1", "queryId": "l", **fields})
    assert (reply["type"], reply["code"]) == ("error", "bad_request")
    assert value(follow(wire, "select 1")) == 1
    wire.send(type="live", sql="select 2", queryId="l")
    fails(wire, "conflict")


def test_options(both: tuple[Wire, Wire]) -> None:
    writer, follower = both
    first = follow(follower, "from t order by i", "few", maxRows=2)
    assert not first.header.get("truncated")
    writer.exec("insert into t values (2), (3)")
    second = answer(follower, "few", 1)
    assert second.header["truncated"] is True
    assert second.header["truncatedBy"] == "maxRows"
    assert second.table().to_pydict() == {"i": [1, 2]}
    follower.send(type="cancel", queryId="few")
    assert {follower.receive()["type"], follower.receive()["type"]} == {"cancelAck", "error"}
    sql = "select i, repeat('x', 10000) as s from t order by i"
    plain = follow(follower, sql, "plain")
    for codec in ("lz4", "zstd"):
        small = follow(follower, sql, codec, compression=codec)
        assert len(small.body) < len(plain.body) / 10
        assert small.table() == plain.table()
    named = follow(follower, "select $a::int + sum(i)::int from t", "named", params={"a": 10})
    assert value(named) == 16


def test_limits_of_the_server(launch: Callable[..., LocalServer]) -> None:
    server = launch(max_result_rows=2, query_timeout=0.3)
    with server.connect() as wire:
        wire.send(type="live", sql="from range(3)", queryId="l")
        fails(wire, "too_large")
        assert follow(wire, "from range(3)", maxRows=2).header["truncated"] is True
        wire.send(type="live", sql=ENDLESS, queryId="long")
        assert "--query-timeout" in fails(wire, "timeout", "long")
        # Between its runs it has all the time.
        wire.exec("create table t as select 1 as i")
        follow(wire, "from t", "t")
        wire.send(type="exec", sql="update t set i = 2", queryId="e")
        frames = [wire.receive(), wire.receive()]
        assert any(isinstance(frame, Arrow) and frame.header["seq"] == 1 for frame in frames)


def test_a_timeout_of_its_own(wire: Wire) -> None:
    wire.send(type="live", sql=ENDLESS, queryId="l", timeoutMs=100)
    assert "timeoutMs" in fails(wire, "timeout")


def test_a_result_that_is_too_large(wire: Wire) -> None:
    wire.send(type="live", sql="select repeat('x', 4000000) from range(17)", queryId="l")
    assert "LIMIT" in fails(wire, "too_large")


def test_one_run_for_all_who_follow(server: LocalServer, both: Any, runs: Runs) -> None:
    writer, follower = both
    sql = "select sum(i)::bigint as n from t"
    with server.connect() as second, server.connect() as third:
        wires = [(follower, 1), (follower, 2), (second, 1), (third, "x")]
        for wire, query_id in wires:
            assert value(follow(wire, sql, query_id)) == 1
        assert len(runs.started) == 1
        # One of another text, and one with other options.
        follow(third, sql + " ", "text")
        follow(third, sql, "rows", maxRows=5)
        assert len(runs.started) == 3
        writer.exec("insert into t values (1)")
        runs.settle()
        assert len(runs.started) == 6
        for wire in (follower, second, third):
            expected = (
                {1, 2} if wire is follower else {1} if wire is second else {"x", "text", "rows"}
            )
            frames = [wire.receive() for _ in expected]
            assert {frame.header["queryId"] for frame in frames} == expected
            assert {(value(frame), frame.header["seq"]) for frame in frames} == {(2, 1)}
        # One who comes late gets what there is.
        with server.connect() as late:
            assert value(follow(late, sql)) == 2
            assert len(runs.started) == 6
        second.send(type="cancel", queryId=1)
        assert {second.receive()["type"], second.receive()["type"]} == {"cancelAck", "error"}
        writer.exec("insert into t values (1)")
        assert value(follower.receive()) == 3
        assert value(follower.receive()) == 3
        assert second.rows("select 1 as a") == [{"a": 1}]


def test_those_who_come_while_it_runs(server: LocalServer, runs: Runs) -> None:
    sql = "select count(*)::bigint as n from range(30000000) where range % 7 = 3"
    with server.connect() as first, server.connect() as second:
        first.send(type="live", sql=sql, queryId="l")
        wait_until(lambda: bool(runs.started))
        second.send(type="live", sql=sql, queryId="l")
        assert answer(first).body == answer(second).body
        assert len(runs.started) == 1


def test_a_burst(server: LocalServer, both: Any, runs: Runs) -> None:
    """Writers at random; what is delivered last is what there is."""
    _, follower = both
    queries = {
        "t": "select count(*)::bigint, sum(i)::bigint from t",
        "both": "select count(*)::bigint, sum(t.i)::bigint from t join u on u.i = 1",
        "large": "select i, repeat('x', 2000) as s from t order by i",
    }
    for query_id, sql in queries.items():
        follow(follower, sql, query_id)

    def write(seed: int) -> None:
        chance = random.Random(seed)
        with server.connect() as wire:
            session = Session(wire)
            for number in range(100):
                sql = f"insert into t values ({seed * 1000 + number})"
                if chance.random() < 0.2:
                    session.run("begin", sql, chance.choice(("commit", "rollback")))
                elif chance.random() < 0.1:
                    wire.arrow("update u set i = 1")
                else:
                    wire.exec(sql)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    runs.settle()
    with server.connect() as other:
        expected = {query_id: other.table(sql) for query_id, sql in queries.items()}
    last: dict[str, pa.Table] = {}
    seqs = dict.fromkeys(queries, 0)
    while last != expected:
        frame = follower.receive()
        query_id = frame.header["queryId"]
        seqs[query_id] += 1
        assert frame.header["seq"] == seqs[query_id]
        last[query_id] = frame.table()
    assert runs.most_at_once <= len(queries)
    for sql in queries.values():
        assert runs.started.count(sql) <= 401
    # Nothing comes after it.
    follower.send(type="hello")
    assert follower.receive()["type"] == "welcome"


def test_one_run_at_a_time(server: LocalServer, both: Any, runs: Runs) -> None:
    writer, follower = both
    sql = "select sum(i)::bigint, (select count(*) from range(3000000) where range % 7 = 1) from t"
    follow(follower, sql)
    for number in range(100):
        writer.exec(f"update t set i = {number}")
    while value(answer(follower)) != 99:
        pass
    runs.settle()
    assert runs.most_at_once == 1
    assert len(runs.started) < 100


def test_a_client_that_reads_slowly_skips_to_the_latest(server: LocalServer, runs: Runs) -> None:
    size, updates = 8 << 20, 12
    with server.connect() as writer, server.connect(max_queue=1) as slow, server.connect() as fast:
        writer.exec("create table t as select 0 as i")
        sql = f"select i, repeat('x', {size}) as s from t"
        slow.send(type="live", sql=sql, queryId="l")
        follow(fast, sql)
        for number in range(1, updates):
            writer.exec(f"update t set i = {number}")
            while value(answer(fast)) != number:
                pass
            # The latest, and no more, waits for the slow one.
            assert runs.live._waiting_bytes < 2 * size
        seqs, found = 0, -1
        while found != updates - 1:
            frame = answer(slow, seq=seqs)
            assert value(frame) > found
            found = value(frame)
            seqs += 1
        assert seqs < updates
        wait_until(lambda: runs.live._waiting_bytes == 0)
        # Who comes late gets one all the same.
        with server.connect() as late:
            assert value(follow(late, sql)) == updates - 1


def test_cancel(both: tuple[Wire, Wire], runs: Runs) -> None:
    writer, follower = both
    follow(follower, "from t")
    follower.send(type="cancel", queryId="l")
    frames = {frame["type"]: frame for frame in (follower.receive(), follower.receive())}
    assert frames["cancelAck"]["cancelled"] is True
    assert frames["error"]["code"] == "cancelled"
    writer.exec("insert into t values (2)")
    assert follower.rows("select 1 as a") == [{"a": 1}]
    assert not runs.live._queries and not runs.live._counts
    follower.send(type="cancel", queryId="l")
    assert follower.receive()["cancelled"] is False


def test_cancel_of_a_running_one(server: LocalServer, wire: Wire, runs: Runs) -> None:
    wire.send(type="live", sql=ENDLESS, queryId="l")
    wait_until(lambda: bool(runs.started))
    wire.send(type="cancel", queryId="l")
    assert {wire.receive()["type"], wire.receive()["type"]} == {"cancelAck", "error"}
    wait_until(lambda: runs.ended == 1 and not jobs_of(server))


@pytest.mark.parametrize("leave", [abort, lambda wire: wire.__exit__()])
def test_a_disconnect(server: LocalServer, runs: Runs, leave: Callable[[Wire], None]) -> None:
    wire, other = server.connect(), server.connect()
    wire.send(type="live", sql=ENDLESS, queryId="l")
    wait_until(lambda: bool(runs.started))
    other.send(type="live", sql=ENDLESS, queryId="l")
    other.send(type="hello")
    assert other.receive()["type"] == "welcome"
    leave(wire)
    # The other still waits for it.
    wait_until(lambda: len(runs.live._counts) == 1)
    assert runs.ended == 0
    leave(other)
    wait_until(lambda: runs.ended == 1 and not jobs_of(server))
    assert not runs.live._queries and not runs.live._counts


def test_a_table_that_is_dropped(both: tuple[Wire, Wire]) -> None:
    writer, follower = both
    follow(follower, "from t")
    follow(follower, "from u", "u")
    writer.exec("drop table t")
    frame = follower.receive()
    assert (frame["type"], frame["queryId"]) == ("error", "l")
    assert "does not exist" in frame["error"]
    writer.exec("create table t as select 2 as i")
    assert value(follow(follower, "from t")) == 2
    # Columns may change, too.
    writer.exec("alter table u add column j int")
    assert answer(follower, "u", 1).table().column_names == ["i", "j"]


def test_an_error_of_a_later_run(both: tuple[Wire, Wire]) -> None:
    writer, follower = both
    follow(follower, "select case when min(i) < 0 then error('bad') else 'good' end from t")
    writer.exec("insert into t values (-1)")
    assert "bad" in fails(follower, "query_error")


def test_limits(launch: Callable[..., LocalServer]) -> None:
    server = launch(max_live_per_connection=2, max_live=3)
    with server.connect() as one, server.connect() as other:
        follow(one, "select 1", 1)
        follow(one, "select 1", 2)
        one.send(type="live", sql="select 1", queryId=3)
        assert "--max-live-per-connection" in fails(one, "busy", 3)
        follow(other, "select 1", 1)
        other.send(type="live", sql="select 1", queryId=2)
        assert "(--max-live)" in fails(other, "busy", 2)
        one.send(type="cancel", queryId=1)
        assert {one.receive()["type"], one.receive()["type"]} == {"cancelAck", "error"}
        follow(other, "select 1", 2)


def test_shutdown(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with server.connect() as wire, server.connect() as busy:
        follow(wire, "select 1")
        busy.send(type="live", sql=ENDLESS, queryId="l")
        busy.send(type="hello")
        assert busy.receive()["type"] == "welcome"
        assert server.stop() == 0
        for one in (wire, busy):
            frame = one.receive()
            assert frame["type"] == "error" and frame["queryId"] == "l"
        assert frame["code"] in ("shutting_down", "cancelled")
