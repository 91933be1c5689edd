"""Plugins: what answers messages and requests, where it runs, and what is said when it fails."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import Plugin, Response, StartupError, on, route
from sqlrooms_server.errors import Forbidden
from sqlrooms_server.features import Feature
from sqlrooms_server.plugins.loading import load
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess
from tests.wire import DEADLINE, framed

Launch = Callable[..., LocalServer]


@pytest.fixture
def plugin() -> Plugin:
    return Plugin("mine")


def thread_name() -> str:
    return threading.current_thread().name


def test_a_plain_function_answers_on_a_thread_for_plugins(launch: Launch, plugin: Plugin) -> None:
    @plugin.on("greet")
    def greet(call: Any) -> Any:
        return [thread_name(), f"Hello {call.message['name']}", call.client.metadata]

    with launch(plugin).connect("/?room=1&token=x") as wire:
        reply = wire.request(type="greet", queryId=7, name="Ada")
    assert (reply["type"], reply["queryId"]) == ("reply", 7)
    thread, text, metadata = reply["data"]
    assert thread.startswith("plugin-worker") and text == "Hello Ada" and metadata == {"room": "1"}


def test_a_coroutine_answers_on_the_loop_of_asyncio(launch: Launch, plugin: Plugin) -> None:
    @plugin.on("greet")
    async def greet(call: Any) -> Any:
        await asyncio.sleep(0)
        table = await asyncio.to_thread(call.query, "select 42 as a")
        return [thread_name(), table.to_pylist()]

    with launch(plugin).connect() as wire:
        assert wire.request(type="greet")["data"] == ["asyncio", [{"a": 42}]]


def test_methods_answer_too(launch: Launch) -> None:
    class Both(Plugin):
        @on("one")
        def one(self, call: Any) -> str:
            return f"{self.name} one"

        @on("two")
        async def two(self, call: Any) -> str:
            return f"{self.name} two"

    with launch(Both()).connect() as wire:
        assert wire.request(type="one")["data"] == "Both one"
        assert wire.request(type="two")["data"] == "Both two"


TABLE = pa.table({"a": [1, 2, 3]})


@pytest.mark.parametrize(
    "made",
    [
        lambda call: TABLE,
        lambda call: TABLE.to_reader(),
        lambda call: import_module("pandas").DataFrame({"a": [1, 2, 3]}),
        lambda call: call.query("select unnest([1, 2, 3]) as a"),
    ],
    ids=["table", "reader", "pandas", "query"],
)
def test_tables_are_answered_as_arrow(
    request: pytest.FixtureRequest, launch: Launch, plugin: Plugin, made: Callable[[Any], Any]
) -> None:
    if request.node.callspec.id == "pandas":
        pytest.importorskip("pandas")
    plugin.on("table")(made)
    with launch(plugin).connect() as wire:
        reply = wire.request(type="table", queryId="t")
        assert reply.header == {"type": "arrow", "queryId": "t"}
        assert reply.table().column("a").to_pylist() == [1, 2, 3]


def test_a_large_table_comes_in_chunks(launch: Launch, plugin: Plugin) -> None:
    plugin.on("table")(lambda call: pa.table({"a": range(1_000_000)}))
    with launch(plugin).connect() as wire:
        wire.send(type="table", queryId="t", stream=True, window=1 << 20)
        body, last = b"", False
        while not last:
            chunk = wire.receive()
            body += chunk.body
            last = chunk.header["last"]
            wire.send(type="ack", queryId="t", bytes=len(body))
        assert chunk.header["rows"] == pa.ipc.open_stream(body).read_all().num_rows == 1_000_000


def test_binary_messages_go_both_ways(launch: Launch, plugin: Plugin) -> None:
    plugin.on("shout")(lambda call: bytes(call.body).upper() + call.message["end"].encode())
    with launch(plugin).connect() as wire:
        wire.send_raw(framed({"type": "shout", "queryId": 1, "end": "!"}, b"hello"))
        reply = wire.receive()
        assert reply.header == {"type": "reply", "queryId": 1} and reply.body == b"HELLO!"


def test_none_is_ok_and_events_come_before(launch: Launch, plugin: Plugin) -> None:
    @plugin.on("count")
    def count(call: Any) -> None:
        for number in range(3):
            call.send(number)

    with launch(plugin).connect() as wire:
        wire.send(type="count", queryId="c")
        for number in range(3):
            assert wire.receive() == {"type": "event", "queryId": "c", "data": number}
        assert wire.receive() == {"type": "ok", "queryId": "c"}


def test_what_a_plugin_raises_fails_its_own_request(
    launch: Launch, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    @plugin.on("break")
    def broken(call: Any) -> None:
        raise ValueError("a secret")

    @plugin.on("refuse")
    async def refuse(call: Any) -> None:
        raise Forbidden("Not you.")

    @plugin.on("odd")
    def odd(call: Any) -> object:
        return object()

    with launch(plugin).connect() as wire:
        reply = wire.request(type="break", queryId=1)
        assert (reply["type"], reply["queryId"], reply["code"]) == ("error", 1, "internal")
        assert "'mine'" in reply["error"] and "ValueError" in reply["error"]
        assert "a secret" not in reply["error"] and "a secret" in caplog.text
        reply = wire.request(type="refuse", queryId=2)
        assert (reply["code"], reply["error"]) == ("forbidden", "Not you.")
        reply = wire.request(type="odd", queryId=3)
        assert (reply["queryId"], reply["code"]) == (3, "internal") and "'mine'" in reply["error"]
        assert wire.rows("select 1 as a") == [{"a": 1}]


@pytest.mark.parametrize("is_async", [False, True])
def test_one_that_never_returns_is_ended(launch: Launch, plugin: Plugin, is_async: bool) -> None:
    release = threading.Event()

    def hang(call: Any) -> None:
        release.wait(DEADLINE)

    async def hang_politely(call: Any) -> None:
        await asyncio.sleep(DEADLINE)

    plugin.on("hang")(hang_politely if is_async else hang)
    with launch(plugin, plugin_timeout=1).connect() as wire:
        wire.send(type="hang", queryId="a", timeoutMs=50)
        wire.send(type="hang", queryId="b")
        wire.send(type="json", sql="select 1 as a", queryId="beside")
        by_id = {reply["queryId"]: reply for reply in (wire.receive() for _ in range(3))}
        assert by_id["beside"]["data"] == '[{"a":1}]'
        assert by_id["a"]["code"] == by_id["b"]["code"] == "timeout"
        assert "timeoutMs" in by_id["a"]["error"]
        assert "'mine'" in by_id["b"]["error"] and "--plugin-timeout" in by_id["b"]["error"]
        wire.send(type="hang", queryId="c")
        wire.send(type="cancel", queryId="c")
        replies = [wire.receive(), wire.receive()]
        assert {reply["type"] for reply in replies} == {"cancelAck", "error"}
        # Its id is free again.
        assert wire.request(type="hang", queryId="c", timeoutMs=1)["code"] == "timeout"
        release.set()


def test_a_cancel_interrupts_the_query_of_a_plugin(launch: Launch, plugin: Plugin) -> None:
    asked = threading.Event()
    ended: list[str] = []

    @plugin.on("long")
    def long(call: Any) -> None:
        asked.set()
        try:
            call.query("select count(*) from range(100000000000) t(a) where a % 3 = 1")
        except Exception as error:
            ended.append(type(error).__name__)
            raise

    with launch(plugin).connect() as wire:
        wire.send(type="long", queryId="l")
        assert asked.wait(DEADLINE)
        wire.send(type="cancel", queryId="l")
        replies = [wire.receive(), wire.receive()]
        assert {reply["type"] for reply in replies} == {"cancelAck", "error"}
    while not ended:
        threading.Event().wait(0.01)


def test_sleeping_handlers_keep_no_query_waiting(launch: Launch, plugin: Plugin) -> None:
    release = threading.Event()
    plugin.on("sleep")(lambda call: release.wait(DEADLINE) and None)
    local = launch(plugin, workers=1, plugin_workers=2)
    with local.connect() as sleeper, local.connect() as wire:
        for number in range(8):
            sleeper.send(type="sleep", queryId=number)
        for _ in range(100):
            assert wire.rows("select 1 as a") == [{"a": 1}]
        release.set()
        for _ in range(8):
            assert sleeper.receive()["type"] == "ok"


def test_a_client_asks_within_its_role(launch: Launch, plugin: Plugin, tmp_path: Path) -> None:
    plugin.on("ask")(lambda call: call.query(call.message["sql"]))
    plugin.on("who")(lambda call: [call.client.user, call.client.role.name])
    path = tmp_path / "tokens.toml"
    path.write_text('[roles.reader]\n[tokens.ada]\nrole = "reader"\nsha256 = "x"\n')
    digest = __import__("hashlib").sha256(b"secret").hexdigest()
    path.write_text(f'[roles.reader]\n[tokens.ada]\nrole = "reader"\nhash = "sha256:{digest}"\n')
    local = launch(plugin, tokens=str(path))
    with local.connect("/?token=secret") as wire:
        assert wire.request(type="who")["data"] == ["ada", "reader"]
        assert wire.request(type="ask", sql="select 1 as a").table().to_pylist() == [{"a": 1}]
        assert wire.request(type="ask", sql="create table t(a int)")["code"] == "forbidden"


def test_the_server_tells_users_connections_and_channels(launch: Launch, plugin: Plugin) -> None:
    @plugin.on("tell")
    def tell(call: Any) -> None:
        plugin.server.send({"type": "hi", "n": 1}, user="ada")
        plugin.server.send({"type": "hi", "n": 2}, connection=call.client.id)
        plugin.server.send({"type": "hi", "n": 3})
        plugin.server.channels.publish("news", 4)
        call.client.send({"type": "hi", "n": 5})

    local = launch(plugin)
    with local.connect() as ada, local.connect() as eve:
        ada.request(type="hello", user="ada")
        eve.request(type="hello", user="eve")
        ada.request(type="subscribe", channel="news")
        eve.send(type="tell", queryId="t")
        assert [ada.receive().get("n") for _ in range(2)] == [1, 3]
        assert ada.receive()["payload"] == 4
        heard = [eve.receive() for _ in range(4)]
        assert [one.get("n") for one in heard[:3]] == [2, 3, 5] and heard[3]["type"] == "ok"


def test_phases_and_clients_come_in_order(launch: Launch) -> None:
    told: list[Any] = []
    gone = threading.Event()

    class Witness(Plugin):
        def starting(self) -> None:
            told.append("starting")

        async def started(self) -> None:
            told.append(["started", self.server.query("select 1 as a").num_rows])

        def opened(self, client: Any) -> None:
            told.append("opened")

        @on("ask")
        def ask(self, call: Any) -> None:
            told.append("ask")

        async def closed(self, client: Any) -> None:
            told.append("closed")
            gone.set()

        def stopping(self) -> None:
            told.append(["stopping", self.server.query("select 1 as a").num_rows])

        def stopped(self) -> None:
            told.append(["stopped", self.server.query("select 1 as a").num_rows])

    witness = Witness()
    with pytest.raises(StartupError, match=r"'Witness' failed on started: RuntimeError.*to_thread"):
        launch(witness)
    told.clear()
    witness.hook(_started_with(told))
    local = launch(witness)
    with local.connect() as wire:
        assert wire.request(type="ask")["type"] == "ok"
    assert gone.wait(DEADLINE)
    local.server.stop()
    assert told == [
        "starting", "started", "opened", "ask", "closed", ["stopping", 1], ["stopped", 1],
    ]  # fmt: skip


def _started_with(told: list[Any]) -> Callable[[], None]:
    def started() -> None:
        told.append("started")

    return started


def test_clients_that_are_there_at_the_end_are_told_as_gone(launch: Launch, plugin: Plugin) -> None:
    gone: list[str] = []

    @plugin.hook
    def closed(client: Any) -> None:
        gone.append(client.id)

    local = launch(plugin)
    with local.connect() as wire:
        name = wire.request(type="hello")["connectionId"]
        local.server.stop()
    assert gone == [name]


def test_what_fails_in_a_phase_keeps_nothing_from_stopping(
    launch: Launch, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    @plugin.hook
    def stopping() -> None:
        raise ValueError("no")

    @plugin.hook
    def opened(client: Any) -> None:
        raise ValueError("neither")

    @plugin.on("ask")
    def ask(call: Any) -> int:
        return 1

    local = launch(plugin)
    with local.connect() as wire:
        assert wire.request(type="ask")["data"] == 1
    assert local.server.stop()
    assert "'mine' failed on stopping" in caplog.text and "'mine' failed on opened" in caplog.text


def fetch(url: str, **options: Any) -> tuple[int, str, bytes]:
    request = urllib.request.Request(url, **options)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def test_routes_are_answered(launch: Launch, plugin: Plugin) -> None:
    class Pages(Plugin):
        @route("GET", "/hello/")
        def hello(self, call: Any) -> str:
            return f"Hello {call.rest} {call.query['n']}"

        @route("POST", "/double")
        async def double(self, call: Any) -> Any:
            return {"doubled": 2 * call.json()["n"]}

        @route("GET", "/teapot")
        def teapot(self, call: Any) -> Response:
            return Response("short", 418, "text/tea", {"X-Spout": "1"})

        @route("GET", "/broken")
        def broken(self, call: Any) -> None:
            raise ValueError("a secret")

        @route("GET", "/table")
        def table(self, call: Any) -> Any:
            return pa.table({"a": [1]})

        @route("GET", "/hook")
        def hook(self, call: Any) -> Any:
            return call.headers["x-signature"]

        @route("GET", "/split")
        def split(self, call: Any) -> Response:
            return Response("", headers={"X-A": "b\r\nX-Evil: 1"})

    url = launch(Pages()).url.replace("ws:", "http:")
    assert fetch(f"{url}/hello/Ada?n=2") == (200, "text/plain; charset=utf-8", b"Hello Ada 2")
    assert fetch(f"{url}/double", data=b'{"n": 4}')[::2] == (200, b'{"doubled":8}')
    assert fetch(f"{url}/double", data=b"no")[0] == 400
    assert fetch(f"{url}/teapot") == (418, "text/tea", b"short")
    status, _, body = fetch(f"{url}/broken")
    assert status == 500 and b"'Pages'" in body and b"secret" not in body
    assert fetch(f"{url}/split")[0] == 500
    assert fetch(f"{url}/table")[0] == 500
    assert fetch(f"{url}/hook", headers={"X-Signature": "ab"})[::2] == (200, b"ab")
    assert fetch(f"{url}/healthz")[0] == 200


def test_routes_need_the_token_unless_they_are_public(launch: Launch, plugin: Plugin) -> None:
    plugin.route("GET", "/mine")(lambda call: call.identity.role.name)
    plugin.route("GET", "/open", is_public=True)(lambda call: str(call.identity))
    url = launch(plugin, auth_token="secret").url.replace("ws:", "http:")
    assert fetch(f"{url}/mine")[0] == 401
    assert fetch(f"{url}/mine", headers={"Authorization": "Bearer secret"})[::2] == (200, b"admin")
    assert fetch(f"{url}/open")[::2] == (200, b"None")


def test_a_plugin_on_the_loop_is_called_there(launch: Launch) -> None:
    class Near(Feature):
        name = "near"

        @property
        def handlers(self) -> Any:
            return {"near": self.near}

        def near(self, peer: Any, message: Any) -> None:
            peer.send(json.dumps({"thread": thread_name(), **message.fields}).encode())

    with launch(Near()).connect() as wire:
        assert wire.request(type="near", a=1) == {"thread": "uws", "a": 1}


def test_a_message_that_nobody_has_names_those_of_plugins(launch: Launch, plugin: Plugin) -> None:
    plugin.on("mine")(lambda call: None)
    with launch(plugin).connect() as wire:
        assert "mine" in wire.request(type="yours")["error"]
        assert "--queries" in wire.request(type="named", name="x")["error"]
        wire.send_raw(framed({"type": ["mine"]}, b""))
        assert wire.receive()["code"] == "bad_request"
        assert wire.request(type="mine", queryId=[])["code"] == "bad_request"
        assert wire.request(type="mine", window=3, queryId=3)["queryId"] == 3


def test_clashes_are_named_when_the_server_is_made(plugin: Plugin) -> None:
    other = Plugin("other")
    plugin.on("same")(lambda call: None)
    other.on("same")(lambda call: None)
    with pytest.raises(StartupError, match="'mine' and 'other' both have messages of type 'same'"):
        Server(Settings(port=0), [plugin, other])
    third = Plugin("third")
    third.on("notify")(lambda call: None)
    with pytest.raises(StartupError, match="'notify', which are those of the server"):
        Server(Settings(port=0), [third])
    health, hello, again = Plugin("health"), Plugin("hello"), Plugin("again")
    health.route("GET", "/healthz")(lambda call: None)
    with pytest.raises(StartupError, match="'health' answers GET /healthz, which the server"):
        Server(Settings(port=0), [health])
    hello.route("GET", "/hello")(lambda call: None)
    again.route("GET", "/hello")(lambda call: None)
    with pytest.raises(StartupError, match="'hello' and 'again' both answer GET /hello"):
        Server(Settings(port=0), [hello, again])
    with pytest.raises(ValueError, match="two functions"):
        plugin.on("same")(lambda call: None)
    with pytest.raises(ValueError, match="no hook 'around_everything'"):

        @plugin.hook
        def around_everything() -> None: ...


GREETER = """
from sqlrooms_server import Plugin

plugin = Plugin("greeter")

@plugin.on("greet")
def greet(call):
    return "Hello " + call.message["name"]
"""


def test_a_file_is_a_plugin(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    path = tmp_path / "greeter.py"
    path.write_text(GREETER)
    other = tmp_path / "other.py"
    other.write_text(GREETER.replace('greeter"', 'other"').replace('greet"', 'hail"'))
    server = serve("--plugin", str(path), "--plugin", str(other))
    assert "  plugins   greeter, other\n" in server.welcome
    with server.connect() as wire:
        assert wire.request(type="greet", name="Ada")["data"] == "Hello Ada"
        assert wire.request(type="hail", name="Ada")["data"] == "Hello Ada"


@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        (GREETER, "{}:plugin", None),
        (GREETER, "{}:nothing", "has no 'nothing'"),
        ("", "{}", "no plugin in it"),
        (
            GREETER + "other = Plugin('b')",
            "{}",
            "has 2 plugins, plugin and other; name one, as in .*mine.py:plugin",
        ),
        # Where a decorator is used wrongly, and not where it says so.
        (
            GREETER.replace('("greet")', ""),
            "{}",
            r'write @plugin.on\("type"\) \(.*mine.py, line 6\)',
        ),
        (
            GREETER.replace('on("greet")', 'route("GET", "greet")'),
            "{}",
            r"path that begins with /, .*mine.py, line 6\)",
        ),
        (GREETER + "a b", "{}", r"SyntaxError: invalid syntax \(mine.py, line 9\)\.$"),
        ("1 / 0", "{}", r"ZeroDivisionError: division by zero \(.*mine.py, line 1\)"),
        ("def plugin(): ...", "{}:plugin", "of type function"),
        (
            "from sqlrooms_server import Plugin\nclass Mine(Plugin):\n    def __init__(self): ...",
            "{}",
            None,
        ),
        ("", "no.such.module:x", "ModuleNotFoundError"),
        ("", "nobody", "No plugin 'nobody' is installed"),
        ("", "/no/such.py", "there is no file"),
    ],
)
def test_loading_says_what_is_wrong(
    tmp_path: Path, text: str, place: str, told: str | None
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    if told is None:
        (plugin,) = load([place.format(path)])
        assert plugin.name in ("greeter", "Mine")
    else:
        with pytest.raises(StartupError, match=told):
            load([place.format(path)])


def test_one_plugin_is_not_loaded_twice(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(GREETER)
    with pytest.raises(StartupError, match="both called 'greeter'"):
        load([str(path), f"{path}:plugin"])


def test_an_installed_plugin_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greeter_module.py").write_text(GREETER)
    about = tmp_path / "greeter-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: greeter\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[sqlrooms_server.plugins]\ngreeter = greeter_module:plugin\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (plugin,) = load(["greeter"])
    assert plugin.name == "greeter"
