"""Watches and live queries, as flows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from sqlrooms_server.client.errors import ConnectionLost, QueryTimeout
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.feeds import Feed
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import WATCH, encode
from sqlrooms_server.client.needs import ClientState, Flow
from sqlrooms_server.client.queries import GRACE_S, Attempts, Request
from sqlrooms_server.client.replies import Change, Chunk, Reply, Watching
from sqlrooms_server.client.result_streams import Snapshot
from sqlrooms_server.client.streams import decoded, is_same


class Watch(Feed[Change]):
    """Changes of tables."""

    what = "watch"

    def __init__(
        self,
        client: ClientState,
        new_id: Callable[[], int],
        tables: str | Sequence[str],
        since: str | None,
    ) -> None:
        super().__init__(client, new_id)
        self.version = since
        self.versions: dict[str, int] = {}
        self._query_id = 0
        self._tables = "*" if tables == "*" else [tables] if isinstance(tables, str) else [*tables]

    def _begun(self) -> Flow[Reply | None]:
        is_first = self.version is None
        reply = yield from self._reply(None)
        if isinstance(reply, Watching):
            self._learn(reply)
        return None if is_first else reply

    def _open(self, link: Link) -> Exchange:
        self._query_id = self._new_id()
        return link.open((WATCH, self._query_id), is_feed=True)

    def _send(self, link: Link) -> None:
        link.send(
            encode(type=WATCH, queryId=self._query_id, tables=self._tables, since=self.version)
        )

    def _take(self, reply: Reply) -> Change | None:
        if isinstance(reply, Watching):
            is_first = self.version is None
            self._learn(reply)
            if is_first or not reply.resync:
                return None
            reply = Change({}, "change", reply.version, True)
        assert isinstance(reply, Change)
        self.versions.update(reply.tables)
        self.version = reply.version
        return reply

    def _learn(self, reply: Watching) -> None:
        if reply.resync or not self.versions:
            self.versions = dict(reply.versions)
        if self.version is None:
            # Otherwise what was missed follows, or is told by ``_take``, and is not seen yet.
            self.version = reply.version


class Live(Feed[Snapshot]):
    """The results of a query, the latest always, others as the consumer has time for them."""

    what = "live query"

    def __init__(self, client: ClientState, new_id: Callable[[], int], request: Request) -> None:
        super().__init__(client, new_id)
        self._request = request
        self._last: pa.Table | None = None
        self._is_subscribed_again = False

    def _begun(self) -> Flow[Reply | None]:
        timeout = self._request.timeout
        deadline = None if timeout is None else time.monotonic() + timeout + GRACE_S
        try:
            return (yield from self._reply(deadline))
        except TimeoutError:
            raise QueryTimeout("The server did not answer in time.") from None

    def _open(self, link: Link) -> Exchange:
        self._is_subscribed_again = self._last is not None
        self._request.query_id = self._new_id()
        return link.open(("query", self._request.query_id), is_feed=True)

    def _send(self, link: Link) -> None:
        link.send(self._request.message(self._request.timeout))

    def _take(self, reply: Reply) -> Snapshot | None:
        if not isinstance(reply, Chunk):
            self._unsubscribe()
            raise ConnectionLost("The server answered a live query with what is no table.")
        table = decoded(reply.body)
        if self._is_subscribed_again and self._last is not None:
            self._is_subscribed_again = False
            if is_same(table, self._last):
                return None
        self._last = table
        # The request of the next subscription has another id.
        attempts = Attempts(self._client, replace(self._request))
        return Snapshot(attempts, table, reply.truncated)
