"""A server process, and what it holds: memory, descriptors, threads, children. Linux only."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0

# Deadlines are short, so that what is left behind by a client is given up within seconds.
OPTIONS = (
    *("--max-message-size", "4MiB", "--max-queued-bytes", "4MiB", "--idle-timeout", "8"),
    *("--stream-idle-timeout", "5", "--session-idle-timeout", "10", "--room-idle-timeout", "1"),
    *("--memory-limit", "1GB", "--threads", "2", "--sync"),
)

# Of the database of the cache.
_CACHE_FILES = ("/cache.db", "/cache.db-wal")


@dataclass(frozen=True)
class Held:
    """What a process holds at one time. Memory in MiB, that of its children apart."""

    memory: float
    memory_of_rooms: float
    descriptors: int
    of_cache: int
    threads: int


class Victim:
    """``python -m sqlrooms_server`` on a free port."""

    def __init__(self, home: Path, *options: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "server.log"
        command = [sys.executable, "-X", "faulthandler", "-m", "sqlrooms_server", "--port", "0"]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *OPTIONS, "--cache-dir", str(home / "cache"), *options],
                stdout=output,
                stderr=output,
                env={**os.environ, "TMPDIR": str(home)},
                # Ctrl+C is for the run, which then ends the server.
                start_new_session=True,
            )
        self._ps = psutil.Process(self._process.pid)
        self.port = self._read_port()

    def _read_port(self) -> int:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            found = re.search(r"ws://\S+:(\d+)", self.log.read_text(errors="replace"))
            if found:
                return int(found[1])
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"The server did not start:\n{self.log.read_text(errors='replace')}")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def held(self) -> Held:
        children = sum(child.memory_info().rss for child in self._ps.children())
        links = self._links()
        of_cache = sum(link.endswith(_CACHE_FILES) for link in links)
        return Held(
            memory=self._ps.memory_info().rss / (1 << 20),
            memory_of_rooms=children / (1 << 20),
            descriptors=len(links) - of_cache,
            of_cache=of_cache,
            threads=self._ps.num_threads(),
        )

    def descriptors(self) -> list[str]:
        """What its descriptors are, but for those on the database of the cache."""
        return [link for link in self._links() if not link.endswith(_CACHE_FILES)]

    def _links(self) -> list[str]:
        links = []
        for link in Path(f"/proc/{self._process.pid}/fd").iterdir():
            try:
                links.append(os.readlink(link))
            except OSError:
                continue
        return sorted(links)

    def busy_share(self, seconds: float) -> float:
        """The part of a core that it uses during so many seconds."""
        before = self._ps.cpu_times()
        time.sleep(seconds)
        after = self._ps.cpu_times()
        return (after.user + after.system - before.user - before.system) / seconds

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def complaints(self) -> list[str]:
        """Lines of its log that say that something went wrong in it."""
        bad = re.compile(r"Traceback|ERROR|CRITICAL|Fatal|Exception ignored|does not know")
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if bad.search(line)]

    def stop(self) -> int:
        if self.is_alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def kill(self) -> None:
        if self.is_alive:
            self._process.kill()
        self._process.wait()
