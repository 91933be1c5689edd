"""One query: how it is sent, and sent again after a lost connection."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlrooms_server.client.bar import Reporter
from sqlrooms_server.client.errors import ConnectionLost, SessionEnded
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import Id, encode
from sqlrooms_server.client.needs import ClientState, Flow, Retries, answer, connected
from sqlrooms_server.client.reads import is_read
from sqlrooms_server.client.replies import Reply

if TYPE_CHECKING:
    from sqlrooms_server.client.result_streams import Stream

# What of a result may be under way to a consumer that is slow: enough for a connection of
# 1 Gbit/s and 50 ms.
WINDOW = 8 << 20
# A server that is alive says itself that a query took too long; after this it is taken for dead.
GRACE_S = 2.0


class Session:
    """A name that is bound to the connection of its first use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.link: Link | None = None
        self.has_ended = False
        # The server ended it, and refuses the name until it is told that this was noticed.
        self.is_gone = False
        self.open_result: Stream | None = None

    def connected(self) -> Flow[Link]:
        """The link of this session. Raises ``SessionEnded`` when that is gone."""
        if self.link is not None and self.link.lost is not None:
            self.has_ended = True
        if self.has_ended:
            raise SessionEnded(f"The session {self.name} has ended; begin a new one.")
        if self.link is None:
            self.link = yield from connected()
        return self.link


@dataclass(slots=True)
class Request:
    """A query, and how it is made."""

    kind: str
    sql: str
    query_id: Id
    params: list[Any] | dict[str, Any] | None = None
    timeout: float | None = None
    max_rows: int | None = None
    compression: str | None = None
    session: Session | None = None
    persist: bool = False
    resume: bool = False
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def can_repeat(self) -> bool:
        return self.session is None and is_read(self.sql)

    def message(self, remaining: float | None) -> str | bytes:
        """The message; ``remaining`` is in seconds."""
        streams = self.kind == "arrow" or None
        return encode(
            type=self.kind,
            sql=self.sql,
            queryId=self.query_id,
            params=self.params,
            timeoutMs=None if remaining is None else max(1, round(1000 * remaining)),
            maxRows=self.max_rows,
            compression=self.compression,
            session=None if self.session is None else self.session.name,
            progress=self.reporter.is_wanted or None,
            persist=self.persist or None,
            stream=streams,
            window=streams and WINDOW,
            resumable=(streams and self.resume) or None,
        )


class Attempts:
    """One query, sent again after a lost connection when it only reads."""

    def __init__(self, client: ClientState, request: Request) -> None:
        self.request = request
        self.link: Link
        self._client = client
        timeout = request.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._retries = Retries(client, self._deadline, request.can_repeat)

    def first_reply(self) -> Flow[tuple[Exchange, Reply]]:
        """Send the query until it is answered. Raises what the server answers, or
        ``ConnectionLost``."""
        while True:
            try:
                return (yield from self._attempt())
            except ConnectionLost as error:
                yield from self.pause(error)

    def retries(self) -> Retries:
        """For a query that goes on where it was."""
        return Retries(self._client, self._deadline)

    def resume(self, token: str, seq: int, consumed: int) -> Flow[Exchange]:
        """Ask for the rest of the result, over a connection that is open."""
        query_id = self.request.query_id
        self.link = yield from connected(self._deadline)
        exchange = self.link.open(("query", query_id))
        self.link.send(
            encode(type="resume", queryId=query_id, token=token, seq=seq, bytes=consumed)
        )
        return exchange

    def pause(self, error: ConnectionLost) -> Flow[None]:
        """Wait before another attempt, or raise ``error``."""
        yield from self._retries.pause(error)

    def answer(self, exchange: Exchange) -> Flow[Reply]:
        """The next reply that tells more than progress."""
        request = self.request
        # The server counts its own time. Here it is only that something comes, time after time.
        deadline = None
        if request.timeout is not None:
            deadline = time.monotonic() + request.timeout + GRACE_S
        try:
            return (yield from answer(exchange, deadline, request.reporter))
        except SessionEnded:
            if request.session is not None:
                request.session.has_ended = request.session.is_gone = True
            raise

    def _attempt(self) -> Flow[tuple[Exchange, Reply]]:
        request = self.request
        session = request.session
        if session is None:
            self.link = yield from connected(self._deadline)
        else:
            self.link = yield from session.connected()
            # Queries of a session run one after the other: the next one waits for the last byte
            # of the one before.
            if session.open_result is not None:
                yield from session.open_result.read_ahead()
        exchange = self.link.open(("query", request.query_id))
        try:
            remaining = None if self._deadline is None else self._deadline - time.monotonic()
            self.link.send(request.message(remaining))
            return exchange, (yield from self.answer(exchange))
        except BaseException:
            self.link.abandon(exchange)
            raise
