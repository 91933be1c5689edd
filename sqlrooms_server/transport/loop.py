"""The loop thread: listening, upgrades, callbacks, and the one way in from other threads."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sqlrooms_server.errors import StartupError
from sqlrooms_server.transport import addresses, native
from sqlrooms_server.transport.connection import Connection
from sqlrooms_server.transport.http import Arriving, Exchange, HttpRequest, read_request
from sqlrooms_server.transport.topics import Topic, Topics

log = logging.getLogger(__name__)

# Bytes in the buffer of uWebSockets at which it drops what is sent and the connection with it.
_MAX_NATIVE_BYTES = 8 << 20

ffi, lib, PLAIN = native.ffi, native.lib, native.PLAIN


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a WebSocket is refused: an HTTP status and a text for the person who looks for it."""

    status: int
    text: str


class Handler(Protocol):
    """What the transport calls, always on the loop thread. Must not block."""

    def upgrade(self, request: HttpRequest) -> object | Refusal:
        """Whatever belongs to the new connection (its ``handler_data``), or a refusal."""

    def opened(self, connection: Connection) -> None: ...

    def message(self, connection: Connection, data: bytes, is_text: bool) -> None: ...

    def closed(self, connection: Connection) -> None: ...

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        """Answer a request, now or later."""


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Sizes in bytes, times in seconds."""

    max_message_size: int
    max_body: int
    max_queued: int
    max_connections: int
    idle_timeout: int


class Transport:
    """A listening server on a thread of its own."""

    def __init__(self, handler: Handler, limits: TransportLimits) -> None:
        self._handler = handler
        self._limits = limits
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake_pending = False
        # Guards the wake-up against the end of the loop, after which it would touch freed memory.
        self._wake_lock = threading.Lock()
        self._loop_runs = False
        self._stopping = False
        self._listening = True
        self._deadline = 0.0
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._connections: dict[int, Connection] = {}
        self._upgrading: dict[int, Connection] = {}
        self._exchanges: dict[int, Exchange] = {}
        self._arriving: dict[int, Arriving] = {}
        self._ids = itertools.count(1)
        self._uv: Any = None
        self._loop: Any = None
        self._app: Any = None
        self._listeners: list[Any] = []
        self._contexts: list[Any] = []
        self._callbacks: list[Any] = []
        self._topics = Topics()
        self.addresses: list[tuple[str, int]] = []

    @property
    def connections(self) -> list[Connection]:
        """Those that are open. For the loop thread."""
        return list(self._connections.values())

    def topic(self) -> Topic:
        """A new topic, which nobody hears. For the loop thread."""
        return self._topics.topic()

    def start(self, host: str, port: int) -> int:
        """Listen on every address of ``host``; the port, also when 0 asked for a free one.

        Raises ``StartupError`` when that is not possible.
        """
        found = addresses.resolve(host, port)
        self._thread = threading.Thread(target=self._run, args=(found, port), name="uws")
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self.addresses[0][1]

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function`` on the loop thread, soon and in order. From any thread.

        Before the loop runs the call waits; after it ended the call is forgotten.
        """
        self._inbox.append((function, arguments))
        if not self._wake_pending:
            with self._wake_lock:
                if self._loop_runs:
                    self._wake_pending = True
                    native.wakeup_loop(self._loop)

    def stop_listening(self) -> None:
        """Accept no more connections; those that are open stay."""
        self.post(self._close_listeners)

    def stop(self, deadline: float) -> None:
        """Send what is queued, close every connection and end the thread.

        ``deadline``, on the clock of ``time.monotonic``, is when clients that do not read are
        left behind.
        """
        if self._thread is None or not self._thread.is_alive():
            return
        self.post(self._begin_stop, deadline)
        self._thread.join()

    def _run(self, found: list[str], port: int) -> None:
        try:
            self._create()
            for address in found:
                self._listen(address, self.addresses[0][1] if self.addresses else port)
        except BaseException as error:  # handed to the thread that waits in start()
            self._failure = error
            try:
                self._tear_down()
            finally:
                self._ready.set()
            return
        self._ready.set()
        while not self._stopping:
            self._turn(lib.SOCKETIFY_RUN_ONCE)
        self._drain()
        self._tear_down()

    def _turn(self, mode: Any) -> None:
        lib.socketify_loop_run(self._uv, mode)
        self._topics.turn_ended()
        # Cleared before the inbox is counted: what is posted from here on wakes the loop again.
        self._wake_pending = False
        # Only what is there now, or posts that post again would keep the sockets waiting.
        for _ in range(len(self._inbox)):
            function, arguments = self._inbox.popleft()
            try:
                function(*arguments)
            except Exception:  # loop-callback guard
                log.exception("A call on the loop thread failed.")

    def _begin_stop(self, deadline: float) -> None:
        """Comes after what was posted before, so that the last replies are still sent."""
        self._deadline = deadline
        self._stopping = True

    def _drain(self) -> None:
        self._close_listeners()
        # What was posted before the stop may have posted the rest of its work.
        self._turn(lib.SOCKETIFY_RUN_NOWAIT)
        for connection in self.connections:
            connection.close(1001, "The server is shutting down.")
        self._turn(lib.SOCKETIFY_RUN_NOWAIT)
        while self._connections and time.monotonic() < self._deadline:
            time.sleep(0.001)
            self._turn(lib.SOCKETIFY_RUN_NOWAIT)

    def _create(self) -> None:
        self._uv = lib.socketify_create_loop()
        self._loop = lib.uws_get_loop_with_native(lib.socketify_get_native_loop(self._uv))
        options = ffi.new("struct us_socket_context_options_t*")
        self._app = lib.uws_create_app(PLAIN, options[0])
        self._topics.app = self._app
        self._loop_runs = True
        behavior = ffi.new("uws_socket_behavior_t*")
        behavior.compression = 0
        # Twice what is allowed: above its limit uWebSockets drops the connection without a word,
        # up to it the client gets an error that names the limit.
        behavior.maxPayloadLength = 2 * self._limits.max_message_size
        behavior.idleTimeout = self._limits.idle_timeout
        # Connection stays far below it. The pongs that answer a flood of pings do not.
        behavior.maxBackpressure = _MAX_NATIVE_BYTES
        behavior.closeOnBackpressureLimit = True
        behavior.resetIdleTimeoutOnSend = False
        behavior.sendPingsAutomatically = True
        behavior.maxLifetime = 0
        behavior.upgrade = self._callback(
            "void(uws_res_t*, uws_req_t*, uws_socket_context_t*, void*)", self._on_upgrade
        )
        behavior.open = self._callback("void(uws_websocket_t*, void*)", self._on_open)
        behavior.message = self._callback(
            "void(uws_websocket_t*, const char*, size_t, uws_opcode_t, void*)", self._on_message
        )
        behavior.drain = self._callback("void(uws_websocket_t*, void*)", self._on_drain)
        behavior.close = self._callback(
            "void(uws_websocket_t*, int, const char*, size_t, void*)", self._on_close
        )
        lib.uws_ws(PLAIN, self._app, b"/*", behavior[0], ffi.NULL)
        on_http = self._callback("void(uws_res_t*, uws_req_t*, void*)", self._on_http)
        lib.uws_app_any(PLAIN, self._app, b"/*", on_http, ffi.NULL)
        self._on_abort_callback = self._callback("void(uws_res_t*, void*)", self._on_abort)
        self._on_data_callback = self._callback(
            "void(uws_res_t*, const char*, size_t, bool, void*)", self._on_data
        )

    def _callback(self, signature: str, function: Callable[..., None]) -> Any:
        callback = ffi.callback(signature, function)
        self._callbacks.append(callback)
        return callback

    def _listen(self, address: str, port: int) -> None:
        listener = self._try_to_listen(address, port, native.EXCLUSIVE_PORT)
        if listener is None and addresses.only_closed_connections(address, port):
            listener = self._try_to_listen(address, port, native.SHARED_PORT)
        if listener is None:
            raise StartupError(addresses.why_not(address, port))
        addresses.let_others_follow(native.descriptor(listener))
        self._listeners.append(listener)
        context = native.socket_context(listener)
        if context not in self._contexts:
            self._contexts.append(context)
        bound = int(lib.us_socket_local_port(PLAIN, listener))
        self.addresses.append((address, bound))

    def _try_to_listen(self, address: str, port: int, options: int) -> Any:
        """The listening socket; None when the port is taken."""
        listeners: list[Any] = []

        def on_listen(listener: Any, config: Any, user_data: Any) -> None:
            if listener != ffi.NULL:
                listeners.append(listener)

        signature = "void(struct us_listen_socket_t*, uws_app_listen_config_t, void*)"
        config = ffi.new("uws_app_listen_config_t*")
        host = ffi.new("char[]", address.encode())
        config.port, config.host, config.options = port, host, options
        lib.uws_app_listen_with_config(
            PLAIN, self._app, config[0], self._callback(signature, on_listen), ffi.NULL
        )
        return listeners[0] if listeners else None

    def _close_listeners(self) -> None:
        if self._listening:
            self._listening = False
            for listener in self._listeners:
                lib.us_listen_socket_close(PLAIN, listener)

    def _tear_down(self) -> None:
        """Close what is left and free the loop. Without it, seven file descriptors stay open."""
        if self._app is not None:
            self._close_listeners()
            for context in self._contexts:
                native.close_sockets(context)
            lib.socketify_loop_run(self._uv, lib.SOCKETIFY_RUN_NOWAIT)
        with self._wake_lock:
            self._loop_runs = False
        if self._app is not None:
            lib.uws_app_destroy(PLAIN, self._app)
        if self._loop is not None:
            native.destroy_loop(self._uv, self._loop)
        self._inbox.clear()

    # Callbacks. None may raise: cffi would print the error and go on with an unanswered request.

    def _on_upgrade(self, res: Any, req: Any, context: Any, user_data: Any) -> None:
        if context not in self._contexts:
            self._contexts.append(context)
        answered = False
        try:
            request = read_request(res, req)
            data: object | Refusal
            if len(self._connections) >= self._limits.max_connections:
                data = Refusal(503, "The server has no room for another connection.")
            else:
                data = self._handler.upgrade(request)
            if isinstance(data, Refusal):
                answered = True
                Exchange(res).respond(data.status, data.text.encode())
                return
            connection = Connection(
                self.post,
                remote_address=request.remote_address,
                max_queued=self._limits.max_queued,
                on_cut_off=self._cut_off,
                handler_data=data,
            )
            number = next(self._ids)
            self._upgrading[number] = connection
            target = ffi.new("const char**")

            def header(name: bytes) -> bytes:
                length = lib.uws_req_get_header(req, name, len(name), target)
                return native.unpack(target[0], length)

            key = header(b"sec-websocket-key")
            # A browser fails unless one of the protocols it offers is chosen.
            protocol = header(b"sec-websocket-protocol").split(b",")[0].strip()
            extensions = header(b"sec-websocket-extensions")
            answered = True
            lib.uws_res_upgrade(
                PLAIN,
                res,
                native.integer_pointer(number),
                *(key, len(key), protocol, len(protocol), extensions, len(extensions)),
                context,
            )
        except Exception:  # loop-callback guard
            log.exception("An upgrade failed.")
            if not answered:
                Exchange(res).respond(500, b"internal error")

    def _on_open(self, ws: Any, user_data: Any) -> None:
        number = native.pointer_key(native.ws_user_data(PLAIN, ws))
        connection = self._upgrading.pop(number)
        self._connections[native.pointer_key(ws)] = connection
        connection.opened(ws)
        self._guarded(self._handler.opened, connection)

    def _on_message(self, ws: Any, data: Any, length: int, opcode: Any, user_data: Any) -> None:
        connection = self._connections[native.pointer_key(ws)]
        if connection.is_cut_off:
            return
        message = native.unpack(data, length)
        self._guarded(self._handler.message, connection, message, opcode == native.TEXT)

    def _on_drain(self, ws: Any, user_data: Any) -> None:
        connection = self._connections.get(native.pointer_key(ws))
        if connection is not None:
            self._guarded(connection.pump)

    def _on_close(self, ws: Any, code: int, reason: Any, length: int, user_data: Any) -> None:
        connection = self._connections.pop(native.pointer_key(ws), None)
        if connection is None:
            return
        self._guarded(connection.closed)
        if not connection.is_cut_off:
            self._guarded(self._handler.closed, connection)

    def _cut_off(self, connection: Connection) -> None:
        """Whoever does not read has left, as far as others are concerned."""
        log.warning("A client at %s does not read and was given up.", connection.remote_address)
        self._guarded(self._handler.closed, connection)

    def _on_http(self, res: Any, req: Any, user_data: Any) -> None:
        number = next(self._ids)
        exchange = self._exchanges[number] = Exchange(res)
        pointer = native.integer_pointer(number)
        lib.uws_res_on_aborted(PLAIN, res, self._on_abort_callback, pointer)
        try:
            request = read_request(res, req)
            if request.method == "POST":
                self._arriving[number] = Arriving(request, exchange)
                lib.uws_res_on_data(PLAIN, res, self._on_data_callback, pointer)
            else:
                self._handler.http(request, exchange)
        except Exception:  # loop-callback guard
            log.exception("An HTTP request failed.")
            exchange.respond(500, b"internal error")
        self._forget_answered()

    def _on_data(self, res: Any, data: Any, length: int, last: bool, user_data: Any) -> None:
        number = native.pointer_key(user_data)
        arriving = self._arriving.get(number)
        if arriving is None:
            return
        arriving.add(native.unpack(data, length))
        if arriving.size > self._limits.max_body:
            text = f"The body has more than {self._limits.max_body} bytes (--max-notify-size)."
            arriving.exchange.respond(413, text.encode())
        elif last:
            try:
                self._handler.http(arriving.request(), arriving.exchange)
            except Exception:  # loop-callback guard
                log.exception("An HTTP request failed.")
                arriving.exchange.respond(500, b"internal error")
        if last or not arriving.exchange.is_open:
            del self._arriving[number]
        self._forget_answered()

    def _forget_answered(self) -> None:
        """Most are answered at once; those that wait are few."""
        self._exchanges = {n: e for n, e in self._exchanges.items() if e.is_open}

    def _on_abort(self, res: Any, user_data: Any) -> None:
        self._arriving.pop(native.pointer_key(user_data), None)
        exchange = self._exchanges.pop(native.pointer_key(user_data), None)
        if exchange is not None:
            exchange.aborted()

    @staticmethod
    def _guarded(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:  # loop-callback guard
            log.exception("A callback of the transport failed.")
