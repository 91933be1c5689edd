"""The thread that writes the file of the rooms.

What many rooms append while it commits goes into the next commit together. Nothing it writes takes
long: a snapshot is written part by part between other commits, and counts from the one that ends
it.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

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
class Append:
    room: str
    updates: Sequence[Blob]
    line: Line
    done: Callable[[BaseException | None], None]

    @property
    def size(self) -> int:
        return sum(map(len, self.updates))


@dataclass(frozen=True)
class Snapshot:
    """What takes the place of a log; see :meth:`RoomStore.compact`."""

    room: str
    data: Blob
    pending: bytes
    marks: list[Any]
    updated_ms: int


@dataclass
class Task:
    """Something else to write. Each step is one transaction.

    ``begin`` is told the number of the last update that was appended before it.
    """

    begin: Callable[[int], Iterator[None]]
    done: Callable[[BaseException | None], None]


class RoomWriter:
    """The thread, and what waits for it. It owns the cursor ``native``."""

    def __init__(self, native: duckdb.DuckDBPyConnection) -> None:
        self.native = native
        self.known = {name for (name,) in self._all("SELECT room_id FROM rooms")}
        self._seq: int = self._all("SELECT coalesce(max(seq), 0) FROM log")[0][0]
        self._generation: int = self._all("SELECT coalesce(max(generation), 0) FROM rooms")[0][0]
        self._changed = threading.Condition()
        self._queue: deque[Append | Task] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rooms-store", daemon=True)
        self._thread.start()

    def put(self, entry: Append | Task) -> None:
        with self._changed:
            if not self._closing:
                self._queue.append(entry)
                self._changed.notify()
                return
        entry.done(InternalError("The store of the rooms is closed."))

    def close(self, deadline: float) -> bool:
        """Write what waits, and end; False when that was not done by ``deadline``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _all(self, sql: str) -> list[Any]:
        return self.native.execute(sql).fetchall()

    # What follows runs on the thread.

    def _run(self) -> None:
        tasks: deque[tuple[Task, Iterator[None]]] = deque()
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
            if isinstance(entry, Task):
                # All that was appended before it has its number by now.
                tasks.append((entry, entry.begin(self._seq)))
            if tasks:
                self._step(tasks)

    def _take_appends(self) -> list[Append]:
        taken: list[Append] = []
        size = 0
        while self._queue and size <= _MAX_COMMIT_BYTES:
            entry = self._queue[0]
            if isinstance(entry, Task):
                break
            self._queue.popleft()
            taken.append(entry)
            size += entry.size
        return taken

    def _commit(self, appends: list[Append]) -> None:
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
            new = {row[1] for row in rows} - self.known
            try:
                self._transaction(lambda: self._insert(rows, new, now))
                self.known |= new
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
            self.native.execute("INSERT INTO rooms VALUES (?, ?, 0, 0, NULL, '[]')", [room, now])
        if len(rows) <= _FEW_ROWS:
            values = ", ".join(["(?, ?, ?, ?)"] * len(rows))
            self.native.execute(
                f"INSERT INTO log VALUES {values}",
                [bytes(v) if isinstance(v, bytearray) else v for row in rows for v in row],
            )
            return
        columns = list(zip(*rows, strict=True))
        types = (pa.int64(), pa.string(), pa.int64(), pa.binary())
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
        table = pa.table(arrays, names=["seq", "room_id", "at_ms", "data"])
        self.native.register("appended", table)
        try:
            self.native.execute("INSERT INTO log SELECT * FROM appended")
        finally:
            self.native.unregister("appended")

    def _transaction(self, write: Callable[[], object]) -> None:
        self.native.execute("BEGIN")
        try:
            write()
            self.native.execute("COMMIT")
        except BaseException:
            try:
                self.native.execute("ROLLBACK")
            except duckdb.Error:
                log.debug("Nothing to roll back.")
            raise

    def _step(self, tasks: deque[tuple[Task, Iterator[None]]]) -> None:
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

    def write_snapshot(self, snapshot: Snapshot, upto: int) -> Iterator[None]:
        self._generation += 1
        generation = self._generation
        view = memoryview(snapshot.data)
        parts = [bytes(view[n : n + _PART_BYTES]) for n in range(0, len(view), _PART_BYTES)]
        room = snapshot.room

        def end() -> None:
            # The last part with what makes it count: of a small snapshot, all in one transaction.
            self._insert_part(room, generation, len(parts) - 1, parts[-1] if parts else b"")
            self._end_snapshot(snapshot, generation, upto)

        for number, part in enumerate(parts[:-1]):
            self._transaction(functools.partial(self._insert_part, room, generation, number, part))
            yield
        self._transaction(end)

    def _insert_part(self, room: str, generation: int, number: int, part: bytes) -> None:
        self.native.execute(
            "INSERT INTO parts VALUES (?, ?, ?, ?)", [room, generation, number, part]
        )

    def _end_snapshot(self, snapshot: Snapshot, generation: int, upto: int) -> None:
        writer, room = self.native, snapshot.room
        writer.execute("DELETE FROM parts WHERE room_id = ? AND generation < ?", [room, generation])
        writer.execute("DELETE FROM rooms WHERE room_id = ?", [room])
        writer.execute(
            "INSERT INTO rooms VALUES (?, ?, ?, ?, ?, ?)",
            [
                room,
                snapshot.updated_ms,
                generation,
                len(snapshot.data),
                snapshot.pending,
                json.dumps(snapshot.marks),
            ],
        )
        writer.execute("DELETE FROM log WHERE room_id = ? AND seq <= ?", [room, upto])
        self.known.add(room)

    def quarantine(self, room: str, seqs: Sequence[int], reason: str) -> Iterator[None]:
        now = int(time.time() * 1000)
        if not seqs:
            # The parts stay where they are: whoever releases the room finds them in their place.
            self._transaction(
                lambda: self.native.execute(
                    "INSERT INTO quarantine VALUES (?, ?, 'snapshot', ?, NULL, NULL)",
                    [room, now, reason],
                )
            )
            return

        def move() -> None:
            for seq in seqs:
                self.native.execute(
                    "INSERT INTO quarantine SELECT room_id, ?, 'update', ?, seq, data FROM log "
                    "WHERE seq = ?",
                    [now, reason, seq],
                )
                self.native.execute("DELETE FROM log WHERE seq = ?", [seq])

        self._transaction(move)
        yield from ()
