"""What clients send, on its way to the features."""

from __future__ import annotations

from collections.abc import Collection

from sqlrooms_server.app.dispatch import Dispatch
from sqlrooms_server.errors import Busy, ServerError
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.gate import Gate
from sqlrooms_server.messages import Auth, Cancel
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugins.authorizing import Authorizer
from sqlrooms_server.protocol import Limits, decode, encode
from sqlrooms_server.settings import Settings

# What an early message costs besides its bytes.
_EARLY_ENTRY_BYTES = 200


class Inbox:
    """Decodes messages, and asks whoever must be asked before one is handled.

    For the loop thread.
    """

    def __init__(
        self,
        settings: Settings,
        limits: Limits,
        kinds: Collection[str],
        gate: Gate,
        authorizer: Authorizer | None,
        dispatch: Dispatch,
    ) -> None:
        """``kinds`` are those of the messages of plugins."""
        self._settings = settings
        self._limits = limits
        self._kinds = kinds
        self._gate = gate
        self._authorizer = authorizer
        self._dispatch = dispatch
        self._carry_out = dispatch.carry_out
        # None until the database is open.
        self._requests: Requests | None = None
        # Messages that came before, and their bytes.
        self._early: list[tuple[Peer, bytes, bool]] = []
        self._early_bytes = 0

    def begin(self, requests: Requests) -> None:
        """The database is open: handle what came before."""
        self._requests = requests
        early, self._early = self._early, []
        for peer, data, is_text in early:
            if peer.is_open:
                self.take(peer, data, is_text)

    def take(self, peer: Peer, data: bytes, is_text: bool) -> None:
        """``peer`` has sent ``data``."""
        if peer.identity is None:
            # Needs no database, and they have little time.
            self._gate.message(peer, data, is_text)
            return
        requests = self._requests
        if requests is None:
            self._keep_early(peer, data, is_text)
            return
        try:
            message = decode(data, is_text=is_text, limits=self._limits, kinds=self._kinds)
        except ServerError as error:
            requests.reject(peer, error)
            return
        if isinstance(message, Auth):
            self._gate.authenticate(peer, message)
            return
        if peer.role.request_rate:
            try:
                self._gate.rates.check(peer, message)
            except Busy as error:
                self._dispatch.refuse_with(peer, message, error)
                return
        authorizer = self._authorizer
        if authorizer is None:
            self._carry_out(peer, message)
        elif not (
            isinstance(message, Cancel) and _cancel_early(peer, message, requests, authorizer)
        ):
            authorizer.take(peer, message, len(data))

    def _keep_early(self, peer: Peer, data: bytes, is_text: bool) -> None:
        size = len(data) + _EARLY_ENTRY_BYTES
        if self._early_bytes + size > self._settings.max_queued_bytes:
            peer.abort()
            return
        self._early_bytes += size
        self._early.append((peer, data, is_text))


def _cancel_early(peer: Peer, cancel: Cancel, requests: Requests, authorizer: Authorizer) -> bool:
    """Cancel what waits to be allowed; False when there is nothing of that id."""
    if requests.find(peer, cancel.query_id) is not None:
        return False
    if not authorizer.cancel(peer, cancel.query_id):
        return False
    peer.send(encode({"type": "cancelAck", "queryId": cancel.query_id, "cancelled": True}))
    return True
