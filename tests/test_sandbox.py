"""Servers in a sandbox, over real connections, with real files around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from sqlrooms_server.errors import StartupError
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.loro_client import Client
from tests.streams import stream
from tests.wire import Arrow, Wire

ROWS = pa.table({"a": pa.array([7], pa.int32())})


@contextmanager
def running(place: Path, **settings: Any) -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0, cache_dir=str(place / "cache"), **settings))
    try:
        yield local
    finally:
        assert local.server.stop()


def made(path: Path) -> str:
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE t AS SELECT i AS a, i * 1000003 AS big FROM range(5000) r(i)"
        )
        connection.execute("CREATE SCHEMA o; CREATE TABLE o.u AS FROM t LIMIT 3; CREATE SEQUENCE s")
        connection.execute("CREATE VIEW o.narrow AS SELECT a FROM t")
    return str(path)


class Place:
    """A directory of files, and what is in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open = root / "open"
        self.open.mkdir()
        self.csv = self.open / "data.csv"
        self.csv.write_text("a,b\n1,2\n")
        self.secret = root / "secret.csv"
        self.secret.write_text("a,b\n3,4\n")
        (self.open / "link.csv").symlink_to(self.secret)
        self.out = root / "out.csv"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("sandbox"))
    yield place
    assert not place.out.exists()


@pytest.fixture(scope="module")
def select(place: Place) -> Iterator[LocalServer]:
    """Clients may read; so they may a directory, and rooms."""
    path = made(place.root / "select.duckdb")
    settings = {"sandbox": "select", "allow_dir": (str(place.open),), "extensions": ("json",)}
    with running(place.root / "select", db_path=path, sync=True, **settings) as local:
        yield local
    # Its file is none the worse.
    with duckdb.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchall() == [(5000,)]


@pytest.fixture(scope="module")
def database(place: Place) -> Iterator[LocalServer]:
    path = made(place.root / "database.duckdb")
    meta = str(place.root / "meta.duckdb")
    with running(place.root / "db", db_path=path, meta_db=meta, sandbox="database") as local:
        yield local
    with duckdb.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchall() == [(5000,)]


@pytest.fixture
def reader(select: LocalServer) -> Iterator[Wire]:
    with select.connect() as wire:
        yield wire


@pytest.fixture
def writer(database: LocalServer) -> Iterator[Wire]:
    with database.connect() as wire:
        yield wire


def refused(reply: Any) -> str:
    assert reply["type"] == "error", reply
    assert reply["code"] == "forbidden", reply
    return str(reply["error"])


def test_reading_goes_on_as_ever(reader: Wire) -> None:
    assert reader.table("select count(*) as n from t").to_pylist() == [{"n": 5000}]
    # JSON has every digit: DuckDB casts what Arrow cannot carry.
    wide = "select sum(big)::hugeint * 1000000000000000000 as n from t"
    assert reader.rows(wide) == [{"n": sum(range(5000)) * 1000003 * 10**18}]
    reply = reader.request(type="json", sql="select ? + a as n from t limit 1", params=[1])
    assert json.loads(reply["data"]) == [{"n": 1}]
    assert reader.rows("select 1 as x; from t limit 1") == [{"a": 0, "big": 0}]
    assert len(reader.rows("describe t")) == 2
    assert reader.rows("pivot o.u on a using count(*)")
    assert stream(reader, "from t").table().num_rows == 5000


def test_nothing_is_changed_and_nothing_is_reached(reader: Wire, place: Place) -> None:
    own = place.root / "select.duckdb"
    assert "--sandbox select" in refused(reader.arrow("delete from t"))
    refused(reader.arrow(f"copy t to '{place.out}'"))
    refused(reader.arrow(f"copy (select 1) to '{own}' (format csv, use_tmp_file false)"))
    refused(reader.arrow(f"select * from read_csv('{place.secret}')"))
    refused(reader.arrow("select nextval('s')"))
    refused(reader.arrow("from enable_logging('QueryLog', storage = 'file')"))
    refused(reader.request(type="exec", sql="select 1; drop table t", queryId=1))
    refused(reader.request(type="json", sql="set threads = 1", queryId=1))
    refused(reader.upload(ROWS, tableName="n", queryId="u"))
    header = {"tableName": "n", "queryId": "c", "seq": 0, "last": True}
    refused(reader.upload(ROWS, **header))
    assert reader.rows("select count(*) as n from t") == [{"n": 5000}]


def test_directories_are_open(reader: Wire, place: Place) -> None:
    rows = [{"a": 1, "b": 2}]
    assert reader.rows(f"from '{place.csv}'") == rows
    assert reader.rows(f"from read_csv('{place.csv}')") == rows
    assert reader.rows(f"select t.a, f.b from t join '{place.csv}' f using (a)") == rows
    assert reader.rows(f"from read_csv(['{place.csv}'], header = true)") == rows
    assert reader.rows(f"select content from read_text('{place.open}/d*')")
    for path in (
        place.secret,
        f"{place.open}/../secret.csv",
        f"{place.open}/link.csv",
        place.root / "select.duckdb",
        f"{place.root}/*.duckdb",
        "/etc/passwd",
        "http://127.0.0.1:1/x.csv",
    ):
        for sql in (f"from read_text('{path}')", f"from '{path}'", f"from glob('{path}')"):
            refused(reader.arrow(sql))
    # DuckDB writes no plan of what reads CSV; what else is read there is looked at all the same.
    for view in ("duckdb_logs", "main.duckdb_databases", '"pg_catalog"."PG_settings"'):
        refused(reader.arrow(f"select * from {view}, '{place.csv}' f"))
    assert (
        len(reader.rows(f"with f as (from '{place.csv}') select * from f, o.narrow n limit 5")) == 5
    )
    # What is not written out might be any file.
    sql = f"from read_blob('{place.root}' || '/select.duckdb')"
    refused(reader.arrow(sql))
    refused(reader.request(type="arrow", sql="from read_text(?)", params=[str(place.csv)]))
    # Links are followed by DuckDB, which refuses what they lead to.
    reply = reader.arrow(f"from read_csv('{place.open}/*.csv')")
    assert reply["code"] == "query_error", reply
    refused(reader.arrow(f"copy (from '{place.csv}') to '{place.open}/out.csv'"))


def test_what_is_remembered_is_asked_for_again(reader: Wire) -> None:
    for cached in (False, True):
        reply = reader.request(type="json", sql="from o.u", queryId=1, persist=True)
        assert reply.get("cached", False) is cached
    refused(reader.request(type="json", sql="from duckdb_settings()", queryId=1, persist=True))


def test_live_queries_and_sessions(reader: Wire) -> None:
    refused(reader.request(type="live", sql="from read_text('/etc/passwd')", queryId=1))
    live = reader.request(type="live", sql="from o.u", queryId=2)
    assert isinstance(live, Arrow)
    for sql in ("begin", "set variable x = 4", "from t", "rollback"):
        assert (
            not isinstance(
                reply := reader.request(type="exec", sql=sql, queryId=3, session="s"), Arrow
            )
            and reply["type"] == "ok"
        ), reply
    reply = reader.request(type="json", sql="select getvariable('x') as x", session="s")
    assert json.loads(reply["data"]) == [{"x": 4}]
    refused(reader.request(type="exec", sql="delete from t", queryId=3, session="s"))


def test_progress_is_told(select: LocalServer) -> None:
    with select.server.main.database.engine.cursor() as cursor:
        cursor.show_progress()
        told = cursor.native.execute("SELECT current_setting('enable_progress_bar')").fetchall()
    assert told == [(True,)]


def test_rooms_can_be_read(select: LocalServer, reader: Wire) -> None:
    with select.connect() as wire:
        client = Client(wire, "plan")
        client.join()
        client.write("n", 1)
        sql = "select document->>'$.m.n' as n from room('plan')"
        assert reader.rows(sql) == [{"n": "1"}]
        assert [row["room_id"] for row in reader.rows("from rooms()")] == ["plan"]
        for session in range(2):
            reply = reader.request(type="json", sql=sql, queryId=session, session="r")
            assert json.loads(reply["data"]) == [{"n": "1"}]
    refused(reader.arrow("from room('plan'), read_text('/etc/passwd')"))


def test_the_database_can_be_changed(writer: Wire, database: LocalServer, place: Place) -> None:
    for sql in (
        "create or replace table w(i integer default 3)",
        "insert into w values (1), (2)",
        "create or replace view wv as from w",
        "create or replace macro wm(x) as table select * from w where i = x",
        "begin; insert into w values (9); commit",
        "alter table w add column j integer default 1",
        "vacuum",
    ):
        writer.exec(sql)
    assert writer.rows("select count(*) as n from wm(9)") == [{"n": 1}]
    reply = writer.request(
        type="exec", sql="insert into w values (?, ?)", queryId="e", params=[5, 6]
    )
    assert reply["type"] == "ok"
    assert writer.upload(ROWS, tableName="up", queryId="u")["type"] == "uploadAck"
    assert writer.rows("from up") == [{"a": 7}]
    writer.exec("insert into __sqlrooms.ui_state (key) values ('k')")
    own = place.root / "database.duckdb"
    for sql in (
        f"copy w to '{place.out}'",
        f"copy (select 1) to '{own}.wal' (format csv, use_tmp_file false)",
        f"insert into w select 1, content from read_text('{place.secret}')",
        f"create view x as from '{place.secret}'",
        f"create macro x() as table from read_text('{place.secret}')",
        "attach ':memory:' as z",
        "create secret (type s3)",
        "checkpoint",
        f"from own.duckdb; from '{own}'",
        f"create table x as from '{place.csv}'",
    ):
        refused(writer.arrow(sql))
    refused(writer.upload(ROWS, tableName="other.main.up", queryId="u"))


def test_duckdb_is_locked_too(database: LocalServer, place: Place) -> None:
    """Whatever the guard may have missed."""
    engine = database.server.main.database.engine
    native = engine.native_cursor()
    for sql in (
        f"from read_text('{place.secret}')",
        f"copy (select 1) to '{place.out}'",
        f"attach '{place.out}' as z",
        "set threads = 1",
        "set enable_external_access = true",
        "set autoload_known_extensions = true",
        "set allowed_configs = ['threads']",
        "install httpfs",
    ):
        with pytest.raises(duckdb.Error):
            native.execute(sql)
    (temporary,) = native.execute("SELECT current_setting('temp_directory')").fetchall()[0]
    assert Path(temporary).stat().st_mode & 0o777 == 0o700
    native.close()


TOKENS = """
[roles.analyst]
schemas = ["o"]
read_rooms = ["open"]

[roles.writer]
read_only = false
statements = ["select", "insert", "create"]

[tokens.ada]
role = "admin"
hash = "sha256:{ada}"

[tokens.bob]
role = "analyst"
hash = "sha256:{bob}"

[tokens.kim]
role = "writer"
hash = "sha256:{kim}"
"""


@pytest.fixture(scope="module")
def shared(place: Place) -> Iterator[LocalServer]:
    """A server without a sandbox, for admins, analysts and writers."""
    path = made(place.root / "shared.duckdb")
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("ada", "bob", "kim")}
    tokens = place.root / "tokens.toml"
    tokens.write_text(TOKENS.format(**digests))
    tokens.chmod(0o600)
    with running(place.root / "shared", db_path=path, tokens=str(tokens), sync=True) as local:
        yield local


def test_a_role_bounds_what_its_clients_run(shared: LocalServer, place: Place) -> None:
    with (
        shared.connect("/?token=ada") as ada,
        shared.connect("/?token=bob") as bob,
        shared.connect("/?token=kim") as kim,
    ):
        assert ada.rows(f"from read_csv('{place.secret}')") == [{"a": 3, "b": 4}]
        assert "role 'analyst'" in refused(bob.arrow(f"from read_csv('{place.secret}')"))
        # What one asked to be kept is not for the other, unless both may see it.
        for persist in (True, True):
            ada.request(type="json", sql="from t limit 1", queryId=1, persist=persist)
        refused(bob.request(type="json", sql="from t limit 1", queryId=1, persist=True))
        refused(bob.request(type="json", sql="from o.narrow", queryId=1, persist=True))
        refused(bob.request(type="live", sql="from t", queryId=1))
        refused(bob.arrow("from room('closed')"))
        assert bob.rows("from room('open')") == []
        refused(bob.arrow("delete from o.u"))
        refused(kim.arrow("update t set a = 1"))
        kim.exec("create or replace table made as select 1 as i")
        kim.exec("insert into made values (2)")
        assert kim.upload(ROWS, tableName="kims", queryId="u")["type"] == "uploadAck"
        # A view is what it is now.
        ada.exec("create or replace view o.turning as from o.u")
        assert len(bob.rows("from o.turning")) == 3
        ada.exec("create or replace view o.turning as from t")
        refused(bob.arrow("from o.turning"))


def test_changes_of_other_schemas_are_not_told(shared: LocalServer) -> None:
    with shared.connect("/?token=ada") as ada, shared.connect("/?token=bob") as bob:
        ada.exec("insert into t values (1, 1)")
        watching = bob.request(type="watch", tables="*", queryId="w")
        assert "t" not in watching["versions"]
        ada.exec("insert into t values (1, 1)")
        ada.exec("insert into o.u values (1, 1)")
        assert list(bob.receive()["tables"]) == ["o.u"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sandbox": "all"}, "--sandbox must be select or database"),
        ({"allow_dir": ("/tmp",)}, "--allow-dir opens directories .* give --sandbox too"),
        ({"sandbox": "select", "allow_dir": ("{root}/none",)}, "--allow-dir: .*none is no dir"),
        (
            {"sandbox": "select", "allow_dir": ("{root}",), "db_path": "{root}/x.duckdb"},
            "--allow-dir .* would let clients read the database",
        ),
        (
            {"sandbox": "select", "allow_dir": ("{root}",), "cache_dir": "{root}/c"},
            "would let clients read the cache",
        ),
        (
            {"sandbox": "select", "allow_dir": ("{root}",), "auth_token_file": "{root}/token"},
            "would let clients read the file of --auth-token-file",
        ),
        ({"sandbox": "select", "allow_dir": ("/",)}, "would let clients read the cache"),
    ],
)
def test_settings_that_do_not_fit(place: Place, settings: dict[str, Any], message: str) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.replace("{root}", str(place.root))

    with pytest.raises(StartupError, match=message):
        Server(
            Settings(port=0, **{name: filled(value) for name, value in settings.items()})
        ).start()
