"""Streams of batches through handlers of plugins: who has which under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.errors import BadRequest, Busy, QueryId
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.jobs import Lane
from sqlrooms_server.messages import PluginMessage, StreamAck, StreamData
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Client, Plugin, Stream
from sqlrooms_server.plugins.runner import Runner, out_of_time
from sqlrooms_server.plugins.stream_calls import StreamCall
from sqlrooms_server.plugins.stream_handlers import ObjectHandler, Share, handled_by_function
from sqlrooms_server.plugins.stream_inputs import Held, InputLimits
from sqlrooms_server.plugins.stream_requests import Clock, StreamRequest
from sqlrooms_server.protocol.streams import encode_stream_begin
from sqlrooms_server.settings import Settings

# Of one connection: plain functions of its streams at one time, which each take a thread.
_MAX_FUNCTIONS = 4

# Streams that ended before their inputs did, remembered for each connection.
_MAX_ENDED = 1024


@dataclass
class _Client:
    """The streams of one connection."""

    lane: Lane
    held: Held
    share: Share = field(default_factory=lambda: Share(_MAX_FUNCTIONS))
    under_way: int = 0
    # Of streams that have ended, how many inputs may still send something.
    ended: dict[QueryId, int] = field(default_factory=dict)


class Streams:
    """Begins streams, and gives them what comes for them. For the loop thread."""

    def __init__(
        self,
        engine: Engine,
        requests: Requests,
        runner: Runner,
        settings: Settings,
        prepare: Callable[[Cursor, Client], None],
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._runner = runner
        self._settings = settings
        self._prepare = prepare
        self._limits = InputLimits(settings.stream_window, settings.max_message_size)
        self._clients: dict[Peer, _Client] = {}

    def closed(self, peer: Peer) -> None:
        self._clients.pop(peer, None)

    def begin(
        self,
        plugin: Plugin,
        stream: Stream,
        handler: Callable[..., Any],
        peer: Peer,
        message: PluginMessage,
    ) -> None:
        """Let ``handler`` handle the stream that ``message`` of ``peer`` begins."""
        client = self._clients.get(peer)
        if client is None:
            most = self._settings.max_streams_per_connection
            held = Held(2 * self._settings.max_message_size)
            client = self._clients[peer] = _Client(Lane(most), held)
        client.ended.pop(message.query_id, None)
        is_class = isinstance(handler, type)

        def late(what: str) -> None:
            error = out_of_time(plugin, what, self._runner.timeout)
            self._runner.post(request.stop, error)

        request = StreamRequest(
            self._requests,
            peer,
            message,
            stream,
            limits=self._limits,
            held=client.held,
            clock=Clock(self._runner.timers, self._runner.timeout, late),
            idle_timeout=self._settings.stream_idle_timeout,
            wakes_job=is_class,
        )
        request.on_answered = lambda: self._note_end(client, request)
        client.under_way += 1
        if client.under_way > self._settings.max_streams_per_connection:
            request.refuse(
                Busy(
                    f"This connection has {client.under_way - 1} streams, which is the limit "
                    "(--max-streams-per-connection)."
                )
            )
            return
        call = StreamCall(
            message,
            Client(peer, self._runner.post),
            self._engine,
            self._engine.bounded(peer.role.sql),
            self._runner,
            self._prepare,
            plugin=plugin,
            request=request,
        )
        request.on_stop = call.cancel
        parts = (self._runner, plugin, handler, call, request)
        work = (
            ObjectHandler(*parts, client.share).work() if is_class else handled_by_function(*parts)
        )
        if not self._requests.submit(request, work, client.lane, scheduler=self._runner.scheduler):
            return
        window = self._limits.window
        peer.send(encode_stream_begin(message.query_id, stream.inputs, stream.outputs, window))
        request.begin()
        if message.options.timeout is not None:
            request.limit(message.options.timeout, "timeoutMs")

    def data(self, peer: Peer, data: StreamData) -> None:
        """Something of an input came. Raises ``BadRequest``."""
        request = self._requests.find(peer, data.query_id)
        if isinstance(request, StreamRequest):
            request.add(data)
            return
        client = self._clients.get(peer)
        if client is None or data.query_id not in client.ended:
            # Without the id, which may be that of another request.
            raise BadRequest(f"No stream {data.query_id!r} is under way; send after streamBegin.")
        if data.last:
            client.ended[data.query_id] -= 1
            if not client.ended[data.query_id]:
                del client.ended[data.query_id]

    def acknowledge(self, peer: Peer, ack: StreamAck) -> None:
        request = self._requests.find(peer, ack.query_id)
        if isinstance(request, StreamRequest):
            request.acknowledge(ack)
        # Otherwise the stream has ended, and its acknowledgements were under way.

    def _note_end(self, client: _Client, request: StreamRequest) -> None:
        """Remember a stream of which more will come, so that the rest is ignored."""
        client.under_way -= 1
        if request.goes_on:
            count = sum(not source.has_last for source in request.inputs.values())
            client.ended[request.query_id] = count
            if len(client.ended) > _MAX_ENDED:
                del client.ended[next(iter(client.ended))]
