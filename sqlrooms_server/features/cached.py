"""``persist`` and ``cacheStats``: results that are kept while nothing they depend on changes."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack

from sqlrooms_server.cache import Entry, Key, ResultCache
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.plans import MAX_PLANNED_LENGTH, Reading
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.results import Chunk, arrow_chunks, json_chunks
from sqlrooms_server.db.versions import Token
from sqlrooms_server.errors import InternalError
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.chunked import ChunkedRequest
from sqlrooms_server.features.flights import Flight, Flights
from sqlrooms_server.features.interception import Interception
from sqlrooms_server.features.limits import Bounds, bound_rows, truncation
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.jobs import Lane, Pause, Scheduler, Work
from sqlrooms_server.messages import CacheStats, Params, Query
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Query as SeenQuery
from sqlrooms_server.protocol import arrow_prefix, encode_reply, json_prefix, json_suffix
from sqlrooms_server.settings import Settings

# Each holds its key, of up to 64 KiB.
_MAX_TOO_LARGE = 256


class CachedQueries(Feature):
    """A feature: answers queries from the cache, or runs them once for all who ask.

    ``cache`` is None when results are not kept at all.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        requests: Requests,
        settings: Settings,
        cache: ResultCache | None,
        plugins: Interception,
    ) -> None:
        self._plugins = plugins
        self._engine = engine
        self._requests = requests
        self._settings = settings
        self._cache = cache
        self._flights = Flights(scheduler)
        # Those who wait are in the lanes of their connections; what they begin has one there, too.
        self._lanes: dict[Peer, Lane] = {}
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        # What was found to be too large to keep, so that it is not collected in vain again.
        self._too_large: dict[Key, Token] = {}

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {CacheStats: self._stats}

    def closed(self, peer: Peer) -> None:
        self._lanes.pop(peer, None)

    def answer(self, peer: Peer, query: Query, bounds: Bounds, seen: SeenQuery | None) -> bool:
        """Answer ``query`` from memory, on the loop thread; False when that is not possible.

        ``seen`` is the query as plugins see it, if there are any that want to.
        """
        if self._cache is None or self._plugins.is_personal or _is_large(query):
            return False
        self._engine.versions.in_use = True
        key = _key(query, bounds)
        entry = self._cache.peek(key)
        if entry is None or entry.body is None or query.options.stream or peer.is_behind:
            return False
        # A request under the same id must be refused as ever.
        if self._requests.find(peer, query.query_id) is not None:
            return False
        if not self._engine.versions.holds(entry.token):
            self._cache.discard(key)
            return False
        self._count("hits")
        is_text, chunks = _reply(query, entry, cached=True)
        message = b"".join(chunks)
        if is_text:
            peer.send(message)
        else:
            peer.send_binary(message)
        if seen is not None:
            self._plugins.answered(seen, entry.facts["rows"], len(message))
        return True

    def work(
        self, request: Request, query: Query, bounds: Bounds, alone: Work, seen: SeenQuery | None
    ) -> Work:
        """Answer ``request`` from the cache, from a run that others wait for, or ``alone``.

        ``seen`` is the query as plugins see it that take part in it.
        """
        if self._plugins.is_personal:
            self._count("uncacheable")
            return alone
        lane = self._lanes.setdefault(request.peer, Lane())
        return self._work(request, query, bounds, lane, alone, seen)

    def _work(
        self,
        request: Request,
        query: Query,
        bounds: Bounds,
        lane: Lane,
        alone: Work,
        seen: SeenQuery | None,
    ) -> Work:
        cache, versions = self._cache, self._engine.versions
        reading = (
            None
            if cache is None or _is_large(query)
            else self._reading(request, query, bounds.policy)
        )
        entry, is_hit = None, False
        if cache is not None and reading is not None and not reading.uncacheable:
            key = _key(query, bounds)
            token = versions.token(reading.epoch, reading.tables)
            if self._too_large.get(key) != token:
                entry = cache.find(key)
                is_hit = entry is not None and versions.holds(entry.token)
                if not is_hit:
                    entry = yield from self._joined(
                        cache, key, token, request, query, bounds, lane, seen
                    )
        if entry is None:
            self._count("uncacheable")
            yield from alone
            return
        if is_hit:
            self._count("hits")
        request.rows = entry.facts["rows"]
        request.is_text, chunks = _reply(query, entry, cached=is_hit, request=request)
        for chunk in chunks:
            yield Pause.FULL if request.put(chunk) else Pause.TURN

    def _reading(self, request: Request, query: Query, policy: Policy) -> Reading | None:
        """What ``query`` reads; None when it is not one SELECT."""
        known = self._engine.readings.known(query.sql)
        if known is not None and policy.is_open:
            return known
        with self._engine.cursor(policy) as cursor:
            request.cursor = cursor
            statements = cursor.examine(query.sql)
            if not statements.is_one_select:
                return None
            return self._engine.readings.of(cursor.native, query.sql)

    def _joined(
        self,
        cache: ResultCache,
        key: Key,
        token: Token,
        request: Request,
        query: Query,
        bounds: Bounds,
        lane: Lane,
        seen: SeenQuery | None,
    ) -> Generator[Pause, None, Entry | None]:
        """Wait for the run that computes ``key``; its entry, or None when it is too large."""

        def resume() -> None:
            self._requests.post(request.resume)

        flight, is_new = self._flights.join(key, token, request, resume)
        request.shared_run = flight
        self._count("misses" if is_new else "joined")
        try:
            if is_new:

                def keep() -> None:
                    # Otherwise it is out of date already, though not for those who wait.
                    if flight.entry is not None and self._engine.versions.holds(token):
                        cache.store(key, flight.entry)

                run = self._compute(cache, flight, query, bounds, seen)
                self._flights.begin(key, flight, lane, run, keep)
            while not flight.is_over:
                yield Pause.WAIT
        finally:
            request.shared_run = None
            self._flights.leave(key, flight, request)
        if flight.failure is not None:
            # A copy: each thread that raises an exception writes to it.
            raise type(flight.failure)(str(flight.failure))
        if flight.entry is None:
            self._remember_too_large(key, token)
        return flight.entry

    def _remember_too_large(self, key: Key, token: Token) -> None:
        if len(self._too_large) >= _MAX_TOO_LARGE:
            self._too_large.clear()
        self._too_large[key] = token

    def _compute(
        self,
        cache: ResultCache,
        flight: Flight,
        query: Query,
        bounds: Bounds,
        seen: SeenQuery | None,
    ) -> Work:
        spool = cache.spool()
        try:
            with ExitStack() as stack:
                cursor = stack.enter_context(self._engine.cursor(bounds.policy))
                flight.cursor = cursor
                if seen is not None:
                    self._plugins.prepare(cursor, seen)
                if query.options.progress:
                    cursor.show_progress()
                if seen is not None:
                    value = self._plugins.ask(cursor, seen, query.formats)
                    result = stack.enter_context(self._plugins.opened(flight, value, query.formats))
                else:
                    result = cursor.run(query.sql, query.options.params, query.formats)
                if result is None:
                    raise InternalError("A plugin that is_transparent returned no result.")
                limit = bound_rows(result, query.options, bounds, count=True)
                first = result.first_batch()
                is_json = result.goes_as_json(query.formats)
                chunks: Iterator[Chunk]
                if is_json:
                    chunks = json_chunks(result, first, b"", lambda: b"")
                else:
                    chunks = arrow_chunks(result, first, b"", query.options.compression)
                for chunk in chunks:
                    spool.append(chunk)
                    yield Pause.TURN
                facts = {
                    "format": "json" if is_json else "arrow",
                    "rows": result.rows,
                    "more": truncation(result, limit),
                }
            flight.entry = spool.finish(flight.token, facts)
        finally:
            spool.close()

    def _stats(self, peer: Peer, message: CacheStats) -> None:
        counted = ("hits", "misses", "joined", "uncacheable")
        no_sizes = {"entries": 0, "memoryBytes": 0, "diskBytes": 0}
        stats = {
            "enabled": self._cache is not None,
            **{name: self._counts[name] for name in counted},
            **(no_sizes if self._cache is None else self._cache.sizes()),
        }
        peer.send(encode_reply("cacheStats", message.query_id, **stats))

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _is_large(query: Query) -> bool:
    """Whether the parameters are too much to be compared on the loop thread, or the text."""
    return max(query.options.size, len(query.sql)) > MAX_PLANNED_LENGTH


def _scope(bounds: Bounds) -> str:
    """``bounds`` as a text that equal ones share; empty for those of the server alone."""
    policy = bounds.policy
    if policy.is_open and bounds.rows_by.startswith("--"):
        return ""
    flags = policy.read_only, policy.files, policy.extensions
    return json.dumps(
        [*flags, _sorted(policy.schemas), _sorted(policy.kinds), bounds.rows_by, bounds.rows]
    )


def _sorted(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _key(query: Query, bounds: Bounds) -> Key:
    """What makes two queries the same. Chunks are cut from the same bytes as one message."""
    options = query.options
    formats = ",".join(query.formats) + _scope(bounds)
    return query.sql, _canonical(options.params), formats, options.compression, options.max_rows


def _canonical(params: Params | None) -> str | None:
    """``params`` as a text; the order of names does not matter, that of fields of a STRUCT does."""
    if params is None:
        return None
    return json.dumps(dict(sorted(params.items())) if isinstance(params, dict) else params)


def _reply(
    query: Query, entry: Entry, *, cached: bool, request: Request | None = None
) -> tuple[bool, Iterator[Chunk]]:
    """Whether the reply is a text message, and its parts."""
    more = dict(entry.facts["more"])
    if cached:
        more["cached"] = True
    if isinstance(request, ChunkedRequest):
        request.summary = {"rows": entry.facts["rows"], **more}
        return False, entry.chunks()
    if entry.facts["format"] == "json":
        return True, _around(json_prefix(query.query_id), entry, json_suffix(**more))
    return False, _around(arrow_prefix(query.query_id, **more), entry, b"")


def _around(prefix: bytes, entry: Entry, suffix: bytes) -> Iterator[Chunk]:
    if entry.body is not None:
        yield prefix + entry.body + suffix
        return
    yield prefix
    yield from entry.chunks()
    if suffix:
        yield suffix
