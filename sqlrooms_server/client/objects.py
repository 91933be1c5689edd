"""Objects of plugins: references to them, and one that is open, as flows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from sqlrooms_server.client.errors import ConnectionLost
from sqlrooms_server.client.exchanges import ObjectExchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import encode, framed
from sqlrooms_server.client.needs import Flow, Receive, answer, checked, connected
from sqlrooms_server.client.plugin_replies import (
    ObjectAck,
    ObjectBytes,
    ObjectClosed,
    ObjectData,
    ObjectInfo,
    Opened,
    Referred,
)
from sqlrooms_server.client.queries import WINDOW
from sqlrooms_server.client.replies import (
    Reply,
)

# How long the server may take to call what an object does at its end.
_CLOSE_S = 10.0


class Reference:
    """A table or another object that the server handed out, for this connection.

    ``fetch`` and ``open`` of the client take it. It is released when it is dropped, and with the
    stream that it came by; then, and after a lost connection, it is ``gone``.
    """

    def __init__(self, link: Link, referred: Referred) -> None:
        self._link = link
        self._ticket = referred.ticket
        self.object_type = referred.object_type
        self.can_fetch = referred.can_fetch
        self.can_open = referred.can_open
        self._is_released = False

    def release(self) -> None:
        """Let the server forget it. Never waits."""
        if not self._is_released and self._link.lost is None:
            self._is_released = True
            self._link.send(encode(type="object-release", tickets=[self._ticket]))

    def __repr__(self) -> str:
        return f"<Reference to a {self.object_type}>"

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.release()


class ObjectMessage(NamedTuple):
    """What an object says: a payload, and references."""

    payload: bytes
    references: list[Reference]


@dataclass(frozen=True, slots=True)
class Fetched:
    """An object that was fetched as bytes."""

    payload: bytes
    references: list[Reference]


Wanted = str | ObjectInfo | Reference


def wanted(which: Wanted) -> dict[str, str]:
    """The field that names ``which``."""
    if isinstance(which, Reference):
        return {"ticket": which._ticket}
    return {"object": which.name if isinstance(which, ObjectInfo) else which}


def references_of(link: Link, reply: ObjectBytes) -> list[Reference]:
    return [Reference(link, referred) for referred in reply.references]


class OpenObject:
    """An object that is open. One thread or task may send while another one reads."""

    def __init__(self, new_id: Callable[[], int], which: Wanted) -> None:
        self.is_closed = False
        self._query_id = new_id()
        self._which = which
        self._link: Link | None = None
        self._exchange: ObjectExchange | None = None
        self._window = self._sent = self._taken = 0
        self._consumed = self._acknowledged = 0
        self._end: Reply | None = None

    def begin(self) -> Flow[None]:
        """Open it, unless it is."""
        if self._exchange is not None:
            return
        link = self._link = yield from connected()
        exchange = self._exchange = link.open_object(self._query_id)
        try:
            link.send(
                encode(
                    type="object-open",
                    queryId=self._query_id,
                    clientWindow=WINDOW,
                    **wanted(self._which),
                )
            )
            reply = yield from answer(exchange)
        except BaseException:
            self.abandon()
            raise
        if not isinstance(reply, Opened):
            raise ConnectionLost("The server closed an object that was never open.")
        self._window = reply.window

    def send(self, payload: bytes | str, references: Sequence[Reference]) -> Flow[None]:
        """Send a message, when the object has room for it. Raises what ended the stream."""
        link, exchange = self._opened()
        acks = exchange.acks
        while not acks.inbox.empty() or self._sent - self._taken >= self._window:
            reply: Reply = yield Receive(acks)
            if not isinstance(reply, ObjectAck):
                # For who asks again.
                acks.finish(reply)
                checked(reply)
                raise RuntimeError("The object is closed.")
            self._taken = reply.bytes
        tickets = [reference._ticket for reference in references]
        header = encode(type="object-data", queryId=self._query_id, references=tickets)
        data = payload.encode() if isinstance(payload, str) else bytes(payload)
        message = framed(header, data)
        link.send(message)
        self._sent += len(message)

    def receive(self, timeout: float | None) -> Flow[ObjectMessage | None]:
        """The next message, None after the last. Raises ``TimeoutError``."""
        if self.is_closed:
            return None
        link, exchange = self._opened()
        deadline = None if timeout is None else time.monotonic() + timeout
        unacknowledged = self._consumed - self._acknowledged
        if unacknowledged and (exchange.inbox.empty() or unacknowledged >= WINDOW // 4):
            self._acknowledged = self._consumed
            link.send(encode(type="object-ack", queryId=self._query_id, bytes=self._consumed))
        reply: Reply | None = yield Receive(exchange, deadline)
        if reply is None:
            raise TimeoutError("The object had nothing to tell in time.")
        if isinstance(reply, ObjectData):
            self._consumed += reply.size
            return ObjectMessage(reply.payload, references_of(link, reply))
        self.is_closed = True
        checked(reply)
        return None

    def close(self) -> Flow[None]:
        """Send no more, and wait until what was sent has been handled. What comes is dropped."""
        if self.is_closed or self._exchange is None or self._link is None:
            return
        deadline = time.monotonic() + _CLOSE_S
        try:
            self._link.send(encode(type="object-close", queryId=self._query_id))
            while not self.is_closed:
                yield from self.receive(max(0.0, deadline - time.monotonic()))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End it on the server at once. Never waits, and may be called by a finalizer."""
        is_over, self.is_closed = self.is_closed, True
        if not is_over and self._exchange is not None and self._link is not None:
            self._link.abandon(self._exchange)
            self._exchange.finish(ObjectClosed())

    def _opened(self) -> tuple[Link, ObjectExchange]:
        if self._exchange is None or self._link is None:
            raise RuntimeError("The object is not open yet.")
        return self._link, self._exchange
