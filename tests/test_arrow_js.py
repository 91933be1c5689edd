"""Every release of apache-arrow (JavaScript) in use reads what the server sends.

An application brings its own release, so the stream holds nothing that an older one cannot read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.npm import PROJECT, install_packages, run_node
from tests.wire import Arrow, Wire

VERSIONS = ["17", "18", "19", "20", "21"]
DECODE_DEADLINE = 60
TEST_DEADLINE = 300

# One value of every type and its text: dates and timestamps in milliseconds, times in microseconds,
# bytes in hex. None: the releases do not agree on a value (an INTERVAL is garbage before 20).
VALUES: dict[str, tuple[str, str | None]] = {
    "tinyint": ("(-128)::tinyint", "-128"),
    "smallint": ("(-32768)::smallint", "-32768"),
    "integer": ("(-2147483648)::integer", "-2147483648"),
    "bigint": ("(-9223372036854775808)::bigint", "-9223372036854775808"),
    "utinyint": ("255::utinyint", "255"),
    "usmallint": ("65535::usmallint", "65535"),
    "uinteger": ("4294967295::uinteger", "4294967295"),
    "ubigint": ("18446744073709551615::ubigint", "18446744073709551615"),
    "hugeint": ("(-12345678901234567890123456789)::hugeint", "-12345678901234567890123456789"),
    "uhugeint": ("12345678901234567890123456789::uhugeint", "12345678901234567890123456789"),
    "float": ("1.5::float", "1.5"),
    "double": ("0.1::double", "0.1"),
    "decimal": ("(-1234.567)::decimal(18,3)", "-1234.567"),
    "small_decimal": ("(-0.5)::decimal(4,1)", "-0.5"),
    "large_decimal": ("12345678901234567890.12::decimal(38,2)", "12345678901234567890.12"),
    "varchar": ("'Zoë \"Z\" 🦆'", 'Zoë "Z" 🦆'),
    "empty_varchar": ("''", ""),
    "boolean": ("true", "true"),
    "date": ("date '2024-02-29'", "1709164800000"),
    "old_date": ("date '1582-10-15'", "-12219292800000"),
    "time": ("time '12:34:56.789012'", "45296789012"),
    "timestamp_s": ("timestamp_s '2024-02-29 12:34:56'", "1709210096000"),
    "timestamp_ms": ("timestamp_ms '2024-02-29 12:34:56.789'", "1709210096789"),
    "timestamp": ("timestamp '2024-02-29 12:34:56.789'", "1709210096789"),
    "timestamp_ns": ("timestamp_ns '2024-02-29 12:34:56.789'", "1709210096789"),
    "timestamptz": ("timestamptz '2024-02-29 12:34:56.789+02'", "1709202896789"),
    "interval": ("interval '1 month 2 days 3 seconds'", None),
    "uuid": (
        "uuid '00112233-4455-6677-8899-aabbccddeeff'",
        "00112233-4455-6677-8899-aabbccddeeff",
    ),
    "blob": ("'\\x00\\xFFduck'::blob", "00ff6475636b"),
    # DuckDB's own layout: the number of padding bits, then the bits.
    "bit": ("'10101'::bit", "03f5"),
    "enum": ("'b'::enum('a', 'b')", "b"),
    "list": ("[1, null, 3]", "[1, null, 3]"),
    "nested_list": ("[['a', 'b'], null, []]", "[[a, b], null, []]"),
    "enum_list": ("['b', 'a']::enum('a', 'b')[]", "[b, a]"),
    "struct": ("{'n': 1, 's': 'x', 'l': [1, 2]}", "{n: 1, s: x, l: [1, 2]}"),
    "map": ("map {'k': 1, 'l': null}", "{k=1, l=null}"),
    "array": ("[1, 2, 3]::integer[3]", "[1, 2, 3]"),
    "union": ("union_value(num := 5)::union(num integer, str varchar)", "5"),
    "json": ("""'{"a": [1]}'::json""", '{"a": [1]}'),
    "null": ("null", "null"),
}

EMPTY = "select 1 as n, 'x' as s, [1] as l where false"

LONG_ROWS = 3 * 70_000
LONG = f"""
    select range as n, 'label ' || range % 7 as label,
        (['low', 'high'][range % 2 + 1])::enum('low', 'high') as level,
        if(range % 2 = 0, null, [range]) as list
    from range({LONG_ROWS}) order by n
"""


class Expected(NamedTuple):
    rows: int
    fields: list[str]
    values: Sequence[Sequence[str | None]]


def expectations() -> dict[str, tuple[str, Expected]]:
    """Query and expected reading of each file."""
    cases = {
        name: (
            f"select {expression} as v union all select null",
            Expected(2, ["v"], [[value], ["null"]]),
        )
        for name, (expression, value) in VALUES.items()
    }
    cases["empty"] = (EMPTY, Expected(0, ["n", "s", "l"], []))
    shown = [
        ["0", "label 0", "low", "null"],
        ["1", "label 1", "high", "[1]"],
        ["2", "label 2", "low", "null"],
        [f"{LONG_ROWS - 1}", f"label {(LONG_ROWS - 1) % 7}", "high", f"[{LONG_ROWS - 1}]"],
    ]
    cases["long"] = (LONG, Expected(LONG_ROWS, ["n", "label", "level", "list"], shown))
    return cases


def differences(expected: Expected, read: dict[str, object]) -> list[str]:
    """What of a reading is not as expected, as text."""
    if "error" in read:
        return [str(read["error"])]
    rows, fields, values = read["rows"], read["fields"], read["values"]
    assert isinstance(values, list)
    if rows != expected.rows or fields != expected.fields:
        return [f"{rows} rows of {fields}, expected {expected.rows} of {expected.fields}"]
    return [
        f"{got!r}, expected {want!r}"
        for row, wanted in zip(values, expected.values, strict=True)
        for got, want in zip(row, wanted, strict=True)
        if want not in (None, got)
    ]


@pytest.mark.timeout(TEST_DEADLINE)
def test_every_release_reads_every_type(wire: Wire, tmp_path: Path) -> None:
    install_packages()
    cases = expectations()
    for name, (sql, _) in cases.items():
        wire.send(type="arrow", sql=sql, queryId=name)
        reply = wire.receive()
        assert isinstance(reply, Arrow), f"{name}: {reply}"
        (tmp_path / f"{name}.arrow").write_bytes(reply.body)

    script = PROJECT / "arrow_versions.mjs"
    report = json.loads(run_node(script, str(tmp_path), timeout=DECODE_DEADLINE))

    assert sorted(report) == sorted(f"{name}.arrow" for name in cases)
    wrong = []
    for name, (_, expected) in cases.items():
        readings = report[f"{name}.arrow"]
        assert sorted(readings) == VERSIONS
        for version, read in readings.items():
            wrong += [f"{name}, arrow {version}: {text}" for text in differences(expected, read)]
    assert not wrong, "\n".join(wrong)
