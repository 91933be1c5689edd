"""Who wants to hear of objects that are published, replaced and taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from sqlrooms_server.peer import Peer
from sqlrooms_server.plugins.published import Entry, Published
from sqlrooms_server.plugins.tickets import described
from sqlrooms_server.protocol import encode
from sqlrooms_server.timers import Timers

# When to look again at a client that has not read what it was told before.
_AGAIN_SECONDS = 0.05


class ObjectWatches:
    """For the loop thread, but for :meth:`has_changed`.

    Each client is told the difference between what it was told last and what is published now, so
    that nothing piles up for one that reads slowly.
    """

    def __init__(self, published: Published, timers: Timers, post: Callable[..., None]) -> None:
        self._published = published
        self._timers = timers
        self._post = post
        # For each client, the versions that it knows.
        self._told: dict[Peer, dict[str, int]] = {}
        self._lock = threading.Lock()
        self._is_due = False

    def add(self, peer: Peer, visible: Mapping[str, Entry]) -> None:
        """Tell ``peer`` from now on, which is told of ``visible``."""
        self._told[peer] = {name: entry.version for name, entry in visible.items()}

    def discard(self, peer: Peer) -> None:
        self._told.pop(peer, None)

    def has_changed(self) -> None:
        """Something was published, or taken back. From any thread."""
        with self._lock:
            if self._is_due:
                return
            self._is_due = True
        self._post(self._tell)

    def _tell(self) -> None:
        with self._lock:
            self._is_due = False
        for peer in list(self._told):
            self._tell_one(peer)

    def _tell_one(self, peer: Peer) -> None:
        told = self._told.get(peer)
        if told is None:
            return
        if peer.is_behind:
            self._timers.after(_AGAIN_SECONDS, lambda: self._post(self._tell_one, peer))
            return
        visible = self._published.visible_to(peer.identity)
        added = [entry for name, entry in visible.items() if name not in told]
        replaced = [
            entry for name, entry in visible.items() if name in told and told[name] != entry.version
        ]
        removed = [name for name in told if name not in visible]
        self.add(peer, visible)
        if added or replaced or removed:
            changes = {
                "added": [listed(entry) for entry in added],
                "replaced": [listed(entry) for entry in replaced],
                "removed": removed,
            }
            peer.send(encode({"type": "object-changes", **changes}))


def listed(entry: Entry) -> dict[str, Any]:
    """What clients are told of ``entry``."""
    return {"name": entry.name, **described(entry.target)}
