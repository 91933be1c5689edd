"""Hooks around queries: what they may change, how often they are called, and what is not shared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server import Outcome, Plugin, Query, QueryError, StartupError
from sqlrooms_server.errors import Busy, Cancelled, Conflict, Forbidden, ShuttingDown, Timeout
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer
from tests.wire import DEADLINE, Wire

Launch = Callable[..., LocalServer]

LONG = "select count(*) from range(100000000000) t(a) where a % 3 = 1"


def tokens(tmp_path: Path, **roles: str) -> str:
    """A file in which each of ``roles`` is that of the token of the same name."""
    from hashlib import sha256

    path = tmp_path / "tokens.toml"
    text = ""
    for name, rules in roles.items():
        digest = sha256(name.encode()).hexdigest()
        text += f'[roles.{name}]\n{rules}\n[tokens.{name}]\nrole = "{name}"\n'
        text += f'hash = "sha256:{digest}"\n'
    path.write_text(text)
    return str(path)


class Noting(Plugin):
    """Notes what it is called for, with its name."""

    def __init__(self, name: str, notes: list[Any], *, transparent: bool = False) -> None:
        super().__init__(name)
        self.notes = notes
        self.is_transparent = transparent

    def around_query(self, query: Query, run: Callable[[Query], Any]) -> Any:
        self.notes.append((self.name, "before", query.kind, query.sql))
        result = run(query)
        self.notes.append((self.name, "after"))
        return result

    def prepare_cursor(self, cursor: Any, client: Any) -> None:
        self.notes.append((self.name, "prepare"))


class Done(Plugin):
    """Notes what is done."""

    def __init__(self, name: str = "done") -> None:
        super().__init__(name)
        self.done: list[tuple[Query, Outcome]] = []
        self._changed = threading.Condition()

    def query_done(self, query: Query, outcome: Outcome) -> None:
        with self._changed:
            self.done.append((query, outcome))
            self._changed.notify()

    def wait(self, count: int) -> list[tuple[Query, Outcome]]:
        """The first ``count``, of which there are no more."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.done) >= count, DEADLINE), self.done
            assert len(self.done) == count, self.done
            return list(self.done)


@pytest.fixture
def plugin() -> Plugin:
    return Plugin("mine")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("arrow", {}),
        ("arrow", {"stream": True}),
        ("json", {}),
        ("json", {"session": "s", "maxRows": 1, "params": []}),
        ("exec", {}),
        ("live", {}),
    ],
)
def test_interceptors_are_called_in_order_and_once(
    launch: Launch, kind: str, options: dict[str, Any]
) -> None:
    notes: list[Any] = []
    sql = "select 1 as a"
    with launch(Noting("one", notes), Noting("two", notes)).connect() as wire:
        reply = wire.request(type=kind, sql=sql, queryId="q", **options)
        assert not isinstance(reply, dict) or reply["type"] in ("json", "ok")
    assert notes == [
        ("one", "prepare"), ("two", "prepare"),
        ("one", "before", kind, sql), ("two", "before", kind, sql), ("two", "after"),
        ("one", "after"),
    ]  # fmt: skip


def test_another_text_and_other_parameters_are_run(launch: Launch, plugin: Plugin) -> None:
    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        return run(query.replace(sql=f"select $n + 1 as a, ({query.sql}) as b", params={"n": 41}))

    with launch(plugin).connect() as wire:
        assert wire.rows("select 2") == [{"a": 42, "b": 2}]


def test_what_an_interceptor_runs_is_checked(
    launch: Launch, plugin: Plugin, tmp_path: Path
) -> None:
    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        return run(query.replace(sql=query.sql.replace("select 1", "create table t(a int)")))

    local = launch(plugin, tokens=tokens(tmp_path, reader=""))
    with local.connect("/?token=reader") as wire:
        assert wire.arrow("select 1")["code"] == "forbidden"
        assert wire.rows("select 2 as a") == [{"a": 2}]


TABLE = pa.table({"a": [1, 2, 3]})


@pytest.mark.parametrize(
    "made",
    [
        lambda result: TABLE,
        lambda result: TABLE.to_reader(),
        lambda result: result.table(),
        lambda result: (result.table(), result)[1],
    ],
    ids=["table", "reader", "its table", "read before"],
)
def test_tables_are_sent_in_the_format_that_was_asked(
    launch: Launch, plugin: Plugin, made: Callable[[Any], Any]
) -> None:
    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        return made(run(query))

    sql = "select unnest([1, 2, 3]) as a"
    with launch(plugin).connect() as wire:
        assert wire.table(sql).to_pydict() == TABLE.to_pydict()
        assert wire.rows(sql) == TABLE.to_pylist()
        reply = wire.request(type="json", sql=sql, queryId="m", maxRows=2)
        assert reply["truncated"] and reply["data"] == '[{"a":1},{"a":2}]'
        assert chunked(wire, sql, maxRows=2).num_rows == 2
        assert wire.exec(sql)
        assert wire.request(type="arrow", sql=sql, queryId="s", session="s").table()["a"][2]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda query, run: 42, "returned a int, which is neither"),
        (lambda query, run: (run(query), run(query))[0], "keep its table"),
        (lambda query, run: 1 // 0, "ZeroDivisionError"),
        (lambda query, run: open("/no/such/file"), "FileNotFoundError"),
    ],
)
def test_a_failing_interceptor_is_named(
    launch: Launch, plugin: Plugin, made: Callable[[Any, Any], Any], told: str
) -> None:
    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        return run(query) if "fine" in query.sql else made(query, run)

    with launch(Noting("other", []), plugin).connect() as wire:
        for options in ({}, {"persist": True}, {"session": "s"}):
            reply = wire.request(type="json", sql="select 1", queryId=1, **options)
            assert (reply["queryId"], reply["code"]) == (1, "internal")
            assert "'mine'" in reply["error"] and told in reply["error"]
        assert wire.rows("select 'fine' as a") == [{"a": "fine"}]


def test_none_is_ok(launch: Launch, plugin: Plugin) -> None:
    plugin.hook(_named("around_query", lambda query, run: None))
    with launch(plugin).connect() as wire:
        assert wire.request(type="json", sql="nonsense", queryId=1)["type"] == "ok"
        assert wire.request(type="live", sql="nonsense", queryId=2)["code"] == "bad_request"


def chunked(wire: Wire, sql: str, **options: Any) -> pa.Table:
    """A result in chunks."""
    wire.send(type="arrow", sql=sql, queryId="c", stream=True, **options)
    chunks = [wire.receive()]
    while not chunks[-1].header["last"]:
        chunks.append(wire.receive())
    table = pa.ipc.open_stream(b"".join(chunk.body for chunk in chunks)).read_all()
    assert chunks[-1].header["rows"] == table.num_rows
    return table


def _named(name: str, function: Any) -> Any:
    function.__name__ = name
    return function


def test_errors_of_duckdb_can_be_caught(launch: Launch, plugin: Plugin) -> None:
    caught: list[Exception] = []

    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        try:
            result = run(query)
            return None if result is None else result.table()
        except (QueryError, Conflict) as error:
            caught.append(error)
            return run(query.replace(sql="select 'second' as a"))

    with launch(plugin).connect() as wire:
        assert wire.rows("select nothing") == [{"a": "second"}]
        assert wire.rows("select error('late') from range(10)") == [{"a": "second"}]
        assert ["nothing" in str(caught[0]), "late" in str(caught[1])] == [True, True]
        # A change that lost against another one.
        with wire as other:
            other.exec("create table t as select 1 as a")
            begun = {"type": "exec", "queryId": "b", "session": "s"}
            other.request(**begun, sql="begin")
            other.request(**begun, sql="update t set a = 2")
            reply = other.request(type="json", sql="update t set a = 3", queryId="u", session="t")
            assert reply["data"] == '[{"a":"second"}]' and isinstance(caught[2], Conflict)


def test_a_cancel_ends_what_an_interceptor_tries_again(launch: Launch, plugin: Plugin) -> None:
    began, errors = threading.Event(), []

    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        began.set()
        while True:
            try:
                return run(query)
            except QueryError as error:
                errors.append(error)

    with launch(plugin).connect() as wire:
        wire.send(type="arrow", sql=LONG, queryId="l")
        assert began.wait(DEADLINE)
        wire.send(type="cancel", queryId="l")
        replies = [wire.receive(), wire.receive()]
        assert {reply["type"] for reply in replies} == {"cancelAck", "error"}
        assert {reply.get("code") for reply in replies} == {None, "cancelled"}


def test_a_slow_interceptor_holds_up_its_own_query(launch: Launch, plugin: Plugin) -> None:
    release = threading.Event()

    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        if "slow" in query.sql:
            release.wait(DEADLINE)
        return run(query)

    with launch(plugin, workers=2).connect() as wire:
        wire.send(type="json", sql="select 'slow' as a", queryId="s")
        for _ in range(20):
            wire.send(type="exec", sql="select 1", queryId="f")
            assert wire.receive()["queryId"] == "f"
        release.set()
        assert wire.receive()["queryId"] == "s"


def test_only_some_hooks_may_be_async(plugin: Plugin) -> None:
    for name in ("prepare_cursor", "around_query", "query_done"):
        other = Plugin("slow")

        async def hook(*arguments: Any) -> None: ...

        other.hook(_named(name, hook))
        with pytest.raises(StartupError, match=f"{name} of plugin 'slow' must be a plain function"):
            Server(Settings(port=0), [plugin, other])


def user_filter(plugin: Plugin) -> None:
    """Let ``plugin`` show each client the rows of its name in the query string."""

    @plugin.hook
    def prepare_cursor(cursor: Any, client: Any) -> None:
        cursor.execute("set variable who = $1", [client.metadata["who"]])
        cursor.execute(
            "create temp view mine as select * from everything where who = getvariable('who')"
        )


def test_a_cursor_is_prepared_for_its_client(launch: Launch, plugin: Plugin) -> None:
    user_filter(plugin)
    plugin.on("ask")(lambda call: call.query("from mine"))
    local = launch(plugin)
    local.server.main.database.engine.cursor().native.execute(
        "create table everything as select unnest(['ada', 'eve']) as who"
    )
    with local.connect("/?who=ada") as ada, local.connect("/?who=eve") as eve:
        for wire, name in ((ada, "ada"), (eve, "eve")):
            expected = [{"who": name}]
            assert wire.rows("from mine") == expected
            assert wire.request(type="ask").table().to_pylist() == expected
            for options in ({"session": "s"}, {"persist": True}, {"persist": True}):
                reply = wire.request(type="arrow", sql="from mine", queryId="q", **options)
                assert reply.table().to_pylist() == expected and "cached" not in reply.header
        stats = ada.request(type="cacheStats")
        assert (stats["uncacheable"], stats["hits"], stats["entries"]) == (4, 0, 0)
        assert (
            ada.request(type="live", sql="from mine", queryId="l").table()["who"][0].as_py()
            == "ada"
        )
        assert (
            eve.request(type="live", sql="from mine", queryId="l").table()["who"][0].as_py()
            == "eve"
        )
        # What the view reads is known, though the text names nothing of it.
        ada.send(type="exec", sql="insert into everything values ('ada')", queryId="e")
        replies = [ada.receive(), ada.receive()]
        told = next(one for one in replies if not isinstance(one, dict))
        assert told.header["seq"] == 1 and told.table().num_rows == 2


def test_a_session_is_prepared_once_and_again_after_a_failure(
    launch: Launch, plugin: Plugin
) -> None:
    calls: list[int] = []

    @plugin.hook
    def prepare_cursor(cursor: Any, client: Any) -> None:
        calls.append(1)
        cursor.execute("create temp table prepared as select 1 as a")
        if len(calls) == 1:
            raise ValueError("not yet")

    with launch(plugin).connect() as wire:
        asked = {"type": "json", "sql": "from prepared", "queryId": "q", "session": "s"}
        reply = wire.request(**asked)
        assert reply["code"] == "internal" and "'mine' failed on prepare_cursor" in reply["error"]
        for _ in range(3):
            assert wire.request(**asked)["data"] == '[{"a":1}]'
        assert len(calls) == 2


def test_what_was_allowed_on_one_cursor_is_not_on_another(
    launch: Launch, plugin: Plugin, tmp_path: Path
) -> None:
    @plugin.hook
    def prepare_cursor(cursor: Any, client: Any) -> None:
        place = "main" if client.metadata["who"] == "ada" else "secret"
        cursor.execute(f"create temp view v as from {place}.t")

    local = launch(plugin, tokens=tokens(tmp_path, reader='schemas = ["main"]'))
    native = local.server.main.database.engine.native_cursor()
    native.execute("create schema secret; create table secret.t as select 2 as a")
    native.execute("create table main.t as select 1 as a")
    ada = local.connect("/?token=reader&who=ada")
    with ada, local.connect("/?token=reader&who=eve") as eve:
        assert ada.rows("from v") == [{"a": 1}]
        for options in ({}, {"persist": True}, {"session": "s"}):
            reply = eve.request(type="json", sql="from v", queryId=1, **options)
            assert reply["code"] == "forbidden", reply
        assert eve.request(type="live", sql="from v", queryId=1)["code"] == "forbidden"


def test_what_clients_with_roles_may_read_of_what_was_prepared(
    launch: Launch, plugin: Plugin, tmp_path: Path
) -> None:
    @plugin.hook
    def prepare_cursor(cursor: Any, client: Any) -> None:
        cursor.register("arrow", pa.table({"a": [1]}))
        cursor.execute("create temp table copied as from arrow")
        cursor.execute("set integer_division = true")

    local = launch(plugin, tokens=tokens(tmp_path, reader=""))
    with local.connect("/?token=reader") as wire:
        assert wire.rows("from copied") == [{"a": 1}]
        assert wire.arrow("from arrow")["code"] == "forbidden"
        reply = wire.request(type="live", sql="from copied", queryId=1)
        assert reply.table().num_rows == 1
        for _ in range(2):
            assert wire.table("select 5 / 2 as a")["a"][0].as_py() == 2


def test_a_live_query_depends_on_what_was_run(launch: Launch, plugin: Plugin) -> None:
    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        if query.kind != "live":
            return run(query)
        limit = run(query.replace(sql="select max(n) as n from limits")).table()["n"][0].as_py()
        return run(query.replace(sql=f"select count(*) as a from t where a < {limit}"))

    with launch(plugin).connect() as wire:
        wire.exec("create table t as from range(10) r(a)")
        wire.exec("create table limits as select 5 as n")
        assert wire.request(type="live", sql="select 1", queryId="l").table()["a"][0].as_py() == 5
        for sql, count in (("insert into limits values (7)", 7), ("delete from t where a = 0", 6)):
            wire.send(type="exec", sql=sql, queryId="e")
            replies = [wire.receive(), wire.receive()]
            told = next(one for one in replies if not isinstance(one, dict))
            assert told.table()["a"][0].as_py() == count
        wire.exec("create table other as select 1 as a")
        assert wire.request(type="cancel", queryId="l")["queryId"] == "l"


def test_results_are_shared_past_transparent_interceptors(launch: Launch) -> None:
    notes: list[Any] = []
    done = Done()
    local = launch(Noting("timing", notes, transparent=True), done)
    asked = {"type": "json", "sql": "select 1 as a", "persist": True}
    with local.connect() as ada, local.connect() as eve:
        assert "cached" not in ada.request(**asked, queryId=1)
        assert eve.request(**asked, queryId=2)["cached"]
        assert eve.request(**asked, queryId=3, stream=False)["cached"]
        live = {"type": "live", "sql": "select 2 as a"}
        for wire in (ada, eve):
            assert wire.request(**live, queryId=4).table()["a"][0].as_py() == 2
    assert [note[1] for note in notes] == 2 * ["prepare", "before", "after"]
    told = [(query.query_id, outcome.rows) for query, outcome in done.wait(5)]
    assert told[:3] == [(1, 1), (2, 1), (3, 1)]


def test_what_is_done_is_told_once(launch: Launch, tmp_path: Path) -> None:
    done, other = Done(), Done("other")
    running = threading.Event()
    hold = Plugin("hold")

    @hold.hook
    def around_query(query: Query, run: Any) -> Any:
        running.set()
        return run(query)

    @hold.hook
    def query_done(query: Query, outcome: Outcome) -> None:
        raise ValueError("no")

    limits = tokens(tmp_path, anybody="", slow="request_rate = 1")
    local = launch(hold, done, other, tokens=limits, workers=1)
    with local.connect("/?token=anybody") as wire:
        assert wire.rows("select 1 as a") == [{"a": 1}]
        ((query, outcome),) = done.wait(1)
        assert (query.sql, query.kind, query.query_id) == ("select 1 as a", "json", "j")
        assert query.client.user == "anybody" and outcome.error is None
        assert (outcome.rows, outcome.bytes) == (
            1,
            len('{"type":"json","queryId":"j","data":"[{\\"a\\":1}]"}'),
        )
        assert 0 <= outcome.queued <= outcome.total and 0 < outcome.running <= outcome.total

        assert wire.table("from range(100000)").num_rows == 100_000
        outcome = done.wait(2)[1][1]
        assert outcome.rows == 100_000 and outcome.bytes is not None and outcome.bytes > 800_000
        assert chunked(wire, "from range(7)").num_rows == 7
        assert done.wait(3)[2][1].rows == 7
        wire.arrow("select nothing")
        assert isinstance(done.wait(4)[3][1].error, QueryError)

        running.clear()
        wire.send(type="arrow", sql=LONG, queryId="l")
        assert running.wait(DEADLINE)
        assert wire.request(type="arrow", sql="select 1", queryId="l")["code"] == "conflict"
        wire.send(type="arrow", sql="select 1", queryId="t", timeoutMs=1)
        assert wire.receive()["code"] == "timeout"
        wire.send(type="cancel", queryId="l")
        assert {wire.receive()["type"], wire.receive()["type"]} == {"cancelAck", "error"}
        errors = [type(outcome.error) for _, outcome in done.wait(7)[4:]]
        assert errors == [Conflict, Timeout, Cancelled]

        # A connection that is lost, with a live query.
        running.clear()
        with local.connect("/?token=anybody") as lost:
            lost.request(type="live", sql="select 1 as a", queryId="v")
            lost.send(type="json", sql=LONG, queryId="w")
            assert running.wait(DEADLINE)
        ended = {query.query_id: outcome for query, outcome in done.wait(9)[7:]}
        assert isinstance(ended["v"].error, Cancelled) and isinstance(ended["w"].error, Cancelled)

        with local.connect("/?token=slow") as slow:
            count = 0
            while slow.request(type="exec", sql="select 1", queryId="r")["type"] == "ok":
                count += 1
        count += 10
        assert isinstance(done.wait(count)[-1][1].error, Busy)

        running.clear()
        wire.send(type="arrow", sql=LONG, queryId="x")
        assert running.wait(DEADLINE)
        assert local.server.stop()
    assert isinstance(done.wait(count + 1)[-1][1].error, ShuttingDown)
    assert other.done == done.done


def test_one_that_is_told_too_slowly_misses_some(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    done, slow = Done(), Plugin("slow")
    release, told = threading.Event(), []

    @slow.hook
    def query_done(query: Query, outcome: Outcome) -> None:
        told.append(query.query_id)
        release.wait(DEADLINE)

    local = launch(slow, done, plugin_backlog=3)
    with local.connect() as wire:
        ask(wire, 0)
        while not told:
            threading.Event().wait(0.001)
        for number in range(1, 10):
            ask(wire, number)
            done.wait(number + 1)
        release.set()
        local.server.stop()
    assert told == [0, 1, 2, 3]
    assert "Plugin 'slow' is too slow on query_done: 3 calls wait" in caplog.text
    assert "--plugin-backlog" in caplog.text and "missed 6" in caplog.text


def ask(wire: Wire, query_id: int) -> None:
    assert wire.request(type="exec", sql="select 1", queryId=query_id)["type"] == "ok"


def test_one_that_never_returns_does_not_keep_the_server(launch: Launch) -> None:
    release = threading.Event()
    slow = Plugin("slow")
    slow.hook(_named("query_done", lambda query, outcome: release.wait(DEADLINE) and None))
    local = launch(slow)
    with local.connect() as wire:
        ask(wire, 1)
        ask(wire, 2)
    assert local.server.stop()
    release.set()


def test_forbidden_by_an_interceptor(launch: Launch, plugin: Plugin) -> None:
    @plugin.hook
    def around_query(query: Query, run: Any) -> Any:
        raise Forbidden("Not this one.")

    with launch(plugin).connect() as wire:
        reply = wire.arrow("select 1")
        assert (reply["code"], reply["error"]) == ("forbidden", "Not this one.")
