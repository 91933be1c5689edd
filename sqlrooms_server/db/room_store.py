"""The documents of rooms on disk: a DuckDB file of its own, which SQL of clients does not reach.

A room is a snapshot, in parts, and a log of updates since then. One thread writes; what many rooms
append while it commits goes into the next commit together. Nothing it writes takes long: a snapshot
is written part by part between other commits, and counts from the one that ends it.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db import room_files
from sqlrooms_server.errors import InternalError

log = logging.getLogger(__name__)

Blob = bytes | bytearray

# Small enough that a commit of one delays nobody, large enough that rows cost little.
_PART_BYTES = 1 << 20

# What is committed together, so that acks do not wait for a very large commit.
_MAX_COMMIT_BYTES = 8 << 20

# Up to so many rows one statement with their values is faster than an Arrow table.
_FEW_ROWS = 5


@dataclass
class Line:
    """Appends of a room that build on each other: after one that failed, none may be stored."""

    failure: BaseException | None = None


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


@dataclass
class _Append:
    room: str
    updates: Sequence[Blob]
    line: Line
    done: Callable[[BaseException | None], None]

    @property
    def size(self) -> int:
        return sum(map(len, self.updates))


@dataclass
class _Task:
    """Something else to write. Each step is one transaction.

    ``begin`` is told the number of the last update that was appended before it.
    """

    begin: Callable[[int], Iterator[None]]
    done: Callable[[BaseException | None], None]


class RoomStore:
    """The store. Every method may be called by any thread; what is asked for is done in order.

    ``done`` callbacks are called on the writing thread, with what went wrong, and must be short.
    Raises ``StartupError``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection, self.is_new = room_files.open_store(path)
        self._writer = self._connection.cursor()
        self._seq: int = self._one("SELECT coalesce(max(seq), 0) FROM log")
        self._generation: int = self._one("SELECT coalesce(max(generation), 0) FROM rooms")
        self._known = {name for (name,) in self._all("SELECT room_id FROM rooms")}
        self._changed = threading.Condition()
        self._queue: deque[_Append | _Task] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rooms-store", daemon=True)
        self._thread.start()

    def append(
        self,
        room: str,
        updates: Sequence[Blob],
        line: Line,
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Store updates after those before; with none of them, wait for those before."""
        self._put(_Append(room, updates, line, done))

    def compact(
        self,
        room: str,
        snapshot: Blob,
        pending: bytes,
        marks: list[Any],
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Let a snapshot take the place of what was stored of ``room`` before this call."""
        self._put(
            _Task(lambda upto: self._write_snapshot(room, snapshot, pending, marks, upto), done)
        )

    def set_aside(self, room: str, seqs: Sequence[int], reason: str) -> None:
        """Put updates that cannot be read into quarantine; without any, the snapshot."""

        def done(error: BaseException | None) -> None:
            if error is not None:
                log.error("Room %r could not be put into quarantine.", room, exc_info=error)

        self._put(_Task(lambda _: self._quarantine(room, seqs, reason), done))

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
        if room not in self._known:
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
        """Store the snapshots of another server. For a store that is new."""
        failures: list[BaseException] = []

        def done(error: BaseException | None) -> None:
            if error is not None:
                failures.append(error)

        for room, snapshot in rooms:
            self.compact(room, snapshot, b"", [], done)
        ended = threading.Event()
        self._put(_Task(lambda _: iter(()), lambda _: ended.set()))
        ended.wait()
        if failures:
            raise failures[0]

    def close(self, deadline: float) -> bool:
        """Commit what waits and close; False when that was not done by ``deadline``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._connection.interrupt()
            return False
        try:
            self._writer.close()
            self._connection.close()
        except duckdb.Error as error:
            log.warning("The rooms were not closed cleanly (nothing is lost): %s", error)
        return True

    def _one(self, sql: str) -> Any:
        return self._all(sql)[0][0]

    def _all(self, sql: str) -> list[Any]:
        return self._writer.execute(sql).fetchall()

    def _put(self, entry: _Append | _Task) -> None:
        with self._changed:
            if not self._closing:
                self._queue.append(entry)
                self._changed.notify()
                return
        entry.done(InternalError("The store of the rooms is closed."))

    # What follows runs on the writing thread.

    def _run(self) -> None:
        tasks: deque[tuple[_Task, Iterator[None]]] = deque()
        while True:
            with self._changed:
                while not self._queue and not tasks and not self._closing:
                    self._changed.wait()
                if self._closing and not self._queue and not tasks:
                    return
                appends = self._take_appends()
                entry = self._queue.popleft() if not appends and self._queue else None
            if appends:
                self._commit(appends)
            if isinstance(entry, _Task):
                # All that was appended before it has its number by now.
                tasks.append((entry, entry.begin(self._seq)))
            if tasks:
                self._step(tasks)

    def _take_appends(self) -> list[_Append]:
        taken: list[_Append] = []
        size = 0
        while self._queue and size <= _MAX_COMMIT_BYTES:
            entry = self._queue[0]
            if isinstance(entry, _Task):
                break
            self._queue.popleft()
            taken.append(entry)
            size += entry.size
        return taken

    def _commit(self, appends: list[_Append]) -> None:
        now = int(time.time() * 1000)
        rows = []
        seq = self._seq
        for append in appends:
            if append.line.failure is None:
                for update in append.updates:
                    seq += 1
                    rows.append((seq, append.room, now, update))
        failure: BaseException | None = None
        if rows:
            new = {row[1] for row in rows} - self._known
            try:
                self._transaction(lambda: self._insert(rows, new, now))
                self._known |= new
            except Exception as error:  # worker-top guard: other rooms need this thread
                log.error("Updates of rooms could not be stored: %s", error)
                failure = error
            # Also after an error, which need not tell what became of the numbers.
            self._seq = seq
        for append in appends:
            if failure is not None and append.updates:
                append.line.failure = append.line.failure or failure
            append.done(append.line.failure)

    def _insert(self, rows: list[tuple[int, str, int, Blob]], new: set[str], now: int) -> None:
        for room in new:
            self._writer.execute("INSERT INTO rooms VALUES (?, ?, 0, 0, NULL, '[]')", [room, now])
        if len(rows) <= _FEW_ROWS:
            values = ", ".join(["(?, ?, ?, ?)"] * len(rows))
            self._writer.execute(
                f"INSERT INTO log VALUES {values}",
                [bytes(v) if isinstance(v, bytearray) else v for row in rows for v in row],
            )
            return
        columns = list(zip(*rows, strict=True))
        types = (pa.int64(), pa.string(), pa.int64(), pa.binary())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
        table = pa.table(arrays, names=["seq", "room_id", "at_ms", "data"])
        self._writer.register("appended", table)
        try:
            self._writer.execute("INSERT INTO log SELECT * FROM appended")
        finally:
            self._writer.unregister("appended")

    def _transaction(self, write: Callable[[], object]) -> None:
        self._writer.execute("BEGIN")
        try:
            write()
            self._writer.execute("COMMIT")
        except BaseException:
            try:
                self._writer.execute("ROLLBACK")
            except duckdb.Error:
                log.debug("Nothing to roll back.")
            raise

    def _step(self, tasks: deque[tuple[_Task, Iterator[None]]]) -> None:
        task, steps = tasks[0]
        error: BaseException | None = None
        try:
            next(steps)
            return
        except StopIteration:
            pass
        except Exception as failure:  # worker-top guard: other rooms need this thread
            log.error("A snapshot of a room could not be stored: %s", failure)
            error = failure
        tasks.popleft()
        task.done(error)

    def _write_snapshot(
        self, room: str, snapshot: Blob, pending: bytes, marks: list[Any], upto: int
    ) -> Iterator[None]:
        self._generation += 1
        generation = self._generation
        view = memoryview(snapshot)
        parts = [bytes(view[n : n + _PART_BYTES]) for n in range(0, len(view), _PART_BYTES)]

        def end() -> None:
            # The last part with what makes it count: of a small snapshot, all in one transaction.
            self._insert_part(room, generation, len(parts) - 1, parts[-1] if parts else b"")
            self._end_snapshot(room, generation, len(view), pending, marks, upto)

        for number, part in enumerate(parts[:-1]):
            self._transaction(functools.partial(self._insert_part, room, generation, number, part))
            yield
        self._transaction(end)

    def _insert_part(self, room: str, generation: int, number: int, part: bytes) -> None:
        self._writer.execute(
            "INSERT INTO parts VALUES (?, ?, ?, ?)", [room, generation, number, part]
        )

    def _end_snapshot(
        self, room: str, generation: int, size: int, pending: bytes, marks: list[Any], upto: int
    ) -> None:
        writer = self._writer
        rows = writer.execute(
            "SELECT greatest(max(updated_ms), (SELECT max(at_ms) FROM log WHERE room_id = $1)) "
            "FROM rooms WHERE room_id = $1",
            [room],
        ).fetchall()
        updated = rows[0][0] or int(time.time() * 1000)
        writer.execute("DELETE FROM parts WHERE room_id = ? AND generation < ?", [room, generation])
        writer.execute("DELETE FROM rooms WHERE room_id = ?", [room])
        writer.execute(
            "INSERT INTO rooms VALUES (?, ?, ?, ?, ?, ?)",
            [room, updated, generation, size, pending, json.dumps(marks)],
        )
        writer.execute("DELETE FROM log WHERE room_id = ? AND seq <= ?", [room, upto])
        self._known.add(room)

    def _quarantine(self, room: str, seqs: Sequence[int], reason: str) -> Iterator[None]:
        now = int(time.time() * 1000)
        if not seqs:
            # The parts stay where they are: whoever releases the room finds them in their place.
            self._transaction(
                lambda: self._writer.execute(
                    "INSERT INTO quarantine VALUES (?, ?, 'snapshot', ?, NULL, NULL)",
                    [room, now, reason],
                )
            )
            return

        def move() -> None:
            for seq in seqs:
                self._writer.execute(
                    "INSERT INTO quarantine SELECT room_id, ?, 'update', ?, seq, data FROM log "
                    "WHERE seq = ?",
                    [now, reason, seq],
                )
                self._writer.execute("DELETE FROM log WHERE seq = ?", [seq])

        self._transaction(move)
        yield from ()


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
