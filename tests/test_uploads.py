"""Arrow uploads: what becomes of each type, names, and errors that change nothing."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.protocol import parse_table_name
from tests.conftest import LocalServer
from tests.test_queries import ENDLESS
from tests.wire import Wire, framed, ipc


def test_a_table_is_created_and_replaced(wire: Wire) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    assert wire.upload(table, tableName="t", queryId="u1") == {"type": "uploadAck", "queryId": "u1"}
    assert wire.table("from t").to_pydict() == {"a": [1, 2], "b": ["x", None]}
    wire.upload(pa.table({"c": [3.5]}), tableName="t", queryId="u2")
    assert wire.table("from t").to_pydict() == {"c": [3.5]}


def test_an_empty_table_keeps_its_columns(wire: Wire) -> None:
    wire.upload(pa.table({"a": pa.array([], pa.int64())}), tableName="t", queryId="u")
    assert wire.table("from t").schema.names == ["a"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("t", ("t",)),
        ("_T1", ("_T1",)),
        ("größe", ("größe",)),
        ("s.t", ("s", "t")),
        ("c.s.t", ("c", "s", "t")),
        ('"with space"', ("with space",)),
        ('"a""b"."c.d"', ('a"b', "c.d")),
        ('s."T-1"', ("s", "T-1")),
    ],
)
def test_names(name: str, parts: tuple[str, ...]) -> None:
    assert parse_table_name(name) == parts


@pytest.mark.parametrize(
    "name",
    [
        "",
        " t",
        "t ",
        "1t",
        "a-b",
        "a b",
        "t;drop table x",
        "a.b.c.d",
        ".t",
        "t.",
        "a..b",
        '"',
        '""',
        '"a',
        'a"',
        '"a"b',
        "'t'",
        "t--",
        "t\0",
        '"\0"',
        "x" * 256,
        None,
        5,
        ["t"],
        "\ud800",
    ],
)
def test_anything_else_is_no_name(name: object) -> None:
    with pytest.raises(BadRequest, match="tableName"):
        parse_table_name(name)


def test_names_reach_duckdb_quoted(wire: Wire) -> None:
    wire.exec("create schema \"my schema\"; attach ':memory:' as other")
    for name in ('"my schema"."a ""b"" c"', "other.main.t", '"select"'):
        assert wire.upload(pa.table({"a": [1]}), tableName=name, queryId=1)["type"] == "uploadAck"
        assert wire.table(f"from {name}").num_rows == 1


def test_a_schema_that_does_not_exist_is_an_error(wire: Wire) -> None:
    reply = wire.upload(pa.table({"a": [1]}), tableName="nowhere.t", queryId="u")
    assert reply["code"] == "query_error"
    assert "nowhere" in reply["error"]


def test_types(wire: Wire) -> None:
    table = pa.table(
        {
            "i": pa.array([1, None], pa.int8()),
            "u": pa.array([2**64 - 1, None], pa.uint64()),
            "f": pa.array([1.5, None], pa.float32()),
            "s": pa.array(["ü", None], pa.large_string()),
            "b": pa.array([b"\x00\xff", None]),
            "d": pa.array([dt.date(2020, 1, 2), None]),
            "t": pa.array([dt.datetime(2020, 1, 2, 3, 4, 5, 6), None], pa.timestamp("us")),
            "z": pa.array([dt.datetime(2020, 1, 2), None], pa.timestamp("ms", "UTC")),
            "n": pa.array([pa.scalar(1).as_py(), None], pa.decimal128(10, 2)),
            "l": pa.array([[1, None], None], pa.list_(pa.int32())),
            "st": pa.array([{"a": 1, "b": "x"}, None]),
            "e": pa.array(["p", None]).dictionary_encode(),
        }
    )
    assert wire.upload(table, tableName="t", queryId="u")["type"] == "uploadAck"
    types = {row["column_name"]: row["column_type"] for row in wire.rows("describe t")}
    assert types == {
        "i": "TINYINT",
        "u": "UBIGINT",
        "f": "FLOAT",
        "s": "VARCHAR",
        "b": "BLOB",
        "d": "DATE",
        "t": "TIMESTAMP",
        "z": "TIMESTAMP WITH TIME ZONE",
        "n": "DECIMAL(10,2)",
        "l": "INTEGER[]",
        "st": "STRUCT(a BIGINT, b VARCHAR)",
        "e": "VARCHAR",
    }
    rows = wire.table("from t").to_pylist()
    assert rows[0]["u"] == 2**64 - 1
    assert rows[0]["l"] == [1, None]
    assert all(value is None for value in rows[1].values())


def test_repeated_column_names_are_numbered(wire: Wire) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["a", "a", "a_1"])
    wire.upload(table, tableName="t", queryId="u")
    assert wire.table("from t").to_pydict() == {"a": [1], "a_2": [2], "a_1": [3]}


def test_errors_leave_the_old_table(wire: Wire) -> None:
    wire.upload(pa.table({"a": [1]}), tableName="t", queryId="u")
    whole = ipc(pa.table({"a": list(range(100_000))}))
    for body in (whole[: len(whole) // 2], whole[:100], ipc(pa.table({})), b""):
        reply = wire.upload(body, tableName="t", queryId="broken")
        assert reply["code"] == "bad_request", reply
        assert wire.table("from t").to_pydict() == {"a": [1]}


def test_values_that_are_not_aligned(wire: Wire, capfd: pytest.CaptureFixture[str]) -> None:
    """Without its first mark the stream is four bytes shorter. Arrow warned for each batch."""
    body = ipc(pa.table({"a": range(1000)}))[4:]
    assert wire.upload(body, tableName="t", queryId="u")["type"] == "uploadAck"
    assert wire.rows("select sum(a) as s from t") == [{"s": 499500}]
    assert "aligned" not in capfd.readouterr().err


def test_uploads_of_one_name_at_one_time_all_succeed(server: LocalServer) -> None:
    failures: list[Any] = []

    def replace() -> None:
        with server.connect() as wire:
            for number in range(15):
                reply = wire.upload(
                    pa.table({"a": list(range(1000))}), tableName="t", queryId=number
                )
                if reply["type"] != "uploadAck":
                    failures.append(reply)

    threads = [threading.Thread(target=replace) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with server.connect() as wire:
        # A reader that was spent by a first try would have left an empty table.
        assert wire.rows("select count(*) as n from t") == [{"n": 1000}]


def test_a_large_upload_in_one_message(wire: Wire) -> None:
    table = pa.table({"a": pa.array(range(5_000_000), pa.int64())})
    assert wire.upload(table, tableName="big", queryId="u")["type"] == "uploadAck"
    assert wire.rows("select sum(a)::bigint as s from big") == [{"s": 12499997500000}]


def test_an_upload_can_be_cancelled(wire: Wire) -> None:
    table = pa.table({"a": pa.array(range(4_000_000), pa.int64())})
    wire.send_raw(framed({"type": "uploadArrow", "tableName": "t", "queryId": "u"}, ipc(table)))
    wire.send(type="cancel", queryId="u")
    replies = {reply["type"]: reply for reply in (wire.receive(), wire.receive())}
    exists = wire.rows("select count(*) as n from duckdb_tables() where table_name = 't'")[0]["n"]
    if "uploadAck" in replies:
        assert exists == 1
    else:
        assert replies["error"]["code"] == "cancelled"
        assert exists == ("changes stand" in replies["error"]["error"])


def test_uploads_that_wait_are_bounded_in_bytes(launch: Callable[..., LocalServer]) -> None:
    with launch(workers=1, max_message_size=1 << 20).connect() as wire:
        wire.send(type="exec", sql=ENDLESS, queryId="runs")
        body = ipc(pa.table({"a": [b"x" * 900_000]}))
        for number in range(3):
            header = {"type": "uploadArrow", "tableName": "t", "queryId": number}
            wire.send_raw(framed(header, body))
        refused = wire.receive()
        assert (refused["queryId"], refused["code"]) == (2, "busy")
        assert "--max-message-size" in refused["error"]
