"""What plugins are told of queries that are done: one after the other, while nobody waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from sqlrooms_server.plugin.chain import Hook
from sqlrooms_server.plugin.values import Outcome, Query

log = logging.getLogger(__name__)

_NAP_SECONDS = 0.02


class Journal:
    """Calls ``query_done`` of each plugin on a thread of its own, which starts with the first call.

    At most ``limit`` calls wait for one plugin; those over it are not made.
    """

    def __init__(self, hooks: Sequence[Hook], limit: int) -> None:
        self._readers = [_Reader(hook, limit) for hook in hooks]

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return bool(self._readers)

    def tell(self, query: Query, outcome: Outcome) -> None:
        """``query`` is done. For the loop thread; never waits."""
        for reader in self._readers:
            reader.tell(query, outcome)

    def close(self, deadline: float) -> None:
        """Make the calls that wait, until ``deadline`` (``time.monotonic``), and then no more."""
        for reader in self._readers:
            reader.end()
        for reader in self._readers:
            reader.join(deadline)


class _Reader:
    """One plugin, and the calls that wait for it."""

    def __init__(self, hook: Hook, limit: int) -> None:
        self._plugin, self._hook = hook
        self._limit = limit
        self._waiting: deque[tuple[Query, Outcome]] = deque()
        self._missed = 0
        self._is_ending = False
        self._is_cut_short = False
        self._is_asleep = False
        self._woken = threading.Condition()
        self._thread: threading.Thread | None = None

    def tell(self, query: Query, outcome: Outcome) -> None:
        if self._is_ending:
            return
        if len(self._waiting) >= self._limit:
            self._miss()
            return
        self._waiting.append((query, outcome))
        if self._thread is None:
            name = f"query_done of {self._plugin.name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        elif self._is_asleep:
            with self._woken:
                self._woken.notify()

    def _miss(self) -> None:
        if not self._missed:
            log.warning(
                "Plugin %r is too slow on query_done: %d calls wait, which is the limit "
                "(--plugin-backlog). It misses those that come next.",
                self._plugin.name,
                self._limit,
            )
        self._missed += 1

    def end(self) -> None:
        self._is_ending = True
        with self._woken:
            self._woken.notify()

    def join(self, deadline: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            self._is_cut_short = True
            left = len(self._waiting)
            if left:
                log.warning("Plugin %r missed the last %d query_done.", self._plugin.name, left)

    def _run(self) -> None:
        while self._has_more():
            while self._waiting and not self._is_cut_short:
                query, outcome = self._waiting.popleft()
                try:
                    self._hook(query, outcome)
                except BaseException:  # guard: a plugin must fail alone
                    log.exception("Plugin %r failed on query_done.", self._plugin.name)
            # Once it has caught up, the next time is worth another warning.
            missed, self._missed = self._missed, 0
            if missed:
                log.warning("Plugin %r missed %d query_done.", self._plugin.name, missed)

    def _has_more(self) -> bool:
        """Wait for the next calls; False at the end."""
        with self._woken:
            if not self._waiting and not self._is_ending:
                # A thread that woke for each query would take the interpreter from the next one.
                self._woken.wait(_NAP_SECONDS)
            self._is_asleep = True
            while not self._waiting and not self._is_ending:
                self._woken.wait()
            self._is_asleep = False
            return bool(self._waiting) and not self._is_cut_short
