"""What a request leaves behind: nothing that only the collector of reference cycles could free.

Such objects hold their memory, results of DuckDB among it, until a collection, and collections stop
every thread: they took 4 % of the time of a server that answered small queries only.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import Plugin
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import Wire

TIMES = 5
LARGE = "SELECT range AS a FROM range(500000)"
FOREVER = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range + b.range = 7"

plugin = Plugin("mine")


@plugin.on("greet")
def greet(call: Any) -> str:
    return "Hello"


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0), [plugin])
    with local.connect() as client:
        client.exec("CREATE TABLE known AS SELECT 1 AS a")
    yield local
    local.server.stop()


def request(**fields: Any) -> Callable[[Wire], None]:
    def ask(client: Wire) -> None:
        client.request(**{"type": "arrow", "queryId": "q", **fields})

    return ask


def chunked(client: Wire) -> None:
    client.send(type="arrow", sql=LARGE, queryId="q", stream=True)
    while not client.receive().header["last"]:
        pass


def cancelled(client: Wire) -> None:
    client.send(type="arrow", sql=FOREVER, queryId="q")
    client.send(type="cancel", queryId="q")
    assert {client.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}


def uploaded(client: Wire) -> None:
    table = pa.table({"a": [1]})
    reply = client.upload(table, queryId="q", tableName="uploaded", mode="replace")
    assert reply["type"] == "uploadAck"


def notified(client: Wire) -> None:
    client.request(type="subscribe", channel="c", queryId="q")
    client.request(type="unsubscribe", channel="c", queryId="q")


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(request(sql="SELECT 1"), id="small"),
        pytest.param(request(sql=LARGE), id="large"),
        pytest.param(chunked, id="chunked"),
        pytest.param(request(type="json", sql="SELECT 1"), id="json"),
        pytest.param(request(type="exec", sql="CREATE OR REPLACE TABLE t AS SELECT 1"), id="exec"),
        pytest.param(request(sql="SELECT ?::int", params=[1]), id="params"),
        pytest.param(request(sql="SELECT 1", session="s"), id="session"),
        pytest.param(request(sql="SELECT nothing"), id="error"),
        pytest.param(request(sql=FOREVER, timeoutMs=30), id="timeout"),
        pytest.param(request(sql="SELECT a FROM known", persist=True), id="cached"),
        pytest.param(cancelled, id="cancelled"),
        pytest.param(uploaded, id="upload"),
        pytest.param(notified, id="channel"),
        pytest.param(request(type="greet"), id="plugin"),
    ],
)
def test_a_request_leaves_no_cycles(server: LocalServer, ask: Callable[[Wire], None]) -> None:
    with server.connect() as client:
        for _ in range(2):
            ask(client)
        gc.collect()
        gc.disable()
        try:
            for _ in range(TIMES):
                ask(client)
            # What answered the last one may still be at its end when the answer is here.
            request(sql="SELECT 2")(client)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = Counter(type(one).__qualname__ for one in gc.garbage if is_ours(one))
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert {name: count for name, count in left.items() if count >= TIMES} == {}


def is_ours(one: object) -> bool:
    module = str(type(one).__module__)
    return module.startswith(("sqlrooms_server", "duckdb", "_duckdb", "pyarrow"))
