"""An Arrow IPC stream that arrives in pieces, cut anywhere.

Arrow's own reader wants a file that blocks. It is given one that holds complete messages only,
and is asked for a batch only when there is one: the lengths of messages are read here, by the
format in https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sqlrooms_server.db.columns import Column, unique_names
from sqlrooms_server.db.inflation import (
    DICTIONARY,
    FLATBUFFER_ERRORS,
    RECORD_BATCH,
    SCHEMA,
    UPLOAD,
    Inflation,
    Table,
)
from sqlrooms_server.errors import BadRequest

# What Arrow raises for a damaged stream. ValueError: names and messages that are no UTF-8.
STREAM_ERRORS = (pa.ArrowException, OSError, ValueError)

# A damaged stream may point anywhere. Of values that are not aligned, Arrow warns in the log for
# each batch. Older versions can do nothing about them.
READ_OPTIONS = (
    pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.DataTypeSpecific)
    if hasattr(pa.ipc, "Alignment")
    else pa.ipc.IpcReadOptions()
)

_CONTINUATION = 0xFFFFFFFF
_MAX_METADATA = 64 << 20

# A client that pads its headers spares the server a copy: the body begins where Arrow wants it.
_ALIGNMENT = 8
_COPIED_BYTES = 4096

# Smaller pieces are joined: each costs a hundred bytes besides its own.
_JOINED_BYTES = 16 << 10

_UNREADABLE = "the metadata of a message cannot be read"


class PushedStream:
    """Reads batches from the pieces it is fed. Raises ``BadRequest`` for what is no stream.

    Every batch is validated: DuckDB trusts offsets, and a bad one ends the process. A message may
    have ``max_message`` bytes. Errors call the stream ``name``.
    """

    def __init__(self, max_message: int, name: str = UPLOAD) -> None:
        self.schema: pa.Schema | None = None
        self._name = name
        self._max_message = max_message
        self._pieces: deque[memoryview] = deque()
        self._available = 0
        # Of the message under way: its size, once its metadata is here, and its type.
        self._size: int | None = None
        self._type = 0
        self._metadata = b""
        self._body_starts = 0
        self._inflation = Inflation(max_message, name)
        self._ended = False
        self._complete = _CompleteMessages()
        self._reader: Any = None

    @property
    def pending(self) -> int:
        """The bytes of the message under way that are here already."""
        return self._available

    def feed(self, data: memoryview) -> list[pa.RecordBatch]:
        """The batches that ``data`` completes."""
        self._available += len(data)
        if self._pieces and len(self._pieces[-1]) + len(data) < _JOINED_BYTES:
            data = memoryview(self._pieces.pop().tobytes() + data.tobytes())
        self._pieces.append(data)
        batches = []
        while self._message_is_complete():
            assert self._size is not None
            if self._size == 0:
                self._ended = True
                continue
            message = self._take(self._size)
            if self._type != SCHEMA:
                self._check(message)
            self._complete.add(message)
            self._size = None
            if self._type == SCHEMA:
                self._open()
            elif self._type == RECORD_BATCH:
                batches.append(self._next_batch())
        return batches

    def finish(self) -> None:
        """There is no more data."""
        if self.schema is None:
            raise BadRequest(f"{_capital(self._name)} ends before its schema does.")
        if self._available and not self._ended:
            raise BadRequest(f"{_capital(self._name)} ends in the middle of a message.")

    def _message_is_complete(self) -> bool:
        if self._ended:
            if self._available:
                raise BadRequest(f"{_capital(self._name)} goes on after the end of its stream.")
            return False
        if self._size is None:
            self._read_size()
        return self._size is not None and self._available >= self._size

    def _read_size(self) -> None:
        """Set the size and type of the message under way, when enough of it is here."""
        if self._available < 4:
            return
        # Streams from before Arrow 0.15 have no continuation mark.
        start = 4
        (length,) = struct.unpack("<I", self._peek(4))
        if length == _CONTINUATION:
            if self._available < 8:
                return
            start = 8
            (length,) = struct.unpack("<4xI", self._peek(8))
        if length == 0:
            self._take(start)
            self._size = 0
            return
        if length > _MAX_METADATA:
            raise broken(f"the metadata of a message has {length} bytes", self._name)
        if self._available < start + length:
            return
        metadata = self._peek(start + length)[start:]
        try:
            message = Table.root(metadata)
            self._type, body = message.number(1, "<B"), message.number(3, "<q")
        except FLATBUFFER_ERRORS as error:
            raise broken(_UNREADABLE, self._name) from error
        if self._type not in (SCHEMA, DICTIONARY, RECORD_BATCH):
            raise broken(f"it holds a message of type {self._type}", self._name)
        if (self._type == SCHEMA) != (self.schema is None):
            raise broken("it must begin with a schema, and have one", self._name)
        if not 0 <= body <= self._max_message:
            raise BadRequest(
                f"A message in {self._name} has {body} bytes; at most "
                f"{self._max_message} are allowed (--max-message-size). Send smaller batches."
            )
        self._size = start + length + body
        self._metadata, self._body_starts = metadata, start + length

    def _peek(self, size: int) -> bytes:
        parts = []
        for piece in self._pieces:
            parts.append(piece[:size])
            size -= len(parts[-1])
            if not size:
                break
        return b"".join(parts)

    def _take(self, size: int) -> list[memoryview]:
        self._available -= size
        taken = []
        while size:
            piece = self._pieces.popleft()
            taken.append(piece[:size])
            if len(piece) > size:
                self._pieces.appendleft(piece[size:])
            size -= len(taken[-1])
        return taken

    def _open(self) -> None:
        try:
            source = pa.PythonFile(self._complete, "r")
            self._reader = pa.ipc.open_stream(source, options=READ_OPTIONS)
            self.schema = numbered(self._reader.schema)
        except STREAM_ERRORS as error:
            raise broken(error, self._name) from error

    def _next_batch(self) -> pa.RecordBatch:
        try:
            batch = self._reader.read_next_batch()
            batch.validate(full=True)
        except (*STREAM_ERRORS, StopIteration) as error:
            raise broken(error, self._name) from error
        return pa.RecordBatch.from_arrays(batch.columns, schema=self.schema)

    def _check(self, message: list[memoryview]) -> None:
        try:
            _check(self._inflation, self._metadata, message, self._body_starts)
        except FLATBUFFER_ERRORS as error:
            raise broken(_UNREADABLE, self._name) from error


class _CompleteMessages:
    """A file for Arrow's reader that holds what it will read next, and nothing less."""

    closed = False

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()

    def add(self, pieces: list[memoryview]) -> None:
        self._pieces.extend(pieces)

    def read(self, size: int) -> bytes | memoryview:
        if self._pieces and len(self._pieces[0]) >= size > _COPIED_BYTES:
            piece = self._pieces.popleft()
            if len(piece) > size:
                self._pieces.appendleft(piece[size:])
            # Arrow data must be aligned, and pieces begin anywhere.
            is_aligned = pa.py_buffer(piece).address % _ALIGNMENT == 0
            return piece[:size] if is_aligned else bytes(piece[:size])
        parts = []
        while size and self._pieces:
            piece = self._pieces.popleft()
            parts.append(piece[:size])
            if len(piece) > size:
                self._pieces.appendleft(piece[size:])
            size -= len(parts[-1])
        return b"".join(parts)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def numbered(schema: pa.Schema) -> pa.Schema:
    """``schema`` with columns of one name numbered, as a table needs it.

    Raises ``BadRequest`` when there are no columns.
    """
    if not schema.names:
        raise BadRequest("The Arrow IPC stream has no columns; a table needs at least one.")
    names = unique_names(tuple(Column(name, None) for name in schema.names))
    return pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])


def check_stream(body: pa.Buffer, max_message: int) -> None:
    """Raise ``BadRequest`` for a whole stream of which a message would become too large."""
    inflation = Inflation(max_message)
    try:
        for message in pa.ipc.MessageReader.open_stream(body):
            if message.body is not None:
                metadata = message.metadata.to_pybytes()
                _check(inflation, metadata, [memoryview(message.body)])
    except FLATBUFFER_ERRORS as error:
        raise broken(_UNREADABLE) from error
    except STREAM_ERRORS as error:
        raise broken(error) from error


def _check(
    inflation: Inflation, metadata: bytes, pieces: Sequence[memoryview], start: int = 0
) -> None:
    """Check a message, whose body begins at ``start`` of its ``pieces``."""
    inflation.check(metadata, lambda offset: _part(pieces, start + offset, 8))


def _part(pieces: Sequence[memoryview], start: int, size: int) -> bytes:
    """At most ``size`` bytes of what ``pieces`` are together."""
    parts = []
    for piece in pieces:
        if size and 0 <= start < len(piece):
            parts.append(piece[start : start + size])
            size -= len(parts[-1])
            start = 0
        else:
            start -= len(piece) if start else 0
    return b"".join(parts)


def broken(reason: object, name: str = UPLOAD) -> BadRequest:
    """The error for a stream, called ``name``, that cannot be read."""
    return BadRequest(f"{_capital(name)} is not a valid Arrow IPC stream: {reason}")


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
