"""A process of documents, as its driver sees it."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from sqlrooms_server.rooms.pipe import Blob, Closed, Pipe

_MODULE = "sqlrooms_server.rooms.process"

# A process that takes longer to start never will.
_START_SECONDS = 30.0

# What takes longer than this never ends: Loro may hang when it runs out of memory. The largest room
# that --max-message-size allows by default takes some 3 s on one core.
_COMMAND_SECONDS = 60.0

# How often the memory of a process is looked at while it works.
_LOOK_SECONDS = 0.05

# What the system lets it have on top: memory grows between two looks, and addresses are more than
# memory. Not less, for it is where Loro hangs.
_BEYOND_BYTES = 2 << 30


def is_available() -> bool:
    """Whether Loro is installed. It is never loaded into this process."""
    return importlib.util.find_spec("loro") is not None


class Lost(Exception):
    """The process ended. The text says how, as far as is known."""


class RefusedByLoro(Exception):
    """The document did not take it."""


class DocumentBroke(Exception):
    """The document is not there any more; the others of the process are."""


class Child:
    """A process that answers one command at a time. For one thread, but :meth:`kill`.

    ``memory`` is what it may use, in bytes; 0 is any.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._reason = ""
        self._deadline = time.monotonic() + _START_SECONDS
        ours, theirs = socket.socketpair()
        limit = memory + _BEYOND_BYTES if memory else 0
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(ours.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(limit)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Where Rust writes its panics, one for each bad update. They come as replies, too.
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": _paths()},
            )
            undo.pop_all()
        self._socket = ours
        self._socket.settimeout(_LOOK_SECONDS)
        self._pipe = Pipe(ours, self._look)
        try:
            self._pipe.receive()
        except Closed:
            raise self._lost() from None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *fields: Any, blobs: Sequence[Blob] = ()) -> tuple[tuple[Any, ...], list[Blob]]:
        """The answer to a command.

        Raises ``RefusedByLoro``, ``DocumentBroke`` or ``Lost``.
        """
        try:
            self._deadline = time.monotonic() + _COMMAND_SECONDS
            self._socket.settimeout(_COMMAND_SECONDS)
            self._pipe.send(fields, blobs)
            self._socket.settimeout(_LOOK_SECONDS)
            (kind, *answer), parts = self._pipe.receive()
        except Closed:
            raise self._lost() from None
        if kind == "refused":
            raise RefusedByLoro(answer[0])
        if kind == "broken":
            raise DocumentBroke(answer[0])
        return tuple(answer), parts

    def kill(self) -> None:
        """End it, whatever it does. From any thread."""
        self._process.kill()

    def close(self) -> None:
        """End it and free what it holds here."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _look(self) -> None:
        """It works on something that takes a while."""
        if self._memory and _resident(self._process.pid) > self._memory:
            self._reason = f"it used more than {self._memory} bytes of memory (--room-memory)"
        elif time.monotonic() > self._deadline:
            self._reason = f"it did not answer for {_COMMAND_SECONDS:g} s"
        else:
            return
        raise Closed

    def _lost(self) -> Lost:
        if self._reason:
            self.close()
            return Lost(self._reason)
        # One that ended by itself says how.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self.close()
        status = self._process.returncode
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Lost(f"it ended with {how}")


def _resident(pid: int) -> int:
    """The memory that a process uses, in bytes; 0 where Linux does not tell."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _paths() -> str:
    """Where this process finds its modules, for one that starts elsewhere."""
    return os.pathsep.join(path for path in sys.path if path)
