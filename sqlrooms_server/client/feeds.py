"""What goes on until it is closed: watches and live queries, as flows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import pyarrow as pa

from sqlrooms_server.client.errors import ConnectionLost, QueryTimeout, RequestFailed
from sqlrooms_server.client.link import Exchange, Link
from sqlrooms_server.client.messages import (
    WATCH,
    Change,
    Chunk,
    Done,
    Key,
    Reply,
    Watching,
    encode,
)
from sqlrooms_server.client.needs import (
    ClientState,
    Flow,
    Receive,
    Sleep,
    checked,
    connected,
    pauses,
)
from sqlrooms_server.client.queries import GRACE_S, Attempts, Request, Snapshot
from sqlrooms_server.client.streams import decoded, is_same

T = TypeVar("T")

# What connecting again may take beyond the time that ``next`` was given: with less it might never
# succeed.
_CONNECT_S = 1.0


class Feed(Generic[T]):
    """Items that come until it is closed or the server ends it.

    | exchange | ready | what ``next`` does |
    |---|---|---|
    | none | none | connects and subscribes: at first, after a lost connection or an interrupt |
    | open | none | waits for a reply |
    | either | a reply | takes it, or what has come after it |

    One thread or task at a time takes items; others may close it.
    """

    what = "feed"

    def __init__(self, client: ClientState, new_id: Callable[[], int]) -> None:
        self.is_closed = False
        self._client = client
        self._new_id = new_id
        self._link: Link | None = None
        self._exchange: Exchange | None = None
        self._ready: Reply | None = None
        self._has_begun = False
        self._pauses = pauses()
        self._resume_at = 0.0

    def begin(self) -> Flow[None]:
        """Subscribe, and wait for the first answer. Does nothing the second time."""
        if not self._has_begun:
            self._has_begun = True
            try:
                self._ready = yield from self._begun()
            except BaseException:
                self.abandon()
                raise

    def next(self, timeout: float | None) -> Flow[T | None]:
        """The next item, None when it was closed.

        Raises ``TimeoutError`` after ``timeout`` seconds; the item is then still to come.
        """
        self._has_begun = True
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while (reply := (yield from self._reply(deadline))) is not None:
                item = self._take(reply)
                if item is not None:
                    return item
        except (TimeoutError, ConnectionLost, RequestFailed):
            raise
        except BaseException:
            # Interrupted. A reply may have been taken from the inbox that nobody has seen.
            self._unsubscribe()
            raise
        return None

    def close(self) -> None:
        """End it on the server, and wake who waits for an item."""
        exchange = self._exchange
        self.abandon()
        if exchange is not None:
            exchange.inbox.put_nowait(Done(0))

    def abandon(self) -> None:
        """End it on the server. Never waits, and may be called by a finalizer."""
        self.is_closed = True
        self._unsubscribe()

    def _begun(self) -> Flow[Reply | None]:
        """What ``begin`` leaves for the first ``next``."""
        return (yield from self._reply(None))

    def _key(self) -> Key:
        """The kind and id of the next request."""
        raise NotImplementedError

    def _message(self) -> str:
        """The next request."""
        raise NotImplementedError

    def _take(self, reply: Reply) -> T | None:
        """The item of ``reply``; None when it has nothing to tell."""
        raise NotImplementedError

    def _reply(self, deadline: float | None) -> Flow[Reply | None]:
        while not self.is_closed:
            try:
                reply = checked((yield from self._latest(deadline)))
            except ConnectionLost as error:
                self._lost(error)
            except RequestFailed as error:
                if error.code != "shutting_down":
                    self.abandon()
                    raise
                # Another server may take its place, as after a lost connection.
                self._lost(ConnectionLost(str(error)))
            else:
                self._pauses = pauses()
                return None if self.is_closed else reply
        return None

    def _lost(self, error: ConnectionLost) -> None:
        """Make the next attempt wait, or raise ``error``."""
        self._unsubscribe()
        pause = next(self._pauses, None)
        if pause is None or self._client.is_closed:
            self._pauses = pauses()
            raise error
        self._resume_at = time.monotonic() + pause

    def _latest(self, deadline: float | None) -> Flow[Reply]:
        if self._ready is None and self._exchange is None:
            yield from self._subscribe(deadline)
        ready, exchange = self._ready, self._exchange
        if ready is not None and (exchange is None or exchange.inbox.empty()):
            self._ready = None
            return ready
        if exchange is None:
            return Done(0)
        reply: Reply | None = yield Receive(exchange, deadline)
        if reply is None:
            raise TimeoutError(f"The {self.what} had nothing to tell in time.")
        self._ready = None
        if ready is None or isinstance(reply, Chunk):
            return reply
        self._ready = reply
        return ready

    def _subscribe(self, deadline: float | None) -> Flow[None]:
        now = time.monotonic()
        if deadline is not None and deadline < self._resume_at:
            yield Sleep(max(0, deadline - now))
            raise TimeoutError(f"The {self.what} has lost its connection.")
        if now < self._resume_at:
            yield Sleep(self._resume_at - now)
        if deadline is not None:
            deadline = max(deadline, time.monotonic() + _CONNECT_S)
        link = yield from connected(deadline)
        if self.is_closed:
            return
        # Known here before it is sent, so that an interrupt never leaves it behind on the server.
        self._link = link
        self._exchange = link.open(self._key(), is_feed=True)
        link.send(self._message())
        if self.is_closed:
            self._unsubscribe()

    def _unsubscribe(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._ready = None
        if exchange is not None and self._link is not None:
            self._link.abandon(exchange)


class Watch(Feed[Change]):
    """Changes of tables."""

    what = "watch"

    def __init__(
        self,
        client: ClientState,
        new_id: Callable[[], int],
        tables: str | Sequence[str],
        since: str | None,
    ) -> None:
        super().__init__(client, new_id)
        self.version = since
        self.versions: dict[str, int] = {}
        self._query_id = 0
        self._tables = "*" if tables == "*" else [tables] if isinstance(tables, str) else [*tables]

    def _begun(self) -> Flow[Reply | None]:
        is_first = self.version is None
        reply = yield from self._reply(None)
        if isinstance(reply, Watching):
            self._learn(reply)
        return None if is_first else reply

    def _key(self) -> Key:
        self._query_id = self._new_id()
        return WATCH, self._query_id

    def _message(self) -> str:
        return encode(type=WATCH, queryId=self._query_id, tables=self._tables, since=self.version)

    def _take(self, reply: Reply) -> Change | None:
        if isinstance(reply, Watching):
            is_first = self.version is None
            self._learn(reply)
            if is_first or not reply.resync:
                return None
            reply = Change({}, "change", reply.version, True)
        assert isinstance(reply, Change)
        self.versions.update(reply.tables)
        self.version = reply.version
        return reply

    def _learn(self, reply: Watching) -> None:
        if reply.resync or not self.versions:
            self.versions = dict(reply.versions)
        if self.version is None:
            # Otherwise what was missed follows, or is told by ``_take``, and is not seen yet.
            self.version = reply.version


class Live(Feed[Snapshot]):
    """The results of a query, the latest always, others as the consumer has time for them."""

    what = "live query"

    def __init__(self, client: ClientState, new_id: Callable[[], int], request: Request) -> None:
        super().__init__(client, new_id)
        self._request = request
        self._last: pa.Table | None = None
        self._is_subscribed_again = False

    def _begun(self) -> Flow[Reply | None]:
        timeout = self._request.timeout
        deadline = None if timeout is None else time.monotonic() + timeout + GRACE_S
        try:
            return (yield from self._reply(deadline))
        except TimeoutError:
            raise QueryTimeout("The server did not answer in time.") from None

    def _key(self) -> Key:
        self._is_subscribed_again = self._last is not None
        self._request.query_id = self._new_id()
        return "query", self._request.query_id

    def _message(self) -> str:
        return self._request.message(self._request.timeout)

    def _take(self, reply: Reply) -> Snapshot | None:
        if not isinstance(reply, Chunk):
            self._unsubscribe()
            raise ConnectionLost("The server answered a live query with what is no table.")
        table = decoded(reply.body)
        if self._is_subscribed_again and self._last is not None:
            self._is_subscribed_again = False
            if is_same(table, self._last):
                return None
        self._last = table
        # The request of the next subscription has another id.
        attempts = Attempts(self._client, replace(self._request))
        return Snapshot(attempts, table, reply.truncated)
