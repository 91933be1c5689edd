"""What goes on until it is closed, as a flow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from sqlrooms_server.client.errors import ConnectionLost, RequestFailed
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.needs import (
    ClientState,
    Flow,
    Receive,
    Sleep,
    checked,
    connected,
    pauses,
)
from sqlrooms_server.client.replies import Chunk, Done, Reply

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
            self._interrupted()
            raise
        return None

    def close(self) -> None:
        """End it on the server, and wake who waits for an item."""
        exchange = self._exchange
        self.abandon()
        if exchange is not None:
            exchange.finish(Done(0))

    def abandon(self) -> None:
        """End it on the server. Never waits, and may be called by a finalizer."""
        self.is_closed = True
        self._unsubscribe()

    def _begun(self) -> Flow[Reply | None]:
        """What ``begin`` leaves for the first ``next``."""
        return (yield from self._reply(None))

    def _open(self, link: Link) -> Exchange:
        """What waits for replies to the next request."""
        raise NotImplementedError

    def _send(self, link: Link) -> None:
        """Send that request."""
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
        self._exchange = self._open(link)
        self._send(link)
        if self.is_closed:
            self._unsubscribe()

    def _interrupted(self) -> None:
        # A reply may have been taken from the inbox that nobody has seen.
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._ready = None
        if exchange is not None and self._link is not None:
            self._link.abandon(exchange)
