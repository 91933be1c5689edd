"""How large the messages of an Arrow IPC stream become when they are decompressed.

A few kilobytes can say that they are a hundred gigabytes, and be that. Each compressed buffer tells
its size before its data, and Arrow makes room for exactly so much; so the sizes are added up before
Arrow sees the message. The format: https://arrow.apache.org/docs/format/Columnar.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from sqlrooms_server.errors import BadRequest

# Types of messages in the metadata.
SCHEMA, DICTIONARY, RECORD_BATCH = 1, 2, 3

# What Arrow 0.17 wrote instead of the field, and later ones still read.
_EXPERIMENTAL = b"ARROW:experimental_compression"

_NOT_COMPRESSED = -1

# Real data shrinks to a half or a quarter, so that messages of the largest size still pass.
_MOST_TIMES = 4

FLATBUFFER_ERRORS = (struct.error, IndexError)

# What errors call a stream that is uploaded.
UPLOAD = "the body of uploadArrow"


class Table:
    """A table in a flatbuffer, its fields by number. Raises ``FLATBUFFER_ERRORS`` for what is none.

    The number of a field is its place in the schema of the format.
    """

    def __init__(self, buffer: bytes, position: int) -> None:
        self._buffer = buffer
        self._position = position
        (to_vtable,) = struct.unpack_from("<i", buffer, position)
        self._vtable = position - to_vtable
        if self._vtable < 0:
            raise IndexError("vtable before the buffer")
        (self._vtable_size,) = struct.unpack_from("<H", buffer, self._vtable)

    @staticmethod
    def root(buffer: bytes) -> Table:
        return Table(buffer, struct.unpack_from("<I", buffer, 0)[0])

    def number(self, field: int, format: str) -> int:
        """A number, by the ``format`` of ``struct``; 0 when the field is not there."""
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from(format, self._buffer, place)[0])

    def table(self, field: int) -> Table | None:
        target = self._target(field)
        return None if target is None else Table(self._buffer, target)

    def structs(self, field: int, format: str) -> list[tuple[int, ...]]:
        """The structs of a vector, each unpacked by ``format``."""
        target = self._target(field)
        if target is None:
            return []
        (count,) = struct.unpack_from("<I", self._buffer, target)
        size = count * struct.calcsize(format)
        return list(struct.iter_unpack(format, self._buffer[target + 4 :][:size]))

    def _target(self, field: int) -> int | None:
        place = self._place(field)
        if place is None:
            return None
        return place + int(struct.unpack_from("<I", self._buffer, place)[0])

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._vtable_size:
            return None
        (offset,) = struct.unpack_from("<H", self._buffer, self._vtable + entry)
        return self._position + offset if offset else None


class Inflation:
    """Of one stream, whose messages have at most ``max_message`` bytes as they are sent.

    A batch, and all dictionaries together, may become four times as large. Errors call it ``name``.
    """

    def __init__(self, max_message: int, name: str = UPLOAD) -> None:
        self._name = name
        self._limit = _MOST_TIMES * max_message
        self._dictionaries: dict[int, int] = {}

    def check(self, metadata: bytes, read: Callable[[int], bytes]) -> None:
        """Raise ``BadRequest`` when a message would become too large.

        ``read`` gives the eight bytes at an offset of its body.
        """
        if _EXPERIMENTAL in metadata:
            raise BadRequest(
                f"A message in {self._name} is compressed as by Arrow 0.17; use a later one."
            )
        message = Table.root(metadata)
        kind, header = message.number(1, "<B"), message.table(2)
        if header is None:
            return
        if kind == RECORD_BATCH:
            self._refuse_above(_inflated(header, read))
        elif kind == DICTIONARY:
            batch = header.table(1)
            if batch is not None:
                identity, is_delta = header.number(0, "<q"), header.number(2, "<B")
                before = self._dictionaries.get(identity, 0) if is_delta else 0
                self._dictionaries[identity] = before + _inflated(batch, read)
                self._refuse_above(sum(self._dictionaries.values()))

    def _refuse_above(self, size: int) -> None:
        if size > self._limit:
            raise BadRequest(
                f"A batch in {self._name} has {size} bytes when it is decompressed; at "
                f"most {self._limit} are allowed ({_MOST_TIMES} times --max-message-size). "
                "Send smaller batches."
            )


def _inflated(batch: Table, read: Callable[[int], bytes]) -> int:
    buffers = batch.structs(2, "<qq")
    if batch.table(3) is None:
        return sum(length for _, length in buffers)
    total = 0
    for offset, length in buffers:
        if length:
            (size,) = struct.unpack("<q", read(offset))
            total += length if size == _NOT_COMPRESSED else size
    return total
