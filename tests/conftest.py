"""Servers for the tests: in this process, or as a process of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sqlrooms_server.plugin import Plugin
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.nursery import Nursery
from tests.recorder import Recorder
from tests.wire import DEADLINE, Wire


def started(
    *arguments: str,
    environment: dict[str, str] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "sqlrooms_server"),
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """``python -m sqlrooms_server``, from its first import on."""
    return subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )


class ServerProcess:
    """A process that serves on a free port; ``start`` makes it of arguments."""

    def __init__(self, start: Callable[..., Any], *arguments: str, **options: Any) -> None:
        self.process = start("--port", "0", *arguments, **options)
        self.welcome = self._read_welcome()
        address = re.search(r"wss?://\S+:(\d+)", self.welcome)
        if address is None:
            self.process.kill()
            self.wait()
            raise AssertionError(f"The server did not start: {self.errors}")
        self.port = int(address[1])
        self.url = f"ws://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def _read_welcome(self) -> str:
        lines = []
        for line in self.process.stdout:
            lines.append(line.decode())
            if b"Ctrl+C" in line:
                break
        return "".join(lines)

    def connect(self, **options: Any) -> Wire:
        return Wire(self.url, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the exit status of a server that was told to stop."""
        status: int = self.process.wait(DEADLINE)
        if not self.process.stderr.closed:
            self.errors = self.process.stderr.read().decode()
        self.process.stdout.close()
        self.process.stderr.close()
        return status


class LocalServer:
    """A server in this process."""

    def __init__(self, settings: Settings, plugins: Sequence[Plugin] = ()) -> None:
        self.server = Server(settings, plugins)
        self.port = self.server.start()
        self.url = f"ws://127.0.0.1:{self.port}"

    def connect(self, path: str = "/", **options: Any) -> Wire:
        return Wire(self.url + path, **options)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def serve(nursery: Nursery) -> Iterator[Callable[..., ServerProcess]]:
    """Starts server processes with the given arguments; they end with the test."""
    processes: list[ServerProcess] = []

    def serve(
        *arguments: str, start: Callable[..., Any] = nursery.fork, **options: Any
    ) -> ServerProcess:
        processes.append(ServerProcess(start, *arguments, **options))
        return processes[-1]

    yield serve
    for process in processes:
        process.stop(signal.SIGKILL)


@pytest.fixture
def launch() -> Iterator[Callable[..., LocalServer]]:
    """Starts servers in this process with the given settings; they stop with the test."""
    with ExitStack() as stack:

        def start(*plugins: Plugin, **settings: Any) -> LocalServer:
            local = LocalServer(Settings(port=0, **settings), plugins)
            stack.callback(local.server.stop)
            return local

        yield start


@pytest.fixture
def server(launch: Callable[..., LocalServer]) -> LocalServer:
    """A server in this process with a database in memory."""
    return launch()


@pytest.fixture(scope="module")
def module_server() -> Iterator[LocalServer]:
    """The same for modules that make it their ``server``: their tests create or replace."""
    local = LocalServer(Settings(port=0))
    yield local
    local.server.stop()


@pytest.fixture
def wire(server: LocalServer) -> Iterator[Wire]:
    """A connection to ``server``."""
    with server.connect() as connected:
        yield connected


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A transport without a server."""
    made = Recorder()
    made.start()
    yield made
    made.transport.stop(time.monotonic() + 2)
