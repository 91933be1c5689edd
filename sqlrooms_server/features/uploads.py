"""``uploadArrow``: an Arrow IPC stream, in one message or in many, becomes a table."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.ipc import PushedStream
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.uploads import TableWriter, write_table
from sqlrooms_server.errors import (
    BadRequest,
    Busy,
    Conflict,
    QueryId,
    ServerError,
    Timeout,
    TooLarge,
)
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.jobs import Lane, Pause, Work
from sqlrooms_server.messages import TableName, Upload, UploadChunk, UploadMode
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode
from sqlrooms_server.settings import UPLOAD_WINDOW_BYTES, Settings
from sqlrooms_server.timers import Timer

# A worker inserts on while the next chunk comes within this time, which is twice as fast as many
# small inserts; then it lets the client keep others waiting no longer.
_PATIENCE_SECONDS = 0.02

# After this time a statement that inserts ends when others wait.
_TURN_SECONDS = 0.5

# Chunked uploads of one connection at one time; each may hold its window and a message.
MAX_UPLOADS = 8

# Uploads that failed before their last chunk came, remembered for each connection.
_MAX_ENDED = 1024


class ChunkedUpload(Request):
    """An upload under way. Chunks come from the loop thread, and go to the worker."""

    def __init__(
        self, requests: Requests, peer: Peer, first: UploadChunk, *, idle_timeout: float
    ) -> None:
        super().__init__(requests, peer, first.query_id)
        self.goes_on = not first.last
        self._has_last = False
        self._next_seq = 0
        self._idle_timeout = idle_timeout
        self._idle: Timer | None = None
        self._arrived = threading.Condition()
        self._chunks: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._consumed_bytes = 0

    def add(self, chunk: UploadChunk) -> None:
        """The next chunk arrived. One that must not come ends the upload."""
        self.goes_on = not chunk.last
        error = self._refusal(chunk)
        if error is not None:
            self.stop(error)
            return
        self._next_seq += 1
        with self._arrived:
            self._chunks.append(chunk.body)
            self._waiting_bytes += len(chunk.body)
            self._has_last = chunk.last
            self._arrived.notify()
        self._restart_idle_timer()
        if self.job is not None:
            self.job.resume()

    def take(self, patience: float) -> tuple[list[memoryview], bool]:
        """For the worker: what has come since the last call, and whether that is all.

        Waits up to ``patience`` seconds for something to come.
        """
        with self._arrived:
            if patience and not self._chunks and not self._has_last:
                self._arrived.wait(patience)
            chunks = list(self._chunks)
            self._chunks.clear()
            self._consumed_bytes += self._waiting_bytes
            self._waiting_bytes = 0
            consumed, last = self._consumed_bytes, self._has_last
        if chunks:
            self._requests.post(self._tell_consumed, consumed)
        return chunks, last

    @property
    def others_wait(self) -> bool:
        """Whether another job could run if this one paused."""
        return self.job is not None and self.job.others_wait

    def _refusal(self, chunk: UploadChunk) -> ServerError | None:
        if self._has_last:
            return BadRequest("A chunk of uploadArrow came after the last one.")
        if chunk.seq != self._next_seq:
            return BadRequest(f"The chunk with seq {self._next_seq} was expected, not {chunk.seq}.")
        if self._waiting_bytes and self._waiting_bytes + len(chunk.body) > UPLOAD_WINDOW_BYTES:
            return TooLarge(
                f"Over {UPLOAD_WINDOW_BYTES} bytes of the upload wait (limits.uploadWindow); wait "
                "for uploadProgress before sending more."
            )
        return None

    def _tell_consumed(self, size: int) -> None:
        if not self.answered:
            message = {"type": "uploadProgress", "queryId": self.query_id, "bytes": size}
            self.peer.send(encode(message))

    def _restart_idle_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = None
        if not (self._has_last or self.answered):
            seq = self._next_seq
            self._idle = self._requests.timers.after(
                self._idle_timeout, lambda: self._requests.post(self._look_whether_idle, seq)
            )

    def _look_whether_idle(self, seq: int) -> None:
        """The time is over that began when the chunk ``seq`` was awaited."""
        if self._next_seq != seq:
            return
        if self._waiting_bytes:
            # The client waits for the server, not the other way round.
            self._restart_idle_timer()
        elif not self._has_last:
            self.stop(
                Timeout(
                    f"The upload did not go on for {self._idle_timeout:g} s "
                    "(--stream-idle-timeout)."
                )
            )

    def _answered(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._chunks.clear()
        super()._answered()


class Uploads(Feature):
    """Writes tables from what clients send."""

    def __init__(self, engine: Engine, requests: Requests, settings: Settings) -> None:
        self._engine = engine
        self._requests = requests
        self._settings = settings
        # Uploads that wait for their client must not keep its queries waiting.
        self._lanes: dict[Peer, Lane] = {}
        self._under_way: Counter[Peer] = Counter()
        self._ended: dict[Peer, dict[QueryId, None]] = {}

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {Upload: self._upload, UploadChunk: self._chunk}

    def closed(self, peer: Peer) -> None:
        self._lanes.pop(peer, None)
        self._ended.pop(peer, None)

    def refused(self, peer: Peer, chunk: UploadChunk) -> None:
        """An upload was refused before its first chunk came here; the others are to be ignored."""
        self._remember_ended(peer, chunk.query_id)

    def _upload(self, peer: Peer, upload: Upload) -> None:
        request = Request(self._requests, peer, upload.query_id, size=len(upload.body))
        policy = self._engine.bounded(peer.role.sql)
        self._requests.submit(request, self._write_whole(request, upload, policy))

    def _write_whole(self, request: Request, upload: Upload, policy: Policy) -> Work:
        with self._engine.cursor() as cursor:
            request.cursor = cursor
            self._check(policy, upload.table, upload.mode)
            write_table(
                *(self._engine, cursor, upload.table, upload.mode, upload.body),
                max_message=self._settings.max_message_size,
            )
        request.reply(encode({"type": "uploadAck", "queryId": upload.query_id}))
        return
        yield  # a job is a generator, also one that never pauses

    def _check(self, policy: Policy, table: TableName, mode: UploadMode) -> None:
        """Raise ``Forbidden`` when ``policy`` does not let ``table`` be written so."""
        if not policy.is_open:
            self._engine.reach.check_upload(table, policy, new=mode != "append")

    def _chunk(self, peer: Peer, chunk: UploadChunk) -> None:
        if chunk.table is not None:
            self._begin(peer, chunk, chunk.table)
            return
        upload = self._requests.find(peer, chunk.query_id)
        if isinstance(upload, ChunkedUpload):
            upload.add(chunk)
        elif chunk.query_id in self._ended.get(peer, {}):
            if chunk.last:
                del self._ended[peer][chunk.query_id]
        else:
            # Without the id, which may be that of another request.
            raise BadRequest(f"No upload {chunk.query_id!r} is under way; it begins with seq 0.")

    def _begin(self, peer: Peer, chunk: UploadChunk, table: TableName) -> None:
        query_id = chunk.query_id
        if self._requests.find(peer, query_id) is not None:
            if not chunk.last:
                self._remember_ended(peer, query_id)
            raise Conflict(f"queryId {query_id!r} is in use by a query in flight.", query_id)
        self._ended.get(peer, {}).pop(query_id, None)
        self._under_way[peer] += 1
        upload = ChunkedUpload(
            self._requests, peer, chunk, idle_timeout=self._settings.stream_idle_timeout
        )
        upload.on_answered = lambda: self._note_end(upload)
        if self._under_way[peer] > MAX_UPLOADS:
            upload.refuse(
                Busy(f"This connection has {MAX_UPLOADS} chunked uploads under way, the limit.")
            )
            return
        lane = self._lanes.setdefault(peer, Lane(MAX_UPLOADS))
        policy = self._engine.bounded(peer.role.sql)
        work = self._write_chunks(upload, table, chunk.mode, policy)
        if self._requests.submit(upload, work, lane):
            upload.add(chunk)

    def _note_end(self, upload: ChunkedUpload) -> None:
        """Remember an upload of which more will come, so that the rest is ignored."""
        self._under_way[upload.peer] -= 1
        if not self._under_way[upload.peer]:
            del self._under_way[upload.peer]
        if upload.goes_on and upload.peer in self._lanes:
            self._remember_ended(upload.peer, upload.query_id)

    def _remember_ended(self, peer: Peer, query_id: QueryId) -> None:
        ended = self._ended.setdefault(peer, {})
        ended[query_id] = None
        if len(ended) > _MAX_ENDED:
            del ended[next(iter(ended))]

    def _write_chunks(
        self, upload: ChunkedUpload, table: TableName, mode: UploadMode, policy: Policy
    ) -> Work:
        with self._engine.cursor() as cursor:
            upload.cursor = cursor
            self._check(policy, table, mode)
            stream = PushedStream(self._settings.max_message_size)
            arriving = _Arriving(cursor, upload, stream)
            writer = TableWriter(self._engine, cursor, table, mode)
            while True:
                batch = arriving.next(0.0)
                if arriving.schema is not None:
                    writer.begin(arriving.schema)
                if batch is not None:
                    writer.insert(arriving.from_here(batch))
                    yield Pause.TURN
                elif arriving.ended:
                    break
                else:
                    yield Pause.FULL
            writer.finish()
        upload.reply(encode({"type": "uploadAck", "queryId": upload.query_id, "rows": writer.rows}))


class _Arriving:
    """The batches of an upload, as they come. For the worker, and DuckDB's threads under it.

    ``ended`` is set when the client has nothing more to send.
    """

    def __init__(self, cursor: Cursor, upload: ChunkedUpload, stream: PushedStream) -> None:
        self.ended = False
        self._cursor = cursor
        self._upload = upload
        self._stream = stream
        self._ready: deque[Any] = deque()

    @property
    def schema(self) -> Any:
        """The Arrow schema; None as long as it has not come."""
        return self._stream.schema

    def next(self, patience: float) -> Any:
        """The next batch that has rows; None when none came in ``patience`` seconds, or ended."""
        until = time.monotonic() + patience
        while not self._ready and not self.ended:
            # DuckDB cannot be interrupted while it waits for this.
            self._cursor.check()
            chunks, self.ended = self._upload.take(max(0.0, until - time.monotonic()))
            if not chunks and not self.ended:
                return None
            for chunk in chunks:
                self._ready.extend(batch for batch in self._stream.feed(chunk) if batch.num_rows)
            if self.ended:
                self._stream.finish()
        return self._ready.popleft() if self._ready else None

    def from_here(self, batch: Any) -> Iterator[Any]:
        """``batch`` and those after it, until the client makes a pause or it is others' turn."""
        turn_ends = time.monotonic() + _TURN_SECONDS
        while batch is not None:
            yield batch
            if time.monotonic() > turn_ends and self._upload.others_wait:
                return
            batch = self.next(_PATIENCE_SECONDS)
