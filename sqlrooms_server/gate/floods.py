"""Strangers who send more than they may before it is known who they are."""

from __future__ import annotations

from collections.abc import Callable

from sqlrooms_server.peer import Peer
from sqlrooms_server.timers import Timers

# How often it is looked.
_WATCH_SECONDS = 0.25


class Floods:
    """Watches what comes on sockets of strangers: a message waits in memory until it is complete,
    and may be of any size that others may send. For the loop thread.
    """

    def __init__(
        self,
        timers: Timers,
        post: Callable[..., None],
        most: Callable[[Peer], int],
        found: Callable[[Peer], None],
    ) -> None:
        """``found`` is told of those who have sent more bytes than ``most`` says."""
        self._timers = timers
        self._post = post
        self._most = most
        self._found = found
        # What had come on their sockets before.
        self._received: dict[Peer, int] = {}
        self._is_watching = False

    def add(self, peer: Peer) -> None:
        self._received[peer] = peer.received_bytes
        self._watch()

    def discard(self, peer: Peer) -> None:
        self._received.pop(peer, None)

    def _watch(self) -> None:
        if not self._is_watching and self._received:
            self._is_watching = True
            self._timers.after(_WATCH_SECONDS, lambda: self._post(self._look))

    def _look(self) -> None:
        self._is_watching = False
        for peer, before in list(self._received.items()):
            if peer.received_bytes - before > self._most(peer):
                self._found(peer)
        self._watch()
