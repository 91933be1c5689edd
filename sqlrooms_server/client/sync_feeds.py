"""Watches, live queries and subscriptions for programs that wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlrooms_server.client import feeds
from sqlrooms_server.client.blocks import Block
from sqlrooms_server.client.plugin_replies import (
    ObjectList,
)
from sqlrooms_server.client.replies import (
    Change,
    Heard,
)
from sqlrooms_server.client.result_streams import Snapshot
from sqlrooms_server.client.results import SubscriptionState, WatchState
from sqlrooms_server.client.sync_results import Result

if TYPE_CHECKING:
    from sqlrooms_server.client.sync import Client

# What a feed tells, and the item that is made of it.
R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound="Feed[Any, Any]")


class Feed(Block, Generic[R, T]):
    """What goes on until it is closed.

    Iterate over it, for one thread at a time; another one may close it, which ends the iteration.
    After a lost connection it goes on by itself; ``ConnectionLost`` is raised when there is no
    server for about ten seconds, and ``RequestFailed`` for what the server refuses.
    """

    def __init__(self, client: Client, feed: feeds.Feed[R]) -> None:
        self._client = client
        self._feed = feed
        client._run(feed.begin())

    def next(self, timeout: float | None = None) -> T:
        """The next item. Raises ``TimeoutError`` when none comes within ``timeout`` seconds, and
        ``RuntimeError`` when this is closed."""
        told = self._client._run(self._feed.next(timeout))
        if told is None:
            raise RuntimeError(f"The {self._feed.what} is closed.")
        return self._item(told)

    def close(self) -> None:
        """End it on the server."""
        self._feed.close()

    def _item(self, told: R) -> T:
        raise NotImplementedError

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        told = self._client._run(self._feed.next(None))
        if told is None:
            raise StopIteration
        return self._item(told)

    def __del__(self) -> None:
        self._feed.abandon()


class Watch(WatchState, Feed[Change, Change]):
    """Changes of tables, told after every commit by anybody on the server.

    Changes that nobody reads are told together later. After a lost connection comes what was
    missed, or one ``Change`` with ``resync``.
    """

    def _item(self, told: Change) -> Change:
        return told


class Live(Feed[Snapshot, Result]):
    """The results of a live query: the present one, and another whenever it has changed.

    Who is slow gets the latest result and misses those before it. After a lost connection the query
    is sent again, and its result is told when it is another one than the last.
    """

    def _item(self, told: Snapshot) -> Result:
        return Result(self._client, told)


class ObjectWatch(Feed[ObjectList, ObjectList]):
    """What plugins have published for this client, and again whenever that has changed.

    Who is slow gets what is published then. After a lost connection it goes on with that, too.
    """

    def _item(self, told: ObjectList) -> ObjectList:
        return told


class Subscription(SubscriptionState, Feed[Heard, Heard]):
    """What is said in a channel: each ``Message`` once, in the order in which it was said.

    With ``presence`` there are ``Joined`` and ``Left`` between them. After a lost connection it
    goes on with what is said then. With ``recover`` what was missed comes first, or one ``Missed``
    in the place of what is gone; with ``presence`` there always is a ``Missed``, after which
    ``members`` tells who is there. 16 MiB may wait for who reads slowly; over that it is as if the
    connection were lost.
    """

    def _item(self, told: Heard) -> Heard:
        return told
