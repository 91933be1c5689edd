"""What policies let run, over a real DuckDB whose files are open to whoever gets past."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sqlrooms_server.db import functions
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.paths import Directories
from sqlrooms_server.db.plans import plan_of
from sqlrooms_server.db.policy import UNRESTRICTED, Policy
from sqlrooms_server.db.sandbox import Sandbox
from sqlrooms_server.db.statements import MAX_PARSED_LENGTH
from sqlrooms_server.db.store import create_meta_tables
from sqlrooms_server.db.versions import key_of
from sqlrooms_server.errors import BadRequest, Forbidden, QueryError, StartupError
from tests.wire import DEADLINE

TWO = int(duckdb.__version__.split(".")[0]) >= 2

SELECT = Policy(read_only=True, files=False, extensions=False, source="--sandbox select")
DATABASE = Policy(files=False, extensions=False, source="--sandbox database")
FILES = Policy(read_only=True, extensions=False, source="role 'reader'")
SCHEMA = Policy(files=False, extensions=False, schemas=frozenset({"o"}), source="role 'o'")

SETUP = """
    CREATE TABLE t(a INTEGER PRIMARY KEY, b VARCHAR, c DOUBLE DEFAULT 1.5);
    INSERT INTO t VALUES (1, 'x', 1.0), (2, 'y', 2.0);
    CREATE SEQUENCE s;
    CREATE TABLE numbered(i INTEGER DEFAULT nextval('s'), b INTEGER);
    CREATE SCHEMA o;
    CREATE TABLE o.u AS FROM t;
    CREATE SEQUENCE o.s2;
    CREATE TABLE stats(x INTEGER, "km/h" INTEGER);
    CREATE VIEW v AS SELECT a, lower(b) AS b FROM t;
    CREATE VIEW o.hidden AS FROM t;
    CREATE MACRO plus(x) AS x + 1;
    CREATE MACRO rows_of(x) AS TABLE SELECT * FROM t WHERE a = x;
    CREATE VIEW file_view AS FROM read_csv('{csv}');
    CREATE MACRO file_macro() AS TABLE FROM read_csv('{csv}');
    CREATE MACRO any_file(p) AS TABLE FROM read_text(p);
    CREATE MACRO deeper(p) AS TABLE FROM any_file(p);
    CREATE MACRO counted() AS nextval('s');
    ATTACH ':memory:' AS other;
    CREATE TABLE other.t(a INTEGER);
    -- Words that DuckDB keeps for itself in other places.
    CREATE MACRO secret(x) AS x + (SELECT max(a) FROM t);
    CREATE MACRO data(p) AS TABLE FROM read_text(p);
    CREATE TABLE tables(hidden INTEGER);
    CREATE TYPE mood AS ENUM ('sad', 'ok');
"""

# Any SELECT on the database.
READING = [
    "SELECT 1",
    "select a from t where a > ?",
    "select a from t where a = $1 and b = $2",
    "select * from t where a = $id",
    "select a from t limit ?",
    "select ?",
    "select a + ?, lower(?) from t",
    "select * from t where b like ? and a in (?, ?)",
    "select ?::integer + $2",
    "with x as (select ? as i) select i + ? from x",
    "-- a comment\nselect /* 'read_csv(' */ 1",
    "select 'read_csv(''/etc/passwd'')', 'from ''/etc/passwd'''",
    "select 'COPY t TO ''x''; ATTACH ''y'''",
    "FROM t",
    "from t select a where b = 'x.csv'",
    "table t",
    "values (1, 'x.csv'), (2, '/etc/passwd')",
    "(select 1) union all (select 2)",
    "select 1; select 2",
    "begin; rollback",
    "start transaction read only",
    "describe t",
    "describe select * from v",
    "desc v",
    "show t",
    "summarize t",
    "summarize select a from t",
    "show tables",
    "show all tables",
    "show databases",
    "pragma table_info('t')",
    "pragma show_tables",
    "pragma version",
    "select * from pragma_table_info('t')",
    "explain select * from t",
    "explain analyze select * from t",
    "explain (format json) select * from t",
    "explain (select 1)",
    "pivot t on b using sum(a)",
    "pivot (select a, b from t) on b using sum(a) group by a",
    "from t pivot (sum(a) for b in ('x', 'y'))",
    "unpivot t on a, c",
    "from t unpivot (val for n in (a, c))",
    "from t tablesample 10%",
    "select * from t tablesample reservoir(1 rows)",
    "select * from t using sample 3",
    "select * from information_schema.tables",
    "select table_name, column_name from information_schema.columns",
    "select * from information_schema.schemata",
    "select * from pg_catalog.pg_tables",
    "select * from duckdb_tables() where table_name = 't'",
    "select function_name from duckdb_functions() limit 1",
    "select * from sqlite_master",
    "select plus(1), getvariable('x'), current_schema(), version()",
    "select * from rows_of(1)",
    "select * from v where a in (select a from o.u)",
    "with recursive r(n) as (select 1 union all select n + 1 from r where n < 5) select * from r",
    "with q(a) as (select 1), z (b) as (select 2) select * from q, z as k(l)",
    "with m as materialized (from t), n as not materialized (from m) from n",
    "select * from t, lateral (select t.a + 1 as n)",
    "select row_number() over (order by a), sum(a) over w, lag(a) over w from t window w as ()",
    "select histogram(a), list(b), max_by(b, a), quantile_cont(c, 0.5) from t",
    "select * from histogram(t, a)",
    "select unnest([1, 2]), list_transform([1, 2], lambda x : x + 1), [x for x in [1, 2] if x > 1]",
    "select count(*) filter (a > 1), string_agg(b, ',' order by a) from t group by all",
    "select (select max(a) from t), exists (select 1 from t), a > any(select a from t) from t",
    "select {'a': 1}.a, map {'a': 1}['a'], [1, 2][1], struct_pack(a := 1)",
    "select extract(year from date '2020-01-01'), trim(both 'x' from 'x.csv')",
    "select substring('a' from 1), position('b' in 'abc')",
    "select a is distinct from 3, b collate nocase, a::decimal(9, 2), cast(b as varchar(3)) from t",
    "select b from t order by b collate de",
    "select * from t asof join t t2 on t.a >= t2.a",
    "select * from t positional join t t2",
    "select * from t natural join o.u",
    "select columns(*) from t",
    "select * exclude (a) replace (c + 1 as c) from t",
    "select grouping(a), a, count(*) from t group by rollup (a)",
    'select "km/h" from stats order by "km/h"',
    "from generate_series(1, 3), range(date '2020-01-01', date '2020-02-01', interval 7 day)",
    "select * from json_each('{\"a\": 1}'), unnest([1]) as u(x)",
    "select '{\"a\": 1}'::json->>'a', json_extract('{}', '$.a'), regexp_matches('a', '[a-z]')",
    "select now(), today(), random(), uuid(), age(timestamp '2020-01-01')",
    "select coalesce(a, 1), nullif(a, 1), ifnull(a, 2), if(a = 1, 2, 3), greatest(a, 1) from t",
    "select 1 as checkpoint, 2 as glob, 3 as query, 4 as read_csv",
    "set variable x = 3",
    "set variable x = (select max(a) from t)",
    "reset variable x",
    "use main",
    "select 'a' glob 'a*', 'abc' similar to 'a.*', b[1:2], a between 1 and 2 from t",
    "select ('ABC').lower(), (a).plus() from t",
    "select distinct on (b) * from t qualify row_number() over (partition by b) = 1",
    "select e'it\\'s', $$dollar ' quoted$$, 'it''s'",
    "select x.a from (values (1)) x(a)",
    "select try_cast('x' as integer), 'ok'::mood, typeof(1)",
    "select currval('s')",
    "select secret(1), sum(a) over (partition by b) from t",
]

# Also changes it.
WRITING = [
    "insert into t values (?, ?, ?)",
    "insert into t values (3, '/etc/passwd', 1), (4, 'x.csv', 2)",
    'insert into stats (x, "km/h") values (1, 2)',
    "insert into main.stats (x) select a from t",
    "insert into t select a + 10, $1::varchar, c from t",
    "insert or replace into t values (1, 'x', 1)",
    "insert into t values (1, 'x', 1) on conflict (a) do update set b = excluded.b",
    "insert into t by name select 9 as a returning *",
    "insert into numbered(b) values (1)",
    "update t set b = ? where a = ?",
    "update t set c = u.c from o.u where t.a = u.a",
    "delete from t where a = ?",
    "delete from t using o.u where t.a = u.a",
    "truncate stats",
    "merge into t using (select 1 as a) q on (t.a = q.a) when matched then update set b = 'x' "
    "when not matched then insert (a) values (q.a)",
    "create table n1 as select * from t",
    "create or replace table n2(a decimal(10, 2), b struct(x varchar(10)), primary key (a))",
    "create table n3(a integer default 3, b integer generated always as (a * 2), check (a > 0))",
    "create table n4(a integer default nextval('s'), m mood, foreign key (a) references t(a))",
    "create temp table n5 as select 1",
    "create view n6 as select * from v",
    "create or replace view o.n7(x) as select a from t",
    "create macro n8(x) as x + 2",
    "create macro n9(x) as table select * from t where a = x",
    "create sequence n10 start 5",
    "create type n11 as enum (select b from t)",
    "create schema n12",
    "create index n13 on t(lower(b))",
    "create unique index n14 on t(a, b)",
    "alter table stats add column z integer",
    "alter table stats add column y integer default 4",
    "alter table stats add column w integer default nextval('s')",
    "alter table stats alter z set default 7",
    "alter table stats rename column z to zz",
    "alter table stats rename to n1b",
    "alter view v rename to n6b",
    "comment on table t is 'read_csv(''x'')'",
    "comment on column t.a is 'x'",
    "drop view if exists nothing",
    "drop table if exists n5",
    "drop macro plus",
    "drop schema o cascade",
    "vacuum",
    "analyze t",
    "explain insert into t values (77, 'x', 1)",
    "explain analyze insert into t values (78, 'x', 1)",
    "begin; insert into stats values (1); commit",
    "create table n20(i integer); insert into n20 values (1); select * from n20",
    "select nextval('s')",
    "select setseed(0.5)",
    "select counted()",
]

# Nobody who is kept inside may do this.
REACHING_OUT = [
    "select * from read_csv('{csv}')",
    "select * from read_csv_auto('{csv}')",
    "select * from READ_CSV /* x */ ('{csv}')",
    "select * from \"read_csv\"('{csv}')",
    "select * from system.main.read_csv('{csv}')",
    "select * from main.\"read_csv\"('{csv}')",
    "select * from read_csv -- x\n ('{csv}')",
    "select * from read_csv\u00a0('{csv}')",
    "from read_text('/etc/passwd')",
    "from read_blob('/etc/passwd')",
    "from read_json('/etc/passwd')",
    "from read_parquet('/etc/passwd')",
    "from parquet_scan('/etc/passwd')",
    "from parquet_metadata('/etc/passwd')",
    "from sniff_csv('{csv}')",
    "from glob('/etc/*')",
    "from read_duckdb('/x.duckdb', table_name = 't')",
    "FROM '{csv}'",
    "select * from '/etc/passwd'",
    'select * from "{csv}"',
    "select * from t, '{csv}' f",
    "select * from (t join '{csv}' f on true)",
    "select * from t where a in (select a from '{csv}')",
    "select (select count(*) from read_csv('{csv}'))",
    "select * from t union all select a, b, 1 from '{csv}'",
    "with f as (from '{csv}') select * from f",
    "with f as (from t), g as (from read_text('/etc/passwd')) from g",
    "select * from t, lateral (select * from read_text('/etc/passwd'))",
    "select * from data.csv",
    "select * from own.duckdb",
    "from e'/etc/passwd'",
    "from 'http://127.0.0.1:1/x.csv'",
    "from 's3://bucket/x.parquet'",
    "describe '{csv}'",
    "describe from read_csv('{csv}')",
    "summarize '{csv}'",
    "select * from (describe from file_view)",
    "select * from (show file_view)",
    "describe file_view",
    "create table h0 as describe file_view",
    "create table h0 as desc file_view",
    "create view h0 as show file_view",
    "insert into t (b) describe file_view",
    "with d as (desc file_view) from d",
    "select 1 union all describe file_view",
    "select 1 union all desc from file_view",
    "explain select * from read_csv('{csv}')",
    "explain analyze copy t to '{out}'",
    "pivot '{csv}' on a using sum(b)",
    "pivot (from read_csv('{csv}')) on a",
    "pivot t on b in (select a from '{csv}') using sum(a)",
    "unpivot '{csv}' on a",
    "select * from file_view",
    "select * from file_macro()",
    "select * from any_file('/etc/passwd')",
    "select * from query('from read_csv(''{csv}'')')",
    "select * from query('from read' || '_csv(''{csv}'')')",
    "select * from query_table('{csv}')",
    "select * from query_table(['t', '{csv}'])",
    "select json_serialize_plan('select * from read_csv(''{csv}'')')",
    "select * from json_execute_serialized_sql(json_serialize_sql('from read_text(''x'')'))",
    "pragma json_execute_serialized_sql('x')",
    "from from_substrait('x')",
    "select getenv('HOME')",
    "select current_setting('temp_directory')",
    "from duckdb_settings()",
    "from duckdb_secrets()",
    "from which_secret('s3://x', 's3')",
    "from duckdb_databases()",
    "from duckdb_temporary_files()",
    "from duckdb_logs",
    "from duckdb_logs_parsed('QueryLog')",
    "from duckdb_extensions()",
    "from duckdb_prepared_statements()",
    "from duckdb_external_file_cache()",
    "from enable_logging('QueryLog', storage = 'file', storage_config = {'path': '{out}'})",
    "from enable_logging()",
    "call enable_logging()",
    "call disable_logging()",
    "from enable_profiling()",
    "from truncate_duckdb_logs()",
    "select write_log('x')",
    "from checkpoint()",
    "select * from force_checkpoint()",
    "call checkpoint()",
    "checkpoint",
    "force checkpoint",
    "select * from arrow_scan(1::bigint::pointer, 2, 3)",
    "from pandas_scan(1)",
    "from seq_scan()",
    "from python_map_function()",
    "select sleep_ms(1)",
    "select pg_sleep(1)",
    "select unknown_function(1)",
    "from unknown_table_function(1)",
    "copy t to '{out}'",
    "copy (select 1) to '{own}' (format csv, use_tmp_file false)",
    "copy (select 1) to '{own}.wal' (format csv, use_tmp_file false)",
    "copy t from '{csv}'",
    "COPY t TO STDOUT",
    "/* x */ copy t to '{out}'",
    "select 1; copy t to '{out}'",
    "copy from database main to other",
    "export database '{out}'",
    "import database '{out}'",
    "IMPORT DATABASE '{out}'",
    "pragma import_database('{out}')",
    "pragma copy_database('a', 'b')",
    "attach ':memory:' as z",
    "attach '{out}' as z",
    "attach '{own}' as z (read_only)",
    "detach main",
    "use other",
    ";; use other",
    "; describe file_view",
    ";explain analyze copy t to '{out}'",
    "from other.t",
    "from other.main.t",
    "insert into other.t values (1)",
    "update other.t set a = 1",
    "create table other.h0 as from t",
    "create view other.h0 as from t",
    "create schema other.h0",
    "drop table other.t",
    "alter table other.t add column x integer",
    "comment on table other.t is 'x'",
    "create view v0 as from other.t",
    "select * from any_file('/etc/passwd') join t on true",
    "select * from deeper('/etc/passwd')",
    "select * from data('/etc/passwd')",
    "pivot t on b using sum(secret(a)) group by data('/etc/passwd')",
    "load json",
    "install httpfs",
    "force install httpfs",
    "load '/x.duckdb_extension'",
    "update extensions",
    "set threads = 1",
    "set global memory_limit = '1GB'",
    "SET file_search_path = '/etc'",
    "set search_path = 'o'",
    "set home_directory = '/'",
    "set enable_external_access = true",
    "set session timezone = 'UTC'",
    "reset threads",
    "pragma threads = 1",
    "pragma memory_limit = '1GB'",
    "pragma database_list",
    "pragma enable_profiling",
    "pragma profiling_output = '{out}'",
    "pragma add_parquet_key('k', '0123456789112345')",
    "call pragma_version()",
    "prepare p as select 1",
    "execute p",
    "deallocate p",
    "create secret (type s3)",
    "create persistent secret x (type s3)",
    "create or replace temp secret x (type s3)",
    "drop secret x",
    "connect 'x'",
    "explain import database '{out}'",
    "begin; copy t to '{out}'; commit",
    "insert into t select a, b, 1 from read_csv('{csv}')",
    "insert into t (a) from '{csv}'",
    "create table h1 as from read_csv('{csv}')",
    "create table h2 as from '{csv}'",
    "create temp table h3 as from file_view",
    "create view h4 as from read_csv('{csv}')",
    "create view h5 as from file_view",
    "create view h6 as select * from file_macro()",
    "create or replace view v as select * from any_file('/etc/passwd')",
    "create macro h7() as table from read_text('/etc/passwd')",
    "create macro h8(p) as table from read_text(p)",
    "create macro h9(x) as write_log(x)",
    "create function h10(x) as current_setting(x)",
    "create macro plus(x) as (select content from read_text('/etc/passwd'))",
    "create table h11(a varchar default current_setting('home_directory'))",
    "create table h12(a integer, b varchar generated always as (current_setting('threads')))",
    "create index h13 on t(write_log(b))",
    "alter table t alter b set default write_log('x')",
    "alter table t add column h14 varchar default current_setting('threads')",
    "create type h15 as enum (select content from read_text('/etc/hostname'))",
    "create trigger h16 after insert on t for each row insert into o.u values (new.a, 'x', 1)",
    "update t set b = f.content from read_text('/etc/passwd') f",
    "update t set b = (select content from read_text('/etc/passwd'))",
    "update t set b = 'x' from '{csv}' f",
    "delete from t using '{csv}' f where t.a = f.a",
    "delete from t using read_csv('{csv}') f where t.a = f.a",
    "delete from t where b in (select content from read_text('/etc/passwd'))",
    "merge into t using read_csv('{csv}') q on t.a = q.a when matched then delete",
    "merge into t using '{csv}' q on t.a = q.a when matched then delete",
    "insert into t values (1, (select content from read_text('/etc/passwd')), 1)",
    "insert into t values (1, 'x', 1) returning (select content from read_text('/etc/passwd'))",
    "set variable x = (select content from read_text('/etc/passwd'))",
    "set variable x = getenv('HOME')",
    "select * from t order by (select content from read_text('/etc/passwd'))",
    "select * from t limit (select count(*) from glob('/etc/*'))",
    "select list_transform([1], lambda x : (select count(*) from glob('/etc/*')))",
    "select 'from duckdb_secrets()'.query()",
    "select __internal_decompress_string(1)",
    "select index_key('t', 1)",
    "from test_all_types(), read_text('/etc/passwd')",
    "select 1\0; copy t to '{out}'",
]

# Of those who only read.
CHANGING = [
    "select nextval('s')",
    "select setseed(0.1)",
    "select counted()",
    "select counted() from v",
    "explain analyze insert into t values (5, 'x', 1)",
    "explain insert into t values (5, 'x', 1)",
    "begin; delete from t; commit",
    "select 1; drop table t",
    "create temp table w1 as select 1",
    "set variable x = nextval('s')",
    "with i as (insert into t values (5, 'x', 1) returning *) select * from i",
    "insert into t values (5, 'x', 1) returning *",
    *(text for text in WRITING if not text.startswith("select")),
]

# Of those who are bound to the schema o.
OUT_OF_BOUNDS = [
    "from t",
    "from main.t",
    "select * from o.u, main.t",
    "select * from o.hidden",
    "select * from o.u where a in (select a from v)",
    "select * from rows_of(1)",
    "describe t",
    "describe select * from t",
    "summarize t",
    "show tables",
    "pragma table_info('t')",
    "select * from information_schema.tables",
    "from duckdb_tables()",
    "from duckdb_columns",
    "from pg_catalog.pg_class",
    "from pragma_storage_info('t')",
    "insert into t values (1, 'x', 1)",
    "insert into o.u from t",
    "update t set a = 1",
    "delete from main.t",
    "truncate t",
    "create table w(a integer)",
    "create table main.w(a integer)",
    "create view o.w as from t",
    "create view w as from o.u",
    "create macro o.w() as table from t",
    "create table o.w as from t",
    "create schema w",
    "drop table t",
    "drop schema main",
    "drop table if exists nothing",
    "alter table t add column x integer",
    "alter table t add column x integer default 3",
    "comment on table t is 'x'",
    "create index w on t(a)",
    "create sequence w",
    "select nextval('s')",
    "pivot t on b using sum(a)",
    "analyze t",
    "explain from t",
    "pivot o.u on b using sum(secret(a))",
    "alter table o.u add column z integer default nextval('main.s')",
    "describe tables",
    'show "tables"',
    "select * from query_table('t')",
    "set variable x = (select max(a) from t)",
]
IN_BOUNDS = [
    "select 1",
    "from o.u",
    "select max(a) from o.u where a > ?",
    "insert into o.u values (1, 'x', 1)",
    "update o.u set b = 'z'",
    "delete from o.u where a = 17",
    "create table o.b1 as from o.u",
    "create view o.b2 as from o.b1",
    "from o.b2",
    "alter table o.b1 add column z integer default 1",
    "drop view o.b2",
    "drop table if exists o.b1",
    "create temp table b3 as select 1",
    "from b3",
    "describe o.u",
    "summarize o.u",
    "select nextval('o.s2')",
    "create index b4 on o.u(a)",
    "use o",
    "pivot o.u on b using sum(a)",
]


class World:
    """An engine whose database has a little of everything, and files beside it."""

    def __init__(self, place: Path) -> None:
        self.csv = place / "data.csv"
        self.csv.write_text("a,b\n1,2\n")
        self.own = place / "own.duckdb"
        self.out = place / "out"
        self.engine = Engine(
            str(self.own), read_only=False, extensions=(), sandbox=Sandbox(functions=("st_area",))
        )
        self.run(SETUP, UNRESTRICTED)

    def text(self, sql: str) -> str:
        for name in ("csv", "own", "out"):
            sql = sql.replace("{" + name + "}", str(getattr(self, name)))
        return sql

    def check(self, sql: str, policy: Policy) -> None:
        with self.engine.cursor(policy) as cursor:
            cursor.examine(self.text(sql))

    def run(self, sql: str, policy: Policy, params: Any = None) -> list[Any]:
        with self.engine.cursor(policy) as cursor:
            result = cursor.run(self.text(sql), params)
            return [] if result is None else result.reader.read_all().to_pylist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("guard"))
    yield world
    assert not world.out.exists()
    assert world.run("select count(*) as n from t", UNRESTRICTED)[0]["n"] > 0
    world.engine.close(time.monotonic() + DEADLINE)


PARAMETERS: dict[str, Any] = {
    "select a from t where a > ?": [1],
    "select a from t where a = $1 and b = $2": [1, "x"],
    "select * from t where a = $id": {"id": 1},
    "select a from t limit ?": [1],
    "select ?": ["x"],
    "select a + ?, lower(?) from t": [1, "X"],
    "select * from t where b like ? and a in (?, ?)": ["x%", 1, 2],
    "select ?::integer + $2": [1, 2],
    "with x as (select ? as i) select i + ? from x": [1, 2],
}


@pytest.mark.parametrize("sql", READING)
def test_whoever_only_reads_may(world: World, sql: str) -> None:
    if sql == "select currval('s')":
        world.run("select nextval('s')", UNRESTRICTED)
    for policy in (SELECT, DATABASE):
        world.run(sql, policy, PARAMETERS.get(sql))


@pytest.mark.parametrize("sql", WRITING)
def test_whoever_may_change_the_database_may(world: World, sql: str) -> None:
    world.check(sql, DATABASE)


@pytest.mark.parametrize("sql", REACHING_OUT)
def test_nobody_reaches_out(world: World, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    planned: list[str] = []

    def recorded(native: Any, sql: str) -> Any:
        planned.append(sql)
        return plan_of(native, sql)

    monkeypatch.setattr("sqlrooms_server.db.checks.plan_of", recorded)
    for policy in (SELECT, DATABASE, SCHEMA):
        # QueryError: not every version has all of the syntax.
        with pytest.raises((Forbidden, QueryError, BadRequest)) as caught:
            world.check(sql, policy)
        if isinstance(caught.value, QueryError):
            assert str(caught.value).startswith(("Parser Error", "Syntax Error")), caught.value
    # DuckDB opens files when it plans.
    texts = ("read_", "/etc", "http", "s3:", "passwd", "enable_", str(world.csv))
    assert not [text for text in planned if any(part in text for part in texts)]


@pytest.mark.parametrize("sql", CHANGING)
def test_whoever_only_reads_changes_nothing(world: World, sql: str) -> None:
    for policy in (SELECT, FILES):
        with pytest.raises((Forbidden, QueryError)) as caught:
            world.run(sql, policy)
        if isinstance(caught.value, QueryError):
            assert not TWO
            assert sql.startswith("with i as")


@pytest.mark.parametrize("sql", OUT_OF_BOUNDS)
def test_schemas_are_bounds(world: World, sql: str) -> None:
    with pytest.raises(Forbidden):
        world.check(sql, SCHEMA)


def test_inside_of_a_schema_all_is_open(world: World) -> None:
    session = []
    with world.engine.cursor(SCHEMA) as cursor:
        for sql in IN_BOUNDS:
            result = cursor.run(sql, [1] if "?" in sql else None)
            if result is not None:
                session.append(result.reader.read_all())
    assert len(session) == len(IN_BOUNDS)


@pytest.mark.parametrize(
    "sql",
    [
        "from '{csv}'",
        "select count(*) from read_csv('{csv}') where a > ?",
        "select * from t, read_text('{csv}')",
        "from glob('{csv}*')",
        "select * from file_view",
        "describe from '{csv}'",
        "from read_csv(['{csv}', '{csv}'])",
    ],
)
def test_files_can_be_open_to_those_who_only_read(world: World, sql: str) -> None:
    world.run(sql, FILES, [0] if "?" in sql else None)


@pytest.mark.parametrize(
    "sql",
    [
        "copy t to '{out}'",
        "copy t from '{csv}'",
        "attach '{out}' as z",
        "install httpfs",
        "load json",
        "insert into t select a, b, 1 from '{csv}'",
        "select write_log(content) from read_text('{csv}')",
        "select nextval('s') from '{csv}'",
        "from enable_logging(), '{csv}'",
        "with i as (insert into t values (5, 'x', 1) returning *) select * from i, '{csv}'",
        "set threads = 1",
        "from read_duckdb('{own}', table_name = 't')",
    ],
)
def test_open_files_are_only_read(world: World, sql: str) -> None:
    with pytest.raises((Forbidden, QueryError)) as caught:
        world.check(sql, FILES)
    # 1.5 has no such WITH.
    assert isinstance(caught.value, Forbidden) or (not TWO and "insert" in sql)


def test_kinds_are_listed(world: World) -> None:
    policy = Policy(kinds=frozenset({"SELECT", "INSERT"}))
    for sql in ("select 1", "insert into stats values (1, 2)", "pivot t on b using sum(a)"):
        world.check(sql, policy)
    for sql in (
        "update t set a = 1",
        "copy t to '{out}'",
        "select 1; delete from t",
        "begin",
        "explain select 1",
        "pragma version",
        "alter table t add column x integer default 2",
        "prepare p as delete from t",
        "create table x as select 1",
    ):
        with pytest.raises(Forbidden):
            world.check(sql, policy)
    explaining = Policy(kinds=frozenset({"EXPLAIN", "SELECT"}))
    world.check("explain select 1", explaining)
    with pytest.raises(Forbidden, match="DELETE"):
        world.check("explain analyze delete from t", explaining)


def test_kinds_within_a_statement_count(world: World) -> None:
    policy = Policy(kinds=frozenset({"SELECT"}))
    world.check("select count(*) from '{csv}' where 'insert' <> ''", policy)
    for sql in (
        "with i as (insert into t values (5, 'x', 1) returning *) select * from i",
        "create table x as pivot t on b using sum(a)",
        "insert into stats (pivot t on a using sum(a))",
    ):
        with pytest.raises((Forbidden, QueryError)):
            world.check(sql, policy)


def test_macros_are_looked_into_once(world: World) -> None:
    # Each way to the last one, taken alone, would be 256.
    world.run("create or replace macro m8(x) as x", UNRESTRICTED)
    for i in reversed(range(8)):
        world.run(f"create or replace macro m{i}(x) as m{i + 1}(x) + m{i + 1}(x)", UNRESTRICTED)
    assert world.run("select m0(1) as n", SELECT) == [{"n": 256}]


def test_extensions_are_closed_to_those_who_have_none(world: World) -> None:
    policy = Policy(extensions=False)
    world.check("copy t to '{out}'", policy)
    world.check("set threads = 2", policy)
    for sql in (
        "load json",
        "install json",
        "force install json",
        "update extensions",
        "set autoload_known_extensions = true",
        "set custom_extension_repository = 'x'",
        "prepare p as select 1",
    ):
        with pytest.raises(Forbidden):
            world.check(sql, policy)


def test_functions_of_extensions_can_be_opened(world: World) -> None:
    with pytest.raises(QueryError, match="st_area"):
        world.check("select st_area(1)", SELECT)
    with pytest.raises(Forbidden):
        world.check("select st_read(1)", SELECT)


def test_what_is_refused_says_by_which_rule_and_what_would_do(world: World) -> None:
    with pytest.raises(Forbidden, match="COPY is refused by --sandbox select: ask for the rows"):
        world.check("copy t to 'x'", SELECT)
    with pytest.raises(
        Forbidden, match=r"Reading own\.main\.t is refused by role 'o': .* schemas o"
    ):
        world.check("from t", SCHEMA)
    with pytest.raises(Forbidden, match=r"read_csv\(\) is refused by role 'x' and --sandbox data"):
        world.check("from read_csv('x')", Policy(source="role 'x'").within(DATABASE))
    too_long = "select '" + MAX_PARSED_LENGTH * "x" + "'"
    with pytest.raises(Forbidden, match=f"at most {MAX_PARSED_LENGTH} can be checked"):
        world.check(too_long, SELECT)


def test_errors_of_the_client_are_told_as_ever(world: World) -> None:
    with pytest.raises(QueryError, match="Table with name nothing does not exist"):
        world.check("from nothing", SELECT)
    with pytest.raises(QueryError, match="syntax error"):
        world.check("select from where", SELECT)
    with pytest.raises(QueryError) as caught:
        world.check("from o.hiddem", SCHEMA)
    assert "hidden" not in str(caught.value)


def test_statements_of_a_text_are_checked_when_those_before_have_run(world: World) -> None:
    text = "create or replace macro turned() as table {0}; select * from turned()"
    world.run(text.replace("{0}", "from t"), DATABASE)
    with pytest.raises(Forbidden):
        world.run(text.replace("{0}", "from any_file('/etc/passwd')"), DATABASE)
    for text in (
        "create temp table t as select 1; from t",
        "drop table if exists temp.t; from o.u",
    ):
        world.run(text, SCHEMA)
    # What they left is gone, and was a name for nobody else.
    for text in ("from t", "create temp table t as select 1; drop table temp.t; from t"):
        with pytest.raises(Forbidden):
            world.run(text, SCHEMA)


def test_statements_of_a_text_commit_together_if_they_say_so(world: World) -> None:
    world.engine.versions.in_use = True
    versions: list[int] = []
    key = key_of(("own", "main", "stats"))
    before = world.engine.versions.version(key)
    with world.engine.cursor(DATABASE) as cursor:
        run_through = cursor._run_through

        def watched(sql: str) -> None:
            run_through(sql)
            versions.append(world.engine.versions.version(key))

        cursor._run_through = watched  # type: ignore[method-assign]
        cursor.run(
            "begin; insert into stats values (1, 2); insert into stats values (2, 2); commit"
        )
    # Told when it is committed, not before.
    assert versions == [before] * 3
    assert world.engine.versions.version(key) > before


def test_what_was_checked_is_checked_again_after_a_change(world: World) -> None:
    world.run("create or replace view turning as from t", UNRESTRICTED)
    world.run("from turning", SELECT)
    world.run("create or replace view turning as from '{csv}'", UNRESTRICTED)
    with pytest.raises(Forbidden):
        world.run("from turning", SELECT)


def test_what_changes_between_check_and_run_is_checked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run("create or replace view racing as from t", UNRESTRICTED)
    with world.engine.cursor(SELECT) as cursor:
        run = cursor._run

        def late(*arguments: Any) -> Any:
            world.run("create or replace view racing as from '{csv}'", UNRESTRICTED)
            return run(*arguments)

        monkeypatch.setattr(cursor, "_run", late)
        with pytest.raises(Forbidden):
            cursor.run("from racing")


@pytest.mark.parametrize(
    ("table", "policy", "new", "is_open"),
    [
        (("x",), DATABASE, True, True),
        (("own", "main", "x"), DATABASE, True, True),
        (("other", "main", "x"), DATABASE, True, False),
        (("x",), SELECT, True, False),
        (("x",), SCHEMA, False, False),
        (("O", "x"), SCHEMA, False, True),
        (("own", "o", "x"), SCHEMA, True, True),
        (("own", "main", "x"), SCHEMA, True, False),
        (("own", "x"), SCHEMA, True, False),
        (("x",), Policy(kinds=frozenset({"INSERT"})), False, True),
        (("x",), Policy(kinds=frozenset({"INSERT"})), True, False),
    ],
)
def test_uploads(
    world: World, table: tuple[str, ...], policy: Policy, new: bool, is_open: bool
) -> None:
    if is_open:
        world.engine.reach.check_upload(table, policy, new=new)
    else:
        with pytest.raises(Forbidden):
            world.engine.reach.check_upload(table, policy, new=new)


def test_directories(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "data.csv").write_text("a\n1\n")
    (tmp_path / "secret.csv").write_text("a\n1\n")
    (inside / "link.csv").symlink_to(tmp_path / "secret.csv")
    (inside / "up").symlink_to(tmp_path)
    directories = Directories([str(inside)])
    for path in ("data.csv", "*.csv", "**/*.csv", "new.csv", "a/b?.csv"):
        assert f"{inside}/{path}" in directories, path
    for path in (
        f"{tmp_path}/secret.csv",
        f"{inside}/../secret.csv",
        f"{inside}/*/../../secret.csv",
        f"{inside}/link.csv",
        f"{inside}/up/secret.csv",
        f"{inside}/up/*.csv",
        f"{inside}x/data.csv",
        f"{tmp_path}/*/data.csv",
        "data.csv",
        f"file://{inside}/data.csv",
        "http://example.com/x.csv",
        "",
    ):
        assert path not in directories, path
    with pytest.raises(StartupError, match="is no directory"):
        Directories([str(tmp_path / "nothing")])
    with pytest.raises(StartupError, match="would let clients read the database"):
        directories.refuse("the database", str(inside / "own.duckdb"))


# Those of DuckDB that nobody may call whom a policy restricts.
REFUSED = frozenset(
    """
    arrow_scan arrow_scan_dumb checkpoint combine combine_aggr create_external_resource
    current_setting deregister_external_resource destroy_external_resource disable_logging
    disable_profiling duckdb_approx_database_count duckdb_available_metrics
    duckdb_connection_count duckdb_databases duckdb_eviction_queues
    duckdb_extension_repositories duckdb_extensions duckdb_external_file_cache
    duckdb_external_resource_types duckdb_external_resources duckdb_grammar_extensions
    duckdb_log_contexts duckdb_logs duckdb_logs_parsed duckdb_memory duckdb_prepared_statements
    duckdb_profiling_settings duckdb_secret_type_parameters duckdb_secret_types duckdb_secrets
    duckdb_settings duckdb_table_sample duckdb_temporary_files enable_logging enable_profiling
    finalize force_checkpoint get_block_size index_key json_copy_strftime_if_date
    json_copy_strftime_if_timestamp json_execute_serialized_sql json_serialize_plan pandas_scan
    pg_sleep python_arrow_scan python_map_function query query_table read_duckdb
    read_single_csv_file read_single_json_file read_single_parquet_file
    register_external_resource register_external_resource_type sleep_ms stats to_aggregate_state
    truncate_duckdb_logs variant_bytes_to_variant variant_to_parquet_variant which_secret
    write_log
    """.split()
)


def test_every_function_of_duckdb_is_known() -> None:
    """A version with new ones fails here, and refuses them until somebody has looked."""
    rows = duckdb.sql(
        "SELECT DISTINCT lower(function_name), function_type IN ('table', 'table_macro') "
        "FROM duckdb_functions() WHERE database_name = 'system' AND function_type <> 'pragma'"
    ).fetchall()
    tables = functions.GENERATORS | functions.METADATA | functions.FILE_READERS
    assert not tables & REFUSED and not functions.CHANGING & functions.SCALARS
    for name, is_table in rows:
        is_open = name in tables if is_table else name in functions.CHANGING
        is_open = is_open or (not is_table and functions.is_harmless(name))
        is_refused = name in REFUSED or name == "seq_scan" or name.startswith("__internal_")
        assert is_open != is_refused, (name, is_table)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_tables_of_the_server(tmp_path: Path, in_a_file: bool) -> None:
    """Rooms of an earlier version are in one that SQL sees; rooms have permissions of their own."""
    engine = Engine(":memory:", read_only=False, extensions=())
    create_meta_tables(engine, "meta", str(tmp_path / "meta.duckdb") if in_a_file else "")
    policy = Policy(files=False, extensions=False)
    place = "meta.main" if in_a_file else "memory.meta"
    refused = [
        "from meta.sync_rooms",
        f"from {place}.sync_rooms",
        "create view v as from meta.SYNC_ROOMS",
        "insert into meta.sync_rooms values ('a', 'b', now())",
        "use meta; from sync_rooms",
        "use meta; drop table sync_rooms",
        "use meta; drop table ui_state",
        f"drop table {place}.ui_state",
        "drop schema meta cascade",
        f"drop schema {place} cascade",
        "alter table meta.ui_state rename to x",
        "create or replace table meta.ui_state as select 1",
    ]
    let_through = []
    for sql in refused:
        try:
            with engine.cursor(policy) as cursor:
                cursor.run(sql)
            let_through.append(sql)
        except (Forbidden, QueryError) as error:
            # DuckDB itself refuses to drop the schema of a file.
            assert isinstance(error, Forbidden) or sql.startswith("drop schema"), sql
    assert not let_through
    for sql in ("insert into meta.ui_state values ('a', '{}', now())", "from meta.ui_state"):
        with engine.cursor(policy) as cursor:
            cursor.run(sql)
    with engine.cursor(policy) as cursor:
        cursor.run("create table ui_state as select 1")
    for table in (("meta", "sync_rooms"), ("META", "ui_state")):
        with pytest.raises(Forbidden):
            engine.reach.check_upload(table, policy, new=True)
    engine.close(time.monotonic() + DEADLINE)
