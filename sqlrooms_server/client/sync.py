"""The client for programs that wait: the callers' threads run flows."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ssl import SSLContext
from typing import Any, TypeVar, cast

from sqlrooms_server.client import flows, needs
from sqlrooms_server.client.blocks import Block
from sqlrooms_server.client.errors import ConnectionLost
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.objects import Fetched, Wanted
from sqlrooms_server.client.plugin_replies import (
    ObjectList,
)
from sqlrooms_server.client.replies import (
    CacheStats,
    MemberList,
    Progress,
)
from sqlrooms_server.client.results import RowList
from sqlrooms_server.client.streams import as_reader
from sqlrooms_server.client.sync_feeds import Live, ObjectWatch, Subscription, Watch
from sqlrooms_server.client.sync_objects import OpenObject
from sqlrooms_server.client.sync_results import Result, Session
from sqlrooms_server.client.sync_streams import BatchStream
from sqlrooms_server.client.sync_wire import Wire, receive
from sqlrooms_server.client.values import Parameters

T = TypeVar("T")
ProgressOption = bool | Callable[[Progress], None] | None


def connect(
    url: str = "ws://localhost:4000",
    *,
    token: str | None = None,
    user: str | None = None,
    connect_timeout: float = 10.0,
    ssl: SSLContext | None = None,
) -> Client:
    """Connect to a server. ``connect_timeout`` is in seconds.

    ``url`` begins with ``ws://``, or with ``wss://`` for TLS, or is ``ws+unix:///path`` of a Unix
    socket. ``ssl`` is for servers whose authority this machine does not know:
    ``ssl.create_default_context(cafile="authority.pem")``.

    ``user`` is the name under which others in a channel see and address this client, 1 to 255
    bytes that nobody checks.

    Raises ``OSError`` when nothing listens there, ``ConnectionLost`` (which is one) when what
    listens is no such server, ``RequestFailed`` with the code ``unauthorized`` for a wrong
    ``token`` or ``bad_request`` for what is no ``user``, and ``ValueError`` for what is no address.
    """
    client = Client(url, token, user, connect_timeout, ssl)
    client._connected(None)
    return client


class Client(Block):
    """A connection whose methods can be called from several threads at one time.

    Every method raises ``RequestFailed`` for what the server refuses, and ``ConnectionLost`` when
    the connection is lost. The next call connects again. A query that only reads is sent again by
    itself, for about ten seconds or its ``timeout``; after a ``ConnectionLost`` from anything else
    the statement may have run or not.

    Ctrl+C during a call cancels it on the server too.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        user: str | None,
        connect_timeout: float,
        ssl: SSLContext | None,
    ) -> None:
        self._url = url
        self._token = token
        self._user = user
        self._connect_timeout = connect_timeout
        self._ssl = ssl
        self._requests = flows.Requests()
        self._connecting = threading.Lock()
        self._wire: Wire | None = None

    def query(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        timeout: float | None = None,
        max_rows: int | None = None,
        session: Session | None = None,
        compression: str | None = None,
        progress: ProgressOption = None,
        query_id: str | None = None,
        persist: bool = False,
        resume: bool = False,
    ) -> Result:
        """Run ``sql`` and return its last result as soon as its columns are known.

        ``params`` is a list for ``?`` and ``$1``, or a dictionary for ``$name``; which values it
        may hold, ``encode_parameters`` says. ``timeout`` is in seconds and raises
        ``QueryTimeout``. With ``max_rows`` the result has at most so many, and says so in
        ``truncated``. ``compression`` is ``"lz4"`` or ``"zstd"``, for slow networks. ``progress``
        is called with ``Progress`` about five times a second; True shows a bar in a terminal or
        notebook. ``query_id`` is a name under which another thread can ``cancel``. With ``persist``
        the server may take the result from its cache, and leaves it there; ``cached`` says so.
        With ``resume`` it goes on where it was after a lost connection, also when batches were
        read, if the server keeps results for that (``--resume-window``). Close such a result
        before the client, or the server waits for the rest to be asked for.
        """
        request = self._requests.request(
            "arrow",
            sql,
            params,
            query_id=query_id,
            persist=persist,
            resume=resume,
            timeout=timeout,
            progress=progress,
            max_rows=max_rows,
            session=None if session is None else session._state,
            compression=compression,
        )
        return Result(self, self._run(self._requests.stream(request)))

    def rows(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        timeout: float | None = None,
        max_rows: int | None = None,
        session: Session | None = None,
        progress: ProgressOption = None,
        query_id: str | None = None,
        persist: bool = False,
    ) -> RowList:
        """The last result of ``sql`` as one dictionary for each row, by way of JSON."""
        request = self._requests.request(
            "json",
            sql,
            params,
            query_id=query_id,
            persist=persist,
            timeout=timeout,
            progress=progress,
            max_rows=max_rows,
            session=None if session is None else session._state,
        )
        return RowList(self._run(self._requests.rows(request)))

    def execute(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        progress: ProgressOption = None,
        query_id: str | None = None,
    ) -> None:
        """Run ``sql``, one or several statements, without their results."""
        request = self._requests.request(
            "exec",
            sql,
            params,
            query_id=query_id,
            timeout=timeout,
            progress=progress,
            session=None if session is None else session._state,
        )
        self._run(self._requests.execute(request))

    def watch(self, tables: str | Sequence[str] = "*", since: str | None = None) -> Watch:
        """Watch ``tables``: a name, a list of them, or ``"*"`` for all.

        A name is ``table``, ``schema.table`` or ``catalog.schema.table``, and need not exist yet.
        ``since`` is the ``version`` of an earlier watch: what was missed since comes first. A
        client has one watch at a time; another one raises ``RuntimeError``.
        """
        return Watch(self, self._requests.watch(tables, since))

    def live(
        self,
        sql: str,
        params: Parameters | None = None,
        *,
        max_rows: int | None = None,
        compression: str | None = None,
        timeout: float | None = None,
    ) -> Live:
        """The result of ``sql``, one ``SELECT``, now and again whenever it has changed.

        The first result is there when this returns. ``params``, ``max_rows`` and ``compression``
        are as for ``query``; ``timeout`` is in seconds and bounds each run. A client may have
        several live queries.
        """
        request = self._requests.request(
            "live",
            sql,
            params,
            query_id=None,
            timeout=timeout,
            progress=None,
            max_rows=max_rows,
            compression=compression,
        )
        return Live(self, self._requests.live(request))

    def notify(self, channel: str, payload: Any, to: Mapping[str, str] | None = None) -> int | None:
        """Say ``payload``, any JSON value, to those who hear ``channel``.

        With ``to``, ``{"user": name}`` or ``{"connection": id}``, only to those of them, and the
        answer is their number. It has been taken up when this returns; after ``ConnectionLost`` it
        may have been said or not. Raises ``TypeError`` for what is no JSON value, and
        ``RequestFailed`` with the code ``too_large`` or ``busy`` for what is over a limit.
        """
        return self._run(self._requests.notify(channel, payload, to))

    def subscribe(
        self,
        channel: str,
        *,
        recover: bool = False,
        since: str | None = None,
        presence: bool = False,
    ) -> Subscription:
        """Hear what is said in ``channel`` from now on, by this client too.

        With ``recover`` what is said while the connection is lost comes later, or ``Missed`` says
        that it is gone. ``since`` is the ``offset`` of a message, or of an earlier subscription:
        what was said since comes first; it implies ``recover``. With ``presence`` come ``Joined``
        and ``Left`` for other clients. A client may have several subscriptions to one channel.
        """
        feed = self._requests.subscribe(channel, recover=recover, since=since, presence=presence)
        return Subscription(self, feed)

    def members(self, channel: str) -> MemberList:
        """Who hears ``channel``: a list of ``Member``.

        Only for those who do so themselves; others get ``RequestFailed`` with the code
        ``not_found``.
        """
        return self._run(self._requests.members(channel))

    @property
    def connection_id(self) -> str | None:
        """Which ``Member`` this client is, as long as its connection lasts."""
        return None if self._wire is None else self._wire.link.connection_id

    def upload(self, table_name: str, data: Any, mode: str = "replace") -> int:
        """Send ``data`` into ``table_name``, whole or not at all, and return the number of rows.

        ``data`` is a ``pyarrow.Table``, ``RecordBatch`` or ``RecordBatchReader``, which is read
        as it is sent, a pandas DataFrame, without its index, or anything with
        ``__arrow_c_stream__``. ``mode`` is ``"replace"``, ``"create"``, which fails when the table
        exists, or ``"append"``, which matches columns by name. Raises ``TypeError`` for other data.
        """
        return self._run(self._requests.upload(table_name, as_reader(data), mode))

    def call(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        body: bytes | None = None,
        timeout: float | None = None,
        compression: str | None = None,
        on_event: Callable[[Any], None] | None = None,
        **more: Any,
    ) -> Any:
        """Send a message of the type ``kind`` to the plugin that has it, and return its answer: a
        JSON value, bytes, a ``pyarrow.Table``, or None when there is nothing to tell.

        ``fields`` and ``more`` are the fields of the message; with a ``body`` it is binary.
        ``on_event`` is called with what the plugin says before. ``timeout`` and ``compression`` are
        as for ``query``. Raises ``TypeError`` for what is no JSON value, ``ValueError`` for a name
        that the protocol has itself.
        """
        return self._run(
            self._requests.call(
                kind,
                {**(fields or {}), **more},
                body=body,
                timeout=timeout,
                compression=compression,
                on_event=on_event,
            )
        )

    def stream(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        /,
        *,
        inputs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        compression: str | None = None,
        on_event: Callable[[Any], None] | None = None,
        **more: Any,
    ) -> BatchStream:
        """Begin a stream of batches of the type ``kind``, which a plugin has.

        ``inputs`` has the batches of each input: what ``upload`` takes, or an iterable of such,
        read in a thread of its own as the server takes it. An input that is left out, or None, has
        no batches. ``timeout`` is in seconds and bounds the stream as a whole, the others are as
        for ``call``. Raises ``ValueError`` for an input that the stream does not have.
        """
        stream = self._requests.batch_stream(
            kind,
            {**(fields or {}), **more},
            inputs or {},
            timeout=timeout,
            compression=compression,
            on_event=on_event,
        )
        return BatchStream(self, stream)

    def objects(self) -> ObjectList:
        """The objects that are published for this client: a list of ``ObjectInfo``."""
        return self._run(self._requests.objects())

    def watch_objects(self) -> ObjectWatch:
        """What is published, and again whenever that has changed: a list of ``ObjectInfo`` each.

        A client has one such watch at a time; another one raises ``RuntimeError``.
        """
        return ObjectWatch(self, self._requests.watch_objects())

    def fetch(
        self, which: Wanted, *, timeout: float | None = None, compression: str | None = None
    ) -> Result | Fetched:
        """An object: its name, an ``ObjectInfo`` or a ``Reference``.

        A table is a ``Result``, whose batches come as they are read; what a plugin made bytes of is
        ``Fetched``, with ``payload`` and ``references``.
        """
        fetched = self._run(self._requests.fetch(which, timeout, compression))
        return fetched if isinstance(fetched, Fetched) else Result(self, fetched)

    def open(self, which: Wanted) -> OpenObject:
        """Open an object: its name, an ``ObjectInfo`` or a ``Reference``."""
        return OpenObject(self, self._requests.open(which))

    def cache_stats(self) -> CacheStats:
        """What the result cache of the server did, and what it holds."""
        return self._run(self._requests.cache_stats())

    def cancel(self, query: Result | str) -> bool:
        """Cancel a query by its result or ``query_id``; False when it is not under way.

        Who waits for it gets ``RequestFailed`` with the code ``cancelled``.
        """
        if isinstance(query, Result):
            return self._run(self._requests.cancel(query.query_id, query._stream.link))
        link = self._wire.link if self._wire is not None else None
        return self._run(self._requests.cancel(query, link))

    def session(self, name: str | None = None) -> Session:
        """A session of queries that share temporary tables, settings and a transaction.

        ``name`` has 1 to 64 characters; without one it gets one of its own.
        """
        return Session(self, self._requests.new_session(name))

    def close(self) -> None:
        """Close the connection; the server cancels what is still under way."""
        self._requests.client.is_closed = True
        with self._connecting:
            if self._wire is not None:
                self._wire.close()

    def _run(self, flow: needs.Flow[T]) -> T:
        try:
            need = next(flow)
            while True:
                try:
                    got = self._get(need)
                except BaseException as error:  # handed to the flow, which cancels
                    need = flow.throw(error)
                else:
                    need = flow.send(got)
        except StopIteration as end:
            return cast(T, end.value)

    def _get(self, need: needs.Need) -> Any:
        match need:
            case needs.Receive(exchange, deadline):
                return receive(cast("queue.SimpleQueue[Any]", exchange.inbox), deadline)
            case needs.Sleep(seconds):
                time.sleep(seconds)
            case needs.Connect(deadline):
                return self._connected(deadline)
            case needs.Next():
                raise TypeError("Only the client for asyncio reads asynchronous iterators.")

    def _connected(self, deadline: float | None) -> Link:
        with self._connecting:
            if self._requests.client.is_closed:
                raise ConnectionLost("The client was closed.")
            if self._wire is None or self._wire.link.lost is not None:
                if self._wire is not None:
                    self._wire.close()
                timeout = self._connect_timeout
                if deadline is not None:
                    timeout = max(0.001, min(timeout, deadline - time.monotonic()))
                wire = Wire(self._url, self._token, timeout, self._ssl)
                try:
                    self._run(needs.greet(wire.link, timeout, self._user))
                except BaseException:
                    wire.close()
                    raise
                self._wire = wire
            return self._wire.link
