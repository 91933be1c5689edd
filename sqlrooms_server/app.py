"""One app: who may come to it, what clients can ask of it, and the database that it asks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlrooms_server import routing
from sqlrooms_server.access import Access, Identity
from sqlrooms_server.app_config import in_app
from sqlrooms_server.builtin import configured
from sqlrooms_server.databases import Databases
from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.errors import Busy, ServerError, ShuttingDown, StartupError
from sqlrooms_server.features import Feature, MessageHandler, Route
from sqlrooms_server.features.cached import CachedQueries
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.chunked import Acks
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.health import Health
from sqlrooms_server.features.interception import Interception
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
from sqlrooms_server.messages import Auth, Cancel, Message, UploadChunk
from sqlrooms_server.peer import Audience, Peer
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugin.chain import Chain
from sqlrooms_server.plugin.journal import Journal
from sqlrooms_server.plugins.authenticating import Authenticator
from sqlrooms_server.plugins.authorizing import Authorizer
from sqlrooms_server.plugins.feature import Plugins
from sqlrooms_server.plugins.host import Host
from sqlrooms_server.plugins.http import error_response
from sqlrooms_server.plugins.objects import Objects
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.protocol import Limits, decode, encode
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

# For plugins to be told of the last queries.
_LAST_WORDS_SECONDS = 0.5


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

    ``open`` opens the database, ``close`` ends all but the database. Other methods are called by
    the server, on the loop thread if nothing else is said.

    ``name`` and ``path`` are empty for the server itself.
    """

    def __init__(
        self,
        settings: Settings,
        access: Access,
        shared: Shared,
        plugins: Sequence[Plugin] = (),
        *,
        name: str = "",
        path: str = "",
    ) -> None:
        self.settings = self._settings = settings
        self.name = name
        self.path = path
        self._shared = shared
        self._limits = Limits(settings.max_message_size, settings.max_sql_length)
        self._handlers: dict[type, MessageHandler] = {}
        self._is_ready = False
        # Messages that came before the database was open, and their bytes.
        self._early: list[tuple[Peer, bytes, bool]] = []
        self._early_bytes = 0
        plugins = [*configured(settings), *plugins]
        self._hooks = Chain(plugins)
        self._journal = Journal(self._hooks.query_done, settings.plugin_backlog)
        self.runner = Runner(settings, shared.timers, shared.post)
        self._authenticator = Authenticator(self._hooks.authenticate, self.runner)
        self.gate = Gate(
            *(settings, access, self._limits, shared.timers, shared.post, self._admitted),
            *(self._authenticator, self._hear),
        )
        # None without a plugin that is asked, so that nothing else is asked then.
        self._authorizer: Authorizer | None = None
        if self._hooks.authorize:
            self._authorizer = Authorizer(
                self._hooks.authorize, self.runner, settings, self._carry_out, self._refuse
            )
        # Nobody but plugins looks at most of them.
        self.reads_all_headers = bool(self._authenticator) or any(
            plugin.routes for plugin in plugins if not plugin.on_loop
        )
        self.health = Health(settings, shared.post)
        self.channels = Channels(
            settings, shared.timers, shared.post, lambda: Audience(shared.new_topic())
        )
        self.connections = Connections(shared.post, self.channels.channels_of)
        self.rooms: Rooms | None = None
        self.objects = Objects(settings, self.runner, plugins)
        host = Host(
            *(settings, self.runner, self.channels, self.connections, self.objects),
            *(access.roles, lambda: self.gate.needs_token, name, path),
        )
        host.perform, host.leave = self._perform, self._leave
        self.resuming: Resuming | None = None
        if settings.resume_window:
            host.resuming = self.resuming = Resuming(settings, shared.timers, shared.post)
        self.room_store: RoomStore | None = None
        self.plugins = Plugins([*plugins, self.objects], host, self.runner, self._hooks.prepare)
        self._kinds = self.plugins.kinds
        # Those that need no database. The others join when it is open.
        self._features: Sequence[Feature] = (self.health, self.connections, self.plugins)
        for feature in (self.health, self.connections, self.channels):
            self.plugins.keep_from(feature.routes)

    def open(self, scheduler: Scheduler, databases: Databases) -> contextlib.ExitStack:
        """Open the database, from the thread that starts; what undoes all but that.

        Raises ``StartupError``.
        """
        with in_app(self.name):
            return self._open(scheduler, databases)

    def _open(self, scheduler: Scheduler, databases: Databases) -> contextlib.ExitStack:
        if self._settings.sync and not is_available():
            raise StartupError(
                "--sync needs the package loro, which is not installed: "
                "pip install 'sqlrooms-server[sync]'."
            )
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: self.runner.close(time.monotonic() + _UNDO_SECONDS))
            undo.callback(self.plugins.end, "stopped")
            self.plugins.begin()
            self.database = databases.open(self.name)
            if self._settings.sync:
                self.room_store = databases.open_rooms(self.name)
            undo.callback(
                lambda: self.close_rooms(time.monotonic(), time.monotonic() + _UNDO_SECONDS)
            )
            self._join_features(scheduler)
            self.objects.open(self.database.engine, self.requests)
            self.plugins.open(self.database.engine, self.requests, self._settings)
            return undo.pop_all()

    def begin(self) -> None:
        """Handle what came before the database was open."""
        self._shared.post(self._begin)

    def reload(self) -> None:
        """Read files again; those that are not right are logged, and change nothing."""
        self.gate.reload()
        self.plugins.reload()

    def drain(self) -> None:
        """No query is taken any more."""
        self.health.drain()
        self.plugins.end("stopping")

    def close_rooms(self, stopped_by: float, closed_by: float) -> None:
        """End the processes of documents, and close their file."""
        if self.rooms is not None:
            self.rooms.pool.close(stopped_by)
        if self.room_store is not None and not self.room_store.close(closed_by):
            log.warning("The file of the rooms was not closed in time; nothing acked is lost.")

    def abandon(self) -> None:
        """Answer what is left, whether it ended or not."""
        reason = ShuttingDown("The server is shutting down.")
        if self._authorizer is not None:
            self._shared.post(self._authorizer.abandon, reason)
        self._shared.post(self.requests.abandon, reason)

    def close(self, deadline: float, *, is_quiet: bool) -> bool:
        """When the loop has ended, and before the database is closed; whether all is quiet.

        ``is_quiet`` tells that no query runs any more.
        """
        self.channels.stop()
        self._journal.close(time.monotonic() + _LAST_WORDS_SECONDS)
        self.plugins.end("stopped")
        is_quiet = self.runner.close(deadline - _UNDO_SECONDS) and is_quiet
        if is_quiet:
            self.sessions.close_all()
        return is_quiet

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
        if self.room_store is not None:
            self.rooms = self._open_rooms(self.room_store)
            reader = RoomReader(self.rooms, self.room_store, self.requests)
        self.interception = Interception(engine, self._hooks, self._journal, post)
        taking_part = self.interception
        cached = CachedQueries(
            engine, scheduler, self.requests, settings, database.cache, taking_part
        )
        self.uploads = Uploads(engine, self.requests, settings)
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
            Queries(
                *(engine, self.requests, self.sessions, cached, settings, taking_part, reader),
                self.resuming,
            ),
            self.uploads,
            Watches(engine, timers, post, meta_namespace=settings.meta_namespace),
            LiveQueries(engine, scheduler, timers, self.requests, settings, taking_part),
        )
        for feature in self._features:
            self._handlers.update(feature.handlers)

    def _open_rooms(self, store: RoomStore) -> Rooms:
        settings = self._settings
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
        self._authenticator.open()
        early, self._early = self._early, []
        for peer, data, is_text in early:
            if peer.is_open:
                self._hear(peer, data, is_text)

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
        self._hear(peer, data, is_text)

    def _hear(self, peer: Peer, data: bytes, is_text: bool) -> None:
        if peer.identity is None:
            # Needs no database, and they have little time.
            self.gate.message(peer, data, is_text)
            return
        if not self._is_ready:
            self._keep_early(peer, data, is_text)
            return
        try:
            message = decode(data, is_text=is_text, limits=self._limits, kinds=self._kinds)
        except ServerError as error:
            self.requests.reject(peer, error)
            return
        if isinstance(message, Auth):
            self.gate.authenticate(peer, message)
            return
        if peer.role.request_rate:
            try:
                self.gate.check_rate(peer, message)
            except Busy as error:
                peer.send_error(error)
                self.interception.refused(peer, message, error)
                return
        if self._authorizer is None:
            self._carry_out(peer, message)
        elif not (isinstance(message, Cancel) and self._cancel_early(peer, message)):
            self._authorizer.take(peer, message, len(data))

    def _carry_out(self, peer: Peer, message: Message) -> None:
        """Handle ``message``, which ``peer`` may send."""
        try:
            self._handlers[type(message)](peer, message)
        except ServerError as error:
            peer.send_error(error)
        except Exception as error:  # top guard of a message: its sender waits for an answer
            told = as_server_error(error)
            told.query_id = getattr(message, "query_id", None)
            peer.send_error(told)

    def _refuse(self, peer: Peer, message: Message, error: ServerError, goes_on: bool) -> None:
        """Answer ``message`` with ``error``, before anything of it began. When it ``goes_on``,
        more of it will come, which is ignored."""
        told = type(error)(str(error), getattr(message, "query_id", None))
        told.channel = getattr(message, "channel", None)
        told.room = getattr(message, "room", None)
        if goes_on and isinstance(message, UploadChunk):
            self.uploads.refused(peer, message)
        peer.send_error(told)
        self.interception.refused(peer, message, told)

    def _cancel_early(self, peer: Peer, cancel: Cancel) -> bool:
        """Cancel what waits to be allowed; False when there is nothing of that id."""
        assert self._authorizer is not None
        if self.requests.find(peer, cancel.query_id) is not None:
            return False
        if not self._authorizer.cancel(peer, cancel.query_id):
            return False
        peer.send(encode({"type": "cancelAck", "queryId": cancel.query_id, "cancelled": True}))
        return True

    def closed(self, peer: Peer) -> None:
        self.gate.closed(peer)
        self._leave(peer)
        log.debug("%s left.", peer.id)

    def _leave(self, peer: Peer) -> None:
        if self._authorizer is not None:
            self._authorizer.closed(peer)
        for feature in self._features:
            feature.closed(peer)

    def _perform(self, peer: Peer, message: Message) -> None:
        self._handlers[type(message)](peer, message)

    @property
    def routes(self) -> list[Route]:
        """The HTTP requests that it answers. From any thread; more are there once it is open."""
        return [route for feature in self._features for route in feature.routes]

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        exchange.add_headers(self.gate.shared_with(request))
        route = routing.route_for(self.routes, request, exchange, self.gate)
        if route is None:
            return
        if route.is_public:
            self._answer_with(route, request, exchange, self.gate.known(request))
        else:
            self.gate.identify(request, lambda found: self._answer(route, request, exchange, found))

    def _answer(
        self,
        route: Route,
        request: HttpRequest,
        exchange: Exchange,
        found: Identity | Refusal,
    ) -> None:
        """Answer ``request`` of somebody who was ``found``, if that one may ask it."""
        if isinstance(found, Refusal):
            exchange.respond(found.status, found.text.encode())
            return
        if self._authorizer is None:
            self._answer_with(route, request, exchange, found)
            return
        if not self._is_ready:
            # Plugins have not started.
            exchange.respond(503, b"the server is starting")
            return

        def then(error: ServerError | None) -> None:
            if error is None:
                self._answer_with(route, request, exchange, found)
            else:
                refused = error_response(error)
                exchange.respond(refused.status, refused.body, refused.content_type)

        self._authorizer.http(request, found, then)

    def _answer_with(
        self, route: Route, request: HttpRequest, exchange: Exchange, identity: Identity | None
    ) -> None:
        most = self._settings.max_notify_size
        try:
            routing.answer_with(route, request, exchange, identity, most)
        except Exception:  # loop-callback guard: one that is never answered ends the process
            log.exception("An HTTP request failed.")
            exchange.respond(500, b"internal error")

    def _keep_early(self, peer: Peer, data: bytes, is_text: bool) -> None:
        size = len(data) + _EARLY_ENTRY_BYTES
        if self._early_bytes + size > self._settings.max_queued_bytes:
            peer.abort()
            return
        self._early_bytes += size
        self._early.append((peer, data, is_text))
