"""Load for rooms: ten members who edit one document, and one who comes back. Times in seconds.

The edits are made before the clock starts. Afterwards the members read what is still under way,
and one of them must have the document of all.
"""

from __future__ import annotations

import base64
import json
import os
import select
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from loro import ExportMode, LoroDoc

from .answers import WrongAnswer
from .load import as_message
from .replies import Message, Whole
from .websocket import SILENCE, Connection, Disconnected

ROOM = "bench"
MEMBERS = 10


def edits(port: int, each: int, *, in_flight: int, in_batches: bool) -> float:
    """Edits a second of all members together, acknowledged, with so many of each under way.

    With `in_batches` an ack may stand for several, which not every server can.
    """
    with ExitStack() as stack:
        members = [
            _Member(stack.enter_context(Connection(port)), number, each, in_batches)
            for number in range(MEMBERS)
        ]
        for member in members:
            member.join()
        began = perf_counter()
        _exchange(members, in_flight)
        took = perf_counter() - began
        members[0].expect({str(number): each for number in range(MEMBERS)})
    return MEMBERS * each / took


def join(port: int, size: int, *, with_version: bool) -> tuple[int, float]:
    """Bytes that come when somebody joins who has all but the last ten edits, and how long."""
    room, guest = LoroDoc(), LoroDoc()
    texts = room.get_list("texts")
    for _ in range(size // 1000):
        texts.push(os.urandom(500).hex())
    room.commit()
    guest.import_(room.export(ExportMode.Snapshot()))
    before = room.oplog_vv
    for number in range(10):
        texts.push(f"edit {number}")
    room.commit()
    with Connection(port) as author, Connection(port) as comer:
        _join(author)
        for update in (LoroDoc().oplog_vv, before):
            author.send_binary(b"", room.export(ExportMode.Updates(update)))
            _until_ack(author)
        whole = Whole()
        asked = perf_counter()
        version = guest.oplog_vv.encode()
        fields = {"version": base64.b64encode(version).decode()} if with_version else {}
        comer.send(as_message("crdt-join", roomId=ROOM, **fields))
        while len(whole.messages) < 2:
            comer.receive(whole)
        took = perf_counter() - asked
        guest.import_(_document(whole.messages[1]))
        if guest.get_deep_value() != room.get_deep_value():
            raise WrongAnswer("who joined has not the document of the room")
        return sum(len(data) for _, data in whole.messages), took


class _Member:
    """One connection with edits to make, and what it received."""

    def __init__(self, connection: Connection, number: int, count: int, in_batches: bool) -> None:
        self.connection = connection
        self.unsent = _edits(number, count)
        self.unacked = 0
        self._name = str(number)
        self._in_batches = in_batches
        self._whole = Whole()
        self._documents: list[bytes] = []

    def join(self) -> None:
        _join(self.connection, **({"version": ""} if self._in_batches else {}))

    def send(self, in_flight: int) -> None:
        count = in_flight - self.unacked
        # Half of what may be under way at once, or each ack would be followed by one edit.
        if not self.unsent or count < (in_flight + 1) // 2:
            return
        now, self.unsent = self.unsent[:count], self.unsent[count:]
        self.unacked += len(now)
        head = _head() if self._in_batches else b""
        self.connection.send_all([head + update for update in now])

    def receive(self) -> None:
        self.connection.receive(self._whole)
        for binary, data in self._whole.take():
            if binary:
                self._documents.append(bytes(data))
                continue
            message: dict[str, Any] = json.loads(data)
            if message["type"] != "crdt-update-ack" or message.get("status") == "rejected":
                raise WrongAnswer(f"an edit was answered with {message}")
            self.unacked -= message.get("count", 1)

    def expect(self, edits: dict[str, int]) -> None:
        """Read on until it has the edits of all others."""
        document = LoroDoc()
        others = {name: count for name, count in edits.items() if name != self._name}
        while True:
            for data in self._documents:
                document.import_(_document((True, bytearray(data))))
            self._documents.clear()
            found: dict[str, dict[str, Any]] = document.get_deep_value()
            # The published server sends its own edits back to a member.
            found.pop(self._name, None)
            if {name: len(of_one) for name, of_one in found.items()} == others:
                return
            self.receive()


def _exchange(members: list[_Member], in_flight: int) -> None:
    """Send everything and read until everything is acknowledged."""
    by_number = {member.connection.fileno(): member for member in members}
    with select.epoll() as epoll:
        for number in by_number:
            epoll.register(number, select.EPOLLIN)
        for member in members:
            member.send(in_flight)
        while any(member.unsent or member.unacked for member in members):
            ready = epoll.poll(SILENCE)
            if not ready:
                raise Disconnected(f"nothing came within {SILENCE:.0f} s")
            for number, _ in ready:
                member = by_number[number]
                member.receive()
                member.send(in_flight)


def _edits(number: int, count: int) -> list[bytes]:
    """Updates of one key each, in a map of their author."""
    document = LoroDoc()
    document.peer_id = number + 1
    fields = document.get_map(str(number))
    updates = []
    for edit in range(count):
        before = document.oplog_vv
        fields.insert(str(edit), edit)
        document.commit()
        updates.append(document.export(ExportMode.Updates(before)))
    return updates


def _head() -> bytes:
    header = json.dumps({"type": "crdt-update", "roomId": ROOM}).encode()
    return len(header).to_bytes(4, "big") + header


def _join(connection: Connection, **fields: Any) -> None:
    connection.send(as_message("crdt-join", roomId=ROOM, **fields))
    whole = Whole()
    while len(whole.messages) < 2:
        connection.receive(whole)
    joined = json.loads(whole.messages[0][1])
    if joined["type"] != "crdt-joined":
        raise WrongAnswer(f"a join was answered with {joined}")


def _until_ack(connection: Connection) -> None:
    whole = Whole()
    while True:
        connection.receive(whole)
        for binary, data in whole.take():
            if not binary:
                if json.loads(data)["type"] != "crdt-update-ack":
                    raise WrongAnswer(f"an edit was answered with {bytes(data[:300])!r}")
                return


def _document(message: Message) -> bytes:
    """The Loro bytes of a message: bare, after a header, or in base64."""
    binary, data = message
    if not binary:
        return base64.b64decode(json.loads(data)["data"])
    if data[:4] == b"loro":
        return bytes(data)
    return bytes(data[4 + int.from_bytes(data[:4], "big") :])
