"""``arrow``, ``json``, ``exec`` over a real socket: what each kind of statement answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pyarrow as pa
import pytest

from tests.conftest import LocalServer
from tests.wire import Arrow, Wire


def test_a_query_is_one_framed_arrow_stream(wire: Wire) -> None:
    reply = wire.arrow("select 1 as a, 'x' as b", "q1")
    assert reply.header == {"type": "arrow", "queryId": "q1"}
    assert reply.table().to_pylist() == [{"a": 1, "b": "x"}]


def test_the_body_is_aligned_to_eight_bytes(wire: Wire) -> None:
    for query_id in ("a", "ab", "abc", 1234567):
        wire.send(type="arrow", sql="select 1", queryId=query_id)
        message = wire.socket.recv()
        assert isinstance(message, bytes)
        assert (4 + int.from_bytes(message[:4], "big")) % 8 == 0


def test_an_empty_result_keeps_its_schema_in_an_empty_batch(wire: Wire) -> None:
    reply = wire.arrow("select 1::bigint as a, 'x' as b where false")
    reader = pa.ipc.open_stream(reply.body)
    assert reader.schema.names == ["a", "b"]
    assert [batch.num_rows for batch in reader] == [0]


def test_the_last_of_several_statements_counts(wire: Wire) -> None:
    table = wire.table("create table t(i int); insert into t values (1), (2); from t order by i")
    assert table.to_pydict() == {"i": [1, 2]}


@pytest.mark.parametrize(
    "definitions",
    [
        ["1 as a", "1 as a, 2 as b", "'x' as b"],
        # The same names and storage: only the metadata of the field tells JSON from text.
        ["'{}'::varchar as a", "'{}'::json as a", "'{}'::varchar as a"],
        ["'x'::varchar as a", "'x'::enum('x', 'y') as a", "1 as a"],
        ["1 as a", ", ".join(f"{n} as c{n}" for n in range(300)), "1 as a"],
    ],
)
def test_a_text_asked_again_follows_its_tables(wire: Wire, definitions: list[str]) -> None:
    for definition in definitions:
        wire.exec(f"create or replace table t as select {definition} from range(5000)")
        asked = wire.arrow("from t").table()
        differently_written = wire.arrow(f"from t limit 5000 -- {definition}").table()
        assert asked.schema.equals(differently_written.schema, check_metadata=True)
        assert asked.to_pylist() == differently_written.to_pylist()


def test_two_dot_x_is_served_without_its_private_calls(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.db.opening._SUBMIT", None)
    assert wire.table("select 1 as a").to_pydict() == {"a": [1]}
    assert "no_such" in wire.arrow("from no_such")["error"]


def test_attached_database_is_there_for_the_next_message(wire: Wire) -> None:
    assert wire.arrow("attach ':memory:' as other")["type"] == "ok"
    assert wire.arrow("create table other.t as select 7 as i").table().to_pydict() == {"Count": [1]}
    assert wire.table("from other.t").to_pydict() == {"i": [7]}


SETUP = """
    create table t(i int primary key, s varchar);
    insert into t values (1, 'a'), (2, 'b'), (3, 'c');
"""

COUNTS = [
    ("insert into t values (4, 'd'), (5, 'e')", 2),
    ("insert into t select 9, 'x' where false", 0),
    ("update t set s = 'z'", 3),
    ("delete from t where i = 1", 1),
    ("merge into t using (select 2 as i) as n on t.i = n.i when matched then delete", 1),
    ("create table c as select * from range(7)", 7),
    ("create table c as select * from range(7) where false", 0),
    ("copy t to '{path}' (format csv)", 3),
    ("prepare p as delete from t; execute p", 3),
]


@pytest.mark.parametrize(("sql", "count"), COUNTS)
def test_statements_that_change_rows_answer_with_the_count(
    wire: Wire, tmp_path: object, sql: str, count: int
) -> None:
    wire.exec(SETUP)
    reply = wire.arrow(sql.format(path=f"{tmp_path}/o.csv"))
    assert isinstance(reply, Arrow), reply
    assert reply.table().to_pydict() == {"Count": [count]}


@pytest.mark.parametrize(
    "sql",
    [
        "set threads = 2",
        "reset threads",
        "create table n(a int)",
        "create view v as select 1",
        "create schema s",
        "drop table t",
        "alter table t add column b int",
        "use memory",
        "begin; commit",
        "checkpoint",
        "pragma enable_object_cache",
        "comment on table t is 'x'",
        "load json",
        "prepare p as select 1",
        "",
        " ; -- nothing\n",
    ],
)
@pytest.mark.parametrize("kind", ["arrow", "json", "exec"])
def test_statements_with_nothing_to_tell_answer_ok(wire: Wire, kind: str, sql: str) -> None:
    wire.exec("create table t(i int)")
    assert wire.request(type=kind, sql=sql, queryId=5) == {"type": "ok", "queryId": 5}


@pytest.mark.parametrize(
    "sql",
    [
        'select true as "Success" where false',
        'select 1::bigint as "Count" where false',
        "from t",
        "insert into t select 1, 'x' where false returning i",
    ],
)
def test_an_empty_table_is_not_nothing(wire: Wire, sql: str) -> None:
    wire.exec("create table t(i int, s varchar)")
    assert wire.arrow(sql).table().num_rows == 0


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("pragma table_info('t')", 2),
        ("show tables", 1),
        ("describe t", 2),
        ("explain select 1", 1),
        ("call range(3)", 3),
        ("insert into t values (7, 'x') returning i", 1),
        ("pivot t on s using count(*)", 0),
        ("values (1), (2)", 2),
    ],
)
def test_statements_that_return_rows(wire: Wire, sql: str, rows: int) -> None:
    wire.exec("create table t(i int, s varchar)")
    assert wire.table(sql).num_rows == rows


def test_a_column_named_count_is_not_always_the_count(wire: Wire) -> None:
    wire.exec("create table t(a varchar)")
    reply = wire.table("insert into t values ('x') returning a as \"Count\"")
    assert reply.to_pydict() == {"Count": ["x"]}
    assert wire.rows("from t") == [{"a": "x"}]


def test_json_data_is_a_string_of_row_objects(wire: Wire) -> None:
    reply = wire.request(type="json", sql="select 1 as a, 'ü\"\\\n' as b", queryId="j")
    assert set(reply) == {"type", "queryId", "data"}
    assert json.loads(reply["data"]) == [{"a": 1, "b": 'ü"\\\n'}]
    assert wire.rows("select 1 where false") == []


def test_json_of_many_rows_arrives_whole(wire: Wire) -> None:
    rows = wire.rows("select i, 'row \"' || i || '\"' as s from range(200000) t(i)")
    assert len(rows) == 200_000
    assert rows[199_999] == {"i": 199_999, "s": 'row "199999"'}


def test_ids_come_back_as_they_were_sent(wire: Wire) -> None:
    for query_id in ("a", "ü" * 128, 0, -5, 2**53, 2**70, 'q"\\\u0000'):
        for kind in ("arrow", "json", "exec"):
            reply = wire.request(type=kind, sql="select 1", queryId=query_id)
            header = reply.header if isinstance(reply, Arrow) else reply
            assert header["queryId"] == query_id


def test_a_missing_id_is_made(wire: Wire) -> None:
    first = wire.request(type="exec", sql="select 1")["queryId"]
    second = wire.request(type="exec", sql="select 1")["queryId"]
    assert len(first) == 36
    assert first != second


def test_sql_errors_are_duckdbs_own_text(wire: Wire) -> None:
    reply = wire.arrow("selec 1", "bad")
    assert reply["code"] == "query_error"
    assert reply["queryId"] == "bad"
    assert 'Parser Error: syntax error at or near "selec"' in reply["error"]
    missing = wire.request(type="json", sql="from missing", queryId="m")
    assert "Catalog Error: Table with name missing does not exist" in missing["error"]
    assert wire.table("select 1 as a").to_pydict() == {"a": [1]}


def test_an_error_after_the_first_rows_breaks_the_message_and_follows_it(wire: Wire) -> None:
    sql = "select case when i = 4000000 then error('boom') else i end from range(5000000) t(i)"
    broken = wire.arrow(sql, "late")
    assert isinstance(broken, Arrow)
    with pytest.raises((pa.ArrowInvalid, OSError)):
        broken.table()
    error = wire.receive()
    assert error["queryId"] == "late"
    assert "boom" in error["error"]
    assert wire.table("select 1 as a").to_pydict() == {"a": [1]}


def test_a_late_error_of_json_leaves_no_valid_json(wire: Wire) -> None:
    sql = "select case when i = 4000000 then error('boom') else i end as i from range(5000000) t(i)"
    wire.send(type="json", sql=sql, queryId="late")
    message = wire.socket.recv()
    with pytest.raises(json.JSONDecodeError):
        json.loads(message)
    assert "boom" in wire.receive()["error"]


def test_exec_runs_a_query_to_its_end(wire: Wire) -> None:
    wire.exec("create sequence s; select nextval('s') from range(300000)")
    assert wire.rows("select nextval('s') as n") == [{"n": 300_001}]


def test_statements_do_not_leak_into_each_other(wire: Wire) -> None:
    wire.exec("create schema other; create temp table hidden as select 1")
    wire.exec("use other; set variable v = 5; begin")
    assert wire.rows("select current_schema() as s, getvariable('v') as v") == [
        {"s": "main", "v": None}
    ]
    assert "does not exist" in wire.arrow("from hidden")["error"]


def test_python_variables_are_not_tables(wire: Wire) -> None:
    assert "does not exist" in wire.arrow("from settings")["error"]


def test_fifty_queries_at_once(wire: Wire) -> None:
    for number in range(50):
        wire.send(
            type="arrow", sql=f"select {number} as n, count(*) from range(100000)", queryId=number
        )
    replies = [wire.receive() for _ in range(50)]
    assert {reply.header["queryId"]: reply.table()["n"][0].as_py() for reply in replies} == {
        number: number for number in range(50)
    }


def test_an_id_in_flight_is_refused_and_free_again_afterwards(wire: Wire) -> None:
    wire.send(type="exec", sql=ENDLESS, queryId="twice")
    refused = wire.arrow("select 1", "twice")
    assert refused["code"] == "conflict"
    assert "'twice'" in refused["error"]
    wire.send(type="cancel", queryId="twice")
    assert {wire.receive()["type"], wire.receive()["type"]} == {"cancelAck", "error"}
    assert wire.arrow("select 1", "twice").header["queryId"] == "twice"


ENDLESS = "select sum(a.range * b.range) from range(10000000) a, range(10000000) b"


def test_too_many_requests_in_flight_are_refused(launch: Callable[..., LocalServer]) -> None:
    with launch(max_in_flight=3).connect() as wire:
        for number in range(3):
            wire.send(type="exec", sql=ENDLESS, queryId=number)
        refused = wire.arrow("select 1", "more")
        assert refused["code"] == "busy"
        assert "--max-in-flight" in refused["error"]
        for number in range(3):
            wire.send(type="cancel", queryId=number)
        for _ in range(6):
            wire.receive()
        assert wire.table("select 1 as a").num_rows == 1


def test_a_full_queue_says_busy_at_once(launch: Callable[..., LocalServer]) -> None:
    with launch(workers=1, max_queue=2).connect() as wire:
        wire.send(type="exec", sql=ENDLESS, queryId="runs")
        # It has to leave the queue first: sums of one number tell that a worker took it.
        refused: list[dict[str, str]] = []
        sent = 0
        while not refused:
            sent += 1
            wire.send(type="exec", sql="select 1", queryId=sent)
            wire.send(type="hello")
            reply = wire.receive()
            if reply["type"] == "error":
                refused.append(reply)
                assert wire.receive()["type"] == "welcome"
        assert refused[0]["code"] == "busy"
        assert "--max-queue" in refused[0]["error"]
        assert sent <= 4


def test_conflicting_writes_are_retried(server: LocalServer) -> None:
    with server.connect() as wire:
        wire.exec("create table counter as select 0 as n")
    errors: list[object] = []

    def count() -> None:
        with server.connect() as own:
            for _ in range(25):
                reply = own.request(type="exec", sql="update counter set n = n + 1", queryId="u")
                if reply["type"] != "ok":
                    errors.append(reply)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with server.connect() as wire:
        assert wire.rows("from counter") == [{"n": 100}]


def test_several_statements_are_not_repeated_after_a_conflict(server: LocalServer) -> None:
    with server.connect() as wire:
        wire.exec("create table counter as select 0 as n; create table log(i int)")
    outcomes: list[str] = []

    def count() -> None:
        sql = "insert into log values (1); update counter set n = n + 1"
        with server.connect() as own:
            for _ in range(50):
                reply = own.request(type="exec", sql=sql, queryId="u")
                outcomes.append(reply.get("code", "ok"))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"ok", "conflict"}
    with server.connect() as wire:
        assert wire.rows("select count(*) as n from log") == [{"n": 200}]
        assert wire.rows("from counter") == [{"n": outcomes.count("ok")}]


def test_hello_tells_the_limits(wire: Wire) -> None:
    welcome = wire.request(type="hello")
    assert welcome["type"] == "welcome"
    assert welcome["protocol"] == 1
    assert welcome["limits"]["maxMessageSize"] == 128 << 20
    assert "uploadArrow" in welcome["features"]
    assert wire.request(type="hello")["connectionId"] == welcome["connectionId"]
