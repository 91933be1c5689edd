"""A process of documents, as its driver sees it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sqlrooms_server.rooms.pipe import Blob, Closed, Pipe

_MODULE = "sqlrooms_server.rooms.process"

# A process that takes longer to start never will.
_START_SECONDS = 30.0


def is_available() -> bool:
    """Whether Loro is installed. It is never loaded into this process."""
    return importlib.util.find_spec("loro") is not None


class Lost(Exception):
    """The process ended. The text says how, as far as is known."""


class RefusedByLoro(Exception):
    """The document did not take it. ``is_outdated``: it needs history that is gone."""

    def __init__(self, text: str, *, is_outdated: bool) -> None:
        super().__init__(text)
        self.is_outdated = is_outdated


class DocumentBroke(Exception):
    """The document is not there any more; the others of the process are."""


class Child:
    """A process that answers one command at a time. For one thread, but :meth:`kill`.

    ``memory`` is the address space it may have, in bytes; 0 is any.
    """

    def __init__(self, memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno()), str(memory)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Where Rust writes its panics, one for each bad update. They come as replies, too.
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": _paths()},
            )
        ours.settimeout(_START_SECONDS)
        self._pipe = Pipe(ours)
        try:
            self._pipe.receive()
        except Closed:
            raise self._lost() from None
        ours.settimeout(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *fields: Any, blobs: Sequence[Blob] = ()) -> tuple[tuple[Any, ...], list[Blob]]:
        """The answer to a command.

        Raises ``RefusedByLoro``, ``DocumentBroke`` or ``Lost``.
        """
        try:
            self._pipe.send(fields, blobs)
            (kind, *answer), parts = self._pipe.receive()
        except Closed:
            raise self._lost() from None
        if kind == "refused":
            raise RefusedByLoro(answer[0], is_outdated=answer[1])
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

    def _lost(self) -> Lost:
        self.close()
        status = self._process.returncode
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Lost(f"it ended with {how}")


def _paths() -> str:
    """Where this process finds its modules, for one that starts elsewhere."""
    return os.pathsep.join(path for path in sys.path if path)
