"""What statements change is recorded once it is committed, and nothing escapes.

``SQLROOMS_FUZZ=100000`` tries that many statements, with a seed of its own each time it is set.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from sqlrooms_server.db.effects import effects_of, transactions_of
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.shared_cursor import SharedCursor
from sqlrooms_server.db.statements import quote_identifier
from sqlrooms_server.db.uploads import TableWriter, write_table
from sqlrooms_server.db.versions import Change, Recorded, key_of
from sqlrooms_server.errors import ServerError
from sqlrooms_server.messages import UploadMode
from tests.wire import DEADLINE, ipc

IS_2X = int(duckdb.__version__.split(".")[0]) >= 2
on_2x = pytest.mark.skipif(not IS_2X, reason="DuckDB 1.5 has none of this")

# More than the parser is asked about.
LONG = "/*" + 70_000 * "x" + "*/"

SETUP = """
    create schema s; create schema a; attach ':memory:' as o;
    create table t as select 1 as i; create table u as select 1 as i;
    create table a as select 1 as i; create table a.t as select 1 as i;
    create table s.t as select 1 as i;
    create table o.t as select 1 as i; create table o.s as select 1 as i;
    create table "t\u0085" as select 1 as i; create table "t$x$" as select 1 as i;
    create table "T T" as select 1 as i; create table "T\u00b7T" as select 1 as i;
    create table "a.t" as select 1 as i;
    create table "se""lect" as select 1 as i; create table größe as select 1 as i;
    create sequence q; create table with_default(i int default nextval('q'));
    create view v as from t;
"""

Snapshot = dict[str, str]


class World:
    """A database, and what was recorded of it. Sessions are known by their numbers."""

    def __init__(self, setup: str = SETUP) -> None:
        self.engine = Engine(":memory:", read_only=False, extensions=())
        self.engine._connection.execute(setup)
        self.engine.versions.in_use = True
        self.engine.versions.listen(self._listen)
        self.records: list[tuple[Change, Snapshot]] = []
        self.sessions: dict[int, SharedCursor] = {}

    def _listen(self, recorded: Recorded) -> None:
        self.records.append((recorded.change, self.snapshot()))

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()
        self.engine.close(time.monotonic() + DEADLINE)

    def snapshot(self) -> Snapshot:
        """What others see in each table."""
        with self.engine.native_cursor() as native:
            tables = native.execute(
                "SELECT database_name, schema_name, table_name, sql FROM duckdb_tables() "
                "WHERE NOT temporary AND NOT internal"
            ).fetchall()
            sums = [
                f"SELECT count(*) || ' ' || sum(hash(x)) FROM {'.'.join(names)} AS x"
                for names in ([quote_identifier(part) for part in table[:3]] for table in tables)
            ]
            rows = native.execute(" UNION ALL ".join(sums)).fetchall() if sums else []
        return {
            key_of((table[0], table[1], table[2])): f"{row[0]} {table[3]}"
            for table, row in zip(tables, rows, strict=True)
        }

    def run(self, sql: str, session: int | None = None) -> str:
        """Run ``sql`` as a query and return the error, if any."""
        try:
            if session is None:
                cursor = self.engine.cursor()
            else:
                cursor = self.sessions.setdefault(session, SharedCursor(self.engine)).for_job()
            with cursor:
                result = cursor.run(sql)
                for _ in result.batches if result is not None else ():
                    pass
        except ServerError as error:
            return str(error)
        return ""

    def check(self, act: Callable[[], object]) -> set[str]:
        """Do ``act`` and return the tables that it changed, each of which must be recorded."""
        versions = self.engine.versions
        before, epoch, clock = self.snapshot(), versions.epoch, versions.now()
        del self.records[:]
        act()
        after = self.snapshot()
        changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        for key in changed:
            told = [
                seen
                for change, seen in self.records
                if change.unknown or key in map(key_of, change.tables)
            ]
            name = key.replace("\0", ".")
            assert told, f"the change of {name} escaped: {self.records}"
            assert told[-1].get(key) == after.get(key), f"{name} was recorded before it changed"
            assert versions.version(key) > clock or versions.epoch > epoch, name
        return changed

    def changes(self, *texts: str, session: int | None = None) -> set[str]:
        """Run ``texts`` and return the last parts of the names of the tables that changed."""
        changed = self.check(lambda: [self.run(sql, session) for sql in texts])
        return {key.split("\0", 1)[1].removeprefix("main\0").replace("\0", ".") for key in changed}

    @property
    def told(self) -> set[str]:
        """The tables of all records since the last check."""
        return {".".join(table) for change, _ in self.records for table in change.tables}

    @property
    def is_unknown(self) -> bool:
        return any(change.unknown for change, _ in self.records)


@pytest.fixture
def world() -> Iterator[World]:
    created = World()
    yield created
    created.close()


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    path = tmp_path / "rows.csv"
    path.write_text("i\n5\n")
    return str(path)


# Names: each text is undone by the next test, which has a database of its own.


@pytest.mark.parametrize(
    ("sql", "table"),
    [
        ("insert into t values (2)", "memory.main.t"),
        ("INSERT INTO T VALUES (2)", "memory.main.t"),
        ('insert into "T" values (2)', "memory.main.t"),
        ("insert /* a */ into -- b\n t(i) values (2)", "memory.main.t"),
        ("insert into t(i)values(2);;", "memory.main.t"),
        ("insert into memory.t values (2)", "memory.main.t"),
        ("insert into main.t values (2)", "memory.main.t"),
        ('insert into "T T" values (2)', "memory.main.T T"),
        ('insert into "a.t" values (2)', "memory.main.a.t"),
        ('insert into "se""lect" values (2)', 'memory.main.se"lect'),
        ("insert into größe values (2)", "memory.main.größe"),
        ("insert into t$x$ values (2)", "memory.main.t$x$"),
        ("insert into a.t values (2)", "memory.a.t"),
        ("insert into a/**/.t values (2)", "memory.a.t"),
        ("insert into a /**/ .t values (2)", "memory.a.t"),
        ("insert into a -- x\n.t values (2)", "memory.a.t"),
        ("insert into a /**/ . /**/ t values (2)", "memory.a.t"),
        ("insert into o.t values (2)", "o.main.t"),
        ("insert into o.s values (2)", "o.main.s"),
        ("insert into o.main.t values (2)", "o.main.t"),
        # What Python calls space is a part of the name.
        ("insert into t\u0085 values (2)", "memory.main.t\u0085"),
        ("with x as (select 2 as i) insert into t from x", "memory.main.t"),
        ("insert into t by name select 2 as i", "memory.main.t"),
        ("insert into t select range from range(100000) returning i", "memory.main.t"),
        ("update t set i = 2", "memory.main.t"),
        ("update a /**/ .t set i = 2", "memory.a.t"),
        ("delete from t using u where t.i = u.i", "memory.main.t"),
        ("truncate a.t", "memory.a.t"),
        ("truncate table t", "memory.main.t"),
        ("truncate a /**/ .t", "memory.a.t"),
        (
            "merge into a /**/ .t using (select 5 as i) x on false "
            "when not matched then insert values (x.i)",
            "memory.a.t",
        ),
    ],
)
def test_the_table_that_a_change_names(world: World, sql: str, table: str) -> None:
    assert world.changes(sql)
    assert not world.is_unknown
    assert world.told == {table}


@pytest.mark.parametrize(
    ("sql", "tables"),
    [
        ("create table n as select 1 as i", {"memory.main.n"}),
        ("create /**/ table n as select 1 as i", {"memory.main.n"}),
        ("create or /**/ replace table t as select 2 as i", {"memory.main.t"}),
        ("create table if not exists o.n as select 1 as i", {"o.main.n"}),
        ("drop table t", {"memory.main.t"}),
        ("drop table if exists a.t cascade;", {"memory.a.t"}),
        ("alter table t add column j int", {"memory.main.t"}),
        ("alter table t rename to n", {"memory.main.t", "memory.main.n"}),
        ("alter table a.t rename to n", {"memory.a.t", "memory.a.n"}),
        ('alter table o.main.t rename to "n ""n"', {"o.main.t", 'o.main.n "n'}),
    ],
)
def test_tables_that_come_and_go(world: World, sql: str, tables: set[str]) -> None:
    epoch = world.engine.versions.epoch
    assert world.changes(sql)
    assert world.told == tables
    assert not world.is_unknown
    assert world.engine.versions.epoch > epoch


@pytest.mark.parametrize(
    "sql",
    [
        "create table n/**/as select 1 as i",
        "create table a/**/.n as select 1 as i",
        "create or replace table a /**/ .t as select 4 as i",
        "alter table a /**/ .t add column z int",
        "drop table a /**/ .t",
        "drop sequence q cascade",
        "drop schema s cascade",
        "detach o",
        "attach ':memory:' as p; create table p.t as select 1 as i",
        "use o; insert into t values (2)",
        "set search_path = 's,main'; create table n(i int)",
        "prepare p as insert into t values (2); execute p",
        "prepare p as insert into t select range from range(100000) returning i; execute p",
        "explain analyze insert into t values (2)",
        "explain (analyze, format json) insert into t values (2)",
        "create temp table n(i int); drop table n; insert into t values (2)",
        f"insert into t values (2) {LONG}",
        f"{LONG} insert into t values (2)",
        f"insert into t values (2); {LONG}",
        "create or replace temp table n as select 3 as i; insert into t values (2); pivot t on i;",
        # Some of it is done when the error comes.
        "insert into t values (2); select error('x')",
        "insert into t values (2); from query('selec 1')",
        f"insert into t values (2); from query('selec 1'); {LONG}",
    ],
)
def test_what_nobody_sees_through_is_recorded_all_the_same(world: World, sql: str) -> None:
    assert world.changes(sql)


def test_the_parser_of_2x_runs_what_comes_before_an_error(world: World) -> None:
    assert bool(world.changes("insert into t values (2); selec")) == IS_2X


@pytest.mark.skipif(IS_2X, reason="the grammar of 1.5")
def test_words_that_mean_nothing(world: World) -> None:
    assert world.changes("create unlogged table n as select 1 as i") == {"n"}
    assert world.changes("truncate table only t") == {"t"}
    assert not world.changes("create local temp table m as select 1 as i")


@on_2x
@pytest.mark.parametrize(
    "sql",
    [
        "with x as (insert into t values (2) returning i) from x",
        "with x as (insert into t values (2) returning i), y as (delete from u) from x",
        "with x as (insert into t select range from range(100000) returning i) from x",
        "with x as (insert into t values (2) returning i) insert into u from x",
        "with x as (insert into t values (2) returning i) pivot x on i",
        "with t$x$ as (insert into t values (2) returning i) from t$x$",
        "with x as (insert into t values (2) returning i) select 'insert' from x -- '",
        "create table n as with x as (insert into t values (2) returning i) from x",
        "create temp table n as with x as (insert into t values (2) returning i) from x",
        "select 1; with x as (insert into t select range from range(100000) returning i) from x",
        f"with x as (insert into t values (2) returning i) from x {LONG}",
        "explain analyze with x as (insert into t values (2) returning i) from x",
    ],
)
def test_statements_that_change_data_inside_of_others(world: World, sql: str) -> None:
    assert world.changes(sql)


def test_copies(world: World, rows_file: str) -> None:
    for sql in (f"copy t from '{rows_file}'", f"copy /**/ a.t (i) from '{rows_file}' (header)"):
        assert world.changes(sql)
        assert not world.is_unknown
    assert world.told == {"memory.a.t"}
    for sql in (
        f"copy a /**/ .t from '{rows_file}'",
        f"copy t (\"i\") from '{rows_file}'",
        f"insert into t from read_csv('{rows_file}')",
        "drop table o.t; copy from database o to memory",
    ):
        assert world.changes(sql) or "copy from database" in sql
    assert not world.changes(f"copy (select 1 as i) to '{rows_file}'")
    world.run("create view w as select 'insert' as i")
    assert not world.changes(f"copy (from w) to '{rows_file}'")


def test_what_changes_nothing_is_not_recorded(world: World) -> None:
    for sql in (
        "",
        "-- nothing",
        "from t",
        "values (1)",
        "select 'insert into t', $$delete$$ -- update\n /* drop */",
        f"select 1 {LONG}",
        "with x as (from t) from x",
        "select nextval('q')",
        "pivot t on i",
        "from (pivot t on i)",
        "pivot größe on i;",
        "describe t",
        "summarize t",
        "show tables",
        "explain insert into t values (1)",
        "explain analyze from t",
        "pragma table_info('t')",
        "checkpoint",
        "prepare p as insert into t values (1)",
        "begin",
        "commit",
        "create temp table n as select 1 as i",
        "insert into nowhere values (1)",
        "insert into t values ('x')",
        "insert into t select error('x')",
        "insert",
        "insert into t",
        "selec; ",
    ):
        assert world.changes(sql) == set()
        assert world.records == [], sql


def test_nothing_is_looked_into_until_somebody_asks(world: World) -> None:
    world.engine.versions.in_use = False
    assert world.changes("insert into t values (2)") == {"t"}
    assert world.is_unknown and not world.told


@pytest.mark.parametrize("gap", [" ", "/**/", "-- x\n", " /* x */"])
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("DROP", "drop table t", "/* /* */ */"),
        ("DROP", "drop table t", "cascade x"),
        ("ALTER", "alter table t rename to n ", "/* /* */ */"),
        ("ALTER", "alter table t", "/* /* */ */ rename to n"),
        ("COPY", "copy t", "/* /* */ */ from 'file'"),
        ("INSERT", "", "/* /* */ */ insert into t values (1)"),
        ("INSERT", "insert into t", "/* /* */ */ . t"),
        ("CREATE", "create", "/* /* */ */ table t(i int)"),
        ("SELECT", "select 'insert'", "/* /* */ */"),
        ("TRANSACTION", "", "/* /* */ */ commit"),
    ],
)
def test_looking_takes_linear_time(kind: str, before: str, gap: str, after: str) -> None:
    """A quadratic search of these texts would take hours; the deadline of the test is minutes."""
    text = before + gap * 100_000 + after
    began = time.monotonic()
    effects_of((kind,), (text,), text)
    transactions_of((kind,), (text,))
    assert time.monotonic() - began < 60


# Sessions


@pytest.mark.parametrize(
    ("end", "is_told"),
    [
        ("commit", True),
        ("/* x */ end transaction", True),
        ("; commit", True),
        ("/* a /* b */ c */ commit", True),
        (f"commit {LONG}", True),
        (f"select 1; commit; {LONG}", True),
        ("commit; begin", True),
        ("rollback", False),
        ("abort", False),
    ],
)
@pytest.mark.parametrize("begin", ["start transaction", f"begin {LONG}"])
def test_a_session_tells_at_its_end(world: World, begin: str, end: str, is_told: bool) -> None:
    assert not world.changes(begin, "insert into t values (2)", "update u set i = 2", session=1)
    is_long = len(begin) > 1000
    # What the server does not look into may be the end, too.
    assert not world.records or is_long
    assert world.changes(end, session=1) == ({"t", "u"} if is_told else set())
    if not is_told and not IS_2X and not is_long:
        assert not world.records


@pytest.mark.parametrize(
    ("texts", "changed"),
    [
        # An error of the parser of 2.x ends the transaction.
        (["begin", "insert into t values (2)", "selec", "commit"], set() if IS_2X else {"t"}),
        (["begin", "insert into t values (2)", "select error('x')", "rollback"], set()),
        (["begin; insert into t values (2); select error('x')", "commit"], set()),
        (["begin", "insert into t values (2); commit; begin; delete from u", "commit"], {"t", "u"}),
        (["begin", "insert into t values (2); rollback; delete from u"], {"u"}),
        (["begin", "drop table t", "create table t as select 5 as i", "commit"], {"t"}),
        (["begin", "alter table t rename to n", "insert into n values (2)", "commit"], {"t", "n"}),
        (["prepare p as insert into t values (2)", "begin", "execute p", "commit"], {"t"}),
        (["use o", "insert into s values (2)", "drop table t"], {"s", "t"}),
        (["use s", "insert into t values (2)", "create table n(i int)"], {"s.t", "s.n"}),
        # Temporary tables hide others, until they go.
        (["create temp table t(i int)", "insert into t values (2)", "delete from temp.t"], set()),
        (["create temp table t(i int)", "insert into memory.t values (2)"], {"t"}),
        (["create temp table t(i int)", "drop table t; insert into t values (2)"], {"t"}),
        (["create temp table t(i int)", "create or replace table t as select 9 as i"], {"t"}),
        (["create temp table n(i int)", "create table n as select 9 as i"], {"n"}),
        (["create temp table n(i int)", "alter table u rename to n"], {"u", "n"}),
        (
            ["begin", "create temp table t(i int)", "rollback; insert into t values (2)"],
            {"t"},
        ),
        (["set search_path = 's,main'", "insert into u values (2)"], {"u"}),
        (["set search_path = 's,main'", "alter table u rename to n"], {"u", "n"}),
        (["set search_path = 's,main'", "create table u as select 2 as i"], {"s.u"}),
        (["set search_path = 'memory.s,o.main'", "alter table s rename to n"], {"s", "n"}),
    ],
)
def test_names_and_transactions_of_a_session(
    world: World, texts: list[str], changed: set[str]
) -> None:
    assert world.changes(*texts, session=1) == changed


def test_a_session_that_is_closed_tells_nothing(world: World) -> None:
    assert not world.changes("begin", "insert into t values (2)", session=1)
    assert not world.check(world.sessions[1].close)
    assert world.records == []


# Triggers

TRIGGER = (
    "create trigger fires after insert on t referencing new table as n "
    "for each statement insert into u from n"
)


@on_2x
def test_triggers(world: World) -> None:
    assert world.changes("insert into t values (2)") == {"t"}
    assert world.run(TRIGGER) == ""
    assert world.changes("insert into t values (3)") == {"t", "u"}
    assert world.is_unknown
    table = pa.table({"i": [4]})
    with world.engine.cursor() as cursor:
        body = memoryview(ipc(table))
        changed = world.check(lambda: write_table(world.engine, cursor, ("t",), "append", body))
    assert len(changed) == 2
    world.run("drop trigger fires on t")
    assert world.changes("insert into t values (5)") == {"t"}
    assert not world.is_unknown


@on_2x
def test_a_trigger_of_the_same_transaction(world: World) -> None:
    # So that it is known that there is none.
    world.run("insert into t values (2)")
    texts = ["begin", TRIGGER, "insert into t values (3)", "commit"]
    assert world.changes(*texts, session=1) == {"t", "u"}


@on_2x
def test_a_transaction_that_does_not_see_the_trigger(world: World) -> None:
    world.changes("begin", "from t", session=1)
    assert world.run(TRIGGER) == ""
    # It does not know better than the others.
    world.run("insert into s.t values (2)", session=1)
    assert world.changes("insert into t values (3)") == {"t", "u"}


# Uploads


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("mode", ["replace", "create", "append"])
@pytest.mark.parametrize("name", [("t",), ("a", "t"), ("o", "main", "t"), ("new", "x"), ("N.n",)])
def test_uploads(world: World, name: tuple[str, ...], mode: UploadMode, chunked: bool) -> None:
    world.run("create schema new")
    table = pa.table({"i": pa.array([7], pa.int32())})

    def upload() -> None:
        try:
            with world.engine.cursor() as cursor:
                if not chunked:
                    body = memoryview(ipc(table))
                    return write_table(world.engine, cursor, name, mode, body)
                writer = TableWriter(world.engine, cursor, name, mode)
                writer.begin(table.schema)
                writer.insert(iter(table.to_batches()))
                writer.finish()
        except ServerError:
            assert mode == "create" or name in (("new", "x"), ("N.n",))

    changed = world.check(upload)
    is_there = name not in (("new", "x"), ("N.n",))
    assert bool(changed) == (mode == "replace" or is_there == (mode == "append"))
    assert len(world.records) == len(changed)
    assert not world.is_unknown


# Whatever comes

NAMES = """
    t T "t" a a.t a."t" s.t memory.t main.t memory.main.t memory.a.t o.t o.main.t o.s s u v n "a.t"
    "se""lect" größe t$x$ temp.t s.n o.n with_default nowhere m temp.n "T\u00b7T"
""".split()
# Spaces here may become comments.
CHANGES = (
    "insert into {0} values (1)",
    "insert into {0} (i) values (2) , (3)",
    "insert into {0} by name select 4 as i",
    "insert into {0} select 5 as i returning i",
    "insert into {0} default values",
    "with x as ( select 6 as i ) insert into {0} from x",
    "update {0} set i = i + 1",
    "update {0} as x set i = 1 where i > 3 returning *",
    "delete from {0} where i = 1",
    "delete from {0} using {1} where {1}.i > 3",
    "truncate {0}",
    "merge into {0} as y using ( select 5 as i ) as x on y.i = x.i "
    "when matched then delete when not matched then insert values ( x.i )",
    "create table {0} as select 1 as i",
    "create table if not exists {0} ( i int )",
    "create or replace table {0} as select 2 as i",
    "create or replace temp table {0} as select 3 as i",
    "create temp table {0} as select 3 as i",
    "create or replace view {0} as select 1 as i",
    "create or replace temp view {0} as select 1 as i",
    "drop table {0}",
    "drop table if exists {0} cascade",
    "drop view if exists {0}",
    "alter table {0} add column j int",
    "alter table {0} drop column j",
    "alter table {0} rename to n",
    "alter table {0} rename to {1}",
    "prepare p as insert into {0} values (7)",
    "execute p",
    "explain analyze insert into {0} values (8)",
    "create index x on {0} ( i )",
    "create schema if not exists s",
    "drop schema s cascade",
    "use o",
    "use memory",
    "use s",
    "set search_path = 's,main'",
    "set search_path = 'o.main,memory.a'",
    "reset search_path",
    "set variable x = 1",
    "begin",
    "begin transaction",
    "commit",
    "end",
    "rollback",
    "comment on table {0} is 'x'",
    "insert into {0} select error('x')",
    "insert into {0} from {1}",
    "selec",
)
CHANGES_OF_2X = (
    "with x as ( insert into {0} values (1) returning i ) from x",
    "with x as ( insert into {0} values (1) returning i ) insert into {1} from x",
    "create or replace temp table m as with x as ( delete from {0} returning i ) from x",
    "create trigger fires after insert on {0} referencing new table as x "
    "for each statement insert into {1} from x",
    "drop trigger if exists fires on {0}",
)
READS = (
    "from {0}",
    "select count(*) from {0} , {1}",
    "select 'insert' as i from {0} -- drop",
    "explain insert into {0} values (1)",
    "explain analyze from {0}",
    "describe {0}",
    "summarize {0}",
    "pivot {0} on i",
)


class Writer:
    """Writes statements at random."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def text(self) -> tuple[str, bool]:
        """A text, and whether it only reads."""
        chance = self.chance
        if chance.random() < 0.1:
            return self._statement(READS), True
        kinds = CHANGES + CHANGES_OF_2X if IS_2X else CHANGES
        count = chance.choice((1, 1, 1, 1, 1, 1, 2, 3))
        text = "; ".join(self._statement(kinds + READS) for _ in range(count))
        if chance.random() < 0.02:
            text += LONG
        return text + chance.choice(("", "", ";", " ; ", " -- end")), False

    def _statement(self, templates: tuple[str, ...]) -> str:
        chance = self.chance
        template = chance.choice(templates)
        # A few tables, so that statements meet.
        one, other = (chance.choice(chance.choice((NAMES, NAMES[:4]))) for _ in range(2))
        style = chance.random()
        if style < 0.6:
            return template.format(one, other)
        words = [word.format(one, other) for word in template.split(" ")]
        if style < 0.7:
            words = [word if "'" in word else word.upper() for word in words]
        return "".join(self._spaced(word) for word in words)

    def _spaced(self, word: str) -> str:
        chance = self.chance
        if "." in word and chance.random() < 0.3 and '"' not in word and "'" not in word:
            word = word.replace(".", chance.choice((" . ", "/**/.", " -- x\n .", " /*;*/ .")))
        gaps = (" ", " ", " ", "\n", "/**/", " /* ; */ ", " -- it's\n", "\t", ' /* " */ ', "\r\n")
        return word + chance.choice(gaps)


def try_some(world: World, writer: Writer, count: int) -> int:
    """Run ``count`` texts at random and return how many of them changed a table."""
    changed = 0
    history: list[tuple[int | None, str]] = []

    def act() -> None:
        history.append((session, sql.replace(LONG, "LONG")))
        world.run(sql, session)

    try:
        for _ in range(count):
            session = writer.chance.choice((None, None, 1, 2))
            sql, only_reads = writer.text()
            changed += bool(world.check(act))
            if only_reads and session is None:
                assert not world.records
    except BaseException:
        print(*history, sep="\n")
        raise
    return changed


@pytest.mark.timeout(0)
def test_whatever_comes() -> None:
    count = int(os.environ.get("SQLROOMS_FUZZ", "0"))
    seed = random.randrange(1 << 30) if count else 2026
    print(f"seed {seed}")
    writer = Writer(random.Random(seed))
    changed = 0
    for _ in range(0, count or 200, 100):
        world = World()
        try:
            changed += try_some(world, writer, 100)
        finally:
            world.close()
    assert changed > (count or 200) / 20
