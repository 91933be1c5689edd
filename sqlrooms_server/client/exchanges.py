"""Requests that wait for their replies."""

from __future__ import annotations

import queue
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from sqlrooms_server.client.messages import Key
from sqlrooms_server.client.plugin_replies import (
    ObjectAck,
    ObjectChanges,
    ObjectData,
    ObjectList,
    Opened,
)
from sqlrooms_server.client.replies import (
    Change,
    Chunk,
    Reply,
)


class Inbox(Protocol):
    """A queue of replies: ``queue.SimpleQueue`` or ``asyncio.Queue``."""

    def put_nowait(self, item: Any, /) -> None: ...
    def get_nowait(self) -> Any: ...
    def empty(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Exchange:
    """A request that waits for its replies. ``deliver`` is for one thread, that which receives."""

    key: Key
    inbox: Inbox
    is_answered: bool = False
    # Replies to a feed go on until it is abandoned or fails.
    is_feed: ClassVar[bool] = False

    def deliver(self, reply: Reply) -> None:
        """Hand over ``reply``."""
        self.inbox.put_nowait(reply)

    def finish(self, reply: Reply) -> None:
        """Hand over ``reply``, after which there is none. For any thread."""
        self.inbox.put_nowait(reply)


@dataclass(slots=True, eq=False)
class FeedExchange(Exchange):
    """A watch or a live query.

    Unread replies are merged, so that at most one and the end wait for a consumer that is slow.
    """

    is_feed: ClassVar[bool] = True

    def deliver(self, reply: Reply) -> None:
        self.is_answered = True
        unread: list[Reply] = []
        with suppress(queue.Empty):
            while not self.inbox.empty():
                unread.append(self.inbox.get_nowait())
        # What is not taken out here has gone to the consumer.
        last = merged(unread[-1], reply) if unread else None
        for item in [*unread, reply] if last is None else [*unread[:-1], last]:
            self.inbox.put_nowait(item)


@dataclass(slots=True, eq=False)
class ObjectExchange(Exchange):
    """An object that is open. ``acks`` is for who sends to it, the inbox for who reads."""

    acks: Exchange = field(kw_only=True)

    def deliver(self, reply: Reply) -> None:
        if isinstance(reply, ObjectAck):
            self.acks.deliver(reply)
        elif isinstance(reply, ObjectData | Opened):
            Exchange.deliver(self, reply)
        else:
            self.finish(reply)

    def finish(self, reply: Reply) -> None:
        Exchange.finish(self, reply)
        self.acks.finish(reply)


def merged(unread: Reply, reply: Reply) -> Reply | None:
    """One reply that tells what two of a feed do; None when only both can."""
    match unread, reply:
        case Chunk(), Chunk():
            return reply
        case Change(), Change():
            op = reply.op if reply.op == unread.op else "change"
            tables = {**unread.tables, **reply.tables}
            return Change(tables, op, reply.version, unread.resync or reply.resync)
        case ObjectList(), ObjectChanges():
            return reply.after(unread)
        case ObjectChanges(), ObjectChanges():
            return reply.following(unread)
    return None
