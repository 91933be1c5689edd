"""Sessions: what lasts from one query to the next, in which order, and how they end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.conftest import LocalServer, ServerProcess
from tests.streams import Streams, stream
from tests.test_chunked_results import ENDLESS_ROWS, wait_until
from tests.test_large_results import abort
from tests.test_queries import ENDLESS
from tests.wire import Arrow, Wire


class Session:
    """A session of one connection, one query at a time."""

    def __init__(self, wire: Wire, name: str = "s") -> None:
        self.wire = wire
        self.name = name

    def request(self, sql: str, kind: str = "json", **options: Any) -> Any:
        options = {"queryId": "in session", **options}
        return self.wire.request(type=kind, sql=sql, session=self.name, **options)

    def run(self, *statements: str) -> None:
        for sql in statements:
            reply = self.request(sql, "exec")
            assert reply["type"] == "ok", reply

    def value(self, sql: str) -> Any:
        reply = self.request(sql, "arrow")
        assert isinstance(reply, Arrow), reply
        return reply.table().column(0)[0].as_py()

    def fails(self, sql: str, code: str = "query_error", kind: str = "exec") -> str:
        reply = self.request(sql, kind)
        assert reply["type"] == "error", reply
        assert reply["code"] == code
        return str(reply["error"])

    def close(self) -> bool:
        reply = self.wire.request(type="closeSession", session=self.name)
        assert reply["type"] == "sessionClosed"
        assert reply["session"] == self.name
        return bool(reply["closed"])


def count(wire: Wire, table: str = "t") -> Any:
    return wire.rows(f"select count(*) as n from {table}")[0]["n"]


def test_what_lasts_from_one_query_to_the_next(wire: Wire) -> None:
    session = Session(wire)
    session.run("create temp table mine as select 1 as i", "set variable v = 7")
    session.run("create schema other", "use other", "create table here as select 5 as i")
    session.run("set timezone = 'Asia/Tokyo'", "prepare p as select $1 + 1 as n")
    assert session.value("from mine") == 1
    assert session.value("select getvariable('v')") == 7
    assert session.value("from memory.other.here") == 5
    assert session.value("select current_schema()") == "other"
    assert session.value("select current_setting('timezone')") == "Asia/Tokyo"
    assert session.value("execute p(41)") == 42
    # For nobody else.
    for elsewhere in (Session(wire, "else"), Session(wire, "S")):
        assert "does not exist" in elsewhere.fails("from mine")
        assert elsewhere.value("select getvariable('v')") is None
        assert elsewhere.value("select current_schema()") == "main"
        elsewhere.fails("execute p(41)")
    assert "does not exist" in wire.arrow("from mine")["error"]
    assert wire.rows("select current_schema() as s") == [{"s": "main"}]


def test_sessions_of_one_name_belong_to_their_connections(server: LocalServer) -> None:
    with server.connect() as first, server.connect() as second:
        Session(first).run("create temp table mine as select 1 as i")
        assert "does not exist" in Session(second).fails("from mine")
        assert Session(second).close()
        assert Session(first).value("from mine") == 1


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_over_several_queries(server: LocalServer, end: str) -> None:
    with server.connect() as wire, server.connect() as other:
        wire.exec("create table t as select 1 as i")
        session = Session(wire)
        session.run("begin", "insert into t values (2)", "update t set i = i + 10")
        assert session.value("select sum(i)::int from t") == 23
        assert other.rows("select sum(i) as n from t") == [{"n": 1}]
        assert wire.rows("select sum(i) as n from t") == [{"n": 1}]
        session.run(end)
        expected = 23 if end == "commit" else 1
        assert other.rows("select sum(i) as n from t") == [{"n": expected}]


def test_two_hundred_statements_run_in_order(wire: Wire) -> None:
    session = Session(wire)
    session.run("create temp table t as select 0 as n")
    for number in range(200):
        # Each applies only after the one before.
        sql = f"update t set n = {number + 1} where n = {number}"
        wire.send(type="exec", sql=sql, session="s", queryId=number)
    assert [wire.receive()["queryId"] for _ in range(200)] == list(range(200))
    assert session.value("from t") == 200


def test_sessions_run_beside_each_other(wire: Wire) -> None:
    wire.send(type="exec", sql=ENDLESS, session="busy", queryId="long")
    assert Session(wire, "free").value("select 1") == 1
    assert wire.rows("select 1 as a") == [{"a": 1}]
    wire.send(type="exec", sql="select 1", session="busy", queryId="waits")
    wire.send(type="cancel", queryId="long")
    replies = [wire.receive() for _ in range(3)]
    assert [reply["queryId"] for reply in replies if reply["type"] == "ok"] == ["waits"]


def test_a_disconnect_rolls_back(server: LocalServer) -> None:
    with server.connect() as other:
        other.exec("create table t as select 1 as i")
        for leave in (abort, lambda wire: wire.__exit__()):
            wire = server.connect()
            Session(wire).run("begin", "insert into t values (2)", "create table u(i int)")
            leave(wire)
            wait_until(lambda: not server.server.main.sessions._open)
            assert count(other) == 1
            assert "does not exist" in other.arrow("from u")["error"]
            # No lock is left either.
            other.exec("update t set i = i")
            other.exec("force checkpoint")


def test_a_disconnect_while_the_session_runs(server: LocalServer) -> None:
    with server.connect() as other:
        other.exec("create table t as select 1 as i")
        wire = server.connect()
        Session(wire).run("begin", "insert into t values (2)")
        wire.send(type="exec", sql=ENDLESS, session="s", queryId=1)
        wire.send(type="exec", sql="commit", session="s", queryId=2)
        wire.request(type="hello")
        abort(wire)
        wait_until(lambda: not server.server.main.sessions._open)
        assert count(other) == 1


def test_an_idle_session_ends_and_says_so_until_it_is_closed(
    launch: Callable[..., LocalServer],
) -> None:
    server = launch(session_idle_timeout=1)
    with server.connect() as wire, server.connect() as other:
        wire.exec("create table t as select 1 as i")
        session = Session(wire)
        session.run("begin", "insert into t values (2)")
        wait_until(lambda: not server.server.main.sessions._open)
        assert count(other) == 1
        for _ in range(3):
            text = session.fails("insert into t values (3)", "gone")
            assert "--session-idle-timeout" in text
        assert count(other) == 1
        assert session.close() is False
        session.run("insert into t values (4)")
        assert count(other) == 2


def test_a_session_that_works_is_not_idle(launch: Callable[..., LocalServer]) -> None:
    server = launch(session_idle_timeout=1)
    with server.connect() as wire:
        Session(wire).run("create temp table t as select 1 as i")
        streams = Streams(wire)
        stalled = streams.ask("select range as a from range(1000)", window=1000, session="s")
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            streams.settle()
        assert not stalled.ended
        streams.ack(stalled)
        streams.finish(acks=True)
        assert stalled.table().num_rows == 1000
        assert Session(wire).value("from t") == 1


def test_close_session(server: LocalServer) -> None:
    with server.connect() as wire:
        session = Session(wire)
        assert session.close() is False
        session.run("create table t as select 1 as i", "begin", "insert into t values (2)")
        assert session.close() is True
        assert count(wire) == 1
        assert session.close() is False
        # A new one of the same name, without being told that the old one is gone.
        session.run("insert into t values (3)")
        assert count(wire) == 2


def test_close_session_comes_after_what_was_sent_before(wire: Wire) -> None:
    wire.exec("create table t as select 0 as i")
    for number in range(20):
        sql = f"insert into t values ({number})"
        wire.send(type="exec", sql=sql, session="s", queryId=number)
    wire.send(type="closeSession", session="s")
    wire.send(type="exec", sql="set variable v = 1", session="s", queryId="new")
    order = [reply.get("queryId", reply["type"]) for reply in (wire.receive() for _ in range(22))]
    order.remove("new")
    assert order == [*range(20), "sessionClosed"]
    assert count(wire) == 21


def test_close_session_while_a_stream_of_it_is_read(wire: Wire) -> None:
    streams = Streams(wire)
    # Too much for the server to have it all ready before the client goes on.
    rows = 1_000_000
    asked = streams.ask(f"select range as a from range({rows})", window=100_000, session="s")
    streams.receive()
    wire.send(type="closeSession", session="s")
    streams.settle()
    assert not streams.others
    streams.ack(asked)
    streams.finish(acks=True)
    assert asked.table().num_rows == rows
    assert streams.until("sessionClosed")["closed"] is True


def test_limits_of_sessions(launch: Callable[..., LocalServer]) -> None:
    server = launch(max_sessions_per_connection=2, max_sessions=3)
    with server.connect() as first:
        for name in ("a", "b"):
            Session(first, name).run("select 1")
        text = Session(first, "c").fails("select 1", "busy")
        assert "--max-sessions-per-connection" in text
        Session(first, "a").run("select 1")
        with server.connect() as second:
            Session(second, "a").run("select 1")
            assert "(--max-sessions)" in Session(second, "b").fails("select 1", "busy")
            assert Session(first, "a").close()
            Session(second, "b").run("select 1")
            assert Session(first, "c").fails("select 1", "busy")
        wait_until(lambda: len(server.server.main.sessions._open) == 1)
        Session(first, "c").run("select 1")


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_session_survives_what_is_broken_off(wire: Wire, how: str) -> None:
    session = Session(wire)
    session.run("create temp table mine as select 1 as i")
    for sql, kind in ((ENDLESS, "exec"), (ENDLESS_ROWS, "arrow"), (ENDLESS_ROWS, "stream")):
        streams = Streams(wire)
        options: dict[str, Any] = {"timeoutMs": 100} if how == "timeout" else {}
        if kind == "stream":
            asked = streams.ask(sql, "q", session="s", window=1000, **options)
            while len(asked.body) < 1000 and not asked.ended:
                streams.receive()
        else:
            wire.send(type=kind, sql=sql, session="s", queryId="q", **options)
        # Waits for its turn behind the one that is broken off, with rows unread.
        wire.send(type="json", sql="from mine", session="s", queryId="next")
        if how == "cancel":
            wire.send(type="cancel", queryId="q")
        data = streams.until("json")["data"]
        assert data == '[{"i":1}]'
        ends = [*streams.others, *(s.error for s in streams.of.values() if s.error)]
        codes = [end["code"] for end in ends if isinstance(end, dict) and "code" in end]
        assert codes == ["cancelled" if how == "cancel" else "timeout"], ends
        assert session.value("select 2") == 2


def test_a_timeout_while_a_query_waits_in_its_session(wire: Wire) -> None:
    wire.send(type="exec", sql=ENDLESS, session="s", queryId="long")
    wire.send(type="exec", sql="select 1", session="s", queryId="short", timeoutMs=50)
    reply = wire.receive()
    assert (reply["queryId"], reply["code"]) == ("short", "timeout")
    wire.send(type="cancel", queryId="long")
    assert {wire.receive()["type"] for _ in range(2)} == {"cancelAck", "error"}
    assert Session(wire).value("select 1") == 1


def test_two_hundred_cancels_in_one_session_hit_only_what_they_mean(wire: Wire) -> None:
    """A late interrupt must not reach the next statement."""
    session = Session(wire)
    session.run("create temp table t(i int)")
    done = 0
    for number in range(200):
        sql = f"insert into t select range from range({number % 5 * 10_000})"
        wire.send(type="exec", sql=sql, session="s", queryId="cancelled")
        wire.send(type="cancel", queryId="cancelled")
        wire.send(type="exec", sql="insert into t values (-1)", session="s", queryId="kept")
        replies = [wire.receive() for _ in range(3)]
        assert {"type": "ok", "queryId": "kept"} in replies, replies
        done += 1
    assert session.value("select count(*)::int from t where i = -1") == done


def test_an_error_in_a_transaction(wire: Wire) -> None:
    session = Session(wire)
    session.run("create table t as select 1 as i", "begin", "insert into t values (2)")
    session.fails("insert into t values (error('broken'))")
    session.run("rollback")
    assert session.value("select count(*)::int from t") == 1
    session.run("begin", "insert into t values (3)", "commit")
    assert session.value("select count(*)::int from t") == 2


def test_a_rollback_with_progress_after_an_error(wire: Wire) -> None:
    session = Session(wire)
    session.run("create table t(i int primary key)", "begin", "insert into t values (1)")
    session.fails("insert into t values (1)")
    reply = session.request("rollback", "exec", progress=True)
    assert reply["type"] == "ok", reply
    assert session.value("select count(*)::int from t") == 0


def test_a_bad_parameter_leaves_the_transaction_open(wire: Wire) -> None:
    session = Session(wire)
    session.run("create table t(i int)", "begin", "insert into t values (1)")
    for params in ([], [{"$type": "INTEGER", "value": "x"}], [{"$type": "NOPE", "value": 1}]):
        reply = session.request("insert into t values ($1)", "exec", params=params)
        assert reply["code"] == "bad_request", reply
    session.run("commit")
    assert session.value("select count(*)::int from t") == 1


def test_streams_in_a_session(wire: Wire) -> None:
    session = Session(wire)
    session.run("create temp table mine as select range as i from range(300000)")
    whole = session.request("from mine", "arrow")
    assert bytes(stream(wire, "from mine", session="s").body) == whole.body
    assert bytes(stream(wire, "from mine", session="s", window=100_000).body) == whole.body
    # One after the other, while each waits for acknowledgements.
    streams = Streams(wire)
    for number in range(4):
        streams.ask("from mine", number, session="s", window=100_000)
    streams.finish(acks=True)
    assert {bytes(asked.body) for asked in streams.of.values()} == {whole.body}


def test_a_truncated_result_leaves_the_session_usable(wire: Wire) -> None:
    """Its rows were not read to the end."""
    session = Session(wire)
    for kind in ("arrow", "json"):
        reply = session.request(ENDLESS_ROWS, kind, maxRows=10)
        header = reply.header if kind == "arrow" else reply
        assert header["truncated"] is True
        assert session.value("select 1") == 1
    cut = stream(wire, ENDLESS_ROWS, session="s", maxRows=10)
    assert cut.table().num_rows == 10
    session.run("begin", "create table t as select 1 as i")
    assert session.request(ENDLESS_ROWS, "arrow", maxRows=10).table().num_rows == 10
    session.run("commit")
    assert count(wire) == 1


def test_an_error_in_the_middle_of_a_result_leaves_the_session_usable(wire: Wire) -> None:
    session = Session(wire)
    session.run("create temp table mine as select 1 as i")
    value = "case when i = 500000 then error('half-way') else i end"
    failed = stream(wire, f"select {value} as a from range(1000000) t(i)", session="s")
    assert failed.code == "query_error"
    assert session.value("from mine") == 1


def test_returning_rows_in_a_session(wire: Wire) -> None:
    session = Session(wire)
    session.run("create table t(i int)", "begin")
    sql = "insert into t select range from range(300000) returning i"
    assert session.request(sql, "arrow").table().num_rows == 300_000
    cut = session.request(sql, "arrow", maxRows=1)
    assert cut.header["truncated"] is True
    session.run("commit")
    assert count(wire) == 600_000


@pytest.mark.parametrize("kind", ["exec", "arrow", "json"])
def test_a_conflict_in_a_session_is_not_tried_again(server: LocalServer, kind: str) -> None:
    with server.connect() as wire, server.connect() as other:
        wire.exec("create table t as select 1 as i")
        first, second = Session(wire), Session(other)
        first.run("begin", "update t set i = 2")
        began = time.monotonic()
        second.run("begin")
        second.fails("update t set i = 3", "conflict", kind)
        # Also outside of BEGIN: the sender decides.
        third = Session(other, "third")
        third.fails("update t set i = 4", "conflict", kind)
        assert time.monotonic() - began < 20
        first.run("commit")
        second.run("rollback")
        third.run("update t set i = i + 40")
        assert wire.rows("from t") == [{"i": 42}]


def test_commit_that_conflicts(server: LocalServer) -> None:
    with server.connect() as wire, server.connect() as other:
        wire.exec("create table t(i int primary key)")
        first, second = Session(wire), Session(other)
        for session in (first, second):
            session.run("begin", "insert into t values (1)")
        first.run("commit")
        reply = second.request("commit", "exec")
        assert reply["code"] in ("conflict", "query_error")
        assert second.value("select count(*)::int from t") == 1


def test_a_killed_server_keeps_what_was_committed(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    path = tmp_path / "s.duckdb"
    process = serve("--db-path", str(path))
    with process.connect() as wire:
        session = Session(wire)
        session.run("create table t as select 1 as i", "begin", "insert into t values (2)")
        session.run("commit", "begin", "insert into t values (3)", "update t set i = i + 10")
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("from t order by i").fetchall() == [(1,), (2,)]


def test_a_signal_with_open_transactions(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    path = tmp_path / "s.duckdb"
    process = serve("--db-path", str(path))
    with process.connect() as wire:
        wire.exec("create table t as select range as i from range(1000000)")
        for number in range(5):
            Session(wire, f"reads {number}").run("begin", "select count(*) from t")
        Session(wire, "changes").run("begin", "update t set i = i + 1", "delete from t where i < 9")
        wire.send(type="exec", sql=ENDLESS, session="runs", queryId="runs")
        wire.send(type="exec", sql="select 1", session="runs", queryId="waits")
        wire.request(type="hello")
        began = time.monotonic()
        assert process.stop() == 0
        # Five by its own clock; the rest is for a busy machine.
        assert time.monotonic() - began < 12
    assert process.errors == ""
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("select count(*), min(i) from t").fetchall() == [(1_000_000, 0)]


def test_a_thousand_sessions_leave_nothing(server: LocalServer) -> None:
    with server.connect() as wire:
        for number in range(1000):
            session = Session(wire, f"s{number}")
            wire.send(type="exec", sql="begin", session=session.name, queryId=number)
            wire.send(type="closeSession", session=session.name)
            assert {wire.receive()["type"] for _ in range(2)} == {"ok", "sessionClosed"}
        sessions = server.server.main.sessions
        assert not sessions._open
        assert not any(sessions._of_peer.values())
    wait_until(lambda: not sessions._of_peer)
    assert not sessions._gone


def test_close_session_while_the_server_stops(launch: Callable[..., LocalServer]) -> None:
    """It is not told that the session was closed, but it is closed all the same."""
    server = launch()
    with server.connect() as wire:
        wire.send(type="exec", sql=ENDLESS, session="s", queryId="q")
        wire.send(type="closeSession", session="s")
        assert wire.request(type="hello")["type"] == "welcome"
        assert server.server.stop()
        replies = [wire.receive(), wire.receive()]
        assert [reply["code"] for reply in replies] == ["shutting_down", "shutting_down"]
    assert not server.server.main.sessions._open


def test_progress_leaves_the_settings_of_a_session(wire: Wire) -> None:
    session = Session(wire)
    setting = "select current_setting('enable_progress_bar') as v"
    before = session.value(setting)
    wire.send(type="json", sql="select 1", session=session.name, progress=True, queryId="p")
    assert wire.receive()["type"] == "json"
    assert session.value(setting) == before


def test_settings_of_the_parser_stay_in_their_session(wire: Wire) -> None:
    asked = {"type": "arrow", "sql": "select 5 / 2 as v"}
    in_session = {**asked, "session": "s"}
    wire.request(type="exec", sql="set integer_division = true", session="s", queryId="e")
    for _ in range(2):
        assert wire.request(**in_session, queryId=1).table()["v"][0].as_py() == 2
        assert wire.request(**asked, queryId=2).table()["v"][0].as_py() == 2.5


def test_a_typed_parameter_in_a_failed_transaction(wire: Wire) -> None:
    session = Session(wire)
    session.run("begin")
    session.fails("select error('stop')", "query_error")
    params = [{"$type": "INTEGER", "value": 1}]
    wire.send(type="json", sql="select $1", params=params, session=session.name, queryId="p")
    reply = wire.receive()
    assert reply["code"] == "query_error" and "aborted" in reply["error"]


def test_a_change_in_a_transaction_is_not_said_to_stand(wire: Wire) -> None:
    session = Session(wire)
    session.run("create table t(i bigint)", "begin")
    sql = "insert into t from range(3000000) returning i"
    wire.send(type="arrow", sql=sql, session="s", stream=True, window=1000, queryId="w")
    assert wire.receive().header["seq"] == 0
    wire.send(type="cancel", queryId="w")
    reply = wire.receive()
    while isinstance(reply, Arrow) or reply["type"] != "error":
        reply = wire.receive()
    assert "part of the transaction" in reply["error"]
