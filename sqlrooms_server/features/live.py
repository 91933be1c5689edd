"""``live``: queries that answer again whenever their result has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.results import arrow_chunks
from sqlrooms_server.db.room_macros import wanted_rooms
from sqlrooms_server.db.versions import Recorded, Token
from sqlrooms_server.errors import (
    BadRequest,
    Busy,
    Cancelled,
    QueryId,
    ServerError,
    TooLarge,
)
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.interception import Interception
from sqlrooms_server.features.limits import (
    Bounds,
    bound_rows,
    bounds_of,
    deadline,
    out_of_time,
    truncation,
)
from sqlrooms_server.features.requests import Request, Requests, as_server_error
from sqlrooms_server.jobs import Job, Lane, Pause, Scheduler, Work
from sqlrooms_server.messages import Live, Options
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Query as SeenQuery
from sqlrooms_server.protocol import arrow_prefix
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timer, Timers
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull

# Each subscriber that reads slowly may hold on to an older result.
_MAX_RESULT_BYTES = 64 << 20
# Of all results that have not reached all their subscribers.
_MAX_WAITING_BYTES = 512 << 20
# A result up to this is kept for subscribers that come later.
_KEPT_BYTES = 256 << 10

# Its last part is None when others may share it.
_Key = tuple[str, str, int | None, str | None, float | None, Bounds, "Subscription | None"]


def _key(live: Live, bounds: Bounds, owner: Subscription | None) -> _Key:
    options = live.options
    params = json.dumps(options.params)
    return live.sql, params, options.max_rows, options.compression, options.timeout, bounds, owner


class Subscription(Request):
    """One client's live query. ``seq`` counts its answers, ``state`` is the last one begun."""

    def __init__(self, requests: Requests, peer: Peer, query_id: QueryId, *, size: int) -> None:
        super().__init__(requests, peer, query_id, size=size)
        self.seq = 0
        self.state = 0
        self.is_sending = False

    def stop(self, reason: ServerError) -> bool:
        if self.answered:
            return False
        self.fail(reason)
        return True


class _Query:
    """One query and its subscribers. Its run, at most one at a time, belongs to a worker.

    ``state`` counts the results that differed. ``body`` is the last one while it is needed.
    ``tokens`` tell whether it still holds; None before the first. ``seen`` is the query as plugins
    see it, of the first subscriber, if any take part in it.
    """

    def __init__(self, sql: str, options: Options, bounds: Bounds, seen: SeenQuery | None) -> None:
        self.sql = sql
        self.seen = seen
        self.options = options
        self.bounds = bounds
        self.subscriptions: set[Subscription] = set()
        self.state = 0
        self.body: bytes | None = None
        self.header: dict[str, object] = {}
        self.digest = b""
        self.tokens: list[Token] | None = None
        self.job: Job | None = None
        self.deadline: Timer | None = None
        self.cursor: Cursor | None = None
        self.has_ended = False

    def interrupt(self) -> None:
        if self.cursor is not None:
            self.cursor.interrupt()


class _Result:
    """What a run found, handed from the worker to the loop thread."""

    def __init__(self) -> None:
        # More than one when a plugin asks for more than one text.
        self.tokens: list[Token] = []
        self.body = b""
        self.header: dict[str, object] = {}


class LiveQueries(Feature):
    """A feature. Everything but ``_work`` belongs to the loop thread."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        timers: Timers,
        requests: Requests,
        settings: Settings,
        plugins: Interception,
    ) -> None:
        self._plugins = plugins
        self._engine = engine
        self._scheduler = scheduler
        self._timers = timers
        self._requests = requests
        self._settings = settings
        # One lane for all, so that they cannot crowd out the clients' own queries.
        self._lane = Lane(os.cpu_count() or 1)
        self._queries: dict[_Key, _Query] = {}
        self._counts: dict[Peer, int] = {}
        self._waiting_bytes = 0
        self._looks = False
        engine.versions.listen(self._listen)

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Live: self._subscribe}

    def _subscribe(self, peer: Peer, live: Live) -> None:
        self._engine.versions.in_use = True
        size = live.options.size or len(live.sql)
        subscription = Subscription(self._requests, peer, live.query_id, size=size)
        seen = self._plugins.seen(peer, live) if self._plugins.is_wanted else None
        if seen is not None:
            self._plugins.follow(subscription, seen)
        refusal = self._refusal(peer)
        if refusal is not None:
            subscription.refuse(refusal)
            return
        if not self._requests.register(subscription):
            return
        bounds = bounds_of(peer.role, self._engine, self._settings)
        key = _key(live, bounds, subscription if self._plugins.is_personal else None)
        query = self._queries.get(key)
        if query is None:
            taking_part = self._plugins.taken_part_in(seen)
            query = self._queries[key] = _Query(live.sql, live.options, bounds, taking_part)
        query.subscriptions.add(subscription)
        self._counts[peer] = self._counts.get(peer, 0) + 1
        subscription.on_answered = lambda: self._leave(key, query, subscription)
        if query.job is None:
            if query.body is not None and self._is_current(query):
                self._deliver(query, subscription)
            else:
                self._run(key, query)

    def _refusal(self, peer: Peer) -> ServerError | None:
        if self._counts.get(peer, 0) >= self._settings.max_live_per_connection:
            return Busy(
                f"This connection has {self._counts[peer]} live queries, which is the limit "
                "(--max-live-per-connection); end one with cancel."
            )
        total = sum(self._counts.values())
        if total >= self._settings.max_live:
            return Busy(f"The server has {total} live queries, which is the limit (--max-live).")
        return None

    def _leave(self, key: _Key, query: _Query, subscription: Subscription) -> None:
        query.subscriptions.discard(subscription)
        peer = subscription.peer
        self._counts[peer] -= 1
        if not self._counts[peer]:
            del self._counts[peer]
        if not query.subscriptions:
            self._forget(key, query)
            if query.job is not None:
                query.job.stop(Cancelled("Nobody listens any more."))

    def _forget(self, key: _Key, query: _Query) -> None:
        query.has_ended = True
        self._drop_body(query)
        if self._queries.get(key) is query:
            del self._queries[key]

    def _listen(self, _: Recorded) -> None:
        """From any thread, for each change. A look at all queries serves many changes."""
        if self._queries and not self._looks:
            self._looks = True
            self._requests.post(self._look)

    def _look(self) -> None:
        self._looks = False
        for key, query in list(self._queries.items()):
            if query.job is None and not self._is_current(query):
                self._run(key, query)

    def _is_current(self, query: _Query) -> bool:
        return query.tokens is not None and all(map(self._engine.versions.holds, query.tokens))

    def _run(self, key: _Key, query: _Query) -> None:
        result = _Result()

        def done(error: BaseException | None) -> None:
            self._requests.post(self._ran, key, query, result, error)

        try:
            query.job = self._scheduler.submit(
                self._lane, self._work(query, result), query.interrupt, done, even_if_full=True
            )
        except ServerError as error:
            self._end(key, query, error)
            return
        query.deadline = self._limit(query, query.job)

    def _limit(self, query: _Query, job: Job) -> Timer | None:
        limit = deadline(query.options, query.bounds)
        if limit is None:
            return None
        seconds, name = limit
        error = out_of_time(seconds, name)

        def expire() -> None:
            job.stop(error)

        return self._timers.after(seconds, expire)

    def _work(self, query: _Query, result: _Result) -> Work:
        with ExitStack() as stack:
            cursor = stack.enter_context(self._engine.cursor(query.bounds.policy))
            query.cursor = cursor
            if query.seen is None:
                result.tokens.append(self._depends_on(cursor, query.sql))
                found = cursor.run(query.sql, query.options.params)
            else:
                value = self._intercepted(query.seen, cursor, result)
                found = stack.enter_context(self._plugins.opened(query, value))
            if found is None:
                raise BadRequest("A live query must return a result.")
            limit = bound_rows(found, query.options, query.bounds)
            chunks, size = [], 0
            first = found.first_batch()
            for chunk in arrow_chunks(found, first, b"", query.options.compression):
                chunks.append(bytes(chunk))
                size += len(chunk)
                if size > _MAX_RESULT_BYTES:
                    raise TooLarge(
                        f"The result of a live query has at most {_MAX_RESULT_BYTES} bytes; add a "
                        "LIMIT, or maxRows."
                    )
                yield Pause.TURN
            result.body = b"".join(chunks)
            result.header = truncation(found, limit)

    def _intercepted(self, seen: SeenQuery, cursor: Cursor, result: _Result) -> Any:
        """What plugins make of a query, and what each text depends on that they run."""
        versions = self._engine.versions
        # Of one that runs nothing: it is asked again when anything is defined anew.
        result.tokens.append(versions.token(versions.epoch, ()))

        def run(asked: SeenQuery) -> Result | None:
            with cursor.explained():
                result.tokens.append(self._depends_on(cursor, asked.sql))
                return cursor.run(asked.sql, asked.params)

        self._plugins.prepare(cursor, seen)
        return self._plugins.ask_with(run, seen)

    def _depends_on(self, cursor: Cursor, sql: str) -> Token:
        """What tells whether the result of ``sql`` on ``cursor`` has changed.

        Taken before it runs. Raises ``BadRequest`` when nobody can tell.
        """
        engine = self._engine
        statements = cursor.examine(sql)
        if statements.kinds is None:
            # Raises what DuckDB says about a text that it cannot parse.
            cursor.native.extract_statements(sql)
        if not statements.is_one_select:
            raise BadRequest("A live query must be one SELECT.")
        readings = engine.readings
        find = readings.alone if cursor.is_special else readings.of
        reading = find(cursor.native, sql)
        if reading.unwatchable and self._settings.sync and wanted_rooms(sql, None):
            raise BadRequest("A query of rooms cannot be live; join the room instead.")
        if reading.unwatchable:
            if not statements.effects and not statements.parameters:
                cursor.bind(sql)
            raise BadRequest(f"This query cannot be live: {reading.unwatchable}.")
        return engine.versions.token(reading.epoch, reading.tables)

    def _ran(self, key: _Key, query: _Query, result: _Result, error: BaseException | None) -> None:
        query.job = query.cursor = None
        if query.deadline is not None:
            query.deadline.cancel()
        if query.has_ended:
            return
        if error is None and self._waiting_bytes + len(result.body) > _MAX_WAITING_BYTES:
            error = Busy(
                f"The results of live queries that wait for slow readers hold {_MAX_WAITING_BYTES} "
                "bytes; try again later."
            )
        if error is not None:
            self._end(key, query, as_server_error(error))
            return
        query.tokens = result.tokens
        digest = hashlib.blake2b(result.body + json.dumps(result.header).encode()).digest()
        if digest != query.digest:
            query.digest = digest
            query.state += 1
        self._drop_body(query)
        query.body, query.header = result.body, result.header
        self._waiting_bytes += len(result.body)
        for subscription in list(query.subscriptions):
            self._deliver(query, subscription)
        self._drop_if_delivered(query)
        if not query.has_ended and not self._is_current(query):
            self._run(key, query)

    def _end(self, key: _Key, query: _Query, error: ServerError) -> None:
        subscriptions = list(query.subscriptions)
        self._forget(key, query)
        for subscription in subscriptions:
            subscription.fail(error)

    def _deliver(self, query: _Query, subscription: Subscription) -> None:
        """Send the latest result, unless ``subscription`` has it or is being sent one."""
        if subscription.state != query.state and not subscription.is_sending:
            subscription.is_sending = True
            sending = _Sending(query, subscription, lambda: self._delivered(query, subscription))
            subscription.peer.stream(sending, is_text=False)

    def _delivered(self, query: _Query, subscription: Subscription) -> None:
        subscription.is_sending = False
        self._deliver(query, subscription)
        self._drop_if_delivered(query)

    def _drop_if_delivered(self, query: _Query) -> None:
        is_large = query.body is not None and len(query.body) > _KEPT_BYTES
        if is_large and all(one.state == query.state for one in query.subscriptions):
            self._drop_body(query)

    def _drop_body(self, query: _Query) -> None:
        if query.body is not None:
            self._waiting_bytes -= len(query.body)
            query.body = None


class _Sending:
    """The result that is the latest when its turn comes; a :class:`transport.Source`."""

    def __init__(
        self, query: _Query, subscription: Subscription, on_sent: Callable[[], None]
    ) -> None:
        self._query = query
        self._subscription = subscription
        self._on_sent = on_sent
        self._rest: memoryview | None = None

    def pull(self) -> tuple[Chunk, bool] | Pull:
        if self._rest is None:
            query, subscription = self._query, self._subscription
            if subscription.answered or query.body is None:
                subscription.is_sending = False
                return Pull.WITHDRAWN
            subscription.state = query.state
            head = arrow_prefix(subscription.query_id, seq=subscription.seq, **query.header)
            subscription.seq += 1
            self._rest = memoryview(query.body)
            if len(head) + len(query.body) > FRAGMENT_BYTES:
                return head, False
            self._rest = memoryview(head + query.body)
        fragment, self._rest = self._rest[:FRAGMENT_BYTES], self._rest[FRAGMENT_BYTES:]
        return fragment, not self._rest

    def sent(self) -> None:
        self._on_sent()

    def dropped(self) -> None:
        pass
