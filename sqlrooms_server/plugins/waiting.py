"""What threads and coroutines wait for together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Waiting:
    """A lock, and those who wait until something that it guards has changed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._futures: list[asyncio.Future[None]] = []

    def __enter__(self) -> None:
        self._changed.acquire()

    def __exit__(self, *_: object) -> None:
        self._changed.release()

    def changed(self) -> None:
        """Let those who wait look again. From any thread."""
        with self._changed:
            self._changed.notify_all()
            futures, self._futures = self._futures, []
        for future in futures:
            # A loop that has ended has nobody who waits.
            with contextlib.suppress(RuntimeError):
                future.get_loop().call_soon_threadsafe(_wake, future)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for ``condition``, which is looked at with the lock held."""
        with self._changed:
            self._changed.wait_for(condition)

    async def until_async(self, condition: Callable[[], bool]) -> None:
        """The same in a coroutine."""
        # Not at the top: whoever calls this has loaded it, and others need not.
        import asyncio

        while True:
            with self._changed:
                if condition():
                    return
                future = asyncio.get_running_loop().create_future()
                self._futures.append(future)
            await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
