"""A client of rooms with a document of its own, and what the tests ask of both."""

from __future__ import annotations

import base64
import json
import random
import struct
from typing import Any

from loro import ExportMode, LoroDoc, VersionVector

from tests.wire import DEADLINE, Wire, framed

EMPTY = LoroDoc().export(ExportMode.Snapshot())


class Client:
    """One connection and one document. ``version``: it speaks the second part of the protocol."""

    def __init__(self, wire: Wire, room: str = "r", doc: Any = None) -> None:
        self.wire = wire
        self.room = room
        self.doc = LoroDoc() if doc is None else doc
        self.replies: list[Any] = []

    def next(self) -> Any:
        """The next frame: a dictionary for text, a pair of header and body for binary."""
        message = self.wire.socket.recv(timeout=DEADLINE)
        if isinstance(message, str):
            return json.loads(message)
        if message.startswith(b"loro"):
            return {}, message
        end = 4 + int.from_bytes(message[:4], "big")
        return json.loads(message[4:end]), message[end:]

    def join(self) -> Any:
        """Join as the first protocol has it; the snapshot is imported and returned."""
        self.wire.send(type="crdt-join", roomId=self.room)
        assert self.next() == {"type": "crdt-joined", "roomId": self.room}
        reply = self.next()
        assert (reply["type"], reply["roomId"]) == ("crdt-snapshot", self.room)
        snapshot = base64.b64decode(reply["data"], validate=True)
        self.doc.import_(snapshot)
        return snapshot

    def join_with_version(self, version: str | None = None) -> Any:
        """Join with the version of the document; the answer, and the header of what followed."""
        if version is None:
            version = encoded(self.doc.oplog_vv.encode())
        self.wire.send(type="crdt-join", roomId=self.room, version=version)
        joined = self.next()
        assert (joined["type"], joined["roomId"]) == ("crdt-joined", self.room), joined
        header, body = self.next()
        if joined.get("reset"):
            self.doc = LoroDoc()
        self.doc.import_(body)
        return joined, header, body

    def change(self, key: str, value: Any) -> bytes:
        """Change the document; the update, which is not sent."""
        before = self.doc.oplog_vv
        self.doc.get_map("m").insert(key, value)
        self.doc.commit()
        return bytes(self.doc.export(ExportMode.Updates(before)))

    def send(self, update: bytes) -> None:
        self.wire.send_raw(update)

    def send_framed(self, update: bytes, **fields: Any) -> None:
        self.wire.send_raw(framed({"type": "crdt-update", "roomId": self.room, **fields}, update))

    def send_snapshot(self, snapshot: bytes | None = None) -> None:
        data = self.doc.export(ExportMode.Snapshot()) if snapshot is None else snapshot
        self.wire.send(type="crdt-snapshot", roomId=self.room, data=encoded(data))

    def ack(self) -> Any:
        """The next text frame. What others changed before it is imported."""
        while True:
            reply = self.next()
            if isinstance(reply, dict):
                return reply
            self.doc.import_(reply[1])

    def write(self, key: str, value: Any) -> None:
        """Change the room, and wait until that is stored."""
        self.send(self.change(key, value))
        assert self.ack() == {"type": "crdt-update-ack", "roomId": self.room}

    def receive(self) -> bytes:
        """Import the next update of others."""
        reply = self.next()
        assert isinstance(reply, tuple), reply
        self.doc.import_(reply[1])
        return bytes(reply[1])

    def await_value(self, key: str, value: Any) -> None:
        """Import updates until the document says so."""
        while self.values.get(key) != value:
            self.receive()

    @property
    def values(self) -> dict[str, Any]:
        """What the map of the document holds."""
        value: dict[str, Any] = self.doc.get_deep_value().get("m", {})
        return value


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def updates_of(doc: Any) -> bytes:
    """All that ever happened to ``doc``, as an update."""
    return bytes(doc.export(ExportMode.Updates(VersionVector())))


def large_document(size: int, seed: int = 0) -> Any:
    """A document whose snapshot has about ``size`` bytes, quickly made and not to be compressed.

    It holds each value twice: in the history, and in the present state.
    """
    doc = LoroDoc()
    values = doc.get_map(f"large {seed}" if seed else "large")
    part = 256 << 10
    for number in range(max(1, size // part // 2)):
        values.insert(str(number), number.to_bytes(4, "big") + _noise(part, number))
    doc.commit()
    return doc


def _noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def checksum(data: bytes) -> int:
    """xxHash32 as Loro has it."""
    p1, p2, p3, p4, p5 = 2654435761, 2246822519, 3266489917, 668265263, 374761393
    mask, seed = 0xFFFFFFFF, int.from_bytes(b"LORO", "little")

    def turned(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) & mask

    position, value = 0, (seed + p5) & mask
    if len(data) >= 16:
        lanes = [(seed + p1 + p2) & mask, (seed + p2) & mask, seed, (seed - p1) & mask]
        while position <= len(data) - 16:
            for lane in range(4):
                (word,) = struct.unpack_from("<I", data, position)
                lanes[lane] = (turned((lanes[lane] + word * p2) & mask, 13) * p1) & mask
                position += 4
        value = sum(turned(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True))
    value = (value + len(data)) & mask
    while position <= len(data) - 4:
        (word,) = struct.unpack_from("<I", data, position)
        value = (turned((value + word * p3) & mask, 17) * p4) & mask
        position += 4
    for byte in data[position:]:
        value = (turned((value + byte * p5) & mask, 11) * p1) & mask
    for bits, factor in ((15, p2), (13, p3)):
        value = (value ^ (value >> bits)) * factor & mask
    return value ^ (value >> 16)
