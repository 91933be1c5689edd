"""The client for asyncio, against real servers. What both clients share, ``test_client`` tests."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.client import (
    AsyncClient,
    ConnectionLost,
    Progress,
    QueryTimeout,
    RequestFailed,
    SessionEnded,
    connect_async,
)
from tests.conftest import LocalServer, ServerProcess
from tests.proxy import Proxy
from tests.test_client import LARGE
from tests.test_queries import ENDLESS
from tests.wire import DEADLINE


def run(test: Coroutine[Any, Any, None]) -> None:
    async def within_the_deadline() -> None:
        await asyncio.wait_for(test, DEADLINE)

    asyncio.run(within_the_deadline())


def connected(url: str, test: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def with_client() -> None:
        async with connect_async(url) as db:
            await test(db)

    run(with_client())


class Watch:
    """A progress function that others can wait for."""

    def __init__(self) -> None:
        self.running = asyncio.Event()

    def __call__(self, progress: Progress) -> None:
        if progress.state == "running":
            self.running.set()


def test_queries_and_results(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        result = await db.query("from (values (1), (2)) t(i) where i > $least", {"least": 0})
        assert result.schema.names == ["i"]
        assert (await result.to_arrow()).to_pydict() == {"i": [1, 2]}
        assert await result.to_pylist() == [{"i": 1}, {"i": 2}]
        assert [batch.num_rows async for batch in result] == [2]
        assert result.summary is not None
        assert result.summary.rows == 2
        assert not result.truncated
        assert await db.rows("select ? as a", [1]) == [{"a": 1}]
        assert await db.rows("create table t(i int)") == []
        await db.execute("insert into t values (1)")
        async with await db.query(LARGE) as large:
            async for batch in large:
                assert batch.num_rows
                break
        rows = 0
        async for batch in await db.query("from range(1000000)"):
            rows += batch.num_rows
        assert rows == 1_000_000

    connected(server.url, test)


def test_requests_interleave(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        answers = await asyncio.gather(*(db.rows(f"select {n} as n") for n in range(50)))
        assert answers == [[{"n": n}] for n in range(50)]

    connected(server.url, test)


def test_errors_and_timeouts(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        with pytest.raises(RequestFailed, match="Parser Error"):
            await db.query("selec")
        with pytest.raises(QueryTimeout):
            await db.execute(ENDLESS, timeout=0.1)

    connected(server.url, test)


def test_a_server_that_is_dead_is_noticed_by_the_timeout(
    serve: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.queries.GRACE_S", 0.1)
    server = serve()

    async def test(db: AsyncClient) -> None:
        server.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(QueryTimeout, match="did not answer"):
                await db.query("select 1", timeout=0.1)
        finally:
            server.process.send_signal(signal.SIGCONT)

    connected(server.url, test)


def test_cancelling_a_task_cancels_its_query(launch: Callable[..., LocalServer]) -> None:
    """The server has one worker, so that another query runs only after the first."""

    async def test(db: AsyncClient) -> None:
        for call in (db.query, db.rows, db.execute):
            watch = Watch()
            task = asyncio.create_task(call(ENDLESS, progress=watch))
            await watch.running.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await db.rows("select 1 as a") == [{"a": 1}]

    connected(launch(workers=1).url, test)


def test_cancel_by_id_and_by_result(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        watch = Watch()
        task = asyncio.create_task(db.query(ENDLESS, query_id="mine", progress=watch))
        await watch.running.wait()
        assert await db.cancel("mine")
        with pytest.raises(RequestFailed) as failed:
            await task
        assert failed.value.code == "cancelled"
        result = await db.query(LARGE)
        assert await result.cancel()
        with pytest.raises(RequestFailed):
            await result.to_arrow()

    connected(server.url, test)


def test_results_that_are_left_are_cancelled(launch: Callable[..., LocalServer]) -> None:
    async def test(db: AsyncClient) -> None:
        async with await db.query(LARGE):
            result = await db.query(LARGE)
            del result
            gc.collect()
        while True:
            try:
                assert await db.rows("select 1 as a") == [{"a": 1}]
                break
            except RequestFailed as error:
                assert error.code == "busy"

    connected(launch(max_in_flight=2).url, test)


def test_uploads(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        table = pa.table({"a": range(3_000_000)})
        assert await db.upload("t", table) == 3_000_000
        assert await db.rows("select sum(a)::bigint as s from t") == [{"s": 4_499_998_500_000}]
        with pytest.raises(RequestFailed):
            await db.upload("t", table, mode="create")

    connected(server.url, test)


def test_sessions(server: LocalServer) -> None:
    async def test(db: AsyncClient) -> None:
        await db.execute("create table t(i int)")
        async with db.session() as session:
            async with session.transaction():
                await session.execute("insert into t values (1)")
                assert await db.rows("from t") == []
            with pytest.raises(KeyError):
                async with session.transaction():
                    await session.execute("insert into t values (2)")
                    raise KeyError
            assert await session.rows("from t") == [{"i": 1}]
            assert await (await session.query("from t")).to_pylist() == [{"i": 1}]
        with pytest.raises(SessionEnded):
            await session.execute("select 1")

    connected(server.url, test)


def test_tokens(launch: Callable[..., LocalServer]) -> None:
    server = launch(auth_token="right")

    async def test() -> None:
        db = await connect_async(server.url, token="right")
        assert await db.rows("select 1 as a") == [{"a": 1}]
        await db.close()
        with pytest.raises(ConnectionLost, match="closed"):
            await db.query("select 1")
        with pytest.raises(RequestFailed) as failed:
            await connect_async(server.url, token="wrong")
        assert failed.value.code == "unauthorized"
        with pytest.raises(OSError):
            await connect_async("ws://127.0.0.1:9")

    run(test())


def test_lost_connections(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with Proxy(server.port) as proxy:

        async def test(db: AsyncClient) -> None:
            session = db.session()
            await session.execute("begin")
            watch = Watch()
            reading = asyncio.create_task(db.query(ENDLESS, query_id="mine", progress=watch))
            changing = asyncio.create_task(db.execute(f"create table t as {ENDLESS}"))
            await watch.running.wait()
            watch.running.clear()
            server.stop(signal.SIGKILL)
            with pytest.raises(ConnectionLost):
                await changing
            with pytest.raises(ConnectionLost):
                await db.execute("create table t(i int)")
            proxy.port = serve().port
            await watch.running.wait()
            assert await db.cancel("mine")
            with pytest.raises(RequestFailed):
                await reading
            with pytest.raises(SessionEnded):
                await session.execute("insert into t values (1)")

        connected(proxy.url, test)
