"""A server that a test plays itself, message by message."""

from __future__ import annotations

import json
import queue
import socket
import threading
from types import TracebackType
from typing import Any

import pyarrow as pa
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from tests.wire import DEADLINE, framed, ipc


class Peer:
    """The server's end of one connection, which has said hello."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self.is_done = threading.Event()

    def receive(self) -> dict[str, Any]:
        """The next message of the client."""
        message: dict[str, Any] = json.loads(self._connection.recv(timeout=DEADLINE))
        return message

    def send(self, **fields: Any) -> None:
        self._connection.send(json.dumps(fields))

    def arrow(self, table: pa.Table, **header: Any) -> None:
        self._connection.send(framed({"type": "arrow", **header}, ipc(table)))

    def changed(
        self, tables: dict[str, int], version: str, op: str = "insert", **more: Any
    ) -> None:
        self.send(type="changed", tables=tables, op=op, version=version, **more)

    def lose(self) -> None:
        """Cut the connection without a word."""
        self._connection.socket.shutdown(socket.SHUT_RDWR)


class ScriptedServer:
    """Listens; each connection is a ``Peer`` for the test."""

    def __init__(self) -> None:
        self._peers: queue.Queue[Peer] = queue.Queue()
        self._all: list[Peer] = []
        self._server = serve_websocket(self._serve, "127.0.0.1", 0, close_timeout=1)
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def peer(self) -> Peer:
        """The next connection."""
        return self._peers.get(timeout=DEADLINE)

    def _serve(self, connection: ServerConnection) -> None:
        peer = Peer(connection)
        assert peer.receive() == {"type": "hello"}
        peer.send(type="welcome", limits={"uploadWindow": 1 << 20})
        self._all.append(peer)
        self._peers.put(peer)
        peer.is_done.wait(DEADLINE)

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for peer in self._all:
            peer.is_done.set()
        self._server.shutdown()
        self._thread.join()
