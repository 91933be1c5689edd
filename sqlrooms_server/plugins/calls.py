"""Messages of the types that plugins have, from the message to the one answer."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.db import values
from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.results import BROKEN_ARROW, arrow_chunks
from sqlrooms_server.errors import BadRequest, Cancelled, QueryId, ServerError
from sqlrooms_server.features.chunked import ChunkedRequest
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.features.resumable import ResumableRequest
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.jobs import Lane, Pause, Work
from sqlrooms_server.messages import Params, PluginMessage
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Client, Plugin
from sqlrooms_server.plugins.runner import Runner, out_of_time
from sqlrooms_server.protocol import arrow_prefix, encode_ok, encode_value, framed
from sqlrooms_server.settings import Settings

# Calls of one connection at one time: of functions, which each take a thread, and of coroutines.
_MAX_FUNCTIONS = 4
_MAX_COROUTINES = 256


class Call:
    """One message for a plugin, and what can be done for whoever sent it.

    ``client`` is who sent it, ``message`` its fields, ``body`` the bytes behind the header of a
    binary message, None for text. For the thread of the handler; see :meth:`query`.
    """

    def __init__(
        self,
        message: PluginMessage,
        client: Client,
        engine: Engine,
        policy: Policy,
        runner: Runner,
        prepare: Callable[[Cursor, Client], None],
    ) -> None:
        self.kind = message.kind
        self.query_id: QueryId = message.query_id
        self.message: Mapping[str, Any] = message.fields
        self.body = message.body
        self.client = client
        self._engine = engine
        self._policy = policy
        self._runner = runner
        self._prepare = prepare
        self._lock = threading.Lock()
        self._cursors: set[Cursor] = set()
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._is_cancelled

    def check(self) -> None:
        """Raise ``Cancelled`` when nobody waits for the answer any more."""
        if self._is_cancelled:
            raise Cancelled("The call was cancelled.")

    def query(self, sql: str, params: Params | None = None) -> Any:
        """The result of ``sql`` as a ``pyarrow.Table``, as the client itself may ask it.

        On a cursor that ``prepare_cursor`` has set up, but past ``around_query``: it is no query of
        the client. Raises ``QueryError``, ``Forbidden``, or ``Cancelled``. It waits for DuckDB, so
        a coroutine calls ``await asyncio.to_thread(call.query, …)``.
        """
        self._runner.must_not_block("call.query")
        with self._cursor() as cursor:
            return values.table_of(cursor.run(sql, params))

    def send(self, data: Any) -> None:
        """Tell the client something before the answer: ``{type: "event", queryId, data}``."""
        self.check()
        self.client.send({"type": "event", "queryId": self.query_id, "data": data})

    def cancel(self) -> None:
        """Nobody waits for the answer any more. From any thread."""
        with self._lock:
            self._is_cancelled = True
            cursors = list(self._cursors)
        for cursor in cursors:
            cursor.interrupt()

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        with self._engine.cursor(self._policy) as cursor, self.interrupting(cursor):
            self._prepare(cursor, self.client)
            yield cursor

    @contextmanager
    def interrupting(self, cursor: Cursor) -> Iterator[None]:
        """While the block runs, :meth:`cancel` interrupts ``cursor``."""
        with self._lock:
            self._cursors.add(cursor)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._cursors.discard(cursor)


class PromptRequest(Request):
    """Is answered as soon as it is stopped: a function of a plugin may never return."""

    on_stop: Callable[[], None] = staticmethod(lambda: None)

    def interrupt(self) -> None:
        self.on_stop()

    def stop(self, reason: ServerError) -> bool:
        if not super().stop(reason):
            return False
        self.fail(reason)
        return True

    def _time_out(self, error: ServerError) -> None:
        self._requests.post(self.stop, error)


class _ChunkedCall(PromptRequest, ChunkedRequest):
    """The same with an answer in chunks."""


class _ResumableCall(PromptRequest, ResumableRequest):
    """The same with one that outlives its connection."""


class Calls:
    """Hands messages to functions of plugins, and sends what they return. For the loop thread."""

    def __init__(
        self,
        engine: Engine,
        requests: Requests,
        runner: Runner,
        settings: Settings,
        prepare: Callable[[Cursor, Client], None],
        resuming: Resuming | None = None,
    ) -> None:
        self._engine = engine
        self._resuming = resuming
        self._requests = requests
        self._runner = runner
        self._settings = settings
        self._prepare = prepare
        self._lanes: dict[Peer, tuple[Lane, Lane]] = {}

    def closed(self, peer: Peer) -> None:
        self._lanes.pop(peer, None)

    def begin(
        self, plugin: Plugin, function: Callable[[Call], Any], peer: Peer, message: PluginMessage
    ) -> None:
        """Answer ``message`` of ``peer`` with what ``function`` returns."""
        client = Client(peer, self._runner.post)
        policy = self._engine.bounded(peer.role.sql)
        call = Call(message, client, self._engine, policy, self._runner, self._prepare)
        request = self.request(peer, message)
        request.on_stop = call.cancel
        lanes = self._lanes.setdefault(peer, (Lane(_MAX_FUNCTIONS), Lane(_MAX_COROUTINES)))
        lane = lanes[inspect.iscoroutinefunction(function)]
        work = self._work(plugin, function, call, request, message)
        if self._requests.submit(request, work, lane, scheduler=self._runner.scheduler):
            self.limit(request, plugin, message)

    def request(self, peer: Peer, message: PluginMessage) -> PromptRequest:
        """What answers ``message``."""
        options = message.options
        for name, value in (("window", options.window), ("resumable", options.resumable)):
            if value and not options.stream:
                text = f"{name} is for chunked results; add stream: true."
                raise BadRequest(text, message.query_id)
        if options.stream:
            chunks: dict[str, Any] = {
                "size": message.size,
                "window": options.window,
                "idle_timeout": self._settings.stream_idle_timeout,
            }
            if options.resumable and self._resuming is not None:
                return _ResumableCall(
                    self._requests, self._resuming, peer, message.query_id, **chunks
                )
            return _ChunkedCall(self._requests, peer, message.query_id, **chunks)
        return PromptRequest(
            self._requests, peer, message.query_id, size=message.size, broken_end=BROKEN_ARROW
        )

    def limit(self, request: Request, plugin: Plugin, message: PluginMessage) -> None:
        """End ``request`` when it takes too long."""
        wanted, most = message.options.timeout, self._runner.timeout
        if wanted is not None and not 0 < most < wanted:
            request.limit(wanted, "timeoutMs")
        elif most:
            request.limit_with(most, out_of_time(plugin, repr(message.kind), most))

    def _work(
        self,
        plugin: Plugin,
        function: Callable[[Call], Any],
        call: Call,
        request: PromptRequest,
        message: PluginMessage,
    ) -> Work:
        value = yield from self._runner.work(
            *(plugin, repr(message.kind), function, call),
            resume=request.resume_soon,
            finish=lambda value: reply_of(message, value),
        )
        yield from self.answer(request, message, value)

    def answer(self, request: Request, message: PluginMessage, reply: Reply) -> Work:
        """Answer ``request`` with what :func:`reply_of` made."""
        if reply.text is not None:
            request.reply(reply.text)
        elif reply.binary is None:
            yield from self._table(request, message, reply.table)
        elif request.is_chunked:
            # Its chunks are for tables.
            request.reply(reply.binary, is_text=False)
        else:
            request.is_text = False
            request.put(reply.binary)

    def _table(self, request: Request, message: PluginMessage, value: Any) -> Work:
        with values.opened(self._engine, value) as result:
            if request.is_chunked:
                result.count_rows()
            yield from send_rows(request, message, result)


def send_rows(request: Request, message: PluginMessage, result: Result) -> Work:
    """Answer ``message`` with the rows of ``result``, which are counted if it wants chunks."""
    request.is_text = False
    prefix = b"" if request.is_chunked else arrow_prefix(message.query_id)
    first = result.first_batch()
    chunks = arrow_chunks(result, first, prefix, message.options.compression)
    chunk = next(chunks)
    for following in chunks:
        yield Pause.FULL if request.put(chunk) else Pause.TURN
        chunk = following
    # No pause after the last one: a reply that is complete can no longer fail.
    request.put(chunk)
    if isinstance(request, ChunkedRequest):
        request.summary = {"rows": result.rows}


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a message: one of a text message, a binary one, or a table to be sent."""

    text: bytes | None = None
    binary: bytes | None = None
    table: Any = None


def reply_of(message: PluginMessage, value: Any) -> Reply:
    """The answer to ``message`` that says ``value``: nothing, a table, bytes, or a JSON value.

    Raises ``TypeError`` for anything else.
    """
    query_id = message.query_id
    if value is None:
        return Reply(text=encode_ok(query_id))
    if values.is_table(value):
        return Reply(table=value)
    head = {"type": "reply", "queryId": query_id}
    if isinstance(value, bytes | bytearray | memoryview):
        return Reply(binary=framed(head, bytes(value)))
    try:
        return Reply(text=encode_value({**head, "data": value}))
    except BadRequest as error:
        raise TypeError(f"It returned neither a table, nor bytes, nor JSON: {error}") from error
