"""One server: where it listens, the apps behind it, and the order of start and stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlrooms_server.access import Access
from sqlrooms_server.app import App, Shared
from sqlrooms_server.errors import StartupError
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.rooms import Rooms
from sqlrooms_server.jobs import Scheduler
from sqlrooms_server.memory import MemoryGuard
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugins.loading import load
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


@dataclass(frozen=True, slots=True)
class _Seat:
    """What belongs to a connection: whose client it is of."""

    app: App
    peer: Peer


class Server:
    """A DuckDB database behind a WebSocket port.

    ``start`` opens both and returns the port, ``stop`` closes both. Several servers can live in
    one process.
    """

    def __init__(self, settings: Settings, plugins: Sequence[Plugin] = ()) -> None:
        """``plugins`` come after those that ``settings`` name. Raises ``StartupError``."""
        self.settings = settings
        self._has_started = False
        self._is_draining = False
        self._certificate = (
            Certificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        )
        access = Access(settings)
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
            proxy_headers=access.proxy_headers,
        )
        self._timers = Timers()
        shared = Shared(self._transport.post, self._transport.topic, self._timers)
        self.main = App(settings, access, shared, [*load(settings.plugin), *plugins])
        self._apps = [self.main]
        if any(app.reads_all_headers for app in self._apps):
            self._transport.read_all_headers()

    @property
    def needs_token(self) -> bool:
        """Whether nobody may come of whom it is not known who that is."""
        return all(app.gate.needs_token for app in self._apps)

    @property
    def channels(self) -> Channels:
        return self.main.channels

    @property
    def connections(self) -> Connections:
        return self.main.connections

    @property
    def rooms(self) -> Rooms | None:
        return self.main.rooms

    def start(self) -> int:
        """Listen, open the database, and return the port.

        Until the database is open, messages wait and ``/readyz`` answers 503. Raises
        ``StartupError`` with one line that says what to do.
        """
        settings = self.settings
        self._check_exposure()
        if self._certificate is not None:
            self._certificate.check()
        with contextlib.ExitStack() as undo:
            for app in self._apps:
                undo.callback(app.channels.stop)
            undo.callback(self._timers.close)
            port = self._transport.start(settings.host, settings.port)
            undo.callback(lambda: self._transport.stop(time.monotonic()))
            self.scheduler = Scheduler(settings.worker_count, settings.max_queue, self._timers)
            undo.callback(lambda: self.scheduler.close(time.monotonic() + _QUERIES_STOPPED_BY))
            for app in self._apps:
                undo.callback(app.open(self.scheduler).close)
            if settings.process_memory:
                MemoryGuard(self.scheduler, self._timers, settings.process_memory)
            for app in self._apps:
                app.begin()
            undo.pop_all()
        self._has_started = True
        return port

    def reload(self) -> None:
        """Read the file of tokens again, and close the connections of those that are gone.

        A file that is not right is logged, and changes nothing.
        """
        for app in self._apps:
            app.gate.reload()

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
        for app in self._apps:
            app.drain()
        self._transport.stop_listening()
        ended = self.scheduler.close(began + _QUERIES_STOPPED_BY)
        self._timers.close()
        # Before the transport, so that acks of what is stored now are still sent.
        for app in self._apps:
            app.close_rooms(began + _ROOMS_STOPPED_BY, began + _DATABASE_CLOSED_BY)
            app.abandon()
        self._transport.stop(began + _REPLIES_SENT_BY)
        for app in self._apps:
            closed = app.close(
                began + _DATABASE_CLOSED_BY, began + _CACHE_CLOSED_BY, is_quiet=ended
            )
            ended = closed and ended
        return ended

    def _check_exposure(self) -> None:
        """What other machines can reach needs a token, and should have TLS."""
        host = self.settings.host
        if self.settings.unix_socket or is_loopback(host):
            return
        if not self.needs_token:
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

    # What the transport calls, on the loop thread.

    def upgrade(self, request: HttpRequest) -> _Seat | Refusal:
        if self._is_draining:
            return Refusal(503, "The server is shutting down.\n")
        found = self.main.upgrade(request)
        return found if isinstance(found, Refusal) else _Seat(self.main, found)

    def opened(self, connection: Connection) -> None:
        seat: _Seat = connection.handler_data
        seat.app.opened(seat.peer, connection)

    def message(self, connection: Connection, data: bytes, is_text: bool) -> None:
        seat: _Seat = connection.handler_data
        seat.app.message(seat.peer, connection, data, is_text)

    def closed(self, connection: Connection) -> None:
        seat: _Seat = connection.handler_data
        seat.app.closed(seat.peer)

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        self.main.http(request, exchange)
