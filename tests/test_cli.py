"""The command line: help, version, what it prints, how it fails, and what it never prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sqlrooms_server import __version__
from sqlrooms_server.settings import environment_variable, fields, flag
from tests.conftest import LocalServer, ServerProcess
from tests.nursery import Done, Nursery
from tests.wire import DEADLINE


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sqlrooms_server", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def test_help_names_every_setting_and_needs_no_database() -> None:
    done = run("--help", SQLROOMS_LIBUV="/nowhere")
    assert done.returncode == 0
    for field in fields():
        assert f"  {flag(field.name)}" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert "SQLROOMS_" in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"sqlrooms-server {__version__}\n"


def test_the_console_scripts_are_the_same_program() -> None:
    for name in ("sqlrooms-server", "sqlrooms-duckdb-server"):
        script = Path(sys.executable).with_name(name)
        done = subprocess.run([script, "--version"], capture_output=True, text=True)
        assert done.stdout == f"sqlrooms-server {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--port", "x"), "--port must be a whole number"),
        (("--port", "99999"), "--port must be from 0 to 65535"),
        (("--idle-timeout", "5"), "--idle-timeout must be from 8 to 960"),
        (("--max-message-size", "big"), "--max-message-size must be a size such as 128MiB"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
        (("--host", ""), "--host is empty"),
        (("--host", "0.0.0.0"), "a token is needed"),
        (("--db-path", "/proc/none/x.duckdb"), "/proc/none/x.duckdb"),
        (("--config", "/nowhere.toml"), "Cannot read the settings file /nowhere.toml"),
        (("--auth-token-file", "/nowhere"), "Cannot read the token file /nowhere"),
        (("--extensions", "no_such_extension"), "no_such_extension"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    nursery: Nursery, arguments: tuple[str, ...], expected: str
) -> None:
    port = () if "--port" in arguments else ("--port", "0")
    assert expected in failure(nursery.run(*port, *arguments))


def failure(done: Done) -> str:
    """The one line of a command that cannot start."""
    assert (done.returncode, done.stdout) == (2, b"")
    [line] = done.stderr.decode().splitlines()
    return line


def test_a_port_in_use(nursery: Nursery, server: LocalServer) -> None:
    said = failure(nursery.run("--port", str(server.port)))
    assert f"Cannot listen on 127.0.0.1 port {server.port}: Address already in use" in said


def test_an_unknown_option_is_not_guessed() -> None:
    done = run("--db", "x")
    assert done.returncode == 2
    assert "--db" in done.stderr


def test_the_screen_at_start(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    process = serve("--db-path", str(path))
    assert f"ws://localhost:{process.port}" in process.welcome
    assert str(path) in process.welcome
    assert __version__ in process.welcome
    assert "Press Ctrl+C to stop." in process.welcome
    assert len(process.welcome.splitlines()) <= 24
    assert "  rooms " not in process.welcome


def test_the_screen_says_where_rooms_are(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    process = serve("--db-path", str(tmp_path / "my.duckdb"), "--sync")
    assert str(tmp_path / "my.rooms.duckdb") in process.welcome


def test_settings_from_the_environment_and_a_file(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    config = tmp_path / "server.toml"
    config.write_text('meta_namespace = "from_file"\nmax_in_flight = 17\n')
    variable = environment_variable("max_sql_length")
    process = serve("--config", str(config), environment={variable: "2KiB"})
    with process.connect() as wire:
        limits = wire.request(type="hello")["limits"]
        assert (limits["maxInFlight"], limits["maxSqlLength"]) == (17, 2048)
        assert wire.rows("select count(*) as n from from_file.ui_state") == [{"n": 0}]


def test_nothing_secret_is_printed(serve: Callable[..., ServerProcess]) -> None:
    """Neither at start, nor for queries that work or fail, nor for wrong tokens; however much it
    is asked to say."""
    process = serve("--log-level", "debug", environment={"SQLROOMS_AUTH_TOKEN": "TOKENVALUE"})
    with process.connect() as wire:
        wire.request(type="auth", token="TOKENVALUE")
        secret = "create secret (type s3, key_id 'K', secret 'SECRETVALUE')"
        wire.request(type="exec", sql=secret, queryId="SECRETVALUE")
        wire.request(type="json", sql="select 'SECRETVALUE' as a", queryId=1)
        wire.request(type="json", sql="selec 'SECRETVALUE'", queryId=1)
        wire.send_raw('{"type": "SECRETVALUE"')
        wire.receive()
    with process.connect() as wire:
        wire.request(type="auth", token="SECRETVALUE")
    assert process.stop() == 0
    assert "Closed a connection from 127.0.0.1: unauthorized" in process.errors
    for text in (process.welcome, process.errors):
        assert "TOKENVALUE" not in text
        assert "SECRETVALUE" not in text


def test_a_quiet_server_prints_nothing(serve: Callable[..., ServerProcess]) -> None:
    process = serve()
    with process.connect() as wire:
        wire.table("select 1")
        wire.arrow("selec")
    assert process.stop() == 0
    assert process.errors == ""
