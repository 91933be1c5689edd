"""What a client is told of the changes that others make."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pytest

from sqlrooms_server.db.versions import Change
from tests.conftest import LocalServer, ServerProcess
from tests.test_sessions import Session
from tests.wire import Wire, framed, ipc

IS_2X = int(duckdb.__version__.split(".")[0]) >= 2
ROW = pa.table({"i": pa.array([1], pa.int32())})


def watch(wire: Wire, tables: Any = "*", **fields: Any) -> Any:
    answer = wire.request(type="watch", tables=tables, **fields)
    assert answer["type"] == "watching", answer
    return answer


def changed(wire: Wire) -> Any:
    message = wire.receive()
    assert message["type"] == "changed", message
    return message


def clock_of(message: Any) -> int:
    return int(message["version"].split("-")[1])


def is_silent(wire: Wire) -> bool:
    """Whether nothing was told of all that was done before."""
    # Everything is told in order, and what comes close together in one message.
    wire.send(type="exec", sql="create or replace table marker as select 1 as i", queryId="m")
    messages = [wire.receive(), wire.receive()]
    told = [set(message["tables"]) for message in messages if message["type"] == "changed"]
    return told == [{"marker"}]


def send_all(wire: Wire, sql: str, count: int) -> None:
    """Run ``sql`` so many times, some at a time."""
    for number in range(count + 16):
        if number < count:
            wire.send(type="exec", sql=sql, queryId=number)
        if number >= 16:
            assert wire.receive()["type"] == "ok"


@pytest.fixture
def both(server: LocalServer) -> Any:
    """One who changes and one who watches."""
    with server.connect() as writer, server.connect() as watcher:
        writer.exec("create table t(i int); create table u(i int); create schema s")
        writer.exec("create table s.t(i int)")
        yield writer, watcher


@pytest.mark.parametrize(
    ("sql", "tables", "op"),
    [
        ("insert into t values (1)", {"t"}, "insert"),
        ("insert into T values (1) returning i", {"t"}, "insert"),
        ("update t set i = 2", {"t"}, "update"),
        ("delete from s.t", {"s.t"}, "delete"),
        ("truncate u", {"u"}, "delete"),
        ("merge into u using t on false when not matched then insert values (1)", {"u"}, "merge"),
        ("create table n as select 1 as i", {"n"}, "create"),
        ("create view v as select 1 as i", {"v"}, "create"),
        ('create table "a b"(i int)', {'"a b"'}, "create"),
        ('create table s."a.b"(i int)', {'s."a.b"'}, "create"),
        ("drop table t", {"t"}, "drop"),
        ("alter table t rename to n", {"t", "n"}, "alter"),
        ("insert into t values (1); insert into u values (1)", {"t", "u"}, "insert"),
        ("insert into t values (1); delete from u", {"t", "u"}, "change"),
        ("begin; insert into t values (1); delete from u; commit", {"t", "u"}, "change"),
    ],
)
def test_what_is_told(both: tuple[Wire, Wire], sql: str, tables: set[str], op: str) -> None:
    writer, watcher = both
    answer = watch(watcher)
    writer.exec(sql)
    message = changed(watcher)
    assert set(message["tables"]) == tables
    assert message["op"] == op
    assert "resync" not in message
    assert set(message["tables"].values()) == {clock_of(message)}
    assert clock_of(message) > clock_of(answer)


def test_copies_and_another_database(both: tuple[Wire, Wire], tmp_path: Path) -> None:
    writer, watcher = both
    (tmp_path / "rows.csv").write_text("5\n")
    writer.exec("attach ':memory:' as o; create table o.t(i int); create table o.s(i int)")
    watch(watcher)
    writer.exec(f"copy t from '{tmp_path / 'rows.csv'}'")
    message = changed(watcher)
    assert (set(message["tables"]), message["op"]) == ({"t"}, "copy")
    writer.exec("insert into o.t values (1)")
    assert set(changed(watcher)["tables"]) == {"o.main.t"}
    # Two parts may be a schema or a database.
    assert watch(watcher, ["o.t"])["versions"]["o.main.t"] > 0
    writer.exec("insert into s.t values (1); insert into t values (1)")
    writer.exec("insert into o.t values (2)")
    assert set(changed(watcher)["tables"]) == {"o.main.t"}


def test_what_the_answer_says(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    answer = watch(watcher, ["t", "S.T", '"t"', "never", "memory.main.t", "memory.s.t"])
    assert set(answer) == {"type", "versions", "version"}
    # Nobody asked before, so that nothing was looked into.
    assert set(answer["versions"].values()) == {0}
    writer.exec("insert into t values (1)")
    version = changed(watcher)["tables"]["t"]
    writer.exec("insert into s.t values (1)")
    other = changed(watcher)["tables"]["s.t"]
    assert other > version
    answer = watch(watcher, ["t", "S.T", '"t"', "never", "memory.main.t", "memory.s.t"])
    assert answer["versions"] == {
        # By the names that changes have.
        "t": version,
        "s.t": other,
        "never": 0,
    }
    assert clock_of(answer) == other
    assert watch(watcher)["versions"] == {"t": version, "s.t": other}


def test_only_what_is_watched(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    watch(watcher, ["t", "later"])
    for sql in ("insert into u values (1)", "insert into s.t values (1)", "delete from u"):
        writer.exec(sql)
    writer.exec("create table later(i int)")
    assert set(changed(watcher)["tables"]) == {"later"}
    writer.exec("insert into LATER values (1); insert into u values (2)")
    assert set(changed(watcher)["tables"]) == {"later"}


def test_another_watch_replaces_it_and_unwatch_ends_it(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    watch(watcher, ["t"])
    watch(watcher, ["u"])
    writer.exec("insert into t values (1)")
    writer.exec("insert into u values (1)")
    assert set(changed(watcher)["tables"]) == {"u"}
    assert watcher.request(type="unwatch") == {"type": "unwatched"}
    writer.exec("insert into u values (1)")
    assert watcher.request(type="unwatch") == {"type": "unwatched"}
    watch(watcher)
    assert is_silent(watcher)


def test_what_changes_nothing_is_silent(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    watch(watcher)
    for sql in (
        "insert into nowhere values (1)",
        "insert into t values ('x')",
        "begin; insert into t values (1)",
        "from t",
        "set threads = 2",
        "checkpoint",
        "explain insert into t values (1)",
        "create temp table mine as select 1 as i",
        "create schema another",
        "create macro one() as 1",
        "selec",
    ):
        writer.arrow(sql)
    session = Session(writer)
    session.run("create temp table mine(i int)", "insert into mine values (1)", "drop table mine")
    session.run("create temp table x as select 1 as i", "insert into TEMP.x values (1)")
    watcher.send(type="exec", sql="create or replace table marker as select 1", queryId="m")
    told: set[str] = set()
    while "marker" not in told:
        message = watcher.receive()
        if message["type"] == "changed":
            told |= set(message["tables"])
            assert not message.get("resync")
    # What an open transaction of a message was about to change may be told, too.
    assert told <= {"marker", "t"}


def test_meta_tables_are_silent(launch: Callable[..., LocalServer]) -> None:
    server = launch(meta_namespace="Meta")
    with server.connect() as wire, server.connect() as watcher:
        watch(watcher)
        name = wire.rows(
            "select table_name as n from duckdb_tables() where schema_name ilike 'meta' limit 1"
        )[0]["n"]
        wire.arrow(f"delete from meta.{name}")
        assert is_silent(watcher)
        assert f"meta.{name}" not in {key.lower() for key in watch(watcher)["versions"]}


def test_sessions_tell_when_they_commit(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    watch(watcher)
    session = Session(writer)
    session.run("begin", "insert into t values (1)", "delete from t", "insert into u values (1)")
    session.run("rollback", "begin", "insert into t values (1)", "insert into s.t values (1)")
    writer.exec("insert into u values (3)")
    # The marker: what is told comes in the order of the commits.
    assert set(changed(watcher)["tables"]) == {"u"}
    session.run("commit")
    message = changed(watcher)
    assert set(message["tables"]) == {"t", "s.t"}
    assert message["op"] == "insert"
    session.run("insert into t values (1)")
    assert set(changed(watcher)["tables"]) == {"t"}
    session.run("begin", "insert into t values (1)")
    assert session.close()
    assert is_silent(watcher)


def test_uploads(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    watch(watcher)
    for mode, name in (("append", "t"), ("replace", "s.t"), ("create", "New"), ("append", '"NEW"')):
        assert writer.upload(ROW, tableName=name, mode=mode)["type"] == "uploadAck"
        message = changed(watcher)
        assert [key.lower() for key in message["tables"]] == [name.lower().strip('"')]
        assert message["op"] == "upload"
        assert "resync" not in message
    body = ipc(ROW)
    header = {"type": "uploadArrow", "queryId": "c", "tableName": "u"}
    writer.send_raw(framed({**header, "seq": 0, "last": False}, body[:40]))
    writer.send_raw(framed({**header, "seq": 1, "last": True}, body[40:]))
    while writer.receive()["type"] != "uploadAck":
        pass
    assert set(changed(watcher)["tables"]) == {"u"}
    assert writer.upload(ROW, tableName="u", mode="create")["code"] == "conflict"
    assert writer.upload(body[:-20], tableName="u")["type"] == "error"
    writer.send_raw(framed({**header, "seq": 0, "last": False}, body[:40]))
    writer.send(type="cancel", queryId="c")
    while writer.receive()["type"] != "error":
        pass
    assert is_silent(watcher)


@pytest.mark.parametrize(
    "sql",
    [
        "call pragma_version()",
        "attach ':memory:' as other",
        "prepare p as insert into t values (1); execute p",
        "use s; insert into t values (1)",
        "drop schema s cascade",
    ],
)
def test_what_cannot_be_known_beforehand(both: tuple[Wire, Wire], sql: str) -> None:
    writer, watcher = both
    watch(watcher, ["u"])
    writer.arrow(sql)
    message = changed(watcher)
    assert message["resync"] is True
    assert message["tables"] == {}
    answer = watch(watcher, ["u"], since="nonsense")
    assert answer["resync"] is True


@pytest.mark.skipif(not IS_2X, reason="DuckDB 1.5 has no triggers")
def test_triggers(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    writer.exec(
        "create trigger fires after insert on t referencing new table as n "
        "for each statement insert into u from n"
    )
    watch(watcher, ["u"])
    writer.exec("insert into t values (1)")
    assert changed(watcher)["resync"] is True


def test_a_reconnect(server: LocalServer) -> None:
    with server.connect() as writer:
        writer.exec("create table t(i int); create table u(i int)")
        with server.connect() as wire:
            first = watch(wire)
            writer.exec("insert into t values (1)")
            seen = changed(wire)
        writer.exec("insert into t values (2)")
        writer.exec("insert into u values (2)")
        writer.exec("insert into u values (3)")
        with server.connect() as wire:
            answer = watch(wire, since=seen["version"])
            assert answer["resync"] is False
            message = changed(wire)
            assert set(message["tables"]) == {"t", "u"}
            assert message["version"] == answer["version"]
            assert message["tables"] == answer["versions"]
            # Nothing was missed since, of other tables neither.
            assert watch(wire, since=message["version"])["resync"] is False
            assert watch(wire, ["other"], since=first["version"])["resync"] is False
            assert watch(wire, ["u"], since=seen["version"])["resync"] is False
            assert set(changed(wire)["tables"]) == {"u"}
            for since in ("", "x", "-1", first["version"] + "9" * 12, f"{'0' * 12}-1", "٣"):
                assert watch(wire, since=since)["resync"] is True
            writer.exec("call pragma_version()")
            changed(wire)
            assert watch(wire, since=message["version"])["resync"] is True


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_restart(serve: Callable[..., ServerProcess], tmp_path: Path, ends_well: bool) -> None:
    arguments = ("--db-path", str(tmp_path / "data.db"), "--cache-dir", str(tmp_path / "cache"))
    server = serve(*arguments)
    with server.connect() as wire:
        watch(wire)
        wire.send(type="exec", sql="create table t(i int)", queryId="c")
        messages = [wire.receive(), wire.receive()]
        seen = next(message for message in messages if message["type"] == "changed")
    server.stop(15 if ends_well else 9)
    server = serve(*arguments)
    with server.connect() as wire:
        answer = watch(wire, since=seen["version"])
        # After a clean stop nothing can have changed the file, and the clock goes on.
        if answer["resync"]:
            assert set(answer["versions"]) <= {"t"}
        else:
            assert ends_well
            assert answer["versions"] == seen["tables"]
        wire.send(type="exec", sql="insert into t values (1)", queryId="i")
        messages = [wire.receive(), wire.receive()]
        assert {"changed", "ok"} == {message["type"] for message in messages}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tables": []},
        {"tables": "t"},
        {"tables": {}},
        {"tables": None},
        {"tables": [1]},
        {"tables": [""]},
        {"tables": ["a.b.c.d"]},
        {"tables": ["a b"]},
        {"tables": ["a; drop table t"]},
        {"tables": ["t"] * 1001},
        {"tables": "*", "since": 1},
        {"tables": "*", "since": {}},
    ],
)
def test_bad_messages(wire: Wire, fields: dict[str, Any]) -> None:
    answer = wire.request(type="watch", **fields)
    assert (answer["type"], answer["code"]) == ("error", "bad_request")
    watch(wire)
    assert is_silent_to_itself(wire)


def is_silent_to_itself(wire: Wire) -> bool:
    return bool(wire.request(type="unwatch") == {"type": "unwatched"})


def test_a_thousand_tables(both: tuple[Wire, Wire]) -> None:
    writer, watcher = both
    answer = watch(watcher, [f"t{number}" for number in range(999)] + ["t"])
    assert len(answer["versions"]) == 1000
    writer.exec("insert into t values (1)")
    assert set(changed(watcher)["tables"]) == {"t"}


def test_a_change_while_a_watch_begins(server: LocalServer, wire: Wire) -> None:
    """A commit right after the clock was read, before anybody else watched."""
    versions = server.server.main.database.engine.versions
    known = versions.known

    def meddled(since: int = 0) -> Any:
        found = known(since)
        versions.known = known  # type: ignore[method-assign]
        change = Change("insert", (("memory", "main", "t"),))
        worker = threading.Thread(target=versions.record, args=(change,))
        worker.start()
        worker.join()
        return found

    versions.known = meddled  # type: ignore[method-assign]
    answer = watch(wire)
    assert changed(wire)["tables"] == {"t": clock_of(answer) + 1}


def test_a_burst_is_told_completely_and_in_order(server: LocalServer) -> None:
    writers, commits = 4, 500
    with server.connect() as setup:
        for number in range(writers):
            setup.exec(f"create table t{number}(i int)")
    with server.connect() as one, server.connect() as other, server.connect() as last:
        watchers = {one: "*", other: ["t0", "t1"], last: ["t3"]}
        for wire, tables in watchers.items():
            watch(wire, tables)

        def write(number: int) -> None:
            with server.connect() as wire:
                send_all(wire, f"insert into t{number} values (1)", commits)

        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(write, range(writers)))
        final = server.server.main.database.engine.versions
        latest = {f"t{n}": final.version(f"memory\0main\0t{n}") for n in range(writers)}
        for wire, tables in watchers.items():
            expected = {
                name: version for name, version in latest.items() if tables == "*" or name in tables
            }
            seen: dict[str, int] = {}
            clock = count = 0
            while seen != expected:
                message = changed(wire)
                count += 1
                assert message["tables"]
                assert clock_of(message) > clock
                for name, version in message["tables"].items():
                    assert clock < version <= clock_of(message)
                    assert version > seen.get(name, 0)
                clock = clock_of(message)
                seen.update(message["tables"])
            assert count < writers * commits
            # Nothing comes twice.
            assert wire.request(type="unwatch") == {"type": "unwatched"}


def test_a_client_that_does_not_read(serve: Callable[..., ServerProcess]) -> None:
    process = serve()
    server = psutil.Process(process.pid)
    names = [f"{'long_name_' * 20}{number}" for number in range(100)]
    with process.connect() as writer, process.connect(max_queue=1) as watcher:
        for name in names:
            writer.exec(f"create table {name}(i int)")
        watch(watcher)
        sql = "; ".join(f"insert into {name} values (1)" for name in names)
        writer.exec(sql)
        before = server.memory_info().rss
        # Each is told with 20 KB: 140 MB.
        send_all(writer, sql, 70)
        writer.exec(f"insert into {names[0]} values (2)")
        assert server.memory_info().rss - before < 100 << 20
        with process.connect() as other:
            expected = watch(other)["versions"]
        seen: dict[str, int] = {}
        while seen != expected:
            seen.update(changed(watcher)["tables"])
        assert watcher.request(type="unwatch") == {"type": "unwatched"}
