"""Watches, live queries and subscriptions for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlrooms_server.client import feeds
from sqlrooms_server.client.aio_results import AsyncResult
from sqlrooms_server.client.blocks import Begun
from sqlrooms_server.client.plugin_replies import (
    ObjectList,
)
from sqlrooms_server.client.replies import (
    Change,
    Heard,
)
from sqlrooms_server.client.result_streams import Snapshot
from sqlrooms_server.client.results import SubscriptionState, WatchState

if TYPE_CHECKING:
    from sqlrooms_server.client.aio import AsyncClient

# What a feed tells, and the item that is made of it.
R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound="AsyncFeed[Any, Any]")


class AsyncFeed(Begun, Generic[R, T]):
    """``Feed`` for asyncio: entered by ``async with``, awaited, or only iterated over."""

    def __init__(self, client: AsyncClient, feed: feeds.Feed[R]) -> None:
        self._client = client
        self._feed = feed

    async def next(self, timeout: float | None = None) -> T:
        """The next item. Raises ``TimeoutError`` when none comes within ``timeout`` seconds, and
        ``RuntimeError`` when this is closed."""
        told = await self._client._run(self._feed.next(timeout))
        if told is None:
            raise RuntimeError(f"The {self._feed.what} is closed.")
        return self._item(told)

    async def close(self) -> None:
        """End it on the server."""
        self._feed.close()

    def _item(self, told: R) -> T:
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        told = await self._client._run(self._feed.next(None))
        if told is None:
            raise StopAsyncIteration
        return self._item(told)

    async def _begun(self: F) -> F:
        await self._client._run(self._feed.begin())
        return self

    def __del__(self) -> None:
        self._feed.abandon()


class AsyncWatch(WatchState, AsyncFeed[Change, Change]):
    """``Watch`` for asyncio."""

    def _item(self, told: Change) -> Change:
        return told


class AsyncLive(AsyncFeed[Snapshot, AsyncResult]):
    """``Live`` for asyncio."""

    def _item(self, told: Snapshot) -> AsyncResult:
        return AsyncResult(self._client, told)


class AsyncObjectWatch(AsyncFeed[ObjectList, ObjectList]):
    """``ObjectWatch`` for asyncio."""

    def _item(self, told: ObjectList) -> ObjectList:
        return told


class AsyncSubscription(SubscriptionState, AsyncFeed[Heard, Heard]):
    """``Subscription`` for asyncio."""

    def _item(self, told: Heard) -> Heard:
        return told
