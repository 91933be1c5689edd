"""Calling functions of plugins where they cannot hold up anybody else, and for so long only."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from sqlrooms_server.errors import Cancelled, ServerError, Timeout
from sqlrooms_server.jobs import Job, Lane, Pause, Scheduler, Work
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugin.chain import failure
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timer, Timers

if TYPE_CHECKING:
    from sqlrooms_server.plugins.aio import AsyncLoop

Then = Callable[[Any, "ServerError | None"], None]


class Runner:
    """The threads of plugins, which are not those of queries, and the loop of asyncio.

    They start with the first call, so that nothing is there without plugins.
    """

    def __init__(self, settings: Settings, timers: Timers, post: Callable[..., None]) -> None:
        self.timeout = settings.plugin_timeout
        self.post = post
        self.timers = timers
        self._workers = settings.plugin_workers or max(8, 4 * (os.cpu_count() or 1))
        self._max_queue = settings.max_queue
        self._scheduler: Scheduler | None = None
        self._aio: AsyncLoop | None = None
        self._aio_lock = threading.Lock()
        # Calls of begin() that have not ended.
        self._open = 0
        self._all_ended = threading.Condition()

    @property
    def scheduler(self) -> Scheduler:
        """The threads. For the loop thread, and the one that starts and stops the server."""
        if self._scheduler is None:
            self._scheduler = Scheduler(
                self._workers, self._max_queue, self.timers, name="plugin-worker"
            )
        return self._scheduler

    @property
    def aio(self) -> AsyncLoop:
        """The loop of asyncio."""
        with self._aio_lock:
            if self._aio is None:
                # Not at the top: a server without coroutines starts 20 ms sooner.
                from sqlrooms_server.plugins.aio import AsyncLoop

                self._aio = AsyncLoop()
            return self._aio

    def work(
        self,
        plugin: Plugin,
        what: str,
        function: Callable[..., Any],
        *arguments: Any,
        resume: Callable[[], None],
        finish: Callable[[Any], Any] = lambda value: value,
    ) -> Generator[Pause, None, Any]:
        """What ``finish`` makes of what ``function`` returns, for the work of a job which
        ``resume`` lets go on.

        While a coroutine runs, the job is parked. Raises ``ServerError``: that of the function, or
        one that names ``plugin`` and ``what`` it was called for.
        """
        try:
            value = function(*arguments)
            if not inspect.iscoroutine(value):
                return finish(value)
        except BaseException as error:  # guard: also a SystemExit of a plugin is its own
            raise failure(plugin, what, error) from error
        try:
            return finish((yield from self.awaited(value, resume)))
        except GeneratorExit:
            raise
        except BaseException as error:  # guard: a plugin must fail alone
            raise failure(plugin, what, error) from error

    def awaited(self, coroutine: Any, resume: Callable[[], None]) -> Generator[Pause, None, Any]:
        """What ``coroutine`` returns, for the work of a job which ``resume`` lets go on."""
        future = self.aio.spawn(coroutine)
        future.add_done_callback(lambda _: resume())
        try:
            while not future.done():
                yield Pause.WAIT
        finally:
            future.cancel()
        if future.cancelled():
            raise Cancelled("The coroutine was cancelled.")
        return future.result()

    def begin(
        self,
        plugin: Plugin,
        what: str,
        function: Callable[..., Any],
        *arguments: Any,
        then: Then,
        finish: Callable[[Any], Any] = lambda value: value,
        lane: Lane | None = None,
        seconds: float | None = None,
    ) -> Running:
        """Call ``function``; ``then`` gets what it returns, or an error, on the loop thread.

        Before that, ``finish`` makes something of what it returns, on a thread that may block.

        It gets an error, too, when that takes ``seconds`` (--plugin-timeout; 0 is any time).
        """
        running = Running(self, plugin, what, then, finish)
        running.start(
            function, arguments, lane or Lane(), self.timeout if seconds is None else seconds
        )
        return running

    @property
    def is_in_coroutine(self) -> bool:
        """Whether the caller is on the loop of asyncio."""
        return self._aio is not None and self._aio.is_here

    def must_not_block(self, what: str) -> None:
        """Raise ``RuntimeError`` on the loop of asyncio, where ``what`` would hold up others."""
        if self.is_in_coroutine:
            raise RuntimeError(f"{what} waits; in a coroutine, await asyncio.to_thread({what}, …).")

    def phase(self, plugin: Plugin, name: str, seconds: float | None = None) -> None:
        """Let ``plugin`` do what it does in the phase ``name``, for ``seconds`` at most.

        Raises what it raises, or ``TimeoutError``.
        """
        function = getattr(plugin, name)
        if inspect.iscoroutinefunction(function):
            self.aio.spawn(function()).result(seconds)
            return
        if seconds is None:
            function()
            return
        outcome: Future[None] = Future()

        def run() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:  # handed to the thread that waits
                outcome.set_exception(error)

        threading.Thread(target=run, name=f"{name} of {plugin.name}", daemon=True).start()
        outcome.result(seconds)

    def began(self, change: int) -> None:
        """For :class:`Running`: there is one more, or one less."""
        with self._all_ended:
            self._open += change
            if not self._open:
                self._all_ended.notify_all()

    def close(self, deadline: float) -> bool:
        """Let calls of :meth:`begin` end, and then the threads.

        False when a plugin did not let go of one by ``deadline``.
        """
        with self._all_ended:
            seconds = max(0.0, deadline - time.monotonic())
            self._all_ended.wait_for(lambda: not self._open, seconds)
        ended = self._scheduler is None or self._scheduler.close(deadline)
        if self._aio is not None:
            self._aio.close()
        return ended


class Running:
    """A call under way. Methods belong to the loop thread."""

    def __init__(
        self, runner: Runner, plugin: Plugin, what: str, then: Then, finish: Callable[[Any], Any]
    ) -> None:
        self._runner = runner
        self._plugin = plugin
        self._what = what
        self._then: Then | None = then
        self._finish = finish
        self._job: Job | None = None
        self._value: Any = None
        self._timer: Timer | None = None

    def start(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], lane: Lane, seconds: float
    ) -> None:
        runner = self._runner
        try:
            self._job = runner.scheduler.submit(
                lane, self._work(function, arguments), lambda: None, self._done
            )
        except ServerError as error:
            self._answer(error)
            return
        runner.began(1)
        if seconds:
            late = out_of_time(self._plugin, self._what, seconds)
            self._timer = runner.timers.after(seconds, lambda: runner.post(self.stop, late))

    def stop(self, reason: ServerError) -> None:
        """Give up with ``reason``. A function that does not return keeps its thread."""
        if self._then is not None:
            self._answer(reason)
            if self._job is not None:
                self._job.stop(reason)

    def _work(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Work:
        self._value = yield from self._runner.work(
            self._plugin, self._what, function, *arguments, resume=self._resume, finish=self._finish
        )

    def _resume(self) -> None:
        if self._job is not None:
            self._job.resume()
        else:
            # The job may end its first turn before submit() has returned it.
            self._runner.post(self._resume)

    def _done(self, error: BaseException | None) -> None:
        self._runner.began(-1)
        self._runner.post(self._answer, error)

    def _answer(self, error: BaseException | None) -> None:
        then, self._then = self._then, None
        if self._timer is not None:
            self._timer.cancel()
        if then is not None:
            told = None if error is None else failure(self._plugin, self._what, error)
            then(self._value, told)


def out_of_time(plugin: Plugin, what: str, seconds: float) -> Timeout:
    return Timeout(
        f"Plugin {plugin.name!r} took longer than {seconds:g} s on {what} (--plugin-timeout)."
    )
