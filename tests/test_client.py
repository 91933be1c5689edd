"""The Python client, against real servers."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import psutil
import pyarrow as pa
import pytest
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from sqlrooms_server.client import (
    Client,
    ConnectionLost,
    Progress,
    QueryTimeout,
    RequestFailed,
    SessionEnded,
    connect,
)
from tests.conftest import LocalServer, ServerProcess
from tests.proxy import Proxy
from tests.test_queries import ENDLESS
from tests.wire import DEADLINE

LARGE = "select i, i * 2 as j from range(30000000) t(i)"


@pytest.fixture
def db(server: LocalServer) -> Iterator[Client]:
    with connect(server.url) as connected:
        yield connected


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """What ``call`` returns or raises, in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def failure(future: Future[Any]) -> BaseException | None:
    return future.exception(DEADLINE)


class Watch:
    """A progress function that others can wait for."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self.running = threading.Event()

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        if progress.state == "running":
            self.running.set()

    def wait(self) -> None:
        assert self.running.wait(DEADLINE)
        self.running.clear()


# Queries and results


def test_a_result_as_a_whole(db: Client) -> None:
    result = db.query("from (values (1, 'a'), (2, null)) t(i, s) order by i")
    assert result.schema.names == ["i", "s"]
    table = result.to_arrow()
    assert table.to_pydict() == {"i": [1, 2], "s": ["a", None]}
    assert result.to_pylist() == [{"i": 1, "s": "a"}, {"i": 2, "s": None}]
    assert result.to_arrow() is table
    assert [batch.num_rows for batch in result] == [2]
    assert not result.truncated
    assert result.summary is not None
    assert result.summary.rows == 2
    assert result.summary.bytes > 0
    assert result.summary.running_ms >= 0


def test_a_result_batch_by_batch(db: Client) -> None:
    result = db.query("from range(1000000)")
    assert result.summary is None
    assert sum(batch.num_rows for batch in result) == 1_000_000
    assert result.summary is not None
    assert result.summary.rows == 1_000_000
    assert list(result) == []
    with pytest.raises(RuntimeError, match="already"):
        result.to_arrow()


def test_results_without_rows_and_without_columns(db: Client) -> None:
    empty = db.query("select 1 as a where false")
    assert empty.schema == pa.schema([("a", pa.int32())])
    assert list(empty) == []
    assert db.query("select 1 as a where false").to_pylist() == []
    created = db.query("create table t(i int)")
    assert created.to_arrow().num_columns == 0
    assert list(created) == []
    assert created.summary is None
    assert db.rows("create table u(i int)") == []


def test_results_interleave(db: Client) -> None:
    first, second = iter(db.query(LARGE)), iter(db.query(LARGE))
    for _ in range(20):
        assert next(first).equals(next(second))
    assert db.rows("select 1 as a") == [{"a": 1}]


def test_parameters(db: Client) -> None:
    assert db.query("select ? + ? as a", [40, 2]).to_pylist() == [{"a": 42}]
    assert db.query("select $a + $b as c", {"a": 40, "b": 2}).to_pylist() == [{"c": 42}]
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    assert db.query("select ? as t, ? as b", [moment, b"\0x"]).to_pylist() == [
        {"t": moment, "b": b"\0x"}
    ]
    db.execute("create table t(i int)")
    db.execute("insert into t values (?)", [7])
    assert db.rows("from t where i = $i", {"i": 7}) == [{"i": 7}]
    with pytest.raises(TypeError, match=r"params\[0\]"):
        db.query("select ?", [object()])
    with pytest.raises(RequestFailed) as failed:
        db.query("select ?", [1, 2])
    assert failed.value.code == "bad_request"


def test_at_most_so_many_rows(db: Client) -> None:
    result = db.query("from range(100)", max_rows=10)
    assert result.to_arrow().num_rows == 10
    assert result.truncated
    assert result.summary is not None
    assert result.summary.truncated_by == "maxRows"
    assert len(db.rows("from range(100)", max_rows=10)) == 10


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_results(db: Client, compression: str) -> None:
    plain, small = (
        db.query("from range(100000)"),
        db.query("from range(100000)", compression=compression),
    )
    assert small.to_arrow().equals(plain.to_arrow())
    assert plain.summary is not None
    assert small.summary is not None
    assert small.summary.bytes < plain.summary.bytes


def test_pandas_is_asked_for_by_its_extra(db: Client) -> None:
    with patch.dict(sys.modules, {"pandas": None}):
        with pytest.raises(ImportError, match=r"sqlrooms-server\[pandas\]"):
            db.query("select 1").to_pandas()


def test_pandas(db: Client) -> None:
    pandas = pytest.importorskip("pandas")
    frame = db.query("select 1 as a").to_pandas()
    assert frame.equals(pandas.DataFrame({"a": [1]}, dtype="int32"))
    assert db.upload("t", frame) == 1


# Errors, cancelling, time


def test_errors_have_text_and_code(db: Client) -> None:
    for call in (db.query, db.rows, db.execute):
        with pytest.raises(RequestFailed, match="Parser Error") as failed:
            call("selec")
        assert failed.value.code == "query_error"
    assert db.rows("select 1 as a") == [{"a": 1}]


def test_an_error_after_the_first_batches(db: Client) -> None:
    result = db.query(
        "select 1 / (if(i < 2000000, 1, error('late')))::int as a from range(3000000) t(i)"
    )
    with pytest.raises(RequestFailed, match="late"):
        for _ in result:
            pass
    with pytest.raises(RequestFailed, match="late"):
        next(iter(result))


def test_rows_that_fail_half_way(db: Client) -> None:
    """What was sent of them is cut, and the connection is used on."""
    session = db.session()
    session.execute("set variable v = 1")
    with pytest.raises(RequestFailed, match="late"):
        db.rows("select if(i < 2000000, 1, error('late'))::int as a from range(3000000) t(i)")
    assert session.rows("select getvariable('v') as v") == [{"v": 1}]


def test_timeout(db: Client) -> None:
    for call in (db.query, db.rows, db.execute):
        with pytest.raises(QueryTimeout) as failed:
            call(ENDLESS, timeout=0.1)
        assert failed.value.code == "timeout"


def test_a_server_that_is_dead_is_noticed_by_the_timeout(
    serve: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlrooms_server.client.queries.GRACE_S", 0.1)
    server = serve()
    with connect(server.url) as db:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(QueryTimeout, match="did not answer"):
                db.query("select 1", timeout=0.1)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert db.rows("select 1 as a") == [{"a": 1}]


def test_progress(db: Client) -> None:
    watch = Watch()
    with pytest.raises(QueryTimeout):
        db.query(ENDLESS, timeout=1, progress=watch)
    assert watch.seen
    last = watch.seen[-1]
    assert last.state == "running"
    assert last.position is None
    assert last.running_ms >= 200


def test_an_error_of_the_progress_function_cancels(launch: Callable[..., LocalServer]) -> None:
    """It is none of the connection, even when it looks like one; the server has one worker."""

    def show(progress: Progress) -> None:
        raise BrokenPipeError

    with connect(launch(workers=1).url) as db:
        with pytest.raises(BrokenPipeError):
            db.query(ENDLESS, progress=show)
        assert db.rows("select 1 as a") == [{"a": 1}]


def test_cancel_by_id_and_by_result(db: Client) -> None:
    watch = Watch()
    waiting = in_thread(lambda: db.query(ENDLESS, query_id="mine", progress=watch))
    watch.wait()
    assert db.cancel("mine")
    failed = failure(waiting)
    assert isinstance(failed, RequestFailed)
    assert failed.code == "cancelled"
    assert not db.cancel("mine")

    result = db.query(LARGE)
    assert db.cancel(result)
    with pytest.raises(RequestFailed) as cancelled:
        result.to_arrow()
    assert cancelled.value.code == "cancelled"
    assert not result.cancel()


def test_an_id_that_is_in_use(db: Client) -> None:
    with db.query(LARGE, query_id="mine"):
        with pytest.raises(ValueError, match="'mine' is in use"):
            db.query("select 1", query_id="mine")
    # It is free again when the server has said the last word about it.
    while True:
        try:
            again = db.query("select 1 as a", query_id="mine")
        except ValueError:
            db.rows("select 1 as a")
        else:
            break
    assert again.to_pylist() == [{"a": 1}]


def test_results_that_are_left_are_cancelled(launch: Callable[..., LocalServer]) -> None:
    """While they were under way, the limit of this server would refuse everything else."""
    with connect(launch(max_in_flight=2).url) as db:
        with db.query(LARGE) as closed, db.query(LARGE):
            assert next(iter(closed)).num_rows
        with pytest.raises(RuntimeError, match="closed"):
            next(iter(closed))
        assert not_busy(lambda: db.rows("select 1 as a")) == [{"a": 1}]
        for _ in range(2):
            next(iter(not_busy(lambda: db.query(LARGE))))
        assert not_busy(lambda: db.rows("select 1 as a")) == [{"a": 1}]


def not_busy(call: Callable[[], Any]) -> Any:
    """What ``call`` returns when the server does not refuse it any more."""
    while True:
        try:
            return call()
        except RequestFailed as error:
            if error.code != "busy":
                raise


INTERRUPTED = f"""
import sys
from sqlrooms_server.client import connect
with connect(sys.argv[1]) as db:
    try:
        db.{{call}}("{ENDLESS}", progress=lambda progress: print(progress.state, flush=True))
    except KeyboardInterrupt:
        print("interrupted", db.rows("select 1 as a"), flush=True)
"""


@pytest.mark.parametrize("call", ["query", "rows", "execute"])
def test_ctrl_c_cancels(launch: Callable[..., LocalServer], call: str) -> None:
    """The server has one worker, so that the second query runs only after the first."""
    server = launch(workers=1)
    script = INTERRUPTED.format(call=call)
    with subprocess.Popen(
        [sys.executable, "-c", script, server.url], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().splitlines()[-1] == "interrupted [{'a': 1}]"
        assert process.wait(DEADLINE) == 0


INTERRUPTED_ANYWHERE = """
import random
import signal
import sys
import pyarrow as pa
from sqlrooms_server.client import connect

def interrupt(*_):
    raise KeyboardInterrupt

def consume():
    for _ in db.query("select i, i::varchar as s from range(1000000) t(i)"):
        pass

signal.signal(signal.SIGALRM, interrupt)
table = pa.table({"a": range(1_000_000)})
with connect(sys.argv[1]) as db:
    session = db.session()
    session.execute("set variable v = 1")
    calls = [
        consume,
        lambda: db.query("from range(1000000)").to_arrow(),
        lambda: db.rows("from range(20000)"),
        lambda: db.upload("t", table),
    ]
    for call in calls * 15:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.02))
            try:
                call()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
        assert db.rows("select 1 as a") == [{"a": 1}]
    # The session lives, and so does the first connection.
    print(session.rows("select getvariable('v') as v"))
"""


def test_ctrl_c_at_any_moment_leaves_the_connection_usable(server: LocalServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_ANYWHERE, server.url],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr) == ("[{'v': 1}]\n", "")


def test_a_slow_consumer_bounds_the_memory(serve: Callable[..., ServerProcess]) -> None:
    with connect(serve().url) as db:
        db.query("from range(1000000)").to_arrow()
        memory = psutil.Process().memory_info
        before = memory().rss
        rows = 0
        for number, batch in enumerate(db.query(LARGE)):
            rows += batch.num_rows
            if number in (0, 50):
                # Time in which everything that is not held back would arrive.
                for _ in range(50):
                    db.rows("select count(*) as n from range(1000000)")
            if number % 20 == 0:
                # The whole result has 480 MB.
                assert memory().rss - before < 100e6
        assert rows == 30_000_000


# Uploads


def test_uploads(db: Client) -> None:
    table = pa.table({"a": [1, 2]})
    assert db.upload("t", table) == 2
    assert db.query("from t order by a").to_arrow().equals(table)
    assert db.upload("t", table.to_reader(), mode="append") == 2
    assert db.rows("select count(*)::int as n from t") == [{"n": 4}]
    assert db.upload("t", pa.table({"b": ["x"]})) == 1
    assert db.rows("from t") == [{"b": "x"}]
    with pytest.raises(RequestFailed) as failed:
        db.upload("t", table, mode="create")
    assert failed.value.code == "conflict"
    assert db.upload("e", table.slice(0, 0)) == 0
    assert db.rows("from e") == []


def test_an_upload_is_streamed(serve: Callable[..., ServerProcess]) -> None:
    batch = pa.record_batch({"a": pa.array(range(500_000)), "b": pa.array(range(500_000))})
    with connect(serve().url) as db:
        db.upload("t", pa.table([batch["a"]], ["a"]))
        memory = psutil.Process().memory_info
        before = memory().rss
        peak = 0

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal peak
            for _ in range(30):
                yield batch
                peak = max(peak, memory().rss)

        reader = pa.RecordBatchReader.from_batches(batch.schema, batches())
        assert db.upload("t", reader) == 15_000_000
        # The whole upload has 240 MB.
        assert peak - before < 100e6
        assert db.rows("select count(*)::int as n from t") == [{"n": 15_000_000}]


def test_an_upload_whose_source_fails_leaves_the_table(db: Client) -> None:
    table = pa.table({"a": [1, 2]})
    db.upload("t", table)

    def batches() -> Iterator[pa.RecordBatch]:
        yield pa.record_batch({"a": pa.array(range(1_000_000))})
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        db.upload("t", pa.RecordBatchReader.from_batches(table.schema, batches()))
    assert db.query("from t").to_arrow().equals(table)


def test_an_upload_that_the_server_refuses_ends_early(db: Client) -> None:
    seen = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal seen
        for _ in range(1000):
            seen += 1
            yield pa.record_batch({"a": pa.array(range(200_000))})

    reader = pa.RecordBatchReader.from_batches(pa.schema([("a", pa.int64())]), batches())
    with pytest.raises(RequestFailed):
        db.upload("not a name!", reader)
    assert seen < 1000


UPLOADING = """
import sys
import pyarrow as pa
from sqlrooms_server.client import connect

batch = pa.record_batch({"a": pa.array(range(100_000))})

def batches():
    yield batch
    print("uploading", flush=True)
    while True:
        yield batch

with connect(sys.argv[1]) as db:
    try:
        db.upload("t", pa.RecordBatchReader.from_batches(batch.schema, batches()))
    except KeyboardInterrupt:
        print("interrupted", db.rows("from t"), flush=True)
"""


def test_ctrl_c_cancels_an_upload(db: Client, server: LocalServer) -> None:
    db.upload("t", pa.table({"a": [1]}))
    with subprocess.Popen(
        [sys.executable, "-c", UPLOADING, server.url], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "uploading\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted [{'a': 1}]\n"
        assert process.wait(DEADLINE) == 0


# Sessions


def test_sessions(db: Client) -> None:
    with db.session() as session:
        session.execute("create temp table t as select 1 as i")
        session.execute("set variable v = 5")
        assert session.rows("select i, getvariable('v') as v from t") == [{"i": 1, "v": 5}]
        with pytest.raises(RequestFailed, match="t does not exist"):
            db.query("from t")
    with pytest.raises(SessionEnded, match="begin a new one") as ended:
        session.query("from t")
    assert ended.value.code == "gone"
    assert not session.close()
    named = db.session("mine")
    assert named.name == "mine"
    assert named.query("select 1 as a").to_pylist() == [{"a": 1}]
    assert named.close()


def test_transactions(db: Client) -> None:
    db.execute("create table t(i int)")
    with db.session() as session:
        with session.transaction():
            session.execute("insert into t values (1)")
            assert db.rows("from t") == []
        assert db.rows("from t") == [{"i": 1}]
        with pytest.raises(KeyError):
            with session.transaction():
                session.execute("insert into t values (2)")
                raise KeyError
        with pytest.raises(RequestFailed):
            with session.transaction():
                session.execute("insert into t values ('x')")
        assert session.rows("from t") == [{"i": 1}]


def test_a_result_of_a_session_is_not_in_the_way(db: Client) -> None:
    """Queries of a session run one after the other, and the server waits for the consumer."""
    with db.session() as session:
        result = session.query("from range(5000000)")
        batches = iter(result)
        first = next(batches).num_rows
        assert session.rows("select 1 as a") == [{"a": 1}]
        assert first + sum(batch.num_rows for batch in batches) == 5_000_000
        session.query(LARGE)
    assert db.rows("select 1 as a") == [{"a": 1}]


# Connections


def test_tokens(launch: Callable[..., LocalServer]) -> None:
    server = launch(auth_token="right")
    with connect(server.url, token="right") as db:
        assert db.rows("select 1 as a") == [{"a": 1}]
    for token in ("wrong", None):
        with pytest.raises(RequestFailed) as failed:
            connect(server.url, token=token)
        assert failed.value.code == "unauthorized"


def test_several_threads(db: Client) -> None:
    def ask(number: int) -> None:
        for _ in range(20):
            assert db.rows(f"select {number} as n") == [{"n": number}]
            assert db.query(f"select {number} as n").to_pylist() == [{"n": number}]

    for future in [in_thread(lambda number=number: ask(number)) for number in range(8)]:  # type: ignore[misc]
        assert failure(future) is None


def test_a_closed_server_fails_what_waits(launch: Callable[..., LocalServer]) -> None:
    server = launch()
    with connect(server.url) as db:
        watch = Watch()
        asking = in_thread(lambda: db.execute(ENDLESS, progress=watch))
        watch.wait()
        server.server.stop()
        failed = failure(asking)
        assert isinstance(failed, RequestFailed)
        assert failed.code == "shutting_down"
        with pytest.raises(ConnectionLost):
            db.execute("create table t(i int)")


def test_a_closed_client(server: LocalServer) -> None:
    with connect(server.url) as db:
        result = db.query(LARGE)
    for call in (db.query, db.rows, db.execute):
        with pytest.raises(ConnectionLost, match="closed"):
            call("select 1")
    with pytest.raises(ConnectionLost):
        result.to_arrow()
    assert not db.cancel("x")
    assert "sqlrooms-client" not in [thread.name for thread in threading.enumerate()]


def test_a_message_that_the_server_does_not_read(launch: Callable[..., LocalServer]) -> None:
    """The error that answers it has no id."""
    server = launch(max_sql_length=1024)
    with connect(server.url) as db:
        for call in (db.query, db.rows, db.execute):
            with pytest.raises(RequestFailed) as failed:
                call(f"select '{'x' * 10_000_000}'")
            assert failed.value.code == "too_large"
        assert db.rows("select 1 as a") == [{"a": 1}]


@contextmanager
def killed(
    serve: Callable[..., ServerProcess], server: ServerProcess, proxy: Proxy
) -> Iterator[None]:
    """In the block the server is dead; after it another one is at its address."""
    server.stop(signal.SIGKILL)
    yield
    proxy.port = serve().port


def test_reads_are_sent_again_after_a_lost_connection(
    serve: Callable[..., ServerProcess],
) -> None:
    server = serve()
    with Proxy(server.port) as proxy, connect(proxy.url) as db:
        watch = Watch()
        reading = in_thread(lambda: db.query(ENDLESS, query_id="mine", progress=watch))
        counting = in_thread(lambda: db.rows(ENDLESS, query_id="other"))
        watch.wait()
        with killed(serve, server, proxy):
            late = in_thread(lambda: db.query("select 1 as a", timeout=DEADLINE).to_pylist())
        assert late.result(DEADLINE) == [{"a": 1}]
        watch.wait()
        assert db.cancel("mine")
        while not db.cancel("other"):
            pass
        for future in (reading, counting):
            failed = failure(future)
            assert isinstance(failed, RequestFailed)
            assert failed.code == "cancelled"


def test_what_is_no_read_is_not_sent_again(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with Proxy(server.port) as proxy, connect(proxy.url) as db:
        session = db.session()
        session.execute("begin")
        batches = iter(db.query(LARGE))
        next(batches)
        watch = Watch()
        changing = in_thread(lambda: db.execute(f"create table t as {ENDLESS}", progress=watch))
        watch.wait()
        with killed(serve, server, proxy):
            assert isinstance(failure(changing), ConnectionLost)
            with pytest.raises(ConnectionLost):
                for _ in batches:
                    pass
            with pytest.raises(ConnectionLost):
                db.execute("create table t(i int)")
        db.execute("create table t(i int)")
        assert db.rows("from t") == []
        for _ in range(2):
            with pytest.raises(SessionEnded):
                session.execute("insert into t values (1)")


def test_a_wrong_token_is_not_tried_again(serve: Callable[..., ServerProcess]) -> None:
    server = serve(environment={"SQLROOMS_AUTH_TOKEN": "first"})
    with Proxy(server.port) as proxy, connect(proxy.url, token="first") as db:
        server.stop(signal.SIGKILL)
        proxy.port = serve(environment={"SQLROOMS_AUTH_TOKEN": "second"}).port
        with pytest.raises(RequestFailed) as failed:
            db.query("select 1")
        assert failed.value.code == "unauthorized"


def test_attempts_end_with_the_timeout(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    with connect(server.url) as db:
        server.stop(signal.SIGKILL)
        with pytest.raises(ConnectionLost):
            db.query("select 1", timeout=0.5)


def test_nothing_listens() -> None:
    with pytest.raises(OSError):
        connect("ws://127.0.0.1:9")
    with pytest.raises(ValueError, match="no address"):
        connect("localhost")


def answering(reply: str) -> Callable[[ServerConnection], None]:
    def answer(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(reply)

    return answer


def test_a_server_that_speaks_something_else_is_refused() -> None:
    with serve_websocket(answering("[1, 2"), "127.0.0.1", 0) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        port = other.socket.getsockname()[1]
        with pytest.raises(ConnectionLost, match="no reply"):
            connect(f"ws://127.0.0.1:{port}")
        other.shutdown()
        thread.join()
