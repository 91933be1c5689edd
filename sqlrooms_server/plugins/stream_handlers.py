"""Calling the handler of a stream: an object that is called for each batch, or one function."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from sqlrooms_server.errors import ServerError
from sqlrooms_server.jobs import Lane, Pause, Work
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.plugins.stream_calls import StreamCall
from sqlrooms_server.plugins.stream_requests import StreamRequest

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)


class Share:
    """How many plain functions of the streams of one connection may run at one time."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []

    def enter(self, resume: Callable[[], None]) -> bool:
        """Whether one more may run; otherwise ``resume`` is called when that may have changed."""
        with self._lock:
            if not self._free:
                self._waiting.append(resume)
                return False
            self._free -= 1
            return True

    def leave(self) -> None:
        """It has ended."""
        with self._lock:
            self._free += 1
            # All of them: one that was stopped meanwhile would not take its turn.
            waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume()


def handled_by_function(
    runner: Runner,
    plugin: Plugin,
    function: Callable[..., Any],
    call: StreamCall,
    request: StreamRequest,
) -> Work:
    """``function``, which is async, handles the whole stream."""
    try:
        yield from runner.work(
            *(plugin, repr(call.kind), function, call), resume=request.resume_soon
        )
        request.complete()
    finally:
        call.cancel()


class ObjectHandler:
    """An object of a class handles a stream. It is called by one thread or coroutine at a time."""

    def __init__(
        self,
        runner: Runner,
        plugin: Plugin,
        factory: Callable[..., Any],
        call: StreamCall,
        request: StreamRequest,
        share: Share,
    ) -> None:
        self._share = share
        self._runner = runner
        self._plugin = plugin
        self._factory = factory
        self._call = call
        self._request = request
        self._handler: Any = None
        # Held by the coroutine that runs. One that is cancelled takes a while to end.
        self._turn: asyncio.Lock | None = None

    def work(self) -> Work:
        self._runner.began(1)
        try:
            self._handler = yield from self._ask("the constructor", self._factory, self._call)
            yield from self._take_batches()
            self._request.complete()
        finally:
            # Here on the thread of a worker, or where it was stopped while it waited.
            self._call.cancel()
            self._close()

    def _take_batches(self) -> Work:
        inputs, request, handler = self._request.inputs, self._request, self._handler
        while True:
            yield from self._wait_for_room()
            # Before the look at what waits, which would miss what came in between.
            are_open = inputs.are_open
            taken = inputs.take()
            if taken is None:
                if not are_open:
                    return
                request.awaits_input = True
                yield Pause.WAIT
                request.awaits_input = False
                continue
            source, piece, last = taken
            for batch in source.decode(piece, last):
                yield from self._ask("on_batch", handler.on_batch, batch, source.name)
                yield Pause.TURN
                yield from self._wait_for_room()
            if last and hasattr(handler, "on_end"):
                yield from self._ask("on_end", handler.on_end, source.name)

    def _wait_for_room(self) -> Work:
        """Wait here, where it takes no thread, for what a write would wait for."""
        while any(output.is_full for output in self._request.outputs.values()):
            yield Pause.WAIT

    def _ask(
        self, what: str, function: Callable[..., Any], *arguments: Any
    ) -> Generator[Pause, None, Any]:
        is_plain = not inspect.iscoroutinefunction(function)
        if is_plain:
            while not self._share.enter(self._resume):
                yield Pause.WAIT
        else:
            arguments = (function, *arguments)
            function = self._in_turn
        what = f"{what} of {self._call.kind!r}"
        clock = self._request.clock
        clock.start(what)
        try:
            return (
                yield from self._runner.work(
                    self._plugin, what, function, *arguments, resume=self._resume
                )
            )
        finally:
            clock.stop()
            if is_plain:
                self._share.leave()

    async def _in_turn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        import asyncio

        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            return await function(*arguments)

    def _resume(self) -> None:
        # The job may run before submit() has returned it.
        if self._request.job is not None:
            self._request.job.resume()
        else:
            self._request.resume_soon()

    def _close(self) -> None:
        """Call ``on_close``, if there is one, elsewhere and after everything else."""
        on_close = getattr(self._handler, "on_close", None)
        if on_close is None:
            self._runner.began(-1)
        elif self._has_coroutines():
            future = self._runner.aio.spawn(self._in_turn(self._close_async, on_close))
            future.add_done_callback(lambda _: self._runner.began(-1))
        else:
            try:
                self._runner.scheduler.submit(
                    Lane(),
                    self._close_work(on_close),
                    lambda: None,
                    lambda _: self._runner.began(-1),
                    even_if_full=True,
                )
            except ServerError:
                # The threads have ended, and this is the last one that could do it.
                self._close_now(on_close)
                self._runner.began(-1)

    def _has_coroutines(self) -> bool:
        methods = (
            getattr(self._handler, name, None) for name in ("on_batch", "on_end", "on_close")
        )
        return any(map(inspect.iscoroutinefunction, methods))

    def _close_work(self, on_close: Callable[[], Any]) -> Work:
        self._close_now(on_close)
        return
        yield  # a job is a generator, also one that never pauses

    def _close_now(self, on_close: Callable[[], Any]) -> None:
        try:
            on_close()
        except BaseException as error:  # guard: a plugin must fail alone
            self._log(error)

    async def _close_async(self, on_close: Callable[[], Any]) -> None:
        import asyncio

        try:
            if inspect.iscoroutinefunction(on_close):
                await asyncio.wait_for(on_close(), self._runner.timeout or None)
            else:
                await asyncio.to_thread(on_close)
        except Exception as error:  # guard: a plugin must fail alone
            self._log(error)

    def _log(self, error: BaseException) -> None:
        log.error(
            "Plugin %r failed on on_close of %r.",
            *(self._plugin.name, self._call.kind),
            exc_info=error,
        )
