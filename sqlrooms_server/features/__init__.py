"""What a feature of the server is: a plugin that lives on the thread of the loop.

Everything of it is called there, with a :class:`peer.Peer` where others get a client, and must not
block: ``handlers`` by the classes of :mod:`sqlrooms_server.messages`, ``answer`` of a route with
the request, the exchange and who sent it. The server joins features and branches on none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Plugin, Route

__all__ = ["Feature", "MessageHandler", "Route"]

MessageHandler = Callable[[Peer, Any], None]


class Feature(Plugin):
    on_loop: ClassVar[bool] = True

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        """What to do with each message class."""
        return {}

    @property
    def routes(self) -> Sequence[Route]:
        """The HTTP requests that it answers."""
        return ()

    def opened(self, peer: Peer) -> None:
        """A client came that may come."""

    def closed(self, peer: Peer) -> None:
        """A client left."""
