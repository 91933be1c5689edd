"""Watches and live queries for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlrooms_server.client import feeds
from sqlrooms_server.client.messages import Change

if TYPE_CHECKING:
    from sqlrooms_server.client.aio import AsyncClient, AsyncResult


class AsyncWatch:
    """``Watch`` for asyncio: entered by ``async with``, awaited, or only iterated over."""

    def __init__(self, client: AsyncClient, feed: feeds.Watch) -> None:
        self._client = client
        self._feed = feed

    @property
    def versions(self) -> Mapping[str, int]:
        """When each table changed last, as far as it was read here: larger is later, 0 never."""
        return self._feed.versions

    @property
    def version(self) -> str | None:
        """The version of the last change that was read, for ``since`` of a later watch."""
        return self._feed.version

    async def next(self, timeout: float | None = None) -> Change:
        """The next change. Raises ``TimeoutError`` when none comes within ``timeout`` seconds, and
        ``RuntimeError`` when the watch is closed."""
        change = await self._client._run(self._feed.next(timeout))
        if change is None:
            raise RuntimeError("The watch is closed.")
        return change

    async def close(self) -> None:
        """End the watch."""
        self._feed.close()

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        change = await self._client._run(self._feed.next(None))
        if change is None:
            raise StopAsyncIteration
        return change

    def __await__(self) -> Generator[Any, None, AsyncWatch]:
        return self._begun().__await__()

    async def __aenter__(self) -> AsyncWatch:
        return await self._begun()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _begun(self) -> AsyncWatch:
        await self._client._run(self._feed.begin())
        return self

    def __del__(self) -> None:
        self._feed.abandon()


class AsyncLive:
    """``Live`` for asyncio: entered by ``async with``, awaited, or only iterated over."""

    def __init__(self, client: AsyncClient, feed: feeds.Live) -> None:
        self._client = client
        self._feed = feed

    async def next(self, timeout: float | None = None) -> AsyncResult:
        """The next result. Raises ``TimeoutError`` when none comes within ``timeout`` seconds, and
        ``RuntimeError`` when the live query is closed."""
        snapshot = await self._client._run(self._feed.next(timeout))
        if snapshot is None:
            raise RuntimeError("The live query is closed.")
        return self._client._result(snapshot)

    async def close(self) -> None:
        """End the live query."""
        self._feed.close()

    def __aiter__(self) -> AsyncIterator[AsyncResult]:
        return self

    async def __anext__(self) -> AsyncResult:
        snapshot = await self._client._run(self._feed.next(None))
        if snapshot is None:
            raise StopAsyncIteration
        return self._client._result(snapshot)

    def __await__(self) -> Generator[Any, None, AsyncLive]:
        return self._begun().__await__()

    async def __aenter__(self) -> AsyncLive:
        return await self._begun()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _begun(self) -> AsyncLive:
        await self._client._run(self._feed.begin())
        return self

    def __del__(self) -> None:
        self._feed.abandon()
