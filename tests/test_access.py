"""The gate: tokens, origins and hosts, per connection and before every kind of frame."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from sqlrooms_server.access.origins import Origins
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import HttpRequest
from sqlrooms_server.transport.addresses import is_loopback
from tests.conftest import LocalServer
from tests.wire import Wire, framed, ipc

TOKEN = "s3cret+token=/"


@pytest.fixture
def guarded(launch: Callable[..., LocalServer]) -> LocalServer:
    return launch(auth_token=TOKEN, auth_cookie="session")


def assert_refused(wire: Wire) -> None:
    assert wire.receive() == {"type": "error", "error": "unauthorized", "code": "unauthorized"}
    with pytest.raises(ConnectionClosedError) as closed:
        wire.receive()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008


def test_first_message_opens_the_gate(guarded: LocalServer) -> None:
    with guarded.connect() as wire:
        assert wire.request(type="auth", token=TOKEN) == {"type": "authAck"}
        assert wire.table("select 1 as a").num_rows == 1
        assert wire.request(type="auth", token=TOKEN) == {"type": "authAck"}


@pytest.mark.parametrize(
    "message",
    [
        '{"type":"arrow","sql":"select 1","queryId":"q"}',
        '{"type":"auth","token":"wrong"}',
        '{"type":"auth"}',
        '{"type":"hello"}',
        '{"type":"cancel","queryId":"q"}',
        "not json",
        "[]",
        "x" * 1_000_000,
        framed({"type": "uploadArrow", "tableName": "t"}, ipc(pa.table({"a": [1]}))),
        b"loro",
        b"",
    ],
)
def test_anything_else_first_is_refused(guarded: LocalServer, message: Any) -> None:
    with guarded.connect() as wire:
        wire.send_raw(message)
        assert_refused(wire)


def test_a_stranger_whose_message_is_too_large(launch: Callable[..., LocalServer]) -> None:
    with launch(auth_token="t", max_sql_length=1024).connect() as wire:
        wire.send(type="arrow", sql="x" * 2000)
        assert_refused(wire)


def test_nothing_after_a_refusal_is_handled(guarded: LocalServer) -> None:
    with guarded.connect() as wire, guarded.connect(f"/?token={quote(TOKEN)}") as owner:
        wire.send(type="auth", token="wrong")
        # The close may be here before these are on their way.
        with contextlib.suppress(ConnectionClosedError):
            wire.send(type="auth", token=TOKEN)
            wire.send(type="exec", sql="create table pwned as select 1", queryId="p")
        assert_refused(wire)
        assert "does not exist" in owner.arrow("from pwned")["error"]


def test_the_gate_is_per_connection(guarded: LocalServer) -> None:
    with guarded.connect() as known, guarded.connect() as stranger:
        known.request(type="auth", token=TOKEN)
        stranger.send(type="arrow", sql="select 1", queryId="q")
        assert_refused(stranger)
        assert known.table("select 1 as a").num_rows == 1


@pytest.mark.parametrize(
    "options",
    [
        {"additional_headers": {"Authorization": "Bearer secret"}},
        {"additional_headers": {"Authorization": "bearer secret"}},
        {"additional_headers": {"Cookie": "a=b; session=secret; c=d"}},
        {"path": "/some/path?roomId=r&token=secret"},
    ],
)
def test_the_upgrade_may_carry_the_token(
    launch: Callable[..., LocalServer], options: dict[str, Any]
) -> None:
    server = launch(auth_token="secret", auth_cookie="session")
    with server.connect(**options) as wire:
        assert wire.table("select 1 as a").num_rows == 1
        assert wire.request(type="auth", token="secret") == {"type": "authAck"}


def test_an_empty_cookie_is_no_token(guarded: LocalServer) -> None:
    with guarded.connect(additional_headers={"Cookie": "session="}) as wire:
        assert wire.request(type="auth", token=TOKEN) == {"type": "authAck"}


@pytest.mark.parametrize(
    "options",
    [
        {"additional_headers": {"Authorization": "Bearer wrong"}},
        {"path": "/?token=wrong"},
    ],
)
def test_a_wrong_token_in_the_upgrade_is_refused(
    guarded: LocalServer, options: dict[str, Any]
) -> None:
    with guarded.connect(**options) as wire:
        assert_refused(wire)


def test_a_server_without_token_acknowledges_any(wire: Wire) -> None:
    assert wire.request(type="auth", token="whatever") == {"type": "authAck"}
    assert wire.table("select 1 as a").num_rows == 1


def test_a_wrong_token_later_closes_too(guarded: LocalServer) -> None:
    with guarded.connect(f"/?token={quote(TOKEN)}") as wire:
        wire.send(type="auth", token="wrong")
        assert_refused(wire)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:5173",
        "https://localhost",
        "http://127.0.0.1:8000",
        "http://[::1]:3000",
        "http://app.localhost",
    ],
)
def test_pages_of_this_machine_may_connect(server: LocalServer, origin: str) -> None:
    with server.connect(origin=origin) as wire:
        assert wire.table("select 1 as a").num_rows == 1


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "file://",
        "http://localhost@evil.example",
        "http://[::1",
        "chrome-extension://abc",
    ],
)
def test_other_pages_may_not(server: LocalServer, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused, server.connect(origin=origin):
        pass
    assert refused.value.response.status_code == 403
    assert b"--allow-origin" in refused.value.response.body


def test_an_allowed_origin_may_connect(launch: Callable[..., LocalServer]) -> None:
    server = launch(allow_origin=("https://App.example.com/",))
    with server.connect(origin="https://app.example.com") as wire:
        assert wire.table("select 1 as a").num_rows == 1
    with pytest.raises(InvalidStatus), server.connect(origin="https://evil.example"):
        pass


def test_a_foreign_host_is_refused(server: LocalServer) -> None:
    """A domain that was pointed at this machine: DNS rebinding."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {
        "Host": f"rebound.example:{server.port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    connection.request("GET", "/", headers=headers)
    response = connection.getresponse()
    assert response.status == 403
    assert b"--allow-host rebound.example" in response.read()
    connection.close()


@pytest.mark.parametrize(
    ("settings", "host", "origin", "refused"),
    [
        ({}, "localhost:4000", None, False),
        ({}, "[::1]:4000", None, False),
        ({}, "[::1]", None, False),
        ({}, "[::1]evil.example", None, True),
        ({}, "[::1].evil.example:4000", None, True),
        ({}, "", None, True),
        ({}, "192.168.1.5:4000", None, True),
        ({"host": "192.168.1.5"}, "192.168.1.5:4000", None, False),
        ({"allow_host": ("data.example",)}, "DATA.example:80", None, False),
        ({"allow_host": ("*",)}, "any.example", None, False),
        ({"allow_origin": ("*",)}, "localhost", "https://any.example", False),
        ({"allow_origin": ("null",)}, "localhost", "null", False),
    ],
)
def test_rules(settings: dict[str, Any], host: str, origin: str | None, refused: bool) -> None:
    headers = {"host": host}
    if origin is not None:
        headers["origin"] = origin
    request = HttpRequest("GET", "/", "", headers, "127.0.0.1")
    assert bool(Origins(Settings(**settings)).refuses(request)) is refused


def test_loopback_names() -> None:
    for name in ("localhost", "LOCALHOST.", "127.0.0.1", "127.8.9.1", "::1", "a.localhost"):
        assert is_loopback(name), name
    for name in ("", "0.0.0.0", "::", "10.0.0.1", "localhost.com", "127.0.0.1.nip.io"):
        assert not is_loopback(name), name


def test_beyond_loopback_a_token_is_required(
    launch: Callable[..., LocalServer], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StartupError, match=r"SQLROOMS_AUTH_TOKEN.*--insecure-no-auth"):
        launch(host="0.0.0.0")
    open_server = launch(host="0.0.0.0", insecure_no_auth=True)
    assert "full access" in caplog.text and "--insecure-no-auth" in caplog.text
    with open_server.connect() as wire:
        assert wire.table("select 1 as a").num_rows == 1
    server = launch(host="0.0.0.0", auth_token="t")
    with server.connect("/?token=t") as wire:
        assert wire.table("select 1 as a").num_rows == 1
