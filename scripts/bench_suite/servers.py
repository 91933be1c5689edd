"""Starts servers, each on a free port of 127.0.0.1, and reads their CPU time and memory.

Linux only: what a process used is read from /proc and from its CPU clock.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import load
from .answers import Query, WrongAnswer
from .patience import sacrifice
from .peers import SQLROOMS, Peer
from .replies import Answers, SameAnswers
from .websocket import Conversation

START_SECONDS = 30.0
STOP_SECONDS = 5.0


class ServerFailed(Exception):
    """A server did not start, or did not stay."""


@dataclass(frozen=True)
class Usage:
    """What a process uses, by its process id."""

    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far. Finer than the 10 ms ticks of /proc/PID/stat."""
        # The id that clock_getcpuclockid(3) makes of a process id.
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> int:
        """Resident memory in bytes."""
        return self._status("VmRSS")

    def peak_memory(self) -> int:
        """Most resident memory in bytes since the last `reset_peak`."""
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def switches(self) -> int:
        """How often its threads gave up their core of their own accord."""
        found = Path(f"/proc/{self.pid}/task").glob("*/status")
        return sum(
            int(line.split()[1])
            for file in found
            for line in file.read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )

    def descriptors(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def stay_on(self, core: int) -> None:
        """Keep all its threads, and those they start, on one core."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(thread), {core})

    def _status(self, field: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
        raise ServerFailed(f"process {self.pid} is gone")


@dataclass(frozen=True)
class Server:
    """A running server, and the virtual environment it comes from."""

    port: int
    usage: Usage
    environment: Path
    peer: Peer = SQLROOMS

    @property
    def is_ours(self) -> bool:
        return self.peer is SQLROOMS and self.environment.name.startswith("ours")

    def connect(self) -> Conversation:
        return self.peer.connect(self.port)

    def version_of(self, query: Query) -> Query:
        """A query as this server understands it."""
        if self.peer.speaks_duckdb or not query.elsewhere:
            return query
        return replace(query, sql=query.elsewhere)

    def answers(self, query: Query) -> Answers:
        """What checks the small answers of this server."""
        if self.peer.checks is None:
            return Answers(query)
        self.peer.checks(self.environment, self.port, query)
        return SameAnswers(query)

    def decode(self, connection: Conversation, query: Query) -> None:
        """Ask once, and check the whole answer."""
        if self.peer.checks:
            self.peer.checks(self.environment, self.port, query)
        else:
            load.decode(connection, query)

    def stream(self, connection: Conversation, query: Query) -> load.Stream:
        """Ask once and let the answer pass, counting its rows."""
        if self.peer.times is None:
            return load.stream(connection, query)
        found = self.peer.times(self.environment, self.port, query)
        return load.Stream(int(found["size"]), found["first"], found["first"], found["seconds"])


def run_module(environment: Path, name: str, *arguments: str, seconds: float) -> dict[str, float]:
    """The figures that a module of this package prints as JSON, run in a virtual environment.

    Raises `ServerFailed`.
    """
    try:
        done = subprocess.run(
            [environment / "bin" / "python", "-m", f"{__package__}.{name}", *arguments],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            cwd=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerFailed(f"{name} was not done after {seconds:.0f} s") from error
    if done.returncode:
        raise ServerFailed(done.stderr.strip()[-2000:])
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextmanager
def apart(usage: Usage) -> Iterator[None]:
    """Keep a process on one core and this one, which puts load on it, on another.

    Where both mostly wait for each other, the kernel may put them on one, and then measures that.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        yield
        return
    first, second = sorted(cores)[:2]
    usage.stay_on(first)
    os.sched_setaffinity(0, {second})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def running(
    environment: Path, *options: str, peer: Peer = SQLROOMS, tables: Sequence[Path] = ()
) -> Iterator[Server]:
    """Run the server of a virtual environment in a directory of its own.

    In memory unless `options`, those of its command line, say otherwise. It has the tables of
    these Parquet files, by their names.

    Whatever ends the block ends the server. `ServerFailed` carries the end of its log.
    """
    with starting(environment, *options, peer=peer, tables=tables) as (server, wait):
        wait()
        if peer.executes:
            with server.connect() as connection:
                for table in tables:
                    load.execute(connection, f"create table {table.stem} as from '{table}'")
        yield server


@contextmanager
def starting(
    environment: Path, *options: str, peer: Peer = SQLROOMS, tables: Sequence[Path] = ()
) -> Iterator[tuple[Server, Callable[[], None]]]:
    """As `running`, as soon as the process began; with what waits until it can be asked."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        log = Path(directory, "log")
        port = _free_port()
        with log.open("wb") as output:
            process = subprocess.Popen(
                peer.command(environment, port, tables, options),
                cwd=directory,
                env=_surroundings(directory),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the benchmark, which then ends the server.
                start_new_session=True,
            )
        try:
            server = Server(port, Usage(process.pid), environment, peer)
            sacrifice(process.pid, limited=not server.is_ours)
            yield server, partial(_wait_until_healthy, process, port, peer)
        except (OSError, ServerFailed) as error:
            raise ServerFailed(f"{error}{_state(process)}{_tail(log)}") from error
        except WrongAnswer as error:
            raise WrongAnswer(f"{error}{_state(process)}{_tail(log)}") from error
        finally:
            _stop(process)


def _surroundings(directory: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SQLROOMS_"))}
    return {**kept, "XDG_CACHE_HOME": directory, "TMPDIR": directory}


def _free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection is given meanwhile."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(min(10_000, lowest // 2), lowest)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, peer: Peer) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ServerFailed("did not start")
        if _is_healthy(port, peer):
            return
        time.sleep(0.002)
    raise ServerFailed(f"not healthy after {START_SECONDS:.0f} s")


def _is_healthy(port: int, peer: Peer) -> bool:
    if peer.healthy is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
        return False
    path, answer = peer.healthy
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", path)
        return answer in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _state(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    return "" if code is None else f"; the server ended with code {code}"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-5:]
    return "".join(f"\n    {line}" for line in lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
