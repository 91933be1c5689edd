"""The loop of asyncio, on a thread of its own: what is ``async def`` in plugins runs there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)

# For tasks that are cancelled when the server stops.
_LAST_SECONDS = 1.0


class AsyncLoop:
    """Runs coroutines of any thread, from the first one on until :meth:`close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run ``coroutine``. Cancelling the future cancels it."""
        with self._lock:
            if self._is_closed:
                coroutine.close()
                refused: Future[Any] = Future()
                refused.cancel()
                return refused
            return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    @property
    def is_here(self) -> bool:
        """Whether the caller is on its thread."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function`` on its thread, soon; not after the end."""
        with self._lock, contextlib.suppress(RuntimeError):
            if not self._is_closed:
                self._running().call_soon_threadsafe(function, *arguments)

    def close(self, deadline_seconds: float = _LAST_SECONDS) -> None:
        """Cancel what runs, and end the thread. One that blocks is left behind."""
        with self._lock:
            self._is_closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._cancel_all)
        thread.join(deadline_seconds)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, name="asyncio", daemon=True)
            self._thread.start()
        return self._loop

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self._runs_to_its_end(self._loop):
                pass
        finally:
            self._loop.close()

    @staticmethod
    def _runs_to_its_end(loop: asyncio.AbstractEventLoop) -> bool:
        """Run ``loop``; False when it broke off, and has to go on for others."""
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            # asyncio lets these two through, for programs that have one thread.
            log.exception("A coroutine of a plugin raised %s.", type(error).__name__)
            return False
        return True

    def _cancel_all(self) -> None:
        assert self._loop is not None
        loop = self._loop
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()

        async def end() -> None:
            await asyncio.gather(*tasks, return_exceptions=True)
            await loop.shutdown_asyncgens()
            loop.stop()

        self._last = loop.create_task(end())
