"""``persist``: what is remembered, what never is, and runs that several requests share."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pytest

from sqlrooms_server.features.cached import CachedQueries
from tests.conftest import LocalServer, ServerProcess
from tests.leaks import assert_leaks_nothing
from tests.streams import Streams, stream
from tests.test_client import in_thread
from tests.test_queries import ENDLESS
from tests.wire import DEADLINE, Arrow, Wire

HAS_TRIGGERS = int(duckdb.__version__.split(".")[0]) >= 2

ROWS = "select i, 'text ' || i as s, {'a': i, 'b': [i]} as n from range(1000) t(i)"
# 40 MB, and more rows than one batch.
LARGE = "select range as a, range * 2 as b from range(2500000)"


def ask(wire: Wire, sql: str, **options: Any) -> Any:
    fields = {"type": "json", "queryId": "q", **options}
    return answer(wire, wire.request(**fields, sql=sql, persist=True))


def answer(wire: Wire, reply: Any) -> Any:
    """The first frame from ``reply`` on that is no progress, which a busy machine has to tell."""
    while not isinstance(reply, Arrow) and reply["type"] == "progress":
        reply = wire.receive()
    return reply


def is_cached(reply: Any) -> bool:
    if isinstance(reply, Arrow):
        return reply.header.get("cached", False) is True
    assert reply["type"] == "json", reply
    return reply.get("cached", False) is True


def told(reply: Any) -> Any:
    """Everything in ``reply`` but whether it comes from the cache."""
    fields = reply.header if isinstance(reply, Arrow) else reply
    fields = {name: value for name, value in fields.items() if name != "cached"}
    return fields, reply.body if isinstance(reply, Arrow) else b""


def rows(reply: Any) -> Any:
    assert reply["type"] == "json", reply
    return json.loads(reply["data"])


def stats(wire: Wire) -> Any:
    return wire.request(type="cacheStats")


def until(wire: Wire, **wanted: int) -> None:
    """Ask for the counts until they are at least as ``wanted``."""
    while any(stats(wire)[name] < least for name, least in wanted.items()):
        pass


# What is remembered


@pytest.fixture(scope="module")
def others(module_server: LocalServer) -> Iterator[Wire]:
    """Where there are things that nothing is remembered of."""
    with module_server.connect() as wire:
        wire.exec("create sequence numbers")
        wire.exec("attach ':memory:' as other; create table other.t (a int)")
        wire.exec("create table t as select 1 as a; create view by_view as select random() as r")
        wire.exec("create view row_ids as select rowid as r from t")
        wire.exec("create table generated (a int, r double generated always as (random()))")
        wire.exec("create macro by_macro() as table from by_view")
        wire.exec("create macro scalar_macro() as uuid()")
        yield wire


@pytest.mark.parametrize(
    "options",
    [
        {"type": "json"},
        {"type": "arrow"},
        {"type": "arrow", "format": "json"},
        {"type": "arrow", "format": ["arrow", "json"]},
        {"type": "json", "format": ["later", "arrow"]},
        {"type": "arrow", "compression": "lz4"},
        {"type": "arrow", "compression": "zstd"},
        {"type": "arrow", "maxRows": 7},
        {"type": "json", "maxRows": 7},
        {"type": "json", "maxRows": 0},
        {"type": "json", "maxRows": 1000},
        {"type": "json", "params": [1]},
        {"type": "arrow", "timeoutMs": 60_000, "progress": True},
    ],
)
def test_a_hit_is_the_same_answer(wire: Wire, options: Any) -> None:
    sql = f"from ({ROWS}) where i >= $1" if "params" in options else ROWS
    first, second = (ask(wire, sql, **options) for _ in range(2))
    plain = answer(wire, wire.request(**{"queryId": "q", **options}, sql=sql))
    assert (is_cached(first), is_cached(second), is_cached(plain)) == (False, True, False)
    assert told(first) == told(second) == told(plain)


def test_what_arrow_cannot_carry_is_remembered_as_json(wire: Wire) -> None:
    wire.exec("create table v as select 1::variant as v")
    options = {"type": "arrow", "format": ["arrow", "json"]}
    replies = [ask(wire, "from v", **options) for _ in range(2)]
    assert [is_cached(reply) for reply in replies] == [False, True]
    assert told(replies[0]) == told(replies[1])


def test_empty_results(wire: Wire) -> None:
    wire.exec("create table t (a int)")
    for kind in ("json", "arrow"):
        first, second = (ask(wire, "from t", type=kind) for _ in range(2))
        assert is_cached(second)
        assert told(first) == told(second)


def test_everything_that_makes_a_difference(wire: Wire) -> None:
    """Each of these is another query, however alike they are."""
    sql = "select $1::varchar as v"
    different: list[dict[str, Any]] = [
        *({"params": [value]} for value in (5, 5.0, "5", None, True, 1, "1", "true", [1], ["1"])),
        {"params": [{"a": 1, "b": 2}]},
        {"params": [{"b": 2, "a": 1}]},
        {"params": {"1": 5}},
        {"params": [-0.0]},
        {"params": [0.0]},
        {"params": [0]},
        {"params": [5], "maxRows": 1},
        {"params": [5], "maxRows": 2},
        {"params": [5], "format": ["json", "arrow"]},
        {"params": [5], "type": "arrow"},
        {"params": [5], "type": "arrow", "compression": "lz4"},
        {"params": [5], "type": "arrow", "compression": "zstd"},
    ]
    first = [ask(wire, sql, **options) for options in different]
    assert not any(map(is_cached, first))
    again = [ask(wire, sql, **options) for options in different]
    assert all(map(is_cached, again))
    assert list(map(told, first)) == list(map(told, again))
    assert not is_cached(ask(wire, sql + " ", params=[5]))
    assert stats(wire)["misses"] == len(different) + 1


def test_what_makes_no_difference(wire: Wire) -> None:
    sql = "select $a::int as a, $b::int as b"
    first = ask(wire, sql, params={"a": 1, "b": 2})
    second = ask(wire, sql, params={"b": 2, "a": 1}, queryId=3, timeoutMs=5000, progress=True)
    assert is_cached(second)
    assert rows(first) == rows(second)
    arrow = ask(wire, "select 1", type="arrow")
    chunked = stream(wire, "select 1", persist=True)
    assert chunked.summary is not None and chunked.summary["cached"]
    assert bytes(chunked.body) == arrow.body


def test_who_asks_makes_no_difference(server: LocalServer) -> None:
    with server.connect() as one, server.connect() as other:
        for query_id in ("q", 7, "another"):
            ask(one, f"select '{query_id}'", queryId=query_id)
            reply = ask(other, f"select '{query_id}'", queryId="mine")
            assert is_cached(reply)
            assert reply["queryId"] == "mine"


# What is not


@pytest.mark.parametrize(
    "sql",
    [
        "select 1; select 2",
        "select random()",
        "select now()",
        "select localtimestamp",
        "select localtime",
        "select current_date",
        "select age(timestamp '2020-01-01')",
        "select current_setting('threads')",
        "select gen_random_uuid()",
        "select txid_current()",
        "select current_schema()",
        "select nextval('numbers')",
        "select nextval('numbers'), currval('numbers')",
        "select json_serialize_plan('from t')",
        "from t tablesample 50%",
        "from t using sample 1",
        "select rowid from t",
        "select max(rowid) as r from t",
        "select r from row_ids",
        "from t join t as u on t.rowid = u.rowid",
        "from t order by random()",
        "from generated",
        "from by_view",
        "from by_macro()",
        "select scalar_macro()",
        "from query('select random()')",
        "from duckdb_tables()",
        "from duckdb_settings()",
        "from information_schema.tables",
        "from pg_catalog.pg_class",
        "from sqlite_master",
        "show tables",
        "pragma table_info('t')",
        "pragma database_list",
        "call pragma_version()",
        "explain select 1",
        "pivot t on a using count(*)",
        "from other.t",
        "from t union all from other.t",
        "select count(*) from glob('*')",
        "insert into t values (1) returning a",
        "update t set a = a returning a",
    ],
)
def test_never_remembered(others: Wire, sql: str) -> None:
    before = stats(others)
    assert not any(is_cached(ask(others, sql)) for _ in range(3))
    after = stats(others)
    assert after["uncacheable"] == before["uncacheable"] + 3
    assert (after["hits"], after["misses"], after["entries"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "sql", ["select count(*) as n from t", "select 1 from t", "describe t", "summarize t"]
)
def test_remembered_all_the_same(wire: Wire, sql: str) -> None:
    wire.exec("create table t as select 1 as a")
    ask(wire, sql)
    assert is_cached(ask(wire, sql))
    wire.exec("insert into t values (2); alter table t add column b int")
    changed = ask(wire, sql)
    assert not is_cached(changed)
    assert rows(changed) == wire.rows(sql)


def test_changes_are_made_each_time(wire: Wire) -> None:
    wire.exec("create table t (a int); create sequence numbers")
    for _ in range(2):
        assert rows(ask(wire, "insert into t values (1) returning a")) == [{"a": 1}]
    assert wire.rows("from t") == [{"a": 1}] * 2
    assert [rows(ask(wire, "select nextval('numbers') as n"))[0]["n"] for _ in range(3)] == [
        1,
        2,
        3,
    ]
    if HAS_TRIGGERS:
        clause = "with x as (insert into t values (2) returning a) from x"
        assert [rows(ask(wire, clause)) for _ in range(2)] == [[{"a": 2}]] * 2
        assert len(wire.rows("from t")) == 4


def test_files_are_read_each_time(wire: Wire, tmp_path: Path) -> None:
    for name in ("f.csv", "f.parquet", "f.json"):
        path = str(tmp_path / name)
        wire.exec("create or replace view by_view as select 0 as a")
        for value in (1, 2):
            wire.exec(f"copy (select {value} as a) to '{path}'")
            assert rows(ask(wire, f"from '{path}'")) == [{"a": value}]
            if value == 1:
                wire.exec(f"create or replace view by_view as from '{path}'")
            assert rows(ask(wire, "from by_view")) == [{"a": value}]


def test_sessions_see_their_own(wire: Wire) -> None:
    wire.exec("create table t as select 1 as a")
    ask(wire, "from t")
    wire.request(type="exec", sql="begin", session="s")
    wire.request(type="exec", sql="update t set a = 2", session="s")
    assert rows(ask(wire, "from t", session="s")) == [{"a": 2}]
    assert is_cached(ask(wire, "from t"))
    wire.request(type="exec", sql="rollback", session="s")
    assert rows(ask(wire, "from t")) == [{"a": 1}]
    wire.request(type="exec", sql="create temp table t as select 3 as a", session="s")
    assert rows(ask(wire, "from t", session="s")) == [{"a": 3}]
    assert rows(ask(wire, "from t")) == [{"a": 1}]


@pytest.mark.parametrize("session", [None, "s"])
def test_several_statements_of_which_the_first_are_committed(
    server: LocalServer, session: str | None
) -> None:
    with server.connect() as one, server.connect() as other:
        one.exec("create table t as select 1 as a; create table u as select 1 as a")
        for query in ("from t", "from u"):
            ask(other, query)
            assert is_cached(ask(other, query))
        one.send(type="exec", sql=f"update t set a = 2; {ENDLESS}", queryId=1, session=session)
        while other.rows("from t") != [{"a": 2}]:
            pass
        for _ in range(2):
            assert rows(ask(other, "from t")) == [{"a": 2}]
        assert is_cached(ask(other, "from u"))
        one.send(type="cancel", queryId=1)
        assert {one.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
        for cached in (False, True):
            reply = ask(other, "from t")
            assert rows(reply) == [{"a": 2}]
            assert is_cached(reply) is cached


@pytest.mark.parametrize(
    ("table", "change", "like"),
    [
        ("main.t", "insert into main /* a */ . t values (1)", "main.main"),
        ("main.t", "insert into main -- a\n . t values (1)", "main.main"),
        ("main.t", "update main/* a */.t set a = 1", "main.main"),
        ('"t\u2028"', "insert into t\u2028 values (1)", "t"),
        ('"t\x85"', "delete from t\x85", "t"),
    ],
)
def test_names_that_look_like_others(wire: Wire, table: str, change: str, like: str) -> None:
    """A change of ``table`` whose text begins like one of the table ``like``."""
    wire.exec(f"create table {table} as select 0 as a; create table {like} as select 0 as a")
    ask(wire, f"from {table}")
    wire.exec(change)
    assert rows(ask(wire, f"from {table}")) == wire.rows(f"from {table}") != [{"a": 0}]


def test_a_new_table_with_a_comment_is_told(wire: Wire) -> None:
    wire.request(type="watch", tables=["t"])
    wire.send(type="exec", sql="create table t -- a\n as select 1 as a", queryId=1)
    kinds = {wire.receive()["type"] for _ in range(2)}
    assert kinds == {"ok", "changed"}


def test_large_texts_and_parameters_are_not_remembered(wire: Wire) -> None:
    """They would cost the loop thread time, and memory besides the results."""
    text = f"select 1 as a where 1 in ({', '.join(map(str, range(20_000)))})"
    for _ in range(2):
        assert not is_cached(ask(wire, text))
        assert not is_cached(ask(wire, "select len($1) as a", params=["x" * 100_000]))
    assert stats(wire)["uncacheable"] == 4
    ask(wire, f"select 1 /* {'x' * 60_000} */")
    assert stats(wire)["memoryBytes"] > 60_000
    refused = wire.request(type="live", sql=text)
    assert refused["code"] == "bad_request"


def test_without_a_cache(launch: Callable[..., LocalServer]) -> None:
    with launch(no_cache=True).connect() as wire:
        for _ in range(2):
            reply = ask(wire, "select 1 as a")
            assert rows(reply) == [{"a": 1}]
            assert not is_cached(reply)
        counted = stats(wire)
    assert counted.pop("type") == "cacheStats"
    assert counted.pop("enabled") is False
    assert counted.pop("uncacheable") in (0, 2)
    assert set(counted.values()) == {0}


def test_what_is_counted(server: LocalServer) -> None:
    with server.connect() as wire:
        wire.exec("create table t as select 1 as a")
        for _ in range(5):
            ask(wire, "from t")
        wire.exec("insert into t values (2)")
        ask(wire, "from t")
        ask(wire, "select random()")
        ask(wire, "from nowhere")
        cache = server.server.main.database.cache
        assert cache is not None
        cache.flush()
        counted = stats(wire)
    assert counted.pop("memoryBytes") > 0
    assert counted.pop("diskBytes") > 0
    # What DuckDB does not plan is left to it to refuse.
    assert counted == {
        "type": "cacheStats",
        "enabled": True,
        "hits": 4,
        "misses": 2,
        "joined": 0,
        "uncacheable": 2,
        "entries": 1,
    }


# Large results


@pytest.mark.parametrize("window", [None, 100_000])
def test_chunks_of_a_remembered_result(wire: Wire, window: int | None) -> None:
    options = {} if window is None else {"window": window}
    plain = stream(wire, LARGE)
    runs = [stream(wire, LARGE, query_id=n, persist=True, **options) for n in range(2)]
    for run, cached in zip(runs, (None, True), strict=True):
        assert run.summary is not None
        assert run.summary.get("cached") is cached
        assert run.summary["rows"] == 2_500_000
        assert set(run.summary["ms"]) == {"queued", "running", "sending"}
        assert run.body == plain.body
        assert window is None or max(run.sizes) <= window


def test_large_results_go_by_disk(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    process = serve("--cache-dir", str(tmp_path), "--memory-limit", "100MB")
    server = psutil.Process(process.pid)
    with process.connect() as wire:
        expected = wire.arrow(LARGE).body
        assert len(expected) > 40_000_000
        before = peak = server.memory_info().rss
        for number in range(4):
            reply = ask(wire, LARGE, type="arrow")
            assert is_cached(reply) is (number > 0)
            assert reply.body == expected
            peak = max(peak, server.memory_info().rss)
        assert stats(wire)["memoryBytes"] < 1 << 20
        # The writer is a little later.
        until(wire, diskBytes=40_000_000)
    assert peak - before < 60 << 20


def test_too_large_results_are_answered_whole(launch: Callable[..., LocalServer]) -> None:
    large = "select range as a, range * 2 as b from range(700000)"
    with launch(cache_size=4 << 20).connect() as wire:
        for _ in range(2):
            reply = ask(wire, large, type="arrow")
            assert not is_cached(reply)
            assert reply.table().num_rows == 700_000
        chunked = stream(wire, large, persist=True)
        assert chunked.table().num_rows == 700_000
        counted = stats(wire)
        # It is not computed in vain again.
        assert (counted["misses"], counted["uncacheable"]) == (1, 3)
        wire.exec("create table t as select 1 as a")
        sql = "select range + a as b from range(1000000), t"
        for misses in (2, 2):
            ask(wire, sql, type="arrow")
            assert stats(wire)["misses"] == misses
        wire.exec("delete from t")
        for cached in (False, True):
            assert is_cached(ask(wire, sql, type="arrow")) is cached
        ask(wire, "select 1")
        assert is_cached(ask(wire, "select 1"))


def test_a_slow_reader_may_cancel(wire: Wire) -> None:
    """What it got is broken, and nobody else's is."""
    expected = ask(wire, LARGE, type="arrow")
    wire.send(type="arrow", sql=LARGE, queryId="slow", persist=True)
    fragments = wire.socket.recv_streaming()
    got = bytes(next(fragments))  # type: ignore[arg-type]
    wire.send(type="cancel", queryId="slow")
    got += b"".join(fragments)  # type: ignore[arg-type]
    assert len(got) < len(expected.body)
    with pytest.raises((pa.ArrowException, OSError)):
        pa.ipc.open_stream(got[4 + int.from_bytes(got[:4], "big") :]).read_all()
    replies = {reply["type"]: reply for reply in (wire.receive(), wire.receive())}
    assert (replies["cancelAck"]["cancelled"], replies["error"]["code"]) == (True, "cancelled")
    streams = Streams(wire)
    asked = streams.ask(LARGE, "slow", persist=True, window=1 << 20)
    while len(asked.body) < 1 << 20:
        streams.receive()
    wire.send(type="cancel", queryId="slow")
    streams.finish()
    assert asked.code == "cancelled"
    streams.until("cancelAck")
    again = ask(wire, LARGE, type="arrow")
    assert is_cached(again)
    assert again.body == expected.body


def test_hits_from_disk_leave_nothing_open(launch: Callable[..., LocalServer]) -> None:
    server = launch()
    cache = server.server.main.database.cache
    assert cache is not None
    with server.connect() as wire:
        small, large = "select 1 as a", "from range(200000)"

        def cycle() -> None:
            cache._memory.clear()
            for sql in (small, large):
                ask(wire, sql, type="arrow")

        cycle()
        cache.flush()
        assert_leaks_nothing(cycle, ("worker", "cache"))
        assert stats(wire)["misses"] == 2


def test_a_directory_that_someone_damages(
    launch: Callable[..., LocalServer], tmp_path: Path
) -> None:
    server = launch(cache_dir=str(tmp_path))
    cache = server.server.main.database.cache
    assert cache is not None
    chance = random.Random(2026)
    queries = {f"select {n} + range as a from range({10 ** (n + 1)})": n for n in range(6)}
    with server.connect() as wire:
        expected = {sql: wire.arrow(sql).body for sql in queries}
        for _ in range(12):
            for sql in queries:
                assert ask(wire, sql, type="arrow").body == expected[sql]
            cache.flush()
            cache._memory.clear()
            for path in tmp_path.rglob("*"):
                if path.is_file() and path.stat().st_size and chance.random() < 0.6:
                    with path.open("r+b") as file:
                        for _ in range(chance.choice((1, 20))):
                            at = chance.randrange(path.stat().st_size)
                            file.seek(at)
                            byte = file.read(1)[0] ^ (1 << chance.randrange(8))
                            file.seek(at)
                            file.write(bytes([byte]))


# Runs that several share


class Gate:
    """Holds up every run before it begins. ``runs`` are the texts of those."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait(self, sql: str) -> None:
        self.runs.append(sql)
        assert self._open.wait(DEADLINE)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    compute = CachedQueries._compute

    def gated(self: Any, cache: Any, flight: Any, query: Any, *more: Any) -> Any:
        gate.wait(query.sql)
        yield from compute(self, cache, flight, query, *more)

    monkeypatch.setattr(CachedQueries, "_compute", gated)
    yield gate
    gate.open()


def test_a_thousand_equal_requests_run_once(server: LocalServer, gate: Gate) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(server.connect()) for _ in range(20)]
        for number in range(50):
            for wire in wires:
                wire.send(type="json", sql=ROWS, queryId=number, persist=True)
        # As many as may be under way for each connection.
        with server.connect() as beside:
            until(beside, joined=100)
        gate.open()
        bodies = set()
        for wire in wires:
            replies = [wire.receive() for _ in range(50)]
            assert sorted(reply["queryId"] for reply in replies) == list(range(50))
            bodies |= {reply["data"] for reply in replies}
        counted = stats(wires[0])
    assert len(bodies) == 1
    assert gate.runs == [ROWS]
    assert counted["misses"] == 1
    assert counted["joined"] + counted["hits"] == 999


def test_cancelling_one_leaves_the_others(server: LocalServer, gate: Gate) -> None:
    with server.connect() as one, server.connect() as other:
        one.send(type="json", sql=ROWS, queryId=1, persist=True)
        until(other, misses=1)
        other.send(type="json", sql=ROWS, queryId=1, persist=True)
        until(one, joined=1)
        # The one that began it.
        one.send(type="cancel", queryId=1)
        replies = {reply["type"]: reply for reply in (one.receive(), one.receive())}
        assert replies["error"]["code"] == "cancelled"
        gate.open()
        assert len(rows(other.receive())) == 1000
        assert is_cached(ask(one, ROWS))
    assert gate.runs == [ROWS]


def test_leaving_leaves_the_others(server: LocalServer, gate: Gate) -> None:
    with server.connect() as other:
        with server.connect() as one:
            one.send(type="json", sql=ROWS, queryId=1, persist=True)
            until(other, misses=1)
            other.send(type="json", sql=ROWS, queryId=1, persist=True)
            until(one, joined=1)
        gate.open()
        assert len(rows(other.receive())) == 1000
    assert gate.runs == [ROWS]


def test_when_all_cancel_the_run_ends(launch: Callable[..., LocalServer]) -> None:
    server = launch(workers=1)
    with server.connect() as one, server.connect() as other:
        for wire in (one, other):
            wire.send(type="json", sql=ENDLESS, queryId=1, persist=True)
        until(one, misses=1, joined=1)
        for wire in (one, other):
            wire.send(type="cancel", queryId=1)
            replies = {reply["type"]: reply for reply in (wire.receive(), wire.receive())}
            assert replies["error"]["code"] == "cancelled"
        # The only worker is free.
        assert one.rows("select 1 as a") == [{"a": 1}]
        assert server.server.scheduler._jobs == set()


def test_stopping_one_takes_no_worker(launch: Callable[..., LocalServer]) -> None:
    """All workers are at work for those who wait; a deadline or a cancel frees them."""
    server = launch(workers=1)
    with server.connect() as one, server.connect() as other:
        for wire, query_id in ((one, "late"), (one, "cancelled"), (other, "stays")):
            limit = 300 if query_id == "late" else None
            wire.send(type="json", sql=ENDLESS, queryId=query_id, persist=True, timeoutMs=limit)
        assert one.receive()["code"] == "timeout"
        one.send(type="cancel", queryId="cancelled")
        replies = {reply["type"]: reply for reply in (one.receive(), one.receive())}
        assert replies["error"]["code"] == "cancelled"
        other.send(type="cancel", queryId="stays")
        replies = {reply["type"]: reply for reply in (other.receive(), other.receive())}
        assert replies["error"]["code"] == "cancelled"
        assert one.rows("select 1 as a") == [{"a": 1}]


def test_each_has_its_own_deadline(server: LocalServer, gate: Gate) -> None:
    with server.connect() as one, server.connect() as other:
        one.send(type="json", sql=ROWS, queryId=1, persist=True, timeoutMs=500)
        until(other, misses=1)
        other.send(type="json", sql=ROWS, queryId=1, persist=True)
        assert one.receive()["code"] == "timeout"
        gate.open()
        assert len(rows(other.receive())) == 1000
    assert gate.runs == [ROWS]


def test_all_are_told_of_an_error(server: LocalServer, gate: Gate) -> None:
    with server.connect() as one, server.connect() as other:
        one.exec("create table t as select 'x' as a")
        sql = "select a::int as a from t"
        for wire in (one, other):
            wire.send(type="json", sql=sql, queryId=1, persist=True)
        with server.connect() as beside:
            until(beside, misses=1, joined=1)
        gate.open()
        errors = [wire.receive() for wire in (one, other)]
        assert errors[0] == errors[1]
        assert errors[0]["code"] == "query_error"
        assert "Could not convert string 'x'" in errors[0]["error"]
        # Errors are not kept.
        one.exec("update t set a = '5'")
        assert rows(ask(one, sql)) == [{"a": 5}]


def test_a_change_during_the_run(server: LocalServer, gate: Gate) -> None:
    """Those who asked before it get what there is; it is not kept, and nobody joins it."""
    with server.connect() as one, server.connect() as other:
        one.exec("create table t as select 1 as a")
        one.send(type="json", sql="from t", queryId=1, persist=True)
        until(other, misses=1)
        other.exec("update t set a = 2")
        other.send(type="json", sql="from t", queryId=1, persist=True)
        with server.connect() as beside:
            until(beside, misses=2)
        gate.open()
        assert rows(one.receive())[0]["a"] in (1, 2)
        assert rows(other.receive()) == [{"a": 2}]
        reply = ask(one, "from t")
        assert is_cached(reply)
        assert rows(reply) == [{"a": 2}]
    assert gate.runs == ["from t"] * 2


def test_one_that_waits_is_told_of_progress(server: LocalServer, gate: Gate) -> None:
    with server.connect() as one, server.connect() as other:
        one.send(type="json", sql=ROWS, queryId=1, persist=True)
        until(other, misses=1)
        other.send(type="json", sql=ROWS, queryId=2, persist=True, progress=True)
        message = other.receive()
        assert (message["type"], message["queryId"]) == ("progress", 2)
        assert message["state"] == "running"
        gate.open()
        while message["type"] == "progress":
            message = other.receive()
        assert len(rows(message)) == 1000


def test_an_id_in_flight_is_refused(wire: Wire) -> None:
    ask(wire, ROWS)
    wire.send(type="exec", sql=ENDLESS, queryId=1)
    assert ask(wire, ROWS, queryId=1)["code"] == "conflict"
    assert is_cached(ask(wire, ROWS, queryId=2))
    wire.send(type="cancel", queryId=1)
    assert {wire.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
    assert is_cached(ask(wire, ROWS, queryId=1))


def test_a_stop_while_many_wait(launch: Callable[..., LocalServer]) -> None:
    server = launch(workers=2)
    with ExitStack() as stack:
        wires = [stack.enter_context(server.connect()) for _ in range(30)]
        for wire in wires:
            for number in range(3):
                wire.send(type="arrow", sql=ENDLESS, queryId=number, persist=True, progress=True)
        with server.connect() as beside:
            until(beside, joined=30)
        stopping = in_thread(server.server.stop)
        for wire in wires:
            codes: set[Any] = set()
            while len(codes) < 3:
                reply = wire.receive()
                if reply["type"] == "error":
                    codes.add((reply["queryId"], reply["code"]))
            assert codes == {(number, "shutting_down") for number in range(3)}
        assert stopping.result(DEADLINE) is True
