"""One client as features see it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlrooms_server.access.roles import NOBODY, Identity, Role
from sqlrooms_server.errors import ServerError
from sqlrooms_server.protocol import encode_error
from sqlrooms_server.transport import Connection, FrameSource, HttpRequest, Source, Topic
from sqlrooms_server.transport.received import received_bytes


class Peer:
    """A connected client. Its methods belong to the loop thread; after it left they do nothing."""

    __slots__ = (
        "_calls_itself",
        "_connection",
        "connected_at",
        "id",
        "identity",
        "is_refused",
        "request",
        "role",
        "state",
    )

    def __init__(self, request: HttpRequest | None = None) -> None:
        self.id = secrets.token_hex(8)
        # None as long as nobody knows who it is; then it may do nothing.
        self.identity: Identity | None = None
        self.role: Role = NOBODY
        # The upgrade.
        self.request = request
        # For plugins.
        self.state: dict[Any, Any] = {}
        # It is told so and closed, whatever else it sends.
        self.is_refused = False
        # Seconds since 1970.
        self.connected_at = time.time()
        self._calls_itself: str | None = None
        self._connection: Connection | None = None

    @property
    def user(self) -> str | None:
        """Who it is, or without an identity that has a name, what it calls itself, unchecked."""
        known = self.identity.user if self.identity is not None else ""
        return known or self._calls_itself

    def call(self, user: str) -> None:
        """It calls itself ``user``."""
        self._calls_itself = user

    def identify(self, identity: Identity | None) -> None:
        """From here on it is ``identity``, or a stranger."""
        self.identity = identity
        self.role = NOBODY if identity is None else identity.role

    def attach(self, connection: Connection) -> None:
        """For the server: the connection is open."""
        self._connection = connection

    @property
    def is_open(self) -> bool:
        return self._connection is not None and self._connection.is_open

    @property
    def remote_address(self) -> str:
        return "" if self._connection is None else self._connection.remote_address

    @property
    def received_bytes(self) -> int:
        """What came on its socket, complete messages or not; 0 where the system does not tell."""
        return 0 if self._connection is None else received_bytes(self._connection)

    @property
    def is_behind(self) -> bool:
        """Whether what was sent before waits for the client to read."""
        return self._connection is not None and self._connection.is_behind

    def send(self, message: bytes) -> None:
        """Send a text message."""
        if self._connection is not None:
            self._connection.send(message, is_text=True)

    def send_all(self, messages: Sequence[bytes]) -> None:
        """Send text messages, in as few calls of the kernel as possible."""
        if self._connection is not None:
            self._connection.send_all(messages)

    def send_binary(self, message: bytes) -> None:
        """Send a binary message."""
        if self._connection is not None:
            self._connection.send(message, is_text=False)

    def send_error(self, error: ServerError) -> None:
        """Send the error frame of ``error``."""
        self.send(encode_error(error))

    def stream(self, source: Source, *, is_text: bool) -> None:
        """Send the message that ``source`` produces."""
        if self._connection is not None:
            self._connection.stream(source, is_text=is_text)

    def stream_frames(self, source: FrameSource) -> None:
        """Send the messages that ``source`` has ready, between others. Again and again."""
        if self._connection is not None:
            self._connection.stream_frames(source)

    def pump(self) -> None:
        """A source has data again."""
        if self._connection is not None:
            self._connection.pump()

    def close(self, code: int, reason: str) -> None:
        """Close after everything that was sent before."""
        if self._connection is not None:
            self._connection.close(code, reason)

    def abort(self) -> None:
        """Close at once."""
        if self._connection is not None:
            self._connection.abort()


class Audience:
    """Clients that hear the same text messages, in the same order."""

    __slots__ = ("_topic",)

    def __init__(self, topic: Topic) -> None:
        self._topic = topic

    def add(self, peer: Peer) -> None:
        """Let ``peer`` hear what is sent from now on."""
        if peer._connection is not None:
            self._topic.add(peer._connection)

    def discard(self, peer: Peer) -> None:
        """Let ``peer`` hear no more."""
        if peer._connection is not None:
            self._topic.discard(peer._connection)

    def send(self, messages: Sequence[bytes]) -> None:
        self._topic.send(messages)
