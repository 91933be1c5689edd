"""Fetching objects: one answer, bytes with references or a table."""

from __future__ import annotations

from typing import Any

from sqlrooms_server.db import values
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.errors import BadRequest
from sqlrooms_server.features.limits import Bounds, bound_rows, bounds_of, deadline
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.jobs import Work
from sqlrooms_server.messages import PluginMessage
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugins.calls import Calls, PromptRequest, Reply, send_rows
from sqlrooms_server.plugins.object_lanes import Lanes
from sqlrooms_server.plugins.object_types import BUILT_IN, Target, Types
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.plugins.tickets import Tickets
from sqlrooms_server.protocol import framed
from sqlrooms_server.settings import Settings


class Fetches:
    """Answers ``object-fetch``. For the loop thread."""

    def __init__(
        self, engine: Engine, requests: Requests, runner: Runner, settings: Settings, types: Types
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._runner = runner
        self._settings = settings
        self._types = types
        # What is fetched is what was published, whoever asks: no cursor is set up for a client.
        self._calls = Calls(engine, requests, runner, settings, lambda cursor, client: None)

    def begin(
        self,
        peer: Peer,
        message: PluginMessage,
        name: str,
        target: Target,
        lanes: Lanes,
        tickets: Tickets,
    ) -> None:
        """Answer ``message`` with ``target``. Raises ``BadRequest`` when it can only be opened."""
        if not target.type.can_fetch:
            raise BadRequest(f"{name} is a {target.type.name}, which can only be opened.")
        is_built_in = isinstance(target.type, BUILT_IN)
        request = self._calls.request(peer, message)
        bounds = bounds_of(peer.role, self._engine, self._settings)
        if isinstance(target.obj, values.Relation):
            # It is a query, so that it takes its turn among those.
            work = self._relation(request, message, target.obj, bounds)
            submitted = self._requests.submit(request, work)
        else:
            work = self._work(request, message, name, target, bounds, tickets)
            scheduler = self._runner.scheduler
            lane = lanes.tables if is_built_in else lanes.of(target.type.to_bytes)
            submitted = self._requests.submit(request, work, lane, scheduler=scheduler)
        if not submitted:
            return
        if is_built_in:
            limit = deadline(message.options, bounds)
            if limit is not None:
                request.limit(*limit)
        else:
            self._calls.limit(request, target.plugin, message)

    def _relation(
        self,
        request: PromptRequest,
        message: PluginMessage,
        relation: values.Relation,
        bounds: Bounds,
    ) -> Work:
        with self._engine.cursor() as cursor:
            request.on_stop = cursor.interrupt
            result = cursor.run(relation.sql, relation.params)
            assert result is not None
            bound_rows(result, message.options, bounds)
            yield from send_rows(request, message, result)

    def _work(
        self,
        request: PromptRequest,
        message: PluginMessage,
        name: str,
        target: Target,
        bounds: Bounds,
        tickets: Tickets,
    ) -> Work:
        reply: Reply = yield from self._runner.work(
            *(target.plugin, f"to_bytes of object {name!r}", target.type.to_bytes, target.obj),
            resume=request.resume_soon,
            finish=lambda value: self._reply(message, value, tickets),
        )
        if isinstance(reply.table, values.Relation):
            yield from self._relation(request, message, reply.table, bounds)
        elif reply.table is not None:

            def began(cursor: Cursor) -> None:
                request.on_stop = cursor.interrupt

            with values.opened(self._engine, reply.table, began=began) as result:
                bound_rows(result, message.options, bounds)
                yield from send_rows(request, message, result)
        else:
            yield from self._calls.answer(request, message, reply)

    def _reply(self, message: PluginMessage, value: Any, tickets: Tickets) -> Reply:
        """The answer that says ``value``. Raises ``TypeError``, or ``Busy``."""
        if isinstance(value, values.Relation) or values.is_table(value):
            return Reply(table=value)
        payload, references = value if isinstance(value, tuple) and len(value) == 2 else (value, ())
        if isinstance(payload, str):
            payload = payload.encode()
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise TypeError(
                f"It returned a {type(payload).__name__}, neither bytes, nor a table, nor bytes "
                "and references."
            )
        targets = [self._types.resolve(obj) for obj in references]
        head = {
            "type": "object",
            "queryId": message.query_id,
            "references": tickets.add(targets) if targets else [],
        }
        return Reply(binary=framed(head, bytes(payload)))
