"""The processes of documents: one for all small rooms, a few for large ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.errors import ServerError, ShuttingDown
from sqlrooms_server.rooms.driver import Driver
from sqlrooms_server.rooms.keeping import RoomLimits
from sqlrooms_server.rooms.room import Failed, Item, Outcome, Read, Room

# Large rooms share them when there are more.
MAX_LARGE = 3


class Pool:
    """Takes items for rooms; ``tell`` gets what comes of them, on any thread, in order."""

    def __init__(
        self, store: RoomStore, limits: RoomLimits, tell: Callable[[Outcome], None]
    ) -> None:
        self.store = store
        self.limits = limits
        self.lock = threading.Lock()
        self._tell = tell
        self._is_closed = False
        # What came after that, to be answered behind what came before; None when that is over.
        self._late: list[Failed] | None = []
        self._small = Driver(self, "rooms-0", is_small=True)
        self._large: list[Driver] = []

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [pid for driver in self._drivers() if (pid := driver.pid) is not None]

    def room(self, name: str) -> Room:
        """A room that nobody has asked for yet."""
        return Room(name, self._small)

    def put(self, room: Room, item: Item) -> None:
        """Do ``item`` after those before it."""
        with self.lock:
            if not self._is_closed:
                room.queue.append(item)
                if not room.is_scheduled:
                    room.driver.schedule(room)
                return
            late = Failed(room, [item], ShuttingDown("The server is shutting down."))
            if self._late is not None:
                self._late.append(late)
                return
        self.tell(late)

    def forget(self, room: Room) -> bool:
        """Whether ``room``, which was unloaded, has nothing to do any more."""
        with self.lock:
            return not (room.queue or room.is_scheduled or room.is_loaded or room.members)

    def tell(self, outcome: Outcome) -> None:
        """For the drivers: what came of some items."""
        if isinstance(outcome, Failed):
            for item in outcome.items:
                if isinstance(item, Read):
                    item.tell(_copy(outcome.error))
        self._tell(outcome)

    def large_driver(self) -> Driver:
        """The process for another large room. The caller holds the lock."""
        free = min(self._large, key=lambda driver: driver.room_count, default=None)
        if free is None or (free.room_count and len(self._large) < MAX_LARGE):
            free = Driver(self, f"rooms-{1 + len(self._large)}", is_small=False)
            self._large.append(free)
        return free

    def close(self, deadline: float) -> None:
        """Do what waits, and end the processes by ``deadline`` (``time.monotonic``)."""
        with self.lock:
            self._is_closed = True
            self._small.close()
        self._small.join(deadline)
        # After it: what waits there may be for a room that moves to one of these.
        with self.lock:
            for driver in self._large:
                driver.close()
        for driver in self._large:
            driver.join(deadline)
        if not self.store.flush(max(0.0, deadline - time.monotonic())):
            return
        with self.lock:
            late, self._late = self._late or [], None
            for outcome in late:
                self.tell(outcome)

    def _drivers(self) -> list[Driver]:
        return [self._small, *self._large]


def _copy(error: ServerError) -> ServerError:
    """Each thread that raises an exception writes to it."""
    return type(error)(str(error))
