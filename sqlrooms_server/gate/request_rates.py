"""How many requests a second each role may send."""

from __future__ import annotations

from sqlrooms_server.access.roles import Role
from sqlrooms_server.errors import Busy
from sqlrooms_server.messages import (
    OF_OPEN_OBJECTS,
    Ack,
    Cancel,
    Message,
    PluginMessage,
    RoomPresence,
    RoomUpdate,
    StreamAck,
    StreamData,
    UploadChunk,
)
from sqlrooms_server.peer import Peer
from sqlrooms_server.rates import Rates

# What belongs to a request that was counted, or has a limit of its own.
_NO_REQUESTS = (Ack, Cancel, UploadChunk, RoomUpdate, RoomPresence, StreamAck, StreamData)


class RequestRates:
    """What each connection, and over HTTP each user, has asked of late. For the loop thread."""

    def __init__(self) -> None:
        # By how much is allowed. Over HTTP, where connections do not last, it is a user who may.
        self._rates: dict[int, Rates[Peer | str]] = {}

    def check(self, peer: Peer, message: Message) -> None:
        """Raise ``Busy`` when ``peer`` asks more often than its role may."""
        role = peer.role
        if isinstance(message, PluginMessage) and message.kind in OF_OPEN_OBJECTS:
            return
        if not isinstance(message, _NO_REQUESTS) and not self.may_ask(role, peer):
            text = (
                f"This connection sends more than {role.request_rate} requests a second, which is "
                f"the limit of role {role.name!r}."
            )
            raise Busy(text, getattr(message, "query_id", None))

    def may_ask(self, role: Role, key: Peer | str) -> bool:
        """Whether ``key``, of that role, may ask once more now; counts it if so."""
        rate = role.request_rate
        return not rate or self._rates.setdefault(rate, Rates(rate)).allows(key)

    def forget(self, peer: Peer) -> None:
        """``peer`` is gone."""
        for rates in self._rates.values():
            rates.forget(peer)
