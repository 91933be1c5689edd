"""What a feature is. The server joins features and branches on none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sqlrooms_server.peer import Peer
from sqlrooms_server.transport import Exchange, HttpRequest

MessageHandler = Callable[[Peer, Any], None]
Route = Callable[[HttpRequest, Exchange], None]


class Feature(Protocol):
    """Everything is called on the loop thread, and must not block it."""

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        """What to do with each message class of :mod:`sqlrooms_server.messages`."""

    @property
    def routes(self) -> Mapping[str, Route]:
        """HTTP paths to what answers ``GET`` there."""

    def closed(self, peer: Peer) -> None:
        """A client left."""
