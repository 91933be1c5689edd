"""The cache, watches and live queries of the clients, against a server that the test plays."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest
from websockets.exceptions import ConnectionClosed

from sqlrooms_server.client import (
    AsyncClient,
    CacheStats,
    Change,
    Client,
    ConnectionLost,
    Live,
    QueryTimeout,
    RequestFailed,
    Watch,
    connect,
    connect_async,
)
from sqlrooms_server.client.streams import is_same
from tests.scripted import Peer, ScriptedServer
from tests.test_client import failure, in_thread
from tests.wire import DEADLINE

ONE, TWO, THREE = (pa.table({"a": [value]}) for value in (1, 2, 3))
STATS = {
    "hits": 1,
    "misses": 2,
    "joined": 3,
    "uncacheable": 4,
    "entries": 5,
    "memoryBytes": 6,
    "diskBytes": 7,
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlrooms_server.client.needs._FIRST_PAUSE_S", 0.01)


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def db(scripted: ScriptedServer) -> Iterator[Client]:
    with connect(scripted.url) as client:
        yield client


@pytest.fixture
def peer(scripted: ScriptedServer, db: Client) -> Peer:
    return scripted.peer()


def delivered(db: Client, peer: Peer) -> None:
    """Wait until what ``peer`` has sent is in the inboxes of ``db``."""
    asking = in_thread(db.cache_stats)
    assert peer.receive()["type"] == "cacheStats"
    peer.send(type="cacheStats", **STATS)
    asking.result(DEADLINE)


def waiting_requests(db: Client) -> list[Any]:
    assert db._wire is not None
    return list(db._wire.link._exchanges)


# The cache


def test_results_say_whether_they_were_cached(db: Client, peer: Peer) -> None:
    for cached in (True, False):
        more = {"cached": True} if cached else {}
        asking = in_thread(lambda: db.query("select 1", persist=True))
        asked = peer.receive()
        assert asked["persist"] is True
        peer.arrow(ONE, queryId=asked["queryId"], seq=0, last=True, **more)
        result = asking.result(DEADLINE)
        assert result.to_arrow().equals(ONE)
        assert result.cached is cached

        asking = in_thread(lambda: db.rows("select 1 as a", persist=True))
        asked = peer.receive()
        assert asked["persist"] is True
        peer.send(type="json", queryId=asked["queryId"], data='[{"a":1}]', **more)
        rows = asking.result(DEADLINE)
        assert rows == [{"a": 1}]
        assert rows.cached is cached


def test_without_persist_nothing_is_asked(db: Client, peer: Peer) -> None:
    asking = in_thread(lambda: db.rows("select 1"))
    asked = peer.receive()
    assert "persist" not in asked
    peer.send(type="ok", queryId=asked["queryId"])
    assert asking.result(DEADLINE).cached is False


def test_cache_stats(scripted: ScriptedServer, db: Client, peer: Peer) -> None:
    asking = [in_thread(db.cache_stats) for _ in range(2)]
    for number in range(2):
        assert peer.receive()["type"] == "cacheStats"
        peer.send(type="cacheStats", enabled=number == 0, **STATS)
    stats = sorted((future.result(DEADLINE) for future in asking), key=lambda s: s.enabled)
    assert stats == [CacheStats(enabled, 1, 2, 3, 4, 5, 6, 7) for enabled in (False, True)]

    refused = in_thread(db.cache_stats)
    peer.send(type="error", queryId=peer.receive()["queryId"], error="no", code="bad_request")
    assert isinstance(failure(refused), RequestFailed)

    again = in_thread(db.cache_stats)
    peer.receive()
    peer.lose()
    peer = scripted.peer()
    peer.receive()
    peer.send(type="cacheStats", **STATS)
    assert again.result(DEADLINE).enabled
    assert waiting_requests(db) == []


def test_each_gets_the_reply_with_its_id(db: Client, peer: Peer) -> None:
    asking = [in_thread(db.cache_stats) for _ in range(2)]
    ids = [peer.receive()["queryId"] for _ in asking]
    for query_id in ids:
        peer.send(type="cacheStats", queryId=query_id, **{**STATS, "hits": query_id})
    assert {future.result(DEADLINE).hits for future in asking} == set(ids)

    opening = in_thread(lambda: db.watch(["t"]))
    first = peer.receive()["queryId"]
    peer.send(type="error", queryId=first, error="no", code="bad_request")
    assert isinstance(failure(opening), RequestFailed)
    opening = in_thread(lambda: db.watch(["u"]))
    assert peer.receive() == {"type": "unwatch"}
    second = peer.receive()["queryId"]
    # Late replies to the first one are not for the second.
    peer.send(type="watching", queryId=first, versions={"t": 1}, version="v1")
    peer.send(type="error", queryId=first, error="no", code="bad_request")
    peer.send(type="watching", queryId=second, versions={"u": 2}, version="v2")
    peer.send(type="unwatched", queryId=first)
    changes = opening.result(DEADLINE)
    assert (changes.versions, changes.version) == ({"u": 2}, "v2")
    peer.changed({"u": 3}, "v3")
    assert next(changes).tables == {"u": 3}


# Watches


def watch(db: Client, peer: Peer, *arguments: Any, **options: Any) -> Watch:
    opening = in_thread(lambda: db.watch(*arguments, **options))
    assert peer.receive()["type"] == "watch"
    peer.send(type="watching", versions={"t": 3}, version="v3")
    opened: Watch = opening.result(DEADLINE)
    return opened


def test_changes(db: Client, peer: Peer) -> None:
    with watch(db, peer) as changes:
        assert (changes.versions, changes.version) == ({"t": 3}, "v3")
        peer.changed({"t": 4}, "v4")
        assert next(changes) == Change({"t": 4}, "insert", "v4", False)
        peer.changed({}, "v5", op="change", resync=True)
        assert changes.next(DEADLINE) == Change({}, "change", "v5", True)
        assert (changes.versions, changes.version) == ({"t": 4}, "v5")
        with pytest.raises(TimeoutError):
            changes.next(0)
        peer.changed({"u": 6}, "v6")
        assert changes.next(DEADLINE).tables == {"u": 6}
    assert peer.receive() == {"type": "unwatch"}
    assert list(changes) == []
    with pytest.raises(RuntimeError, match="closed"):
        changes.next()
    assert waiting_requests(db) == []


@pytest.mark.parametrize(
    ("tables", "sent"), [("*", "*"), ("t", ["t"]), (("t", "s.u"), ["t", "s.u"])]
)
def test_what_is_watched(db: Client, peer: Peer, tables: Any, sent: Any) -> None:
    opening = in_thread(lambda: db.watch(tables, since="v1"))
    asked = peer.receive()
    assert (asked["tables"], asked["since"]) == (sent, "v1")
    peer.send(type="watching", versions={"t": 3}, version="v3")
    changes = opening.result(DEADLINE)
    # What was missed follows, and until then it is not seen.
    assert changes.version == "v1"
    peer.changed({"t": 3}, "v3")
    assert changes.next(DEADLINE) == Change({"t": 3}, "insert", "v3", False)


def test_unread_changes_are_one(db: Client, peer: Peer) -> None:
    changes = watch(db, peer)
    for version in range(4, 100):
        peer.changed({"t": version, f"u{version % 2}": version}, f"v{version}")
    delivered(db, peer)
    assert next(changes) == Change({"t": 99, "u0": 98, "u1": 99}, "insert", "v99", False)
    peer.changed({"t": 100}, "v100", resync=True)
    peer.changed({"t": 101}, "v101", op="delete")
    delivered(db, peer)
    assert next(changes) == Change({"t": 101}, "change", "v101", True)


def test_one_watch_for_each_client(db: Client, peer: Peer) -> None:
    changes = watch(db, peer)
    with pytest.raises(RuntimeError, match="close that watch first"):
        db.watch("t")
    changes.close()
    assert peer.receive() == {"type": "unwatch"}
    second = watch(db, peer, "t")
    # Not of this watch, and dropped with the first one.
    del changes
    gc.collect()
    del second
    gc.collect()
    assert peer.receive() == {"type": "unwatch"}
    peer.changed({"t": 9}, "v9")
    third = watch(db, peer)
    peer.changed({"t": 10}, "v10")
    assert next(third).version == "v10"


def test_what_was_missed_is_not_known(db: Client, peer: Peer) -> None:
    opening = in_thread(lambda: db.watch(since="v1"))
    peer.receive()
    peer.send(type="watching", versions={"t": 3}, version="v3", resync=True)
    changes = opening.result(DEADLINE)
    assert (changes.versions, changes.version) == ({"t": 3}, "v1")
    assert next(changes) == Change({}, "change", "v3", True)
    assert changes.version == "v3"
    with pytest.raises(TimeoutError):
        changes.next(0)


def test_a_watch_that_is_refused(db: Client, peer: Peer) -> None:
    opening = in_thread(lambda: db.watch("1 2"))
    asked = peer.receive()
    peer.send(type="error", queryId=asked["queryId"], error="no name", code="bad_request")
    failed = failure(opening)
    assert isinstance(failed, RequestFailed)
    assert failed.code == "bad_request"
    assert peer.receive() == {"type": "unwatch"}
    watch(db, peer)


def test_a_watch_goes_on_after_a_lost_connection(
    scripted: ScriptedServer, db: Client, peer: Peer
) -> None:
    changes = watch(db, peer, ["t"])
    peer.changed({"t": 4}, "v4")
    delivered(db, peer)
    peer.lose()
    # It was told before.
    assert next(changes).version == "v4"

    waiting = in_thread(lambda: next(changes))
    peer = scripted.peer()
    asked = peer.receive()
    assert (asked["tables"], asked["since"]) == (["t"], "v4")
    peer.send(type="watching", versions={"t": 6}, version="v6")
    peer.changed({"t": 6}, "v6", op="update")
    assert waiting.result(DEADLINE) == Change({"t": 6}, "update", "v6", False)

    waiting = in_thread(lambda: next(changes))
    peer.lose()
    peer = scripted.peer()
    assert peer.receive()["since"] == "v6"
    peer.send(type="watching", versions={"t": 1}, version="w1", resync=True)
    assert waiting.result(DEADLINE) == Change({}, "change", "w1", True)
    assert (changes.versions, changes.version) == ({"t": 1}, "w1")


def test_a_live_query_outlasts_a_server_that_stops(
    scripted: ScriptedServer, db: Client, peer: Peer
) -> None:
    live, query_id = begun(db, peer)
    assert live.next().to_arrow().equals(ONE)
    waiting = in_thread(lambda: next(live))
    peer.send(type="error", queryId=query_id, error="stopping", code="shutting_down")
    peer.lose()
    peer = scripted.peer()
    peer.arrow(TWO, queryId=peer.receive()["queryId"], seq=0)
    assert waiting.result(DEADLINE).to_arrow().equals(TWO)


def test_no_server_any_more(
    scripted: ScriptedServer, db: Client, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.needs._LONGEST_PAUSE_S", 0.01)
    changes = watch(db, peer)
    db._url = "ws://127.0.0.1:9"
    peer.lose()
    with pytest.raises(ConnectionLost):
        next(changes)
    db._url = scripted.url
    waiting = in_thread(lambda: next(changes))
    peer = scripted.peer()
    assert peer.receive()["since"] == "v3"
    peer.send(type="watching", versions={}, version="v1", resync=True)
    assert waiting.result(DEADLINE).resync


def test_no_server_in_time(
    scripted: ScriptedServer, db: Client, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.needs._FIRST_PAUSE_S", 1000)
    changes = watch(db, peer)
    peer.lose()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            changes.next(0.001)


def test_a_client_that_is_closed_ends_what_waits(db: Client, peer: Peer) -> None:
    changes = watch(db, peer)
    waiting = in_thread(lambda: next(changes))
    db.close()
    assert isinstance(failure(waiting), ConnectionLost)


# Live queries


def begun(db: Client, peer: Peer, **options: Any) -> tuple[Live, Any]:
    """A live query whose first result is ONE, and its id."""
    opening = in_thread(lambda: db.live("from t", **options))
    asked = peer.receive()
    assert (asked["type"], asked["sql"]) == ("live", "from t")
    peer.arrow(ONE, queryId=asked["queryId"], seq=0)
    return opening.result(DEADLINE), asked["queryId"]


def test_live_results(db: Client, peer: Peer) -> None:
    live, query_id = begun(db, peer)
    with live:
        first = next(live)
        assert first.schema == ONE.schema
        assert first.query_id == query_id
        assert first.to_pylist() == [{"a": 1}]
        assert [batch.num_rows for batch in first] == [1]
        assert not first.truncated
        assert not first.cached
        assert not first.cancel()
        with pytest.raises(TimeoutError):
            live.next(0)
        peer.arrow(TWO, queryId=query_id, seq=1, truncated=True)
        second = live.next(DEADLINE)
        assert second.to_arrow().equals(TWO)
        assert second.truncated
        first.close()
    assert peer.receive() == {"type": "cancel", "queryId": query_id}
    assert list(live) == []
    peer.arrow(THREE, queryId=query_id, seq=2)
    peer.send(type="error", queryId=query_id, error="cancelled", code="cancelled")
    peer.send(type="cancelAck", queryId=query_id, cancelled=True)
    delivered(db, peer)
    assert waiting_requests(db) == []


def test_options_of_live_queries(db: Client, peer: Peer) -> None:
    opening = in_thread(
        lambda: db.live("from t", [1], max_rows=5, compression="lz4", timeout=DEADLINE)
    )
    asked = peer.receive()
    query_id = asked["queryId"]
    assert asked == {
        "type": "live",
        "sql": "from t",
        "queryId": query_id,
        "params": [1],
        "maxRows": 5,
        "compression": "lz4",
        "timeoutMs": 1000 * DEADLINE,
    }
    peer.arrow(ONE.slice(0, 0), queryId=query_id, seq=0)
    assert opening.result(DEADLINE).next().to_arrow().num_rows == 0


def test_who_is_slow_gets_the_latest_result(db: Client, peer: Peer) -> None:
    live, query_id = begun(db, peer)
    for seq in range(1, 50):
        peer.arrow(TWO, queryId=query_id, seq=seq)
    peer.arrow(THREE, queryId=query_id, seq=50)
    delivered(db, peer)
    assert next(live).to_arrow().equals(THREE)
    with pytest.raises(TimeoutError):
        live.next(0)


def test_the_latest_result_comes_before_the_error(db: Client, peer: Peer) -> None:
    for more in ((), (TWO,)):
        live, query_id = begun(db, peer)
        for table in more:
            peer.arrow(table, queryId=query_id, seq=1)
        peer.send(type="error", queryId=query_id, error="no table t", code="query_error")
        delivered(db, peer)
        assert next(live).to_arrow().equals((ONE, *more)[-1])
        with pytest.raises(RequestFailed, match="no table t") as failed:
            next(live)
        assert failed.value.code == "query_error"
        assert list(live) == []
        assert waiting_requests(db) == []


def test_a_live_query_that_is_refused(db: Client, peer: Peer) -> None:
    opening = in_thread(lambda: db.live("select now()"))
    asked = peer.receive()
    peer.send(type="error", queryId=asked["queryId"], error="a function", code="bad_request")
    assert isinstance(failure(opening), RequestFailed)
    assert waiting_requests(db) == []


def test_a_refusal_without_an_id_is_not_for_what_goes_on(db: Client, peer: Peer) -> None:
    changes = watch(db, peer)
    live, query_id = begun(db, peer)
    asking = in_thread(lambda: db.rows("too long"))
    peer.receive()
    peer.send(type="error", error="too long", code="too_large")
    assert isinstance(failure(asking), RequestFailed)
    assert next(live).to_arrow().equals(ONE)
    peer.arrow(TWO, queryId=query_id, seq=1)
    assert next(live).to_arrow().equals(TWO)
    peer.changed({"t": 4}, "v4")
    assert next(changes).version == "v4"


def test_several_live_queries(db: Client, peer: Peer) -> None:
    (one, first), (other, second) = begun(db, peer), begun(db, peer)
    assert first != second
    peer.arrow(TWO, queryId=second, seq=1)
    peer.arrow(THREE, queryId=first, seq=1)
    delivered(db, peer)
    assert next(one).to_arrow().equals(THREE)
    assert next(other).to_arrow().equals(TWO)


def test_a_live_query_that_is_dropped_is_cancelled(db: Client, peer: Peer) -> None:
    live, query_id = begun(db, peer)
    del live
    gc.collect()
    assert peer.receive() == {"type": "cancel", "queryId": query_id}


def test_another_thread_closes_what_waits(db: Client, peer: Peer) -> None:
    live, _ = begun(db, peer)
    changes = watch(db, peer)
    for feed in (live, changes):
        entered = threading.Event()

        def consume(feed: Any = feed, entered: threading.Event = entered) -> int:
            entered.set()
            return len(list(feed))

        waiting = in_thread(consume)
        assert entered.wait(DEADLINE)
        feed.close()
        assert waiting.result(DEADLINE) <= 1


def test_a_live_query_after_a_lost_connection(
    scripted: ScriptedServer, db: Client, peer: Peer
) -> None:
    live, _ = begun(db, peer)
    assert next(live).to_arrow().equals(ONE)
    waiting = in_thread(lambda: next(live))
    peer.lose()
    peer = scripted.peer()
    query_id = peer.receive()["queryId"]
    # What was told before is not told again.
    peer.arrow(ONE, queryId=query_id, seq=0)
    delivered(db, peer)
    assert not waiting.done()
    peer.arrow(TWO, queryId=query_id, seq=1)
    assert waiting.result(DEADLINE).to_arrow().equals(TWO)

    waiting = in_thread(lambda: next(live))
    peer.lose()
    peer = scripted.peer()
    query_id = peer.receive()["queryId"]
    peer.arrow(THREE, queryId=query_id, seq=0)
    assert waiting.result(DEADLINE).to_arrow().equals(THREE)
    # Only the first result after a lost connection is compared.
    peer.arrow(THREE, queryId=query_id, seq=1)
    assert live.next(DEADLINE).to_arrow().equals(THREE)


def test_the_state_that_was_not_read_when_the_connection_was_lost(
    scripted: ScriptedServer, db: Client, peer: Peer
) -> None:
    live, query_id = begun(db, peer)
    peer.arrow(TWO, queryId=query_id, seq=1)
    delivered(db, peer)
    peer.lose()
    assert next(live).to_arrow().equals(TWO)
    waiting = in_thread(lambda: next(live))
    peer = scripted.peer()
    query_id = peer.receive()["queryId"]
    peer.arrow(TWO, queryId=query_id, seq=0)
    peer.send(type="error", queryId=query_id, error="dropped", code="query_error")
    assert isinstance(failure(waiting), RequestFailed)


def test_a_server_that_is_dead_is_noticed_by_the_timeout(
    db: Client, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.table_feeds.GRACE_S", 0.01)
    with pytest.raises(QueryTimeout):
        db.live("from t", timeout=0.01)


def test_an_interrupt_loses_nothing(db: Client, peer: Peer) -> None:
    """Ctrl+C may come when a reply was taken from the inbox."""
    live, query_id = begun(db, peer)
    flow = live._feed.next(None)
    assert next(live).to_arrow().equals(ONE)
    next(flow)
    with pytest.raises(KeyboardInterrupt):
        flow.throw(KeyboardInterrupt())
    assert peer.receive() == {"type": "cancel", "queryId": query_id}
    waiting = in_thread(lambda: next(live))
    again = peer.receive()
    assert again["type"] == "live"
    peer.arrow(TWO, queryId=again["queryId"], seq=0)
    assert waiting.result(DEADLINE).to_arrow().equals(TWO)

    changes = watch(db, peer)
    watching = changes._feed.next(None)
    next(watching)
    peer.changed({"t": 4}, "v4")
    with pytest.raises(KeyboardInterrupt):
        watching.throw(KeyboardInterrupt())
    assert peer.receive() == {"type": "unwatch"}
    seeing = in_thread(lambda: next(changes))
    assert peer.receive()["since"] == "v3"
    peer.send(type="watching", versions={"t": 4}, version="v4")
    peer.changed({"t": 4}, "v4")
    assert seeing.result(DEADLINE).tables == {"t": 4}


INTERRUPTED_ANYWHERE = """
import random
import signal
import sys
from sqlrooms_server.client import connect

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
with connect(sys.argv[1]) as db:
    changes, live = db.watch(), db.live("from t")
    for _ in range(150):
        for feed in (changes, live):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.003))
                try:
                    while True:
                        # Python drops an interrupt that comes in a finalizer.
                        feed.next(0.05)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, TimeoutError):
                pass
    db.cache_stats()
    changes.close()
    live.close()
    db.cache_stats()
    print("usable", flush=True)
"""


def test_ctrl_c_at_any_moment_leaves_the_connection_usable(scripted: ScriptedServer) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_ANYWHERE, scripted.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        peer = scripted.peer()
        try:
            follow(peer)
        finally:
            # Ended already, unless the test has failed.
            process.kill()
        assert process.communicate()[0] == "usable\n"


def follow(peer: Peer) -> None:
    """Answer everything until the client is gone."""
    version = 0
    with suppress(ConnectionClosed):
        while asked := peer.receive():
            version += 1
            query_id = asked.get("queryId")
            match asked["type"]:
                case "watch":
                    peer.send(type="watching", versions={}, version=f"v{version}")
                    peer.changed({"t": version}, f"v{version}")
                case "unwatch":
                    peer.send(type="unwatched")
                case "live":
                    peer.arrow(pa.table({"a": [version]}), queryId=query_id, seq=0)
                    peer.arrow(pa.table({"a": [-version]}), queryId=query_id, seq=1)
                case "cancel":
                    peer.send(type="error", queryId=query_id, error="", code="cancelled")
                    peer.send(type="cancelAck", queryId=query_id, cancelled=True)
                case "cacheStats":
                    peer.send(type="cacheStats", **STATS)


def test_the_same_rows() -> None:
    nan = pa.table({"a": [math.nan, None]})
    assert is_same(nan, pa.table({"a": [math.nan, None]}))
    assert is_same(nan, pa.concat_tables([nan.slice(0, 1), nan.slice(1)]))
    assert not is_same(nan, pa.table({"a": [math.nan, 1.0]}))
    assert not is_same(ONE, pa.table({"a": [1.0]}))


# asyncio


def played(scripted: ScriptedServer, test: Callable[[AsyncClient, Any], Awaitable[None]]) -> None:
    async def within_the_deadline() -> None:
        async with connect_async(scripted.url) as db:
            await asyncio.wait_for(test(db, scripted.peer()), DEADLINE)

    asyncio.run(within_the_deadline())


async def answered(peer: Peer, kind: str) -> Any:
    """Answer the next request, and return its id."""
    asked = await asyncio.to_thread(peer.receive)
    assert asked["type"] == kind
    if kind == "watch":
        peer.send(type="watching", versions={"t": 3}, version="v3")
    elif kind == "cacheStats":
        peer.send(type="cacheStats", **STATS)
    else:
        peer.arrow(ONE, queryId=asked["queryId"], seq=0)
    return asked["queryId"]


def test_async_cache(scripted: ScriptedServer) -> None:
    async def test(db: AsyncClient, peer: Peer) -> None:
        stats, _ = await asyncio.gather(db.cache_stats(), answered(peer, "cacheStats"))
        assert stats.hits == 1
        result, _ = await asyncio.gather(db.query("from t", persist=True), answered(peer, "arrow"))
        assert not result.cached

    played(scripted, test)


def test_async_changes(scripted: ScriptedServer) -> None:
    async def test(db: AsyncClient, peer: Peer) -> None:
        answering = asyncio.create_task(answered(peer, "watch"))
        async with db.watch() as changes:
            await answering
            assert (changes.versions, changes.version) == ({"t": 3}, "v3")
            with pytest.raises(RuntimeError, match="close that watch first"):
                db.watch()
            for version in range(4, 10):
                peer.changed({"t": version}, f"v{version}")
            await asyncio.gather(db.cache_stats(), answered(peer, "cacheStats"))
            async for change in changes:
                assert change == Change({"t": 9}, "insert", "v9", False)
                break
            with pytest.raises(TimeoutError):
                await changes.next(0.001)
            waiting = asyncio.create_task(changes.next())
            peer.lose()
            peer = await asyncio.to_thread(scripted.peer)
            assert (await asyncio.to_thread(peer.receive))["since"] == "v9"
            peer.send(type="watching", versions={}, version="w1", resync=True)
            assert await waiting == Change({}, "change", "w1", True)
        assert await asyncio.to_thread(peer.receive) == {"type": "unwatch"}
        with pytest.raises(RuntimeError, match="closed"):
            await changes.next()

    played(scripted, test)


def test_async_live_queries(scripted: ScriptedServer) -> None:
    async def test(db: AsyncClient, peer: Peer) -> None:
        answering = asyncio.create_task(answered(peer, "live"))
        # Without with or await, it begins with the first result.
        live = db.live("from t", timeout=DEADLINE)
        first = await anext(aiter(live))
        assert await first.to_pylist() == [{"a": 1}]
        assert [batch.num_rows async for batch in first] == [1]
        assert not await first.cancel()
        query_id = await answering

        waiting = asyncio.create_task(live.next())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(peer.receive) == {"type": "cancel", "queryId": query_id}
        answering = asyncio.create_task(answered(peer, "live"))
        waiting = asyncio.create_task(live.next())
        query_id = await answering
        peer.arrow(TWO, queryId=query_id, seq=1)
        assert (await (await waiting).to_arrow()).equals(TWO)

        seen: list[Any] = []

        async def consume() -> None:
            async for result in live:
                seen.append(result)

        consuming = asyncio.create_task(consume())
        await asyncio.sleep(0)
        await live.close()
        await consuming
        assert seen == []
        assert await asyncio.to_thread(peer.receive) == {"type": "cancel", "queryId": query_id}

        opening = asyncio.ensure_future(_opened(db))
        asked = await asyncio.to_thread(peer.receive)
        peer.send(type="error", queryId=asked["queryId"], error="no", code="bad_request")
        with pytest.raises(RequestFailed):
            await opening

    async def _opened(db: AsyncClient) -> Any:
        return await db.live("select now()")

    played(scripted, test)
