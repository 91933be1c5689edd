"""``hello``, and ``GET /healthz``, ``/readyz`` and ``/version``."""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlrooms_server import __version__
from sqlrooms_server.access import Identity
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.library import DUCKDB_VERSION
from sqlrooms_server.errors import ServerError
from sqlrooms_server.features import Feature, MessageHandler, Route
from sqlrooms_server.messages import Hello
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import PROTOCOL_VERSION, encode
from sqlrooms_server.settings import UPLOAD_WINDOW_BYTES, Settings
from sqlrooms_server.transport import Exchange, HttpRequest

log = logging.getLogger(__name__)

# What a client can rely on beyond the first published protocol, and what it always could.
FEATURES = (
    "arrow",
    "json",
    "exec",
    "cancel",
    "uploadArrow",
    "params",
    "timeout",
    "maxRows",
    "progress",
    "format",
    "compression",
    "stream",
    "sessions",
    "chunkedUploads",
    "persist",
    "watch",
    "live",
    "channels",
)

# A database that has not answered a query by then is not ready, whatever holds it up.
PROBE_SECONDS = 2.0
_NO_ANSWER = f"DuckDB did not answer within {PROBE_SECONDS:g} s".encode()


class Health(Feature):
    """Tells clients and supervisors what runs here and whether it does."""

    def __init__(self, settings: Settings, post: Callable[..., None]) -> None:
        self._engine: Engine | None = None
        self._settings = settings
        self._post = post
        self._draining = False
        # Those whom the probe under way will answer, and its thread inside DuckDB.
        self._waiting: list[Exchange] = []
        self._ping: threading.Thread | None = None

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Hello: self._hello}

    @property
    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/healthz", self._healthz, is_public=True),
            Route("GET", "/readyz", self._readyz, is_public=True),
            Route("GET", "/version", self._version, is_public=True),
        )

    def start(self, engine: Engine) -> None:
        """The database is open: ready from here on."""
        self._engine = engine

    def drain(self) -> None:
        """Not ready from here on."""
        self._draining = True

    def _hello(self, peer: Peer, hello: Hello) -> None:
        if hello.user is not None:
            peer.call(hello.user)
        limits = {
            "maxMessageSize": self._settings.max_message_size,
            "maxSqlLength": self._settings.max_sql_length,
            "maxInFlight": self._settings.max_in_flight,
            "uploadWindow": UPLOAD_WINDOW_BYTES,
        }
        peer.send(
            encode(
                {
                    "type": "welcome",
                    "protocol": PROTOCOL_VERSION,
                    "server": f"sqlrooms-server {__version__}",
                    "features": self._features(),
                    "limits": limits,
                    "connectionId": peer.id,
                }
            )
        )

    def _features(self) -> list[str]:
        settings = self._settings
        optional = {
            "rooms": settings.sync,
            "namedQueries": bool(settings.queries),
            "resume": bool(settings.resume_window),
        }
        return [*FEATURES, *(name for name, is_on in optional.items() if is_on)]

    def _healthz(self, request: HttpRequest, exchange: Exchange, _: Identity | None) -> None:
        exchange.respond(200, b"ok")

    def _version(self, request: HttpRequest, exchange: Exchange, asker: Identity | None) -> None:
        about: dict[str, Any] = {"name": "sqlrooms-server", "protocol": PROTOCOL_VERSION}
        # Strangers need not know which weaknesses to try.
        if asker is not None:
            about["version"] = __version__
            about["duckdb"] = DUCKDB_VERSION
            about["python"] = platform.python_version()
        exchange.respond_json(200, encode(about))

    def _readyz(self, request: HttpRequest, exchange: Exchange, _: Identity | None) -> None:
        if self._draining:
            exchange.respond(503, b"draining")
            return
        if self._engine is None:
            exchange.respond(503, b"starting")
            return
        is_hanging = self._ping is not None and self._ping.is_alive()
        if is_hanging and not self._waiting:
            # One thread that hangs is enough.
            exchange.respond(503, _NO_ANSWER)
            return
        self._waiting.append(exchange)
        if len(self._waiting) == 1:
            threading.Thread(target=self._probe, args=(self._engine,), name="readyz").start()

    def _probe(self, engine: Engine) -> None:
        """Ask DuckDB, on a thread that may be left behind when it does not answer."""
        outcome = [b"DuckDB failed"]

        def ping() -> None:
            try:
                engine.ping()
                outcome[0] = b""
            except ServerError as error:
                log.warning("The readiness query failed: %s", error)

        self._ping = threading.Thread(target=ping, name="ping", daemon=True)
        self._ping.start()
        self._ping.join(PROBE_SECONDS)
        self._post(self._answer, _NO_ANSWER if self._ping.is_alive() else outcome[0])

    def _answer(self, failure: bytes) -> None:
        waiting, self._waiting = self._waiting, []
        for exchange in waiting:
            exchange.respond(503 if failure else 200, failure or b"ok")
