"""``uploadArrow``: an Arrow IPC stream becomes a table."""

from __future__ import annotations

from collections.abc import Mapping

from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.uploads import create_table
from sqlrooms_server.features import MessageHandler, Route
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.jobs import Work
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import Upload, encode


class Uploads:
    """Creates or replaces tables from what clients send."""

    def __init__(self, engine: Engine, requests: Requests) -> None:
        self._engine = engine
        self._requests = requests

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Upload: self._submit}

    @property
    def routes(self) -> Mapping[str, Route]:
        return {}

    def closed(self, peer: Peer) -> None:
        pass

    def _submit(self, peer: Peer, upload: Upload) -> None:
        request = Request(self._requests, peer, upload.query_id, size=len(upload.body))
        self._requests.submit(request, self._work(request, upload))

    def _work(self, request: Request, upload: Upload) -> Work:
        with self._engine.cursor() as cursor:
            request.cursor = cursor
            create_table(self._engine, cursor, upload.table, upload.body)
        request.reply(encode({"type": "uploadAck", "queryId": upload.query_id}))
        return
        yield  # a job is a generator, also one that never pauses
