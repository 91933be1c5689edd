"""Documents of rooms for queries that ask for them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable

from sqlrooms_server.db.room_macros import RoomTables, Wanted
from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.errors import BadRequest, Forbidden, ServerError, TooLarge
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.features.rooms import Rooms
from sqlrooms_server.jobs import Pause
from sqlrooms_server.rooms.room import Document, Read

# Rooms that one query may read when its text does not name them, and their bytes as JSON.
_MAX_ROOMS = 100
_MAX_BYTES = 64 << 20


class RoomReader:
    """Reads rooms for a job, which is parked meanwhile."""

    def __init__(self, rooms: Rooms, store: RoomStore, requests: Requests) -> None:
        self._rooms = rooms
        self._store = store
        self._requests = requests

    def read(self, request: Request, wanted: Wanted) -> Generator[Pause, None, RoomTables]:
        """What ``wanted`` asks for, with everything that was acked by now."""
        tables = RoomTables()
        readable = request.peer.role.read_rooms
        for name in wanted.names:
            if name not in readable:
                role = request.peer.role.name
                raise Forbidden(f"The role {role!r} may not read room {name!r} (read_rooms).")
        listed = [room for room in self._store.rooms() if room[0] in readable]
        if "rooms" in wanted.functions:
            tables.listed = [(name, size, updated) for name, updated, size in listed]
        names = [name for name, _, _ in listed if wanted.all or name in wanted.names | wanted.texts]
        if wanted.all and len(names) > _MAX_ROOMS:
            raise BadRequest(
                f"room() with a name that is neither a text nor a parameter would read all "
                f"{len(names)} rooms; at most {_MAX_ROOMS} are read."
            )
        if not names:
            return tables
        reading = _Reading(request, self._requests, len(names))
        self._requests.post(self._ask, names, reading)
        while not reading.is_over:
            yield Pause.WAIT
        if reading.error is not None:
            raise type(reading.error)(str(reading.error))
        if reading.size > _MAX_BYTES:
            raise TooLarge(
                f"The documents of these rooms have {reading.size} bytes as JSON; a query may read "
                f"{_MAX_BYTES}."
            )
        tables.documents = [(one.name, one.json, one.updated_ms) for one in reading.documents]
        return tables

    def _ask(self, names: Iterable[str], reading: _Reading) -> None:
        """On the loop."""
        for name in names:
            try:
                self._rooms.read(name, Read(None, reading.add))
            except ServerError as error:
                reading.add(error)


class _Reading:
    """The answers to one query, which come on other threads.

    ``size`` counts the bytes of all documents; they are kept as long as they are not too many.
    """

    def __init__(self, request: Request, requests: Requests, count: int) -> None:
        self.documents: list[Document] = []
        self.error: ServerError | None = None
        self.size = 0
        self.is_over = False
        self._request = request
        self._requests = requests
        self._missing = count
        self._lock = threading.Lock()

    def add(self, answer: Document | ServerError) -> None:
        with self._lock:
            if isinstance(answer, ServerError):
                self.error = self.error or answer
            else:
                self.size += len(answer.json)
                self.documents.append(answer)
            if self.size > _MAX_BYTES:
                self.documents.clear()
            self._missing -= 1
            self.is_over = not self._missing
        if self.is_over:
            self._requests.post(self._request.resume)
