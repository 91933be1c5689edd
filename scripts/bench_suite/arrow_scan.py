"""Counts the rows of an Arrow IPC stream in passing, without keeping or decoding its columns."""

from __future__ import annotations

import struct

_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3

# Slots of the flatbuffer tables `Message` and `RecordBatch` in Arrow's Message.fbs and the
# types of the values they point at.
_HEADER_TYPE, _HEADER, _BODY_LENGTH = (1, "<B"), (2, "<I"), (3, "<q")
_ROWS = (0, "<q")


class BrokenStream(ValueError):
    """The bytes are not one complete Arrow IPC stream."""


class StreamScan:
    """Takes a stream cut anywhere; `rows` and `size` (bytes) grow, `complete` at its end mark."""

    def __init__(self) -> None:
        self.rows = 0
        self.size = 0
        self.complete = False
        self._held = bytearray()
        self._in_metadata = False
        self._wanted = 8
        self._skip = 0

    def feed(self, data: memoryview) -> None:
        at, end = 0, len(data)
        self.size += end
        while at < end:
            if self.complete:
                raise BrokenStream("bytes after the end of the stream")
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
                continue
            part = data[at : at + self._wanted - len(self._held)]
            self._held += part
            at += len(part)
            if len(self._held) == self._wanted:
                self._take(bytes(self._held))
                self._held.clear()

    def _take(self, held: bytes) -> None:
        if self._in_metadata:
            self._in_metadata, self._wanted = False, 8
            rows, self._skip = _summary(held)
            self.rows += rows
            return
        mark, length = struct.unpack("<II", held)
        if mark != _CONTINUATION:
            raise BrokenStream(f"a message begins with {mark:#x}")
        self._in_metadata, self._wanted = length > 0, length or 8
        self.complete = length == 0


def _summary(metadata: bytes) -> tuple[int, int]:
    """Rows of the message and length of its body in bytes."""
    try:
        message = _follow(metadata, 0)
        kind = _field(metadata, message, _HEADER_TYPE)
        body = _field(metadata, message, _BODY_LENGTH)
        if kind != _RECORD_BATCH:
            return 0, body
        slot = _place(metadata, message, _HEADER[0])
        return _field(metadata, _follow(metadata, slot), _ROWS), body
    except struct.error as error:
        raise BrokenStream(f"message metadata: {error}") from error


def _follow(metadata: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", metadata, at)[0])


def _place(metadata: bytes, table: int, slot: int) -> int:
    """Where a table keeps a field; 0 for a field that has its default value."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    if 4 + 2 * slot >= struct.unpack_from("<H", metadata, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * slot)[0]
    return table + int(offset) if offset else 0


def _field(metadata: bytes, table: int, field: tuple[int, str]) -> int:
    slot, layout = field
    place = _place(metadata, table, slot)
    return int(struct.unpack_from(layout, metadata, place)[0]) if place else 0
