"""How many sockets there are of each address, and which of them go when there are too many.

uWebSockets closes a socket whose first request, or the next one, is not complete after ten seconds,
however slowly its bytes come. What it does not bound is how many of them there are meanwhile.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass

from sqlrooms_server.transport.addresses import place_of

log = logging.getLogger(__name__)

# Of an address over its limit, so many more are let in, to be told why they are refused.
_TOLD_WHY = 16

# Descriptors that sockets leave to everything else: files of the database, pipes, temporary files.
_RESERVED_DESCRIPTORS = 256


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """``waiting`` is of sockets that are no WebSockets, ``of_address`` of all kinds of them.

    There are too many in all when one has a descriptor that is not below ``descriptors``.
    """

    waiting: int
    of_address: int
    descriptors: int


class Sockets:
    """The sockets of one transport, by any keys. For the loop thread."""

    def __init__(self, limits: SocketLimits) -> None:
        self._limits = limits
        # Those that are no WebSocket, the one that asked longest ago first, and what they count as.
        self._waiting: dict[int, str | None] = {}
        self._counts: Counter[str] = Counter()
        self._total = 0
        # Set when descriptors run out. They are given out from below, so that each one that is
        # closed hides for a moment how many are in use; how many sockets there are does not.
        self._most: int | None = None

    def opened(self, key: int, address: str | None, descriptor: int) -> int | None:
        """A socket was accepted; the key of one to close for that, perhaps this one.

        ``address`` is None for one that no address is charged with: that of a trusted proxy.
        """
        place = None if address is None else place_of(address)
        self._waiting[key] = place
        self._total += 1
        if place is not None:
            self._counts[place] += 1
            if self._counts[place] > self._limits.of_address + _TOLD_WHY:
                return key
        if descriptor >= self._limits.descriptors and self._most is None:
            self._most = self._total - 1
            log.warning(
                "There are too few file descriptors (ulimit -n) for %d connections; those that "
                "are silent make room for others.",
                self._total,
            )
        is_full = self._most is not None and self._total > self._most
        if is_full or len(self._waiting) > self._limits.waiting:
            return next(iter(self._waiting))
        return None

    def asked(self, key: int) -> bool:
        """A request came on a socket; False when its address has too many."""
        if key not in self._waiting:
            return True
        place = self._waiting[key] = self._waiting.pop(key)
        return place is None or self._counts[place] <= self._limits.of_address

    def may_join(self, address: str) -> bool:
        """Whether a trusted proxy may bring a WebSocket of ``address``."""
        return self._counts[place_of(address)] < self._limits.of_address

    def upgraded(self, key: int, address: str | None) -> str | None:
        """A socket became a WebSocket; what to tell :meth:`left` when it closes.

        ``address`` is that of the client behind a trusted proxy.
        """
        place = self._waiting.pop(key, None)
        if address is not None:
            place = place_of(address)
            self._counts[place] += 1
        return place

    def closed(self, key: int) -> None:
        """A socket closed that is no WebSocket."""
        if key in self._waiting:
            self.left(self._waiting.pop(key))

    def left(self, place: str | None) -> None:
        """A WebSocket closed."""
        self._total -= 1
        if self._most is not None and self._total <= self._most // 2:
            self._most = None
        if place is None:
            return
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place]


def descriptors() -> int:
    """The first descriptor that is not for sockets."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return soft - min(_RESERVED_DESCRIPTORS, soft // 4)


def are_exhausted() -> bool:
    """Whether the process can have no other descriptor."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return True
    return False
