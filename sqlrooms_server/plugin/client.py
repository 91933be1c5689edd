"""A client as plugins see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qsl

from sqlrooms_server.access import Identity
from sqlrooms_server.access.roles import Role
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode_value, framed


class Client:
    """A connection of somebody. Its methods may be called from any thread; after it left, they do
    nothing."""

    __slots__ = ("_peer", "_post", "identity", "role")

    def __init__(self, peer: Peer, post: Callable[..., None]) -> None:
        self._peer = peer
        self._post = post
        # Those of now: a client that is disconnected has none any more.
        self.identity: Identity | None = peer.identity
        self.role: Role = peer.role

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Client) and self._peer is other._peer

    def __hash__(self) -> int:
        return hash(self._peer)

    @property
    def id(self) -> str:
        """The ``connectionId`` that ``welcome`` tells."""
        return self._peer.id

    @property
    def user(self) -> str | None:
        """Who it is, or without an identity that has a name, what it calls itself, unchecked."""
        known = self.identity.user if self.identity is not None else ""
        return known or self._peer.user

    @property
    def remote_address(self) -> str:
        request = self._peer.request
        # Somebody who sent a request over HTTP is not connected.
        return self._peer.remote_address or ("" if request is None else request.remote_address)

    @property
    def connected_at(self) -> datetime:
        return datetime.fromtimestamp(self._peer.connected_at, timezone.utc)

    @property
    def path(self) -> str:
        """The path that it connected to."""
        request = self._peer.request
        return "" if request is None else request.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """The query string that it connected with, without the token."""
        request = self._peer.request
        values = {} if request is None else dict(parse_qsl(request.query))
        values.pop("token", None)
        return values

    @property
    def state(self) -> dict[Any, Any]:
        """For plugins, who should use their own keys; it lasts as long as the connection."""
        return self._peer.state

    @property
    def is_open(self) -> bool:
        return self._peer.is_open

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a text message, a JSON object with a ``type``. Raises ``BadRequest``."""
        self._post(self._peer.send, encode_value(message))

    def send_binary(self, header: Mapping[str, Any], body: bytes) -> None:
        """Send a binary message: a JSON object with a ``type``, and bytes."""
        self._post(self._peer.send_binary, framed(header, body))

    def close(self, reason: str = "") -> None:
        """Close the connection, after what was sent before."""
        self._post(self._peer.close, 1000, reason)
