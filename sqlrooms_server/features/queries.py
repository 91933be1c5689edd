"""``arrow``, ``json`` and ``exec``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from typing import IO, Any

from sqlrooms_server.access.roles import ADMIN, Role
from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.policy import UNRESTRICTED
from sqlrooms_server.db.results import BROKEN_ARROW, Chunk, arrow_chunks, json_chunks
from sqlrooms_server.db.room_macros import provide, wanted_rooms
from sqlrooms_server.errors import ServerError, TooLarge
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.cached import CachedQueries
from sqlrooms_server.features.chunked import ChunkedRequest
from sqlrooms_server.features.interception import Interception
from sqlrooms_server.features.limits import Bounds, bound_rows, bounds_of, deadline, truncation
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.features.resumable import ResumableRequest
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.features.room_queries import RoomReader
from sqlrooms_server.features.sessions import Sessions
from sqlrooms_server.jobs import Pause, Work
from sqlrooms_server.messages import Query
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Query as SeenQuery
from sqlrooms_server.protocol import arrow_prefix, encode_ok, json_prefix, json_suffix
from sqlrooms_server.settings import Settings

# A result whose header must wait for its end is kept in memory up to the first size, and on disk
# up to the second.
_SPOOL_BYTES = 8 << 20
_MAX_SPOOL_BYTES = 1 << 30
_SPOOL_CHUNK_BYTES = 512 << 10


class Queries(Feature):
    """Runs SQL and sends what comes of it."""

    def __init__(
        self,
        engine: Engine,
        requests: Requests,
        sessions: Sessions,
        cached: CachedQueries,
        settings: Settings,
        plugins: Interception,
        rooms: RoomReader | None = None,
        resuming: Resuming | None = None,
    ) -> None:
        self._engine = engine
        self._resuming = resuming
        self._rooms = rooms
        self._cached = cached
        self._requests = requests
        self._sessions = sessions
        self._settings = settings
        self._plugins = plugins
        # Most clients have one role.
        self._last_bounds = ADMIN, bounds_of(ADMIN, engine, settings)

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Query: self._submit}

    def _submit(self, peer: Peer, query: Query) -> None:
        persist = query.options.persist and query.options.session is None
        # Those of now: whoever is disconnected has no role any more, but may have begun what
        # others wait for.
        bounds = self._bounds_of(peer.role)
        if query.is_trusted:
            bounds = dataclasses.replace(bounds, policy=self._engine.bounded(UNRESTRICTED))
        seen = self._plugins.seen(peer, query) if self._plugins.is_wanted else None
        if persist and self._cached.answer(peer, query, bounds, seen):
            return
        request = self._request(peer, query)
        if seen is not None:
            self._plugins.follow(request, seen)
            seen = self._plugins.taken_part_in(seen)
        if query.options.session is not None:
            name = query.options.session
            submitted = self._submit_in_session(request, query, name, bounds, seen)
        else:
            work = self._work(
                request, query, bounds, lambda: self._engine.cursor(bounds.policy), seen
            )
            if persist:
                work = self._cached.work(request, query, bounds, work, seen)
            submitted = self._requests.submit(request, work)
        if not submitted:
            return
        limit = deadline(query.options, bounds)
        if limit is not None:
            request.limit(*limit)
        if query.options.progress:
            request.tell_progress()

    def _bounds_of(self, role: Role) -> Bounds:
        known, bounds = self._last_bounds
        if role is not known:
            bounds = bounds_of(role, self._engine, self._settings)
            self._last_bounds = role, bounds
        return bounds

    def _request(self, peer: Peer, query: Query) -> Request:
        size = query.options.size or len(query.sql)
        if query.options.stream:
            options: dict[str, Any] = {
                "size": size,
                "window": query.options.window,
                "idle_timeout": self._settings.stream_idle_timeout,
            }
            if query.options.resumable and self._resuming is not None:
                return ResumableRequest(
                    self._requests, self._resuming, peer, query.query_id, **options
                )
            return ChunkedRequest(self._requests, peer, query.query_id, **options)
        broken_end = BROKEN_ARROW if "arrow" in query.formats else b""
        return Request(self._requests, peer, query.query_id, size=size, broken_end=broken_end)

    def _submit_in_session(
        self,
        request: Request,
        query: Query,
        name: str,
        bounds: Bounds,
        seen: SeenQuery | None,
    ) -> bool:
        peer = request.peer
        try:
            session = self._sessions.use(peer, name)
        except ServerError as error:
            request.refuse(error)
            return False
        request.on_answered = lambda: self._sessions.used(peer, name, session)
        work = self._work(request, query, bounds, lambda: session.cursor(bounds.policy), seen)
        return self._requests.submit(request, work, session.lane)

    def _work(
        self,
        request: Request,
        query: Query,
        bounds: Bounds,
        open_cursor: Callable[[], Cursor],
        seen: SeenQuery | None,
    ) -> Work:
        wanted = None
        if self._rooms is not None:
            wanted = wanted_rooms(query.sql, query.options.params)
            if wanted is not None:
                # Before the cursor: while the job waits it holds nothing.
                tables = yield from self._rooms.read(request, wanted)
        with open_cursor() as cursor:
            request.cursor = cursor
            if seen is not None:
                self._plugins.prepare(cursor, seen)
            if wanted is not None:
                is_fresh = query.options.session is None
                provide(
                    cursor.native,
                    wanted.functions,
                    tables,
                    is_fresh=is_fresh,
                    copied=cursor.is_restricted,
                )
            if query.options.progress:
                cursor.show_progress()
            if seen is None:
                result = cursor.run(query.sql, query.options.params, query.formats)
            else:
                result = self._plugins.ask(cursor, seen, query.formats)
                if result is not None and not isinstance(result, Result):
                    with self._plugins.opened(request, result, query.formats) as result:
                        yield from self._answer(request, query, result, bounds)
                    return
            yield from self._answer(request, query, result, bounds)

    def _answer(
        self, request: Request, query: Query, result: Result | None, bounds: Bounds
    ) -> Work:
        if result is None:
            request.reply(encode_ok(query.query_id))
            return
        if query.kind == "exec":
            for _ in result.batches:
                # A change is made by now; a cancel must not hide that.
                if not result.statements.end_in_change:
                    yield Pause.TURN
            request.reply(encode_ok(query.query_id))
            return
        counts = self._plugins.counts
        limit = bound_rows(result, query.options, bounds, count=counts)
        first = result.first_batch()
        if first is None and result.tells_nothing and not result.truncated:
            request.reply(encode_ok(query.query_id))
            return
        chunks = yield from self._chunks(request, query, result, first, limit)
        chunk = next(chunks)
        for following in chunks:
            yield Pause.FULL if request.put(chunk) else Pause.TURN
            chunk = following
        if counts:
            request.rows = result.rows
        # No pause after the last one: a reply that is complete can no longer fail.
        request.put(chunk)
        if isinstance(request, ChunkedRequest):
            request.summary = {"rows": result.rows, **truncation(result, limit)}

    def _chunks(
        self,
        request: Request,
        query: Query,
        result: Result,
        first: Any,
        limit: str,
    ) -> Generator[Pause, None, Iterator[Chunk]]:
        """The reply in the first format that can carry the result."""
        query_id = query.query_id
        if result.goes_as_json(query.formats):
            return json_chunks(
                result,
                first,
                json_prefix(query_id),
                lambda: json_suffix(**truncation(result, limit)),
            )
        request.is_text = False
        if isinstance(request, ChunkedRequest):
            return arrow_chunks(result, first, b"", query.options.compression)
        if query.options.max_rows is None:
            return arrow_chunks(result, first, arrow_prefix(query_id), query.options.compression)
        # Whether it was truncated stands before the rows and is known after them.
        with ExitStack() as stack:
            spool = stack.enter_context(tempfile.SpooledTemporaryFile(_SPOOL_BYTES))
            for chunk in arrow_chunks(result, first, b"", query.options.compression):
                spool.write(chunk)
                if spool.tell() > _MAX_SPOOL_BYTES:
                    raise TooLarge(
                        f"With maxRows, one message holds at most {_MAX_SPOOL_BYTES} bytes; ask "
                        "for chunks (stream)."
                    )
                yield Pause.TURN
            stack.pop_all()
        prefix = arrow_prefix(query_id, **truncation(result, limit))
        return _spooled(prefix, spool)


def _spooled(prefix: bytes, spool: IO[bytes]) -> Iterator[Chunk]:
    """``prefix`` and what ``spool`` holds. Closes it."""
    with spool:
        spool.seek(0)
        yield prefix + spool.read(_SPOOL_CHUNK_BYTES)
        while chunk := spool.read(_SPOOL_CHUNK_BYTES):
            yield chunk
