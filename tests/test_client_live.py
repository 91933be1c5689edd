"""The cache, watches and live queries of both clients, against real servers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from sqlrooms_server.client import (
    AsyncClient,
    Change,
    Client,
    ConnectionLost,
    Live,
    RequestFailed,
    connect,
)
from sqlrooms_server.db import versions as db_versions
from tests.conftest import LocalServer, ServerProcess
from tests.proxy import Proxy
from tests.test_async_client import connected
from tests.test_chunked_results import wait_until
from tests.test_client import failure, in_thread
from tests.wire import DEADLINE

COUNT = "select count(*)::int as n from t"
# Nobody listens there.
NOWHERE = 9


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlrooms_server.client.needs._FIRST_PAUSE_S", 0.02)


@pytest.fixture
def db(server: LocalServer) -> Iterator[Client]:
    with connect(server.url) as client:
        client.execute("create table t(i int); create table u(i int)")
        yield client


@pytest.fixture
def other(server: LocalServer, db: Client) -> Iterator[Client]:
    """Another client of the same server."""
    with connect(server.url) as client:
        yield client


def count(live: Live) -> int:
    """What the next result of COUNT says."""
    [row] = live.next(DEADLINE).to_pylist()
    number: int = row["n"]
    return number


def wait_for(live: Live, expected: int) -> None:
    while count(live) != expected:
        pass


# The cache


def test_a_cached_result_serves_every_way_of_asking(db: Client, other: Client) -> None:
    db.execute("insert into t from range(5)")
    asks: list[Callable[[Client], tuple[Any, bool]]] = [
        lambda client: whole(client, "from t order by i"),
        lambda client: whole(client, "from t where i > ? order by i", [2]),
        lambda client: whole(client, "from t where i > $least order by i", {"least": 1}),
        lambda client: whole(client, "from t order by i", max_rows=2),
        lambda client: whole(client, "from t order by i", compression="zstd"),
        # A large one comes in chunks.
        lambda client: whole(client, "select a.i + b.i as n from t a, range(300000) b(i)"),
        lambda client: rows(client, "from t order by i"),
        lambda client: rows(client, "select i::hugeint as i from t where i = ?", [3]),
    ]
    for ask in asks:
        before = db.cache_stats()
        result, cached = ask(db)
        assert not cached
        assert ask(other) == (result, True)
        after = db.cache_stats()
        assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)
    # The large one counts when it is on disk.
    wait_until(lambda: db.cache_stats().entries == len(asks))
    other.execute("insert into t values (5)")
    for ask in asks:
        assert ask(db)[1] is False
    assert db.cache_stats().uncacheable == 0


def whole(client: Client, sql: str, *arguments: Any, **options: Any) -> tuple[pa.Table, bool]:
    result = client.query(sql, *arguments, persist=True, **options)
    return result.to_arrow(), result.cached


def rows(client: Client, sql: str, *arguments: Any) -> tuple[Any, bool]:
    result = client.rows(sql, *arguments, persist=True)
    return list(result), result.cached


def test_what_is_not_asked_for_or_not_cacheable(db: Client) -> None:
    for _ in range(2):
        assert not db.query("from t").cached
        assert not db.rows("from t").cached
    assert db.cache_stats().entries == 0
    for _ in range(2):
        assert not db.rows("select random() as r", persist=True).cached
    stats = db.cache_stats()
    assert stats.enabled
    assert (stats.uncacheable, stats.entries) == (2, 0)
    assert stats.memory_bytes == 0


def test_a_server_without_a_cache(launch: Callable[..., LocalServer]) -> None:
    with connect(launch(no_cache=True).url) as db:
        for _ in range(2):
            assert not db.rows("select 1 as a", persist=True).cached
        assert not db.cache_stats().enabled


# Changes and live queries


def test_what_others_write_is_told(db: Client, other: Client) -> None:
    with db.watch(["t", "v"]) as changes, db.live(COUNT) as live:
        assert set(changes.versions) == {"t", "v"}
        assert changes.versions["v"] == 0
        assert count(live) == 0
        last = changes.versions["t"]
        for sql, op, expected in (
            ("insert into t values (1), (2)", "insert", 2),
            ("delete from t where i = 1", "delete", 1),
            ("insert into t values (3); insert into t values (4)", "insert", 3),
        ):
            other.execute(sql)
            change = changes.next(DEADLINE)
            assert (change.op, list(change.tables), change.resync) == (op, ["t"], False)
            assert changes.versions["t"] > last
            last = changes.versions["t"]
            wait_for(live, expected)
        # Two statements may be told as one or as two.
        other.execute("insert into u values (1)")
        assert other.upload("v", pa.table({"a": [1]})) == 1
        while "v" not in (change := changes.next(DEADLINE)).tables:
            assert list(change.tables) == ["t"]
        assert change.op == "upload"
        other.upload("t", pa.table({"i": pa.array([7, 8], pa.int32())}), mode="append")
        wait_for(live, 5)
        assert list(changes.next(DEADLINE).tables) == ["t"]
    assert list(changes) == []
    assert db.rows("select 1 as a") == [{"a": 1}]


def test_what_a_session_writes_is_told_when_it_commits(db: Client, other: Client) -> None:
    with db.watch() as changes, db.live(COUNT) as live, other.session() as session:
        assert count(live) == 0
        with session.transaction():
            session.execute("insert into t values (1)")
            other.execute("insert into u values (1)")
            assert list(changes.next(DEADLINE).tables) == ["u"]
        change = changes.next(DEADLINE)
        assert (change.op, list(change.tables)) == ("insert", ["t"])
        assert count(live) == 1
        with pytest.raises(ZeroDivisionError), session.transaction():
            session.execute("insert into t values (2)")
            raise ZeroDivisionError
        other.execute("insert into u values (2)")
        assert list(changes.next(DEADLINE).tables) == ["u"]
        with pytest.raises(TimeoutError):
            live.next(0)


def test_a_later_watch_goes_on_where_the_first_one_ended(db: Client, other: Client) -> None:
    with db.watch() as changes:
        version = changes.version
    other.execute("insert into t values (1)")
    other.execute("update u set i = 1")
    other.execute("insert into u values (1)")
    with db.watch(since=version) as changes:
        missed = changes.next(DEADLINE)
        assert (set(missed.tables), missed.op, missed.resync) == ({"t", "u"}, "change", False)
        with pytest.raises(TimeoutError):
            changes.next(0)
    with db.watch("u", since=version) as changes:
        assert set(changes.next(DEADLINE).tables) == {"u"}
    with db.watch(since="nonsense") as changes:
        assert changes.next(DEADLINE).resync


def test_parameters_and_options_of_live_queries(db: Client, other: Client) -> None:
    sql = "from t where i >= $least order by i"
    with db.live(sql, {"least": 2}, max_rows=2, compression="lz4", timeout=DEADLINE) as live:
        assert live.next().to_arrow().num_rows == 0
        other.execute("insert into t from range(10)")
        result = live.next(DEADLINE)
        assert result.to_pylist() == [{"i": 2}, {"i": 3}]
        assert result.truncated


def test_a_change_that_does_not_change_the_result_is_not_told(db: Client, other: Client) -> None:
    with db.live("select max(i) as n from t") as live:
        assert live.next().to_pylist() == [{"n": None}]
        for number in (5, 3, 7):
            other.execute("insert into t values (?)", [number])
        seen: list[int] = []
        while seen[-1:] != [7]:
            seen.append(count(live))
        assert seen in ([5, 7], [7])


def test_who_is_slow_gets_the_latest(db: Client, other: Client) -> None:
    writes = 30
    with db.watch("t") as changes, db.live(COUNT) as slow, other.live(COUNT) as fast:
        for _ in range(writes):
            other.execute("insert into t values (1)")
        wait_for(fast, writes)
        # It is told in this order, so that both are here now, or one older and this one.
        seen = [count(slow)]
        if seen != [writes]:
            seen.append(count(slow))
        assert seen[-1] == writes
        with connect(db._url) as third:
            last = third.watch("t").versions["t"]
        told = 0
        while changes.versions["t"] != last:
            changes.next(DEADLINE)
            told += 1
        assert told <= writes


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("from 'x.csv'", "x.csv"),
        ("from read_text('/dev/null')", "cannot be live"),
        ("insert into t values (1)", "one SELECT"),
        ("select 1; select 2", "one SELECT"),
        ("from nowhere", "nowhere does not exist"),
        ("selec", "Parser Error"),
        ("select i + $n from t", r"\$n::INTEGER"),
        ("select i / 0 from t where i = $unbound", "unbound"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_once(db: Client, sql: str, text: str) -> None:
    with pytest.raises(RequestFailed, match=text):
        db.live(sql)
    assert count(db.live(COUNT)) == 0


def test_a_watch_that_is_refused(db: Client) -> None:
    with pytest.raises(RequestFailed, match="tables") as failed:
        db.watch([""])
    assert failed.value.code == "bad_request"
    with db.watch("t") as changes:
        assert list(changes.versions) == ["t"]


def test_the_table_of_a_live_query_is_dropped(db: Client, other: Client) -> None:
    live = db.live(COUNT)
    assert count(live) == 0
    other.execute("drop table t")
    with pytest.raises(RequestFailed, match="does not exist"):
        live.next(DEADLINE)
    assert list(live) == []


def test_too_many_live_queries(launch: Callable[..., LocalServer]) -> None:
    with connect(launch(max_live_per_connection=2).url) as db:
        first, _ = db.live("select 1 as n"), db.live("select 2 as n")
        with pytest.raises(RequestFailed, match="--max-live-per-connection") as failed:
            db.live("select 3 as n")
        assert failed.value.code == "busy"
        first.close()
        # The place is free when the cancel was answered.
        db.rows("select 1")
        assert count(db.live("select 3 as n")) == 3


def test_another_thread_closes_what_waits(db: Client, other: Client) -> None:
    changes, live = db.watch("t"), db.live(COUNT)
    entered = threading.Barrier(3)

    def consume(feed: Any) -> None:
        feed.next(DEADLINE)
        entered.wait(DEADLINE)
        # One more may have come before it was closed.
        assert len(list(feed)) <= 1

    consuming = [in_thread(lambda feed=feed: consume(feed)) for feed in (changes, live)]  # type: ignore[misc]
    # The live query begins with the result that is there already.
    other.execute("insert into t values (1)")
    entered.wait(DEADLINE)
    changes.close()
    live.close()
    for future in consuming:
        assert failure(future) is None
    assert db.rows(COUNT) == [{"n": 1}]


def test_a_client_and_a_server_that_close(launch: Callable[..., LocalServer]) -> None:
    server = launch()
    with connect(server.url) as db:
        changes, live = db.watch(), db.live("select 1 as n")
        assert count(live) == 1
        waiting = [in_thread(changes.next), in_thread(live.next)]
        server.server.stop()
        db.close()
        for future in waiting:
            assert isinstance(failure(future), ConnectionLost)


def test_a_commit_while_a_watch_begins(
    server: LocalServer, db: Client, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the server has just looked at what has changed, and is told once."""
    versions = server.server.main.database.engine.versions
    known = versions.known

    def known_before(since: int = 0) -> Any:
        found = known(since)
        versions.record(db_versions.Change("insert", (("memory", "main", "t"),)))
        return found

    with db.watch() as changes:
        beginning = changes.version
    for since, end in ((None, "v"), (beginning, "w")):
        with monkeypatch.context() as patch:
            patch.setattr(versions, "known", known_before)
            changes = db.watch(["t", end], since=since)
        other.execute(f"create table {end}(i int)")
        told = [change.tables["t"] for change in until(changes, end) if "t" in change.tables]
        assert told[-1] == versions.version(db_versions.key_of(("memory", "main", "t")))
        assert sorted(set(told)) == told
        changes.close()


# Lost connections


def test_a_killed_server_comes_back(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    path = tmp_path / "db.duckdb"
    server = serve("--db-path", str(path))
    with connect(server.url) as db:
        db.execute("create table t as from range(3)")
        changes, live = db.watch(), db.live(COUNT)
        assert count(live) == 3
        watching, following = in_thread(changes.next), in_thread(live.next)
        server.stop(signal.SIGKILL)
        with duckdb.connect(path) as file:
            file.execute("insert into t values (3)")
        serve("--db-path", str(path), "--port", str(server.port))
        change = watching.result(DEADLINE)
        assert (change.tables, change.resync) == ({}, True)
        assert following.result(DEADLINE).to_pylist() == [{"n": 4}]
        with connect(server.url) as other:
            other.execute("insert into t values (4)")
        assert list(changes.next(DEADLINE).tables) == ["t"]
        assert count(live) == 5


def test_after_a_cut_connection_exactly_what_was_missed_is_told(
    server: LocalServer, other: Client
) -> None:
    names = [f"t{number}" for number in range(60)]
    other.execute(";".join(f"create table {name}(i int)" for name in names))
    with Proxy(server.port) as proxy, connect(proxy.url) as db:
        changes = db.watch()
        following = in_thread(lambda: list(until(changes, names[-1])))
        for number, name in enumerate(names):
            if number % 10 == 3:
                # Away for some changes.
                proxy.port = NOWHERE
                proxy.cut()
            if number % 10 == 6:
                proxy.port = server.port
            if number % 10 == 8:
                # And back at once.
                proxy.cut()
            other.execute(f"insert into {name} values (1)")
        told = following.result(DEADLINE)
        assert not any(change.resync for change in told)
        assert sorted(table for change in told for table in change.tables) == sorted(names)
        assert {change.op for change in told} <= {"insert", "change"}


def until(changes: Any, name: str) -> Iterator[Change]:
    for change in changes:
        yield change
        if name in change.tables:
            return


def test_a_live_query_outlasts_cut_connections(server: LocalServer, other: Client) -> None:
    with Proxy(server.port) as proxy, connect(proxy.url) as db:
        live = db.live(COUNT)
        seen = [count(live)]
        for number in range(1, 6):
            proxy.cut()
            other.execute("insert into t values (1)")
            while seen[-1] != number:
                seen.append(count(live))
        # Nothing twice, nothing older than what was told before.
        assert seen == sorted(set(seen))


FOLLOWING = """
import random
import signal
import sys
from sqlrooms_server.client import connect

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts = 0

def read(feed):
    global interrupts
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.01))
        try:
            # Python drops an interrupt that comes in a finalizer.
            return feed.next(0.1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
    except TimeoutError:
        pass

with connect(sys.argv[1]) as db:
    changes, live = db.watch(), db.live("select count(*)::int as n from t")
    print("following", flush=True)
    seen, told = [], 0
    while 100 not in seen or "u" not in changes.versions:
        result, change = read(live), read(changes)
        if result is not None:
            seen.append(result.to_pylist()[0]["n"])
        # What an interrupt threw away is told again, as one.
        told += change is not None and "t" in change.tables
    assert seen == sorted(set(seen)), seen
    assert told > 0 and interrupts > 0
    changes.close()
    live.close()
    print(db.rows("select 1 as a"))
"""


@pytest.mark.skipif(
    "SQLROOMS_INTERRUPTS" not in os.environ,
    reason="interrupts at random moments; SQLROOMS_INTERRUPTS=1 asks for them",
)
def test_ctrl_c_loses_nothing(server: LocalServer, other: Client) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FOLLOWING, server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "following\n"
        for _ in range(100):
            other.execute("insert into t values (1)")
        other.execute("insert into u values (1)")
        assert process.communicate(timeout=DEADLINE) == ("[{'a': 1}]\n", "")


# asyncio


def test_async_cache(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        await db.execute("create table t as from range(3) t(i)")
        for cached in (False, True):
            result = await db.query("from t where i > ?", [0], persist=True)
            assert (await result.to_arrow()).num_rows == 2
            assert result.cached is cached
            rows = await db.rows("from t where i > $i", {"i": 1}, persist=True)
            assert (rows, rows.cached) == ([{"i": 2}], cached)
        answers = await asyncio.gather(*(db.cache_stats() for _ in range(10)))
        # Of the sizes, what the disk holds may still grow.
        assert {(stats.misses, stats.hits, stats.entries) for stats in answers} == {(2, 2, 2)}

    connected(server.url, test)


async def async_count(live: Any) -> Any:
    return (await (await live.next(DEADLINE)).to_pylist())[0]["n"]


def test_async_changes_and_live_queries(server: LocalServer, other: Client) -> None:
    async def test(db: AsyncClient) -> None:
        async with db.watch() as changes, db.live(COUNT) as live:
            assert await async_count(live) == 0
            await asyncio.to_thread(other.execute, "insert into t values (1)")
            assert list((await changes.next(DEADLINE)).tables) == ["t"]
            assert await async_count(live) == 1
            async with db.session() as session:
                async with session.transaction():
                    await session.execute("insert into t values (2)")
                    await db.execute("insert into u values (1)")
                    assert list((await changes.next(DEADLINE)).tables) == ["u"]
                assert list((await changes.next(DEADLINE)).tables) == ["t"]
            assert await async_count(live) == 2
            await db.upload("t", pa.table({"i": pa.array([1], pa.int32())}))
            assert (await changes.next(DEADLINE)).op == "upload"
            assert await async_count(live) == 1

            # A task that is cancelled loses nothing.
            for feed in (changes, live):
                waiting = asyncio.create_task(feed.next())
                await db.rows("select 1")
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            await db.execute("insert into t values (2)")
            assert list((await changes.next(DEADLINE)).tables) == ["t"]
            assert await async_count(live) == 2

            # Another task closes them.
            consuming = [asyncio.create_task(consume(feed)) for feed in (changes, live)]
            await db.rows("select 1")
            await changes.close()
            await live.close()
            assert await asyncio.gather(*consuming) == [0, 0]
        with pytest.raises(RequestFailed, match="one SELECT"):
            await db.live("drop table t")
        async for result in db.live(COUNT):
            assert await result.to_pylist() == [{"n": 2}]
            break

    async def consume(feed: Any) -> int:
        return len([item async for item in feed])

    connected(server.url, test)


def test_async_feeds_outlast_a_killed_server(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    path = tmp_path / "db.duckdb"
    server = serve("--db-path", str(path))

    async def test(db: AsyncClient) -> None:
        await db.execute("create table t as from range(3)")
        async with db.watch("t") as changes, db.live(COUNT) as live:
            assert await async_count(live) == 3
            watching = asyncio.create_task(changes.next())
            following = asyncio.create_task(async_count(live))
            await asyncio.to_thread(restart)
            assert (await watching).resync
            assert await following == 4

    def restart() -> None:
        server.stop(signal.SIGKILL)
        with duckdb.connect(path) as file:
            file.execute("insert into t values (3)")
        serve("--db-path", str(path), "--port", str(server.port))

    connected(server.url, test)


def test_async_feeds_outlast_cut_connections(server: LocalServer, other: Client) -> None:
    async def test(db: AsyncClient) -> None:
        async with db.watch() as changes, db.live(COUNT) as live:
            assert await async_count(live) == 0
            for number in range(1, 4):
                proxy.cut()
                other.execute("insert into t values (1)")
                other.execute(f"create table new{number}(i int)")
                told: list[str] = []
                while f"new{number}" not in told:
                    change = await changes.next(DEADLINE)
                    assert not change.resync
                    told += change.tables
                assert sorted(told) == [f"new{number}", "t"]
                assert await async_count(live) == number

    with Proxy(server.port) as proxy:
        connected(proxy.url, test)
