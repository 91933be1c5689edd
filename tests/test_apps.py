"""Apps: what each has of its own, what nothing of one tells the other, and which path is whose."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import duckdb
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sqlrooms_server import AppConfig, Plugin, Server, Settings, StartupError, on, route
from sqlrooms_server.app_config import CREDENTIALS, INHERITED, OF_THE_SERVER, OWN
from sqlrooms_server.configuration import load
from sqlrooms_server.mounts import Mounts
from sqlrooms_server.protocol.decode import BINARY_KINDS, TEXT_DECODERS
from sqlrooms_server.settings import fields
from tests.conftest import ServerProcess
from tests.loro_client import EMPTY, Client, encoded
from tests.wire import DEADLINE, Arrow, Wire, framed, ipc

# Of a server with apps at /a and /deep/b.
ODD_PATHS = (
    *("//a", "/./a", "/x/../a", "/%61", "/%61/x", "/a%2Fx", "/a%2fx", "/x%2f..%2fa", "/a/.."),
    *("/a/../x", "/a/%2e%2e/x", "/a/..%2fx", "/a/..\\..", "/deep//b", "/deep/b/../x"),
    *("/deep/./b/x", "/\\a"),
)


class Local:
    """A server with apps, in this process."""

    def __init__(self, *apps: AppConfig, plugins: Any = (), **settings: Any) -> None:
        self.server = Server(Settings(port=0, **settings), plugins, apps)
        self.port = self.server.start()

    def connect(self, path: str = "/") -> Wire:
        return Wire(f"ws://127.0.0.1:{self.port}{path}")

    def http(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        self.location = answer.headers["Location"]
        found = answer.status, answer.read().decode()
        connection.close()
        return found

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        return self.http("GET", path, **headers)


class Echo(Plugin):
    """Tells where it is; ``wait`` answers when it is let."""

    def __init__(self) -> None:
        super().__init__("echo")
        self.let = threading.Event()

    @on("echo")
    def echo(self, call: Any) -> Any:
        self.server.send({"type": "told", "by": self.server.app})
        self.server.send({"type": "told", "by": self.server.app}, user="ada")
        self.server.channels.publish("news", "from a plugin")
        return [self.server.app, self.server.path, call.client.path, self.options.get("greeting")]

    @on("wait")
    def wait(self, call: Any) -> bool:
        return self.let.wait(DEADLINE)

    @route("GET", "/")
    def page(self, call: Any) -> str:
        return f"page of {self.server.app or 'main'}"

    @route("GET", "/mine/")
    def mine(self, call: Any) -> str:
        return f"{self.server.app} {call.rest}"


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    """Three of the same kind; each has a plugin of the same kind."""
    apps = [
        AppConfig("a", {"sync": True}, plugins=[Echo()], options={"echo": {"greeting": "Ahoy"}}),
        AppConfig("b", {"sync": True}, path="/deep/b", plugins=[Echo()]),
        AppConfig("inner", path="/a/inner"),
    ]
    made = Local(*apps, plugins=[Echo()], sync=True)
    yield made
    made.server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Local]]:
    with ExitStack() as stack:

        def start(*apps: AppConfig, **options: Any) -> Local:
            made = Local(*apps, **options)
            stack.callback(made.server.stop)
            return made

        yield start


def who(local: Local, path: str) -> str:
    """The app that answers a WebSocket at ``path``, which echoes."""
    with local.connect(path) as wire:
        wire.request(type="hello")
        wire.send(type="echo", queryId="e")
        while (reply := wire.receive()).get("queryId") != "e":
            pass
        return str(reply["data"][0])


def test_each_path_has_its_app(local: Local) -> None:
    for path in ("/", "/x", "/ab", "/A", "/deep", "/deep/bb", "/b", "/mine/%61"):
        assert who(local, path) == "", path
    for path in ("/a", "/a/", "/a/x/y?token=1", "/a/innerx"):
        assert who(local, path) == "a", path
    for path in ("/deep/b", "/deep/b/a"):
        assert who(local, path) == "b", path
    with local.connect("/a/inner/x") as wire:
        assert 'Unknown message type "echo"' in wire.request(type="echo")["error"]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_a_path_that_can_be_read_in_two_ways_is_nobodys(local: Local, path: str) -> None:
    assert local.get(path)[0] == 404
    with pytest.raises(InvalidStatus) as refused:
        local.connect(path)
    assert refused.value.response.status_code == 404


def test_paths_without_apps_are_as_they_were() -> None:
    mounts = Mounts("main", {})
    assert all(mounts.find(path) == ("main", path) for path in ODD_PATHS)


def test_an_app_sees_paths_from_where_it_is(local: Local) -> None:
    with local.connect("/a/x?room=1") as wire:
        wire.send(type="echo", queryId="e")
        while (reply := wire.receive()).get("queryId") != "e":
            pass
        assert reply["data"] == ["a", "/a", "/x", "Ahoy"]
    assert local.get("/a/mine/%2e") == (200, "a %2e")
    assert local.get("/mine/x") == (200, " x")
    assert local.get("/a/") == (200, "page of a")
    assert local.get("/") == (200, "page of main")
    assert local.get("/a/inner/mine/x") == (404, "not found")
    for path, location in (("/a?x=1&y=%0d", "a/?x=1&y=%0d"), ("/deep/b", "b/")):
        assert local.get(path) == (308, "") and local.location == location
    for path in ("/a/healthz", "/deep/b/healthz", "/a/inner/readyz", "/healthz"):
        assert local.get(path) == (200, "ok"), path
    assert json.loads(local.get("/a/version")[1])["name"] == "sqlrooms-server"


ATTACKS: dict[str, dict[str, Any]] = {
    "auth": {"token": "x"},
    "hello": {"user": "ada"},
    "arrow": {"sql": "create or replace table t as select 666 as i", "queryId": "1"},
    "json": {"sql": "insert into t values (667)", "queryId": "2", "session": "s"},
    "exec": {"sql": "create or replace table t as select 668 as i", "queryId": "3"},
    "cancel": {"queryId": "slow"},
    "ack": {"queryId": "chunks", "bytes": 1 << 40},
    "closeSession": {"session": "s"},
    "watch": {"tables": "*"},
    "unwatch": {},
    "live": {"sql": "from t", "queryId": "live"},
    "cacheStats": {},
    "subscribe": {"channel": "news", "presence": True},
    "notify": {"channel": "news", "payload": "secret"},
    "presence": {"channel": "news"},
    "unsubscribe": {"channel": "news"},
    "crdt-join": {"roomId": "r"},
    "crdt-snapshot": {"roomId": "r", "data": encoded(EMPTY)},
    "crdt-presence": {"roomId": "r", "data": encoded(b"secret")},
    "crdt-leave": {"roomId": "r"},
    "streamAck": {"queryId": "chunks", "output": "x", "bytes": 1 << 40},
    "echo": {"queryId": "4"},
    "object-list": {"queryId": "7", "watch": True},
    "object-fetch": {"object": "model", "queryId": "8"},
    "object-open": {"object": "model", "queryId": "9"},
    "object-data": {"queryId": "opened"},
    "object-ack": {"queryId": "opened", "bytes": 1},
    "object-close": {"queryId": "opened"},
    "object-release": {"tickets": ["x"], "queryId": "10"},
}


def test_nothing_that_one_app_is_sent_is_heard_in_another(local: Local) -> None:
    kinds = local.server.main.plugins.kinds
    assert set(ATTACKS) == {*TEXT_DECODERS, *kinds} - {"wait"}
    local.server.apps["b"].objects.publish("model", duckdb.sql("select 7 as i").to_arrow_table())
    with ExitStack() as stack:
        b, slow, eve, main = (
            stack.enter_context(local.connect(path)) for path in ("/deep/b", "/deep/b", "/a", "/")
        )
        b.request(type="hello", user="ada")
        me = b.request(type="hello", user="ada")["connectionId"]
        b.exec("create table t as select 1 as i")
        b.request(type="exec", sql="create temp table mine as select 5 as i", session="s")
        b.request(type="subscribe", channel="news", presence=True, recover=True)
        b.request(type="watch", tables="*")
        assert len(b.request(type="object-list", queryId="o", watch=True)["objects"]) == 1
        b.send(type="live", sql="select i from t", queryId="live")
        assert isinstance(b.receive(), Arrow)
        member = Client(stack.enter_context(local.connect("/deep/b")), "r")
        member.join()
        member.write("mine", 1)
        slow.send(type="wait", queryId="slow")
        slow.send(type="arrow", sql="from range(2000000)", queryId="chunks", stream=True)
        assert slow.receive().header["queryId"] == "chunks"

        for attacker in (eve, main):
            body = Client(attacker, "r").change("evil", 1)
            for kind, attack in ATTACKS.items():
                attacker.send(type=kind, **attack)
                if kind == "crdt-join":
                    attacker.send_raw(body)
                    attacker.send_raw(framed({"type": "crdt-update", "roomId": "r"}, body))
            upload = {"type": "uploadArrow", "tableName": "t", "queryId": "5"}
            attacker.send_raw(framed(upload, ipc(duckdb.sql("select 669 as i").to_arrow_table())))
            attacker.send_raw(framed({"type": "streamData", "queryId": "slow", "input": "x"}, b""))
            for to in ({"user": "ada"}, {"connection": me}):
                attacker.send(type="notify", channel="news", payload=1, to=to, queryId="6")
            seen: set[Any] = set()
            while not seen >= set("123456789"):
                reply = attacker.receive()
                found = reply.header if isinstance(reply, Arrow) else reply
                seen.add(found.get("queryId"))
                assert found.get("delivered", 0) == 0 and found.get("objects", []) == []
                if found.get("queryId") in ("8", "9"):
                    assert found["code"] == "not_found"
            assert BINARY_KINDS == ("uploadArrow", "crdt-update", "streamData")
        local.server.main.objects.publish("other", duckdb.sql("select 8 as i").to_arrow_table())
        headers = {"Content-Type": "application/json"}
        for place in ("/a", ""):
            answer = local.http("POST", f"{place}/channels/news?user=ada", '"x"', **headers)
            assert (answer[0], json.loads(answer[1])["delivered"]) == (200, 0)

        # Everything is as it was, and nobody was told anything.
        assert b.request(type="presence", channel="news", queryId="p")["count"] == 1
        assert b.request(type="json", sql="from t", queryId="q")["data"] == '[{"i":1}]'
        kept = b.request(type="json", sql="from mine", queryId="q", session="s")
        assert kept["data"] == '[{"i":5}]'
        member.wire.send(type="crdt-leave", roomId="r")
        assert member.next()["type"] == "crdt-left"
        assert member.values == {"mine": 1}
        connected = json.loads(local.get("/deep/b/connections")[1])["connections"]
        assert len(connected) == 3
        local.server.apps["b"].plugins.all[0].let.set()  # type: ignore[attr-defined]
        while (reply := slow.receive()) and isinstance(reply, Arrow):
            pass
        assert (reply["queryId"], reply["data"]) == ("slow", True)


def test_results_that_are_kept_are_those_of_the_app(local: Local) -> None:
    query = {"type": "json", "sql": "select 1 as kept", "queryId": "q", "persist": True}
    with local.connect("/a") as a, local.connect("/deep/b") as b:
        a.request(**query)
        a.request(**query)
        before = b.request(type="cacheStats")["hits"]
        assert a.request(type="cacheStats")["hits"] >= 1
        b.request(**query)
        assert b.request(type="cacheStats")["hits"] == before


def test_a_program_reaches_each_app(local: Local) -> None:
    with local.connect("/a") as a, local.connect("/deep/b") as b:
        for wire in (a, b):
            wire.request(type="subscribe", channel="c")
        local.server.apps["a"].channels.publish("c", "for a")
        local.server.apps["b"].channels.publish("c", "for b")
        local.server.channels.publish("c", "for main")
        assert (a.receive()["payload"], b.receive()["payload"]) == ("for a", "for b")
        assert local.server.apps["a"].connections.count() == 1


def digest(token: str) -> str:
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def tokens(path: Path, token: str, rate: int = 0) -> str:
    role = f"[roles.one]\nrequest_rate = {rate}\n[tokens.{token}]\n"
    path.write_text(f'{role}role = "one"\nhash = "{digest(token)}"\n')
    return str(path)


def is_welcome(local: Any, path: str, token: str) -> bool:
    with local.connect(f"{path}?token={token}") as wire:
        try:
            return bool(wire.request(type="hello")["type"] == "welcome")
        except ConnectionClosed:
            return False


def test_a_token_is_one_of_its_app(start: Callable[..., Local], tmp_path: Path) -> None:
    local = start(
        AppConfig("a", {"tokens": tokens(tmp_path / "a.toml", "ta"), "max_auth_failures": 3}),
        AppConfig("b", {"auth_token": "tb"}),
        AppConfig("like_main"),
        AppConfig("open", {"insecure_no_auth": True}),
        auth_token="tm",
    )
    paths = {"/": "tm", "/a": "ta", "/b": "tb", "/like_main": "tm"}
    for path, right in paths.items():
        for token in ("tm", "ta", "tb"):
            assert is_welcome(local, path, token) == (token == right), (path, token)
    assert is_welcome(local, "/open", "x")
    # Of wrong tokens, there were two at /a, and another one is too many there.
    assert not is_welcome(local, "/a", "x")
    with pytest.raises(InvalidStatus, match="429"):
        local.connect("/a?token=y").receive()
    assert is_welcome(local, "/b", "tb") and is_welcome(local, "/", "tm")
    bearer = {"Authorization": "Bearer tb"}
    assert local.get("/b/connections", **bearer)[0] == 200
    assert local.get("/connections", **bearer)[0] == 401


def test_rates_and_limits_are_those_of_the_app(start: Callable[..., Local], tmp_path: Path) -> None:
    local = start(
        AppConfig("a", {"tokens": tokens(tmp_path / "a.toml", "t", 1), "max_sql_length": 2000}),
        AppConfig("b", {"tokens": tokens(tmp_path / "b.toml", "t", 1)}),
        notify_rate=1,
    )
    with local.connect("/a?token=t") as a, local.connect("/b?token=t") as b:
        assert a.request(type="hello")["limits"]["maxSqlLength"] == 2000
        while a.request(type="hello").get("code") != "busy":
            pass
        assert b.request(type="hello")["limits"]["maxSqlLength"] == 4 << 20


# Files.


def test_apps_that_name_one_file_share_it(start: Callable[..., Local], tmp_path: Path) -> None:
    (tmp_path / "link.duckdb").symlink_to(tmp_path / "my.duckdb")
    local = start(
        AppConfig("a", {"db_path": str(tmp_path / "link.duckdb"), "sync": True}),
        AppConfig("b", {"db_path": str(tmp_path / "my.duckdb"), "sync": True}),
        AppConfig("c"),
        db_path=str(tmp_path / "my.duckdb"),
        sync=True,
    )
    query = {"type": "json", "sql": "from t", "queryId": "q", "persist": True}
    with ExitStack() as stack:
        main, a, b, c = (stack.enter_context(local.connect(p)) for p in ("/", "/a", "/b", "/c"))
        main.exec("create table t as select 1 as i")
        a.request(type="watch", tables=["t"])
        b.send(type="live", sql="from t", queryId="l")
        assert isinstance(b.receive(), Arrow)
        main.exec("insert into t values (2)")
        assert a.receive()["tables"].keys() == {"t"}
        assert [r.table()["i"].to_pylist() for r in [b.receive()] if isinstance(r, Arrow)] == [
            [1, 2]
        ]
        main.request(**query)
        assert a.request(**query)["cached"] is True
        assert "t does not exist" in c.arrow("from t")["error"]
        for number, wire in enumerate((main, a, b)):
            client = Client(wire, "r")
            client.join()
            assert client.values == {}
            client.write("n", number)
    names = {path.name for path in tmp_path.glob("*.duckdb")}
    assert names >= {"my.rooms.duckdb", "link.a.rooms.duckdb", "my.b.rooms.duckdb"}


DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"db_path": "m"}, {"db_path": "m", "sandbox": "select"}, "'a' and .* share .* --sandbox"),
    ({"db_path": "m", "max_result_rows": 5}, {"db_path": "m", "max_result_rows": 6}, "--max-re"),
    ({"db_path": "m"}, {"db_path": "m", "temp_directory": "x"}, "--temp-directory"),
    ({"db_path": "m"}, {"db_path": "a", "meta_db": "m"}, "'a': .*m is open .* --db-path of the s"),
    ({"meta_db": "m"}, {"meta_db": "m"}, "as --meta-db of the server"),
    ({"sync": True, "rooms_db": "r"}, {"rooms_db": "r"}, "as --rooms-db of the server"),
    ({"db_path": "m"}, {"sync": True, "rooms_db": "m"}, "for --rooms-db"),
    ({"db_path": "m.a.rooms.duckdb"}, {"db_path": "m", "sync": True}, "for --rooms-db"),
    ({"temp_directory": "x"}, {"temp_directory": "x"}, "for --temp-directory"),
    (
        {"sandbox": "select"},
        {"allow_dir": ("",), "db_path": "a"},
        "'a': --allow-dir .* the database",
    ),
    ({"db_path": "m"}, {"sandbox": "select", "allow_dir": ("",)}, "'a': --allow-dir .* database"),
    ({}, {"db_path": "/proc/none/x"}, "App 'a': Cannot create /proc/none/x"),
    ({}, {"read_only": True}, "App 'a': --read-only needs a database file"),
    ({}, {"tokens": "none.toml"}, "App 'a': Cannot read"),
    ({}, {"plugin": ("none.py",)}, "App 'a': Cannot load the plugin"),
    ({}, {"query_timeout": -1}, "App 'a': --query-timeout must be"),
    ({}, {"port": 1}, "App 'a': port is a setting of the whole server"),
    ({}, {"config": "x"}, "App 'a': config is a setting of the whole server"),
    ({}, {"ports": 1}, "App 'a': ports is not a setting"),
    ({"host": "0.0.0.0", "insecure_no_auth": True}, {"auth_token": "x"}, ""),
    ({"host": "0.0.0.0", "auth_token": "x"}, {}, ""),
]
PATHS = ("db_path", "meta_db", "rooms_db", "temp_directory")


@pytest.mark.parametrize(("main", "app", "told"), DIFFERENT)
def test_what_cannot_be_names_the_app(
    start: Callable[..., Local],
    tmp_path: Path,
    main: dict[str, Any],
    app: dict[str, Any],
    told: str,
) -> None:
    def placed(settings: dict[str, Any]) -> dict[str, Any]:
        found = dict(settings)
        for name in PATHS:
            if name in found:
                found[name] = str(tmp_path / found[name])
        if "allow_dir" in found:
            found["allow_dir"] = (str(tmp_path),)
        return found

    def launch() -> Local:
        return start(AppConfig("first"), AppConfig("a", placed(app)), **placed(main))

    if not told:
        launch()
        return
    threads = threading.active_count()
    with pytest.raises(StartupError, match=told) as refused:
        launch()
    assert "\n" not in str(refused.value)
    assert threading.active_count() <= threads


def test_an_app_without_a_token_is_named_when_it_can_be_reached() -> None:
    app = AppConfig("a", {"auth_token": "x"})
    with pytest.raises(StartupError, match=r"^--host"):
        Local(app, host="0.0.0.0")
    app = AppConfig("a", {"insecure_no_auth": True})
    local = Local(app, host="0.0.0.0", auth_token="x")
    local.server.stop()
    server = Server(Settings(host="0.0.0.0", port=0, insecure_no_auth=True), apps=[
        AppConfig("a"), AppConfig("b", {"auth_token": "x"}),
    ])  # fmt: skip
    server.start()
    server.stop()


def test_databases_spill_apart(start: Callable[..., Local], tmp_path: Path) -> None:
    """Two in one directory take each other's files, at which DuckDB 1.5 crashes."""
    local = start(
        AppConfig("a"),
        AppConfig("b", {"temp_directory": str(tmp_path / "own")}),
        AppConfig("c", {"sandbox": "select"}),
        temp_directory=str(tmp_path / "all"),
    )
    found = []
    for app in (local.server.main, *local.server.apps.values()):
        with app.database.engine.cursor() as cursor:
            asked = cursor.native.execute("select current_setting('temp_directory')")
            found.append(asked.fetchall()[0][0])
    assert found[:3] == [str(tmp_path / name) for name in ("all", "all/a", "own")]
    assert found[3].startswith(str(tmp_path / "all" / "sqlrooms-temp-"))


def test_a_database_without_a_file_spills_apart_too(local: Local) -> None:
    for name in ("a", "b"):
        with local.server.apps[name].database.engine.cursor() as cursor:
            asked = cursor.native.execute("select current_setting('temp_directory')")
            assert asked.fetchall() == [(f".tmp-{name}",)]


# Start and stop.


class Witness(Plugin):
    """Tells what happens, and whether the database is open then."""

    def __init__(self, told: list[Any]) -> None:
        super().__init__("witness")
        self.told = told

    def tell(self, phase: str) -> None:
        self.told.append((phase, self.server.app, self.server.query("select 1").num_rows))

    def started(self) -> None:
        self.tell("started")

    def stopping(self) -> None:
        self.tell("stopping")

    def stopped(self) -> None:
        self.tell("stopped")


def test_all_apps_stop_before_any_database_is_closed(tmp_path: Path) -> None:
    told: list[Any] = []
    path = str(tmp_path / "m")
    apps = [
        AppConfig("a", {"db_path": path}, plugins=[Witness(told)]),
        AppConfig("b", plugins=[Witness(told)]),
    ]
    local = Local(*apps, plugins=[Witness(told)], db_path=path)
    assert local.server.stop()
    phases = [phase for phase, _, _ in told]
    assert phases == 3 * ["started"] + 3 * ["stopping"] + 3 * ["stopped"]
    assert [app for _, app, _ in told[:3]] == ["", "a", "b"]
    assert {rows for _, _, rows in told} == {1}
    duckdb.connect(path).close()


def test_a_start_that_fails_at_the_second_app_is_taken_back(tmp_path: Path) -> None:
    told: list[Any] = []
    first, second = str(tmp_path / "m"), str(tmp_path / "s")
    Path(second).write_text("no database" * 1000)
    apps = [
        AppConfig("a", {"sync": True}, plugins=[Witness(told)]),
        AppConfig("b", {"db_path": second}),
    ]
    threads = threading.active_count()
    with pytest.raises(StartupError, match=r"^App 'b': .*/s is not a DuckDB database"):
        Local(*apps, plugins=[Witness(told)], db_path=first)
    assert [phase for phase, _, _ in told] == ["started", "started", "stopped", "stopped"]
    assert threading.active_count() <= threads
    duckdb.connect(first).close()


# Settings.


def test_each_setting_is_of_the_server_of_the_app_or_inherited() -> None:
    """A new one belongs into one of the sets of ``app_config``."""
    kinds = (OF_THE_SERVER, OWN, CREDENTIALS, INHERITED)
    assert frozenset().union(*kinds) == {field.name for field in fields()}
    assert sum(map(len, kinds)) == len(fields())


def test_what_an_app_has_of_the_server() -> None:
    server = Settings(
        db_path="x", meta_db="y", plugin=("p",), sandbox="select", allow_dir=("/",), port=5,
        auth_token="t", auth_cookie="c", max_rooms=3,
    )  # fmt: skip
    own = AppConfig("a", {"max_live": 7}).settings_within(server)
    assert (own.db_path, own.meta_db, own.plugin, own.allow_dir) == (":memory:", "", (), ())
    assert (own.sandbox, own.port, own.auth_token, own.max_rooms) == ("select", 5, "t", 3)
    assert own.max_live == 7
    own = AppConfig("a", {"auth_token": "u"}).settings_within(server)
    assert (own.auth_token, own.auth_cookie) == ("u", "c")
    assert "secret" not in repr(AppConfig("a", {"auth_token": "secret"}))


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("", "", "cannot be called ''"),
        ("a/b", "", "cannot be called"),
        ("..", "", "cannot be called"),
        *(("a", path, "path must be") for path in (*ODD_PATHS, "a", "/", "/a/", "/a b", "/.a")),
        ("a", "/healthz", "is that of GET /healthz"),
        ("a", "/channels", "is that of POST /channels/"),
        ("a", "/channels/x", "is that of POST /channels/"),
        ("a", "/mine", "is that of GET /mine/"),
        ("a", "/other", "'other' and 'a' have the same path"),
        ("a", "/other/version", "is that of GET /version"),
        ("other", "/x", "same name"),
    ],
)
def test_paths_and_names_that_cannot_be(name: str, path: str, told: str) -> None:
    if path in ("/a", "/deep/b"):
        return
    with pytest.raises(StartupError, match=told):
        Server(Settings(port=0), [Echo()], [AppConfig("other"), AppConfig(name, path=path)])


# The file.

CONFIG = """
meta_namespace = "from_file"
plugin = ["{folder}/greeter.py"]
[plugins.greeter]
greeting = "Hi"
[apps.sales]
path = "/sell"
tokens = "{folder}/sales.toml"
db-path = "{folder}/sales.duckdb"
plugin = ["{folder}/greeter.py"]
sync = true
[apps.sales.plugins.greeter]
greeting = "Ahoy"
"""

GREETER = """
from sqlrooms_server import Plugin

plugin = Plugin("greeter")
calls = []

@plugin.on("greet")
def greet(call):
    calls.append(1)
    return [plugin.options["greeting"], len(calls)]
"""


def test_a_file_declares_apps(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "greeter.py").write_text(GREETER)
    tokens(tmp_path / "sales.toml", "old")
    process = serve("--config", str(config))
    address = f"ws://localhost:{process.port}/sell"
    assert f"{address}: {tmp_path}/sales.duckdb; token required" in process.welcome
    with process.connect() as main, Wire(f"{process.url}/sell?token=old") as sales:
        assert main.request(type="greet")["data"] == ["Hi", 1]
        assert main.request(type="greet")["data"] == ["Hi", 2]
        # The very module is another one.
        assert sales.request(type="greet")["data"] == ["Ahoy", 1]
        assert sales.rows("select count(*) as n from from_file.ui_state") == [{"n": 0}]
        tokens(tmp_path / "sales.toml", "new")
        process.process.send_signal(signal.SIGHUP)
        assert sales.receive()["code"] == "unauthorized"
        assert main.request(type="greet")["data"] == ["Hi", 3]
    with Wire(f"{process.url}/sell?token=new") as sales:
        assert sales.request(type="greet")["data"] == ["Ahoy", 2]
    assert process.stop() == 0
    assert {path.name for path in tmp_path.glob("*.duckdb")} == {
        "sales.duckdb", "sales.sales.rooms.duckdb",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("apps = 1", "apps in .* must be tables"),
        ("[apps]\na = 1", r"apps.a in .* must be a table"),
        ("[apps.a]\nport = 5", "App 'a': port is a setting of the whole server"),
        ("[apps.a]\nports = 5", r"ports in \[apps.a\] of .* is not a setting"),
        ("[apps.a]\nmax_rooms = 'x'", r"max_rooms in \[apps.a\] of .* must be a whole number"),
        ("[apps.a]\ntokens = ''", "App 'a': --tokens .* is empty, which would protect nothing"),
        ("[apps.a]\nauth_token_file = '/none'", "App 'a': Cannot read the token file /none"),
        ("[apps.a]\npath = 5", "path in .* must be a text"),
        ("[apps.a]\nplugins = 5", "apps.a.plugins in .* must be tables"),
        ("[plugins]\na = 1", r"plugins.a in .* must be a table"),
        ("[plugins.a]\nx = 1", r"options of a plugin 'a' \(plugins.a\), which is not loaded"),
        ("[apps.a.plugins.b]\nx = 1", "App 'a': There are options of a plugin 'b'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(StartupError, match=told):
        made = load({"port": 0}, {}, str(path))
        Server(made.settings, apps=made.apps, options=made.options)


def test_a_plugin_of_a_module_is_one_of_one_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared_greeter.py").write_text(GREETER + "\nclass Other(Plugin): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def serving(place: str) -> Server:
        apps = [AppConfig(name, {"plugin": (place,)}) for name in ("a", "b")]
        return Server(Settings(port=0), apps=apps)

    with pytest.raises(StartupError, match="App 'b' and app 'a' would share the plugin 'greeter'"):
        serving("shared_greeter:plugin")
    server = serving("shared_greeter:Other")
    first, second = (app.plugins.all[0] for app in server.apps.values())
    assert first is not second and first.server is not second.server
