"""Who is connected: for programs in this process, and ``GET /connections``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeVar

from sqlrooms_server.access import Identity
from sqlrooms_server.features import Feature, Route
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode
from sqlrooms_server.transport import Exchange, HttpRequest

T = TypeVar("T")

# A loop that takes longer is stopping or has stopped.
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """One connection. ``user`` is who it is, or calls itself; ``channels`` what it hears."""

    id: str
    user: str | None
    connected_at: datetime
    remote_address: str
    channels: tuple[str, ...]


class Connections(Feature):
    """A feature. The methods without an underscore may be called by any thread but the loop's.

    They raise ``TimeoutError`` when the server does not run.
    """

    def __init__(
        self, post: Callable[..., None], channels_of: Callable[[Peer], Sequence[str]]
    ) -> None:
        self._post = post
        self._channels_of = channels_of
        self._peers: dict[str, Peer] = {}

    @property
    def routes(self) -> Sequence[Route]:
        return (Route("GET", "/connections", self._http),)

    def opened(self, peer: Peer) -> None:
        self._peers[peer.id] = peer

    def closed(self, peer: Peer) -> None:
        self._peers.pop(peer.id, None)

    def all(self, user: str | None = None) -> list[ConnectionInfo]:
        """Those that are connected, or those of ``user``."""
        return self._ask(lambda: self._infos(user))

    def count(self) -> int:
        """How many are connected."""
        return self._ask(lambda: len(self._infos(None)))

    def close(self, connection_id: str, reason: str = "Closed by the server.") -> bool:
        """Close a connection, with code 1000, after what was said before; False when there is none
        of that id.
        """

        def close() -> bool:
            peer = self._peers.get(connection_id)
            if peer is not None:
                # What was said in this turn of the loop is sent at its end.
                self._post(peer.close, 1000, reason)
            return peer is not None

        return self._ask(close)

    def send(self, message: bytes, user: str | None, connection: str | None) -> None:
        """Send a text message to those of ``user``, to ``connection``, or without both to all.

        For the loop thread.
        """
        for peer in self._peers.values():
            if (user is None or peer.user == user) and connection in (None, peer.id):
                peer.send(message)

    def _infos(self, user: str | None) -> list[ConnectionInfo]:
        return [
            ConnectionInfo(
                peer.id,
                peer.user,
                datetime.fromtimestamp(peer.connected_at, timezone.utc),
                peer.remote_address,
                tuple(self._channels_of(peer)),
            )
            for peer in self._peers.values()
            if peer.identity is not None and (user is None or peer.user == user)
        ]

    def _ask(self, question: Callable[[], T]) -> T:
        """What ``question`` returns on the loop thread."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:  # handed to the thread that waits
                answer.set_exception(error)

        self._post(run)
        return answer.result(_ANSWER_SECONDS)

    def _http(self, request: HttpRequest, exchange: Exchange, asker: Identity | None) -> None:
        if asker is None or not asker.role.is_admin:
            exchange.respond(403, b"only the role admin sees who is connected")
            return
        connections = [
            {
                "connectionId": info.id,
                "user": info.user,
                "connectedAt": info.connected_at.isoformat(timespec="milliseconds"),
                "remoteAddress": info.remote_address,
                "channels": info.channels,
            }
            for info in self._infos(None)
        ]
        exchange.respond_json(200, encode({"connections": connections}))
