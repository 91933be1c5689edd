"""Listening on a Unix socket: its place, its permissions, its clients and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.client import connect, connect_async
from sqlrooms_server.errors import StartupError
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import DEADLINE

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def path(tmp_path: Path) -> str:
    # That of pytest may be longer than a socket may have.
    os.chdir(tmp_path)
    return "s.sock"


@pytest.fixture(autouse=True)
def _back() -> Iterator[None]:
    before = os.getcwd()
    yield
    os.chdir(before)


def ask(path: str, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(path)
        client.sendall(request)
        return client.recv(1000)


def test_everything_over_it(launch: Callable[..., LocalServer], path: str) -> None:
    # A host that would need a token is not listened on.
    local = launch(unix_socket=path, host="0.0.0.0", trusted_proxy=("unix",))
    assert local.port == 0
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    url = f"ws+unix://{os.path.abspath(path)}"
    with connect(url) as db:
        assert db.upload("t", pa.table({"i": range(1_000_000)})) == 1_000_000
        assert db.query("select i, i * 2 as j from t").to_arrow().num_rows == 1_000_000
        (connection,) = local.server.connections.all()
        assert connection.remote_address == "unix"

    async def rows() -> Any:
        async with connect_async(url) as db:
            return await db.rows("select 1 as a")

    assert asyncio.run(rows()) == [{"a": 1}]
    with pytest.raises(ValueError, match="ws\\+unix:///"):
        connect("ws+unix://s.sock")


def test_hosts_and_origins(launch: Callable[..., LocalServer], path: str) -> None:
    launch(unix_socket=path)
    for header, status in (
        (b"Host: localhost", b"200"),
        (b"Host: evil.example", b"403"),
        (b"Host: localhost\r\nOrigin: https://evil.example", b"403"),
    ):
        reply = ask(path, b"GET /connections HTTP/1.1\r\n" + header + b"\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 " + status), header


def test_what_is_in_its_place(launch: Callable[..., LocalServer], path: str) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    local = launch(unix_socket=path, unix_socket_mode="660")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    with pytest.raises(StartupError, match="Another server listens"):
        launch(unix_socket=path)
    assert ask(path, HEALTH).startswith(b"HTTP/1.1 200")
    assert local.server.stop()
    assert not os.path.lexists(path)
    for other, expected in (("file", "no socket"), ("dir", "no socket"), ("link", "no socket")):
        Path("file").write_text("keep")
        os.makedirs("dir", exist_ok=True)
        if not os.path.lexists("link"):
            os.symlink("nowhere", "link")
        with pytest.raises(StartupError, match=expected):
            launch(unix_socket=other)
        assert os.path.lexists(other)
    with pytest.raises(StartupError, match="No such file or directory"):
        launch(unix_socket="none/s.sock")
    with pytest.raises(StartupError, match=r"bytes; the system allows 1\d\d"):
        launch(unix_socket="x" * 110)


def test_that_of_another_server_stays(path: str) -> None:
    first, second = (Server(Settings(unix_socket=path)) for _ in range(2))
    first.start()
    os.rename(path, "moved")
    second.start()
    assert first.stop()
    assert ask(path, HEALTH).startswith(b"HTTP/1.1 200")
    assert second.stop()
    assert sorted(os.listdir()) == ["moved"]


def test_settings() -> None:
    with pytest.raises(StartupError, match="--unix-socket-mode must be three octal digits"):
        Settings(unix_socket_mode="rw")
    with pytest.raises(StartupError, match="--unix-socket has no TLS"):
        Settings(unix_socket="s", tls_cert="c", tls_key="k")


def test_the_command_line(path: str) -> None:
    command = [sys.executable, "-m", "sqlrooms_server", "--unix-socket", path]
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(server.kill)
        assert server.stdout is not None
        welcome = ""
        while "Ctrl+C" not in welcome:
            welcome += server.stdout.readline()
        url = f"ws+unix://{os.path.abspath(path)}"
        assert url in welcome
        assert "curl --unix-socket" in welcome
        query = [*command[:3], "query", "--url", url, "--format", "json", "select 42 as a"]
        done = subprocess.run(query, capture_output=True, timeout=DEADLINE)
        assert json.loads(done.stdout) == [{"a": 42}], done.stderr
        server.send_signal(signal.SIGTERM)
        assert server.wait(DEADLINE) == 0
    assert not os.path.lexists(path)
