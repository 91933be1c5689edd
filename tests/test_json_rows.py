"""JSON of every type, against DuckDB's own text of the same value, on both versions."""

from __future__ import annotations

import json
import random
import struct
from decimal import Decimal
from typing import Any

import pytest

from sqlrooms_server.db.columns import Column, unique_names
from tests.conftest import LocalServer
from tests.wire import Wire

DAY = 86_400_000

EXACT = [
    ("1::tinyint", 1),
    ("(-128)::tinyint", -128),
    ("9007199254740993::bigint", 9007199254740993),
    ("18446744073709551615::ubigint", 18446744073709551615),
    ("170141183460469231731687303715884105727::hugeint", 2**127 - 1),
    ("(-170141183460469231731687303715884105728)::hugeint", -(2**127)),
    ("340282366920938463463374607431768211455::uhugeint", 2**128 - 1),
    ("0::uhugeint", 0),
    ("'10000000000000000000000000000000007'::bignum", 10000000000000000000000000000000007),
    ("'-10000000000000000000000000000000007'::bignum", -10000000000000000000000000000000007),
    ("true", True),
    ("null", None),
    ("3.141592653589793::double", 3.141592653589793),
    ("1.0::double", 1.0),
    ("5e-324::double", 5e-324),
    ("'nan'::double", None),
    ("'-inf'::double", None),
    ("'inf'::float", None),
    ("date '2020-01-02'", 18263 * DAY),
    ("date '1969-12-31'", -DAY),
    ("'infinity'::date", None),
    ("'-infinity'::date", None),
    ("timestamp '2020-01-02 03:04:05.678901'", 1577934245678),
    ("timestamp '1969-12-31 23:59:59.999500'", -1),
    ("'1969-12-31 23:59:59.999999999'::timestamp_ns", -1),
    ("'2020-01-02 03:04:05'::timestamp_s", 1577934245000),
    ("'2020-01-02 03:04:05.678'::timestamp_ms", 1577934245678),
    ("'2020-01-02 03:04:05+02'::timestamptz", 1577927045000),
    ("'infinity'::timestamp", None),
    ("'-infinity'::timestamptz", None),
    ("'\\xAA\\x00ab'::blob", "qgBhYg=="),
    ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("'{\"a\": [1, 2]}'::json", '{"a": [1, 2]}'),
    ("[1, 2, null]", [1, 2, None]),
    ("[]::int[]", []),
    ("[[1], null, []]", [[1], None, []]),
    ("['a', 'b\"c']", ["a", 'b"c']),
    ("array_value(1, 2, 3)", [1, 2, 3]),
    ("{'a': 1, 'b': {'c': null}}", {"a": 1, "b": {"c": None}}),
    ("map {'k': 1, 'l': null}", {"k": 1, "l": None}),
    ("map {1: 'a'}", {"1": "a"}),
    ("map {}::map(int, int)", {}),
    ("union_value(num := 5)", 5),
    ("union_value(txt := 'x')::union(num int, txt varchar)", "x"),
    ("{'a': [{'b': 1.50::decimal(5, 2)}]}", {"a": [{"b": 1.5}]}),
    ("42::variant", 42),
    ("{'a': [1, 2], 'b': 'x'}::variant", {"a": [1, 2], "b": "x"}),
]  # fmt: skip


@pytest.fixture
def server(module_server: LocalServer) -> LocalServer:
    return module_server


@pytest.mark.parametrize(("sql", "expected"), EXACT, ids=[sql for sql, _ in EXACT])
def test_value(wire: Wire, sql: str, expected: Any) -> None:
    value = wire.rows(f"select {sql} as v")[0]["v"]
    assert value == expected
    assert type(value) is type(expected)
    nested = f"select [{sql}, null] as l, {{'s': {sql}}} as st, case when false then {sql} end as n"
    assert wire.rows(nested) == [{"l": [expected, None], "st": {"s": expected}, "n": None}]


AS_TEXT = [
    "time '12:34:56.789'",
    "time '00:00:00'",
    "time '24:00:00'",
    "time '12:00:10.5'",
    "'12:34:56.123456789'::time_ns",
    "'12:34:56+02:30'::timetz",
    "'23:59:59.000001-15:59'::timetz",
    "'10101'::bit",
    "'0'::bit",
    "'1010101010101010101'::bit",
    "interval '1 year 2 months 3 days 04:05:06.789'",
    "interval '-1 month'",
    "interval '-14 months -3 days'",
    "interval '0 days'",
    "interval '1 day'",
    "interval '-3 days -1 hour'",
    "interval '100 hours'",
    "interval '-0.5 seconds'",
    "'sad'::mood",
    "'a\tb\nc\rd\"e\\f' || chr(1) || chr(31) || chr(127) || 'ü😀' || chr(8232)",
    "''",
]


@pytest.mark.parametrize("sql", AS_TEXT)
def test_value_is_duckdbs_text(wire: Wire, sql: str) -> None:
    wire.exec("create or replace type mood as enum ('sad', 'ok')")
    row = wire.rows(f"select {sql} as v, ({sql})::varchar as t, [{sql}] as l from range(2)")[1]
    assert row["v"] == row["t"]
    assert row["l"] == [row["t"]]


def test_doubles_read_back_the_same(wire: Wire) -> None:
    chance = random.Random(1)
    doubles = [struct.unpack("d", chance.randbytes(8))[0] for _ in range(3000)]
    doubles = [d for d in doubles if d == d and abs(d) != float("inf")] + [0.1, -0.0, 1e22, 123.0]
    values = ", ".join(f"({number}, {double!r}::double)" for number, double in enumerate(doubles))
    rows = wire.rows(f"select d from (values {values}) t(i, d) order by i")
    assert [row["d"] for row in rows] == doubles


def test_decimals_keep_every_digit(wire: Wire) -> None:
    texts = ["1.234", "-0.001", "12345678901234567890123456789.123456789", "0.000000001", "0"]
    for text in texts:
        reply = wire.request(type="json", sql=f"select '{text}'::decimal(38, 9) as v", queryId=1)
        assert json.loads(reply["data"], parse_float=Decimal)[0]["v"] == Decimal(text)


def test_duplicate_names_are_numbered(wire: Wire) -> None:
    assert wire.rows("select 1 as a, 2 as a, 3 as a_1, 4 as a") == [
        {"a": 1, "a_2": 2, "a_1": 3, "a_3": 4}
    ]
    assert unique_names(tuple(Column(name, None) for name in ("x", "x"))) == ["x", "x_1"]


def test_names_are_escaped(wire: Wire) -> None:
    assert wire.rows('select 1 as "a""b\\c/ü"') == [{'a"b\\c/ü': 1}]


def test_nulls_beside_values_in_nested_columns(wire: Wire) -> None:
    rows = wire.rows(
        """
        select i,
            case when i % 2 = 0 then [i, null] end as l,
            case when i % 3 = 0 then {'a': i} end as s,
            case when i % 5 = 0 then map {i: 'x'} end as m,
            case when i % 7 = 0 then [i, i + 1] end::bigint[2] as a
        from range(50000) t(i)
        """
    )
    for row in rows:
        i = row["i"]
        assert row["l"] == ([i, None] if i % 2 == 0 else None)
        assert row["s"] == ({"a": i} if i % 3 == 0 else None)
        assert row["m"] == ({str(i): "x"} if i % 5 == 0 else None)
        assert row["a"] == ([i, i + 1] if i % 7 == 0 else None)


def test_a_query_with_exotic_types_keeps_its_order_and_names(wire: Wire) -> None:
    rows = wire.rows(
        "select '12:00:00+01'::timetz as t, i as t, {'x': '01:00:00+02'::timetz, 'y': [i]} as s "
        "from range(3) r(i) order by i desc;  -- the end"
    )
    assert [row["t_1"] for row in rows] == [2, 1, 0]
    assert rows[0] == {"t": "12:00:00+01", "t_1": 2, "s": {"x": "01:00:00+02", "y": [2]}}


def test_arrow_settings_of_one_client_do_not_change_the_json_of_others(server: LocalServer) -> None:
    sql = "select 'x' as s, ['a', null] as l, 'ab'::blob as b, [[1], []] as n"
    with server.connect() as other, server.connect() as wire:
        expected = wire.rows(sql)
        for setting in (
            "arrow_large_buffer_size",
            "arrow_output_list_view",
            "produce_arrow_string_view",
        ):
            other.exec(f"set {setting} = true")
            assert wire.rows(sql) == expected
            other.exec(f"reset {setting}")
        other.exec("set arrow_lossless_conversion = true")
        assert wire.arrow("set threads = 2")["type"] == "ok"
