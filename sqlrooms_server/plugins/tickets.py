"""Tickets: what a client holds of objects that it was handed, valid for its connection."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from typing import Any

from sqlrooms_server.errors import Busy, Gone
from sqlrooms_server.plugins.object_types import Target

# So that nobody guesses one.
_TICKET_BYTES = 16


class Tickets:
    """Those of one connection. From any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        # Each with what it is released with: a stream, or None for the connection.
        self._targets: dict[str, tuple[Target, object]] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._targets)

    def add(self, targets: list[Target], owner: object = None) -> list[dict[str, Any]]:
        """Tickets for ``targets``, as clients are told of them. Raises ``Busy`` for too many."""
        with self._lock:
            if len(self._targets) + len(targets) > self._most:
                raise Busy(
                    f"This connection holds {len(self._targets)} references to objects; with these "
                    f"it would hold more than {self._most} (--max-object-references). "
                    "object-release, or the end of their streams, frees them."
                )
            made = [(secrets.token_urlsafe(_TICKET_BYTES), target) for target in targets]
            if not self._is_closed:
                self._targets.update({ticket: (target, owner) for ticket, target in made})
        return [{"ticket": ticket, **described(target)} for ticket, target in made]

    def get(self, ticket: str) -> Target:
        """What ``ticket`` stands for. Raises ``Gone``, and says no more to who guesses."""
        with self._lock:
            found = self._targets.get(ticket)
        if found is None:
            raise Gone(
                "There is no such reference on this connection; it was released, or its stream "
                "has ended."
            )
        return found[0]

    def release(self, tickets: Iterable[str]) -> int:
        """Forget ``tickets``, and tell how many of them there were."""
        with self._lock:
            return sum(self._targets.pop(ticket, None) is not None for ticket in tickets)

    def release_of(self, owner: object) -> None:
        """Forget those of a stream."""
        with self._lock:
            self._targets = {
                ticket: entry for ticket, entry in self._targets.items() if entry[1] is not owner
            }

    def close(self) -> None:
        """Forget all, for good."""
        with self._lock:
            self._is_closed = True
            self._targets.clear()


def described(target: Target) -> dict[str, Any]:
    """What clients are told of ``target``."""
    return {
        "objectType": target.type.name,
        "canFetch": target.type.can_fetch,
        "canOpen": target.type.can_open,
    }
