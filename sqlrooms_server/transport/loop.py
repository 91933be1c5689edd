"""The loop thread: listening, upgrades, callbacks, and the one way in from other threads."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlrooms_server.errors import StartupError
from sqlrooms_server.transport import addresses, native, sockets
from sqlrooms_server.transport.certificates import Certificate
from sqlrooms_server.transport.connection import Connection
from sqlrooms_server.transport.exchange import Exchange
from sqlrooms_server.transport.exchanges import TOO_MANY, Exchanges
from sqlrooms_server.transport.http import HttpRequest, RequestReader
from sqlrooms_server.transport.listening import Listeners
from sqlrooms_server.transport.proxies import UNIX, Proxies
from sqlrooms_server.transport.sockets import SocketLimits, Sockets
from sqlrooms_server.transport.topics import Topic, Topics
from sqlrooms_server.transport.unix_sockets import UnixSocket

log = logging.getLogger(__name__)

# Bytes in the buffer of uWebSockets at which it drops what is sent and the connection with it.
_MAX_NATIVE_BYTES = 8 << 20

# Out of descriptors, the loop spins: the system keeps saying that somebody wants to connect. After
# so many turns it is looked whether that is so, and slept for some milliseconds until it is over.
_TURNS_BETWEEN_LOOKS = 4096
_PAUSE_SECONDS = 0.005

# More than the clients of an office behind one address.
_MAX_PER_ADDRESS = 1000

ffi, lib = native.ffi, native.lib


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
        """Answer a request, now or later. Its body, if there is one, is still to be read."""


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Sizes in bytes, times in seconds.

    ``max_waiting`` is of sockets that are no WebSockets. ``max_per_address`` counts loopback
    addresses, too, unless it is 0, which means 1000.
    """

    max_message_size: int
    max_queued: int
    max_connections: int
    idle_timeout: int
    max_per_address: int = 0
    max_waiting: int = 1_000_000


class Transport:
    """A listening server on a thread of its own.

    With ``unix_socket`` it listens there only, with ``certificate`` it speaks TLS only.
    ``proxy_headers`` are the headers, besides those that every request has, to take from the
    trusted ones of ``proxies``.
    """

    def __init__(
        self,
        handler: Handler,
        limits: TransportLimits,
        *,
        certificate: Certificate | None = None,
        proxies: Proxies | None = None,
        proxy_headers: Sequence[str] = (),
        unix_socket: UnixSocket | None = None,
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._certificate = certificate
        self._tls = native.PLAIN if certificate is None else native.TLS
        self._unix_socket = unix_socket
        self._reader = RequestReader(
            self._tls, proxies, proxy_headers, is_unix=unix_socket is not None
        )
        self._sockets = Sockets(
            SocketLimits(
                limits.max_waiting,
                limits.max_per_address or _MAX_PER_ADDRESS,
                sockets.descriptors(),
            )
        )
        self._exchanges = Exchanges(self._tls, self._reader, self._sockets, handler.http, self.post)
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake_pending = False
        # Guards the wake-up against the end of the loop, after which it would touch freed memory.
        self._wake_lock = threading.Lock()
        self._loop_runs = False
        self._stopping = False
        self._deadline = 0.0
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._connections: dict[int, Connection] = {}
        self._upgrading: dict[int, Connection] = {}
        # What to tell about a WebSocket when it closes.
        self._places: dict[Connection, str | None] = {}
        self._ids = itertools.count(1)
        self._turns = 0
        self._uv: Any = None
        self._loop: Any = None
        self._app: Any = None
        self._listeners: Listeners | None = None
        self._callbacks: list[Any] = []
        self._topics = Topics(self._tls)
        self.addresses: list[tuple[str, int]] = []

    @property
    def connections(self) -> list[Connection]:
        """Those that are open. For the loop thread."""
        return list(self._connections.values())

    def read_all_headers(self) -> None:
        """Let requests have all of their headers. Before :meth:`start`."""
        self._reader.reads_all = True

    def topic(self) -> Topic:
        """A new topic, which nobody hears. For the loop thread."""
        return self._topics.topic()

    def start(self, host: str, port: int) -> int:
        """Listen on every address of ``host``; the port, also when 0 asked for a free one.

        On a Unix socket, there is neither, and 0 is returned.

        Raises ``StartupError`` when that is not possible.
        """
        found = addresses.resolve(host, port) if self._unix_socket is None else []
        self._thread = threading.Thread(target=self._run, args=(found, port), name="uws")
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self.addresses[0][1] if self.addresses else 0

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
            self._listeners = self._create()
            if self._unix_socket is not None:
                self._listeners.listen_on(self._unix_socket)
            for address in found:
                port = self._listeners.listen(address, port)
                self.addresses.append((address, port))
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
        self._turns += 1
        if self._turns >= _TURNS_BETWEEN_LOOKS:
            self._look_for_exhaustion()
        self._topics.turn_ended()
        self._exchanges.turn_ended()
        # Cleared before the inbox is counted: what is posted from here on wakes the loop again.
        self._wake_pending = False
        # Only what is there now, or posts that post again would keep the sockets waiting.
        for _ in range(len(self._inbox)):
            function, arguments = self._inbox.popleft()
            try:
                function(*arguments)
            except Exception:  # loop-callback guard
                log.exception("A call on the loop thread failed.")

    def _look_for_exhaustion(self) -> None:
        if sockets.are_exhausted():
            time.sleep(_PAUSE_SECONDS)
        else:
            self._turns = 0

    def _begin_stop(self, deadline: float) -> None:
        """Comes after what was posted before, so that the last replies are still sent."""
        self._deadline = deadline
        self._stopping = True

    def _drain(self) -> None:
        self._close_listeners()
        # What was posted before the stop may have posted the rest of its work.
        self._turn(lib.SOCKETIFY_RUN_NOWAIT)
        self._exchanges.refuse_all()
        for connection in self.connections:
            connection.close(1001, "The server is shutting down.")
        self._turn(lib.SOCKETIFY_RUN_NOWAIT)
        while self._connections and time.monotonic() < self._deadline:
            time.sleep(0.001)
            self._turn(lib.SOCKETIFY_RUN_NOWAIT)

    def _create(self) -> Listeners:
        self._uv = lib.socketify_create_loop()
        self._loop = lib.uws_get_loop_with_native(lib.socketify_get_native_loop(self._uv))
        self._app = self._create_app()
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
        lib.uws_ws(self._tls, self._app, b"/*", behavior[0], ffi.NULL)
        self._exchanges.serve(self._app, self._loop)
        on_socket = self._callback("void(uws_res_t*, int, void*)", self._on_socket)
        lib.uws_filter(self._tls, self._app, on_socket, ffi.NULL)
        return Listeners(self._tls, self._app)

    def _create_app(self) -> Any:
        options = ffi.new("struct us_socket_context_options_t*")
        if self._certificate is None:
            return lib.uws_create_app(self._tls, options[0])
        names = [
            ffi.new("char[]", os.fsencode(name))
            for name in (self._certificate.certificate, self._certificate.key)
        ]
        options.cert_file_name, options.key_file_name = names
        app = lib.uws_create_app(self._tls, options[0])
        if app == ffi.NULL or lib.uws_constructor_failed(self._tls, app):
            raise StartupError(
                f"The TLS library cannot use --tls-cert {self._certificate.certificate} with "
                f"--tls-key {self._certificate.key}; make a key of ECDSA (P-256) or RSA (2048)."
            )
        return app

    def _callback(self, signature: str, function: Callable[..., None]) -> Any:
        callback = ffi.callback(signature, function)
        self._callbacks.append(callback)
        return callback

    def _close_listeners(self) -> None:
        if self._listeners is not None:
            self._listeners.close()

    def _tear_down(self) -> None:
        """Close what is left and free the loop. Without it, seven file descriptors stay open."""
        if self._app is not None:
            if self._listeners is not None:
                self._listeners.close()
                self._listeners.close_sockets()
            lib.socketify_loop_run(self._uv, lib.SOCKETIFY_RUN_NOWAIT)
        with self._wake_lock:
            self._loop_runs = False
        if self._app is not None:
            lib.uws_app_destroy(self._tls, self._app)
        if self._loop is not None:
            native.destroy_loop(self._uv, self._loop)
        self._inbox.clear()

    # Callbacks. None may raise: cffi would print the error and go on with an unanswered request.

    def _on_upgrade(self, res: Any, req: Any, context: Any, user_data: Any) -> None:
        assert self._listeners is not None
        self._listeners.add_context(context)
        key = native.pointer_key(res)
        if self._exchanges.may_not_ask(key):
            lib.uws_res_close(self._tls, res)
            return
        answered = False
        try:
            may_come = self._sockets.asked(key)
            request = self._reader.read(res, req)
            client = self._client_of_proxy(request)
            may_come = may_come and (client is None or self._sockets.may_join(client))
            data = self._verdict(request, may_come)
            if isinstance(data, Refusal):
                answered = True
                Exchange(self._tls, res).respond(data.status, data.text.encode())
                return
            connection = Connection(
                self.post,
                tls=self._tls,
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

            nonce = header(b"sec-websocket-key")
            # A browser fails unless one of the protocols it offers is chosen.
            protocol = header(b"sec-websocket-protocol").split(b",")[0].strip()
            extensions = header(b"sec-websocket-extensions")
            answered = True
            self._places[connection] = self._sockets.upgraded(key, client)
            lib.uws_res_upgrade(
                self._tls,
                res,
                native.integer_pointer(number),
                *(nonce, len(nonce), protocol, len(protocol), extensions, len(extensions)),
                context,
            )
        except Exception:  # loop-callback guard
            log.exception("An upgrade failed.")
            if not answered:
                Exchange(self._tls, res).respond(500, b"internal error")

    def _client_of_proxy(self, request: HttpRequest) -> str | None:
        """The address that a connection through a trusted proxy counts for."""
        if request.is_from_proxy and not self._reader.is_trusted(request.remote_address):
            return request.remote_address
        return None

    def _verdict(self, request: HttpRequest, may_come: bool) -> object | Refusal:
        if not may_come:
            return Refusal(429, TOO_MANY.format(request.remote_address))
        if len(self._connections) >= self._limits.max_connections:
            return Refusal(
                503, "The server has no room for another connection (--max-connections)."
            )
        return self._handler.upgrade(request)

    def _on_socket(self, res: Any, change: int, user_data: Any) -> None:
        """A socket was accepted or closed. Not called for the close of a WebSocket."""
        key = native.pointer_key(res)
        if change < 0:
            self._sockets.closed(key)
            self._exchanges.socket_closed(key)
            return
        try:
            peer = self._reader.peer(res)
            is_exempt = peer == UNIX or self._reader.is_trusted(peer) or self._is_local(peer)
            surplus = self._sockets.opened(key, None if is_exempt else peer, native.descriptor(res))
            if surplus is not None:
                lib.uws_res_close(self._tls, native.integer_pointer(surplus))
        except Exception:  # loop-callback guard
            log.exception("A socket could not be accepted.")

    def _is_local(self, peer: str) -> bool:
        """Whether ``peer`` is of this machine, and such ones are not counted."""
        return not self._limits.max_per_address and addresses.is_loopback(peer)

    def _on_open(self, ws: Any, user_data: Any) -> None:
        number = native.pointer_key(native.ws_user_data(self._tls, ws))
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
        self._sockets.left(self._places.pop(connection, None))
        self._guarded(connection.closed)
        if not connection.is_cut_off:
            self._guarded(self._handler.closed, connection)

    def _cut_off(self, connection: Connection) -> None:
        """Whoever does not read has left, as far as others are concerned."""
        log.warning("A client at %s does not read and was given up.", connection.remote_address)
        self._guarded(self._handler.closed, connection)

    @staticmethod
    def _guarded(function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:  # loop-callback guard
            log.exception("A callback of the transport failed.")
