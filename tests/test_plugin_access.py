"""Plugins that say who somebody is, and what that one may do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from websockets.exceptions import ConnectionClosed

from sqlrooms_server import (
    Action,
    Credentials,
    Forbidden,
    Identity,
    Plugin,
    StartupError,
    Unauthorized,
)
from sqlrooms_server.access.roles import ADMIN
from sqlrooms_server.errors import Busy, Cancelled, ShuttingDown
from sqlrooms_server.messages import Message
from sqlrooms_server.plugins.actions import ASKED, AT_ONCE, IN_TURN
from tests.conftest import LocalServer
from tests.test_plugin_hooks import Done, tokens
from tests.test_plugins import fetch
from tests.test_transport import raw_websocket
from tests.wire import DEADLINE, Wire, framed, ipc

Launch = Callable[..., LocalServer]


@pytest.fixture
def plugin() -> Plugin:
    return Plugin("mine")


def whoami(plugin: Plugin) -> None:
    """Let ``plugin`` say who asks."""
    plugin.on("who")(lambda call: [call.client.user, call.client.role.name])
    plugin.route("POST", "/size")(lambda call: len(call.body))
    plugin.route("GET", "/who")(lambda call: [call.identity.user, call.identity.role.name])


def closed(wire: Wire) -> str:
    """The reason of the close, after an error that says so, too."""
    reply = wire.receive()
    assert reply["code"] == "unauthorized", reply
    with pytest.raises(ConnectionClosed):
        wire.receive()
    assert wire.socket.close_code == 1008
    return str(wire.socket.close_reason)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_plugin_knows_who_comes(
    launch: Launch, plugin: Plugin, tmp_path: Path, is_async: bool
) -> None:
    whoami(plugin)
    asked: list[Credentials] = []

    def known(credentials: Credentials) -> Identity | None:
        asked.append(credentials)
        name = credentials.token or credentials.request.headers.get("x-user")
        if name == "ghost":
            raise Unauthorized("Ghosts may not come.")
        role = plugin.server.role("reader")
        return Identity(name, role) if name in ("ada", "eve") else None

    async def known_later(credentials: Credentials) -> Identity | None:
        await asyncio.sleep(0)
        return known(credentials)

    function: Any = known_later if is_async else known
    function.__name__ = "authenticate"
    plugin.hook(function)
    local = launch(plugin, tokens=tokens(tmp_path, reader='read_channels = ["of/{user}"]'))
    with local.connect("/?token=ada") as wire:
        # What comes before the answer waits for it.
        assert wire.request(type="who")["data"] == ["ada", "reader"]
        assert wire.request(type="subscribe", channel="of/ada")["type"] == "subscribed"
        assert wire.request(type="subscribe", channel="of/eve")["code"] == "forbidden"
        # Another token of the same one, and then of somebody else.
        assert wire.request(type="auth", token="ada")["type"] == "authAck"
        wire.send(type="auth", token="eve")
        assert "of another user" in closed(wire)
    with local.connect("/") as wire:
        wire.send(type="auth", token="eve")
        wire.send(type="who")
        assert wire.receive()["type"] == "authAck"
        assert wire.receive()["data"] == ["eve", "reader"]
    with local.connect("/", additional_headers={"X-User": "ada", "X-More": "1"}) as wire:
        assert wire.request(type="who")["data"] == ["ada", "reader"]
        assert asked[-1].token is None and asked[-1].request.headers["x-more"] == "1"
        # A token that the server itself knows, of whom plugins are not asked.
        count = len(asked)
        with local.connect("/?token=reader") as other:
            assert other.request(type="who")["data"] == ["reader", "reader"]
            assert len(asked) == count
        local.server.reload()
        assert wire.request(type="who")["data"] == ["ada", "reader"]
    with local.connect("/?token=nobody") as wire:
        assert closed(wire) == "unauthorized"
    with local.connect("/?token=ghost") as wire:
        assert closed(wire) == "unauthorized: Ghosts may not come."
    with local.connect("/") as wire:
        wire.send(type="who")
        assert closed(wire) == "unauthorized"
    url = local.url.replace("ws:", "http:")
    assert fetch(f"{url}/who?token=ada")[::2] == (200, b'["ada","reader"]')
    assert fetch(f"{url}/who", headers={"X-User": "eve"})[::2] == (200, b'["eve","reader"]')
    assert fetch(f"{url}/size?token=ada", data=b"x" * 60_000)[::2] == (200, b"60000")
    assert fetch(f"{url}/size?token=eva", data=b"x" * 60_000)[0] == 401
    assert fetch(f"{url}/who")[0] == 401 and fetch(f"{url}/who?token=nobody")[0] == 401
    assert fetch(f"{url}/who?token=ghost")[2] == b"unauthorized: Ghosts may not come."
    assert fetch(f"{url}/healthz")[0] == 200


def test_the_first_answer_counts(launch: Launch, plugin: Plugin) -> None:
    asked: list[str] = []

    class First(Plugin):
        def authenticate(self, credentials: Credentials) -> Identity | None:
            asked.append("first")
            return Identity("ada", ADMIN) if credentials.token == "ada" else None

    @plugin.hook
    async def authenticate(credentials: Credentials) -> Identity | None:
        asked.append("second")
        return Identity("eve", ADMIN)

    whoami(plugin)
    local = launch(First(), plugin)
    for token, names in (("ada", ["first"]), ("eve", ["first", "second"])):
        with local.connect(f"/?token={token}") as wire:
            assert wire.request(type="who")["data"] == [token, "admin"]
        assert asked == names
        asked.clear()


def test_a_plugin_that_fails_refuses_its_own_connection(
    launch: Launch, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    @plugin.hook
    def authenticate(credentials: Credentials) -> Any:
        if credentials.token == "fail":
            raise ValueError("a secret")
        if credentials.token == "slow":
            release.wait(DEADLINE)
        if credentials.token == "odd":
            return "ada"
        return Identity("bad\nname" if credentials.token == "bad" else "", ADMIN)

    whoami(plugin)
    local = launch(plugin, auth_timeout=1)
    slow = local.connect("/?token=slow")
    for token, told in (("fail", "ValueError"), ("odd", "TypeError"), ("bad", "ValueError")):
        with local.connect(f"/?token={token}") as wire:
            reason = closed(wire)
            assert "'mine' failed on authenticate" in reason and told in reason
    assert "a secret" in caplog.text
    url = local.url.replace("ws:", "http:")
    status, _, body = fetch(f"{url}/who?token=fail")
    assert status == 503 and b"'mine'" in body
    with local.connect("/?token=other") as wire:
        assert wire.request(type="who")["data"] == [None, "admin"]
    with slow:
        reason = closed(slow)
        assert "'mine' did not tell who this is within 1 s (--auth-timeout)" in reason
    release.set()


def test_wrong_tokens_count(launch: Launch, plugin: Plugin) -> None:
    @plugin.hook
    def authenticate(credentials: Credentials) -> Identity | None:
        return Identity("ada", ADMIN) if credentials.token == "ada" else None

    whoami(plugin)
    local = launch(plugin, max_auth_failures=2)
    url = local.url.replace("ws:", "http:")
    with local.connect("/?token=ada") as wire:
        assert wire.request(type="who")["data"][0] == "ada"
    for _ in range(2):
        with local.connect("/?token=wrong") as wire:
            closed(wire)
        assert fetch(f"{url}/who?token=wrong")[0] == 401
    with local.connect("/") as wire:
        wire.send(type="auth", token="wrong")
        assert "Too many wrong tokens" in closed(wire)
    assert fetch(f"{url}/who?token=wrong")[0] == 429
    # One that was right there before goes on.
    with local.connect("/?token=ada") as wire:
        assert wire.request(type="who")["data"][0] == "ada"


def test_what_waits_for_the_answer_is_bounded(launch: Launch, plugin: Plugin) -> None:
    release = threading.Event()

    @plugin.hook
    def authenticate(credentials: Credentials) -> Identity:
        release.wait(DEADLINE)
        return Identity("", ADMIN)

    local = launch(plugin)
    with local.connect("/?token=x") as many, local.connect("/?token=x") as few:
        few.send_raw(framed({"type": "uploadArrow", "tableName": "t", "queryId": 1}, TABLE))
        few.send(type="json", sql="select sum(a) as a from t", queryId=2)
        with pytest.raises(ConnectionClosed):
            for _ in range(100):
                many.send(type="json", sql="-" * 50_000, queryId=1)
                time.sleep(0.001)
            many.receive()
            many.receive()
        release.set()
        replies = {(reply := few.receive())["queryId"]: reply for _ in range(2)}
        assert replies[1]["type"] == "uploadAck"


TABLE = ipc(pa.table({"a": list(range(10_000))}))


def test_a_server_with_such_a_plugin_needs_no_other_token(launch: Launch, plugin: Plugin) -> None:
    with pytest.raises(StartupError, match="a token is needed"):
        launch(plugin, host="0.0.0.0")

    @plugin.hook
    def authenticate(credentials: Credentials) -> Identity | None:
        return Identity("ada", plugin.server.role("admin")) if credentials.token == "ada" else None

    whoami(plugin)
    local = launch(plugin, host="0.0.0.0")
    assert local.server.main.gate.needs_token
    with local.connect("/?token=ada") as wire:
        assert wire.request(type="who")["data"] == ["ada", "admin"]
    with local.connect() as wire:
        wire.send(type="json", sql="select 1")
        assert closed(wire) == "unauthorized"


class Judge(Plugin):
    """Forbids what has "no" in it, and notes what it is asked."""

    def __init__(self, name: str = "judge") -> None:
        super().__init__(name)
        self.asked: list[tuple[str, str]] = []
        self.holds = threading.Event()
        self.holds.set()

    def authorize(self, client: Any, action: Action) -> None:
        self.asked.append((action.kind, action.resource))
        if "wait" in action.resource:
            assert self.holds.wait(DEADLINE)
        if "no" in action.resource:
            raise Forbidden(f"{client.user} may not {action.kind} {action.resource}.")
        if "break" in action.resource:
            raise ValueError("a secret")


def test_a_plugin_says_what_somebody_may_do(launch: Launch) -> None:
    judge, other = Judge(), Judge("other")
    other.on("mine")(lambda call: 1)
    local = launch(judge, other)
    with local.connect() as wire:
        wire.request(type="hello", user="ada")
        assert wire.rows("select 1 as a") == [{"a": 1}]
        reply = wire.arrow("select 'no'", "q")
        assert (reply["code"], reply["queryId"]) == ("forbidden", "q")
        assert reply["error"] == "ada may not arrow select 'no'."
        reply = wire.request(type="live", sql="select 'break'", queryId=1)
        assert reply["code"] == "internal" and "'judge' failed on authorize" in reply["error"]
        reply = wire.request(type="subscribe", channel="no", queryId=2)
        assert (reply["channel"], reply["queryId"]) == ("no", 2)
        assert wire.request(type="mine")["data"] == 1
        assert wire.request(type="watch", tables=["a.b", "c"], queryId=3)["type"] != "error"
        assert wire.upload(TABLE, tableName="no", queryId=4)["code"] == "forbidden"
        assert wire.upload(TABLE, tableName="t", queryId=5)["type"] == "uploadAck"
    assert judge.asked == [
        ("json", "select 1 as a"), ("arrow", "select 'no'"), ("live", "select 'break'"),
        ("subscribe", "no"), ("mine", ""), ("watch", "a.b, c"), ("uploadArrow", "no"),
        ("uploadArrow", "t"),
    ]  # fmt: skip
    assert other.asked == [
        ("json", "select 1 as a"), ("mine", ""), ("watch", "a.b, c"), ("uploadArrow", "t"),
    ]  # fmt: skip


def test_over_http_as_well(launch: Launch) -> None:
    judge = Judge()
    judge.route("GET", "/see/")(lambda call: call.rest)
    judge.route("GET", "/open/", is_public=True)(lambda call: call.rest)
    local = launch(judge)
    url = local.url.replace("ws:", "http:")
    said = {"data": b"1", "headers": {"Content-Type": "application/json"}}
    assert fetch(f"{url}/channels/news", **said)[0] == 200
    status, kind, body = fetch(f"{url}/channels/%6eo", **said)
    assert (status, kind, json.loads(body)["code"]) == (403, "application/json", "forbidden")
    assert fetch(f"{url}/see/a")[0] == 200 and fetch(f"{url}/see/no")[0] == 403
    assert fetch(f"{url}/see/no", method="HEAD")[0] == 403
    assert fetch(f"{url}/see/%6Eo")[0] == 403
    assert fetch(f"{url}/open/no")[0] == 200 and fetch(f"{url}/see/break")[0] == 500
    assert judge.asked == [
        ("notify", "news"), ("notify", "no"), ("http", "GET /see/a"), ("http", "GET /see/no"),
        ("http", "GET /see/no"), ("http", "GET /see/no"), ("http", "GET /see/break"),
    ]  # fmt: skip


def test_messages_wait_for_those_before_them(launch: Launch) -> None:
    judge, done = Judge(), Done()
    judge.holds.clear()
    local = launch(judge, done, max_in_flight=4)
    with local.connect() as wire, local.connect() as other:
        table = "create table t as select 'wait' as a"
        wire.send(type="exec", sql=table, queryId=1, session="s")
        wire.send(type="arrow", sql="select 1", queryId=2)
        wire.send(type="json", sql="from t", queryId=3, session="s")
        wire.send(type="hello", queryId=4)
        wire.send(type="exec", sql="select 5", queryId=5)
        assert wire.receive()["code"] == "busy"
        wire.send(type="cancel", queryId=2)
        replies = [wire.receive(), wire.receive()]
        assert [reply["type"] for reply in replies] == ["error", "cancelAck"]
        assert replies[0]["code"] == "cancelled" and replies[1]["cancelled"]
        # Others do not wait, nor does what is about something that was allowed.
        assert other.rows("select 1 as a") == [{"a": 1}]
        judge.holds.set()
        replies = [wire.receive() for _ in range(3)]
        assert {reply["type"] for reply in replies} == {"ok", "json", "welcome"}
    errors = {query.query_id: outcome.error for query, outcome in done.wait(5)}
    assert isinstance(errors[5], Busy) and isinstance(errors[2], Cancelled)
    assert errors[1] is errors[3] is None


def test_a_cancel_of_the_one_that_is_asked_about(launch: Launch) -> None:
    judge, done = Judge(), Done()
    judge.holds.clear()
    local = launch(judge, done)
    with local.connect() as wire:
        wire.send(type="json", sql="select 'wait'", queryId=1)
        wire.send(type="json", sql="select 2 as a", queryId=2)
        wire.send(type="cancel", queryId=1)
        assert [wire.receive()["type"] for _ in range(3)] == ["error", "cancelAck", "json"]
        wire.send(type="json", sql="select 'wait'", queryId=3)
        while len(judge.asked) < 3:
            time.sleep(0.001)
    with local.connect() as wire:
        wire.send(type="json", sql="select 'wait'", queryId=4)
        while len(judge.asked) < 4:
            time.sleep(0.001)
        stopping = threading.Thread(target=local.server.stop)
        stopping.start()
        assert wire.receive()["code"] == "shutting_down"
        judge.holds.set()
        stopping.join()
    outcomes = {query.query_id: outcome for query, outcome in done.wait(4)}
    assert isinstance(outcomes[3].error, Cancelled)
    assert isinstance(outcomes[4].error, ShuttingDown)


def test_chunks_of_an_upload_follow_the_first(launch: Launch) -> None:
    judge = Judge()
    judge.holds.clear()
    local = launch(judge)

    def chunk(wire: Wire, seq: int, **more: Any) -> None:
        size = len(TABLE) // 4 + 1
        body = TABLE[seq * size : (seq + 1) * size]
        header = {"type": "uploadArrow", "seq": seq, **({"last": True} if seq == 3 else {})}
        wire.send_raw(framed({**header, **more}, body))

    def answers(wire: Wire, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            reply = wire.receive()
            if reply["type"] != "uploadProgress":
                found.append(reply)
        return found

    with local.connect() as wire:
        for seq in range(4):
            chunk(wire, seq, queryId="u", tableName="wait")
        for seq in range(3):
            chunk(wire, seq, queryId="n", tableName="no")
        chunk(wire, 0, queryId="c", tableName="cancelled")
        chunk(wire, 1, queryId="c")
        wire.send(type="cancel", queryId="c")
        found = answers(wire, 2)
        assert [reply["type"] for reply in found] == ["error", "cancelAck"]
        chunk(wire, 2, queryId="c")
        judge.holds.set()
        by_id = {reply["queryId"]: reply for reply in answers(wire, 2)}
        assert by_id["u"]["rows"] == 10_000 and by_id["n"]["code"] == "forbidden"
        # The rest of those that were refused is ignored.
        chunk(wire, 3, queryId="n")
        chunk(wire, 3, queryId="c")
        assert wire.rows("select count(*) as a from wait") == [{"a": 10_000}]
        for seq in range(4):
            chunk(wire, seq, queryId="n", tableName="t")
        assert answers(wire, 1)[0]["rows"] == 10_000


def test_too_many_bytes_that_wait(launch: Launch) -> None:
    judge = Judge()
    judge.holds.clear()
    local = launch(judge, max_message_size=100_000)
    with local.connect() as wire:
        wire.send(type="json", sql="select 'wait' as a", queryId=1)
        wire.send_raw(
            framed(
                {"type": "uploadArrow", "seq": 0, "queryId": "u", "tableName": "t"}, TABLE[:90_000]
            )
        )
        wire.send_raw(framed({"type": "uploadArrow", "seq": 1, "queryId": "u"}, b"x" * 90_000))
        wire.send_raw(framed({"type": "uploadArrow", "seq": 2, "queryId": "u"}, b"x" * 90_000))
        reply = wire.receive()
        assert (reply["code"], reply["queryId"]) == ("busy", "u")
        assert "--max-message-size" in reply["error"]
        wire.send_raw(framed({"type": "uploadArrow", "seq": 3, "queryId": "u", "last": True}, b""))
        judge.holds.set()
        assert wire.receive()["data"] == '[{"a":"wait"}]'
        assert wire.rows("select 1 as a") == [{"a": 1}]


def test_one_that_is_too_slow_is_named(launch: Launch) -> None:
    judge = Judge()
    judge.holds.clear()
    with launch(judge, plugin_timeout=1).connect() as wire:
        reply = wire.arrow("select 'wait'")
        assert reply["code"] == "timeout" and "'judge'" in reply["error"]
        assert wire.rows("select 1 as a") == [{"a": 1}]
    judge.holds.set()


def test_nothing_slips_past() -> None:
    """Every class of messages is one that plugins are asked about, or stands here for a reason."""
    classes = set(typing.get_args(Message))
    assert classes == {*ASKED, *IN_TURN, *AT_ONCE}
    assert len(classes) == len(ASKED) + len(IN_TURN) + len(AT_ONCE)
    names = {kind.__name__ for kind in (*IN_TURN, *AT_ONCE)}
    streams = {"StreamData", "StreamAck"}
    assert names == {"Hello", "RoomUpdate", "RoomPresence", "Auth", "Cancel", "Ack", *streams}


def masked(**fields: Any) -> bytes:
    """A text frame of a client, short and with a mask of zeros."""
    text = json.dumps(fields).encode()
    return bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text


def test_what_waits_to_be_allowed_ends_with_its_sender(launch: Launch, plugin: Plugin) -> None:
    asked, answers, done = threading.Event(), threading.Event(), threading.Event()
    handled: list[Any] = []

    @plugin.hook
    def authenticate(credentials: Credentials) -> Identity | None:
        return Identity(credentials.token, ADMIN) if credentials.token else Identity("ada", ADMIN)

    @plugin.hook
    def authorize(client: Any, action: Action) -> None:
        asked.set()
        assert answers.wait(DEADLINE)

    @plugin.hook
    def query_done(query: Any, outcome: Any) -> None:
        handled.append(outcome.error.code)
        done.set()

    plugin.on("act")(lambda call: handled.append(call.client.user))
    with raw_websocket(launch(plugin).port) as raw:
        raw.sendall(masked(type="act") + masked(type="exec", sql="select 1", queryId=1))
        assert asked.wait(DEADLINE)
        # It leaves the close of the server without an answer.
        raw.sendall(masked(type="auth", token="eve"))
        received = b""
        while b"of another user" not in received:
            received += raw.recv(1000)
        answers.set()
        assert done.wait(DEADLINE)
    assert handled == ["cancelled"]
