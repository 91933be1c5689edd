"""Processes of peers, as their driver sees them."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

from tests.npm import PROJECT, find_program
from tests.wire import DEADLINE

PYTHON = (sys.executable, "-m", "tests.convergence.python_peers")

# A document may be one line.
_MAX_LINE = 1 << 30


def node_command() -> tuple[str, ...]:
    """The command of a process in Node, whose packages are installed."""
    node = find_program("node", install="apt-get install nodejs npm")
    return node, "--experimental-websocket", str(PROJECT / "room_peers.mjs")


class PeerProcess:
    """One process. What it says should not have happened is in ``faults``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._commands = 0
        self.faults: list[str] = []
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> PeerProcess:
        return cls(
            await asyncio.create_subprocess_exec(
                *command, cwd=PROJECT.parent.parent, stdin=PIPE, stdout=PIPE, limit=_MAX_LINE
            )
        )

    def call(self, peer: str, do: str, **fields: Any) -> asyncio.Future[dict[str, Any]]:
        """Tell a peer to do something; the future has its answer."""
        self._commands += 1
        command = {"id": self._commands, "peer": peer, "do": do, **fields}
        future = asyncio.get_running_loop().create_future()
        self._answers[self._commands] = future
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return future

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), DEADLINE)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()
        with suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            if "fault" in message:
                self.faults.append(message["fault"])
                continue
            future = self._answers.pop(message.pop("id"))
            if future.done():
                continue
            if "error" in message:
                future.set_exception(AssertionError(message["error"]))
            else:
                future.set_result(message)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(AssertionError("a process of peers has ended"))
