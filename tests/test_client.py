"""The Python client, against a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pyarrow as pa
import pytest
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from sqlrooms_server.client import RequestFailed, connect
from tests.conftest import LocalServer
from tests.test_queries import ENDLESS


def test_queries_rows_uploads(server: LocalServer) -> None:
    with connect(server.url) as db:
        table = pa.table({"a": [1, 2]})
        db.upload("t", table)
        assert db.query("from t order by a").equals(table)
        assert db.rows("from t order by a") == [{"a": 1}, {"a": 2}]
        db.execute("drop table t")
        assert db.query("create table e(i int)").num_columns == 0
        assert db.rows("create table f(i int)") == []


def test_errors_have_text_and_code(server: LocalServer) -> None:
    with connect(server.url) as db:
        with pytest.raises(RequestFailed, match="Parser Error") as failed:
            db.query("selec")
        assert failed.value.code == "query_error"
        assert db.rows("select 1 as a") == [{"a": 1}]


def test_tokens(launch: Callable[..., LocalServer]) -> None:
    server = launch(auth_token="right")
    with connect(server.url, token="right") as db:
        assert db.rows("select 1 as a") == [{"a": 1}]
    with connect(server.url, token="wrong") as db:
        with pytest.raises((RequestFailed, ConnectionError), match=r"unauthorized|1008"):
            db.query("select 1")


def test_several_threads(server: LocalServer) -> None:
    failures: list[object] = []
    with connect(server.url) as db:

        def ask(number: int) -> None:
            for _ in range(20):
                if db.rows(f"select {number} as n") != [{"n": number}]:
                    failures.append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_a_closed_server_fails_what_waits(launch: Callable[..., LocalServer]) -> None:
    server = launch()
    with connect(server.url) as db:
        codes: list[object] = []

        def ask() -> None:
            try:
                db.query(ENDLESS)
            except RequestFailed as error:
                codes.append(error.code)

        asking = threading.Thread(target=ask)
        asking.start()
        db.query("select 1")
        server.server.stop()
        asking.join()
        assert codes == ["shutting_down"]
        with pytest.raises(ConnectionError):
            db.query("select 1")


def test_nothing_listens() -> None:
    with pytest.raises(OSError):
        connect("ws://127.0.0.1:9")


def test_a_server_that_speaks_something_else_fails_what_waits() -> None:
    def answer(socket: ServerConnection) -> None:
        socket.recv()
        socket.send("[1, 2")

    with serve_websocket(answer, "127.0.0.1", 0) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        port = other.socket.getsockname()[1]
        with connect(f"ws://127.0.0.1:{port}") as db:
            with pytest.raises(ConnectionError, match="no reply"):
                db.query("select 1")
        other.shutdown()
        thread.join()
