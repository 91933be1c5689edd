"""The client for asyncio: two tasks send and receive, the callers' tasks run flows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar, cast

import pyarrow as pa
import ujson
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, WebSocketException

from sqlrooms_server.client import flows
from sqlrooms_server.client.errors import ConnectionLost, RequestFailed
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.opening import CLOSE_TIMEOUT_S, headers, refused, to_pandas
from sqlrooms_server.client.results import ResultState
from sqlrooms_server.client.streams import as_reader
from sqlrooms_server.client.sync import ProgressOption
from sqlrooms_server.client.values import Parameters

T = TypeVar("T")


def connect_async(
    url: str = "ws://localhost:4000", *, token: str | None = None, connect_timeout: float = 10.0
) -> _Connecting:
    """Connect to a server: ``async with connect_async(url) as db``, or ``await`` it.

    Arguments and errors are those of ``connect``.
    """
    return _Connecting(AsyncClient(url, token, connect_timeout))


class _Connecting:
    """Either awaited or entered."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def __await__(self) -> Generator[Any, None, AsyncClient]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncClient:
        return await self._open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def _open(self) -> AsyncClient:
        await self._client._connected(None)
        return self._client


class AsyncClient:
    """A connection whose methods can be called by several tasks at one time.

    The methods are those of ``Client``, with the same arguments and errors, to be awaited. A task
    that is cancelled during a call cancels it on the server too.
    """

    def __init__(self, url: str, token: str | None, connect_timeout: float) -> None:
        self._url = url
        self._token = token
        self._connect_timeout = connect_timeout
        self._requests = flows.Requests()
        self._connecting = asyncio.Lock()
        self._wire: _Wire | None = None

    async def query(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        timeout: float | None = None,
        max_rows: int | None = None,
        session: AsyncSession | None = None,
        compression: str | None = None,
        progress: ProgressOption = None,
        query_id: str | None = None,
    ) -> AsyncResult:
        """Run ``sql`` and return its last result as soon as its columns are known."""
        request = self._requests.request(
            "arrow",
            sql,
            params,
            query_id=query_id,
            timeout=timeout,
            progress=progress,
            max_rows=max_rows,
            session=None if session is None else session._state,
            compression=compression,
        )
        return AsyncResult(self, await self._run(self._requests.stream(request)))

    async def rows(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        timeout: float | None = None,
        max_rows: int | None = None,
        session: AsyncSession | None = None,
        progress: ProgressOption = None,
        query_id: str | None = None,
    ) -> list[dict[str, Any]]:
        """The last result of ``sql`` as one dictionary for each row, by way of JSON."""
        request = self._requests.request(
            "json",
            sql,
            params,
            query_id=query_id,
            timeout=timeout,
            progress=progress,
            max_rows=max_rows,
            session=None if session is None else session._state,
        )
        data = await self._run(self._requests.rows(request))
        return cast(list[dict[str, Any]], ujson.loads(data))

    async def execute(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        timeout: float | None = None,
        session: AsyncSession | None = None,
        progress: ProgressOption = None,
        query_id: str | None = None,
    ) -> None:
        """Run ``sql``, one or several statements, without their results."""
        request = self._requests.request(
            "exec",
            sql,
            params,
            query_id=query_id,
            timeout=timeout,
            progress=progress,
            session=None if session is None else session._state,
        )
        await self._run(self._requests.execute(request))

    async def upload(self, table_name: str, data: Any, mode: str = "replace") -> int:
        """Send ``data`` into ``table_name``, whole or not at all, and return the number of rows.

        A reader is read in the thread of the event loop.
        """
        return await self._run(self._requests.upload(table_name, as_reader(data), mode))

    async def cancel(self, query: AsyncResult | str) -> bool:
        """Cancel a query by its result or ``query_id``; False when it is not under way."""
        if isinstance(query, AsyncResult):
            return await self._run(self._requests.cancel(query.query_id, query._stream.link))
        link = self._wire.link if self._wire is not None else None
        return await self._run(self._requests.cancel(query, link))

    def session(self, name: str | None = None) -> AsyncSession:
        """A session of queries that share temporary tables, settings and a transaction."""
        return AsyncSession(self, self._requests.new_session(name))

    async def close(self) -> None:
        """Close the connection; the server cancels what is still under way."""
        self._requests.is_closed = True
        async with self._connecting:
            if self._wire is not None:
                await self._wire.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, flow: flows.Flow[T]) -> T:
        try:
            need = next(flow)
            while True:
                try:
                    got = await self._get(need)
                except BaseException as error:  # handed to the flow, which cancels
                    need = flow.throw(error)
                else:
                    need = flow.send(got)
        except StopIteration as end:
            return cast(T, end.value)

    async def _get(self, need: flows.Need) -> Any:
        match need:
            case flows.Receive(exchange, deadline):
                return await _receive(cast("asyncio.Queue[Any]", exchange.inbox), deadline)
            case flows.Sleep(seconds):
                await asyncio.sleep(seconds)
            case flows.Connect(deadline):
                return await self._connected(deadline)

    async def _connected(self, deadline: float | None) -> Link:
        async with self._connecting:
            if self._requests.is_closed:
                raise ConnectionLost("The client was closed.")
            if self._wire is None or self._wire.link.lost is not None:
                if self._wire is not None:
                    await self._wire.close()
                timeout = self._connect_timeout
                if deadline is not None:
                    timeout = max(0.001, min(timeout, deadline - time.monotonic()))
                wire = _Wire()
                await wire.open(self._url, self._token, timeout)
                try:
                    await self._run(flows.greet(wire.link, timeout))
                except BaseException:
                    await wire.close()
                    raise
                self._wire = wire
            return self._wire.link


class AsyncResult(ResultState):
    """The result of a query, whose batches arrive while it is read: ``Result`` for asyncio."""

    def __init__(self, client: AsyncClient, stream: flows.Stream) -> None:
        super().__init__(stream)
        self._client = client

    async def to_arrow(self) -> pa.Table:
        """The whole result. Raises ``RuntimeError`` when batches of it were taken already."""
        if self._table is None:
            self._table = await self._client._run(self._stream.table())
        return self._table

    async def to_pandas(self) -> Any:
        """The whole result as a DataFrame. Raises ``ImportError`` without the extra ``pandas``."""
        return to_pandas(await self.to_arrow())

    async def to_pylist(self) -> list[dict[str, Any]]:
        """The whole result as one dictionary for each row."""
        return cast(list[dict[str, Any]], (await self.to_arrow()).to_pylist())

    async def cancel(self) -> bool:
        """Cancel the query; False when it has ended. Reading then raises ``RequestFailed``."""
        return await self._client.cancel(self)

    async def close(self) -> None:
        """Cancel what has not arrived."""
        self._stream.abandon()

    async def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        if self._table is not None:
            for batch in self._table.to_batches():
                yield batch
            return
        while (batch := await self._client._run(self._stream.next_batch())) is not None:
            yield batch

    async def __aenter__(self) -> AsyncResult:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncSession:
    """Queries that share one cursor of the server: ``Session`` for asyncio."""

    def __init__(self, client: AsyncClient, state: flows.Session) -> None:
        self._client = client
        self._state = state

    @property
    def name(self) -> str:
        """The name of the session on its connection."""
        return self._state.name

    async def query(
        self, sql: str, params: Parameters | None = None, **options: Any
    ) -> AsyncResult:
        """Like ``AsyncClient.query``, in this session."""
        return await self._client.query(sql, params, session=self, **options)

    async def rows(
        self, sql: str, params: Parameters | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Like ``AsyncClient.rows``, in this session."""
        return await self._client.rows(sql, params, session=self, **options)

    async def execute(self, sql: str, params: Parameters | None = None, **options: Any) -> None:
        """Like ``AsyncClient.execute``, in this session."""
        await self._client.execute(sql, params, session=self, **options)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """``BEGIN``, and at the end of the block ``COMMIT``, or ``ROLLBACK`` when it raises."""
        await self.execute("BEGIN")
        try:
            yield self
        except BaseException:
            # A session that ended was rolled back by the server.
            with suppress(RequestFailed, ConnectionLost):
                await self.execute("ROLLBACK")
            raise
        await self.execute("COMMIT")

    async def close(self) -> bool:
        """End the session and roll back what is open; False when it had ended already."""
        return await self._client._run(self._client._requests.close_session(self._state))

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class _Wire:
    """One WebSocket and its two tasks."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[str | bytes] = asyncio.Queue()
        self._stack = AsyncExitStack()
        self.link = Link(self._post, asyncio.Queue)

    async def open(self, url: str, token: str | None, timeout: float) -> None:
        try:
            opening = connect_websocket(
                url,
                additional_headers=headers(token),
                compression=None,
                max_size=None,
                open_timeout=timeout,
                close_timeout=CLOSE_TIMEOUT_S,
            )
            socket = await self._stack.enter_async_context(opening)
        except WebSocketException as error:
            raise refused(url, error) from error
        except asyncio.TimeoutError:
            # Before Python 3.11 this is no OSError.
            raise ConnectionLost(f"Nothing answers at {url}.") from None
        self._tasks = [
            asyncio.create_task(self._receive(socket)),
            asyncio.create_task(self._send(socket)),
        ]

    async def close(self) -> None:
        await self._stack.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.link.fail("The connection was closed.")

    def _post(self, message: str | bytes) -> None:
        # A finalizer may run in any thread, and after the loop has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._outgoing.put_nowait, message)

    async def _send(self, socket: ClientConnection) -> None:
        # The task that receives knows why the connection closed, and tells.
        with suppress(ConnectionClosed):
            while True:
                await socket.send(await self._outgoing.get())

    async def _receive(self, socket: ClientConnection) -> None:
        reason = "The connection was closed."
        try:
            async for message in socket:
                self.link.receive(message)
        except ConnectionClosed as closed:
            reason = f"The connection was lost: {closed}."
        except (ValueError, LookupError, TypeError) as broken:
            reason = f"The server sent what is no reply: {broken}"
        finally:
            self.link.fail(reason)
        await socket.close()


async def _receive(inbox: asyncio.Queue[Any], deadline: float | None) -> Any:
    if deadline is None or not inbox.empty():
        return await inbox.get()
    try:
        return await asyncio.wait_for(inbox.get(), deadline - time.monotonic())
    except asyncio.TimeoutError:
        return None
