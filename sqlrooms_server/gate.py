"""The gate: who gets in, and what becomes of those who do not."""

from __future__ import annotations

import contextlib
import logging

from sqlrooms_server.access import Access, Identity
from sqlrooms_server.access.roles import ADMIN
from sqlrooms_server.errors import ServerError, Unauthorized
from sqlrooms_server.messages import Auth, Message
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import Limits, decode, encode
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import HttpRequest, Refusal

log = logging.getLogger(__name__)

# An auth message; anything longer from a stranger is not worth decoding.
_MAX_AUTH_BYTES = 16 << 10

_AUTH_ACK = encode({"type": "authAck"})

_EVERYBODY = Identity("", ADMIN)


class Gate:
    """Stands before every kind of frame and every request. For the loop thread."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self._access = Access(settings)
        self._limits = limits

    @property
    def needs_token(self) -> bool:
        return self._access.needs_token

    def upgrade(self, request: HttpRequest) -> Peer | Refusal:
        """The client that a WebSocket will belong to, or why it may not come."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        peer = Peer()
        if not self.needs_token:
            peer.identify(_EVERYBODY)
            return peer
        token = self._access.token_of(request)
        if token is not None:
            peer.identify(self._access.identify(token))
            peer.is_refused = peer.identity is None
        return peer

    def opened(self, peer: Peer) -> None:
        """Its connection is open."""
        if peer.is_refused:
            self._refuse(peer)

    def message(self, peer: Peer, data: bytes, is_text: bool) -> None:
        """A message of somebody without identity: only the right token gives one."""
        if peer.is_refused:
            return
        message: Message | None = None
        if is_text and len(data) <= _MAX_AUTH_BYTES:
            with contextlib.suppress(ServerError):
                message = decode(data, is_text=True, limits=self._limits)
        if isinstance(message, Auth):
            self.authenticate(peer, message)
        else:
            self._refuse(peer)

    def authenticate(self, peer: Peer, message: Auth) -> None:
        """Answer ``message``."""
        if self.needs_token:
            peer.identify(self._access.identify(message.token))
        if peer.identity is None:
            self._refuse(peer)
        else:
            peer.send(_AUTH_ACK)

    def identity_of(self, request: HttpRequest) -> Identity | Refusal:
        """Who sent ``request``, or why it is not answered."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        if not self.needs_token:
            return _EVERYBODY
        token = self._access.token_of(request)
        identity = None if token is None else self._access.identify(token)
        return identity or Refusal(401, "unauthorized")

    def _refusal(self, request: HttpRequest) -> Refusal | None:
        reason = self._access.origins.refuses(request)
        if reason is None:
            return None
        log.warning("Refused a request from %s: %s.", request.remote_address, reason)
        return Refusal(403, f"{reason}\n")

    def _refuse(self, peer: Peer) -> None:
        peer.is_refused = True
        peer.identify(None)
        log.warning("Closed a connection from %s without a valid token.", peer.remote_address)
        peer.send_error(Unauthorized("unauthorized"))
        peer.close(1008, "unauthorized")
