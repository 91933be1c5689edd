"""Functions called later, on one thread."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

# Python refuses to wait for centuries, and would end the thread.
_LONGEST_WAIT = 3600.0

# Cancelled timers stay in the heap until their time; with more than this many, and more than
# those that are alive, they are cleared away.
_MAX_CANCELLED = 256


class Timer:
    """A call to come. Made by :meth:`Timers.after`."""

    __slots__ = ("_callback", "_timers")

    def __init__(self, timers: Timers, callback: Callable[[], None]) -> None:
        self._timers = timers
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call. From any thread; a call that has begun goes on."""
        if self._callback is not None:
            self._callback = None
            self._timers._cancelled_one()


class Timers:
    """Calls functions after a time. Safe to use from any thread.

    Callbacks run one after the other on a thread that starts when the first timer is set, so
    they must be short and never block.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` in ``seconds``."""
        timer = Timer(self, callback)
        with self._changed:
            entry = (time.monotonic() + seconds, next(self._numbers), timer)
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._changed.notify()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="timers", daemon=True)
                self._thread.start()
        return timer

    def close(self) -> None:
        """Call nothing any more. Not from a callback."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _cancelled_one(self) -> None:
        with self._changed:
            self._cancelled += 1
            if self._cancelled > max(_MAX_CANCELLED, len(self._heap) // 2):
                self._heap = [entry for entry in self._heap if entry[2]._callback is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                    left = self._heap[0][0] - time.monotonic() if self._heap else _LONGEST_WAIT
                    self._changed.wait(min(max(0.0, left), _LONGEST_WAIT))
                if self._closed:
                    return
                timer = heapq.heappop(self._heap)[2]
                callback, timer._callback = timer._callback, None
                if callback is None:
                    self._cancelled = max(0, self._cancelled - 1)
                    continue
            try:
                callback()
            except Exception:  # worker-top guard: later timers need this thread
                log.exception("The callback of a timer failed.")
