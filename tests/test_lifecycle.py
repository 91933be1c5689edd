"""Start and stop: health, signals, what is answered on the way out, and what is left behind."""

from __future__ import annotations

import ctypes
import http.client
import json
import platform
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from websockets.exceptions import ConnectionClosed

from sqlrooms_server import __version__
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.errors import StartupError
from sqlrooms_server.messages import Cancel
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess
from tests.leaks import assert_leaks_nothing
from tests.test_large_results import abort
from tests.test_queries import ENDLESS
from tests.wire import DEADLINE, Wire


def get(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_http_routes(server: LocalServer) -> None:
    assert get(server.port, "/healthz") == (200, b"ok")
    assert get(server.port, "/readyz") == (200, b"ok")
    status, body = get(server.port, "/version")
    version = json.loads(body)
    assert status == 200
    assert set(version) == {"name", "version", "duckdb", "python", "protocol"}
    assert version["name"] == "sqlrooms-server"
    assert version["version"] == __version__
    assert version["duckdb"] == duckdb.__version__
    for path in ("/", "/nothing", "/healthz/x", "/etc/passwd"):
        assert get(server.port, path)[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert get(server.port, "/healthz", method)[0] == 405
    assert get(server.port, "/healthz", "OPTIONS") == (204, b"")


def test_not_ready_when_duckdb_fails(server: LocalServer) -> None:
    server.server.main.database.engine._connection.close()
    assert get(server.port, "/readyz") == (503, b"DuckDB failed")


def test_a_server_that_was_not_started_can_be_stopped() -> None:
    assert Server(Settings(port=0)).stop()


def test_clients_that_leave_are_forgotten(server: LocalServer) -> None:
    """Also those that leave while the last part of a result is on its way."""
    for number in range(30):
        wire = server.connect()
        wire.send(type="arrow", sql=f"from range({(number + 1) * 100_000})", queryId="q")
        if number % 3:
            wire.socket.ping().wait(DEADLINE)
        abort(wire)
    with server.connect() as wire:
        wire.table("select 1")
        deadline = time.monotonic() + DEADLINE
        while len(server.server._transport.connections) > 1:
            assert time.monotonic() < deadline
        clients = server.server.main.requests._clients
        # The answer to the last one is sent a moment before its id is free.
        while len(clients) > 1 or any(client.requests for client in list(clients.values())):
            assert time.monotonic() < deadline


def test_not_ready_while_duckdb_hangs(launch: Callable[..., LocalServer]) -> None:
    """A forced checkpoint waits for a transaction and makes everybody else wait with it."""
    server = launch(threads=1)
    with server.connect() as holder, server.connect() as blocker:
        holder.exec("create sequence begun; create table t as select 1 as i")
        transaction = f"begin; update t set i = nextval('begun'); {ENDLESS}"
        holder.send(type="exec", sql=transaction, queryId="open")
        while blocker.rows("select last_value as v from duckdb_sequences()")[0]["v"] is None:
            pass
        blocker.send(type="exec", sql="force checkpoint", queryId="force")
        status, body = 200, b""
        deadline = time.monotonic() + DEADLINE
        while status == 200 and time.monotonic() < deadline:
            status, body = get(server.port, "/readyz")
        assert (status, body) == (503, b"DuckDB did not answer within 2 s")
        assert get(server.port, "/healthz") == (200, b"ok")
        holder.send(type="cancel", queryId="open")
        while get(server.port, "/readyz")[0] != 200:
            assert time.monotonic() < deadline


def test_not_ready_while_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    opening = threading.Event()

    def open_slowly(*arguments: Any, **options: Any) -> Engine:
        assert opening.wait(DEADLINE)
        return Engine(*arguments, **options)

    monkeypatch.setattr("sqlrooms_server.database.Engine", open_slowly)
    server = Server(Settings(port=0, auth_token="t"))
    starting = threading.Thread(target=server.start)
    starting.start()
    deadline = time.monotonic() + DEADLINE
    while not server._transport.addresses:
        assert time.monotonic() < deadline
    port = server._transport.addresses[0][1]
    try:
        assert get(port, "/readyz") == (503, b"starting")
        assert get(port, "/healthz") == (200, b"ok")
        with Wire(f"ws://127.0.0.1:{port}") as early:
            # A database that takes long must not cost the time that strangers have.
            assert early.request(type="auth", token="t") == {"type": "authAck"}
            early.send(type="arrow", sql="select 42 as answer", queryId="early")
            early.socket.ping().wait(DEADLINE)
            opening.set()
            assert early.receive().table().to_pydict() == {"answer": [42]}
        starting.join(DEADLINE)
        assert get(port, "/readyz") == (200, b"ok")
    finally:
        opening.set()
        starting.join(DEADLINE)
        server.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_answers_what_is_in_flight_and_exits_0(
    serve: Callable[..., ServerProcess], tmp_path: Path, number: int
) -> None:
    path = tmp_path / "s.duckdb"
    process = serve("--db-path", str(path), "--workers", "2")
    with process.connect() as wire:
        wire.exec("create table t as select 42 as answer")
        for query_id in range(5):
            wire.send(type="exec", sql=ENDLESS, queryId=query_id)
        wire.request(type="hello")
        began = time.monotonic()
        process.process.send_signal(number)
        replies = [wire.receive() for _ in range(5)]
        assert {reply["code"] for reply in replies} == {"shutting_down"}
        assert sorted(reply["queryId"] for reply in replies) == list(range(5))
        with pytest.raises(ConnectionClosed) as closed:
            wire.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    assert process.wait() == 0
    assert time.monotonic() - began < 10
    assert not (tmp_path / "s.duckdb.wal").exists()
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("from t").fetchall() == [(42,)]


def test_a_signal_while_results_stream(serve: Callable[..., ServerProcess]) -> None:
    process = serve()
    with process.connect() as wire:
        wire.send(type="arrow", sql="from range(1000000000)", queryId="stream")
        fragments = wire.socket.recv_streaming()
        next(fragments)
        process.process.send_signal(signal.SIGTERM)
        for _ in fragments:
            pass
        error = wire.receive()
        assert (error["queryId"], error["code"]) == ("stream", "shutting_down")
    assert process.wait() == 0


def test_a_stop_takes_five_seconds_whatever_runs(serve: Callable[..., ServerProcess]) -> None:
    """An operator that cannot be interrupted, and a client that does not read its result."""
    process = serve("--workers", "2")
    with process.connect() as stuck, process.connect() as silent:
        sort = "select list_sort(list(hash(range))) from range(30000000)"
        stuck.send(type="exec", sql=sort, queryId="stuck")
        silent.send(type="arrow", sql="from range(1000000000)", queryId="unread")
        stuck.request(type="hello")
        began = time.monotonic()
        assert process.stop() == 0
        # Five by its own clock; the rest is for a busy machine.
        assert time.monotonic() - began < 12


def test_a_second_signal_exits_at_once(serve: Callable[..., ServerProcess]) -> None:
    process = serve("--workers", "1")
    with process.connect() as wire:
        sort = "select list_sort(list(hash(range))) from range(60000000)"
        wire.send(type="exec", sql=sort, queryId="stuck")
        wire.request(type="hello")
        process.process.send_signal(signal.SIGTERM)
        # The first signal has arrived when the port refuses connections.
        deadline = time.monotonic() + DEADLINE
        while is_listening(process.port):
            assert time.monotonic() < deadline
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(DEADLINE) in (0, -signal.SIGTERM)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of a system call")
def test_a_signal_that_another_thread_receives_stops_too(
    serve: Callable[..., ServerProcess],
) -> None:
    """The system chooses the thread; here it is not the main one."""
    for position in (0, -1):
        process = serve()
        others = threads_that_take_signals(process.pid) - {process.pid}
        # tgkill, which Python does not offer for other processes.
        ctypes.CDLL(None).syscall(234, process.pid, sorted(others)[position], int(signal.SIGTERM))
        assert process.wait() == 0


def threads_that_take_signals(pid: int) -> set[int]:
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        blocked = re.search(r"SigBlk:\s*(\w+)", (thread / "status").read_text())
        assert blocked is not None
        if not int(blocked[1], 16) & 1 << (signal.SIGTERM - 1):
            found.add(int(thread.name))
    return found


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_new_requests_while_draining_are_refused(launch: Callable[..., LocalServer]) -> None:
    local = launch(workers=1)
    with local.connect() as wire, local.connect() as other:
        sort = "select list_sort(list(hash(range))) from range(20000000)"
        wire.send(type="exec", sql=sort, queryId="stuck")
        wire.request(type="hello")
        stopper = threading.Thread(target=local.server.stop)
        stopper.start()
        codes = set()
        try:
            while True:
                reply = other.request(type="exec", sql="select 1", queryId="late")
                codes.add(reply.get("code", "ok"))
        except ConnectionClosed:
            pass
        stopper.join()
        assert codes <= {"ok", "shutting_down"}


def test_two_servers_in_one_process(launch: Callable[..., LocalServer], tmp_path: Path) -> None:
    first, second = launch(), launch(db_path=str(tmp_path / "b.duckdb"))
    with first.connect() as a, second.connect() as b:
        a.exec("create table only_here as select 1 as i")
        assert "does not exist" in b.arrow("from only_here")["error"]
        assert a.rows("from only_here") == [{"i": 1}]
    first.server.stop()
    with second.connect() as b:
        assert b.rows("select 1 as i") == [{"i": 1}]


def test_many_servers_leave_no_threads_or_files() -> None:
    def cycle() -> None:
        local = LocalServer(Settings(port=0, workers=2))
        with local.connect() as wire:
            assert wire.table("select 1 as a").num_rows == 1
        assert local.server.stop()

    threads = ("uws", "worker", "interrupter", "checkpoint", "readyz", "ping")
    assert_leaks_nothing(cycle, threads)


def test_a_failed_start_leaves_nothing_open(
    launch: Callable[..., LocalServer], tmp_path: Path
) -> None:
    path = str(tmp_path / "x.duckdb")
    taken = launch()
    with pytest.raises(StartupError, match="another program listens there"):
        Server(Settings(port=taken.port, db_path=path)).start()
    assert not [t for t in threading.enumerate() if t.name == "worker-7"]
    with launch(db_path=path).connect() as wire:
        assert wire.table("select 1 as a").num_rows == 1


def test_stop_can_be_called_twice(launch: Callable[..., LocalServer]) -> None:
    local = launch()
    assert local.server.stop()
    assert local.server.stop()


def test_a_hundred_connections_of_queries(server: LocalServer) -> None:
    wires = [server.connect() for _ in range(100)]
    for number, wire in enumerate(wires):
        wire.send(type="arrow", sql=f"select {number} as n", queryId="q")
    for number, wire in enumerate(wires):
        assert wire.receive().table().to_pydict() == {"n": [number]}
        wire.__exit__()


def test_abrupt_disconnects_in_every_phase(server: LocalServer) -> None:
    """Late results meet closed sockets: nothing may touch those."""
    sqls = ["select 1", "from range(3000000)", "selec", "select 1; select 2", ENDLESS]
    for number in range(60):
        wire = server.connect()
        sql = sqls[number % 5]
        for query_id in range(6):
            kind = ("arrow", "json", "exec")[query_id % 3]
            wire.send(type=kind, sql=sql, queryId=query_id)
        if number % 2 and sql is not ENDLESS:
            wire.receive()
        abort(wire)
    with server.connect() as alive:
        assert alive.table("select 1 as a").num_rows == 1


def test_a_killed_server_can_start_again_on_its_port(serve: Callable[..., ServerProcess]) -> None:
    """The connections of the dead one stay for a minute; a live one is not to be joined."""
    process = serve()
    with process.connect() as wire:
        wire.table("select 1")
        process.stop(signal.SIGKILL)
    for _ in range(2):
        again = serve("--port", str(process.port))
        assert again.port == process.port
        with again.connect() as wire:
            wire.table("select 1")
            with pytest.raises(AssertionError, match="Address already in use"):
                serve("--port", str(process.port))
            again.stop(signal.SIGKILL)


def test_a_message_whose_handler_fails_is_answered(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(peer: object, message: object) -> None:
        raise ZeroDivisionError("a defect")

    with server.connect() as wire:
        wire.table("select 1")
        server.server.main.dispatch.handlers[Cancel] = fail
        reply = wire.request(type="cancel", queryId=7)
        assert (reply["type"], reply["queryId"], reply["code"]) == ("error", 7, "internal")
        assert "a defect" in caplog.text and "a defect" not in reply["error"]
        wire.table("select 1")
