"""A process of peers: each has documents and a connection, and does what its driver says.

Commands come as JSON lines on standard input, ``{id, peer, do, …}``; answers leave as lines on
standard output, ``{id, …}`` or ``{id, error}``, and what should not have happened as ``{fault}``.
:mod:`tests.convergence.peers` is the driver; ``tests/browser/room_peers.mjs`` does it in Node.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from loro import ID, ExportMode, LoroDoc, VersionVector
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidMessage, WebSocketException

from tests.convergence.edits import edit
from tests.wire import DEADLINE, framed

RECONNECT_SECONDS = 0.02

Range = tuple[int, int]


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Copy:
    """A document of one room, and which of its own changes the server has acked."""

    def __init__(self, room: str, number: str) -> None:
        self.room = room
        self.number = int(number)
        self.doc = LoroDoc()
        self.doc.peer_id = self.number
        self.edits = 0
        self.stored = 0
        self.sent = 0
        self._ranges: list[Range] = []
        self.disconnected()

    def disconnected(self) -> None:
        # Answers that are to come, in this order: type, id, own changes.
        self.expected: deque[tuple[str, int | None, Range | None]] = deque()
        self.is_joined = False
        self.is_refused = False
        # The version that the document has when it has come.
        self.awaited: VersionVector | None = None

    @property
    def end(self) -> int:
        """How many changes of its own it has."""
        return _end(self.doc.oplog_vv, self.number)

    @property
    def is_acked(self) -> bool:
        return self.is_joined and not self.expected and self.stored == self.end

    def store(self, own: Range) -> None:
        """Its own changes in ``own`` are stored."""
        self._ranges = sorted([*self._ranges, own])
        for start, end in self._ranges:
            if start <= self.stored:
                self.stored = max(self.stored, end)
        self._ranges = [found for found in self._ranges if found[1] > self.stored]

    def store_what_is_in(self, version: VersionVector) -> None:
        """The server tells nobody of changes that it has not stored."""
        self.store((0, _end(version, self.number)))

    def import_(self, data: bytes) -> None:
        """What comes from the server never waits for something else."""
        if self.doc.import_(data).pending:
            raise AssertionError(f"room {self.room}: an update came before what it needs")

    def version_before(self, end: int) -> VersionVector:
        """The version of the document without its own changes from ``end`` on."""
        version = self.doc.oplog_vv
        version.set_end(ID(self.number, end))
        return version

    def since(self, version: VersionVector) -> tuple[bytes, Range]:
        """What it has beyond ``version``, and which of its own changes these are."""
        own = (_end(version, self.number), self.end)
        return bytes(self.doc.export(ExportMode.Updates(version))), own


def _end(version: VersionVector, number: int) -> int:
    last = version.get_last(number)
    return 0 if last is None else last + 1


class Peer:
    """What both kinds of peers do. ``copies`` are the documents, by their rooms."""

    def __init__(
        self, name: str, url: str, numbers: dict[str, str], seed: int, token: str | None
    ) -> None:
        self.name = name
        self.copies = {room: Copy(room, number) for room, number in numbers.items()}
        self.numbers = random.Random(seed)
        self._url = url if token is None else f"{url}/?token={quote(token, safe='')}"
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None
        self._outbox: asyncio.Queue[str | bytes] | None = None
        self._proof: object = None
        self._is_proving = False

    # Commands

    def connect(self) -> dict[str, Any]:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return {}

    def disconnect(self) -> dict[str, Any]:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._disconnected()
        return {}

    def edit(self, room: str, seed: int, size: int) -> dict[str, Any]:
        copy = self.copies[room]
        answer = self._change(copy, seed, size)
        self._edited(copy)
        return {"edits": [answer]}

    def _change(self, copy: Copy, seed: int, size: int) -> dict[str, Any]:
        copy.edits += 1
        mark = f"{copy.number}:{copy.edits}"
        edit(copy.doc, seed, mark, size)
        return {"mark": mark, "end": copy.end, "number": str(copy.number)}

    def acked(self) -> dict[str, Any]:
        copies = self.copies.values()
        return {"acked": [(copy.room, str(copy.number), copy.stored) for copy in copies]}

    async def settle(self) -> dict[str, Any]:
        """Once everything is acked, on a connection that was alive after this was asked."""
        self._proof = None
        self._is_proving = True
        self._prove()
        await self._until(
            lambda: (
                self._proof is not None
                and self._proof is self._outbox
                and all(copy.is_acked for copy in self.copies.values())
            )
        )
        self._is_proving = False
        return {}

    async def reach(self, room: str, version: str) -> dict[str, Any]:
        wanted = VersionVector.decode(base64.b64decode(version))
        await self._until(lambda: self.copies[room].doc.oplog_vv.includes_vv(wanted))
        return {}

    def state(self, room: str) -> dict[str, Any]:
        doc = self.copies[room].doc
        return {"value": doc.get_deep_value(), "version": versions_of(doc.oplog_vv)}

    def refresh(self, numbers: dict[str, str]) -> dict[str, Any]:
        """Lose the documents."""
        acked = self.acked()
        is_connected = self._task is not None
        self.disconnect()
        self.copies.update({room: Copy(room, number) for room, number in numbers.items()})
        if is_connected:
            self.connect()
        return acked

    def describe(self) -> dict[str, Any]:
        copies = "; ".join(
            f"{copy.room}: joined {copy.is_joined}, stored {copy.stored} of {copy.end}, "
            f"expects {list(copy.expected)}"
            for copy in self.copies.values()
        )
        proof = self._proof is self._outbox
        return {"text": f"open {self._outbox is not None}, proof {proof}; {copies}"}

    # The connection

    async def _run(self) -> None:
        while True:
            with suppress(OSError, EOFError, WebSocketException, InvalidHandshake, InvalidMessage):
                async with connect(
                    self._url,
                    compression=None,
                    max_size=None,
                    open_timeout=DEADLINE,
                    close_timeout=1,
                    ping_interval=None,
                ) as socket:
                    await self._talk(socket)
            self._disconnected()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _talk(self, socket: ClientConnection) -> None:
        outbox = self._outbox = asyncio.Queue()
        sender = asyncio.create_task(self._send_all(socket, outbox))
        try:
            self._guarded(self._opened)
            async for message in socket:
                if isinstance(message, str):
                    self._guarded(self._told, json.loads(message))
                else:
                    self._guarded(self._updated, message)
        finally:
            sender.cancel()

    async def _send_all(self, socket: ClientConnection, outbox: asyncio.Queue[str | bytes]) -> None:
        with suppress(OSError, WebSocketException):
            while True:
                await socket.send(await outbox.get())

    def _send(self, **fields: Any) -> None:
        self._send_raw(json.dumps(fields))

    def _send_raw(self, message: str | bytes) -> None:
        assert self._outbox is not None
        self._outbox.put_nowait(message)

    def _disconnected(self) -> None:
        self._outbox = None
        for copy in self.copies.values():
            copy.disconnected()

    def _opened(self) -> None:
        self._prove()
        for copy in self.copies.values():
            self._join(copy)

    def _prove(self) -> None:
        if self._is_proving and self._outbox is not None:
            self._send(type="hello")

    def _told(self, message: dict[str, Any]) -> None:
        if message["type"] == "welcome":
            self._proof = self._outbox
            return
        copy = self.copies.get(message.get("roomId", ""))
        assert copy is not None, f"about no room of it: {message}"
        # A join that is refused since the server stops has the rest refused, too.
        copy.is_refused |= message.get("code") == "shutting_down"
        if copy.is_refused:
            return
        for left in range(message.get("count", 1), 0, -1):
            kind, identity, own = (
                copy.expected.popleft() if copy.expected else ("nothing", None, None)
            )
            assert message["type"] == kind, f"expected {kind}, got {str(message)[:300]}"
            if left == 1 and identity is not None:
                assert message["id"] == identity, f"expected id {identity}, got {message}"
            self._answered(copy, message, own)

    def _answered(self, copy: Copy, message: dict[str, Any], own: Range | None) -> None:
        if own is not None:
            copy.store(own)

    def _guarded(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except asyncio.CancelledError:
            raise
        except BaseException:  # Loro's errors are no better than that.
            say({"fault": f"{self.name}: {traceback.format_exc()}"})
        self._look()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which is asked whenever something has come."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((condition, future))
        self._look()
        await future

    def _look(self) -> None:
        for condition, future in self._waiting:
            if not future.done() and condition():
                future.set_result(None)
        self._waiting = [found for found in self._waiting if not found[1].done()]

    # What the kinds differ in

    def _join(self, copy: Copy) -> None:
        raise NotImplementedError

    def _edited(self, copy: Copy) -> None:
        raise NotImplementedError

    def _updated(self, message: bytes) -> None:
        raise NotImplementedError


class PlainPeer(Peer):
    """Speaks the first part of the protocol, and waits for the document before it sends its own."""

    @property
    def _only(self) -> Copy:
        (copy,) = self.copies.values()
        return copy

    def _join(self, copy: Copy) -> None:
        self._send(type="crdt-join", roomId=copy.room, clientId=self.name)
        copy.expected += [("crdt-joined", None, None), ("crdt-snapshot", None, None)]

    def _edited(self, copy: Copy) -> None:
        if copy.is_joined:
            self._send_since(copy, copy.version_before(copy.sent))

    def _send_since(self, copy: Copy, version: VersionVector) -> None:
        update, own = copy.since(version)
        self._send_raw(update)
        copy.expected.append(("crdt-update-ack", None, own))
        copy.sent = copy.end

    def _answered(self, copy: Copy, message: dict[str, Any], own: Range | None) -> None:
        super()._answered(copy, message, own)
        if message["type"] != "crdt-snapshot":
            return
        snapshot = base64.b64decode(message["data"], validate=True)
        server = LoroDoc.decode_import_blob_meta(snapshot, True).partial_end_vv
        copy.import_(snapshot)
        copy.is_joined = True
        copy.store_what_is_in(server)
        if server.includes_vv(copy.doc.oplog_vv) and not self.numbers.randrange(3):
            copy.sent = copy.end
        elif self.numbers.randrange(2):
            self._send_since(copy, server)
        else:
            data = base64.b64encode(copy.doc.export(ExportMode.Snapshot())).decode()
            self._send(type="crdt-snapshot", roomId=copy.room, data=data)
            copy.expected.append(("crdt-snapshot-ack", None, (0, copy.end)))
            copy.sent = copy.end

    def _updated(self, message: bytes) -> None:
        assert self._only.is_joined, "an update came before the document"
        self._only.import_(message)


class VersionsPeer(Peer):
    """Speaks the second part: versions, several rooms, ids and statuses."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ids = 0
        self._left: set[str] = set()

    def leave(self, room: str) -> dict[str, Any]:
        self._left.add(room)
        if self._outbox is not None:
            self._send(type="crdt-leave", roomId=room)
            self.copies[room].expected.append(("crdt-left", None, None))
        return {}

    def join(self, room: str) -> dict[str, Any]:
        self._left.discard(room)
        if self._outbox is not None:
            self._join(self.copies[room])
        return {}

    def shuffle(self, room: str, seed: int) -> dict[str, Any]:
        """Edit three times, and send the last edit first."""
        copy = self.copies[room]
        is_told = copy.is_joined and room not in self._left
        answers, parts = [], []
        for number in range(3):
            before = copy.version_before(copy.end)
            answers.append(self._change(copy, seed + number, 0))
            parts.append(copy.since(before))
        if is_told:
            for update, own in reversed(parts):
                self._send_update(copy, update, own)
            copy.sent = copy.end
        return {"edits": answers}

    def _join(self, copy: Copy) -> None:
        if copy.room in self._left:
            return
        version = copy.doc.oplog_vv
        is_empty = version == VersionVector() or self.numbers.randrange(4) == 0
        encoded = "" if is_empty else base64.b64encode(version.encode()).decode()
        self._send(type="crdt-join", roomId=copy.room, version=encoded)
        copy.expected.append(("crdt-joined", None, None))
        if self.numbers.randrange(3) == 0:
            # Without waiting for the answer, what the server has not acked.
            self._send_since(copy, copy.version_before(copy.stored))

    def _edited(self, copy: Copy) -> None:
        if copy.is_joined and copy.room not in self._left:
            self._send_since(copy, copy.version_before(copy.sent))
            copy.sent = copy.end

    def _send_since(self, copy: Copy, version: VersionVector) -> None:
        self._send_update(copy, *copy.since(version))

    def _send_update(self, copy: Copy, update: bytes, own: Range) -> None:
        self._ids += 1
        self._send_raw(
            framed({"type": "crdt-update", "roomId": copy.room, "id": self._ids}, update)
        )
        copy.expected.append(("crdt-update-ack", self._ids, own))

    def _answered(self, copy: Copy, message: dict[str, Any], own: Range | None) -> None:
        super()._answered(copy, message, own)
        if message["type"] == "crdt-joined":
            assert "reset" not in message, f"history that was never cut is gone: {message}"
            copy.awaited = VersionVector.decode(base64.b64decode(message["version"]))
        elif message["type"] == "crdt-left":
            copy.is_joined = False
        else:
            assert message["status"] in ("applied", "pending"), message

    def _updated(self, message: bytes) -> None:
        start = 4 + int.from_bytes(message[:4], "big")
        room = json.loads(message[4:start])["roomId"]
        copy = self.copies[room]
        assert copy.is_joined or copy.awaited is not None, f"an update of {room}, not joined"
        copy.import_(message[start:])
        if copy.awaited is None:
            return
        server, copy.awaited = copy.awaited, None
        assert copy.doc.oplog_vv.includes_vv(server), "the document is not at the version of joined"
        copy.is_joined = True
        copy.sent = copy.end
        copy.store_what_is_in(server)
        if room not in self._left and not server.includes_vv(copy.doc.oplog_vv):
            self._send_since(copy, server)


KINDS = {"plain": PlainPeer, "versions": VersionsPeer}


def versions_of(version: VersionVector) -> dict[str, int]:
    """The number of changes of each peer, which the stubs of Loro forget to tell."""
    spans = VersionVector().get_missing_span(version)
    return {str(span.peer): span.counter.end for span in spans}


class Process:
    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        reader = asyncio.StreamReader(limit=1 << 30)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            self._begin(json.loads(line))

    def _begin(self, command: dict[str, Any]) -> None:
        number = command.pop("id")
        try:
            answer = self._do(**command)
        except BaseException:  # Loro's errors are no better than that.
            say({"id": number, "error": traceback.format_exc()})
            return
        if isinstance(answer, dict):
            say({"id": number, **answer})
            return
        task = asyncio.create_task(self._finish(number, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, number: int, answer: Coroutine[Any, Any, dict[str, Any]]) -> None:
        say({"id": number, **await answer})

    def _do(self, peer: str, do: str, **fields: Any) -> Any:
        if do == "create":
            kind = KINDS[fields.pop("kind")]
            self._peers[peer] = kind(
                peer, fields["url"], fields["numbers"], fields["seed"], fields.get("token")
            )
            return {}
        if do == "end":
            self._peers.pop(peer).disconnect()
            return {}
        return getattr(self._peers[peer], do)(**fields)


if __name__ == "__main__":
    asyncio.run(Process().run())
