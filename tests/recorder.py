"""A transport by itself."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from sqlrooms_server.transport import (
    Connection,
    Exchange,
    HttpRequest,
    Refusal,
    Transport,
    TransportLimits,
)
from tests.wire import DEADLINE, Wire

MAX_BODY = 1 << 10

LIMITS = TransportLimits(
    max_message_size=1 << 20,
    max_queued=8 << 20,
    max_connections=100,
    idle_timeout=8,
)


class Recorder:
    """A handler that answers every message with itself, unless told otherwise."""

    def __init__(self, limits: TransportLimits = LIMITS, **options: Any) -> None:
        self.transport = Transport(self, limits, **options)
        self._scheme = "wss" if options.get("certificate") else "ws"
        self.connections: list[Connection] = []
        self.opened_event = threading.Event()
        self.closed_event = threading.Event()
        self.verdict: object = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.port = self.transport.start("127.0.0.1", 0)

    def upgrade(self, request: HttpRequest) -> object | Refusal:
        self.request = request
        return self.verdict

    def opened(self, connection: Connection) -> None:
        self.connections.append(connection)
        self.opened_event.set()

    def message(self, connection: Connection, data: bytes, is_text: bool) -> None:
        connection.send(data, is_text=is_text)

    def closed(self, connection: Connection) -> None:
        self.closed_event.set()

    def http(self, request: HttpRequest, exchange: Exchange) -> None:
        self.request = request

        def answer(body: bytes) -> None:
            self.request = dataclasses.replace(request, body=body)
            exchange.respond(200, request.path.encode())

        exchange.collect(MAX_BODY, "--max-notify-size", answer)


def open_connection(recorder: Any, wire: Wire) -> Connection:
    assert recorder.opened_event.wait(DEADLINE)
    connection: Connection = recorder.connections[-1]
    return connection
