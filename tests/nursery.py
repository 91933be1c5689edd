"""The command line in forks of a process that has imported it all, in a tenth of the time.

The imports are most of what a start costs. Whatever looks at these, or at how Python ends, starts
``python -m sqlrooms_server`` instead.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sqlrooms_server.cli import main
from tests.wire import DEADLINE

SPACE = 1 << 16

# The command imports them only when it needs them.
IMPORTS = (
    "sqlrooms_server.server",
    "sqlrooms_server.query_command.command",
    "sqlrooms_server.query_command.formats",
    "sqlrooms_server.types_command",
    "sqlrooms_server.client",
    "pyarrow.parquet",
)


class Forked:
    """What the tests need of a ``Popen``, for a process that is the child of another one."""

    def __init__(self, pid: int, status: int, stdout: BinaryIO, stderr: BinaryIO) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        ended = self._ended(timeout)
        if ended is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return ended

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            # It may have ended, and its parent have taken note, without having said so yet.
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, SPACE))
            os.close(self._status)
        return self.returncode


class Done(NamedTuple):
    returncode: int
    stdout: bytes
    stderr: bytes


class Nursery:
    """The process that is forked; one for all tests of a run."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        command = [sys.executable, "-m", "tests.nursery", str(number)]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, pass_fds=[number], cwd=root)
        theirs.close()

    def fork(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: bytes = b"",
    ) -> Forked:
        """A process of the command with ``arguments`` and, beside the usual, ``environment``."""
        pipes = [os.pipe() for _ in range(3)]
        theirs = [write for _, write in pipes]
        order = [arguments, {**os.environ, **(environment or {})}, str(cwd or Path.cwd())]
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            descriptors = [file.fileno(), *theirs]
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
        for write in theirs:
            os.close(write)
        pid = int(self._socket.recv(SPACE))
        stdout, stderr, status = (read for read, _ in pipes)
        return Forked(pid, status, os.fdopen(stdout, "rb"), os.fdopen(stderr, "rb"))

    def run(self, *arguments: str, **options: Any) -> Done:
        """The same, to its end."""
        process = self.fork(*arguments, **options)
        with process.stdout, process.stderr:
            # What it says of errors fits into a pipe.
            stdout, stderr = process.stdout.read(), process.stderr.read()
            return Done(process.wait(DEADLINE), stdout, stderr)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def tend(orders: socket.socket) -> None:
    """Fork a process for each order, and say how each ends, until there are no more orders."""
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    alive: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            woken.recv(SPACE)
            for pid in list(alive):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    report(alive.pop(pid), os.waitstatus_to_exitcode(status))
        if orders not in ready:
            continue
        order, descriptors, _, _ = socket.recv_fds(orders, SPACE, 4)
        if not order:
            return
        pid = os.fork()
        if pid == 0:
            for number in range(3):
                os.dup2(descriptors[number], number)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for opened in (orders, woken, wakes):
                opened.close()
            for number in (*alive.values(), *descriptors):
                os.close(number)
            carry_out(*json.loads(order))
        *streams, alive[pid] = descriptors
        for number in streams:
            os.close(number)
        orders.send(str(pid).encode())


def carry_out(arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Run the command, and end without what belongs to threads that a fork does not have."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        status = main(arguments)
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def report(status: int, code: int) -> None:
    with suppress(BrokenPipeError):  # Nobody waits for it.
        os.write(status, str(code).encode())
    os.close(status)


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    tend(socket.socket(fileno=int(sys.argv[1])))
