"""One connection without its socket: what was asked, and where the answers go."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from sqlrooms_server.client.messages import (
    CACHE_STATS,
    CHANGES,
    NO_ID,
    WATCH,
    Id,
    Key,
    decode,
    encode,
)
from sqlrooms_server.client.replies import (
    CancelAck,
    Change,
    Chunk,
    Consumed,
    Done,
    Failed,
    Lost,
    Progress,
    Reply,
    Watching,
)

# Some servers answer these without their id. Each reply is then for the last that waits: any is
# good for all of them, and one that Ctrl+C kept from being sent must not take that of another.
_MAYBE_WITHOUT_ID = (CACHE_STATS, WATCH)


class Inbox(Protocol):
    """A queue of replies: ``queue.SimpleQueue`` or ``asyncio.Queue``."""

    def put_nowait(self, item: Any, /) -> None: ...
    def get_nowait(self) -> Any: ...
    def empty(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Exchange:
    """A request that waits for its replies.

    Those to a feed, a watch or a live query, go on until it is abandoned or fails. Unread ones are
    merged, so that at most one and the end wait for a consumer that is slow.
    """

    key: Key
    inbox: Inbox
    is_feed: bool = False
    is_answered: bool = False

    def deliver(self, reply: Reply) -> None:
        """Put ``reply`` into the inbox. Only one thread does that."""
        unread: list[Reply] = []
        if self.is_feed:
            self.is_answered = True
            with suppress(queue.Empty):
                while not self.inbox.empty():
                    unread.append(self.inbox.get_nowait())
        # What is not taken out here has gone to the consumer.
        last = merged(unread[-1], reply) if unread else None
        for item in [*unread, reply] if last is None else [*unread[:-1], last]:
            self.inbox.put_nowait(item)


class Link:
    """The requests of one connection.

    ``send`` hands a message over and never blocks, so that finalizers may call it. There is no
    lock, which a finalizer could meet while its own thread holds it: an exchange is entered before
    ``lost`` is looked at, and ``lost`` is set before the exchanges are.
    """

    def __init__(self, send: Callable[[str | bytes], None], inbox: Callable[[], Inbox]) -> None:
        self.send = send
        self.lost: Lost | None = None
        self.upload_window = 0
        self._new_inbox = inbox
        # None: abandoned, and its id not free before its last reply.
        self._exchanges: dict[Key, Exchange | None] = {}
        self._refusal: Failed | None = None

    def open(self, key: Key, is_feed: bool = False) -> Exchange:
        """Begin to wait for replies to ``key``. Raises ``ValueError`` when it is in use."""
        if key in self._exchanges:
            raise ValueError(f"The {key[0]} id {key[1]!r} is in use.")
        exchange = Exchange(key, self._new_inbox(), is_feed)
        self._exchanges[key] = exchange
        if self.lost is not None:
            self._exchanges.pop(key, None)
            exchange.inbox.put_nowait(self.lost)
        return exchange

    def abandon(self, exchange: Exchange) -> None:
        """Wait no longer, and cancel the request on the server if it still runs there."""
        kind, query_id = exchange.key
        if kind == WATCH and self.lost is None:
            self.send(encode(type="unwatch"))
        if self._exchanges.get(CHANGES) is exchange:
            self._exchanges.pop(CHANGES, None)
        if self._exchanges.get(exchange.key) is not exchange:
            return
        if kind == "query" and self.lost is None:
            self._exchanges[exchange.key] = None
            self.send(cancelling(query_id))
        else:
            self._exchanges.pop(exchange.key, None)

    def receive(self, message: str | bytes) -> None:
        """Hand a message to whom it answers. Raises what ``decode`` does."""
        decoded = decode(message)
        if decoded is None:
            return
        key, reply = decoded
        if key is None:
            self._refuse(reply)
            return
        key = self._addressee(key, reply)
        exchange = self._exchanges.get(key)
        is_final = not isinstance(reply, Progress | Consumed)
        if isinstance(reply, Chunk):
            is_final = reply.is_last
        if exchange is not None and exchange.is_feed:
            is_final = isinstance(reply, Failed | Done | Watching)
        if is_final:
            self._exchanges.pop(key, None)
        if isinstance(reply, Watching) and exchange is not None:
            self._exchanges[CHANGES] = exchange
        if isinstance(reply, CancelAck) and not reply.cancelled:
            # The last reply was there before the cancel.
            self._free(("query", key[1]))
        if exchange is None:
            return
        if isinstance(reply, Progress) and not exchange.inbox.empty():
            # Nobody looks; progress must not pile up beside a result that waits.
            return
        exchange.deliver(reply)

    def _addressee(self, key: Key, reply: Reply) -> Key:
        kind, query_id = key
        if query_id == NO_ID and kind in _MAYBE_WITHOUT_ID:
            waiting = [waits for waits in list(self._exchanges) if waits[0] == kind]
            return waiting[-1] if waiting else key
        if isinstance(reply, Failed) and key not in self._exchanges:
            others = [(kind, query_id) for kind in _MAYBE_WITHOUT_ID]
            return next((other for other in others if other in self._exchanges), key)
        return key

    def _free(self, key: Key) -> None:
        if self._exchanges.get(key, ...) is None:
            self._exchanges.pop(key, None)

    def _refuse(self, reply: Reply) -> None:
        # The server does not know which request it means; none may wait for ever.
        assert isinstance(reply, Failed)
        self._refusal = reply if reply.code == "unauthorized" else None
        for exchange in list(self._exchanges.values()):
            # A feed that was answered before is not what the server means.
            if exchange is not None and not exchange.is_answered:
                self.abandon(exchange)
                exchange.inbox.put_nowait(reply)

    def fail(self, text: str) -> None:
        """The connection is gone: everybody who waits is told, with the server's reason if any."""
        if self.lost is None:
            refusal = self._refusal
            self.lost = Lost(refusal.text, refusal.code) if refusal is not None else Lost(text)
        while self._exchanges:
            _, exchange = self._exchanges.popitem()
            if exchange is not None:
                exchange.inbox.put_nowait(self.lost)


def merged(unread: Reply, reply: Reply) -> Reply | None:
    """One reply that tells what two of a feed do; None when only both can."""
    match unread, reply:
        case Chunk(), Chunk():
            return reply
        case Change(), Change():
            op = reply.op if reply.op == unread.op else "change"
            tables = {**unread.tables, **reply.tables}
            return Change(tables, op, reply.version, unread.resync or reply.resync)
    return None


def cancelling(query_id: Id) -> str:
    return encode(type="cancel", queryId=query_id)
