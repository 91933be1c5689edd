"""One app: who may come to it, what clients can ask of it, and the database that it asks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlrooms_server.access import Access
from sqlrooms_server.builtin import configured
from sqlrooms_server.database import Database
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
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.features.room_queries import RoomReader
from sqlrooms_server.features.rooms import NoRooms, Rooms
from sqlrooms_server.features.sessions import Sessions
from sqlrooms_server.features.uploads import Uploads
from sqlrooms_server.features.watches import Watches
from sqlrooms_server.gate import Gate
from sqlrooms_server.jobs import Scheduler
from sqlrooms_server.messages import Auth, Message
from sqlrooms_server.peer import Audience, Peer
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugins.feature import Plugins
from sqlrooms_server.plugins.host import Host
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.protocol import Limits, decode
from sqlrooms_server.rooms.child import is_available
from sqlrooms_server.rooms.keeping import RoomLimits
from sqlrooms_server.rooms.pool import Pool
from sqlrooms_server.rooms.room import Outcome
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport import Connection, Exchange, HttpRequest, Refusal, Topic

log = logging.getLogger(__name__)

# What an early message costs besides its bytes.
_EARLY_ENTRY_BYTES = 200

# For each step of taking a start back.
_UNDO_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What the apps of a server have together.

    ``post`` calls a function on the loop thread, ``new_topic`` makes a topic there.
    """

    post: Callable[..., None]
    new_topic: Callable[[], Topic]
    timers: Timers


class App:
    """What stands behind one path of the server.

    ``open`` opens the database, ``close`` closes it. Other methods are called by the server, on
    the loop thread if nothing else is said.
    """

    def __init__(
        self,
        settings: Settings,
        access: Access,
        shared: Shared,
        plugins: Sequence[Plugin] = (),
    ) -> None:
        self._settings = settings
        self._shared = shared
        self._limits = Limits(settings.max_message_size, settings.max_sql_length)
        self._handlers: dict[type, MessageHandler] = {}
        self._is_ready = False
        # Messages that came before the database was open, and their bytes.
        self._early: list[tuple[Peer, Connection, bytes, bool]] = []
        self._early_bytes = 0
        self.gate = Gate(settings, access, self._limits, shared.timers, shared.post, self._admitted)
        self.health = Health(settings, shared.post)
        self.channels = Channels(
            settings, shared.timers, shared.post, lambda: Audience(shared.new_topic())
        )
        self.connections = Connections(shared.post, self.channels.channels_of)
        self.rooms: Rooms | None = None
        self.runner = Runner(settings, shared.timers, shared.post)
        host = Host(settings, self.runner, self.channels, self.connections, access.roles)
        self._host = host
        self.resuming: Resuming | None = None
        if settings.resume_window:
            host.resuming = self.resuming = Resuming(settings, shared.timers, shared.post)
        self.plugins = Plugins([*configured(settings), *plugins], host, self.runner)
        self._kinds = self.plugins.kinds
        # Those that need no database. The others join when it is open.
        self._features: Sequence[Feature] = (self.health, self.connections, self.plugins)

    def open(self, scheduler: Scheduler) -> contextlib.ExitStack:
        """Open the database, from the thread that starts; what undoes that.

        Raises ``StartupError``.
        """
        if self._settings.sync and not is_available():
            raise StartupError(
                "--sync needs the package loro, which is not installed: "
                "pip install 'sqlrooms-server[sync]'."
            )
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: self.runner.close(time.monotonic() + _UNDO_SECONDS))
            undo.callback(self.plugins.end, "stopped")
            self.plugins.begin()
            self.database = Database(self._settings)
            undo.callback(
                lambda: self.database.close(time.monotonic() + _UNDO_SECONDS, 0.0, is_quiet=False)
            )
            undo.callback(
                lambda: self.close_rooms(time.monotonic(), time.monotonic() + _UNDO_SECONDS)
            )
            self._join_features(scheduler)
            self.plugins.open(self.database.engine, self.requests, self._settings)
            return undo.pop_all()

    def begin(self) -> None:
        """Handle what came before the database was open."""
        self._shared.post(self._begin)

    def drain(self) -> None:
        """No query is taken any more."""
        self.health.drain()
        self.plugins.end("stopping")

    def close_rooms(self, stopped_by: float, closed_by: float) -> None:
        """End the processes of documents, and close their file."""
        if self.rooms is not None:
            self.rooms.pool.close(stopped_by)
        self.database.close_rooms(closed_by)

    def abandon(self) -> None:
        """Answer what is left, whether it ended or not."""
        reason = ShuttingDown("The server is shutting down.")
        self._shared.post(self.requests.abandon, reason)

    def close(self, deadline: float, cache_deadline: float, *, is_quiet: bool) -> bool:
        """When the loop has ended: close the database, see :meth:`Database.close`."""
        self.channels.stop()
        self.plugins.end("stopped")
        is_quiet = self.runner.close(deadline - _UNDO_SECONDS) and is_quiet
        if is_quiet:
            self.sessions.close_all()
        return self.database.close(deadline, cache_deadline, is_quiet=is_quiet)

    def _join_features(self, scheduler: Scheduler) -> None:
        settings, post, timers = self._settings, self._shared.post, self._shared.timers
        database, engine = self.database, self.database.engine
        self.requests = Requests(
            scheduler,
            timers,
            post,
            max_in_flight=settings.max_in_flight,
            max_held=2 * settings.max_message_size,
        )
        self.sessions = Sessions(
            engine,
            scheduler,
            timers,
            post,
            idle_timeout=settings.session_idle_timeout,
            max_per_connection=settings.max_sessions_per_connection,
            max_sessions=settings.max_sessions,
        )
        reader = None
        if database.rooms is not None:
            self.rooms = self._open_rooms()
            reader = RoomReader(self.rooms, database.rooms, self.requests)
        cached = CachedQueries(engine, scheduler, self.requests, settings, database.cache)
        self.health.start(engine)
        # When a client leaves, its requests end before its sessions do.
        self._features = (
            self.health,
            self.connections,
            self.plugins,
            self.requests,
            self.sessions,
            Acks(self.requests, None if self.resuming is None else self.resuming.acknowledge),
            self.channels,
            self.rooms or NoRooms(),
            cached,
            Queries(engine, self.requests, self.sessions, cached, settings, reader, self.resuming),
            Uploads(engine, self.requests, settings),
            Watches(engine, timers, post, meta_namespace=settings.meta_namespace),
            LiveQueries(engine, scheduler, timers, self.requests, settings),
        )
        for feature in self._features:
            self._handlers.update(feature.handlers)

    def _open_rooms(self) -> Rooms:
        settings, store = self._settings, self.database.rooms
        assert store is not None
        limits = RoomLimits(
            max_size=settings.max_room_size,
            memory=settings.room_memory,
            history=settings.room_history,
            idle_seconds=settings.room_idle_timeout,
        )

        def open_pool(tell: Callable[[Outcome], None]) -> Pool:
            return Pool(store, limits, tell)

        return Rooms(settings, self._shared.post, open_pool)

    def _begin(self) -> None:
        self._is_ready = True
        self.plugins.admit()
        early, self._early = self._early, []
        for peer, connection, data, is_text in early:
            if connection.is_open:
                self.message(peer, connection, data, is_text)

    # What the server hands on from the transport.

    def upgrade(self, request: HttpRequest) -> Peer | Refusal:
        return self.gate.upgrade(request)

    def opened(self, peer: Peer, connection: Connection) -> None:
        peer.attach(connection)
        log.debug("%s connected from %s.", peer.id, connection.remote_address)
        self.gate.opened(peer)

    def _admitted(self, peer: Peer) -> None:
        for feature in self._features:
            feature.opened(peer)

    def message(self, peer: Peer, connection: Connection, data: bytes, is_text: bool) -> None:
        if peer.identity is None:
            # Needs no database, and they have little time.
            self.gate.message(peer, data, is_text)
            return
        if not self._is_ready:
            self._keep_early(peer, connection, data, is_text)
            return
        try:
            message = decode(data, is_text=is_text, limits=self._limits, kinds=self._kinds)
        except ServerError as error:
            self.requests.reject(peer, error)
            return
        try:
            self._handle(peer, message)
        except ServerError as error:
            peer.send_error(error)
        except Exception as error:  # top guard of a message: its sender waits for an answer
            told = as_server_error(error)
            told.query_id = getattr(message, "query_id", None)
            peer.send_error(told)

    def closed(self, peer: Peer) -> None:
        self.gate.closed(peer)
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
            allowed[0].answer(request, exchange, self.gate.known(request))
        else:
            found = self.gate.identity_of(request)
            if isinstance(found, Refusal):
                exchange.respond(found.status, found.text.encode())
            else:
                allowed[0].answer(request, exchange, found)

    def _keep_early(self, peer: Peer, connection: Connection, data: bytes, is_text: bool) -> None:
        size = len(data) + _EARLY_ENTRY_BYTES
        if self._early_bytes + size > self._settings.max_queued_bytes:
            connection.abort()
            return
        self._early_bytes += size
        self._early.append((peer, connection, data, is_text))

    def _handle(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Auth):
            self.gate.authenticate(peer, message)
        else:
            if peer.role.request_rate:
                self.gate.check_rate(peer, message)
            self._handlers[type(message)](peer, message)


def _is_below(path: str, place: str) -> bool:
    """Whether ``place`` is ``path``, or a directory of it."""
    return path.startswith(place) if place.endswith("/") else path == place
