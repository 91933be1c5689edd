"""``crdt-join`` and the other messages of rooms."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from sqlrooms_server.errors import BadRequest, QueryId
from sqlrooms_server.messages import RoomJoin, RoomLeave, RoomPresence, RoomSnapshot, RoomUpdate
from sqlrooms_server.protocol.fields import MAX_QUERY_ID_LENGTH, decode_json

MAX_ROOM_NAME_LENGTH = 255

# An encoded version vector has some ten bytes for each client that ever changed the document.
MAX_VERSION_LENGTH = 4 << 20

# A bare Loro update begins with this, which no framed header length can equal.
LORO_MAGIC = b"loro"

# What JSON.stringify makes of a snapshot. A large one is not worth decoding here.
_SNAPSHOT_HEAD = re.compile(
    rb'\s*\{\s*"type"\s*:\s*"crdt-snapshot"\s*,\s*"roomId"\s*:\s*("(?:[^"\\]|\\.){1,2000}")'
    rb'\s*,\s*"data"\s*:\s*"'
)
_SNAPSHOT_TAIL = re.compile(rb'"\s*\}\s*\Z')
_TAIL_BYTES = 16


def decode_join(fields: dict[str, Any]) -> RoomJoin:
    room = _room(fields)
    version = fields.get("version")
    if version is None:
        return RoomJoin(room, None)
    if isinstance(version, str) and len(version) <= MAX_VERSION_LENGTH:
        try:
            return RoomJoin(room, base64.b64decode(version, validate=True))
        except (binascii.Error, ValueError):
            pass
    raise _refused(room, "version must be the base64 of an encoded version vector.")


def decode_leave(fields: dict[str, Any]) -> RoomLeave:
    return RoomLeave(_room(fields))


def decode_snapshot(fields: dict[str, Any]) -> RoomSnapshot:
    room = _room(fields)
    return RoomSnapshot(room, _data(fields, room).encode())


def decode_room_presence(fields: dict[str, Any]) -> RoomPresence:
    room = _room(fields)
    return RoomPresence(room, _data(fields, room))


def large_snapshot(data: bytes) -> RoomSnapshot | None:
    """The snapshot in a large text message, found without decoding it; None when it is none, or
    written otherwise.
    """
    head = _SNAPSHOT_HEAD.match(data)
    tail = _SNAPSHOT_TAIL.search(data, max(0, len(data) - _TAIL_BYTES))
    if head is None or tail is None:
        return None
    start, end = head.end(), tail.start()
    # More fields, or slashes with a backslash before them, as some encoders write them.
    if data.find(b'"', start, end) >= 0 or data.find(b"\\", start, end) >= 0:
        return None
    room = room_name(decode_json(head[1], "roomId"))
    return RoomSnapshot(room, memoryview(data)[start:end])


def decode_room_update(fields: dict[str, Any], body: memoryview) -> RoomUpdate:
    room = _room(fields)
    return RoomUpdate(room, _update_id(fields, room), body)


def room_name(value: object) -> str:
    """``value`` as the name of a room. Raises ``BadRequest``."""
    if isinstance(value, str):
        try:
            if 0 < len(value.encode()) <= MAX_ROOM_NAME_LENGTH:
                return value
        except UnicodeEncodeError:
            pass
    raise BadRequest(f"roomId must be a string of 1 to {MAX_ROOM_NAME_LENGTH} bytes.")


def _room(fields: dict[str, Any]) -> str:
    return room_name(fields.get("roomId"))


def _data(fields: dict[str, Any], room: str) -> str:
    data = fields.get("data")
    if isinstance(data, str) and data.isascii():
        return data
    raise _refused(room, f"{fields['type']} needs a field data, base64.")


def _update_id(fields: dict[str, Any], room: str) -> QueryId | None:
    value = fields.get("id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and len(value.encode("utf-8", "replace")) <= MAX_QUERY_ID_LENGTH:
        return value
    raise _refused(
        room, f"id must be a string of at most {MAX_QUERY_ID_LENGTH} bytes or a whole number."
    )


def _refused(room: str, text: str) -> BadRequest:
    error = BadRequest(text)
    error.room = room
    return error
