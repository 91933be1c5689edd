"""Bodies of HTTP requests and answers that pass through plugins while they are on their way."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from sqlrooms_server.errors import Cancelled, ServerError
from sqlrooms_server.jobs import Job, Lane, Pause, Work
from sqlrooms_server.outbox import Outbox
from sqlrooms_server.plugin import Plugin, Response
from sqlrooms_server.plugin.chain import failure
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport import Exchange

if TYPE_CHECKING:
    import asyncio

# Of a body that comes: above it the client waits until all of that was taken. Half a megabyte more
# may be on its way.
_HIGH_BYTES = 1 << 20

# Of an answer: more would only be memory, of as many clients as read slowly.
_AHEAD_BYTES = 512 << 10

_LEFT = "The client went away."


class Patience:
    """Calls ``give_up`` when a plugin is waited for in vain, for ``seconds`` or twice that.

    ``step`` tells how far it has come, and None when nobody waits for it. For the loop thread.
    """

    def __init__(
        self,
        timers: Timers,
        post: Callable[..., None],
        seconds: float,
        step: Callable[[], int | None],
        give_up: Callable[[], None],
    ) -> None:
        self._timers = timers
        self._post = post
        self._seconds = seconds
        self._step = step
        self._give_up = give_up
        self._last: int | None = None
        self._is_over = False
        if seconds:
            self._wait()

    def end(self) -> None:
        """Nobody will wait any more."""
        self._is_over = True

    def _wait(self) -> None:
        self._timers.after(self._seconds, lambda: self._post(self._look))

    def _look(self) -> None:
        if self._is_over:
            return
        step = self._step()
        if step is not None and step == self._last:
            self._give_up()
        else:
            self._last = step
            self._wait()


class BodyReader:
    """The body of a request, as bytes of any size: iterate over it with ``for``, or in a coroutine
    with ``async for``. It must be read to its end, or the request answered without it.

    Raises ``Cancelled`` when the client went away.
    """

    def __init__(self, exchange: Exchange, post: Callable[..., None]) -> None:
        self._exchange = exchange
        self._post = post
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._taken = 0
        self._is_full = False
        self._has_ended = False
        self._is_lost = False
        self.on_lost: Callable[[], None] = lambda: None

    # For the exchange.

    def received(self, data: bytes, last: bool) -> None:
        with self._changed:
            if data:
                self._chunks.append(data)
                self._size += len(data)
            self._has_ended = last
            self._is_full = self._is_full or self._size >= _HIGH_BYTES
            is_full = self._is_full
            self._wake()
        if is_full:
            self._exchange.pause_reading()

    def dropped(self) -> None:
        with self._changed:
            self._is_lost = True
            self._wake()
        self.on_lost()

    def step(self) -> int | None:
        """For :class:`Patience`."""
        with self._changed:
            return self._taken if self._chunks or self._has_ended else None

    # For the plugin.

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with self._changed:
            self._changed.wait_for(self._has_news)
            data = self._take()
        if not data:
            raise StopIteration
        return data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        # Not at the top: whoever awaits has loaded it, and others need not.
        from asyncio import get_running_loop

        while True:
            with self._changed:
                if self._has_news():
                    data = self._take()
                    break
                loop = get_running_loop()
                waiter = loop.create_future()
                self._waiter = loop, waiter
            await waiter
        if not data:
            raise StopAsyncIteration
        return data

    def _has_news(self) -> bool:
        return bool(self._chunks) or self._has_ended or self._is_lost

    def _take(self) -> bytes:
        if self._is_lost:
            raise Cancelled(_LEFT)
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        self._taken += 1
        if self._is_full:
            self._is_full = False
            self._post(self._exchange.resume_reading)
        return data

    def _wake(self) -> None:
        self._changed.notify_all()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, future)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def is_produced(body: object) -> bool:
    """Whether ``body`` of an answer gives its bytes one after the other."""
    return hasattr(body, "__next__") or hasattr(body, "__anext__")


class _Way(Outbox):
    """What waits to be sent, and who is told when nobody wants it any more."""

    on_gone: Callable[[], None] = staticmethod(lambda: None)

    def dropped(self) -> None:
        super().dropped()
        self.on_gone()


class ProducedAnswer:
    """Sends the answer whose body is an iterator of bytes, plain or asynchronous; of a plain one,
    the steps are taken on the threads of plugins. For the loop thread.

    A client that reads slowly holds none of them. One that fails on the way, or takes
    --plugin-timeout for a step, breaks the answer off.
    """

    def __init__(
        self, runner: Runner, plugin: Plugin, what: str, response: Response, exchange: Exchange
    ) -> None:
        self._runner = runner
        self._plugin = plugin
        self._what = what
        self._body = response.body
        self._exchange = exchange
        self._job: Job | None = None
        self._is_gone = False
        self._steps = 0
        self._way = _Way(
            on_room=self._resume,
            on_data=lambda: runner.post(exchange.pump),
            on_sent=lambda: None,
            high=_AHEAD_BYTES,
        )
        self._way.on_gone = self._gone
        self._patience = Patience(
            runner.timers, runner.post, runner.timeout, self._step, exchange.abort
        )
        kind, headers = response.content_type, response.headers
        exchange.stream(response.status, self._way, kind, headers, length=response.length)
        if self._is_gone:
            self._ended(None)
            return
        try:
            self._job = runner.scheduler.submit(Lane(), self._work(), lambda: None, self._ended)
        except ServerError as error:
            self._ended(error)

    def _step(self) -> int | None:
        return self._steps if self._way.is_starving else None

    def _gone(self) -> None:
        self._is_gone = True
        if self._job is not None:
            self._job.stop(Cancelled(_LEFT))

    def _resume(self) -> None:
        # Posted, since the job may pause before submit() has returned it.
        self._runner.post(self._resume_job)

    def _resume_job(self) -> None:
        if self._job is not None:
            self._job.resume()

    def _work(self) -> Work:
        while True:
            try:
                if hasattr(self._body, "__anext__"):
                    chunk = yield from self._runner.awaited(_next(self._body), self._resume)
                else:
                    chunk = next(self._body)
                if isinstance(chunk, str):
                    raise TypeError("The body must come as bytes, not str; encode() makes them.")
                is_full = self._way.put(memoryview(chunk)) if len(chunk) else False
            except (StopIteration, StopAsyncIteration):
                break
            except GeneratorExit:
                raise
            except BaseException as error:  # guard: a plugin must fail alone
                raise failure(self._plugin, self._what, error) from error
            self._steps += 1
            yield Pause.FULL if is_full else Pause.TURN
        self._way.finish()

    def _ended(self, error: BaseException | None) -> None:
        self._patience.end()
        if error is not None:
            self._runner.post(self._exchange.abort)
        if hasattr(self._body, "aclose"):
            self._runner.aio.spawn(self._body.aclose())
        elif hasattr(self._body, "close"):
            try:
                self._body.close()
            except BaseException as raised:  # guard: a plugin must fail alone
                failure(self._plugin, self._what, raised)


async def _next(body: Any) -> Any:
    value = body.__anext__()
    return await value if inspect.isawaitable(value) else value
