"""A small Python client, for notebooks and scripts. Needs the extra ``client``.

with connect("ws://localhost:4000") as db:
    table = db.query("select 42 as answer")
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import pyarrow as pa
import ujson
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket


class RequestFailed(Exception):
    """The server answered with an error: its text, and ``code`` for programs."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


def connect(url: str = "ws://localhost:4000", *, token: str | None = None) -> Client:
    """Connect to a server. Raises ``OSError`` when nothing listens there.

    A wrong ``token`` is reported by the first request.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with ExitStack() as stack:
        opening = connect_websocket(url, additional_headers=headers, max_size=None)
        return Client(stack.enter_context(opening), stack.pop_all())


class Client:
    """A connection whose methods can be called from several threads at one time.

    Raises ``RequestFailed`` for what the server refuses and ``ConnectionError`` after it left.
    """

    def __init__(self, socket: ClientConnection, stack: ExitStack) -> None:
        self._socket = socket
        self._stack = stack
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._closed: Exception | None = None
        self._thread = threading.Thread(target=self._receive, name="sqlrooms-client", daemon=True)
        self._thread.start()

    def query(self, sql: str) -> pa.Table:
        """The last result of ``sql`` as an Arrow table; without columns when there is none.

        Interrupted by Ctrl+C, it cancels the query on the server too.
        """
        reply = self._request({"type": "arrow", "sql": sql})
        return pa.table({}) if isinstance(reply, dict) else pa.ipc.open_stream(reply).read_all()

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """The last result of ``sql`` as one dictionary for each row, by way of JSON."""
        reply = self._request({"type": "json", "sql": sql})
        return ujson.loads(reply["data"]) if "data" in reply else []

    def execute(self, sql: str) -> None:
        """Run ``sql``, one or several statements, without their results."""
        self._request({"type": "exec", "sql": sql})

    def upload(self, table_name: str, data: pa.Table) -> None:
        """Create or replace ``table_name`` on the server from ``data``."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data)
        self._request({"type": "uploadArrow", "tableName": table_name}, sink.getvalue())

    def close(self) -> None:
        """Close the connection; the server cancels what is still under way."""
        self._stack.close()
        self._thread.join()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, fields: dict[str, Any], body: pa.Buffer | None = None) -> Any:
        query_id = next(self._ids)
        reply: Future[Any] = Future()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._waiting[query_id] = reply
        message = ujson.dumps({**fields, "queryId": query_id})
        try:
            self._socket.send(message if body is None else _framed(message, body))
        except ConnectionClosed:
            # The receiving thread knows why, and says so through the reply.
            pass
        try:
            return reply.result()
        except KeyboardInterrupt:
            self._socket.send(ujson.dumps({"type": "cancel", "queryId": query_id}))
            raise

    def _receive(self) -> None:
        error: Exception = ConnectionError("The connection was closed.")
        try:
            for message in self._socket:
                if isinstance(message, bytes):
                    end = 4 + int.from_bytes(message[:4], "big")
                    self._answer(ujson.loads(message[4:end]), memoryview(message)[end:])
                    continue
                fields = ujson.loads(message)
                if fields["type"] == "error" and "queryId" not in fields:
                    error = RequestFailed(fields["error"], fields["code"])
                self._answer(fields, fields)
        except ConnectionClosed as closed:
            if not isinstance(error, RequestFailed):
                error = ConnectionError(str(closed))
        except (ValueError, LookupError) as broken:
            error = ConnectionError(f"The server sent what is no reply: {broken}")
        finally:
            with self._lock:
                self._closed = error
                waiting, self._waiting = self._waiting, {}
            for reply in waiting.values():
                reply.set_exception(error)

    def _answer(self, header: dict[str, Any], content: Any) -> None:
        with self._lock:
            # None: of a cancelled query, or an acknowledgement that nobody waits for.
            reply = None
            if header["type"] != "cancelAck":
                reply = self._waiting.pop(header.get("queryId", 0), None)
        if reply is None:
            return
        if header["type"] == "error":
            reply.set_exception(RequestFailed(header["error"], header["code"]))
        else:
            reply.set_result(content)


def _framed(header: str, body: pa.Buffer) -> bytes:
    encoded = header.encode()
    return b"".join((len(encoded).to_bytes(4, "big"), encoded, memoryview(body)))
