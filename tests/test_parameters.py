"""Values bound by DuckDB: every type of the table in ``docs/protocol.md``, and what is refused."""

from __future__ import annotations

import base64
import datetime
import json
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import psutil
import pyarrow as pa
import pytest

from tests.conftest import LocalServer, ServerProcess
from tests.streams import stream
from tests.test_large_results import reader_of
from tests.test_queries import ENDLESS
from tests.wire import Arrow, Wire


@pytest.fixture
def server(module_server: LocalServer) -> LocalServer:
    return module_server


def value_of(wire: Wire, expression: str, params: Any) -> Any:
    """``expression`` and the name of its type, both as DuckDB's text."""
    sql = f"select ({expression})::varchar as v, typeof({expression}) as t"
    reply = wire.request(type="arrow", sql=sql, queryId="p", params=params)
    assert isinstance(reply, Arrow), reply
    row = reply.table().to_pylist()[0]
    return row["v"], row["t"]


def refused(wire: Wire, params: Any, sql: str = "select $1 as a", **options: Any) -> str:
    reply = wire.request(type="arrow", sql=sql, queryId="p", params=params, **options)
    assert not isinstance(reply, Arrow), reply.table()
    assert (reply["type"], reply["code"]) == ("error", "bad_request"), reply
    assert reply["queryId"] == "p"
    return str(reply["error"])


PLAIN = [
    (None, None, '"NULL"'),
    (True, "true", "BOOLEAN"),
    (False, "false", "BOOLEAN"),
    (0, "0", "INTEGER"),
    (-(2**31), str(-(2**31)), "INTEGER"),
    (2**31, str(2**31), "BIGINT"),
    (2**63 - 1, str(2**63 - 1), "BIGINT"),
    (-(2**63), str(-(2**63)), "BIGINT"),
    (2**127 - 1, str(2**127 - 1), "HUGEINT"),
    (-(2**127), str(-(2**127)), "HUGEINT"),
    (2**127, str(2**127), "UHUGEINT"),
    (2**128 - 1, str(2**128 - 1), "UHUGEINT"),
    (1.5, "1.5", "DOUBLE"),
    (1e300, "1e+300", "DOUBLE"),
    (5e-324, "5e-324", "DOUBLE"),
    ("", "", "VARCHAR"),
    ("ünïcode 😀 ' \" ; --", "ünïcode 😀 ' \" ; --", "VARCHAR"),
    ("'; drop table t; --", "'; drop table t; --", "VARCHAR"),
    ([1, 2, None], "[1, 2, NULL]", "INTEGER[]"),
    ([1, 2.5], "[1.0, 2.5]", "DOUBLE[]"),
    ([1, "a"], "[1, a]", "VARCHAR[]"),
    ([[1], [], [2, 3]], "[[1], [], [2, 3]]", "INTEGER[][]"),
    ({"a": 1, "b c": ["x"]}, "{'a': 1, 'b c': [x]}", 'STRUCT(a INTEGER, "b c" VARCHAR[])'),
    ({"key": ["a", "b"], "value": [1, 2]}, "{a=1, b=2}", "MAP(VARCHAR, INTEGER)"),
    ({"key": ["a"], "value": "x"}, "{'key': [a], 'value': x}", None),
    ({"key": ["a"], "value": [1, 2]}, "{'key': [a], 'value': [1, 2]}", None),
    ({"key": "a"}, "{'key': a}", None),
    # DuckDB would take these for a MAP as well, and fail.
    ({"key": "a", "value": "b"}, "{'key': a, 'value': b}", None),
    ([{"value": "b", "key": "a"}], "[{'value': b, 'key': a}]", None),
    ({"key": "ab", "value": [1, 2]}, "{'key': ab, 'value': [1, 2]}", None),
    ({"key": "ab", "value": {"x": 1, "y": 2}}, "{'key': ab, 'value': {'x': 1, 'y': 2}}", None),
    ({"key": None, "value": [1]}, "{'key': NULL, 'value': [1]}", None),
    ({"key": 1, "value": [1]}, "{'key': 1, 'value': [1]}", None),
    ({"key": {"a": 1}, "value": [1, 2]}, "{'key': {'a': 1}, 'value': [1, 2]}", None),
]


@pytest.mark.parametrize(("value", "text", "type_"), PLAIN)
def test_plain_values(wire: Wire, value: Any, text: str | None, type_: str | None) -> None:
    found, found_type = value_of(wire, "$1", [value])
    assert found == text
    assert type_ in (None, found_type)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


TYPED = [
    ("DECIMAL(18,3)", "1.100", "1.100", None),
    ("DECIMAL(38,10)", "-1234567890123456789012345678.0123456789", None, None),
    ("HUGEINT", "170141183460469231731687303715884105727", None, None),
    ("HUGEINT", 2**127 - 1, str(2**127 - 1), None),
    ("UHUGEINT", str(2**128 - 1), None, None),
    ("BIGNUM", "9" * 100, None, None),
    ("BIGNUM", "-" + "9" * 100, None, None),
    ("BIGINT", "9007199254740993", None, None),
    ("BIGINT", 7, "7", None),
    ("TINYINT", -128, "-128", None),
    ("UTINYINT", "255", None, None),
    ("FLOAT", 0.5, "0.5", None),
    ("DOUBLE", "nan", None, None),
    ("DOUBLE", "-infinity", "-inf", None),
    ("TIMESTAMP", "2026-01-02 03:04:05.123456", None, None),
    ("TIMESTAMP", "infinity", None, None),
    ("TIMESTAMP_NS", "2026-01-02 03:04:05.123456789", None, None),
    ("TIMESTAMP_S", "2026-01-02 03:04:05", None, None),
    ("TIMESTAMP_MS", "1969-12-31 23:59:59.999", None, None),
    ("DATE", "0001-02-03", None, None),
    ("DATE", "2026-01-02", None, None),
    ("TIME", "24:00:00", None, None),
    ("TIMETZ", "01:02:03+05", None, "TIME WITH TIME ZONE"),
    ("INTERVAL", "1 month 2 days", "1 month 2 days", None),
    ("UUID", "6f1e8bbb-2a5a-4b5e-8c0a-0123456789ab", None, None),
    ("BLOB", b64(b"a\x00\xff"), "a\\x00\\xFF", None),
    ("BLOB", "", "", None),
    ("BIT", "010011", None, None),
    ("BOOLEAN", "true", None, None),
    ("JSON", '{"a": [1, 2]}', None, None),
    ("VARCHAR", "text", None, None),
    ("ENUM('a', 'b')", "b", None, None),
    ("INTEGER[]", [1, None, 3], "[1, NULL, 3]", None),
    ("INTEGER[3]", [1, 2, 3], "[1, 2, 3]", None),
    ("HUGEINT[]", ["1", str(2**100)], f"[1, {2**100}]", None),
    ("STRUCT(a DECIMAL(9,2), b DATE)", {"a": "1.10", "b": "2026-01-02"}, None, None),
    ("MAP(VARCHAR, INTEGER)", {"key": ["a"], "value": [1]}, "{a=1}", None),
    ("MAP(VARCHAR, INTEGER)", {"a": 1}, "{a=1}", None),
    ("INTEGER", None, None, '"NULL"'),
]


@pytest.mark.parametrize(("type_", "value", "text", "as_type"), TYPED)
def test_typed_values(wire: Wire, type_: str, value: Any, text: str | None, as_type: Any) -> None:
    found, found_type = value_of(wire, "$1", [{"$type": type_, "value": value}])
    if type_.startswith("STRUCT"):
        assert found == "{'a': 1.10, 'b': 2026-01-02}"
    else:
        assert found == (value if text is None else text)
    assert found_type == (type_ if as_type is None else as_type)


def test_a_timestamp_with_time_zone(wire: Wire) -> None:
    value = {"$type": "TIMESTAMPTZ", "value": "2026-01-02 03:04:05.123456+02"}
    sql = "select $1 as a, typeof($1) as t"
    reply = wire.request(type="arrow", sql=sql, queryId=1, params=[value])
    row = reply.table().to_pylist()[0]
    expected = datetime.datetime(2026, 1, 2, 1, 4, 5, 123456, tzinfo=datetime.timezone.utc)
    assert row == {"a": expected, "t": "TIMESTAMP WITH TIME ZONE"}


def test_typed_values_inside_of_others(wire: Wire) -> None:
    inner = {"$type": "DECIMAL(18,3)", "value": "1.100"}
    assert value_of(wire, "$1", [[inner, inner]]) == ("[1.100, 1.100]", "DECIMAL(18,3)[]")
    assert value_of(wire, "$1", [{"a": inner}]) == ("{'a': 1.100}", "STRUCT(a DECIMAL(18,3))")
    nested = {"a": [{"b": {"$type": "BLOB", "value": b64(b"\x01")}}]}
    assert value_of(wire, "($1).a[1].b", [nested]) == ("\\x01", "BLOB")


def test_values_come_back_exactly(wire: Wire) -> None:
    params = [
        {"$type": "DECIMAL(38,5)", "value": "123456789012345678901234567890123.00001"},
        {"$type": "BLOB", "value": b64(bytes(range(256)))},
        0.1,
        2**53 + 1,
    ]
    reply = wire.request(
        type="arrow", sql="select $1 as a, $2 as b, $3 as c, $4 as d", queryId=1, params=params
    )
    row = reply.table().to_pylist()[0]
    assert row["a"] == Decimal("123456789012345678901234567890123.00001")
    assert row["b"] == bytes(range(256))
    assert row["c"] == 0.1
    assert row["d"] == 2**53 + 1


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("select ? + ? as a", [40, 2]),
        ("select $1 + $2 as a", [40, 2]),
        ("select $2 + $1 as a", [2, 40]),
        ("select $1 + $1 + $2 as a", [20, 2]),
        ("select $left + $right as a", {"left": 40, "right": 2}),
        ("select $Left + $LEFT as a", {"left": 21}),
        ("select $1 + $2 as a", {"1": 40, "2": 2}),
        ("select 42 as a", []),
        ("select 42 as a", {}),
        ("from (values (?), (?)) t(a) where a > ? limit ?", [1, 42, 2, 1]),
        ("with c as (select $x as a) from c", {"x": 42}),
        ("select a::int as a from (select $1 as a)", ["42"]),
    ],
)
@pytest.mark.parametrize("kind", ["arrow", "json", "exec"])
def test_ways_to_write_them(wire: Wire, kind: str, sql: str, params: Any) -> None:
    for _ in range(2):
        reply = wire.request(type=kind, sql=sql, queryId=1, params=params)
        if kind == "arrow":
            assert reply.table().to_pylist() == [{"a": 42}]
        elif kind == "json":
            assert json.loads(reply["data"]) == [{"a": 42}]
        else:
            assert reply == {"type": "ok", "queryId": 1}


def test_statements_that_change_rows(wire: Wire) -> None:
    wire.exec("create or replace table t(i int, s varchar, d date)")

    def rows(sql: str, params: Any) -> Any:
        reply = wire.request(type="arrow", sql=sql, queryId=1, params=params)
        return reply.table().to_pylist()

    insert = "insert into t values (?, ?, ?), (?, ?, ?)"
    assert rows(insert, [1, "a", "2026-01-02", 2, "b'c", None]) == [{"Count": 2}]
    assert rows("update t set s = $s where i = $i", {"s": "x", "i": 1}) == [{"Count": 1}]
    day = datetime.date(2026, 1, 2)
    assert rows("delete from t where i = $1 returning *", [1]) == [{"i": 1, "s": "x", "d": day}]
    assert rows("insert into t values ($1, $2, $3) returning i", [3, "y", None]) == [{"i": 3}]
    assert rows("create or replace table u as select $1 as a", [7]) == [{"Count": 1}]
    assert rows("from u where a = ?", [7]) == [{"a": 7}]
    reply = wire.request(
        type="exec", sql="insert into u select unnest($1)", queryId=1, params=[[1, 2]]
    )
    assert reply["type"] == "ok"
    assert wire.rows("select count(*) as n from u") == [{"n": 3}]


@pytest.mark.parametrize("kind", ["arrow", "json", "exec"])
def test_they_belong_to_the_last_statement(wire: Wire, kind: str) -> None:
    sql = "create or replace table t(i int); insert into t values (5); from t where i = $1"
    reply = wire.request(type=kind, sql=sql, queryId=1, params=[5])
    if kind == "arrow":
        assert reply.table().to_pylist() == [{"i": 5}]
    elif kind == "json":
        assert json.loads(reply["data"]) == [{"i": 5}]
    else:
        assert reply["type"] == "ok"
    sql = "create or replace table t(i int); insert into t values ($1)"
    assert wire.request(type="exec", sql=sql, queryId=1, params=[6])["type"] == "ok"
    assert wire.rows("from t") == [{"i": 6}]
    text = refused(wire, [5], "insert into t values (1); drop table t")
    assert "the last statement has no parameters" in text
    assert wire.rows("from t") == [{"i": 6}]


MISFITS = [
    ("select $1 as a", [], "has 0 values, but the last statement has the parameter $1"),
    ("select $1 as a", [1, 2], "has 2 values"),
    ("select ?, ?", [1], "has 1 value,"),
    ("select 1", [1], "the last statement has no parameters"),
    ("select 1", {"a": 1}, "the last statement has no parameters"),
    ("select $a", {}, "no value for $a"),
    ("select $a", {"b": 1}, "no value for $a"),
    ("select $a", {"a": 1, "b": 1}, "params has $b"),
    ("select $a", [1], "no value for $a"),
    ("select $1", {"a": 1}, "no value for $1"),
    ("select $3", [1, 2, 3], "has 3 values"),
    ("select $a", {"a": 1, "A": 2}, "differ only in upper and lower case"),
]


@pytest.mark.parametrize(("sql", "params", "expected"), MISFITS)
def test_what_does_not_fit_the_statement(wire: Wire, sql: str, params: Any, expected: str) -> None:
    assert expected in refused(wire, params, sql)
    assert expected in refused(wire, params, sql, stream=True)


def deep(depth: int, value: Any = 1) -> Any:
    for _ in range(depth):
        value = [value]
    return value


UNBINDABLE = [
    (2**128, "128 bits"),
    (-(2**127) - 1, "128 bits"),
    ({}, "empty object"),
    ({"a": [{}]}, "params[0].a[0] is an empty object"),
    ("\ud800", "surrogate"),
    ({"\ud800": 1}, "surrogate"),
    (["a\udfff"], "surrogate"),
    (deep(101), "nested deeper than 100"),
    (deep(900), "nested deeper than 100"),
    ([1] * 100_001, "more than 100000 values"),
    ([1, [2]], "params[0] cannot be bound"),
    ([1, {"a": 1}], "params[0] cannot be bound"),
    ([1, 2**127], "params[0] cannot be bound"),
    ({"key": [1, 1], "value": [1, 2]}, "Map keys must be unique"),
    ({"key": [None], "value": [1]}, "Map keys can not be NULL"),
    ({"key": {"a": 1}, "value": [1]}, "params[0] would be taken for a MAP"),
    ({"$type": "INTEGER"}, "exactly the fields $type and value"),
    ({"$type": "INTEGER", "value": 1, "more": 1}, "exactly the fields $type and value"),
    ({"$type": None, "value": 1}, "$type of params[0] must be the name"),
    ({"$type": "", "value": 1}, "$type of params[0] must be the name"),
    ({"$type": 5, "value": 1}, "$type of params[0] must be the name"),
    ({"$type": ["INTEGER"], "value": 1}, "$type of params[0] must be the name"),
    ({"$type": "INTEGER" + "[]" * 1000, "value": 1}, "$type of params[0] must be the name"),
    ({"$type": "\ud800", "value": 1}, "surrogate"),
    ({"$type": "NOPE", "value": 1}, "params[0] is no NOPE"),
    ({"$type": "INTEGER; drop table t", "value": 1}, "params[0] is no INTEGER; drop"),
    ({"$type": "INTEGER); drop table t; --", "value": 1}, "params[0] is no INTEGER)"),
    ({"$type": "(select 1)", "value": 1}, "params[0] is no (select 1)"),
    ({"$type": "ANY", "value": 1}, "params[0] is no ANY"),
    ({"$type": "INTEGER", "value": "x"}, "params[0] is no INTEGER"),
    ({"$type": "INTEGER", "value": 2**31}, "params[0] is no INTEGER"),
    ({"$type": "INTEGER", "value": [1]}, "params[0] is no INTEGER"),
    ({"$type": "DOUBLE", "value": True}, "params[0] is no DOUBLE, but BOOLEAN"),
    ({"$type": "VARCHAR", "value": {"a": 1}}, "params[0] is no VARCHAR, but STRUCT"),
    ({"$type": "INTEGER[3]", "value": [1, 2]}, "params[0] is no INTEGER[3], but INTEGER[2]"),
    ({"$type": "DECIMAL(5,2)", "value": "1234.5"}, "params[0] is no DECIMAL(5,2)"),
    ({"$type": "DECIMAL(99,2)", "value": "1"}, "params[0] is no DECIMAL(99,2)"),
    ({"$type": "DATE", "value": "2026-13-01"}, "params[0] is no DATE"),
    ({"$type": "UUID", "value": "x"}, "params[0] is no UUID"),
    ({"$type": "BLOB", "value": "not base64!"}, "params[0] is no base64"),
    ({"$type": "BLOB", "value": "YQ"}, "params[0] is no base64"),
    ({"$type": "BLOB", "value": "ü"}, "params[0] is no base64"),
    ({"$type": "VARCHAR", "value": "\ud800"}, "surrogate"),
    ({"$type": "VARCHAR[]", "value": ["\ud800"]}, "params[0] is no VARCHAR[]"),
    ({"$type": "JSON", "value": deep(900)}, "params[0] is no JSON"),
    ({"$type": "INTEGER[]", "value": deep(300)}, "params[0] is no INTEGER[]"),
    ([{"$type": "INTEGER", "value": "x"}], "params[0][0] is no INTEGER"),
]


@pytest.mark.parametrize(("value", "expected"), UNBINDABLE, ids=range(len(UNBINDABLE)))
def test_what_cannot_be_bound(wire: Wire, value: Any, expected: str) -> None:
    wire.exec("create or replace table t as select 1 as i")
    assert expected in refused(wire, [value])
    assert refused(wire, {"x": value}, "insert into t select $x")
    assert refused(wire, [value], "create table made as select $1 as a", stream=True)
    assert wire.rows("from t") == [{"i": 1}]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_none(wire: Wire, number: str) -> None:
    wire.send_raw(f'{{"type":"arrow","sql":"select $1","queryId":"p","params":[{number}]}}')
    reply = wire.receive()
    assert (reply["type"], reply["code"]) == ("error", "bad_request")
    assert wire.rows("select 1 as a") == [{"a": 1}]


def test_nesting_that_no_parser_should_meet(wire: Wire) -> None:
    for brackets in ("[]", '{"a":'):
        nested = brackets[0] * 100_000 if brackets == "[]" else brackets * 100_000
        end = "]" * 100_000 if brackets == "[]" else "1" + "}" * 100_000
        wire.send_raw(f'{{"type":"arrow","sql":"select $1","params":[{nested}{end}]}}')
        assert wire.receive()["code"] == "bad_request"
    assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize("params", [[1], [1, 2, 3], {"a": 1}, {}, []])
def test_a_long_text_with_params_that_do_not_fit(wire: Wire, params: Any) -> None:
    """It is not parsed before it runs, so DuckDB says what is wrong."""
    wire.exec("create or replace table t(i int)")
    for start in (
        "select $1, $2",
        "insert into t select $1 + $2",
        "with a as (select 1) select ?, ?",
    ):
        sql = f"{start} /* {'x' * 70_000} */"
        reply = wire.request(type="arrow", sql=sql, queryId=1, params=params)
        assert reply["code"] in ("bad_request", "query_error"), reply
        assert "arameter" in reply["error"], reply
    assert wire.rows("select count(*) as n from t") == [{"n": 0}]


def test_a_long_text_with_params_that_fit(wire: Wire) -> None:
    sql = f"select $1 as a, $2 as b /* {'x' * 70_000} */"
    for kind in ("arrow", "json"):
        reply = wire.request(type=kind, sql=sql, queryId=1, params=[1, "y"])
        rows = reply.table().to_pylist() if kind == "arrow" else json.loads(reply["data"])
        assert rows == [{"a": 1, "b": "y"}]


def test_positional_and_named_do_not_mix(wire: Wire) -> None:
    for params in ([1, 2], {"a": 1}, {"a": 1, "1": 2}):
        sql = "select $1, $a"
        reply = wire.request(type="arrow", sql=sql, queryId=1, params=params)
        assert reply["code"] in ("bad_request", "query_error")
        assert "arameter" in reply["error"]


def test_values_never_become_text(wire: Wire) -> None:
    wire.exec("create or replace table t as select 1 as i")
    attacks = ["1; drop table t", "' or 1=1 --", "'); drop table t; --", "$1", "?", "\\'", "\0"]
    for attack in attacks:
        for params in ([attack], [{"$type": "VARCHAR", "value": attack}]):
            reply = wire.request(type="arrow", sql="select $1 as a", queryId=1, params=params)
            assert reply.table().to_pylist() == [{"a": attack}]
            reply = wire.request(
                type="json", sql="from t where i::varchar = ?", queryId=1, params=params
            )
            assert reply["data"] == "[]"
    assert wire.rows("from t") == [{"i": 1}]


def test_without_params_nothing_is_bound(wire: Wire) -> None:
    for options in ({}, {"params": None}):
        reply = wire.request(type="arrow", sql="select $1 as a", queryId=1, **options)
        assert reply["code"] == "query_error"


@pytest.mark.parametrize("kind", ["arrow", "json"])
def test_a_large_result_with_params_streams(serve: Callable[..., ServerProcess], kind: str) -> None:
    process = serve()
    server = psutil.Process(process.pid)
    rows = 6_000_000 if kind == "arrow" else 4_500_000
    sql = "select i, i * $1 as j, $2 || i as s from range($3) t(i)"
    with process.connect() as wire:
        wire.table("select 1")
        before = server.memory_info().rss
        wire.send(type=kind, sql=sql, queryId=1, params=[2, "text ", rows])
        peak = size = 0
        if kind == "arrow":
            for number, batch in enumerate(reader_of(wire)):
                size += batch.num_rows
                if number % 8 == 0:
                    peak = max(peak, server.memory_info().rss)
            assert size == rows
        else:
            for number, fragment in enumerate(wire.socket.recv_streaming()):
                size += len(fragment)
                if number % 32 == 0:
                    peak = max(peak, server.memory_info().rss)
            assert size > rows * 40
    assert peak - before < 150 << 20


def test_exact_json_with_params(wire: Wire) -> None:
    sql = "select $1::timetz as t, [$1::timetz] as l, $2 as n, {'a': 1, 'b': 'x'}::variant as v"
    huge = {"$type": "DECIMAL(38,2)", "value": "123456789012345678901234567890123456.78"}
    reply = wire.request(type="json", sql=sql, queryId=1, params=["01:02:03+05:30", huge])
    expected = (
        '[{"t":"01:02:03+05:30","l":["01:02:03+05:30"],'
        '"n":123456789012345678901234567890123456.78,"v":{"a":1,"b":"x"}}]'
    )
    assert reply["data"] == expected
    rows = "select ('01:02:03+0' || i % 9)::timetz as t, i + $1 as i from range(50000) t(i)"
    reply = wire.request(type="json", sql=rows, queryId=1, params=[1])
    assert json.loads(reply["data"])[12345] == {"t": "01:02:03+06", "i": 12346}


def test_params_in_a_stream_and_a_session(wire: Wire) -> None:
    sql = "select i + $n as a from range(300000) t(i)"
    whole = wire.request(type="arrow", sql=sql, queryId=1, params={"n": 5})
    for options in ({}, {"session": "s"}, {"window": 100_000}):
        chunked = stream(wire, sql, params={"n": 5}, **options)
        assert bytes(chunked.body) == whole.body
    prepare = {"sql": "prepare p as select $1 * 2 as a", "session": "s", "queryId": 1}
    assert wire.request(type="exec", **prepare)["type"] == "ok"
    reply = wire.request(type="arrow", sql="execute p(21)", session="s", queryId=1)
    assert reply.table().to_pylist() == [{"a": 42}]


def test_ten_thousand_values(wire: Wire) -> None:
    numbers = list(range(10_000))
    began = time.monotonic()
    reply = wire.request(type="arrow", sql="select unnest($1) as a", queryId=1, params=[numbers])
    assert reply.table()["a"].to_pylist() == numbers
    assert time.monotonic() - began < 30
    assert pa.types.is_int32(reply.table().schema.field("a").type)


def test_what_waits_counts_with_its_params(launch: Callable[..., LocalServer]) -> None:
    with launch(workers=1, max_message_size=1 << 20).connect() as wire:
        wire.send(type="exec", sql=ENDLESS, queryId="long")
        text = "x" * 900_000
        for number in range(3):
            wire.send(type="exec", sql="select $1", queryId=number, params=[text])
        reply = wire.receive()
        assert (reply["queryId"], reply["code"]) == (2, "busy")
        assert "--max-message-size" in reply["error"]
        wire.send(type="cancel", queryId="long")
        assert sorted(wire.receive()["type"] for _ in range(4)) == [
            "cancelAck",
            "error",
            "ok",
            "ok",
        ]
