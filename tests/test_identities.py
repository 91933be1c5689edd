"""Who is connected and what that one may do, over real connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import psutil
import pyarrow as pa
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sqlrooms_server.errors import StartupError
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess, started
from tests.test_tokens import ENTRY, SECRET, claims, digest
from tests.wire import DEADLINE, Wire

TOKENS = f"""
[roles.guest]
read_channels = ["news", "to/{{user}}"]
write_channels = ["wall"]
read_rooms = ["plan", "notes"]
write_rooms = ["notes"]

[roles.hasty]
request_rate = 2
write_channels = ["wall"]

[roles.modest]
max_result_rows = 3
query_timeout = 1

[tokens.ada]
role = "admin"
hash = "{digest("ada-token")}"

[tokens.bob]
role = "guest"
hash = "{digest("bob-token")}"

[tokens.eve]
role = "hasty"
hash = "{digest("eve-token")}"

[tokens.kim]
role = "modest"
hash = "{digest("kim-token")}"

[jwt]
secret_file = "secret"
"""


IN_TERMINAL = """
import fcntl, sys, termios
from sqlrooms_server.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main(sys.argv[1:])
"""


def token_file(directory: Path, text: str = TOKENS) -> str:
    (directory / "secret").write_text(SECRET)
    path = directory / "tokens.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    path = token_file(tmp_path_factory.mktemp("tokens"))
    local = LocalServer(Settings(port=0, tokens=path, sync=True, max_auth_failures=1000))
    yield local
    local.server.stop()


def authenticated(server: LocalServer | ServerProcess, token: str) -> Wire:
    wire = server.connect()
    assert wire.request(type="auth", token=token) == {"type": "authAck"}
    return wire


def close_code(wire: Wire) -> tuple[int, list[Any]]:
    """The code that the connection is closed with, and what came before."""
    received = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            received.append(wire.receive())
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, received


def test_channels_of_a_role(shared: LocalServer) -> None:
    with authenticated(shared, "bob-token") as bob, authenticated(shared, "ada-token") as ada:
        assert bob.request(type="subscribe", channel="news")["type"] == "subscribed"
        assert bob.request(type="subscribe", channel="to/bob")["type"] == "subscribed"
        assert bob.request(type="subscribe", channel="to/ada", queryId=1) == {
            "type": "error",
            "error": "The role 'guest' may not hear channel 'to/ada' (read_channels).",
            "code": "forbidden",
            "channel": "to/ada",
            "queryId": 1,
        }
        assert bob.request(type="notify", channel="news", payload=1, queryId=2) == {
            "type": "error",
            "error": "The role 'guest' may not send to channel 'news' (write_channels).",
            "code": "forbidden",
            "channel": "news",
            "queryId": 2,
        }
        assert ada.request(type="subscribe", channel="wall")["type"] == "subscribed"
        bob.send(type="notify", channel="wall", payload=3)
        assert ada.receive() == {"type": "notify", "channel": "wall", "payload": 3}


def test_a_name_is_not_chosen_by_the_client(shared: LocalServer) -> None:
    with authenticated(shared, "bob-token") as bob, authenticated(shared, "ada-token") as ada:
        bob.request(type="hello", user="ada")
        bob.request(type="subscribe", channel="news")
        told = ada.request(type="notify", channel="news", payload=1, to={"user": "ada"}, queryId=1)
        assert told["delivered"] == 0
        ada.request(type="subscribe", channel="news")
        members = ada.request(type="presence", channel="news")["members"]
        assert sorted(member["user"] for member in members) == ["ada", "bob"]


def test_rooms_of_a_role(shared: LocalServer) -> None:
    with authenticated(shared, "bob-token") as bob:
        refused = bob.request(type="crdt-join", roomId="secret")
        assert refused["code"] == "forbidden" and refused["roomId"] == "secret"
        assert bob.request(type="crdt-join", roomId="plan")["type"] == "crdt-joined"
        assert bob.receive()["type"] == "crdt-snapshot"
        bob.send_raw(b"loro" + bytes(20))
        assert bob.receive() == {
            "type": "error",
            "error": "The role 'guest' may not change room 'plan' (write_rooms).",
            "code": "forbidden",
            "roomId": "plan",
        }
        assert bob.request(type="crdt-snapshot", roomId="plan", data="AAAA")["code"] == "forbidden"
        assert bob.request(type="crdt-join", roomId="notes")["type"] == "crdt-joined"


def http_status(server: LocalServer, method: str, path: str, token: str, body: Any = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse().status


def test_requests_over_http_have_a_role(shared: LocalServer) -> None:
    assert http_status(shared, "POST", "/channels/wall", "bob-token", 1) == 200
    assert http_status(shared, "POST", "/channels/news", "bob-token", 1) == 403
    assert http_status(shared, "POST", "/channels/news", "ada-token", 1) == 200
    assert http_status(shared, "POST", "/channels/wall", "x", 1) == 401
    assert http_status(shared, "GET", "/connections", "ada-token") == 200
    assert http_status(shared, "GET", "/connections", "bob-token") == 403


def test_requests_of_a_hasty_role(shared: LocalServer) -> None:
    with authenticated(shared, "eve-token") as wire:
        answers = [wire.request(type="hello") for _ in range(20)]
        busy = [answer for answer in answers if answer["type"] == "error"]
        assert busy and busy[0] == {
            "type": "error",
            "error": "This connection sends more than 2 requests a second, which is the limit of "
            "role 'hasty'.",
            "code": "busy",
        }
        # It ends what it began whenever it likes.
        assert wire.request(type="cancel", queryId=1)["type"] == "cancelAck"
    statuses = {http_status(shared, "POST", "/channels/wall", "eve-token", 1) for _ in range(20)}
    assert statuses == {200, 429}


def test_results_of_a_modest_role(shared: LocalServer) -> None:
    with authenticated(shared, "kim-token") as kim, authenticated(shared, "ada-token") as ada:
        for kept in (False, True, True):
            options = {"type": "json", "sql": "from range(9)", "queryId": 1, "persist": kept}
            assert len(json.loads(ada.request(**options)["data"])) == 9
            refused = kim.request(**options)
            assert refused["code"] == "too_large"
            assert "more than 3 rows (max_result_rows of role 'modest')" in refused["error"]
            cut = kim.request(**options, maxRows=5)
            assert len(json.loads(cut["data"])) == 3
            assert cut["truncatedBy"] == "max_result_rows of role 'modest'"
            assert len(json.loads(kim.request(**options, maxRows=2)["data"])) == 2
        endless = "select max(a.range * b.range) from range(10000000) a, range(10000000) b"
        late = kim.request(type="json", sql=endless, queryId=2)
        assert late["code"] == "timeout" and "query_timeout of role 'modest'" in late["error"]
        refused = kim.request(type="live", sql="from range(9)", queryId=3)
        assert "max_result_rows of role 'modest'" in refused["error"]


def test_sql_of_a_role(shared: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    read = f"select * from read_csv('{tmp_path}/a.csv')"
    with authenticated(shared, "bob-token") as bob, authenticated(shared, "ada-token") as ada:
        ada.exec("create or replace table kept as select 1 as a")
        assert ada.rows(read) == bob.rows("from kept") == [{"a": 1}]
        for sql in (read, "insert into kept values (2)", "install httpfs", "set threads = 1"):
            refused = bob.request(type="exec", sql=sql, queryId=1)
            assert refused["code"] == "forbidden" and "role 'guest'" in refused["error"], refused
        assert bob.upload(pa.table({"a": [3]}), tableName="kept", queryId=2)["code"] == "forbidden"
        assert ada.rows("from kept") == [{"a": 1}]


def signed(seconds: float, **more: Any) -> str:
    # What the clocks may differ counts from when it has expired.
    return jwt.encode(claims(role="guest", exp=time.time() - 30 + seconds, **more), SECRET)


def test_an_expired_token_ends_the_connection(shared: LocalServer) -> None:
    with authenticated(shared, signed(2)) as wire, authenticated(shared, signed(2)) as renewed:
        # Another token of the same user keeps the connection.
        assert renewed.request(type="auth", token=signed(60)) == {"type": "authAck"}
        code, received = close_code(wire)
        assert code == 1008
        assert received == [
            {
                "type": "error",
                "error": "unauthorized: the token has expired",
                "code": "unauthorized",
            }
        ]
        assert renewed.request(type="hello")["type"] == "welcome"
        # One of another user does not.
        code, _ = close_code_after(renewed, type="auth", token=signed(60, sub="mallory"))
        assert code == 1008


def close_code_after(wire: Wire, **fields: Any) -> tuple[int, list[Any]]:
    wire.send(**fields)
    return close_code(wire)


def test_users_of_a_proxy(launch: Callable[..., LocalServer], tmp_path: Path) -> None:
    path = token_file(tmp_path, TOKENS + '[proxy]\nuser_header = "X-User"\nrole = "guest"\n')
    behind = launch(tokens=path, trusted_proxy=("127.0.0.1",))
    with behind.connect(additional_headers={"X-User": "zoe"}) as zoe:
        assert zoe.request(type="subscribe", channel="to/zoe")["type"] == "subscribed"
        assert zoe.request(type="subscribe", channel="to/bob")["code"] == "forbidden"
    for lines in ([("X-User", "bob"), ("X-User", "zoe")], [("X-Users", "bob")]):
        with behind.connect(additional_headers=lines) as wire:
            wire.send(type="hello")
            assert close_code(wire)[0] == 1008
    with launch(tokens=path).connect(additional_headers={"X-User": "zoe"}) as stranger:
        assert close_code_after(stranger, type="hello")[0] == 1008


def test_strangers_have_little_time(launch: Callable[..., LocalServer]) -> None:
    server = launch(auth_token="t", auth_timeout=1, max_strangers=2)
    with server.connect() as silent, server.connect("/?token=t") as known, server.connect():
        with pytest.raises(InvalidStatus) as refused:
            server.connect()
        assert refused.value.response.status_code == 503
        assert b"--max-strangers" in (refused.value.response.body or b"")
        with server.connect("/?token=t") as other:
            assert other.rows("select 1 as a") == [{"a": 1}]
        # One address cannot keep all others out.
        with server.connect(source_address=("127.0.0.2", 0)) as elsewhere:
            code, received = close_code(silent)
            assert code == 1008 and "--max-strangers" in received[0]["error"]
            assert elsewhere.request(type="auth", token="t") == {"type": "authAck"}
        with server.connect() as slow:
            code, received = close_code(slow)
            assert code == 1008 and "--auth-timeout" in received[0]["error"]
        assert known.rows("select 1 as a") == [{"a": 1}]
        with server.connect() as late:
            assert late.request(type="auth", token="t") == {"type": "authAck"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a socket has received")
def test_strangers_fill_no_memory(launch: Callable[..., LocalServer]) -> None:
    """A message that is not complete is kept until it is, or the time of its sender is over."""
    server = launch(auth_token="t", auth_timeout=3600)
    with server.connect() as stranger, server.connect() as other:
        raw = stranger.socket.socket
        raw.sendall(b"\x82\xff" + (100 << 20).to_bytes(8, "big") + bytes(4))
        deadline = time.monotonic() + DEADLINE
        # Its own thread may close the socket first.
        with pytest.raises(OSError):
            for _ in range(99):
                raw.sendall(bytes(1 << 20))
            while time.monotonic() < deadline:
                raw.sendall(b"x")
                time.sleep(0.001)
        assert other.request(type="auth", token="t") == {"type": "authAck"}
        # Who is known sends what it likes.
        table = pa.table({"a": list(range(100_000))})
        assert other.upload(table, tableName="t", queryId=1)["type"] == "uploadAck"


def test_guessing_ends_after_some_failures(launch: Callable[..., LocalServer]) -> None:
    server = launch(auth_token="right", max_auth_failures=3)
    with server.connect("/?token=right") as known:
        for number in range(3):
            with server.connect(f"/?token=guess{number}") as wire:
                assert close_code(wire)[0] == 1008
        # Those that were right before go on.
        with pytest.raises(InvalidStatus) as refused:
            server.connect("/?token=guess")
        assert refused.value.response.status_code == 429
        with server.connect() as wire:
            code, received = close_code_after(wire, type="auth", token="guess")
            assert code == 1008 and "--max-auth-failures" in received[0]["error"]
        # Requests of pages, which may lack an origin, keep nobody from connecting.
        guesses = [http_status(server, "GET", "/connections", "guess") for _ in range(4)]
        assert guesses == [401, 401, 401, 429]
        with server.connect("/?token=right") as again:
            assert again.request(type="auth", token="right") == {"type": "authAck"}
        assert known.rows("select 1 as a") == [{"a": 1}]


def test_the_file_is_read_again_on_a_signal(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    path = Path(token_file(tmp_path))
    process = serve("--tokens", str(path), "--log-level", "debug")

    def reload(text: str) -> None:
        path.write_text(text)
        os.kill(process.pid, signal.SIGHUP)

    with authenticated(process, "ada-token") as ada, authenticated(process, "bob-token") as bob:
        eve = authenticated(process, "eve-token")
        guest = authenticated(process, signed(60))
        changed = TOKENS.replace("request_rate = 2", "request_rate = 3")
        removed = changed.replace(digest("bob-token"), digest("other-token"))
        reload("= nonsense")
        # It changes nothing. Signals that come together are one.
        told = next(line for line in process.process.stderr if b"stay as they were" in line)
        assert b"The tokens stay as they were. The token file" in told
        reload(removed)
        code, received = close_code(bob)
        assert code == 1008
        assert received[0]["error"] == "unauthorized: the token is no longer valid"
        # Whose role has changed comes back with the new one.
        assert close_code(eve)[0] == 1012
        assert ada.rows("select 1 as a") == [{"a": 1}]
        assert guest.request(type="hello")["type"] == "welcome"
        with authenticated(process, "other-token") as other:
            assert other.request(type="subscribe", channel="to/bob")["type"] == "subscribed"
        with process.connect() as wire:
            assert close_code_after(wire, type="auth", token="bob-token")[0] == 1008
    assert process.stop() == 0
    for secret in ("ada-token", "bob-token", "other-token", SECRET, digest("ada-token")):
        assert secret not in process.errors


def test_it_ends_with_its_terminal(tmp_path: Path) -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, "--port", "0", "--tokens", token_file(tmp_path)]
    with subprocess.Popen(command, stdin=its, stdout=subprocess.PIPE, start_new_session=True) as it:
        os.close(its)
        assert it.stdout is not None
        for line in it.stdout:
            if b"Ctrl+C" in line:
                break
        os.close(ours)
        try:
            assert it.wait(DEADLINE) == 0
        finally:
            it.kill()


def test_a_token_is_nowhere_to_be_seen(serve: Callable[..., ServerProcess]) -> None:
    secret = "TOP-SECRET-TOKEN"
    arguments = ("--auth-token", secret, "--log-level", "debug", "--query-timeout", "77")
    process = serve(*arguments, "--sync", start=started)
    command_line = Path(f"/proc/{process.pid}/cmdline")
    if command_line.exists():
        shown = command_line.read_bytes()
        assert b"--query-timeout" in shown and secret.encode() not in shown
    with process.connect() as stranger:
        close_code_after(stranger, type="auth", token=secret + "x")
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request("GET", f"/version?token={secret}")
        body = connection.getresponse().read().decode()
        connection.request("GET", "/version")
        assert json.loads(connection.getresponse().read()).keys() == {"name", "protocol"}
    with Wire(f"{process.url}/?token={secret}") as wire:
        # Its extension is missing, or not; it is not repeated in either case.
        sql = "create secret s (type s3, key_id 'AKIA', secret 'HIDDEN-KEY')"
        reply = wire.request(type="exec", queryId=1, sql=sql)
        secrets = wire.request(type="json", queryId=2, sql="select * from duckdb_secrets()")
        settings = wire.request(type="json", queryId=3, sql="select * from duckdb_settings()")
        assert wire.request(type="crdt-join", roomId="r")["type"] == "crdt-joined"
        (documents,) = psutil.Process(process.pid).children()
        assert secret not in json.dumps([documents.environ(), documents.cmdline()])
    assert process.stop() == 0
    told = [body, process.welcome, process.errors, json.dumps([reply, secrets, settings])]
    for text in told:
        assert secret not in text and "HIDDEN-KEY" not in text


def test_a_file_that_is_wrong_prevents_the_start(tmp_path: Path) -> None:
    path = token_file(tmp_path, ENTRY.replace("admin", "adm"))
    with pytest.raises(StartupError, match="names the role 'adm'"):
        Server(Settings(port=0, tokens=path))
