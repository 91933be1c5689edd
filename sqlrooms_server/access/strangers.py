"""Those who have not said who they are, and which of them goes when there are too many."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from sqlrooms_server.transport.addresses import place_of

K = TypeVar("K", bound=Hashable)


class Strangers(Generic[K]):
    """At most ``limit`` of them. Over it, an address that has the most makes room for others, so
    that nobody can keep all others out. For one thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Of each address, those that came first first; no address has none.
        self._of_place: dict[str, dict[K, None]] = {}
        self._places: dict[K, str] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, key: K, address: str) -> None:
        place = self._places[key] = place_of(address)
        self._of_place.setdefault(place, {})[key] = None

    def discard(self, key: K) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            del self._of_place[place][key]
            if not self._of_place[place]:
                del self._of_place[place]

    def has_room(self) -> bool:
        return len(self._places) < self._limit

    def in_the_way_of(self, address: str) -> K | None:
        """Who is to go so that ``address`` can have one more; None when it has the most itself."""
        most = max(self._of_place.values(), key=len)
        own = self._of_place.get(place_of(address), {})
        return next(iter(most)) if len(own) < len(most) else None
