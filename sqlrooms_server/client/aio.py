"""The client for asyncio: the callers' tasks run flows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from ssl import SSLContext
from types import TracebackType
from typing import Any, TypeVar, cast

from sqlrooms_server.client import flows, needs
from sqlrooms_server.client.aio_feeds import (
    AsyncLive,
    AsyncObjectWatch,
    AsyncSubscription,
    AsyncWatch,
)
from sqlrooms_server.client.aio_objects import AsyncOpenObject
from sqlrooms_server.client.aio_results import AsyncResult, AsyncSession
from sqlrooms_server.client.aio_streams import AsyncBatchStream
from sqlrooms_server.client.aio_wire import Wire, receive
from sqlrooms_server.client.blocks import AsyncBlock
from sqlrooms_server.client.errors import ConnectionLost
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.objects import Fetched, Wanted
from sqlrooms_server.client.plugin_replies import (
    ObjectList,
)
from sqlrooms_server.client.replies import (
    CacheStats,
    MemberList,
)
from sqlrooms_server.client.results import RowList
from sqlrooms_server.client.streams import as_reader
from sqlrooms_server.client.sync import ProgressOption
from sqlrooms_server.client.values import Parameters

T = TypeVar("T")


def connect_async(
    url: str = "ws://localhost:4000",
    *,
    token: str | None = None,
    user: str | None = None,
    connect_timeout: float = 10.0,
    ssl: SSLContext | None = None,
) -> _Connecting:
    """Connect to a server: ``async with connect_async(url) as db``, or ``await`` it.

    Arguments and errors are those of ``connect``.
    """
    return _Connecting(AsyncClient(url, token, user, connect_timeout, ssl))


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


class AsyncClient(AsyncBlock):
    """A connection whose methods can be called by several tasks at one time.

    The methods are those of ``Client``, with the same arguments and errors, to be awaited. A task
    that is cancelled during a call cancels it on the server too.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        user: str | None,
        connect_timeout: float,
        ssl: SSLContext | None,
    ) -> None:
        self._url = url
        self._token = token
        self._user = user
        self._connect_timeout = connect_timeout
        self._ssl = ssl
        self._requests = flows.Requests()
        self._connecting = asyncio.Lock()
        self._wire: Wire | None = None

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
        persist: bool = False,
        resume: bool = False,
    ) -> AsyncResult:
        """Run ``sql`` and return its last result as soon as its columns are known."""
        request = self._requests.request(
            "arrow",
            sql,
            params,
            query_id=query_id,
            persist=persist,
            resume=resume,
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
        persist: bool = False,
    ) -> RowList:
        """The last result of ``sql`` as one dictionary for each row, by way of JSON."""
        request = self._requests.request(
            "json",
            sql,
            params,
            query_id=query_id,
            persist=persist,
            timeout=timeout,
            progress=progress,
            max_rows=max_rows,
            session=None if session is None else session._state,
        )
        return RowList(await self._run(self._requests.rows(request)))

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

    def watch(self, tables: str | Sequence[str] = "*", since: str | None = None) -> AsyncWatch:
        """Watch ``tables``: ``async with db.watch() as watch``, or ``await`` it."""
        return AsyncWatch(self, self._requests.watch(tables, since))

    def live(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        max_rows: int | None = None,
        compression: str | None = None,
        timeout: float | None = None,
    ) -> AsyncLive:
        """The result of ``sql``, now and again: ``async with db.live(sql)``, or ``await`` it."""
        request = self._requests.request(
            "live",
            sql,
            params,
            query_id=None,
            timeout=timeout,
            progress=None,
            max_rows=max_rows,
            compression=compression,
        )
        return AsyncLive(self, self._requests.live(request))

    async def notify(
        self, channel: str, payload: Any, to: Mapping[str, str] | None = None
    ) -> int | None:
        """Say ``payload``, any JSON value, to those who hear ``channel``."""
        return await self._run(self._requests.notify(channel, payload, to))

    def subscribe(
        self,
        channel: str,
        *,
        recover: bool = False,
        since: str | None = None,
        presence: bool = False,
    ) -> AsyncSubscription:
        """Hear ``channel``: ``async with db.subscribe(channel) as heard``, or ``await`` it."""
        feed = self._requests.subscribe(channel, recover=recover, since=since, presence=presence)
        return AsyncSubscription(self, feed)

    async def members(self, channel: str) -> MemberList:
        """Who hears ``channel``, for those who do so themselves."""
        return await self._run(self._requests.members(channel))

    @property
    def connection_id(self) -> str | None:
        """Which ``Member`` this client is, as long as its connection lasts."""
        return None if self._wire is None else self._wire.link.connection_id

    async def upload(self, table_name: str, data: Any, mode: str = "replace") -> int:
        """Send ``data`` into ``table_name``, whole or not at all, and return the number of rows.

        A reader is read in the thread of the event loop.
        """
        return await self._run(self._requests.upload(table_name, as_reader(data), mode))

    async def call(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        body: bytes | None = None,
        timeout: float | None = None,
        compression: str | None = None,
        on_event: Callable[[Any], None] | None = None,
        **more: Any,
    ) -> Any:
        """Send a message of the type ``kind`` to the plugin that has it, and return its answer."""
        return await self._run(
            self._requests.call(
                kind,
                {**(fields or {}), **more},
                body=body,
                timeout=timeout,
                compression=compression,
                on_event=on_event,
            )
        )

    def stream(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        inputs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        compression: str | None = None,
        on_event: Callable[[Any], None] | None = None,
        **more: Any,
    ) -> AsyncBatchStream:
        """Begin a stream of batches: ``async with db.stream(kind) as stream``, or ``await`` it.

        An input may be an asynchronous iterable, too; others are read in the thread of the event
        loop.
        """
        stream = self._requests.batch_stream(
            kind,
            {**(fields or {}), **more},
            inputs or {},
            timeout=timeout,
            compression=compression,
            on_event=on_event,
        )
        return AsyncBatchStream(self, stream)

    async def objects(self) -> ObjectList:
        """The objects that are published for this client: a list of ``ObjectInfo``."""
        return await self._run(self._requests.objects())

    def watch_objects(self) -> AsyncObjectWatch:
        """What is published, and again: ``async with db.watch_objects()``, or ``await`` it."""
        return AsyncObjectWatch(self, self._requests.watch_objects())

    async def fetch(
        self, which: Wanted, *, timeout: float | None = None, compression: str | None = None
    ) -> AsyncResult | Fetched:
        """An object: its name, an ``ObjectInfo`` or a ``Reference``."""
        fetched = await self._run(self._requests.fetch(which, timeout, compression))
        return fetched if isinstance(fetched, Fetched) else AsyncResult(self, fetched)

    def open(self, which: Wanted) -> AsyncOpenObject:
        """Open an object: ``async with db.open(name) as stream``, or ``await`` it."""
        return AsyncOpenObject(self, self._requests.open(which))

    async def cache_stats(self) -> CacheStats:
        """What the result cache of the server did, and what it holds."""
        return await self._run(self._requests.cache_stats())

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
        self._requests.client.is_closed = True
        async with self._connecting:
            if self._wire is not None:
                await self._wire.close()

    async def _run(self, flow: needs.Flow[T]) -> T:
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

    async def _get(self, need: needs.Need) -> Any:
        match need:
            case needs.Receive(exchange, deadline):
                return await receive(cast("asyncio.Queue[Any]", exchange.inbox), deadline)
            case needs.Sleep(seconds):
                await asyncio.sleep(seconds)
            case needs.Connect(deadline):
                return await self._connected(deadline)
            case needs.Next(items):
                return await anext(items, None)

    async def _connected(self, deadline: float | None) -> Link:
        async with self._connecting:
            if self._requests.client.is_closed:
                raise ConnectionLost("The client was closed.")
            if self._wire is None or self._wire.link.lost is not None:
                if self._wire is not None:
                    await self._wire.close()
                timeout = self._connect_timeout
                if deadline is not None:
                    timeout = max(0.001, min(timeout, deadline - time.monotonic()))
                wire = Wire()
                await wire.open(self._url, self._token, timeout, self._ssl)
                try:
                    await self._run(needs.greet(wire.link, timeout, self._user))
                except BaseException:
                    await wire.close()
                    raise
                self._wire = wire
            return self._wire.link
