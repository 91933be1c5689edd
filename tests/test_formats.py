"""Formats that a client accepts, and compression."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.db.library import DUCKDB_VERSION
from tests.conftest import LocalServer
from tests.streams import stream
from tests.test_chunked_results import MILLION
from tests.wire import Arrow, Wire

VARIANT = "select i, {'a': i}::variant as v from range(3) t(i)"
IS_2 = int(DUCKDB_VERSION.split(".")[0]) >= 2


@pytest.fixture
def server(module_server: LocalServer) -> LocalServer:
    return module_server


@pytest.mark.parametrize("kind", ["arrow", "json"])
@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        (None, None),
        ("arrow", "arrow"),
        ("json", "json"),
        (["arrow"], "arrow"),
        (["json"], "json"),
        (["arrow", "json"], "arrow"),
        (["json", "arrow"], "json"),
        (["parquet", "json", "arrow"], "json"),
        (["json", "json"], "json"),
        (["", "csv", "arrow"], "arrow"),
    ],
)
def test_the_first_that_is_known(wire: Wire, kind: str, format_: Any, expected: Any) -> None:
    reply = wire.request(type=kind, sql="select 1 as a", queryId=1, format=format_)
    if (expected or kind) == "arrow":
        assert reply.header == {"type": "arrow", "queryId": 1}
        assert reply.table().to_pylist() == [{"a": 1}]
    else:
        assert reply == {"type": "json", "queryId": 1, "data": '[{"a":1}]'}


@pytest.mark.parametrize("format_", ["csv", "", "ARROW", [], ["csv"], 5, True, {}, [5], [None]])
def test_formats_that_are_none(wire: Wire, format_: Any) -> None:
    reply = wire.request(type="arrow", sql="select 1", queryId=1, format=format_)
    assert (reply["type"], reply["code"]) == ("error", "bad_request")
    assert "format" in reply["error"]
    assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize("sql", [VARIANT, "select [{'a': 1}::variant] as l"])
@pytest.mark.parametrize("options", [{}, {"session": "s"}, {"maxRows": 2}])
def test_what_arrow_cannot_carry_comes_as_json(wire: Wire, sql: str, options: Any) -> None:
    reply = wire.request(type="arrow", sql=sql, queryId=1, format=["arrow", "json"], **options)
    if IS_2:
        assert isinstance(reply, Arrow)
        return
    plain = wire.request(type="json", sql=sql, queryId=1, **options)
    assert reply == plain
    assert reply["type"] == "json"
    assert json.loads(reply["data"])


@pytest.mark.parametrize("options", [{}, {"format": "arrow"}, {"format": ["arrow"]}])
def test_a_single_format_is_never_replaced(wire: Wire, options: Any) -> None:
    reply = wire.request(type="arrow", sql=VARIANT, queryId=1, **options)
    if IS_2:
        assert isinstance(reply, Arrow)
    else:
        assert (reply["type"], reply["code"]) == ("error", "query_error")
    assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize(
    "sql",
    [
        "insert into t values ({'a': 1}::variant) returning v",
        "select 1; select {'a': 1}::variant as v",
    ],
)
def test_changes_are_made_once_whatever_format_is_used(wire: Wire, sql: str) -> None:
    wire.exec("create or replace table t(v variant)")
    reply = wire.request(type="arrow", sql=sql, queryId=1, format=["arrow", "json"])
    if isinstance(reply, Arrow):
        assert IS_2
    else:
        assert reply["type"] in ("json", "error")
    expected = 1 if sql.startswith("insert") else 0
    assert wire.rows("select count(*) as n from t") == [{"n": expected}]


def test_a_fallback_with_params_and_rows_before_it(wire: Wire) -> None:
    sql = "select {'a': $1}::variant as v, '01:02:03+05'::timetz as t"
    options = {"format": ["arrow", "json"], "params": [7]}
    for session in ({}, {"session": "s"}):
        reply = wire.request(type="arrow", sql=sql, queryId=1, **options, **session)
        if not IS_2:
            assert json.loads(reply["data"]) == [{"v": {"a": 7}, "t": "01:02:03+05"}]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize(
    "sql",
    [
        MILLION,
        "select 1 as a where false",
        "select repeat('a', 1000000) as a",
        "select (['sad', 'ok'])[1 + i % 2]::enum('sad', 'ok') as m from range(99999) t(i)",
    ],
)
def test_compression(wire: Wire, compression: str, sql: str) -> None:
    plain = wire.arrow(sql)
    packed = wire.request(type="arrow", sql=sql, queryId="q", compression=compression)
    assert packed.table().equals(plain.table())
    if plain.table().num_rows:
        assert len(packed.body) < len(plain.body)
        reader = pa.ipc.open_stream(plain.body)
        assert reader.schema.equals(pa.ipc.open_stream(packed.body).schema, check_metadata=True)


def test_compression_chooses_arrow(wire: Wire) -> None:
    for options in ({"format": ["json", "arrow"]}, {"format": ["arrow", "json"]}):
        sql = "select 1 as a"
        reply = wire.request(type="json", sql=sql, queryId=1, compression="lz4", **options)
        assert isinstance(reply, Arrow)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("json", {"compression": "lz4"}, "compression is for the format arrow"),
        ("arrow", {"compression": "zstd", "format": "json"}, "compression is for"),
        ("json", {"stream": True}, "stream is for the format arrow"),
        ("arrow", {"stream": True, "format": ["json"]}, "stream is for the format arrow"),
        ("exec", {"compression": "lz4"}, "compression is for results, and exec has none"),
        ("exec", {"stream": True}, "stream is for results"),
        ("exec", {"maxRows": 1}, "maxRows is for results"),
        ("exec", {"format": "arrow"}, "format is for results"),
        ("arrow", {"window": 5}, "window is for chunked results"),
        ("arrow", {"window": 5, "stream": False}, "window is for chunked results"),
    ],
)
def test_options_that_make_no_sense(wire: Wire, kind: str, options: Any, expected: str) -> None:
    reply = wire.request(type=kind, sql="create table never(i int)", queryId="q", **options)
    assert (reply["type"], reply["code"], reply["queryId"]) == ("error", "bad_request", "q")
    assert expected in reply["error"]
    assert "does not exist" in wire.arrow("from never")["error"]


def test_options_that_are_null_are_none(wire: Wire) -> None:
    names = ["params", "timeoutMs", "maxRows", "progress", "format", "compression"]
    names += ["stream", "window", "session", "somethingNew"]
    options = dict.fromkeys(names)
    for kind in ("arrow", "json", "exec"):
        reply = wire.request(type=kind, sql="select 1 as a", queryId=1, **options)
        header = reply.header if isinstance(reply, Arrow) else reply
        assert header["type"] == ("ok" if kind == "exec" else kind)


def test_a_json_result_in_a_stream_is_arrow(wire: Wire) -> None:
    chunked = stream(wire, "select 1 as a", format=["json", "arrow"])
    assert chunked.table().to_pylist() == [{"a": 1}]
