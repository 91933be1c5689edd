"""Uploads in chunks: cut anywhere, whole or not at all, in bounded memory."""

from __future__ import annotations

import io
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from sqlrooms_server.features.uploads import MAX_UPLOADS
from sqlrooms_server.settings import UPLOAD_WINDOW_BYTES
from tests.conftest import LocalServer, ServerProcess
from tests.test_queries import ENDLESS
from tests.wire import Wire, framed, ipc

TABLE = pa.table(
    {
        "i": pa.array(range(5000), pa.int64()),
        "s": pa.array([None if n % 7 == 0 else f"text {n}" for n in range(5000)]),
        "l": pa.array([[n, None] for n in range(5000)], pa.list_(pa.int32())),
        "d": pa.array([f"word {n % 5}" for n in range(5000)]).dictionary_encode(),
    }
)


def send_chunk(wire: Wire, body: bytes, seq: int, last: bool, **header: Any) -> None:
    fields = {"type": "uploadArrow", "queryId": "u", "seq": seq, "last": last, **header}
    if seq == 0:
        fields.setdefault("tableName", "t")
    wire.send_raw(framed(fields, body))


def answer(wire: Wire) -> Any:
    """The next message that is no progress."""
    while True:
        reply = wire.receive()
        if isinstance(reply, dict) and reply["type"] == "uploadProgress":
            continue
        return reply


def upload(wire: Wire, body: bytes, size: int = 1 << 20, **header: Any) -> Any:
    """Send ``body`` in chunks of ``size`` bytes, without waiting, and return the answer."""
    starts = range(0, max(1, len(body)), size)
    for seq, start in enumerate(starts):
        send_chunk(wire, body[start : start + size], seq, start + size >= len(body), **header)
    return answer(wire)


def several_batches(table: pa.Table, rows: int = 700) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


@pytest.mark.parametrize("size", [1 << 20, 10_000, 997, 64])
def test_chunks_of_any_size_make_the_table(wire: Wire, size: int) -> None:
    reply = upload(wire, several_batches(TABLE), size)
    assert reply == {"type": "uploadAck", "queryId": "u", "rows": 5000}
    assert wire.table("from t order by i").to_pylist() == TABLE.to_pylist()


def test_a_stream_cut_at_every_byte(wire: Wire) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    assert upload(wire, ipc(table), 1)["rows"] == 2
    assert wire.table("from t").to_pylist() == table.to_pylist()


def test_a_stream_as_arrow_wrote_them_before_0_15(wire: Wire) -> None:
    """Its messages have no mark before their length, and its end is four bytes, not eight."""
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    for size in (1, 1 << 20):
        assert upload(wire, sink.getvalue(), size)["rows"] == 2
        assert wire.table("from t").to_pylist() == table.to_pylist()


def test_random_cuts(wire: Wire) -> None:
    body = several_batches(TABLE)
    chance = random.Random(7)
    for _ in range(10):
        cuts = sorted({chance.randrange(1, len(body)) for _ in range(chance.randrange(1, 30))})
        edges = [0, *cuts, len(body)]
        for seq in range(len(edges) - 1):
            last = seq == len(edges) - 2
            send_chunk(wire, body[edges[seq] : edges[seq + 1]], seq, last)
        assert answer(wire)["rows"] == 5000


def test_the_last_chunk_may_be_empty(wire: Wire) -> None:
    send_chunk(wire, ipc(TABLE), 0, False)
    send_chunk(wire, b"", 1, True)
    assert answer(wire)["rows"] == 5000


def test_an_empty_table(wire: Wire) -> None:
    assert upload(wire, ipc(TABLE.slice(0, 0)), 100)["rows"] == 0
    assert wire.table("from t").schema.names == TABLE.schema.names


def test_progress_counts_what_was_consumed(wire: Wire) -> None:
    body = several_batches(TABLE)
    middle = len(body) // 2
    send_chunk(wire, body[:middle], 0, False)
    assert wire.receive() == {"type": "uploadProgress", "queryId": "u", "bytes": middle}
    send_chunk(wire, body[middle:], 1, True)
    assert wire.receive() == {"type": "uploadProgress", "queryId": "u", "bytes": len(body)}
    assert wire.receive()["type"] == "uploadAck"


def test_create_refuses_a_table_that_is_there(wire: Wire) -> None:
    assert upload(wire, ipc(TABLE), mode="create")["rows"] == 5000
    reply = upload(wire, ipc(TABLE), mode="create")
    assert reply["code"] == "conflict" and "already exists" in reply["error"]
    whole = wire.upload(TABLE, tableName="t", queryId="w", mode="create")
    assert whole["code"] == "conflict"
    assert wire.rows("select count(*) as n from t") == [{"n": 5000}]


def test_append_matches_columns_by_name(wire: Wire) -> None:
    wire.exec("create table t(a int, b varchar default 'none', c int)")
    assert upload(wire, ipc(pa.table({"c": [3], "a": [1]})), 50, mode="append")["rows"] == 1
    whole = wire.upload(pa.table({"a": [2]}), tableName="t", queryId="w", mode="append")
    assert whole == {"type": "uploadAck", "queryId": "w"}
    assert wire.rows("from t order by a") == [
        {"a": 1, "b": "none", "c": 3},
        {"a": 2, "b": "none", "c": None},
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"unknown": [1]}), "unknown"),
        (pa.table({"a": ["no number"]}), "no number"),
    ],
)
def test_append_of_what_does_not_fit(wire: Wire, table: pa.Table, message: str) -> None:
    wire.exec("create table t as select 1::int as a")
    for reply in (
        upload(wire, ipc(table), mode="append"),
        wire.upload(table, tableName="t", queryId="w", mode="append"),
    ):
        assert reply["code"] == "query_error" and message in reply["error"]
    assert wire.rows("from t") == [{"a": 1}]


def test_append_to_no_table(wire: Wire) -> None:
    reply = upload(wire, ipc(TABLE), mode="append")
    assert reply["code"] == "query_error" and "t does not exist" in reply["error"]


def test_names_in_schemas(wire: Wire) -> None:
    wire.exec("create schema \"my schema\"; attach ':memory:' as other")
    for name in ('"my schema"."a ""table"""', "other.main.t", "memory.main.t"):
        for mode in ("replace", "replace", "append"):
            assert upload(wire, ipc(TABLE), tableName=name, mode=mode)["rows"] == 5000
        assert wire.rows(f"select count(*) as n from {name}") == [{"n": 10000}]


def test_a_failed_upload_leaves_the_old_table(wire: Wire) -> None:
    wire.exec("create table t as select 42 as i")
    body = several_batches(TABLE)
    cut = len(body) * 2 // 3
    for mode in ("replace", "append"):
        reply = upload(wire, body[:cut], 5000, mode=mode)
        assert reply["type"] == "error", reply
    reply = upload(wire, body[:cut], 5000)
    assert reply["code"] == "bad_request" and "middle of a message" in reply["error"]
    assert wire.rows("from t") == [{"i": 42}]
    assert wire.rows("select count(*) as n from duckdb_tables() where not internal") == [{"n": 3}]


@pytest.mark.parametrize(
    ("seqs", "message"),
    [([0, 2], "seq 1 was expected, not 2"), ([0, 1, 1], "seq 2 was expected, not 1")],
)
def test_chunks_out_of_order(wire: Wire, seqs: list[int], message: str) -> None:
    body = ipc(TABLE)
    for seq in seqs:
        send_chunk(wire, body[:100], seq, False)
    reply = answer(wire)
    assert reply["code"] == "bad_request" and message in reply["error"]
    # What follows of it is ignored, and a new one may begin.
    send_chunk(wire, body, 3, False)
    send_chunk(wire, body, 4, True)
    assert upload(wire, body)["rows"] == 5000
    send_chunk(wire, body, 1, True)
    assert "begins with seq 0" in answer(wire)["error"]


def test_more_after_the_end(wire: Wire) -> None:
    reply = upload(wire, ipc(TABLE) + b"more of it")
    assert reply["code"] == "bad_request" and "after the end" in reply["error"]


def test_cancel_while_the_client_waits(wire: Wire) -> None:
    wire.exec("create table t as select 42 as i")
    body = several_batches(TABLE)
    send_chunk(wire, body[:20_000], 0, False)
    assert wire.receive()["type"] == "uploadProgress"
    wire.send(type="cancel", queryId="u")
    replies = [answer(wire), answer(wire)]
    assert {"type": "cancelAck", "queryId": "u", "cancelled": True} in replies
    assert [reply["code"] for reply in replies if reply["type"] == "error"] == ["cancelled"]
    send_chunk(wire, body[20_000:], 1, True)
    assert wire.rows("from t") == [{"i": 42}]


def test_a_lost_connection_rolls_back(server: LocalServer) -> None:
    with server.connect() as other:
        other.exec("create table t as select 42 as i")
        with server.connect() as wire:
            send_chunk(wire, several_batches(TABLE)[:20_000], 0, False)
            assert wire.receive()["type"] == "uploadProgress"
        while server.server.scheduler._jobs:
            time.sleep(0.001)
        assert other.rows("from t") == [{"i": 42}]
        assert upload(other, ipc(TABLE))["rows"] == 5000


def test_an_upload_that_does_not_go_on(launch: Callable[..., LocalServer]) -> None:
    server = launch(stream_idle_timeout=1)
    with server.connect() as wire:
        send_chunk(wire, ipc(TABLE)[:100], 0, False)
        reply = answer(wire)
        assert reply["code"] == "timeout" and "--stream-idle-timeout" in reply["error"]
        assert wire.rows("select 1 as a") == [{"a": 1}]


def test_waiting_uploads_hold_no_worker(launch: Callable[..., LocalServer]) -> None:
    server = launch(workers=1)
    body = several_batches(TABLE)
    with server.connect() as wire:
        for number in range(8):
            send_chunk(wire, body[:20_000], 0, False, queryId=number, tableName=f"t{number}")
            assert wire.receive()["type"] == "uploadProgress"
        assert wire.rows("select 1 as a") == [{"a": 1}]
        for number in range(8):
            send_chunk(wire, body[20_000:], 1, True, queryId=number)
            assert answer(wire)["rows"] == 5000


def test_a_client_that_does_not_wait_is_refused(launch: Callable[..., LocalServer]) -> None:
    """With the only worker busy nothing is consumed, and what waits is bounded."""
    server = launch(workers=1)
    with server.connect() as wire, server.connect() as busy:
        busy.send(type="arrow", sql=ENDLESS, queryId="b")
        while not server.server.scheduler._began:
            time.sleep(0.001)
        for seq in range(6):
            send_chunk(wire, bytes(UPLOAD_WINDOW_BYTES // 4), seq, False)
        reply = answer(wire)
        assert reply["code"] == "too_large" and "limits.uploadWindow" in reply["error"]
        busy.send(type="cancel", queryId="b")
        assert wire.rows("select 1 as a") == [{"a": 1}]


def test_too_many_uploads_at_one_time(wire: Wire) -> None:
    body = several_batches(TABLE)
    for number in range(MAX_UPLOADS + 1):
        send_chunk(wire, body[:100], 0, False, queryId=number, tableName=f"t{number}")
    refused = answer(wire)
    assert refused["code"] == "busy" and refused["queryId"] == MAX_UPLOADS
    send_chunk(wire, body[100:], 1, True, queryId=MAX_UPLOADS)
    send_chunk(wire, body[100:], 1, True, queryId=0)
    assert answer(wire) == {"type": "uploadAck", "queryId": 0, "rows": 5000}


@pytest.mark.parametrize("rows", [10, 5000, 1 << 17])
def test_statistics_of_an_uploaded_table(wire: Wire, rows: int) -> None:
    """DuckDB forgot the rows, or their sum, of a table made empty in the same transaction."""
    table = pa.table({"a": pa.array(range(rows), pa.int64()), "n": pa.nulls(rows)})
    for mode in ("create", "replace", "append"):
        assert upload(wire, several_batches(table, 1 << 16), mode=mode)["rows"] == rows
        times = 2 if mode == "append" else 1
        assert wire.rows("select count(*) n, count(a) c, sum(a) s, max(a) m from t") == [
            {"n": times * rows, "c": times * rows, "s": times * sum(range(rows)), "m": rows - 1}
        ]


def test_concurrent_uploads_of_one_table(server: LocalServer) -> None:
    """The last to end wins, or is told of the conflict; the table is whole in any case."""
    body = several_batches(TABLE)
    with server.connect() as one, server.connect() as two:
        for wire in (one, two):
            send_chunk(wire, body[:20_000], 0, False)
            assert wire.receive()["type"] == "uploadProgress"
        for wire in (one, two):
            send_chunk(wire, body[20_000:], 1, True)
        replies = [answer(one), answer(two)]
        assert any(reply["type"] == "uploadAck" for reply in replies)
        for reply in replies:
            assert reply["type"] == "uploadAck" or reply["code"] == "conflict", reply
        assert one.rows("select count(*) as n from t") == [{"n": 5000}]


def batches(count: int, rows: int) -> Iterator[bytes]:
    """An IPC stream of ``count`` batches of ``rows`` integers, piece by piece."""
    batch = pa.record_batch({"a": pa.array(range(rows), pa.int64())})
    yield batch.schema.serialize().to_pybytes()
    message = batch.serialize().to_pybytes()
    for _ in range(count):
        yield message
    yield b"\xff\xff\xff\xff\0\0\0\0"


def test_a_large_upload_in_bounded_memory(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """400 MB to a file, while the server grows by far less."""
    server = serve("--db-path", str(tmp_path / "a.duckdb"), "--memory-limit", "300MB")
    with server.connect() as wire:
        upload(wire, ipc(TABLE))
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        peak = sent = consumed = 0
        pieces = list(batches(1, 1 << 17))
        count = 400
        stream = [pieces[0], *[pieces[1]] * count, pieces[2]]
        for seq, piece in enumerate(stream):
            while sent - consumed + len(piece) > UPLOAD_WINDOW_BYTES:
                consumed = wire.receive()["bytes"]
            send_chunk(wire, piece, seq, seq == len(stream) - 1, tableName="big")
            sent += len(piece)
            if seq % 20 == 0:
                peak = max(peak, process.memory_info().rss)
        assert answer(wire)["rows"] == count << 17
        assert peak - before < 400 << 20
        assert wire.rows("select count(*) as n from big") == [{"n": count << 17}]


@pytest.mark.parametrize("mode", ["replace", "append"])
def test_what_was_acknowledged_survives_a_kill(
    serve: Callable[..., ServerProcess], tmp_path: Path, mode: str
) -> None:
    path = str(tmp_path / "a.duckdb")
    server = serve("--db-path", path)
    with server.connect() as wire:
        wire.exec("create table t(i bigint, s varchar, l int[], d varchar)")
        assert upload(wire, several_batches(TABLE), mode=mode)["rows"] == 5000
        send_chunk(wire, several_batches(TABLE)[:50_000], 0, False, queryId="half")
        assert wire.receive()["type"] == "uploadProgress"
        server.stop(signal.SIGKILL)
    again = serve("--db-path", path)
    with again.connect() as wire:
        assert wire.table("from t order by i").to_pylist() == TABLE.to_pylist()
        tables = wire.rows("select table_name as n from duckdb_tables() where schema_name = 'main'")
        assert tables == [{"n": "t"}]


def test_empty_batches_hide_nothing(wire: Wire) -> None:
    """1.5 hides rows that follow an insert of none in one transaction."""
    batch = pa.record_batch({"a": pa.array(range(1 << 17), pa.int64())})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for part in (batch.slice(0, 0), batch, batch.slice(0, 0), batch):
            writer.write_batch(part)
    for mode in ("replace", "append"):
        assert upload(wire, sink.getvalue(), mode=mode)["rows"] == 2 << 17
    assert wire.rows("select count(*) as n from t") == [{"n": 4 << 17}]


def test_a_malformed_chunk_ends_its_upload(wire: Wire) -> None:
    """One final answer, and the rest is ignored."""
    body = several_batches(TABLE)
    send_chunk(wire, body[:20_000], 0, False)
    send_chunk(wire, b"", 1, False)
    reply = answer(wire)
    assert reply["code"] == "bad_request" and "needs a body" in reply["error"]
    send_chunk(wire, body[20_000:], 1, True)
    assert wire.rows("select 1 as a") == [{"a": 1}]
    assert upload(wire, body)["rows"] == 5000


def test_an_upload_under_the_id_of_a_query(wire: Wire) -> None:
    """What follows its first chunk says nothing about the query."""
    wire.send(type="arrow", sql=ENDLESS, queryId="u")
    body = several_batches(TABLE)
    for seq in range(3):
        send_chunk(wire, body[seq * 1000 : seq * 1000 + 1000], seq, seq == 2)
    assert answer(wire)["code"] == "conflict"
    replies = [wire.request(type="cancel", queryId="u"), wire.receive()]
    assert {reply["type"] for reply in replies} == {"cancelAck", "error"}


def test_the_rest_of_an_upload_without_a_beginning(wire: Wire) -> None:
    send_chunk(wire, b"x", 0, False, tableName="a b")
    assert wire.receive()["queryId"] == "u"
    send_chunk(wire, b"x", 1, True)
    reply = wire.receive()
    assert reply["code"] == "bad_request" and "queryId" not in reply


def test_an_upload_that_drips_holds_no_worker(launch: Callable[..., LocalServer]) -> None:
    """Its pieces come faster than the worker's patience ends, but no batch does."""
    server = launch(workers=1)
    first = ipc(pa.table({"a": [1]}))[:-8]
    large = pa.record_batch({"a": pa.array(range(1 << 17), pa.int64())}).serialize().to_pybytes()
    with server.connect() as wire, server.connect() as other:
        send_chunk(wire, first, 0, False)
        other.send(type="json", sql="select 1 as a", queryId="j")
        answered = threading.Event()

        def wait() -> None:
            assert other.receive()["type"] == "json"
            answered.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        for seq in range(1, 5000):
            send_chunk(wire, large[seq : seq + 1], seq, False)
            if answered.wait(0.002):
                break
        waiter.join()
        wire.send(type="cancel", queryId="u")
        replies = [answer(wire), answer(wire)]
        assert {reply["type"] for reply in replies} == {"cancelAck", "error"}
