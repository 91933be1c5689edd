"""Named queries: their files, their parameters, who may run them, HTTP, and TypeScript types."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from sqlrooms_server import Plugin, StartupError, types_command
from sqlrooms_server.builtin.http_queries import ARROW
from sqlrooms_server.errors import Forbidden
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess
from tests.npm import find_program, install_packages
from tests.nursery import Nursery
from tests.wire import DEADLINE, Arrow, Wire

# For each type: a value as JSON, and what a result says of it when that is something else.
DAY = 1_704_067_200_000
VALUES: list[tuple[str, list[Any]]] = [
    ("BOOLEAN", [True, False, ("true", True)]),
    ("INTEGER", [1]),
    ("TINYINT", [-128, 127, ("5", 5), (5.0, 5)]),
    ("UINTEGER", [0, 4294967295]),
    ("BIGINT", [-(2**63), ("9223372036854775807", 2**63 - 1)]),
    ("HUGEINT", [-(2**127), (str(2**127 - 1), 2**127 - 1)]),
    ("UHUGEINT", [2**128 - 1]),
    ("DECIMAL(18,3)", [1.5, ("1.100", 1.1), ("123456789012345.125", 123456789012345.125)]),
    ("DOUBLE", [0.1, -1e300, (7, 7.0), ("nan", None)]),
    ("FLOAT", [1.5]),
    ("VARCHAR", ["", "it's", "'; DROP TABLE sales; --", '"\\', "ü€😀\n", "$region"]),
    ("ENUM('a','it''s')", ["a", "it's"]),
    ("UUID", ["7f9c8a3e-1111-2222-3333-444455556666"]),
    ("DATE", [DAY, ("2024-01-01", DAY), (-DAY, -DAY)]),
    ("TIMESTAMP", [DAY + 1, ("2024-01-01 00:00:00.001", DAY + 1), (-1, -1)]),
    ("TIMESTAMP_S", [DAY + 1000]),
    ("TIMESTAMP_MS", [DAY + 1]),
    ("TIMESTAMP_NS", [DAY + 1]),
    ("TIMESTAMPTZ", [DAY, ("2024-01-01 02:00:00+02", DAY)]),
    ("TIME", ["01:02:03.5"]),
    ("TIMETZ", ["01:02:03+02"]),
    ("INTERVAL", ["1 year 2 months"]),
    ("BIT", ["0101"]),
    ("BLOB", ["", "AP8="]),
    ("JSON", ['{"a":[1,"x"]}', ({"a": 1}, '{"a": 1}')]),
    ("INTEGER[]", [[], [1, None, 3], [None]]),
    ("VARCHAR[]", [["it's", "[x]", 'a"b', "NULL", ""]]),
    ("DATE[][]", [[[DAY, None], [], None]]),
    ("DOUBLE[2]", [[1.5, None]]),
    ("BLOB[]", [["AP8="]]),
    ("STRUCT(a INTEGER, \"b c\" STRUCT(d BLOB[]))", [{"a": None, "b c": {"d": ["AP8="]}}]),
    ("STRUCT(key VARCHAR, value VARCHAR)", [{"key": "a", "value": "b"}]),
    ("MAP(VARCHAR, INTEGER)", [{}, {"a": 1, "key": 2, "value": None}]),
    ("MAP(INTEGER, DATE[])", [{"1": [DAY], "-2": None}]),
]  # fmt: skip

WRONG: list[tuple[str, Any, str]] = [
    ("INTEGER", "1.5", "no whole number"),
    ("INTEGER", 1.5, "no whole number"),
    ("INTEGER", True, "no whole number"),
    ("INTEGER", 2**31, "from -2147483648 to 2147483647"),
    ("INTEGER", "1; DROP TABLE sales", "no whole number"),
    ("BOOLEAN", 1, "neither true nor false"),
    ("VARCHAR", 5, "no text"),
    ("VARCHAR", {"$type": "VARCHAR", "value": "x"}, "no text"),
    ("VARCHAR", "\ud800", "surrogate"),
    ("DOUBLE", [], "no number"),
    ("DOUBLE", "1 OR 1=1", "Could not convert"),
    ("DECIMAL(18,3)", "1,5", "no number"),
    ("DECIMAL(18,3)", 1e30, "Could not convert"),
    ("ENUM('a','it''s')", "b", "none of a, it's"),
    ("DATE", "yesterday", "YYYY-MM-DD"),
    ("DATE", DAY + 1, "beginning of a day"),
    ("TIMESTAMP", 10**18, "sent as text"),
    ("UUID", "x", "Could not convert"),
    ("BLOB", "x", "base64"),
    ("JSON", "{", "no JSON"),
    ("INTEGER[]", "[1]", "no array"),
    ("INTEGER[]", [1, "x"], "no whole number"),
    ("DOUBLE[2]", [1], "has 1 elements"),
    ("STRUCT(key VARCHAR, value VARCHAR)", {"key": "a"}, 'no field "value"'),
    ("STRUCT(key VARCHAR, value VARCHAR)", {"key": "", "value": "", "x": 1}, 'a field "x"'),
    ("MAP(INTEGER, DATE[])", {"1": None, "+1": None}, "the same"),
    ("MAP(INTEGER, DATE[])", {"a": None}, "no whole number"),
]

FILES = {
    "sales/top": """
-- The largest sales of a region.
-- @param region VARCHAR -- where; 'EU' = Europe
-- @param since DATE = '2024-01-01'
-- @param most INTEGER = NULL -- how many
SELECT day, amount::DOUBLE AS amount FROM sales
WHERE region = $region AND day >= $Since ORDER BY amount DESC LIMIT $most
""",
    "mine": "SELECT amount::INTEGER AS amount FROM sales WHERE owner = $user",
    "about": "SELECT $role AS role, $connection AS connection",
    "every": "-- @param n BIGINT\nSELECT range AS i, 'a\"\\' AS t FROM range($n)",
    "add": "-- @param owner VARCHAR\nINSERT INTO sales VALUES ('X', current_date, 1, $owner)",
    "slow": "SELECT count(*) FROM range(100_000_000_000) t(i) WHERE i % 7 = 3",
    "secret": "SELECT 42 AS secret",
}  # fmt: skip

SALES = """
CREATE TABLE sales AS SELECT * FROM (VALUES
('EU', DATE '2024-02-01', 10, 'ada'), ('EU', DATE '2024-03-01', 20, 'eve'),
('EU', DATE '2023-03-01', 30, 'ada'), ('US', DATE '2024-01-01', 5, 'ada'))
t(region, day, amount, owner)
"""

TOKENS = """
[roles.clerk]
queries = ["sales/*", "mine", "add"]
[roles.owner]
queries = ["about"]
statements = ["select"]
[roles.reader]
[roles.all]
queries = ["*"]
"""


def write(directory: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = directory / f"{name}.sql"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(directory)


def write_tokens(path: Path, users: dict[str, str]) -> str:
    text = TOKENS
    for user, role in users.items():
        digest = hashlib.sha256(user.encode()).hexdigest()
        text += f'[tokens.{user}]\nrole = "{role}"\nhash = "sha256:{digest}"\n'
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Tokens are the names of their users."""
    root = tmp_path_factory.mktemp("named")
    values = {
        f"value{number}": f"-- @param v {type_} = NULL\nSELECT $v AS v"
        for number, (type_, _) in enumerate(VALUES)
    }
    users = {"ada": "clerk", "eve": "clerk", "max": "owner", "rita": "reader", "root": "admin"}
    local = LocalServer(
        Settings(
            port=0,
            queries=write(root / "queries", {**FILES, **values}),
            tokens=write_tokens(root / "tokens.toml", users),
            cache_dir=str(root / "cache"),
            max_http_result=1 << 20,
        )
    )
    with local.connect("/?token=root") as wire:
        wire.exec(SALES)
    # The table is there now.
    local.server.reload()
    yield local
    local.server.stop()


@pytest.fixture
def root(server: LocalServer) -> Iterator[Wire]:
    with server.connect("/?token=root") as wire:
        yield wire


def ask(wire: Wire, name: str, params: Any = None, **options: Any) -> Any:
    """The rows, or the error."""
    options = {"format": "json", "queryId": "n", **options}
    reply = wire.request(type="named", name=name, params=params, **options)
    if isinstance(reply, Arrow):
        return reply
    assert reply["queryId"] == options["queryId"]
    return json.loads(reply["data"]) if reply["type"] == "json" else reply


def test_a_query_is_asked_by_its_name(root: Wire) -> None:
    rows = ask(root, "sales/top", {"region": "EU"})
    assert rows == [{"day": 1709251200000, "amount": 20.0}, {"day": 1706745600000, "amount": 10.0}]
    assert len(ask(root, "sales/top", {"REGION": "EU", "since": "2020-01-01", "most": 1})) == 1
    assert ask(root, "sales/top", {"region": "' OR 1=1 --"}) == []
    reply = root.request(type="named", name="sales/top", params={"region": "US"}, queryId=3)
    assert reply.header == {"type": "arrow", "queryId": 3}
    assert reply.table().to_pylist()[0]["amount"] == 5.0


@pytest.mark.parametrize("number", range(len(VALUES)), ids=[type_ for type_, _ in VALUES])
def test_values_of_all_types_there_and_back(root: Wire, number: int) -> None:
    name = f"value{number}"
    for value in VALUES[number][1]:
        given, wanted = value if isinstance(value, tuple) else (value, value)
        assert ask(root, name, {"v": given}) == [{"v": wanted}], given
        if VALUES[number][0] != "JSON":
            assert ask(root, name, {"v": wanted}) == [{"v": wanted}]
    assert ask(root, name, {"v": None}) == ask(root, name) == [{"v": None}]
    wanted_type = root.request(type="named", name=name, queryId="a", params={"v": None})
    given = VALUES[number][1][0]
    given = given[0] if isinstance(given, tuple) else given
    found_type = root.request(type="named", name=name, queryId="b", params={"v": given})
    # NULL has the type, too.
    assert wanted_type.table().schema == found_type.table().schema


@pytest.mark.parametrize(("type_", "value", "problem"), WRONG)
def test_a_value_of_another_type_is_named(root: Wire, type_: str, value: Any, problem: str) -> None:
    name = f"value{[one for one, _ in VALUES].index(type_)}"
    reply = ask(root, name, {"v": value})
    assert reply["code"] == "bad_request"
    shown = json.dumps(value, separators=(",", ":"))[:20]
    assert f"params.v must be {type_}, not {shown}" in reply["error"]
    assert problem in reply["error"]


@pytest.mark.parametrize(
    ("name", "params", "code", "problem"),
    [
        ("sales/top", None, "bad_request", "no value for region; the query 'sales/top' has"),
        ("sales/top", {"region": None}, "bad_request", "region must be VARCHAR, not null"),
        ("sales/top", {"region": "x", "since": None}, "bad_request", "since must be DATE"),
        ("sales/top", {"region": "x", "more": 1}, "bad_request", "has 'more', but the query"),
        ("sales/top", {"region": "x", "Region": "y"}, "bad_request", "twice"),
        ("sales/top", ["x"], "bad_request", "must be an object"),
        ("secret", {"x": 1}, "bad_request", "has no parameters"),
        ("mine", {"user": "eve"}, "bad_request", "params.user is set by the server"),
        ("mine", {"USER": "eve"}, "bad_request", "params.USER is set by the server"),
        ("sales/tip", {}, "not_found", "near it: sales/top"),
        ("../secret", {}, "not_found", "There is no query"),
        (None, {}, "bad_request", "needs a field name"),
    ],
)
def test_mistakes_are_named(root: Wire, name: str, params: Any, code: str, problem: str) -> None:
    reply = ask(root, name, params)
    assert (reply["type"], reply["code"]) == ("error", code)
    assert problem in reply["error"]


def test_options_are_those_of_queries(root: Wire) -> None:
    root.send(type="named", name="every", params={"n": 300_000}, queryId="s", stream=True)
    body, last = b"", False
    while not last:
        chunk = root.receive()
        body, last = body + chunk.body, chunk.header["last"]
    assert chunk.header["rows"] == pa.ipc.open_stream(body).read_all().num_rows == 300_000
    reply = root.request(type="named", name="every", params={"n": 9}, maxRows=2, format="json")
    assert reply["truncated"] and len(json.loads(reply["data"])) == 2
    reply = ask(root, "slow", timeoutMs=50)
    assert reply["code"] == "timeout"
    assert ask(root, "every", {"n": 1}, compression="lz4", format="json")["code"] == "bad_request"
    assert ask(root, "about", session="s")[0]["role"] == "admin"


def test_the_server_says_who_asks(server: LocalServer) -> None:
    with server.connect("/?token=ada") as ada, server.connect("/?token=eve") as eve:
        eve.request(type="hello", user="ada")
        assert [row["amount"] for row in ask(ada, "mine")] == [10, 30, 5]
        assert [row["amount"] for row in ask(eve, "mine")] == [20]
    with server.connect("/?token=max") as owner:
        name = owner.request(type="hello")["connectionId"]
        assert ask(owner, "about") == [{"role": "owner", "connection": name}]


def test_without_a_user_there_is_none(launch: Callable[..., LocalServer], tmp_path: Path) -> None:
    queries = write(tmp_path, {"mine": "SELECT $user AS user"})
    with launch(queries=queries).connect() as wire:
        wire.request(type="hello", user="ada")
        reply = ask(wire, "mine")
        assert reply["code"] == "forbidden" and "a token that says who you are" in reply["error"]


def test_results_are_kept_for_each_user(server: LocalServer) -> None:
    def kept(wire: Wire) -> tuple[bool, list[int]]:
        reply = wire.request(type="named", name="mine", persist=True, format="json")
        return reply.get("cached", False), [row["amount"] for row in json.loads(reply["data"])]

    with server.connect("/?token=ada") as ada, server.connect("/?token=eve") as eve:
        assert kept(ada) == (False, [10, 30, 5])
        assert kept(ada) == (True, [10, 30, 5])
        assert kept(eve) == (False, [20])
        assert kept(eve) == (True, [20])


def test_a_role_runs_what_it_names_and_nothing_else(server: LocalServer) -> None:
    with server.connect("/?token=ada") as ada:
        assert len(ask(ada, "sales/top", {"region": "EU"})) == 2
        for name in ("secret", "nothing"):
            reply = ask(ada, name)
            assert (reply["code"], "(queries)" in reply["error"]) == ("forbidden", True)
        for kind in ("arrow", "json", "exec", "live"):
            reply = ada.request(type=kind, sql="SELECT * FROM sales", queryId=kind)
            assert reply["code"] == "forbidden", kind
        assert ada.upload(pa.table({"a": [1]}), tableName="x", queryId="u")["code"] == "forbidden"
        assert ada.request(type="watch", tables="*")["versions"] == {}
        listed = ada.request(type="namedQueries", queryId=1)["queries"]
        assert [one["name"] for one in listed] == ["add", "mine", "sales/top"]
        reply = ask(ada, "mine", session="s")
        assert reply["code"] == "bad_request" and "session" in reply["error"]
        # What the file does is up to its author.
        assert ask(ada, "add", {"owner": "nobody"}) == [{"Count": 1}]
    with server.connect("/?token=max") as owner:
        assert owner.rows("SELECT 1 AS a") == [{"a": 1}]
        assert ask(owner, "mine")["code"] == "forbidden"
    with server.connect("/?token=rita") as rita:
        # As SQL of its own, so within its rules.
        assert ask(rita, "secret") == [{"secret": 42}]
        assert ask(rita, "add", {"owner": "rita"})["code"] == "forbidden"


def test_hooks_take_part(launch: Callable[..., LocalServer], tmp_path: Path) -> None:
    plugin = Plugin("witness")
    seen: list[Any] = []

    @plugin.hook
    def authorize(client: Any, action: Any) -> None:
        seen.append(action.kind)
        if action.kind == "named" and action.message.fields["name"] == "secret":
            raise Forbidden("Not that one.")

    @plugin.hook
    def around_query(query: Any, run: Any) -> Any:
        seen.append(query.params["n"]["value"])
        return run(query)

    queries = write(tmp_path, {name: FILES[name] for name in ("every", "secret")})
    local = launch(plugin, queries=queries)
    with local.connect() as wire:
        assert len(ask(wire, "every", {"n": 2})) == 2
        assert ask(wire, "secret")["error"] == "Not that one."
    assert fetch(local, "/queries/every?n=1")[0] == 200
    assert seen == ["named", 2, "named", "http", "1"]


def test_the_list_describes_queries(root: Wire) -> None:
    listed = root.request(type="namedQueries", queryId=1)
    found = {one["name"]: one for one in listed["queries"]}
    assert listed["type"] == "namedQueries" and listed["queryId"] == 1
    assert found["sales/top"] == {
        "name": "sales/top",
        "description": "The largest sales of a region.",
        "params": [
            {
                "name": "region",
                "type": "VARCHAR",
                "description": "where; 'EU' = Europe",
                "required": True,
            },
            {
                "name": "since",
                "type": "DATE",
                "description": "",
                "required": False,
                "default": "2024-01-01",
            },
            {
                "name": "most",
                "type": "INTEGER",
                "description": "how many",
                "required": False,
                "default": None,
            },
        ],
        "columns": [{"name": "day", "type": "DATE"}, {"name": "amount", "type": "DOUBLE"}],
    }
    assert found["mine"]["params"] == []


def fetch(server: LocalServer, path: str, token: str = "root", **options: Any) -> Any:
    """Status and body, which is read when it is JSON."""
    url = server.url.replace("ws:", "http:") + path
    headers = {"Authorization": f"Bearer {token}", **options.pop("headers", {})}
    request = urllib.request.Request(url, headers=headers, **options)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            status, kind, body = answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, kind, body = error.code, error.headers["Content-Type"], error.read()
    return status, json.loads(body) if kind == "application/json" else body


def test_queries_over_http(server: LocalServer) -> None:
    path = "/queries/sales/top?" + urllib.parse.urlencode({"region": "EU", "most": 1, "token": "x"})
    assert fetch(server, path) == (200, [{"day": 1709251200000, "amount": 20.0}])
    status, body = fetch(server, path, headers={"Accept": ARROW})
    assert status == 200 and pa.ipc.open_stream(body).read_all().num_rows == 1
    assert fetch(server, "/queries/mine", "eve") == (200, [{"amount": 20}])
    assert fetch(server, "/queries", "ada")[1]["queries"][0]["name"] == "add"
    number = [type_ for type_, _ in VALUES].index("INTEGER[]")
    assert fetch(server, f"/queries/value{number}?v=[1,null]") == (200, [{"v": [1, None]}])


def test_large_results_over_http(server: LocalServer) -> None:
    status, rows = fetch(server, "/queries/every?n=30000")
    assert status == 200 and len(rows) == 30_000 and rows[-1] == {"i": 29_999, "t": 'a"\\'}
    status, body = fetch(server, "/queries/every?n=60000", headers={"Accept": ARROW})
    assert pa.ipc.open_stream(body).read_all().num_rows == 60_000
    status, told = fetch(server, "/queries/every?n=1000000")
    assert status == 413 and "--max-http-result" in told["error"]


@pytest.mark.parametrize(
    ("path", "token", "status", "problem"),
    [
        ("/queries/sales/top", "root", 400, "no value for region"),
        ("/queries/sales/top?region=a&region=b", "root", 400, "twice"),
        ("/queries/sales/top?region=a&since=x", "root", 400, "params.since must be DATE"),
        ("/queries/mine?user=eve", "ada", 400, "set by the server"),
        ("/queries/about", "root", 403, "uses $connection"),
        ("/queries/secret", "ada", 403, "(queries)"),
        ("/queries/sales%2Ftip?region=a", "root", 404, "near it"),
        ("/queries/add?owner=x", "ada", 400, "use POST"),
        ("/queries/%ff", "root", 400, "UTF-8"),
        ("/queries/every?n=-1e", "root", 400, "params.n must be BIGINT"),
    ],
)
def test_mistakes_over_http(
    server: LocalServer, path: str, token: str, status: int, problem: str
) -> None:
    found, told = fetch(server, path, token)
    assert (found, problem in told["error"]) == (status, True), told


def test_a_client_that_leaves_ends_its_query(
    launch: Callable[..., LocalServer], tmp_path: Path
) -> None:
    queries = write(tmp_path, {name: FILES[name] for name in ("slow", "secret")})
    local = launch(queries=queries, workers=1)
    with socket.create_connection(("127.0.0.1", local.port)) as leaving:
        leaving.sendall(b"GET /queries/slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with local.connect() as wire:
            wire.send(type="named", name="secret", queryId=1, format="json", progress=True)
            assert wire.receive()["state"] == "queued"
            leaving.close()
            while (reply := wire.receive())["type"] == "progress":
                pass
            assert reply["type"] == "json"


def test_the_sandbox_holds_for_files_too(
    launch: Callable[..., LocalServer], tmp_path: Path
) -> None:
    queries = write(tmp_path, {"make": "CREATE TABLE t(a INT)", "two": "SELECT 2 AS a"})
    tokens = write_tokens(tmp_path / "tokens.toml", {"rex": "all"})
    local = launch(queries=queries, tokens=tokens, sandbox="select")
    with local.connect("/?token=rex") as wire:
        assert ask(wire, "two") == [{"a": 2}]
        assert "--sandbox" in ask(wire, "make")["error"]


def test_queries_that_change_something_are_posted(server: LocalServer) -> None:
    body = json.dumps({"owner": "http"}).encode()
    kind = {"Content-Type": "application/json"}
    assert fetch(server, "/queries/add", "ada", data=body, headers=kind) == (200, [{"Count": 1}])
    plain = {"Content-Type": "text/plain"}
    assert fetch(server, "/queries/add", "ada", data=body, headers=plain)[0] == 400
    assert fetch(server, "/queries/add", "nobody", data=body, headers=kind)[0] == 401


BAD: list[tuple[str, str]] = [
    ("", "no statement"),
    ("SELECT 1; SELECT 2", "2 statements"),
    ("BEGIN", "sessions"),
    ("SELECT *\nFRM x y z", "line 2: Parser Error: syntax error"),
    ("SELECT 1 WHERE 'a' = :user", r"written \$user"),
    ("SELECT ?", "write \\$name instead"),
    ("SELECT $a", r"\$a is not declared; write -- @param a TYPE"),
    ("-- @param a VARCHAR\nSELECT 1", "@param a is not used"),
    ("-- @param a\nSELECT $a", "line 1: @param a needs a type"),
    ("-- x\n-- @param a NOTHING\nSELECT $a", "line 2: @param a: NOTHING is no type"),
    ("-- @param a UNION(x INTEGER)[]\nSELECT $a", "no parameter can be of type UNION"),
    ("-- @param a INTEGER = 'x'\nSELECT $a", "the default of a must be INTEGER"),
    ("-- @param a INTEGER = now()\nSELECT $a", "neither a text in single quotes"),
    ("-- @param a INTEGER\n-- @param A INTEGER\nSELECT $a", "line 2: @param A is there twice"),
    ("-- @param user VARCHAR\nSELECT $user", "user is set by the server"),
    ("-- @parm a VARCHAR\nSELECT $a", "@parm is not known"),
    ("SELECT $a\n-- @param a VARCHAR", "line 2: @param must stand before"),
    ("-- @param a INTEGER) + (1\nSELECT $a", "is no type"),
]


@pytest.mark.parametrize(("text", "problem"), BAD)
def test_a_bad_file_is_named_at_the_start(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path, {"bad": text})
    with pytest.raises(StartupError, match=rf"bad\.sql.*{problem}"):
        Server(Settings(port=0, queries=str(tmp_path), no_cache=True)).start()


def test_a_directory_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no directory"):
        Server(Settings(port=0, queries=str(tmp_path / "none"), no_cache=True)).start()
    write(tmp_path, {"2nd": "SELECT 1"})
    with pytest.raises(StartupError, match="'2nd' is no name"):
        Server(Settings(port=0, queries=str(tmp_path), no_cache=True)).start()


def test_files_are_read_again(
    serve: Callable[..., ServerProcess], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queries = write(tmp_path, {"one": "SELECT 1 AS a", "two": "SELECT 2 AS a", "no": "FROM later"})
    server = serve("--queries", queries)
    with server.connect() as wire:
        assert ask(wire, "no")["code"] == "query_error"
        write(tmp_path, {"one": "SELECT", "two": "SELECT 22 AS a", "three": "SELECT 3 AS a"})
        os.unlink(tmp_path / "no.sql")
        server.process.send_signal(signal.SIGHUP)
        while ask(wire, "three") != [{"a": 3}]:
            pass
        assert ask(wire, "one") == [{"a": 1}] and ask(wire, "two") == [{"a": 22}]
        assert ask(wire, "no")["code"] == "not_found"
    server.stop()
    assert "no.sql" in server.errors and "columns of a query are not known" in server.errors
    assert "one stays as it was" in server.errors


def types(*arguments: str | Path) -> int:
    return types_command.main([str(argument) for argument in arguments])


COLUMNS = {
    "sales/top": FILES["sales/top"],
    "mine": FILES["mine"],
    "sales_top": "SELECT 1::HUGEINT AS a",
    "all-kinds": """
-- Ends the comment? */ No.
-- @param e ENUM('a','b')
-- @param l STRUCT(x BIGINT, "y z" DATE)[] = []
-- @param m MAP(VARCHAR, DOUBLE) = {}
SELECT $e AS e, $l AS l, $m AS m, true AS "a b", 'x'::JSON AS j, DATE '2024-01-01' AS d,
    [1::UNION(a INTEGER, b VARCHAR)] AS u, NULL AS n
""",
    "change": "DELETE FROM sales",
    "changed": "DELETE FROM sales RETURNING region",
}  # fmt: skip

RIGHT = """
import type { Queries } from "./queries.js";

async function ask<N extends keyof Queries>(
  name: N, params: Queries[N]["params"]
): Promise<Queries[N]["row"][]> {
  return [];
}
const top = await ask("sales/top", { region: "EU", since: 1704067200000, most: null });
const day: number | null = top[0].day;
const [all] = await ask("all-kinds", { e: "a", l: [{ x: "1", "y z": "2024-01-01" }], m: { q: 1 } });
const e: "a" | "b" | null = all.e;
const text: string | number | null = all.u?.[0] ?? null;
const x: number | null | undefined = all.l?.[0]?.x;
const count: number | null = (await ask("change", {}))[0].Count;
const known: unknown = (await ask("changed", {}))[0].region;
await ask("mine", {});
export { day, e, text, x, count, known };
"""

MISTAKES = [
    'await ask("sales/tip", {});',
    'await ask("sales/top", {});',
    'await ask("sales/top", { region: 5 });',
    'await ask("sales/top", { region: null });',
    'await ask("sales/top", { region: "EU", more: 1 });',
    'await ask("mine", { user: "eve" });',
    'await ask("all-kinds", { e: "c" });',
    'const s: string = (await ask("sales/top", { region: "EU" }))[0].day;',
    '(await ask("sales/top", { region: "EU" }))[0].nothing;',
]


@pytest.fixture
def sales_db(tmp_path: Path) -> Path:
    path = tmp_path / "my.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(SALES)
    return path


def compiled(project: Path, files: Sequence[Path]) -> str:
    """What the compiler says."""
    node = find_program("node", install="apt-get install nodejs npm")
    compiler = install_packages() / "typescript" / "bin" / "tsc"
    options = [
        "--strict",
        "--noEmit",
        "--target",
        "es2022",
        "--module",
        "nodenext",
        "--pretty",
        "false",
    ]
    command = [node, str(compiler), *options, *map(str, files)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.mark.timeout(300)
def test_the_types_hold_what_they_promise(tmp_path: Path, sales_db: Path) -> None:
    output = tmp_path / "queries.ts"
    queries = write(tmp_path / "queries", COLUMNS)
    assert types("--queries", queries, "--db-path", sales_db, "--output", output) == 0
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "right.ts").write_text(RIGHT)
    head = RIGHT[: RIGHT.index("const top")]
    wrong = tmp_path / "wrong.ts"
    wrong.write_text(head + "\n".join(MISTAKES) + "\nexport {};\n")
    said = compiled(tmp_path, [tmp_path / "right.ts", wrong])
    first = head.count("\n") + 1
    failed = {
        int(line.split("(")[1].split(",")[0]) for line in said.splitlines() if "): error" in line
    }
    assert said.count("wrong.ts(") == len(
        [one for one in said.splitlines() if "error TS" in one]
    ), said
    assert failed == set(range(first, first + len(MISTAKES))), said


def test_types_are_checked_and_written_the_same(
    tmp_path: Path, sales_db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = write(tmp_path / "queries", COLUMNS)
    output = tmp_path / "queries.ts"
    given = ("--queries", queries, "--db-path", sales_db)
    assert types(*given, "--output", output, "--check") == 1
    assert not output.exists()
    assert types(*given, "--output", output) == 0
    assert types(*given, "--output", output, "--check") == 0
    capsys.readouterr()
    assert types(*given) == 0
    text = capsys.readouterr().out
    assert text == output.read_text()
    assert "export interface SalesTop_2Row" in text and "since?: number | string;" in text
    write(tmp_path / "queries", {"mine": "SELECT 1"})
    assert types(*given, "--output", output, "--check") == 1
    assert types(*given, "--check") == 2


def test_types_name_each_bad_file(
    tmp_path: Path, sales_db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"a": "SELECT 1", "b": "SELECT $x", "c": "SELECT *\nFROM nothing", "d": "FRM x"}
    queries = write(tmp_path / "queries", files)
    output = tmp_path / "queries.ts"
    assert types("--queries", queries, "--db-path", sales_db, "--output", output) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(".sql")[0][-1] for line in said] == ["b", "d", "c"]
    assert "line 2: Catalog Error" in said[2] and not output.exists()
    assert types("--queries", tmp_path / "none", "--db-path", sales_db) == 2


def test_the_command_line_has_it(nursery: Nursery, tmp_path: Path, sales_db: Path) -> None:
    queries = write(tmp_path / "queries", {"one": "SELECT amount FROM sales"})
    done = nursery.run("types", "--queries", queries, "--db-path", str(sales_db))
    assert done.returncode == 0 and b"export interface OneRow" in done.stdout
