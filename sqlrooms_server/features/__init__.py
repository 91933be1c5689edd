"""What a feature is. The server joins features and branches on none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.access import Identity
from sqlrooms_server.peer import Peer
from sqlrooms_server.transport import Exchange, HttpRequest

MessageHandler = Callable[[Peer, Any], None]


@dataclass(frozen=True, slots=True)
class Route:
    """What answers an HTTP request.

    A ``path`` that ends in ``/`` stands for everything below it. Unless it ``is_public``, the
    request must come from an origin and a host that may connect, with a token if one is needed;
    ``answer`` is told who sent it, None for a stranger.
    """

    method: str
    path: str
    answer: Callable[[HttpRequest, Exchange, Identity | None], None]
    is_public: bool = False


class Feature:
    """Everything is called on the loop thread, and must not block it."""

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        """What to do with each message class of :mod:`sqlrooms_server.messages`."""
        return {}

    @property
    def routes(self) -> Sequence[Route]:
        """The HTTP requests that it answers."""
        return ()

    def opened(self, peer: Peer) -> None:
        """A client came. It may not be authorised yet."""

    def closed(self, peer: Peer) -> None:
        """A client left."""
