"""Requests that wait for their replies."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from sqlrooms_server.client.messages import Key
from sqlrooms_server.client.plugin_replies import (
    Event,
    InputAck,
    ObjectAck,
    ObjectChanges,
    ObjectData,
    ObjectList,
    Opened,
    OutputData,
    StreamBegun,
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


@dataclass(slots=True, eq=False)
class StreamExchange(Exchange):
    """A stream of batches.

    Each input and output has an exchange of its own, which whoever feeds or reads it waits for.
    The inbox is for whoever reads all outputs: it has something whenever one of theirs may.
    """

    new_inbox: Callable[[], Inbox] = field(kw_only=True)
    inputs: dict[str, Exchange] = field(default_factory=dict)
    outputs: dict[str, Exchange] = field(default_factory=dict)
    # Outputs whose last piece has not come.
    open_outputs: int = 0
    events: deque[Any] = field(default_factory=deque)

    def deliver(self, reply: Reply) -> None:
        match reply:
            case StreamBegun():
                self.is_answered = True
                self.inputs = {name: self._lane() for name in reply.inputs}
                self.outputs = {name: self._lane() for name in reply.outputs}
                self.open_outputs = len(self.outputs)
                self.inbox.put_nowait(reply)
            case InputAck():
                self.inputs[reply.input].deliver(reply)
            case OutputData():
                # Counted before who reads it looks at the number.
                self.open_outputs -= reply.is_last
                self.outputs[reply.output].deliver(reply)
                _wake(self, reply)
            case Event():
                self.events.append(reply.data)
                for exchange in (*self.outputs.values(), self):
                    _wake(exchange, reply)
            case _:
                self.finish(reply)

    def finish(self, reply: Reply) -> None:
        for exchange in (*self.inputs.values(), *self.outputs.values()):
            exchange.finish(reply)
        self.inbox.put_nowait(reply)

    def _lane(self) -> Exchange:
        return Exchange(self.key, self.new_inbox())


def _wake(exchange: Exchange, reply: Reply) -> None:
    """Let who waits look around. Nothing piles up for those who do not wait."""
    if exchange.inbox.empty():
        exchange.inbox.put_nowait(reply)


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
