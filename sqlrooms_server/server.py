"""One server: where it listens, the apps behind it, and the order of start and stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote

from sqlrooms_server.access import Access
from sqlrooms_server.app import App, Shared
from sqlrooms_server.app_config import AppConfig, PluginOptions, in_app
from sqlrooms_server.builtin.beneath import ServesFiles
from sqlrooms_server.databases import Databases
from sqlrooms_server.errors import StartupError
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.rooms import Rooms
from sqlrooms_server.jobs import Scheduler
from sqlrooms_server.memory import MemoryGuard
from sqlrooms_server.mounts import Mounts
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugins.loading import load
from sqlrooms_server.plugins.objects import Objects
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers
from sqlrooms_server.together import together
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

# For databases, when a start is taken back.
_UNDO_SECONDS = 1.0

_NOBODYS = "not found: this path can be read in two ways\n"


@dataclass(frozen=True, slots=True)
class _Seat:
    """What belongs to a connection: whose client it is of."""

    app: App
    peer: Peer


class Server:
    """A DuckDB database behind a WebSocket port, and apps behind paths of it.

    ``start`` opens all and returns the port, ``stop`` closes all. Several servers can live in
    one process. ``apps`` are those with a path, by their names; ``main`` is the server itself.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: Sequence[Plugin] = (),
        apps: Sequence[AppConfig] = (),
        options: PluginOptions | None = None,
    ) -> None:
        """``plugins`` come after those that ``settings`` name, ``options`` are those of plugins.

        Raises ``StartupError``.
        """
        self.settings = settings
        self._has_started = False
        self._is_draining = False
        self._certificate = (
            Certificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        )
        within = {app.name: app.settings_within(settings) for app in apps}
        accesses = {"": Access(settings)}
        for name, own in within.items():
            with in_app(name):
                accesses[name] = Access(own)
        self._transport = Transport(
            self,
            TransportLimits(
                max_message_size=settings.max_message_size,
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
            proxy_headers=[name for access in accesses.values() for name in access.proxy_headers],
        )
        self._timers = Timers()
        shared = Shared(self._transport.post, self._transport.topic, self._timers)
        loaded = load(settings.plugin, plugins, options)
        self.main = App(settings, accesses[""], shared, loaded)
        self.apps: Mapping[str, App] = {
            app.name: self._app(app, within[app.name], accesses[app.name], shared) for app in apps
        }
        self._apps = [self.main, *self.apps.values()]
        self._mounts = Mounts(self.main, {app.path: app for app in self.apps.values()})
        self._check_apps(apps)
        if any(app.reads_all_headers for app in self._apps):
            self._transport.read_all_headers()

    @property
    def channels(self) -> Channels:
        return self.main.channels

    @property
    def connections(self) -> Connections:
        return self.main.connections

    @property
    def objects(self) -> Objects:
        return self.main.objects

    def publish(self, name: str, obj: Any, **options: Any) -> None:
        """Let clients use ``obj`` under ``name``, see :meth:`Objects.publish`."""
        self.objects.publish(name, obj, **options)

    @property
    def rooms(self) -> Rooms | None:
        return self.main.rooms

    def start(self) -> int:
        """Listen, open the database, and return the port.

        Until the database is open, messages wait and ``/readyz`` answers 503. Raises
        ``StartupError`` with one line that says what to do.
        """
        settings = self.settings
        for app in self._apps:
            self._check_exposure(app)
        self._warn_of_exposure()
        if self._certificate is not None:
            self._certificate.check()
        self._databases = Databases({app.name: app.settings for app in self._apps})
        with contextlib.ExitStack() as undo:
            for app in self._apps:
                undo.callback(app.channels.stop)
            undo.callback(self._timers.close)
            port = self._transport.start(settings.host, settings.port)
            undo.callback(lambda: self._transport.stop(time.monotonic()))
            self.scheduler = Scheduler(settings.worker_count, settings.max_queue, self._timers)
            undo.callback(lambda: self.scheduler.close(time.monotonic() + _QUERIES_STOPPED_BY))
            undo.callback(self._take_back_databases)
            for app in self._apps:
                undo.callback(app.open(self.scheduler, self._databases).close)
            if settings.process_memory:
                MemoryGuard(self.scheduler, self._timers, settings.process_memory)
            for app in self._apps:
                app.begin()
            undo.pop_all()
        self._has_started = True
        return port

    def reload(self) -> None:
        """Read the file of tokens again, and close the connections of those that are gone; let
        plugins read theirs again.

        A file that is not right is logged, and changes nothing.
        """
        for app in self._apps:
            app.reload()

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
        together([app.drain for app in self._apps])
        self._transport.stop_listening()
        ended = self.scheduler.close(began + _QUERIES_STOPPED_BY)
        self._timers.close()
        # Before the transport, so that acks of what is stored now are still sent.
        rooms_closed = partial(
            App.close_rooms,
            stopped_by=began + _ROOMS_STOPPED_BY,
            closed_by=began + _DATABASE_CLOSED_BY,
        )
        together([partial(rooms_closed, app) for app in self._apps])
        for app in self._apps:
            app.abandon()
        self._transport.stop(began + _REPLIES_SENT_BY)
        closed = partial(App.close, deadline=began + _DATABASE_CLOSED_BY, is_quiet=ended)
        ended = all(together([partial(closed, app) for app in self._apps]))
        return self._databases.close(
            began + _DATABASE_CLOSED_BY, began + _CACHE_CLOSED_BY, is_quiet=ended
        )

    def _app(self, app: AppConfig, settings: Settings, access: Access, shared: Shared) -> App:
        with in_app(app.name):
            plugins = load(settings.plugin, app.plugins, app.options)
            return App(settings, access, shared, plugins, name=app.name, path=app.path)

    def _check_apps(self, apps: Sequence[AppConfig]) -> None:
        """Raise ``StartupError`` for what two of them cannot both have."""
        paths: dict[str, str] = {}
        for one in apps:
            other = paths.setdefault(one.path, one.name)
            if other != one.name:
                raise StartupError(
                    f"The apps {other!r} and {one.name!r} have the same path, {one.path}."
                )
        if len(self.apps) != len(apps):
            raise StartupError("Two apps have the same name.")
        users: dict[int, str] = {}
        for app in self._apps:
            for plugin in app.plugins.all:
                user = users.setdefault(id(plugin), app.name)
                if isinstance(plugin, ServesFiles):
                    plugin.keep_from([other.settings for other in self._apps])
                if user != app.name:
                    called = f"app {user!r}" if user else "the server"
                    raise StartupError(
                        f"App {app.name!r} and {called} would share the plugin {plugin.name!r}; "
                        "name its class, of which each makes one, or a file instead."
                    )
        for app in self.apps.values():
            outer, path = self._mounts.around(app.path)
            for route in (*outer.routes, *outer.channels.routes):
                if f"{route.path}/".startswith(f"{path}/") or (
                    route.path.endswith("/") and len(route.path) > 1 and path.startswith(route.path)
                ):
                    raise StartupError(
                        f"App {app.name!r}: its path {app.path} is that of {route.method} "
                        f"{route.path}, which is there already; choose another path."
                    )

    def _take_back_databases(self) -> None:
        self._databases.close(time.monotonic() + _UNDO_SECONDS, 0.0, is_quiet=False)

    def _check_exposure(self, app: App) -> None:
        """What other machines can reach needs a token."""
        host = self.settings.host
        if app.gate.needs_token or not self._is_exposed:
            return
        if not app.settings.insecure_no_auth:
            with in_app(app.name):
                raise StartupError(
                    f"--host {host} can be reached from other machines, so a token is needed: set "
                    "SQLROOMS_AUTH_TOKEN or --auth-token-file, or listen on 127.0.0.1. "
                    "--insecure-no-auth would let everybody in."
                )
        log.warning(
            "Whoever can reach %s%s has full access: there is no token (--insecure-no-auth).",
            host,
            app.path,
        )

    @property
    def _is_exposed(self) -> bool:
        return not (self.settings.unix_socket or is_loopback(self.settings.host))

    def _warn_of_exposure(self) -> None:
        if self._is_exposed and self._certificate is None:
            log.warning(
                "Tokens and data travel readable to and from %s: use --tls-cert and --tls-key, or "
                "listen on 127.0.0.1 behind a proxy that speaks TLS.",
                self.settings.host,
            )

    # What the transport calls, on the loop thread.

    def upgrade(self, request: HttpRequest) -> _Seat | Refusal:
        if self._is_draining:
            return Refusal(503, "The server is shutting down.\n")
        place = self._mounts.find(request.path)
        if place is None:
            return Refusal(404, _NOBODYS)
        app, path = place
        found = app.upgrade(_seen(request, path))
        return found if isinstance(found, Refusal) else _Seat(app, found)

    def opened(self, connection: Connection) -> None:
        seat: _Seat = connection.handler_data
        seat.app.opened(seat.peer, connection)

    def message(self, connection: Connection, data: bytes, is_text: bool) -> None:
        seat: _Seat = connection.handler_data
        seat.app.inbox.take(seat.peer, data, is_text)

    def closed(self, connection: Connection) -> None:
        seat: _Seat = connection.handler_data
        seat.app.closed(seat.peer)

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        place = self._mounts.find(request.path)
        if place is None:
            exchange.respond(404, _NOBODYS.encode())
            return
        app, path = place
        if not path and request.method == "GET" and any(r.path == "/" for r in app.routes):
            # Or a page there would look for its parts beside the app.
            exchange.respond(308, b"", headers={"Location": _below(request)})
            return
        app.http(_seen(request, path), exchange)


def _seen(request: HttpRequest, path: str) -> HttpRequest:
    """``request`` as an app sees it, to which it is one of ``path``."""
    if path == request.path:
        return request
    base = request.path.removesuffix(path) if path else request.path
    return replace(request, path=path or "/", base=base)


def _below(request: HttpRequest) -> str:
    """The path of ``request`` with a slash at its end, as seen from there."""
    query = quote(request.query, safe="%/:?@!$&'()*+,;=~", encoding="latin-1")
    return request.path.rpartition("/")[2] + "/" + (f"?{query}" if query else "")
