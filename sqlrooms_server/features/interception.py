"""Queries as plugins see them: what takes part in them, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.values import opened
from sqlrooms_server.errors import ServerError
from sqlrooms_server.features.requests import Request
from sqlrooms_server.messages import Live, Message
from sqlrooms_server.messages import Query as QueryMessage
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Client, Outcome, Query
from sqlrooms_server.plugin.chain import Chain
from sqlrooms_server.plugin.journal import Journal


class Owner(Protocol):
    """What a cursor works for, and what interrupts it."""

    cursor: Cursor | None


class Interception:
    """The hooks of plugins around the queries of clients.

    ``is_wanted``: whether there are any; nothing of this is called otherwise. ``takes_part``:
    whether queries go through some, see :class:`plugin.chain.Chain`. ``counts``: whether somebody
    is told how many rows there were.
    """

    def __init__(
        self, engine: Engine, chain: Chain, journal: Journal, post: Callable[..., None]
    ) -> None:
        self._engine = engine
        self._chain = chain
        self._journal = journal
        self._post = post
        self.takes_part = chain.takes_part
        self.is_personal = chain.is_personal
        self.counts = bool(journal)
        self.is_wanted = self.takes_part or self.counts

    def seen(self, peer: Peer, message: QueryMessage | Live) -> Query:
        """``message`` of ``peer`` as plugins see it. For the loop thread."""
        kind = message.kind if isinstance(message, QueryMessage) else "live"
        client = Client(peer, self._post)
        return Query(message.sql, message.options.params, kind, message.query_id, client)

    def taken_part_in(self, query: Query | None) -> Query | None:
        """``query`` when it goes through plugins; None when they are only told of it."""
        return query if self.takes_part else None

    def prepare(self, cursor: Cursor, query: Query) -> None:
        """Let plugins set up ``cursor`` for ``query``, on its worker."""
        self._chain.prepare(cursor, query.client)

    def ask(self, cursor: Cursor, query: Query, formats: tuple[str, ...]) -> Any:
        """What plugins make of ``query``, which the last of them asks ``cursor``, on its worker.

        A result or None, or else something for :meth:`opened`.
        """
        if not self._chain.around_query:
            return cursor.run(query.sql, query.params, formats)
        return self._chain.run(query, lambda asked: cursor.ask(asked.sql, asked.params, formats))

    def ask_with(self, run: Callable[[Query], Result | None], query: Query) -> Any:
        """The same, but the last of them asks ``run``."""
        return self._chain.run(query, run)

    @contextmanager
    def opened(
        self, owner: Owner, value: Any, formats: tuple[str, ...] = ("arrow",)
    ) -> Iterator[Result | None]:
        """What :meth:`ask` returned, as a result."""
        if value is None or isinstance(value, Result):
            yield value
            return

        def began(cursor: Cursor) -> None:
            if owner.cursor is not None:
                cursor.aftermath = owner.cursor.aftermath
            owner.cursor = cursor

        with opened(self._engine, value, formats or ("arrow",), began) as result:
            yield result

    # What is told of them, on the loop thread.

    def follow(self, request: Request, query: Query) -> None:
        """Tell of ``query`` when ``request`` is answered."""
        began = time.monotonic()

        def told() -> None:
            self._journal.tell(query, _outcome(request, began))

        request.on_told = told

    def answered(self, query: Query, rows: int | None, size: int) -> None:
        """``query`` was answered at once, with so many rows and bytes."""
        if self.counts:
            self._journal.tell(query, Outcome(None, 0.0, 0.0, 0.0, rows, size))

    def refused(self, peer: Peer, message: Message, error: ServerError) -> None:
        """``message`` was refused before anything of it began."""
        if self.counts and isinstance(message, QueryMessage | Live):
            self._journal.tell(self.seen(peer, message), Outcome(error, 0.0, 0.0, 0.0))


def _outcome(request: Request, began: float) -> Outcome:
    job, now = request.job, time.monotonic()
    queued = running = 0.0
    if job is not None:
        queued = (job.began or now) - job.submitted
        running = job.worked
    if request.error is not None:
        return Outcome(request.error, queued, running, now - began)
    return Outcome(None, queued, running, now - began, request.rows, request.reply_size)
