"""One object that one client has open: messages both ways, until either ends it.

The states of a stream and its allowed steps::

    opening -> open      create_client_connection has returned
    opening -> ended     it failed, took too long, or the stream was stopped meanwhile
    open    -> closing   either side closed it: what was sent is still sent
    open    -> ended     stopped, or a function failed: what waits is dropped
    closing -> ended     everything is sent, or it was stopped

``on_close`` is called when a connection was made and the stream is closing or ended. The request of
a stream is answered when it ended.
"""

from __future__ import annotations

import enum
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from sqlrooms_server.errors import Busy, Cancelled, QueryId, ServerError, ShuttingDown
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin.chain import failure
from sqlrooms_server.plugin.objects import ObjectStream
from sqlrooms_server.plugins.object_lanes import Lanes
from sqlrooms_server.plugins.object_types import Target
from sqlrooms_server.plugins.outgoing import Outgoing
from sqlrooms_server.plugins.runner import Runner, Running
from sqlrooms_server.plugins.tickets import Tickets, described
from sqlrooms_server.protocol import encode_reply

log = logging.getLogger(__name__)

# What a client may have sent that on_data has not returned from. One message may come in addition.
WINDOW_BYTES = 1 << 20

# How long a plain on_data may go on after its stream ended before on_close is called all the same.
_LAST_SECONDS = 1.0


class State(enum.Enum):
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    ENDED = "ended"


class OpenObject(Request):
    """The request of a stream. For the loop thread, if nothing else is said."""

    # More messages belong to it.
    goes_on = True

    def __init__(
        self,
        requests: Requests,
        peer: Peer,
        query_id: QueryId,
        *,
        name: str,
        target: Target,
        runner: Runner,
        lanes: Lanes,
        tickets: Tickets,
        outgoing: Outgoing,
        on_end: Callable[[OpenObject], None],
    ) -> None:
        super().__init__(requests, peer, query_id)
        self.name = name
        self.target = target
        self.state = State.OPENING
        self._runner = runner
        self._lanes = lanes
        self._tickets = tickets
        self._outgoing = outgoing
        self._on_end = on_end
        # Of what comes: messages, their references and sizes.
        self._incoming: deque[tuple[bytes, list[Any], int]] = deque()
        self._received = self._consumed = self._told = 0
        self._client_closes = False
        # The call under way, and whether there is one: it may end before begin() has returned it.
        self._running: Running | None = None
        self._is_running = False
        # Guards what the thread that makes the connection decides, too.
        self._lock = threading.Lock()
        self._connection: Any = None
        self._must_close = False
        self._was_closed = False
        self._is_hurried = False

    def open(self, handle: ObjectStream) -> None:
        """Let the plugin make the connection."""
        create = self.target.type.create_client_connection
        self._begin(
            "create_client_connection", self._create, create, handle, model=create, then=self._made
        )

    def receive(self, payload: bytes, references: list[Any], size: int) -> None:
        """The client sent ``payload`` in a message of ``size`` bytes."""
        if self.state in (State.CLOSING, State.ENDED) or self._client_closes:
            return
        if self._received - self._consumed > WINDOW_BYTES:
            waiting = self._received - self._consumed
            self.stop(
                Busy(
                    f"{waiting} bytes of messages to object {self.name!r} wait, and its window is "
                    f"{WINDOW_BYTES}; wait for object-ack."
                )
            )
            return
        self._received += size
        self._incoming.append((payload, references, size))
        self._next()

    def acknowledge(self, size: int) -> None:
        """The client has taken ``size`` bytes of messages in all."""
        self._outgoing.acknowledge(size)

    def close_by_client(self) -> None:
        """The client sends no more."""
        self._client_closes = True
        self._next()

    def close(self) -> None:
        """The plugin sends no more."""
        if self.state in (State.OPENING, State.OPEN):
            was_open = self.state is State.OPEN
            self.state = State.CLOSING
            self._incoming.clear()
            if was_open:
                self._close_connection()
                self._outgoing.finish(self._finished)

    def stop(self, reason: ServerError) -> bool:
        """End with ``reason``, and drop what waits."""
        if self.state is State.ENDED:
            return False
        self.fail(reason)
        return True

    def fail(self, error: ServerError) -> None:
        if self.answered:
            return
        self.state = State.ENDED
        self._incoming.clear()
        self._outgoing.drop()
        self._close_connection(at_once=isinstance(error, ShuttingDown))
        self.refuse(error)

    def _answered(self) -> None:
        super()._answered()
        self._tickets.release_of(self)
        self._on_end(self)

    # From the request to the connection. These run where functions of plugins do.

    def _create(self, create: Callable[..., Any], handle: ObjectStream) -> Any:
        made = create(self.target.obj, handle)
        if inspect.iscoroutine(made):
            return self._awaited(made)
        self._adopt(made)
        return None

    async def _awaited(self, made: Any) -> None:
        self._adopt(await made)

    def _adopt(self, connection: Any) -> None:
        for name in ("on_data", "on_close"):
            if not callable(getattr(connection, name, None)):
                raise TypeError(f"{type(connection).__name__} has no function {name}.")
        with self._lock:
            self._connection = connection
            is_late = self._must_close
        if is_late:
            self._close_now()

    def _made(self, _: Any, error: ServerError | None) -> None:
        self._has_ended()
        if self.state is State.ENDED:
            self._close_connection()
            return
        if error is not None:
            self.fail(error)
            return
        was_closed = self.state is State.CLOSING
        self.state = State.OPEN
        self.peer.send(
            encode_reply(
                "object-opened",
                self.query_id,
                object=self.name,
                window=WINDOW_BYTES,
                **described(self.target),
            )
        )
        self._outgoing.begin()
        if was_closed:
            self.close()
        else:
            self._next()

    # One message after the other.

    def _next(self) -> None:
        if self.state is not State.OPEN or self._is_running:
            return
        if self._incoming:
            payload, references, size = self._incoming.popleft()

            def then(_: Any, error: ServerError | None) -> None:
                self._handled(size, error)

            on_data = self._connection.on_data
            self._begin("on_data", on_data, payload, references, model=on_data, then=then)
        elif self._client_closes:
            self.close()

    def _handled(self, size: int, error: ServerError | None) -> None:
        self._has_ended()
        self._consumed += size
        if self.state in (State.CLOSING, State.ENDED):
            self._close_connection()
        elif error is not None:
            self.fail(error)
        else:
            if not self._incoming or self._consumed - self._told >= WINDOW_BYTES // 4:
                self._told = self._consumed
                self.peer.send(encode_reply("object-ack", self.query_id, bytes=self._consumed))
            self._next()

    def _begin(
        self,
        what: str,
        function: Callable[..., Any],
        *arguments: Any,
        model: Callable[..., Any],
        then: Callable[[Any, ServerError | None], None],
    ) -> None:
        self._is_running = True
        told = f"{what} of object {self.name!r}"
        running = self._runner.begin(
            self.target.plugin, told, function, *arguments, then=then, lane=self._lanes.of(model)
        )
        self._running = running if self._is_running else None

    def _has_ended(self) -> None:
        self._is_running = False
        self._running = None

    # The end.

    def _finished(self) -> None:
        """What was sent before the end has left."""
        if self.state is State.CLOSING:
            self.state = State.ENDED
            self.peer.send(encode_reply("object-closed", self.query_id))
            self._answered()

    def _close_connection(self, at_once: bool = False) -> None:
        """Call ``on_close``, after an ``on_data`` that runs."""
        running = self._running
        if running is not None and self._connection is None:
            # It is being made. Who makes it finds that out.
            with self._lock:
                self._must_close = self._connection is None
            if self._must_close:
                running.stop(self._ended())
                return
        elif running is not None:
            is_async = inspect.iscoroutinefunction(self._connection.on_data)
            if is_async or at_once or self._is_hurried:
                # Comes back here, by way of _handled.
                running.stop(self._ended())
            else:
                self._runner.timers.after(
                    _LAST_SECONDS, lambda: self._runner.post(running.stop, self._ended())
                )
            return
        if self._connection is None or self._was_closed:
            return
        on_close = self._connection.on_close
        self._runner.begin(
            self.target.plugin,
            f"on_close of object {self.name!r}",
            self._call_on_close,
            on_close,
            then=self._closed,
        )

    def hurry(self) -> None:
        """The server stops: when this has ended, ``on_close`` waits for nothing."""
        self._is_hurried = True
        if self.state is State.ENDED:
            self._close_connection()

    def _call_on_close(self, on_close: Callable[[], Any]) -> Any:
        with self._lock:
            if self._was_closed:
                return None
            self._was_closed = True
        return on_close()

    def _closed(self, _: Any, error: ServerError | None) -> None:
        if error is not None and not self._was_closed:
            # No thread took it: too much waits there, or the server stops. It is due all the same.
            threading.Thread(target=self._close_now, name="on_close", daemon=True).start()
        elif error is not None:
            log.warning("%s", error)

    def _close_now(self) -> None:
        """Call ``on_close`` on this thread."""
        plugin, what = self.target.plugin, f"on_close of object {self.name!r}"

        async def awaited(coroutine: Any) -> None:
            try:
                await coroutine
            except Exception as error:  # guard: nobody waits for it
                failure(plugin, what, error)

        try:
            value = self._call_on_close(self._connection.on_close)
            if inspect.iscoroutine(value):
                self._runner.aio.spawn(awaited(value))
        except BaseException as error:  # guard: nobody waits for it
            failure(plugin, what, error)

    @staticmethod
    def _ended() -> ServerError:
        return Cancelled("The stream of the object has ended.")
