"""The documents of rooms on disk: a DuckDB file of its own, which SQL of clients does not reach.

A room is a snapshot, in parts, and a log of updates since then.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb

from sqlrooms_server.db import room_files
from sqlrooms_server.db.room_writer import Append, Blob, Line, RoomWriter, Snapshot, Task

log = logging.getLogger(__name__)

__all__ = ["Blob", "Line", "RoomStore", "Stored"]


@dataclass
class Stored:
    """What is stored of a room.

    ``blocked`` says why its snapshot cannot be used. ``updates`` are its log, each with its number;
    ``pending`` holds those that waited when the snapshot was made. ``marks`` are what
    :meth:`RoomStore.compact` was given.
    """

    snapshot: Blob = b""
    pending: bytes = b""
    updates: list[tuple[int, bytes]] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)
    blocked: str = ""
    updated_ms: int = 0

    @property
    def log_bytes(self) -> int:
        return sum(len(update) for _, update in self.updates)


class RoomStore:
    """The store. Every method may be called by any thread.

    What is appended is stored in order. A large snapshot is written in parts, between what is
    appended after it, and takes the place only of what came before.

    ``done`` callbacks are called on the writing thread, with what went wrong, and must be short.
    Raises ``StartupError``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection, self.is_new = room_files.open_store(path)
        self._writer = RoomWriter(self._connection.cursor())

    def append(
        self,
        room: str,
        updates: Sequence[Blob],
        line: Line,
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Store updates after those before; with none of them, wait for those before."""
        self._writer.put(Append(room, updates, line, done))

    def compact(
        self,
        room: str,
        snapshot: Blob,
        pending: bytes,
        marks: list[Any],
        updated_ms: int,
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Let a snapshot take the place of what was stored of ``room`` before this call.

        ``updated_ms`` is when the document last changed, in milliseconds since 1970.
        """
        written = Snapshot(room, snapshot, pending, marks, updated_ms)

        def begin(upto: int) -> Iterator[None]:
            return self._writer.write_snapshot(written, upto)

        self._writer.put(Task(begin, done))

    def set_aside(self, room: str, seqs: Sequence[int], reason: str) -> None:
        """Put updates that cannot be read into quarantine; without any, the snapshot."""

        def done(error: BaseException | None) -> None:
            if error is not None:
                log.error("Room %r could not be put into quarantine.", room, exc_info=error)

        self._writer.put(Task(lambda _: self._writer.quarantine(room, seqs, reason), done))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was asked for before is done; False when the time is over."""
        reached = threading.Event()
        self.append("", (), Line(), lambda error: reached.set())
        return reached.wait(timeout)

    def load(self, room: str) -> Stored:
        """What is stored of ``room``. Raises ``duckdb.Error``."""
        with self._connection.cursor() as cursor:
            cursor.execute("BEGIN")
            rows = cursor.execute(
                "SELECT generation, size, pending, marks, updated_ms FROM rooms WHERE room_id = ?",
                [room],
            ).fetchall()
            if not rows:
                return Stored()
            generation, size, pending, marks, updated = rows[0]
            stored = Stored(pending=pending or b"", marks=json.loads(marks), updated_ms=updated)
            blocked = cursor.execute(
                "SELECT reason FROM quarantine WHERE room_id = ? AND kind = 'snapshot'", [room]
            ).fetchall()
            if blocked:
                stored.blocked = blocked[0][0]
                return stored
            stored.snapshot = _snapshot(cursor, room, generation, size)
            updates = cursor.execute(
                "SELECT seq, data, at_ms FROM log WHERE room_id = ? ORDER BY seq", [room]
            ).fetchall()
        stored.updates = [(seq, data) for seq, data, _ in updates]
        stored.updated_ms = max([updated, *(at for _, _, at in updates[-1:])])
        return stored

    def size_of(self, room: str) -> int:
        """How many bytes are stored of ``room``."""
        if room not in self._writer.known:
            return 0
        with self._connection.cursor() as cursor:
            row = cursor.execute(
                "SELECT (SELECT coalesce(sum(size), 0) FROM rooms WHERE room_id = $1) "
                "+ (SELECT coalesce(sum(octet_length(data)), 0) FROM log WHERE room_id = $1)",
                [room],
            ).fetchone()
        return int(row[0]) if row else 0

    def rooms(self) -> list[tuple[str, int, int]]:
        """Name, last change in milliseconds since 1970, and stored bytes of every room."""
        with self._connection.cursor() as cursor:
            return cursor.execute(
                "SELECT room_id, greatest(updated_ms, coalesce(at_ms, 0)), "
                "(size + coalesce(bytes, 0))::BIGINT FROM rooms LEFT JOIN (SELECT room_id, "
                "max(at_ms) AS at_ms, sum(octet_length(data)) AS bytes FROM log GROUP BY ALL) "
                "USING (room_id) ORDER BY room_id"
            ).fetchall()

    def take_over(self, rooms: Iterator[tuple[str, bytes]]) -> None:
        """Store the snapshots of another server. For a store that is new, also with none."""
        failures: list[BaseException] = []

        def done(error: BaseException | None) -> None:
            if error is not None:
                failures.append(error)

        for room, snapshot in rooms:
            self.compact(room, snapshot, b"", [], int(time.time() * 1000), done)
        ended = threading.Event()
        self._writer.put(Task(lambda _: iter(()), lambda _: ended.set()))
        ended.wait()
        if failures:
            raise failures[0]
        with self._connection.cursor() as cursor:
            room_files.complete(cursor)

    def close(self, deadline: float) -> bool:
        """Commit what waits and close; False when that was not done by ``deadline``."""
        if not self._writer.close(deadline):
            self._connection.interrupt()
            return False
        try:
            self._writer.native.close()
            self._connection.close()
        except duckdb.Error as error:
            log.warning("The rooms were not closed cleanly (nothing is lost): %s", error)
        return True


def _snapshot(
    cursor: duckdb.DuckDBPyConnection, room: str, generation: int, size: int
) -> bytearray:
    """The parts of a snapshot, one behind the other."""
    whole = bytearray(size)
    position = 0
    cursor.execute(
        "SELECT data FROM parts WHERE room_id = ? AND generation = ? ORDER BY part",
        [room, generation],
    )
    while row := cursor.fetchone():
        whole[position : position + len(row[0])] = row[0]
        position += len(row[0])
    return whole
