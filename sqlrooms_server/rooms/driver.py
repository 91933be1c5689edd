"""The thread that drives one process of documents: room after room, command after command.

A command is asked, and what came of it is handed to the store, in one order for each room; the
store hands it on to the loop when it is committed. So an ack means stored, a document that is read
holds what was acked, and whoever joins gets each update exactly once: in the document or after it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlrooms_server.db.room_store import Line
from sqlrooms_server.errors import BadRequest, InternalError, ServerError, ShuttingDown
from sqlrooms_server.rooms import commands
from sqlrooms_server.rooms.child import Child, DocumentBroke, Lost, RefusedByLoro
from sqlrooms_server.rooms.keeping import LARGE_BYTES, LARGE_UPDATE_BYTES, Keeping, Moved
from sqlrooms_server.rooms.room import (
    Failed,
    Item,
    Leave,
    Left,
    Outcome,
    Room,
    Unload,
    Unloaded,
    Update,
)

if TYPE_CHECKING:
    from sqlrooms_server.rooms.pool import Pool

log = logging.getLogger(__name__)

# What was under way when a document or its process broke is done again, alone, until it was there
# this often. Twice may be an accident of others.
MAX_ATTEMPTS = 3

_LOOK_SECONDS = 5.0

# A document whose loading ends its process is not tried again for this time.
_BLOCKED_SECONDS = 60.0


class Driver:
    """One process and its thread. ``is_small``: rooms that grow leave it for one of their own."""

    def __init__(self, pool: Pool, name: str, *, is_small: bool) -> None:
        self.is_small = is_small
        self._pool = pool
        self._keeping = Keeping(pool.store, pool.limits, self.ask)
        # On the lock of the pool: a room changes its driver.
        self._ready = threading.Condition(pool.lock)
        self._waiting: deque[Room] = deque()
        # Those that it has to do with, and those whose documents are in the process.
        self._rooms: set[Room] = set()
        self._child: Child | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def room_count(self) -> int:
        return len(self._rooms) + len(self._waiting)

    @property
    def pid(self) -> int | None:
        """The process, when there is one."""
        child = self._child
        return None if child is None else child.pid

    def schedule(self, room: Room) -> None:
        """``room`` has something to do. The caller holds the lock of the pool."""
        room.is_scheduled = True
        self._waiting.append(room)
        self._ready.notify()

    def close(self) -> None:
        """End when nothing waits any more. The caller holds the lock of the pool."""
        self._is_closing = True
        self._ready.notify()

    def join(self, deadline: float) -> None:
        """Wait for the end; what is not done by ``deadline`` is not done."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            with self._pool.lock:
                self._waiting.clear()
            child = self._child
            if child is not None:
                child.kill()
            self._thread.join(0.2)

    def ask(self, *fields: Any, blobs: Any = ()) -> tuple[tuple[Any, ...], list[Any]]:
        """The answer of the process, which is started if need be."""
        if self._child is None:
            self._child = Child(self._pool.limits.memory)
        return self._child.ask(*fields, blobs=blobs)

    def _run(self) -> None:
        interval = min(_LOOK_SECONDS, max(0.05, self._pool.limits.idle_seconds / 2))
        looked = time.monotonic()
        while True:
            room, items = None, []
            with self._ready:
                if not self._waiting and not self._is_closing:
                    self._ready.wait(interval)
                if self._waiting:
                    room = self._waiting.popleft()
                    items = room.take()
                elif self._is_closing:
                    break
            if room is not None:
                self._guarded(functools.partial(self._handle, room, items))
                with self._ready:
                    room.is_scheduled = False
                    if room.queue:
                        room.driver.schedule(room)
            if time.monotonic() - looked > interval:
                looked = time.monotonic()
                self._guarded(self._look_after)
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # worker-top guard: other rooms need this thread
            log.exception("The thread of a process of documents failed.")

    def _handle(self, room: Room, items: list[Item]) -> None:
        self._rooms.add(room)
        try:
            if isinstance(items[0], Unload):
                self._unload(room)
                return
            if isinstance(items[0], Leave):
                # Whatever has become of the document.
                self._tell_behind(room, Left(room, items))
                return
            self._load(room, [item.size for item in items if isinstance(item, Update)])
            commands.run(room, items, self._keeping, self._pool.tell)
            if self._keeping.should_compact(room):
                self._compact(room)
        except Moved:
            self._move(room, items)
        except ServerError as error:
            self._tell_failed(room, items, error)
        except DocumentBroke as error:
            room.is_loaded = False
            # Most of Loro's panics come when it makes a snapshot.
            is_first = commands.changes(items[0]) and not items[0].attempts
            room.is_plain = room.is_plain or not is_first
            self._try_again(room, items, f"it breaks the document: {error}")
        except Lost as error:
            self._lost(error)
            self._try_again(room, items, f"it ends the process of the document: {error}")
        except Exception as error:  # worker-top guard: those who wait need an answer
            log.exception("A command for room %r failed.", room.name)
            room.is_loaded = False
            text = f"The server failed on room {room.name!r}: {type(error).__name__}."
            self._tell_failed(room, items, InternalError(text))

    def _tell_failed(self, room: Room, items: list[Item], error: ServerError) -> None:
        self._tell_behind(room, Failed(room, items, error))

    def _tell_behind(self, room: Room, outcome: Outcome) -> None:
        """Tell ``outcome`` behind what came of the items before."""
        self._pool.store.append(room.name, (), Line(), lambda _: self._pool.tell(outcome))

    def _try_again(self, room: Room, items: list[Item], reason: str) -> None:
        for item in items:
            item.attempts += 1
        if self._is_closing and self._child is None:
            error: ServerError = ShuttingDown("The server is shutting down.")
        elif len(items) == 1 and items[0].attempts >= MAX_ATTEMPTS:
            log.error("Something was refused in room %r: %s.", room.name, reason)
            error = BadRequest(f"This cannot be taken: {reason}.")
        else:
            with self._pool.lock:
                room.put_back(items)
            return
        self._tell_failed(room, items, error)

    def _lost(self, error: Lost) -> None:
        """The process is gone. What was acked is stored; rooms load that when they are needed."""
        log.error("A process of documents was lost: %s. Its rooms are loaded again.", error)
        self._child = None
        for room in self._rooms:
            room.is_loaded = False

    def _load(self, room: Room, more: list[int]) -> None:
        """Let the document be in the process. ``more`` are the sizes of updates that it takes."""
        if room.line.failure is not None:
            # What could not be stored is in the document; nobody was told of it.
            self._keeping.unload(room)
        if self.is_small:
            size = room.size + room.log_bytes if room.is_loaded else self._keeping.stored(room)
            if size + sum(more) > LARGE_BYTES or max(more, default=0) > LARGE_UPDATE_BYTES:
                raise Moved
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                self._keeping.load(room)
                return
            except (Lost, DocumentBroke) as error:
                if isinstance(error, Lost):
                    self._lost(error)
                if attempt == MAX_ATTEMPTS:
                    room.blocked = f"The document of room {room.name!r} cannot be loaded: {error}."
                    room.blocked_until = time.monotonic() + _BLOCKED_SECONDS
                    log.error(room.blocked)
                    raise InternalError(room.blocked) from error

    def _move(self, room: Room, items: list[Item]) -> None:
        """Hand ``room`` over to a process for large ones."""
        try:
            self._keeping.unload(room)
        except Lost as error:
            self._lost(error)
        self._rooms.discard(room)
        with self._pool.lock:
            room.put_back(items)
            room.driver = self._pool.large_driver()

    def _compact(self, room: Room) -> None:
        try:
            self._keeping.compact(room)
        except RefusedByLoro as error:
            log.error("No snapshot can be made of room %r: %s", room.name, error)
        except DocumentBroke as error:
            log.warning("Loro failed on a snapshot of room %r: %s", room.name, error)
            room.is_loaded = False
            room.is_plain = True
        except Lost as error:
            self._lost(error)

    def _unload(self, room: Room) -> None:
        if room.is_loaded and room.log_rows:
            self._compact(room)
        try:
            self._keeping.unload(room)
        except Lost as error:
            self._lost(error)
        self._rooms.discard(room)
        self._tell_behind(room, Unloaded(room, []))

    def _look_after(self) -> None:
        """What time asks for: snapshots of rooms that change seldom, and the end of idle ones."""
        now = time.monotonic()
        for room in list(self._rooms):
            is_idle = not room.members and now - room.last_used > self._pool.limits.idle_seconds
            if is_idle and not room.is_scheduled:
                self._unload(room)
            elif room.is_loaded and self._keeping.should_compact(room):
                self._compact(room)
            else:
                continue
            if self._waiting:
                # One at a time when others wait.
                return
