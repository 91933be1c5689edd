"""A stream as the server sees it: what came, what leaves, when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sqlrooms_server.errors import ServerError, Timeout
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.messages import PluginMessage, StreamAck, StreamData
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Stream
from sqlrooms_server.plugins.stream_inputs import Held, Input, InputLimits, Inputs
from sqlrooms_server.plugins.stream_outputs import Output
from sqlrooms_server.protocol.streams import encode_stream_ack, encode_stream_end
from sqlrooms_server.timers import Timer, Timers


class Clock:
    """How long a call of a handler takes, without the time in which it waits for the client.

    After ``seconds``, ``late`` is called on another thread; 0 is any time.
    """

    def __init__(self, timers: Timers, seconds: float, late: Callable[[str], None]) -> None:
        self._timers = timers
        self._seconds = seconds
        self._late = late
        self._lock = threading.Lock()
        self._what = ""
        self._pauses = 0
        self._timer: Timer | None = None

    def start(self, what: str) -> None:
        """The call ``what`` begins."""
        with self._lock:
            self._what = what
            self._set()

    def stop(self) -> None:
        """It has ended."""
        with self._lock:
            self._what = ""
            self._set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It waits for the client, and has all its time again after that."""
        with self._lock:
            self._pauses += 1
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                self._set()

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._what and not self._pauses and self._seconds:
            what = self._what
            self._timer = self._timers.after(self._seconds, lambda: self._late(what))


class StreamRequest(Request):
    """One stream. For the loop thread, where nothing else is said.

    It is answered when its handler has ended and all outputs have left, or as soon as it is
    stopped: a function of a plugin may never return.
    """

    # What its handler waits for is set by those who call it.
    awaits_input = False
    on_stop: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        requests: Requests,
        peer: Peer,
        message: PluginMessage,
        stream: Stream,
        *,
        limits: InputLimits,
        held: Held,
        clock: Clock,
        idle_timeout: float,
        wakes_job: bool,
    ) -> None:
        super().__init__(requests, peer, message.query_id, size=message.size)
        self.clock = clock
        self.goes_on = bool(stream.inputs)
        self.inputs = Inputs(stream.inputs, limits, held, self._tell_consumed)
        options = message.options
        self.outputs: Mapping[str, Output] = {
            name: Output(name, self, options.window, options.compression) for name in stream.outputs
        }
        self._unsent = len(self.outputs)
        self._idle_timeout = idle_timeout
        self._wakes_job = wakes_job
        self._idle: Timer | None = None
        self._moved_at = time.monotonic()

    def begin(self) -> None:
        """It was taken up."""
        self._look_later(self._idle_timeout)

    def add(self, data: StreamData) -> None:
        """Data of an input arrived. What must not come ends the stream."""
        self.moved()
        error = self.inputs.add(data)
        self.goes_on = self.inputs.are_open
        if error is not None:
            self.stop(error)
        elif self._wakes_job:
            self.resume()

    def acknowledge(self, ack: StreamAck) -> None:
        """The client consumed what it was sent."""
        self.moved()
        output = self.outputs.get(ack.output)
        if output is not None:
            error = output.acknowledge(ack.size)
            if error is not None:
                self.stop(error)

    def complete(self) -> None:
        """The handler has ended. From any thread."""
        for output in self.outputs.values():
            output.finish()
        if not self.outputs:
            self._requests.post(self._end)

    # What outputs call.

    def begin_sending(self, output: Output) -> None:
        self._requests.post(self._send, output)

    def _send(self, output: Output) -> None:
        if not self.answered:
            self.peer.stream_frames(output)

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def has_room(self) -> None:
        if self._wakes_job:
            self.resume()

    def sent_all(self) -> None:
        self._unsent -= 1
        if not self._unsent:
            # Later: what is sent now would go before the message that is being pulled.
            self._requests.post(self._end)

    def _end(self) -> None:
        if not self.answered:
            self.peer.send(encode_stream_end(self.query_id))
            self._answered()

    # What requests are asked.

    def stop(self, reason: ServerError) -> bool:
        if self.answered:
            return False
        self.on_stop()
        if self.job is not None:
            self.job.stop(reason)
        self.fail(reason)
        return True

    def interrupt(self) -> None:
        self.on_stop()

    def done(self, error: BaseException | None) -> None:
        if error is not None:
            self._requests.post(self._finish, error)

    def _time_out(self, error: Timeout) -> None:
        self._requests.post(self.stop, error)

    def _answered(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self.inputs.close()
        super()._answered()
        for output in self.outputs.values():
            output.release()

    def _tell_consumed(self, source: Input) -> None:
        self._requests.post(self._send_ack, source)

    def _send_ack(self, source: Input) -> None:
        if not self.answered and source.told_bytes < source.consumed_bytes:
            source.told_bytes = source.consumed_bytes
            self.peer.send(encode_stream_ack(self.query_id, source.name, source.told_bytes))

    # A client that does nothing.

    def _look_later(self, seconds: float) -> None:
        self._idle = self._requests.timers.after(
            seconds, lambda: self._requests.post(self._look_whether_idle)
        )

    def _look_whether_idle(self) -> None:
        if self.answered:
            return
        idle = time.monotonic() - self._moved_at if self._waits_for_client else 0.0
        if idle < self._idle_timeout:
            self._look_later(self._idle_timeout - idle)
            return
        self.stop(
            Timeout(
                f"The client neither sent nor took anything of the stream for "
                f"{self._idle_timeout:g} s (--stream-idle-timeout)."
            )
        )

    @property
    def _waits_for_client(self) -> bool:
        if any(output.has_unsent for output in self.outputs.values()):
            return True
        awaits_input = self.awaits_input or self.inputs.are_awaited
        return awaits_input and self.inputs.are_open and self.inputs.are_empty
