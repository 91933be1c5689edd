"""What both clients do, without input and output: the flows of one client."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from sqlrooms_server.client.bar import reporter
from sqlrooms_server.client.batch_streams import BatchStream
from sqlrooms_server.client.calls import CallRequest, CallStream, checked_fields, value_of
from sqlrooms_server.client.channel_feeds import Subscription
from sqlrooms_server.client.errors import ConnectionLost
from sqlrooms_server.client.link import Link, cancelling
from sqlrooms_server.client.messages import (
    CACHE_STATS,
    MEMBERS,
    NOTIFY,
    Id,
    Key,
    encode,
    encode_payload,
    framed,
)
from sqlrooms_server.client.needs import ClientState, Flow, Retries, answer, connected
from sqlrooms_server.client.object_feeds import ObjectWatch
from sqlrooms_server.client.objects import (
    Fetched,
    OpenObject,
    Reference,
    Wanted,
    references_of,
    wanted,
)
from sqlrooms_server.client.plugin_replies import (
    ObjectBytes,
    ObjectList,
)
from sqlrooms_server.client.queries import Attempts, Request, Session
from sqlrooms_server.client.replies import (
    CacheStats,
    CancelAck,
    Consumed,
    Done,
    MemberList,
    NotifyAck,
    Progress,
    Reply,
    Rows,
    SessionClosed,
)
from sqlrooms_server.client.result_streams import Stream
from sqlrooms_server.client.streams import upload_chunks
from sqlrooms_server.client.table_feeds import Live, Watch
from sqlrooms_server.client.values import Parameters, encode_parameters


class Requests:
    """The flows of one client."""

    def __init__(self) -> None:
        self.client = ClientState()
        self._ids = itertools.count(1)
        self._watch: Watch | None = None
        self._object_watch: ObjectWatch | None = None

    def request(
        self,
        kind: str,
        sql: str,
        params: Parameters | None,
        *,
        query_id: str | None,
        timeout: float | None,
        progress: bool | Callable[[Progress], None] | None,
        max_rows: int | None = None,
        compression: str | None = None,
        session: Session | None = None,
        persist: bool = False,
        resume: bool = False,
    ) -> Request:
        """A query, checked. Raises ``TypeError`` for a parameter that has no SQL type."""
        return Request(
            kind=kind,
            sql=sql,
            query_id=next(self._ids) if query_id is None else query_id,
            params=None if params is None else encode_parameters(params),
            timeout=timeout,
            max_rows=max_rows,
            compression=compression,
            session=session,
            persist=persist,
            resume=resume,
            reporter=reporter(progress),
        )

    def new_session(self, name: str | None) -> Session:
        return Session(f"session-{next(self._ids)}" if name is None else name)

    def stream(self, request: Request) -> Flow[Stream]:
        """Send a query and wait for its schema."""
        stream = Stream(Attempts(self.client, request))
        yield from stream.begin()
        return stream

    def watch(self, tables: str | Sequence[str], since: str | None) -> Watch:
        """A watch that has not begun. Raises ``RuntimeError`` while another one is open."""
        if self._watch is not None and not self._watch.is_closed:
            raise RuntimeError("This client watches tables already; close that watch first.")
        self._watch = Watch(self.client, self._new_id, tables, since)
        return self._watch

    def live(self, request: Request) -> Live:
        """A live query that has not begun."""
        return Live(self.client, self._new_id, request)

    def subscribe(
        self, channel: str, *, recover: bool, since: str | None, presence: bool
    ) -> Subscription:
        """A subscription that has not begun."""
        return Subscription(
            self.client, self._new_id, channel, recover=recover, since=since, presence=presence
        )

    def notify(self, channel: str, payload: Any, to: Mapping[str, str] | None) -> Flow[int | None]:
        """Say ``payload``, and return how many heard it if it was for some only.

        It is said at most once, and so not again after a lost connection.
        """
        query_id = next(self._ids)
        fields = {"type": NOTIFY, "channel": channel, "payload": payload, "queryId": query_id}
        message = encode_payload(**fields, **({} if to is None else {"to": dict(to)}))
        link = yield from connected()
        reply = yield from self._answer(link, (NOTIFY, query_id), message)
        return reply.delivered if isinstance(reply, NotifyAck) else None

    def members(self, channel: str) -> Flow[MemberList]:
        """Who hears ``channel``."""
        query_id = next(self._ids)
        link = yield from connected()
        message = encode(type=MEMBERS, channel=channel, queryId=query_id)
        reply = yield from self._answer(link, (MEMBERS, query_id), message)
        assert isinstance(reply, MemberList)
        return reply

    def call(
        self,
        kind: str,
        fields: Mapping[str, Any],
        *,
        body: bytes | None,
        timeout: float | None,
        compression: str | None,
        on_event: Callable[[Any], None] | None,
    ) -> Flow[Any]:
        """What a plugin answers to a message, as a whole. It is sent at most once."""
        request = CallRequest(
            *(kind, "", next(self._ids)),
            timeout=timeout,
            compression=compression,
            fields=checked_fields(fields),
            body=body,
        )
        stream = CallStream(Attempts(self.client, request), on_event)
        yield from stream.begin()
        try:
            return (yield from value_of(stream))
        finally:
            stream.abandon()

    def batch_stream(
        self,
        kind: str,
        fields: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        timeout: float | None,
        compression: str | None,
        on_event: Callable[[Any], None] | None,
    ) -> BatchStream:
        """A stream that has not begun. Raises ``TypeError`` for inputs that have no batches."""
        request = CallRequest(
            *(kind, "", next(self._ids)),
            timeout=timeout,
            compression=compression,
            fields=checked_fields(fields),
        )
        return BatchStream(request, inputs, on_event)

    def objects(self) -> Flow[ObjectList]:
        """What is published for this client."""
        retries = Retries(self.client, None)
        while True:
            try:
                link = yield from connected()
                query_id = next(self._ids)
                message = encode(type="object-list", queryId=query_id)
                reply = yield from self._answer(link, ("query", query_id), message)
                assert isinstance(reply, ObjectList)
                return reply
            except ConnectionLost as error:
                yield from retries.pause(error)

    def watch_objects(self) -> ObjectWatch:
        """A watch that has not begun. Raises ``RuntimeError`` while another one is open."""
        if self._object_watch is not None and not self._object_watch.is_closed:
            raise RuntimeError("This client watches objects already; close that watch first.")
        self._object_watch = ObjectWatch(self.client, self._new_id)
        return self._object_watch

    def fetch(
        self, which: Wanted, timeout: float | None, compression: str | None
    ) -> Flow[Fetched | CallStream]:
        """An object that is published, or referred to: as bytes, or a table that begins."""
        request = CallRequest(
            *("object-fetch", "", next(self._ids)),
            timeout=timeout,
            compression=compression,
            fields=wanted(which),
            # A reference ends with its connection.
            repeats=not isinstance(which, Reference),
            holds=which,
        )
        attempts = Attempts(self.client, request)
        stream = CallStream(attempts)
        yield from stream.begin()
        if isinstance(stream.answer, ObjectBytes):
            references = references_of(attempts.link, stream.answer)
            return Fetched(stream.answer.payload, references)
        return stream

    def open(self, which: Wanted) -> OpenObject:
        """An object that is not open yet."""
        return OpenObject(self._new_id, which)

    def _answer(self, link: Link, key: Key, message: str) -> Flow[Reply]:
        exchange = link.open(key)
        try:
            link.send(message)
            return (yield from answer(exchange))
        finally:
            link.abandon(exchange)

    def _new_id(self) -> int:
        return next(self._ids)

    def rows(self, request: Request) -> Flow[Rows]:
        """The rows of a query."""
        reply = yield from self._reply(request)
        return reply if isinstance(reply, Rows) else Rows("[]")

    def execute(self, request: Request) -> Flow[None]:
        """Run statements."""
        yield from self._reply(request)

    def upload(self, table_name: str, reader: pa.RecordBatchReader, mode: str) -> Flow[int]:
        """Send ``reader`` and return the number of its rows."""
        link = yield from connected()
        query_id = next(self._ids)
        exchange = link.open(("query", query_id))
        names: dict[str, Any] = {"tableName": table_name, "mode": mode}
        sent = consumed = 0
        try:
            for seq, (chunk, is_last) in enumerate(upload_chunks(reader)):
                while not exchange.inbox.empty() or (
                    sent > consumed and sent + len(chunk) - consumed > link.upload_window
                ):
                    reply = yield from answer(exchange)
                    if not isinstance(reply, Consumed):
                        raise ConnectionLost("The server ended an upload that is not complete.")
                    consumed = reply.bytes
                header = encode(
                    type="uploadArrow", queryId=query_id, seq=seq, last=is_last, **names
                )
                names = {}
                link.send(framed(header, chunk))
                sent += len(chunk)
            while not isinstance(reply := (yield from answer(exchange)), Done):
                pass
            return reply.rows
        except BaseException:
            link.abandon(exchange)
            raise

    def cancel(self, query_id: Id, link: Link | None) -> Flow[bool]:
        """Cancel a query; False when it is not under way."""
        if link is None or link.lost is not None:
            return False
        reply = yield from self._answer(link, ("cancel", query_id), cancelling(query_id))
        return isinstance(reply, CancelAck) and reply.cancelled

    def close_session(self, session: Session) -> Flow[bool]:
        """End a session; False when it had ended already. Does not raise for a lost connection."""
        link = session.link
        if session.open_result is not None:
            session.open_result.abandon()
        is_over = session.has_ended and not session.is_gone
        session.has_ended, session.is_gone = True, False
        if link is None or link.lost is not None or is_over:
            return False
        exchange = link.open(("session", session.name))
        try:
            link.send(encode(type="closeSession", session=session.name))
            reply = yield from answer(exchange)
        except ConnectionLost:
            return False
        finally:
            link.abandon(exchange)
        return isinstance(reply, SessionClosed) and reply.closed

    def cache_stats(self) -> Flow[CacheStats]:
        """What the result cache does."""
        retries = Retries(self.client, None)
        while True:
            try:
                link = yield from connected()
                query_id = next(self._ids)
                message = encode(type=CACHE_STATS, queryId=query_id)
                reply = yield from self._answer(link, (CACHE_STATS, query_id), message)
                assert isinstance(reply, CacheStats)
                return reply
            except ConnectionLost as error:
                yield from retries.pause(error)

    def _reply(self, request: Request) -> Flow[Reply]:
        try:
            _, reply = yield from Attempts(self.client, request).first_reply()
        finally:
            request.reporter.clear()
        return reply
