"""One server: builds the parts from settings, hands messages to features, orders start and stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlrooms_server import __version__
from sqlrooms_server.access import Access
from sqlrooms_server.cache import ResultCache, fingerprint
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.engine import environment as engine_environment
from sqlrooms_server.db.room_files import place, published_rooms
from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.db.sandbox import Sandbox
from sqlrooms_server.db.store import create_meta_tables
from sqlrooms_server.errors import ServerError, ShuttingDown, StartupError
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.cached import CachedQueries
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.chunked import Acks
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.health import Health
from sqlrooms_server.features.live import LiveQueries
from sqlrooms_server.features.queries import Queries
from sqlrooms_server.features.requests import Requests, as_server_error
from sqlrooms_server.features.room_queries import RoomReader
from sqlrooms_server.features.rooms import NoRooms, Rooms
from sqlrooms_server.features.sessions import Sessions
from sqlrooms_server.features.uploads import Uploads
from sqlrooms_server.features.watches import Watches
from sqlrooms_server.gate import Gate
from sqlrooms_server.jobs import Scheduler
from sqlrooms_server.memory import MemoryGuard
from sqlrooms_server.messages import Auth, Message
from sqlrooms_server.peer import Audience, Peer
from sqlrooms_server.protocol import Limits, decode
from sqlrooms_server.rooms.child import is_available
from sqlrooms_server.rooms.keeping import RoomLimits
from sqlrooms_server.rooms.pool import Pool
from sqlrooms_server.rooms.room import Outcome
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport import (
    Certificate,
    Connection,
    Exchange,
    HttpRequest,
    Proxies,
    Refusal,
    Transport,
    TransportLimits,
    UnixSocket,
)
from sqlrooms_server.transport.addresses import is_loopback

log = logging.getLogger(__name__)

# Seconds after a stop began by which each of its steps ends, so that all take at most five.
# Nothing is lost when one of them is cut short.
_QUERIES_STOPPED_BY = 2.5
_ROOMS_STOPPED_BY = 3.0
_REPLIES_SENT_BY = 3.5
_DATABASE_CLOSED_BY = 4.5
_CACHE_CLOSED_BY = 4.8

# What an early message costs besides its bytes.
_EARLY_ENTRY_BYTES = 200


class Server:
    """A DuckDB database behind a WebSocket port.

    ``start`` opens both and returns the port, ``stop`` closes both. Several servers can live in
    one process.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._limits = Limits(settings.max_message_size, settings.max_sql_length)
        self._handlers: dict[type, MessageHandler] = {}
        self._cache: ResultCache | None = None
        self._has_started = False
        self._is_ready = False
        self._is_draining = False
        # Messages that came before the database was open, and their bytes.
        self._early: list[tuple[Connection, bytes, bool]] = []
        self._early_bytes = 0
        self._certificate = (
            Certificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        )
        access = Access(settings)
        self._transport = Transport(
            self,
            TransportLimits(
                max_message_size=settings.max_message_size,
                max_body=settings.max_notify_size,
                max_queued=settings.max_queued_bytes,
                max_connections=settings.max_connections,
                idle_timeout=settings.idle_timeout,
                max_per_address=settings.max_connections_per_address,
                max_waiting=settings.max_http_connections,
            ),
            certificate=self._certificate,
            unix_socket=UnixSocket(settings.unix_socket, int(settings.unix_socket_mode, 8))
            if settings.unix_socket
            else None,
            proxies=Proxies(settings.trusted_proxy, settings.proxy_headers),
            proxy_headers=access.proxy_headers,
        )
        self._health = Health(settings, self._transport.post)
        self._timers = Timers()
        self._gate = Gate(settings, access, self._limits, self._timers, self._transport.post)
        self.channels = Channels(
            settings,
            self._timers,
            self._transport.post,
            lambda: Audience(self._transport.topic()),
        )
        self.connections = Connections(self._transport.post, self.channels.channels_of)
        # Those that need no database. The others join when it is open.
        self._features: Sequence[Feature] = (self._health, self.connections)

    def start(self) -> int:
        """Listen, open the database, and return the port.

        Until the database is open, messages wait and ``/readyz`` answers 503. Raises
        ``StartupError`` with one line that says what to do.
        """
        settings = self.settings
        self._check_exposure()
        if self._certificate is not None:
            self._certificate.check()
        if settings.sync and not is_available():
            raise StartupError(
                "--sync needs the package loro, which is not installed: "
                "pip install 'sqlrooms-server[sync]'."
            )
        with contextlib.ExitStack() as undo:
            undo.callback(self.channels.stop)
            undo.callback(self._timers.close)
            port = self._transport.start(settings.host, settings.port)
            undo.callback(lambda: self._transport.stop(time.monotonic()))
            restore_cache = self._open_cache()
            undo.callback(self._close_cache, None)
            self._engine = Engine(
                settings.db_path,
                read_only=settings.read_only,
                extensions=settings.extensions,
                limits=settings.duckdb_limits,
                sandbox=Sandbox.of(settings),
                max_nesting=settings.max_sql_nesting,
            )
            undo.callback(lambda: self._engine.close(time.monotonic() + _DATABASE_CLOSED_BY))
            restore_cache()
            create_meta_tables(self._engine, settings.meta_namespace, settings.meta_db)
            self._open_rooms()
            self._engine.lock()
            undo.callback(lambda: self._close_rooms(time.monotonic(), time.monotonic() + 1.0))
            self._scheduler = Scheduler(settings.worker_count, settings.max_queue, self._timers)
            undo.callback(lambda: self._scheduler.close(time.monotonic() + _QUERIES_STOPPED_BY))
            if settings.process_memory:
                MemoryGuard(self._scheduler, self._timers, settings.process_memory)
            self._join_features()
            undo.pop_all()
        self._has_started = True
        self._transport.post(self._begin)
        return port

    def reload(self) -> None:
        """Read the file of tokens again, and close the connections of those that are gone.

        A file that is not right is logged, and changes nothing.
        """
        self._gate.reload()

    def _check_exposure(self) -> None:
        """What other machines can reach needs a token, and should have TLS."""
        host = self.settings.host
        if self.settings.unix_socket or is_loopback(host):
            return
        if not self._gate.needs_token:
            if not self.settings.insecure_no_auth:
                raise StartupError(
                    f"--host {host} can be reached from other machines, so a token is needed: set "
                    "SQLROOMS_AUTH_TOKEN or --auth-token-file, or listen on 127.0.0.1. "
                    "--insecure-no-auth would let everybody in."
                )
            log.warning(
                "Whoever can reach %s has full access: there is no token (--insecure-no-auth).",
                host,
            )
        if self._certificate is None:
            log.warning(
                "Tokens and data travel readable to and from %s: use --tls-cert and --tls-key, or "
                "listen on 127.0.0.1 behind a proxy that speaks TLS.",
                host,
            )

    def stop(self) -> bool:
        """Answer what is under way, close connections and the database; True when all ended.

        Takes at most five seconds, whatever runs. False means that a query could not be
        interrupted in time and its thread was left behind.
        """
        if not self._has_started:
            return True
        self._has_started = False
        began = time.monotonic()
        self._is_draining = True
        self._health.drain()
        self._transport.stop_listening()
        ended = self._scheduler.close(began + _QUERIES_STOPPED_BY)
        self._timers.close()
        # Before the transport, so that acks of what is stored now are still sent.
        self._close_rooms(began + _ROOMS_STOPPED_BY, began + _DATABASE_CLOSED_BY)
        reason = ShuttingDown("The server is shutting down.")
        self._transport.post(self._requests.abandon, reason)
        self._transport.stop(began + _REPLIES_SENT_BY)
        self.channels.stop()
        if ended:
            self._sessions.close_all()
        closed = self._engine.close(began + _DATABASE_CLOSED_BY) and ended
        self._close_cache(self._fingerprint() if closed else None, began + _CACHE_CLOSED_BY)
        return closed

    def _fingerprint(self) -> dict[str, Any] | None:
        """What tells that the database file is as this server, or the last one, left it."""
        environment = {
            "server": __version__,
            # Part of what is remembered: it truncates results.
            "max-result-rows": self.settings.max_result_rows,
            **engine_environment(self.settings.extensions),
        }
        return fingerprint(self.settings.db_path, environment)

    def _open_cache(self) -> Callable[[], None]:
        """Before the database is opened. What it returns is to be called after that."""
        settings = self.settings
        if settings.no_cache:
            return lambda: None
        cache = ResultCache(settings.cache_dir, settings.cache_size, name=settings.db_path)
        self._cache = cache
        before = self._fingerprint()
        state = cache.recover(before)

        def restore() -> None:
            # Another process may have written to the file until this one locked it.
            if state is not None and self._fingerprint() == before:
                self._engine.versions.restore(state)
            else:
                cache.forget()

        return restore

    def _close_cache(self, fingerprint: dict[str, Any] | None, deadline: float = 0.0) -> None:
        if self._cache is None:
            return
        state = None if fingerprint is None else self._engine.versions.state()
        self._cache.close(
            None if state is None else fingerprint,
            state,
            deadline=max(0.0, deadline - time.monotonic()),
        )

    def _open_rooms(self) -> None:
        settings = self.settings
        self._room_store: RoomStore | None = None
        self.rooms: Rooms | None = None
        if not settings.sync:
            return
        store = RoomStore(place(settings.db_path, settings.meta_db, settings.rooms_db))
        self._room_store = store
        try:
            if store.is_new:
                store.take_over(published_rooms(self._engine, settings.meta_namespace))
            limits = RoomLimits(
                max_size=settings.max_room_size,
                memory=settings.room_memory,
                history=settings.room_history,
                idle_seconds=settings.room_idle_timeout,
            )

            def open_pool(tell: Callable[[Outcome], None]) -> Pool:
                return Pool(store, limits, tell)

            self.rooms = Rooms(settings, self._transport.post, open_pool)
        except BaseException:
            store.close(time.monotonic() + 1.0)
            raise

    def _close_rooms(self, stopped_by: float, closed_by: float) -> None:
        if self.rooms is not None:
            self.rooms.pool.close(stopped_by)
        if self._room_store is not None and not self._room_store.close(closed_by):
            log.warning("The file of the rooms was not closed in time; nothing acked is lost.")

    def _join_features(self) -> None:
        settings, post = self.settings, self._transport.post
        self._requests = Requests(
            self._scheduler,
            self._timers,
            post,
            max_in_flight=settings.max_in_flight,
            max_held=2 * settings.max_message_size,
        )
        self._sessions = Sessions(
            self._engine,
            self._scheduler,
            self._timers,
            post,
            idle_timeout=settings.session_idle_timeout,
            max_per_connection=settings.max_sessions_per_connection,
            max_sessions=settings.max_sessions,
        )
        reader = None
        if self.rooms is not None and self._room_store is not None:
            reader = RoomReader(self.rooms, self._room_store, self._requests)
        cached = CachedQueries(self._engine, self._scheduler, self._requests, settings, self._cache)
        self._health.start(self._engine)
        # When a client leaves, its requests end before its sessions do.
        self._features = (
            self._health,
            self.connections,
            self._requests,
            self._sessions,
            Acks(self._requests),
            self.channels,
            self.rooms or NoRooms(),
            cached,
            Queries(self._engine, self._requests, self._sessions, cached, settings, reader),
            Uploads(self._engine, self._requests, settings),
            Watches(self._engine, self._timers, post, meta_namespace=settings.meta_namespace),
            LiveQueries(self._engine, self._scheduler, self._timers, self._requests, settings),
        )
        for feature in self._features:
            self._handlers.update(feature.handlers)

    def _begin(self) -> None:
        """The database is open: handle what came before."""
        self._is_ready = True
        early, self._early = self._early, []
        for connection, data, is_text in early:
            if connection.is_open:
                self.message(connection, data, is_text)

    # What the transport calls, on the loop thread.

    def upgrade(self, request: HttpRequest) -> Peer | Refusal:
        if self._is_draining:
            return Refusal(503, "The server is shutting down.\n")
        return self._gate.upgrade(request)

    def opened(self, connection: Connection) -> None:
        peer: Peer = connection.handler_data
        peer.attach(connection)
        for feature in self._features:
            feature.opened(peer)
        log.debug("%s connected from %s.", peer.id, connection.remote_address)
        self._gate.opened(peer)

    def message(self, connection: Connection, data: bytes, is_text: bool) -> None:
        peer: Peer = connection.handler_data
        if peer.identity is None:
            # Needs no database, and they have little time.
            self._gate.message(peer, data, is_text)
            return
        if not self._is_ready:
            self._keep_early(connection, data, is_text)
            return
        try:
            message = decode(data, is_text=is_text, limits=self._limits)
        except ServerError as error:
            self._requests.reject(peer, error)
            return
        try:
            self._handle(peer, message)
        except ServerError as error:
            peer.send_error(error)
        except Exception as error:  # top guard of a message: its sender waits for an answer
            told = as_server_error(error)
            told.query_id = getattr(message, "query_id", None)
            peer.send_error(told)

    def closed(self, connection: Connection) -> None:
        peer: Peer = connection.handler_data
        self._gate.closed(peer)
        for feature in self._features:
            feature.closed(peer)
        log.debug("%s left.", peer.id)

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        known = (route for feature in self._features for route in feature.routes)
        routes = [route for route in known if _is_below(request.path, route.path)]
        allowed = [route for route in routes if route.method == request.method]
        if not routes:
            exchange.respond(404, b"not found")
        elif not allowed:
            methods = " or ".join(sorted({route.method for route in routes}))
            exchange.respond(405, f"only {methods} is allowed here".encode())
        elif allowed[0].is_public:
            allowed[0].answer(request, exchange, self._gate.known(request))
        else:
            found = self._gate.identity_of(request)
            if isinstance(found, Refusal):
                exchange.respond(found.status, found.text.encode())
            else:
                allowed[0].answer(request, exchange, found)

    def _keep_early(self, connection: Connection, data: bytes, is_text: bool) -> None:
        size = len(data) + _EARLY_ENTRY_BYTES
        if self._early_bytes + size > self.settings.max_queued_bytes:
            connection.abort()
            return
        self._early_bytes += size
        self._early.append((connection, data, is_text))

    def _handle(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Auth):
            self._gate.authenticate(peer, message)
        else:
            if peer.role.request_rate:
                self._gate.check_rate(peer, message)
            self._handlers[type(message)](peer, message)


def _is_below(path: str, place: str) -> bool:
    """Whether ``place`` is ``path``, or a directory of it."""
    return path.startswith(place) if place.endswith("/") else path == place
