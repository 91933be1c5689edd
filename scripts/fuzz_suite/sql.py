"""Texts of SQL: what the server tells about them before they run, and what they then do."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.room_macros import wanted_rooms
from sqlrooms_server.db.statements import logical_operators, nesting, without_end
from sqlrooms_server.db.versions import Token, key_of
from sqlrooms_server.errors import BadRequest, InternalError, ServerError

from . import mutation
from .targets import in_linear_time, require

_SETUP = """
CREATE TABLE t (i INTEGER, s VARCHAR);
INSERT INTO t VALUES (1, 'a'), (2, 'b');
CREATE TABLE u (i INTEGER PRIMARY KEY, s VARCHAR DEFAULT 'x');
INSERT INTO u VALUES (1, 'a'), (2, 'b');
CREATE SCHEMA other;
CREATE TABLE other.t AS SELECT 1 AS i;
CREATE TABLE "a b" AS SELECT 1 AS i, 'x' AS "s;--";
CREATE VIEW v AS SELECT i + 1 AS j FROM t;
CREATE MACRO m(a) AS a + 1;
CREATE MACRO tm() AS TABLE SELECT * FROM t;
CREATE SEQUENCE q;
CREATE TYPE mood AS ENUM ('x', 'y');
CREATE INDEX ix ON t(i);
"""

_SEEDS = (
    "select * from t where i = ?\0[1]",
    'select $a, $b from v\0{"a": 1, "b": ["x", null]}',
    "from t union all from u order by all limit 1;",
    "with x as (select * from t) select count(*) from x",
    "insert into t values (3, 'c')",
    "insert or replace into u select 1, 'y' from t limit 1",
    "insert into main.t by name select 5 as i returning *",
    "update t set s = 'z' where i = 1",
    "update u set i = i + 10 from t where t.i = u.i",
    'delete from "a b" where i = 1',
    "delete from t using u where t.i = u.i",
    "truncate u",
    "merge into t using u on t.i = u.i when matched then delete",
    "create or replace table n as select * from t",
    "create table if not exists n (i int); insert into n values (1)",
    "create temp table x as from t; insert into x values (1, 'b'); from x",
    "create or replace view v as from u",
    "create macro k(a) as a; create index iy on u(s); create sequence r",
    "drop table other.t; drop view if exists v; drop schema other cascade",
    "drop type mood; drop sequence q; drop macro m; drop index ix",
    "alter table t add column c int default 5",
    "alter table t rename to w",
    "alter table u alter i type bigint",
    "alter view v rename to vv",
    "comment on table t is 'text'",
    "begin; insert into t values (9, 'x'); commit",
    "begin transaction; delete from t; rollback",
    "set threads = 1; select 1",
    "set variable a = 1; select getvariable('a')",
    "set global arrow_large_buffer_size = true",
    "reset threads; pragma table_info('t')",
    "use other; insert into t values (5)",
    "attach ':memory:' as d; create table d.t as select 1; detach d",
    "prepare p as insert into t values ($1, 'p'); execute p(7); deallocate p",
    "explain select * from t",
    "explain analyze insert into t values (4, 'd')",
    "call pragma_table_info('t')",
    "checkpoint; force checkpoint; vacuum; analyze",
    "pivot t on s using sum(i)",
    "select nextval('q'), currval('q')",
    "copy t from 'nowhere.csv'",
    "copy (select 1) to '/nowhere/x.csv'",
    "export database '/nowhere'",
    "summarize t; describe t; show tables; show all tables",
    "select * from room('a''b'), rooms() where $x\0{\"x\": \"name\"}",
    "select 'it''s', E'a\\'b', $$dollar 'quoted'$$, $x$ $$ $x$ -- end",
    "/* a /* nested */ b */ select 1 -- insert into t\n; ;",
    "select [1, 2][1], {'a': (1)}, map {'k': [(((1)))]}",
    "select i and true or false and not (i or s) from (values (true, false)) x(i, s)",
    "values (1), (2); select query_table('t')",
    "with x as (insert into t values (8, 'w') returning i) select * from x",
    "select * from query('select 1')",
    "grant select on t to x",
    "\ufeffselect 1",
    "select\u00a01 as \u00e4",
)

_PARTS = (
    *(" ", "\n", "\r", "\t", "\x0b", "\u00a0", "|", "-- x\n"),
    *"; ;| |,|.|(|)|[|]|{|}|'|\"|--|/*|*/|/* x */|$$|$a$|$1|$name|?|E'|\\'".split("|"),
    *' t | u | other.t | "a b" | v | main.t | memory.main.t |T|"t"|q|room(\'a\')|rooms()'.split(
        "|"
    ),
    *"insert into |update |delete from |create |table |view |temp |drop |alter table ".split("|"),
    *" rename to |truncate |merge into |or replace |if not exists |if exists |select ".split("|"),
    *" from | where | as |with x as (| returning *|begin;|commit;|rollback;| cascade".split("|"),
    *" values (1, 'a') | set i = 5 |explain |analyze |pragma |call |use other;|set ".split("|"),
    *"prepare p as |execute p|pivot | and | or |query('|nextval('q')| union all ".split("|"),
)
_VALUES = ("value", "$type", "a", "INTEGER", "BLOB", "DATE", "key", "INT[]", "2026-01-01")

# Texts that could write files or end the process by a defect of DuckDB; they are not run.
_NOT_RUN = re.compile(
    r"log|profil|output|secret|sleep|getenv|directory|storage|crash|progress", re.I
)

_MAX_RUN_SECONDS = 0.5

# What takes time that grows with the square of the length shows by then.
_LONG = 32 << 10

_NO_ROOM = re.compile(r"Function with name (rooms?) does not exist")


class Sql:
    max_size = 4096

    def __init__(self) -> None:
        self._engine = _fresh_engine()
        self._bases: dict[tuple[str, ...], _Picture] = {}
        self._watchdog = _Watchdog()

    def seeds(self) -> Iterator[bytes]:
        for text in _SEEDS:
            yield b"\0" + text.encode()
        for text in _SEEDS[::5]:
            yield b"\1\x20\x60" + text.encode()

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        head, body = data[:1] or b"\0", data[1:]
        if head[0] % 2:
            head, body = head + body[:2], body[2:]
        if chance.random() < 0.1:
            return head + mutation.of_bytes(body, chance)
        sql, _, params = body.decode("utf-8", "ignore").partition("\0")
        if params and chance.random() < 0.5:
            wrapped = mutation.of_json(b'{"p":' + params.encode() + b"}", chance, _VALUES)
            with contextlib.suppress(ValueError, AttributeError):
                params = json.dumps(json.loads(wrapped).get("p"))
        else:
            for _ in range(chance.choice((1, 1, 2, 4))):
                other = chance.choice(_SEEDS).partition("\0")[0]
                sql = mutation.of_text(sql, chance, (*_PARTS, other))
        return head + sql.encode("utf-8", "ignore") + (b"\0" + params.encode() if params else b"")

    def try_one(self, data: bytes) -> None:
        if not data:
            return
        is_long = data[0] % 2
        body = mutation.stretched(data[1:], _LONG) if is_long else data[1:]
        sql, _, encoded = body.decode("utf-8", "ignore").partition("\0")
        params = _params(encoded) if encoded else None
        with in_linear_time(f"looking at {len(sql)} characters"):
            _look_at(sql, params)
        if is_long:
            with contextlib.suppress(BadRequest), self._engine.cursor() as cursor:
                self._engine.classifier.classify(cursor.native, sql)
        elif _NOT_RUN.search(sql) is None:
            self._run(sql, params)

    def _run(self, sql: str, params: Any) -> None:
        engine = self._engine
        self._check_end(sql)
        key = tuple(word for word in _CATALOG if word in sql.lower())
        if key not in self._bases:
            self._bases[key] = _Picture(engine, sql)
        self._base = self._bases[key]
        tokens = {
            table: engine.versions.token(engine.versions.epoch, [key_of(table)])
            for table in self._base.rows
        }
        nothing = engine.versions.token(engine.versions.epoch, [])
        clock = engine.versions.now()
        error = self._carry_out(sql, params)
        missing = _NO_ROOM.search(str(error)) if error is not None else None
        if missing and not re.search("[\"']", sql):
            wanted = wanted_rooms(sql, params)
            require(wanted and missing[1] in wanted.functions, f"calls {missing[1]} unseen")
        self._check_changes(sql, tokens, nothing, clock)

    def _check_end(self, sql: str) -> None:
        with contextlib.suppress(ServerError), self._engine.cursor() as cursor:
            whole = self._engine.classifier.classify(cursor.native, sql).kinds
            if whole is not None and len(whole) == 1:
                cut = self._engine.classifier.classify(cursor.native, without_end(sql)).kinds
                require(cut == whole, f"without its end it is {cut}, not {whole}")

    def _carry_out(self, sql: str, params: Any) -> ServerError | None:
        try:
            with self._engine.cursor() as cursor, self._watchdog.over(cursor):
                result = cursor.run(sql, params)
                if result is not None:
                    for _, batch in zip(range(100), result.batches, strict=False):
                        batch.validate(full=True)
        except InternalError:
            raise
        except ServerError as error:
            require(str(error), "an error without a text")
            return error
        return None

    def _check_changes(
        self, sql: str, tokens: dict[Any, Token], nothing: Token, clock: int
    ) -> None:
        """Whatever is otherwise than before, the clock says so."""
        versions = self._engine.versions
        try:
            now = _Picture(self._engine, sql)
        except ServerError:
            # A setting that lets nothing run any more; a new one is needed all the same.
            require(not versions.holds(nothing), "nothing runs any more, and nothing changed")
            self._start_again()
            return
        _, told = versions.known(clock)
        for table, rows in self._base.rows.items():
            if now.rows.get(table) != rows:
                require(not versions.holds(tokens[table]), f"{table} changed, results of it hold")
                is_told = table in told or not versions.is_complete(clock)
                require(is_told, f"{table} changed, watchers are not told")
        if now.catalog != self._base.catalog:
            require(not versions.holds(nothing), "the catalog changed, and plans hold")
        if now.settings != self._base.settings:
            require(versions.state() is None, "a setting changed that a restart undoes")
        if now != self._base or versions.now() != clock:
            self._start_again()

    def _start_again(self) -> None:
        self._engine.close(time.monotonic() + 5)
        self._engine = _fresh_engine()


def _fresh_engine() -> Engine:
    limits = {"memory_limit": "500MB", "threads": "1"}
    engine = Engine(":memory:", read_only=False, extensions=(), limits=limits)
    with engine.cursor() as cursor:
        cursor.native.execute(_SETUP)
        cursor.native.execute("SET GLOBAL enable_external_access = false")
    engine.versions.in_use = True
    return engine


_CATALOG = {
    "": "SELECT database_name AS d, schema_name AS s, table_name AS n, sql, comment "
    "FROM duckdb_tables() UNION ALL SELECT database_name, schema_name, view_name, sql, comment "
    "FROM duckdb_views() WHERE NOT internal UNION ALL "
    "SELECT database_name, schema_name, index_name, sql, comment FROM duckdb_indexes() "
    "UNION ALL SELECT database_name, schema_name, '', '', comment FROM duckdb_schemas()",
    "macro": "SELECT database_name, schema_name, function_name, macro_definition, comment "
    "FROM duckdb_functions() WHERE NOT internal",
    "function": "SELECT database_name, schema_name, function_name, macro_definition, comment "
    "FROM duckdb_functions() WHERE NOT internal",
    "type": "SELECT database_name, schema_name, type_name, labels::VARCHAR, comment "
    "FROM duckdb_types() WHERE NOT internal",
}


def _name(table: tuple[str, ...]) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in table)


class _Picture:
    """The contents of a database, as another connection sees them."""

    def __init__(self, engine: Engine, sql: str) -> None:
        with engine.cursor() as cursor:
            native = cursor.native
            # A listing of all functions or types takes longer than all the rest.
            listings = [text for word, text in _CATALOG.items() if word in sql.lower()]
            self.catalog = native.execute(" UNION ALL ".join(listings) + " ORDER BY ALL").fetchall()
            tables = native.execute(
                "SELECT database_name, schema_name, table_name FROM duckdb_tables() "
                "WHERE NOT temporary"
            ).fetchall()
            hashes = [
                f"SELECT {number}, count(*), sum(hash(t::VARCHAR)) FROM {_name(table)} t"
                for number, table in enumerate(tables)
            ]
            found = native.execute(" UNION ALL ".join(hashes)).fetchall() if hashes else []
            self.rows = {tuple(tables[row[0]]): row[1:] for row in found}
            self.settings = native.execute(
                "SELECT name, value FROM duckdb_settings() ORDER BY name"
            ).fetchall()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Picture) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class _Watchdog:
    """Interrupts what takes too long."""

    def __init__(self) -> None:
        self._watched: tuple[float, Any] | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def over(self, cursor: Any) -> Iterator[None]:
        self._watched = time.monotonic() + _MAX_RUN_SECONDS, cursor
        try:
            yield
        finally:
            self._watched = None

    def _watch(self) -> None:
        while True:
            time.sleep(_MAX_RUN_SECONDS / 10)
            watched = self._watched
            if watched is not None and time.monotonic() > watched[0]:
                watched[1].interrupt()


def _params(encoded: str) -> Any:
    try:
        params = json.loads(encoded)
    except (ValueError, RecursionError):
        return None
    return params if isinstance(params, list | dict) else None


def _look_at(sql: str, params: Any) -> None:
    """What looks at the text alone."""
    depth = nesting(sql)
    require(0 <= depth <= sum(map(sql.count, "([{")), f"nests {depth} deep")
    require(logical_operators(sql) >= 0, "operators")
    cut = without_end(sql)
    require(sql.startswith(cut), "the end is not the end")
    require(without_end(cut) == cut, "another end behind the end")
    wanted_rooms(sql, params)


def make() -> Sql:
    return Sql()
