"""Loading a document from the store, and keeping its log short."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.db.room_store import Line, RoomStore, Stored
from sqlrooms_server.errors import InternalError
from sqlrooms_server.rooms.child import RefusedByLoro
from sqlrooms_server.rooms.room import Room

log = logging.getLogger(__name__)

Ask = Callable[..., tuple[tuple[Any, ...], list[Any]]]

# A room of more has a process of its own, where its imports keep no other room waiting.
LARGE_BYTES = 4 << 20
# So has one that gets an update of more: a long text that is concurrent with something takes Loro a
# time that grows with the square of its length, 0.06 s for this one.
LARGE_UPDATE_BYTES = 128 << 10

# The log is read when a room is loaded: so many bytes, or half of a large snapshot, or so many rows
# take a moment.
_MAX_LOG_BYTES = 256 << 10
_MAX_LOG_ROWS = 2000
# A log that is shorter becomes a snapshot after this time, however steadily it grows, if that does
# not write much more than what was changed.
_MAX_LOG_SECONDS = 300.0
_MAX_WRITTEN_AGAIN = 64

# How precisely history is cut.
_MARKS = 8


class Moved(Exception):
    """The room is too large for this process."""


@dataclass(frozen=True)
class RoomLimits:
    """Sizes in bytes, times in seconds. ``memory`` is that of a process; ``history`` 0 is all."""

    max_size: int
    memory: int
    history: float
    idle_seconds: float


class Keeping:
    """For the thread of a driver. ``ask`` raises what :meth:`Child.ask` does."""

    def __init__(self, store: RoomStore, limits: RoomLimits, ask: Ask) -> None:
        self.store = store
        self.limits = limits
        self.ask = ask

    def stored(self, room: Room) -> int:
        """How large a room is that is not loaded."""
        return self.store.size_of(room.name)

    def load(self, room: Room) -> None:
        """Raises ``InternalError`` when what is stored cannot be read."""
        if room.blocked and time.monotonic() < room.blocked_until:
            raise InternalError(room.blocked)
        if room.is_loaded:
            return
        # What the last process has made may still wait to be written.
        self.store.flush()
        try:
            stored = self.store.load(room.name)
        except Exception as error:  # guard: what DuckDB raises for a damaged file has many classes
            log.error("Room %r cannot be read from %s: %s", room.name, self.store.path, error)
            raise InternalError(_unreadable(room, "the file of the rooms is damaged")) from error
        if stored.blocked:
            raise InternalError(_unreadable(room, stored.blocked))
        seqs = [seq for seq, _ in stored.updates]
        updates = [update for _, update in stored.updates]
        if stored.pending:
            updates.insert(0, stored.pending)
            seqs.insert(0, 0)
        try:
            (unreadable,), () = self.ask(
                "load", room.name, room.is_plain, blobs=[stored.snapshot, *updates]
            )
        except RefusedByLoro as error:
            log.error("The snapshot of room %r cannot be read: %s", room.name, error)
            self.store.set_aside(room.name, (), str(error))
            raise InternalError(_unreadable(room, str(error))) from error
        if unreadable:
            log.error(
                "%d stored updates of room %r cannot be read and are kept aside: %s",
                len(unreadable),
                room.name,
                next(iter(unreadable.values())),
            )
            for number, reason in unreadable.items():
                if seqs[number]:
                    self.store.set_aside(room.name, [seqs[number]], reason)
        self._loaded(room, stored)

    def _loaded(self, room: Room, stored: Stored) -> None:
        room.is_loaded = True
        room.line = Line()
        room.size = len(stored.snapshot) + len(stored.pending)
        room.log_bytes = stored.log_bytes
        room.log_rows = len(stored.updates)
        room.log_since = time.monotonic()
        room.marks = stored.marks
        room.updated_ms = stored.updated_ms
        room.base, room.base_version = b"", b""

    def unload(self, room: Room) -> None:
        if room.is_loaded:
            room.is_loaded = False
            self.ask("unload", room.name)
        room.base, room.base_version = b"", b""

    def should_compact(self, room: Room) -> bool:
        """Whether the log of a room has become long or old."""
        if not room.is_loaded or not room.log_rows:
            return False
        if room.log_rows > _MAX_LOG_ROWS or room.log_bytes > max(_MAX_LOG_BYTES, room.size // 2):
            return True
        is_old = time.monotonic() - room.log_since > _MAX_LOG_SECONDS
        return is_old and room.size <= max(1 << 20, _MAX_WRITTEN_AGAIN * room.log_bytes)

    def compact(self, room: Room, *, wait: bool = False) -> None:
        """Let a snapshot take the place of the log, without what history is too old.

        With ``wait``, when it returns that is stored, or ``InternalError`` is raised.
        """
        cut = self._cut(room)
        (), (version, snapshot, pending, frontiers) = self.ask(
            "snapshot", room.name, blobs=[bytes.fromhex(cut)]
        )
        self._mark(room, bytes(frontiers).hex())
        ended = threading.Event()
        failures: list[BaseException] = []

        def done(error: BaseException | None) -> None:
            if error is not None:
                failures.append(error)
            ended.set()

        self.store.compact(room.name, snapshot, bytes(pending), room.marks, room.updated_ms, done)
        room.size = len(snapshot) + len(pending)
        room.log_bytes = room.log_rows = 0
        room.base, room.base_version = snapshot, bytes(version)
        if cut:
            # The document in memory still has what was cut.
            self.unload(room)
        if wait:
            ended.wait()
            if failures:
                room.line.failure = failures[0]
                raise InternalError(f"Room {room.name!r} could not be stored: {failures[0]}")

    def _cut(self, room: Room) -> str:
        """Where history begins that is still wanted; "" to keep all there is."""
        if not self.limits.history:
            return ""
        limit = (time.time() - self.limits.history) * 1000
        old = [mark for mark in room.marks if mark[0] <= limit]
        if not old:
            return ""
        room.marks = [mark for mark in room.marks if mark[0] > limit]
        return str(old[-1][1])

    def _mark(self, room: Room, frontiers: str) -> None:
        """Remember where the document is now."""
        if not self.limits.history:
            return
        now = time.time() * 1000
        if not room.marks or now - room.marks[-1][0] > self.limits.history * 1000 / _MARKS:
            room.marks = [*room.marks, [now, frontiers]]


def _unreadable(room: Room, reason: str) -> str:
    return (
        f"The document of room {room.name!r} cannot be read and is kept aside: {reason}. "
        "Other rooms are not affected; the documentation of rooms says what can be done."
    )
