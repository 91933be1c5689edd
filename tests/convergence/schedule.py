"""Carries out a plan with a server and its peers, and checks what they have in the end."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import psutil
from loro import LoroDoc, VersionVector
from websockets.asyncio.client import connect

from tests.conftest import ServerProcess
from tests.convergence.network import Network
from tests.convergence.peers import PYTHON, PeerProcess, node_command
from tests.convergence.plan import MAX_PEERS, Plan
from tests.convergence.python_peers import versions_of
from tests.wire import DEADLINE

T = TypeVar("T")

# What a server says of a process of documents that was killed.
_LOST = "A process of documents was lost"


class World:
    """A server, which may be stopped and started again, and the network in front of it."""

    def __init__(self, start: Callable[..., Any], token: str | None, *arguments: str) -> None:
        self.token = token
        self._start = start
        self.network = Network(MAX_PEERS)
        self._arguments = arguments
        self._server: ServerProcess | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        token = "" if self.token is None else f"/?token={quote(self.token, safe='')}"
        return self._server.url + token

    async def start_server(self) -> None:
        self._server = await asyncio.to_thread(
            ServerProcess, self._start, "--sync", *self._arguments
        )

    def open(self) -> None:
        """Let the peers reach the server."""
        assert self._server is not None
        self.network.connect_to(self._server.port)

    async def stop_server(self, number: int) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        status = await asyncio.to_thread(server.stop, number)
        self.network.connect_to(None)
        assert status == (0 if number == signal.SIGTERM else -number), (status, server.errors)
        unexpected = [
            line
            for line in server.errors.splitlines()
            if ("ERROR" in line or "Traceback" in line) and _LOST not in line
        ]
        assert not unexpected, server.errors

    def lose_documents(self) -> None:
        """Kill the processes in which the server keeps its documents."""
        assert self._server is not None
        for child in psutil.Process(self._server.pid).children():
            with suppress(psutil.NoSuchProcess):
                child.kill()


class Crew:
    """The processes in which peers live. A member of a plan is always in the same one."""

    def __init__(self, python: list[PeerProcess], node: list[PeerProcess]) -> None:
        self._python = python
        self._node = node

    @classmethod
    async def start(cls) -> Crew:
        commands = [PYTHON, PYTHON, node_command(), node_command()]
        started = await asyncio.gather(*(PeerProcess.start(command) for command in commands))
        return cls(started[:2], started[2:])

    async def stop(self) -> None:
        await asyncio.gather(*(process.stop() for process in (*self._python, *self._node)))

    def process(self, kind: str, number: int) -> PeerProcess:
        found = self._node if kind in ("connector", "versions in node") else self._python
        return found[number % len(found)]

    def faults(self) -> list[str]:
        return [fault for process in (*self._python, *self._node) for fault in process.faults]


class Schedule:
    """One plan. Rooms and peers have names of their own, so that a world can have many."""

    def __init__(self, plan: Plan, world: World, crew: Crew) -> None:
        self._plan = plan
        self._world = world
        self._crew = crew
        self._links = world.network.links
        self._numbers = (str(plan.seed % 2**31 << 32 | number) for number in itertools.count(1))
        self._is_up = True
        self._is_held = [False] * len(plan.members)
        self._is_online = [False] * len(plan.members)
        self._left: set[tuple[int, str]] = set()
        # By room: all edits, as the number of the peer, its count of changes and the mark.
        self._edits: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
        # How many changes of a peer in a room were acked.
        self._acked: dict[tuple[str, str], int] = defaultdict(int)
        # What was told to the peers and has no answer yet.
        self._told: list[Awaitable[Any]] = []
        self.at: Any = None

    async def run(self) -> None:
        """Raises ``AssertionError``."""
        for number, member in enumerate(self._plan.members):
            self._tell(
                number,
                "create",
                kind=member.kind.split()[0],
                url=self._links[number].url,
                token=self._world.token,
                numbers={self._room(room): next(self._numbers) for room in member.rooms},
                seed=member.seed,
            )
        for step in self._plan.steps:
            self.at = step
            name, *arguments = step
            method: Callable[..., Coroutine[Any, Any, None]] = getattr(self, f"_{name}")
            await method(*arguments)
            faults = self._crew.faults()
            assert not faults, "\n".join(faults)
        self.at = "the end"
        for number in range(len(self._plan.members)):
            self._tell(number, "end")
        await self._answers()

    async def describe(self) -> str:
        """What each peer waits for."""
        found = []
        for number, member in enumerate(self._plan.members):
            try:
                answer = await asyncio.wait_for(self._call(number, "describe"), 1)
                text = answer["text"]
            except (AssertionError, OSError, asyncio.TimeoutError) as error:
                text = f"does not say: {error}"
            found.append(f"  peer {number}, {member.kind}: {text}; {self._links[number]}")
        return "\n".join(found)

    # Steps

    async def _edit(self, peer: int, room: str, seed: int, size: int) -> None:
        self._edited(room, self._call(peer, "edit", room=self._room(room), seed=seed, size=size))

    async def _shuffle(self, peer: int, room: str, seed: int) -> None:
        self._edited(room, self._call(peer, "shuffle", room=self._room(room), seed=seed))

    async def _pause(self, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)

    async def _cut(self, peer: int) -> None:
        self._links[peer].cut()

    async def _cut_after(self, peer: int, count: int, is_sending: bool) -> None:
        self._links[peer].cut_after(count, is_sending=is_sending)

    async def _hold(self, peer: int) -> None:
        self._is_held[peer] = True
        self._links[peer].hold()

    async def _release(self, peer: int) -> None:
        self._is_held[peer] = False
        self._links[peer].release()

    async def _disconnect(self, peer: int) -> None:
        self._is_online[peer] = False
        self._tell(peer, "disconnect")

    async def _connect(self, peer: int) -> None:
        self._is_online[peer] = True
        self._tell(peer, "connect")

    async def _leave(self, peer: int, room: str) -> None:
        if (peer, room) not in self._left:
            self._left.add((peer, room))
            self._tell(peer, "leave", room=self._room(room))

    async def _join(self, peer: int, room: str) -> None:
        if (peer, room) in self._left:
            self._left.discard((peer, room))
            self._tell(peer, "join", room=self._room(room))

    async def _refresh(self, peer: int) -> None:
        rooms = self._plan.members[peer].rooms
        numbers = {self._room(room): next(self._numbers) for room in rooms}
        self._note_acked(await self._within(self._call(peer, "refresh", numbers=numbers)))

    async def _settle(self, peer: int) -> None:
        is_in_all = not any((peer, room) in self._left for room in self._plan.members[peer].rooms)
        if self._is_up and self._is_online[peer] and not self._is_held[peer] and is_in_all:
            await self._within(self._call(peer, "settle"))

    async def _lose_documents(self) -> None:
        self._world.lose_documents()

    async def _stop_server(self, number: str) -> None:
        self._is_up = False
        await self._world.stop_server(signal.Signals[number])

    async def _start_server(self) -> None:
        """Before any peer can mend it, the new server must have all that the old one acked."""
        await self._answers()
        await self._gather_acked()
        await self._world.start_server()
        if self._plan.is_durable:
            for room in self._rooms():
                await self._audit(room)
        self._world.open()
        self._is_up = True

    async def _heal(self) -> None:
        """In the end all have the same, with all edits, and so has somebody who comes."""
        await self._answers()
        for number, member in enumerate(self._plan.members):
            await self._release(number)
            await self._connect(number)
            for room in member.rooms:
                await self._join(number, room)
        everybody = range(len(self._plan.members))
        await self._all(self._call(number, "settle") for number in everybody)
        await self._gather_acked()
        for room in self._rooms():
            value, versions, version = await self._audit(room)
            inside = [
                number for number, member in enumerate(self._plan.members) if room in member.rooms
            ]
            name = self._room(room)
            encoded = base64.b64encode(version).decode()
            await self._all(
                self._call(number, "reach", room=name, version=encoded) for number in inside
            )
            states = await self._all(self._call(number, "state", room=name) for number in inside)
            for number, state in zip(inside, states, strict=True):
                who = f"peer {number}, {self._plan.members[number].kind}"
                assert state["version"] == versions, (who, state["version"], versions)
                assert without_empty(state["value"]) == value, (who, state["value"], value)
            await self._fresh(room, encoded, value)

    async def _fresh(self, room: str, version: str, value: Any) -> None:
        """Somebody who comes with an empty document gets all there is."""
        kind = ("plain", "connector")[self._plan.seed % 2]
        name = self._room(room)
        process = self._crew.process(kind, 0)

        def call(do: str, **fields: Any) -> Awaitable[dict[str, Any]]:
            return process.call("fresh", do, **fields)

        token = {} if self._world.token is None else {"token": self._world.token}
        url = self._world.url.split("/?")[0]
        numbers = {name: next(self._numbers)}
        await self._within(
            call("create", kind=kind, url=url, numbers=numbers, seed=self._plan.seed, **token)
        )
        await self._within(call("connect"))
        await self._within(call("reach", room=name, version=version))
        state = await self._within(call("state", room=name))
        assert without_empty(state["value"]) == value, (f"fresh {kind}", state["value"], value)
        await self._within(call("end"))

    # Peers

    def _room(self, room: str) -> str:
        return f"{self._plan.seed}-{room}"

    def _rooms(self) -> list[str]:
        return sorted({room for member in self._plan.members for room in member.rooms})

    def _call(self, peer: int, do: str, **fields: Any) -> asyncio.Future[dict[str, Any]]:
        process = self._crew.process(self._plan.members[peer].kind, peer)
        return process.call(f"{self._plan.seed}-{peer}", do, **fields)

    def _tell(self, peer: int, do: str, **fields: Any) -> None:
        self._told.append(self._call(peer, do, **fields))

    def _edited(self, room: str, answer: asyncio.Future[dict[str, Any]]) -> None:
        async def note() -> None:
            for edit in (await answer)["edits"]:
                self._edits[room].append((edit["number"], edit["end"], edit["mark"]))

        self._told.append(asyncio.ensure_future(note()))

    async def _answers(self) -> None:
        told, self._told = self._told, []
        await self._all(told)

    async def _gather_acked(self) -> None:
        everybody = range(len(self._plan.members))
        for answer in await self._all(self._call(number, "acked") for number in everybody):
            self._note_acked(answer)

    def _note_acked(self, answer: dict[str, Any]) -> None:
        for room, number, count in answer["acked"]:
            self._acked[room, number] = max(self._acked[room, number], count)

    async def _all(self, awaitables: Any) -> list[Any]:
        return await self._within(asyncio.gather(*awaitables))

    async def _within(self, awaitable: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(awaitable, DEADLINE)
        except asyncio.TimeoutError:
            raise AssertionError("It does not end.") from None

    # The server

    async def _audit(self, room: str) -> tuple[Any, dict[str, int], bytes]:
        """The room as the server has it: value and versions. What was acked must be in it."""
        name = self._room(room)
        doc = LoroDoc()
        async with connect(self._world.url, compression=None, max_size=None) as socket:
            await socket.send(json.dumps({"type": "crdt-join", "roomId": name, "version": ""}))
            joined = json.loads(await self._within(socket.recv()))
            assert joined["type"] == "crdt-joined", joined
            message = await self._within(socket.recv())
        assert isinstance(message, bytes), message
        doc.import_(message[4 + int.from_bytes(message[:4], "big") :])
        version = base64.b64decode(joined["version"])
        versions = versions_of(doc.oplog_vv)
        assert versions == versions_of(VersionVector.decode(version))
        value = without_empty(doc.get_deep_value())
        for (acked_room, number), count in self._acked.items():
            if acked_room == name:
                has = versions.get(number, 0)
                assert has >= count, (
                    f"of peer {number} in {name}, {count} were acked, {has} are there"
                )
        marks = value.get("marks", {})
        for number, end, mark in self._edits[room]:
            if end <= self._acked[name, number]:
                assert mark in marks, f"{mark} in {name} was acked and is not there"
        return value, versions, version


def without_empty(value: dict[str, Any]) -> dict[str, Any]:
    """A document without roots that hold nothing: to ask for one creates it, on one side only."""
    return {key: held for key, held in value.items() if held}


def arguments(directory: Path | None, token: str | None, *more: str) -> tuple[str, ...]:
    """Arguments of a server that keeps its rooms in ``directory``, or in memory."""
    found = list(more)
    if directory is not None:
        found += ["--db-path", str(directory / "rooms.db")]
    if token is not None:
        assert directory is not None
        path = directory / "token"
        path.write_text(token, encoding="utf-8")
        found += ["--auth-token-file", str(path)]
    return tuple(found)
