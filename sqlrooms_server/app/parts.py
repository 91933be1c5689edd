"""The parts of an app, and the order in which they start and end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlrooms_server.access import Access
from sqlrooms_server.app.answering import Answering
from sqlrooms_server.app.dispatch import Dispatch
from sqlrooms_server.app.inbox import Inbox
from sqlrooms_server.app_config import in_app
from sqlrooms_server.builtin import configured
from sqlrooms_server.databases import Databases
from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.errors import ShuttingDown, StartupError
from sqlrooms_server.features import Feature, Route
from sqlrooms_server.features.cached import CachedQueries
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.chunked import Acks
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.health import Health
from sqlrooms_server.features.interception import Interception
from sqlrooms_server.features.live import LiveQueries
from sqlrooms_server.features.queries import Queries
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.features.room_queries import RoomReader
from sqlrooms_server.features.rooms import NoRooms, Rooms
from sqlrooms_server.features.sessions import Sessions
from sqlrooms_server.features.uploads import Uploads
from sqlrooms_server.features.watches import Watches
from sqlrooms_server.gate import Gate
from sqlrooms_server.jobs import Scheduler
from sqlrooms_server.peer import Audience, Peer
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugin.chain import Chain
from sqlrooms_server.plugin.journal import Journal
from sqlrooms_server.plugins.authenticating import Authenticator
from sqlrooms_server.plugins.authorizing import Authorizer
from sqlrooms_server.plugins.feature import Plugins
from sqlrooms_server.plugins.host import Host
from sqlrooms_server.plugins.objects import Objects
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.protocol import Limits
from sqlrooms_server.rooms.child import is_available
from sqlrooms_server.rooms.keeping import RoomLimits
from sqlrooms_server.rooms.pool import Pool
from sqlrooms_server.rooms.room import Outcome
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport import Connection, Exchange, HttpRequest, Refusal, Topic

log = logging.getLogger(__name__)

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
    """What stands behind one path of the server. ``inbox`` takes what clients send.

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
        self.settings = settings
        self.name = name
        self.path = path
        self._shared = shared
        limits = Limits(settings.max_message_size, settings.max_sql_length)
        plugins = [*configured(settings), *plugins]
        self._hooks = Chain(plugins)
        self._journal = Journal(self._hooks.query_done, settings.plugin_backlog)
        self.runner = Runner(settings, shared.timers, shared.post)
        self._authenticator = Authenticator(self._hooks.authenticate, self.runner)
        self.gate = Gate(
            *(settings, access, limits, shared.timers, shared.post, self._admitted),
            *(self._authenticator, self._heard),
        )
        self.dispatch = dispatch = Dispatch()
        # None without a plugin that is asked, so that nothing else is asked then.
        self._authorizer: Authorizer | None = None
        if self._hooks.authorize:
            self._authorizer = Authorizer(
                self._hooks.authorize, self.runner, settings, dispatch.carry_out, dispatch.refuse
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
        host.perform, host.leave = dispatch.perform, self._leave
        self.resuming: Resuming | None = None
        if settings.resume_window:
            host.resuming = self.resuming = Resuming(settings, shared.timers, shared.post)
        self.room_store: RoomStore | None = None
        self.plugins = Plugins([*plugins, self.objects], host, self.runner, self._hooks.prepare)
        self.inbox = Inbox(
            settings, limits, self.plugins.kinds, self.gate, self._authorizer, dispatch
        )
        self._answering = Answering(
            lambda: self.routes, self.gate.http, self._authorizer, settings.max_notify_size
        )
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
        if self.settings.sync and not is_available():
            raise StartupError(
                "--sync needs the package loro, which is not installed: "
                "pip install 'sqlrooms-server[sync]'."
            )
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: self.runner.close(time.monotonic() + _UNDO_SECONDS))
            undo.callback(self.plugins.end, "stopped")
            self.plugins.begin()
            self.database = databases.open(self.name)
            if self.settings.sync:
                self.room_store = databases.open_rooms(self.name)
            undo.callback(
                lambda: self.close_rooms(time.monotonic(), time.monotonic() + _UNDO_SECONDS)
            )
            self._join_features(scheduler)
            self.objects.open(self.database.engine, self.requests)
            self.plugins.open(self.database.engine, self.requests, self.settings)
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
        settings, post, timers = self.settings, self._shared.post, self._shared.timers
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
        self.dispatch.open(self._features, self.uploads, self.interception)

    def _open_rooms(self, store: RoomStore) -> Rooms:
        settings = self.settings
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
        self._answering.begin()
        self.plugins.admit()
        self._authenticator.open()
        self.inbox.begin(self.requests)

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

    def _heard(self, peer: Peer, data: bytes, is_text: bool) -> None:
        self.inbox.take(peer, data, is_text)

    def closed(self, peer: Peer) -> None:
        self.gate.closed(peer)
        self._leave(peer)
        log.debug("%s left.", peer.id)

    def _leave(self, peer: Peer) -> None:
        if self._authorizer is not None:
            self._authorizer.closed(peer)
        for feature in self._features:
            feature.closed(peer)

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        self._answering.answer(request, exchange)

    @property
    def routes(self) -> list[Route]:
        """The HTTP requests that it answers. From any thread; more are there once it is open."""
        return [route for feature in self._features for route in feature.routes]
