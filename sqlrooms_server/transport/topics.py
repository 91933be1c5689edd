"""Messages to many connections, sent by uWebSockets itself: a call of Python for each is slower.

It can do so for a connection that has nothing else under way. Others are sent theirs one by one,
and stay so: they wait behind a reply, or read slowly, and then their queue must be bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from sqlrooms_server.transport import native
from sqlrooms_server.transport.connection import (
    FRAGMENT_BYTES,
    FRAME_HEAD_BYTES,
    NATIVE_HIGH_BYTES,
    Connection,
)

# The topic of every connection that was ever in one, and of no message. uWebSockets forgets what a
# connection is still to be sent when it leaves its last topic.
_KEPT = b"0"


class Topics:
    """All topics of one transport, and how much was published. For the loop thread."""

    def __init__(self, tls: int) -> None:
        self.tls = tls
        # Set when the loop runs.
        self.app: Any = None
        # Bytes published so far, with their frames: no connection holds more of them.
        self.published = 0
        self._looked_at = 0
        self._in_turn = 0
        self._names = itertools.count(1)
        self._connections: dict[Connection, None] = {}

    def topic(self) -> Topic:
        """A new topic, which nobody hears."""
        return Topic(self, b"%d" % next(self._names))

    def turn_ended(self) -> None:
        """For the transport: uWebSockets has sent what was published."""
        self._in_turn = 0

    def takes(self, size: int) -> bool:
        """Whether ``size`` bytes may be published; counts them.

        Too much in one turn would end up in the buffers of uWebSockets before anybody looks.
        """
        if self._in_turn + size > NATIVE_HIGH_BYTES:
            return False
        self._in_turn += size
        self.published += size
        if self.published - self._looked_at > NATIVE_HIGH_BYTES:
            self._looked_at = self.published
            for connection in list(self._connections):
                if connection.falls_behind:
                    connection.leave_topics()
        return True

    def joined(self, connection: Connection) -> None:
        self._connections[connection] = None
        native.ws_subscribe(connection.tls, connection.ws, _KEPT, len(_KEPT))

    def left(self, connection: Connection) -> None:
        self._connections.pop(connection, None)


class Topic:
    """Connections that are sent the same text messages, each in the order of :meth:`send`.

    Made by :meth:`Topics.topic`.
    """

    __slots__ = ("_name", "_one_by_one", "_published_to", "_topics")

    def __init__(self, topics: Topics, name: bytes) -> None:
        self._topics = topics
        self._name = name
        self._published_to: dict[Connection, None] = {}
        self._one_by_one: dict[Connection, None] = {}

    def add(self, connection: Connection) -> None:
        """Let ``connection`` hear what is sent from now on."""
        if connection in self._published_to or connection in self._one_by_one:
            return
        if connection.join_topic(self, self._topics):
            self._published_to[connection] = None
            native.ws_subscribe(connection.tls, connection.ws, self._name, len(self._name))
        else:
            self._one_by_one[connection] = None

    def discard(self, connection: Connection) -> None:
        """Let ``connection`` hear no more. It may be closed."""
        if connection in self._published_to:
            del self._published_to[connection]
            connection.leave_topic(self)
            self._unsubscribe(connection)
        else:
            self._one_by_one.pop(connection, None)

    def serve_apart(self, connection: Connection) -> None:
        """For the connection: it has something else under way now, or is closed."""
        del self._published_to[connection]
        self._one_by_one[connection] = None
        self._unsubscribe(connection)

    def send(self, messages: Sequence[bytes]) -> None:
        """Send each of ``messages`` to everybody."""
        is_published = bool(self._published_to) and self._publish(messages)
        # Sending moves those that fall behind from one to the other.
        missing = list(self._one_by_one)
        if not is_published:
            missing += self._published_to
        for connection in missing:
            connection.send_all(messages)

    def _publish(self, messages: Sequence[bytes]) -> bool:
        """Leave it to uWebSockets; False when that would be too much."""
        if max(map(len, messages)) > FRAGMENT_BYTES:
            return False
        if not self._topics.takes(sum(map(len, messages)) + FRAME_HEAD_BYTES * len(messages)):
            return False
        for message in messages:
            native.publish(
                *(self._topics.tls, self._topics.app, self._name, len(self._name)),
                *(message, len(message), native.TEXT, True),
            )
        return True

    def _unsubscribe(self, connection: Connection) -> None:
        if connection.ws is not None:
            native.ws_unsubscribe(connection.tls, connection.ws, self._name, len(self._name))
