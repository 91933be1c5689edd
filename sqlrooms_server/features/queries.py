"""``arrow``, ``json`` and ``exec``."""

from __future__ import annotations

from collections.abc import Mapping

from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.results import BROKEN_ARROW, arrow_chunks, json_chunks
from sqlrooms_server.features import MessageHandler, Route
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.jobs import Pause, Work
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import JSON_SUFFIX, Query, arrow_prefix, encode_ok, json_prefix


class Queries:
    """Runs SQL and sends what comes of it."""

    def __init__(self, engine: Engine, requests: Requests) -> None:
        self._engine = engine
        self._requests = requests

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Query: self._submit}

    @property
    def routes(self) -> Mapping[str, Route]:
        return {}

    def closed(self, peer: Peer) -> None:
        pass

    def _submit(self, peer: Peer, query: Query) -> None:
        self._requests.submit(
            peer,
            query.query_id,
            lambda request: self._work(request, query),
            size=len(query.sql),
            broken_end=BROKEN_ARROW if query.kind == "arrow" else b"",
        )

    def _work(self, request: Request, query: Query) -> Work:
        with self._engine.cursor() as cursor:
            request.cursor = cursor
            result = cursor.run(query.sql, for_json=query.kind == "json")
            if result is None:
                request.reply(encode_ok(query.query_id))
                return
            if query.kind == "exec":
                for _ in result.reader:
                    pass
                request.reply(encode_ok(query.query_id))
                return
            first = result.first_batch()
            if first is None and result.tells_nothing:
                request.reply(encode_ok(query.query_id))
                return
            if query.kind == "arrow":
                request.is_text = False
                chunks = arrow_chunks(result, first, arrow_prefix(query.query_id))
            else:
                chunks = json_chunks(result, first, json_prefix(query.query_id), JSON_SUFFIX)
            chunk = next(chunks)
            for following in chunks:
                yield Pause.FULL if request.put(chunk) else Pause.TURN
                chunk = following
            # No pause after the last one: a reply that is complete can no longer fail.
            request.put(chunk)
