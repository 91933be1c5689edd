"""Whatever a client sends, it gets one error that names what was wrong, and can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.messages import Query
from sqlrooms_server.protocol import Limits, decode
from tests.conftest import LocalServer
from tests.wire import Wire, framed, ipc


@pytest.fixture
def server(module_server: LocalServer) -> LocalServer:
    return module_server


def assert_lives(wire: Wire) -> None:
    assert wire.table("select 1 as a").to_pydict() == {"a": [1]}


def assert_bad_request(wire: Wire, message: str | bytes, expected: str) -> None:
    wire.send_raw(message)
    reply = wire.receive()
    assert reply["type"] == "error"
    assert reply["code"] == "bad_request"
    assert expected in reply["error"]
    assert_lives(wire)


TEXTS = [
    ("", "not JSON"),
    ("select 1", "not JSON"),
    ("{", "not JSON"),
    ('{"type":"arrow"} x', "not JSON"),
    ("[" * 100_000 + "]" * 100_000, "not JSON"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "not JSON"),
    ("[]", "must be a JSON object"),
    ("null", "must be a JSON object"),
    ("17", "must be a JSON object"),
    ('"arrow"', "must be a JSON object"),
    ("{}", "needs a field type"),
    ('{"type":5}', "needs a field type"),
    ('{"type":null}', "needs a field type"),
    ('{"type":["arrow"],"sql":"select 1"}', "needs a field type"),
    ('{"type":"unknown"}', 'Unknown message type "unknown"; known are ack, arrow'),
    ('{"type":"ARROW","sql":"select 1"}', "Unknown message type"),
    ('{"type":"arrow"}', "arrow needs a field sql"),
    ('{"type":"json","sql":null}', "json needs a field sql"),
    ('{"type":"exec","sql":["select 1"]}', "exec needs a field sql"),
    ('{"type":"arrow","sql":"select \\u0000 1"}', "NUL"),
    ('{"type":"arrow","sql":"select \'\\ud800\'"}', "surrogate"),
    ('{"type":"cancel"}', "cancel needs a field queryId"),
    ('{"type":"auth","token":5}', "auth needs a field token"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[text[:40] for text, _ in TEXTS])
def test_text(wire: Wire, text: str, expected: str) -> None:
    assert_bad_request(wire, text, expected)


OPTIONS = [
    ("params", [5, "x", True, 1.5], "params must be an array or an object"),
    ("timeoutMs", [0, -1, 1.5, "5", True, [], {}, 10**15, 2**63], "timeoutMs must be"),
    ("maxRows", [-1, 0.5, "5", True, [], {}, 2**60], "maxRows must be"),
    ("progress", [0, 1, "true", [], {}], "progress must be true or false"),
    ("format", [0, 1.5, True, {}, "xml", [], ["xml"], [1]], "format"),
    ("compression", [0, True, "", "gzip", "LZ4", ["lz4"], {}], "compression must be one of"),
    ("stream", [0, 1, "true", [], {}], "stream must be true or false"),
    ("window", [0, -1, 0.5, "5", True, [], {}, 2**60], "window must be"),
    ("session", [0, 5, True, "", "x" * 65, [], ["s"], {}], "session must be"),
]


@pytest.mark.parametrize(("option", "values", "expected"), OPTIONS, ids=lambda part: str(part)[:20])
def test_options(wire: Wire, option: str, values: list[Any], expected: str) -> None:
    for_results = option in ("maxRows", "format", "compression", "stream", "window")
    for kind in ("arrow", "json", "exec"):
        text = f"{option} is for results" if kind == "exec" and for_results else expected
        for value in values:
            fields = {
                "type": kind,
                "sql": "create table never(i int)",
                "queryId": "mine",
            }
            reply = wire.request(**fields, **{option: value})
            assert (reply["type"], reply["code"]) == ("error", "bad_request"), value
            assert reply["queryId"] == "mine"
            assert text in reply["error"]
    assert "does not exist" in wire.arrow("from never")["error"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"type":"ack"}', "ack needs a field queryId"),
        ('{"type":"ack","queryId":"q"}', "ack needs a field bytes"),
        ('{"type":"ack","queryId":"q","bytes":-1}', "bytes must be"),
        ('{"type":"ack","queryId":[],"bytes":1}', "queryId must be"),
        ('{"type":"closeSession"}', "session must be"),
        ('{"type":"closeSession","session":""}', "session must be"),
        ('{"type":"closeSession","session":5}', "session must be"),
    ],
)
def test_messages_beside_queries(wire: Wire, text: str, expected: str) -> None:
    assert_bad_request(wire, text, expected)


@pytest.mark.parametrize(
    "query_id", [None, True, False, 1.5, "", "x" * 257, "ü" * 129, [], [1], {}]
)
@pytest.mark.parametrize("kind", ["arrow", "json", "exec", "cancel", "uploadArrow"])
def test_query_ids_of_every_type(wire: Wire, kind: str, query_id: Any) -> None:
    if kind == "uploadArrow":
        reply = wire.upload(pa.table({"a": [1]}), tableName="t", queryId=query_id)
    else:
        reply = wire.request(type=kind, sql="select 1", queryId=query_id)
    assert reply["type"] == "error"
    assert reply["code"] == "bad_request"
    assert "queryId must be" in reply["error"]
    assert "queryId" not in reply
    assert_lives(wire)


def test_an_error_carries_the_id_of_its_request(wire: Wire) -> None:
    for fields in (
        {"type": "arrow"},
        {"type": "nonsense"},
        {"type": "exec", "sql": "x" * (5 << 20)},
        {"type": "json", "sql": "select \0"},
    ):
        assert wire.request(queryId="mine", **fields)["queryId"] == "mine"
    assert_lives(wire)


BINARIES = [
    (b"", "4-byte header length"),
    (b"\x00\x00", "4-byte header length"),
    (b"\x00\x00\x00\x10{}", "header length"),
    (b"\xff\xff\xff\xff" + b"x" * 100, "header length"),
    (b"\x00\x00\x00\x00", "not JSON"),
    (b"\x00\x00\x00\x04\xff\xfe\xfd\xfc", "not JSON"),
    (framed({}, b""), 'needs type "uploadArrow"'),
    (framed({"type": "arrow", "sql": "select 1"}, b""), 'needs type "uploadArrow"'),
    (framed({"type": "uploadArrow"}, b""), "tableName must be"),
    (framed({"type": "uploadArrow", "tableName": 5}, b""), "tableName must be"),
    (framed({"type": "uploadArrow", "tableName": "t"}, b""), "not a valid Arrow IPC stream"),
    (framed({"type": "uploadArrow", "tableName": "t"}, b"garbage"), "not a valid Arrow IPC stream"),
    (b"loro\x00\x00\x00\x00", "start it with --sync"),
]


@pytest.mark.parametrize(("data", "expected"), BINARIES, ids=[expected for _, expected in BINARIES])
def test_binary(wire: Wire, data: bytes, expected: str) -> None:
    assert_bad_request(wire, data, expected)


def test_a_long_sql_text_is_too_large(wire: Wire) -> None:
    reply = wire.arrow("select '" + "x" * (5 << 20) + "'")
    assert reply["code"] == "too_large"
    assert "--max-sql-length" in reply["error"]
    assert_lives(wire)


def test_the_longest_allowed_text_runs(launch: Callable[..., LocalServer]) -> None:
    with launch(max_sql_length=1 << 20).connect() as wire:
        sql = "select '" + "x" * ((1 << 20) - 9) + "'"
        assert wire.table(sql).num_rows == 1
        assert wire.arrow(sql + " ")["code"] == "too_large"


def test_messages_of_the_largest_size_are_answered(wire: Wire) -> None:
    """128 MiB of text, of a header, of an upload that is none."""
    size = 128 << 20
    start = '{"type":"arrow","queryId":"big","sql":"'
    wire.send_raw(start + "x" * (size - len(start) - 2) + '"}')
    reply = wire.receive()
    assert (reply["code"], reply["queryId"]) == ("too_large", "big")
    header = framed({"type": "uploadArrow", "tableName": "t", "queryId": 7}, b"")
    wire.send_raw(header + b"\0" * (size - len(header)))
    reply = wire.receive()
    assert (reply["code"], reply["queryId"]) == ("bad_request", 7)
    assert_lives(wire)


def test_the_name_of_a_table_that_is_a_whole_message(wire: Wire) -> None:
    """Looking at 20 MB of it took 12 s, in which nobody was served, and 3.4 GB."""
    began = time.process_time()
    for name in ('"' + "a" * (8 << 20), "a." * (4 << 20)):
        reply = wire.request(type="watch", tables=[name], queryId="w")
        assert (reply["code"], reply["queryId"]) == ("bad_request", "w")
        assert "255 bytes" in reply["error"]
    # It takes ten times less, and took twice as long.
    assert time.process_time() - began < 2
    assert_lives(wire)


def test_what_waits_is_no_larger_than_its_message() -> None:
    """Six messages of 20 MB that waited for a worker held 2.9 GB."""
    limits = Limits(1 << 27, 1 << 22)
    many = json.dumps({"type": "json", "sql": "select 1", "format": ["json"] * 100_000}).encode()
    query = decode(many, is_text=True, limits=limits)
    assert isinstance(query, Query) and query.formats == ("json",)
    too_many: list[Any] = [[{}] * 100_001, {"a": [[[]] * 50_000, [[]] * 50_000]}]
    for values in too_many:
        message = json.dumps({"type": "json", "sql": "select 1", "params": values, "queryId": 7})
        with pytest.raises(BadRequest, match="params has more than 100000 values") as refused:
            decode(message.encode(), is_text=True, limits=limits)
        assert refused.value.query_id == 7


def test_a_message_over_the_limit_is_refused_by_name(launch: Callable[..., LocalServer]) -> None:
    with launch(max_message_size=1 << 20).connect() as wire:
        table = pa.table({"a": [b"x" * (1 << 20)]})
        reply = wire.upload(table, tableName="t", queryId="up")
        assert (reply["code"], reply["queryId"]) == ("too_large", "up")
        assert "--max-message-size" in reply["error"]
        assert_lives(wire)


@pytest.mark.parametrize("bracket", ["()", "[]"])
def test_sql_that_nests_too_deeply_meets_no_parser(wire: Wire, bracket: str) -> None:
    depth = 100_000
    reply = wire.arrow("select " + bracket[0] * depth + "1" + bracket[1] * depth)
    assert reply["code"] == "bad_request"
    assert "nests brackets deeper than 250" in reply["error"]
    assert_lives(wire)


def test_endless_chains_of_operators_meet_no_parser(wire: Wire) -> None:
    """One of these held the interpreter lock, and so the whole server, for a minute."""
    reply = wire.arrow("select true" + " and true" * 300_000)
    assert reply["code"] == "bad_request"
    assert "more than 20000 AND and OR" in reply["error"]
    text = "this and that or " * 30_000
    assert wire.table(f"select length('{text}') as n")["n"][0].as_py() == len(text)


def test_many_brackets_side_by_side_are_fine(wire: Wire) -> None:
    values = ", ".join(f"({number}, '(((')" for number in range(5000))
    assert (
        wire.table(f"select count(*) as n from (values {values}) t(a, b)")["n"][0].as_py() == 5000
    )


def test_upload_bodies_with_flipped_bytes_never_end_the_process(wire: Wire) -> None:
    """Offsets that point outside end a process that trusts them."""
    import random

    table = pa.table(
        {
            "i": list(range(50)),
            "s": [f"text {i}" for i in range(50)],
            "l": [[i, i + 1] for i in range(50)],
            "d": pa.array(["a", "b"] * 25).dictionary_encode(),
        }
    )
    body = ipc(table)
    wire.upload(table, tableName="kept", queryId="first")
    chance = random.Random(17)
    for number in range(300):
        broken = bytearray(body)
        for _ in range(chance.randrange(1, 8)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        if number % 5 == 0:
            del broken[chance.randrange(len(broken)) :]
        reply = wire.upload(bytes(broken), tableName="fuzzed", queryId=number)
        assert reply["type"] in ("uploadAck", "error"), reply
        assert reply["queryId"] == number
    assert wire.rows("select count(*) as n from kept") == [{"n": 50}]
