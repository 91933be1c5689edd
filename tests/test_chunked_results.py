"""Results in chunks: whole, within their window, and no burden for anybody else."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pyarrow as pa
import pytest

from tests.conftest import LocalServer, ServerProcess
from tests.streams import Stream, Streams, stream
from tests.test_large_results import abort
from tests.wire import DEADLINE, Arrow, Wire

MILLION = "select i, i * 2 as j, 'text ' || i as s from range(1000000) t(i)"
ENDLESS_ROWS = "select i, 'some text ' || i as s from range(10000000000) t(i)"
# 12 MB: more than the outbox and the socket hold.
BIG = "select i, i * 2 as j from range(800000) t(i)"

SQLS = [
    "select 1 as a, 'x' as b",
    "select 1 as a where false",
    "select i, i::varchar as s from range(3000) t(i)",
    "select [i, i + 1] as l, {'a': i, 'b': [i::varchar]} as s from range(100000) t(i)",
    "select repeat('x', 3000000) as a from range(3)",
    "select (['sad', 'ok'])[1 + i % 2]::enum('sad', 'ok') as m, i from range(300000) t(i)",
    MILLION,
    "create or replace table made as select 1 as i; insert into made values (2), (3) returning i",
    "create or replace table made as select range as i from range(7)",
]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def jobs_of(server: LocalServer) -> Any:
    return server.server.scheduler._jobs


@pytest.mark.parametrize("sql", SQLS)
def test_the_chunks_joined_are_the_message(wire: Wire, sql: str) -> None:
    whole = wire.arrow(sql)
    chunked = stream(wire, sql)
    assert bytes(chunked.body) == whole.body
    assert chunked.summary is not None
    assert chunked.summary["rows"] == whole.table().num_rows


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("sql", SQLS[:7])
def test_compressed_chunks_joined_are_the_message(wire: Wire, sql: str, compression: str) -> None:
    whole = wire.request(type="arrow", sql=sql, queryId=1, compression=compression)
    chunked = stream(wire, sql, compression=compression)
    assert bytes(chunked.body) == whole.body
    assert chunked.table().equals(wire.table(sql))


def test_the_summary(wire: Wire) -> None:
    summary = stream(wire, MILLION, query_id=7).summary
    assert summary is not None
    assert set(summary) == {"type", "queryId", "seq", "last", "rows", "bytes", "ms"}
    assert (summary["type"], summary["queryId"], summary["last"]) == ("arrow", 7, True)
    assert summary["rows"] == 1_000_000
    assert set(summary["ms"]) == {"queued", "running", "sending"}
    assert all(value >= 0 for value in summary["ms"].values())
    assert summary["ms"]["running"] > 0


def test_a_truncated_stream_says_so(wire: Wire) -> None:
    cut = stream(wire, MILLION, maxRows=100_001)
    assert cut.table().num_rows == 100_001
    assert cut.summary is not None
    assert (cut.summary["truncated"], cut.summary["truncatedBy"]) == (True, "maxRows")
    assert cut.summary["rows"] == 100_001


@pytest.mark.parametrize("sql", ["create table t(i int)", "set threads = 2", "", "-- nothing"])
def test_what_has_nothing_to_tell_is_ok(wire: Wire, sql: str) -> None:
    reply = wire.request(type="arrow", sql=sql, queryId=1, stream=True)
    assert reply == {"type": "ok", "queryId": 1}


def test_an_empty_result_is_a_stream_of_its_schema(wire: Wire) -> None:
    empty = stream(wire, "select 1 as a, 'x' as b where false")
    assert empty.table().schema.names == ["a", "b"]
    assert empty.summary is not None
    assert empty.summary["rows"] == 0


@pytest.mark.parametrize(
    ("window", "sql"),
    [
        (1, "select 1 as a"),
        (7, "select range as a from range(100)"),
        (1000, "select range as a from range(10000)"),
        (1 << 20, BIG),
    ],
)
def test_never_more_than_the_window_is_under_way(wire: Wire, window: int, sql: str) -> None:
    streams = Streams(wire)
    asked = streams.ask(sql, window=window)
    acked = 0
    while not asked.ended:
        streams.receive()
        assert len(asked.body) - acked <= window
        if len(asked.body) - acked == window and not asked.ended:
            if len(asked.sizes) < 20:
                size = len(asked.body)
                streams.settle()
                assert len(asked.body) == size
            streams.ack(asked)
            acked = len(asked.body)
        elif len(asked.sizes) % 3 == 0 and not asked.ended:
            # A part of what came, so that windows end at odd places.
            acked += (len(asked.body) - acked) // 2
            wire.send(type="ack", queryId="s", bytes=acked)
    assert bytes(asked.body) == wire.arrow(sql).body


def test_an_ack_of_more_than_was_sent_ends_the_stream(wire: Wire) -> None:
    """One answer only: whoever counts wrong has lost the result."""
    streams = Streams(wire)
    asked = streams.ask(MILLION, window=1000)
    while len(asked.body) < 1000:
        streams.receive()
    wire.send(type="ack", queryId="s", bytes=1001)
    streams.finish()
    assert asked.code == "bad_request"
    assert asked.error is not None
    assert "ack of 1001 bytes, but only 1000 were sent" in asked.error["error"]
    streams.settle()
    assert stream(wire, "select 1 as a").table().to_pydict() == {"a": [1]}


@pytest.mark.parametrize("size", [-1, 1.5, "5", None, True, [], 2**63, {}])
def test_a_malformed_ack_leaves_the_stream_alone(wire: Wire, size: Any) -> None:
    streams = Streams(wire)
    asked = streams.ask("select range as a from range(1000)", window=1000)
    while len(asked.body) < 1000:
        streams.receive()
    wire.send(type="ack", queryId="s", bytes=size)
    error = streams.until("error")
    assert error["code"] == "bad_request"
    assert "bytes" in error["error"]
    assert "queryId" not in error
    streams.ack(asked)
    streams.finish(acks=True)
    assert asked.table().num_rows == 1000


def test_acks_that_change_nothing_are_ignored(wire: Wire) -> None:
    """Those that come twice, late, for less, for nothing, and for results that are no chunks."""
    streams = Streams(wire)
    asked = streams.ask("select range as a from range(50000)", window=1000)
    while len(asked.body) < 1000:
        streams.receive()
    for size in (0, 500, 1000, 1000, 400, 0):
        wire.send(type="ack", queryId="s", bytes=size)
    streams.finish(acks=True)
    for query_id in ("s", "unknown", 5):
        wire.send(type="ack", queryId=query_id, bytes=10**6)
    wire.send(type="exec", sql="select count(*) from range(10000000)", queryId="e")
    wire.send(type="ack", queryId="e", bytes=10)
    assert wire.receive() == {"type": "ok", "queryId": "e"}
    streams.settle()
    assert not streams.others
    assert asked.table().num_rows == 50_000


def test_nobody_acknowledges_the_stream_of_another(server: LocalServer) -> None:
    with server.connect() as owner, server.connect() as other:
        streams = Streams(owner)
        asked = streams.ask(BIG, window=1000)
        while len(asked.body) < 1000:
            streams.receive()
        other.send(type="ack", queryId="s", bytes=1000)
        other.request(type="hello")
        streams.settle()
        assert len(asked.body) == 1000


def test_two_streams_interleave(wire: Wire) -> None:
    streams = Streams(wire)
    order: list[Any] = []
    first = streams.ask(MILLION, 1, window=1 << 20)
    second = streams.ask(MILLION, 2, window=1 << 20)
    while not (first.ended and second.ended):
        received = streams.receive()
        assert received is not None
        order.append(received.query_id)
        if not received.ended:
            streams.ack(received)
    assert first.body == second.body
    # Neither waits for the end of the other.
    assert order.index(2) < len(order) - 1 - order[::-1].index(1)
    assert order.index(1) < len(order) - 1 - order[::-1].index(2)


def test_a_cancel_is_answered_while_ten_streams_run(wire: Wire) -> None:
    streams = Streams(wire)
    for number in range(10):
        streams.ask(ENDLESS_ROWS, number)
    while any(not asked.sizes for asked in streams.of.values()):
        streams.receive()
    wire.send(type="cancel", queryId=0)
    assert streams.until("cancelAck") == {"type": "cancelAck", "queryId": 0, "cancelled": True}
    assert [number for number, asked in streams.of.items() if asked.ended] in ([], [0])
    for number in range(1, 10):
        wire.send(type="cancel", queryId=number)
    streams.finish()
    assert {asked.code for asked in streams.of.values()} == {"cancelled"}


def test_fifty_streams_at_once(wire: Wire) -> None:
    streams = Streams(wire)
    for number in range(50):
        options = {"window": 50_000} if number % 2 else {}
        streams.ask(f"select range + {number} as a from range({number * 1000})", number, **options)
    streams.finish(acks=True)
    for number, asked in streams.of.items():
        table = asked.table()
        assert table.num_rows == number * 1000
        assert table["a"].to_pylist() == list(range(number, number * 1001))


def test_stalled_streams_hold_nobody_up(launch: Callable[..., LocalServer]) -> None:
    """One worker, twenty streams of one connection that wait for their client."""
    server = launch(workers=1)
    with server.connect() as wire, server.connect() as beside:
        streams = Streams(wire)
        for number in range(20):
            streams.ask(ENDLESS_ROWS, number, window=1000)
        while any(len(asked.body) < 1000 for asked in streams.of.values()):
            streams.receive()
        assert beside.rows("select 1 as a") == [{"a": 1}]
        assert wire.rows("select 2 as a") == [{"a": 2}]
        wire.exec("create table t as select 3 as i")
        assert wire.table(BIG).num_rows == 800_000
        assert stream(wire, BIG, query_id="more", window=1 << 20).table().num_rows == 800_000
        for number in range(20):
            wire.send(type="cancel", queryId=number)
        streams.finish()
        assert {asked.code for asked in streams.of.values()} == {"cancelled"}
        wait_until(lambda: not jobs_of(server))


def test_more_stalled_streams_than_may_begin(launch: Callable[..., LocalServer]) -> None:
    """The rest of them waits, and begins when one ends; other queries do not wait."""
    server = launch()
    with server.connect() as wire:
        streams = Streams(wire)
        for number in range(100):
            streams.ask("select range as a from range(5000)", number, window=1000)
        assert wire_rows_between(streams, "select 1 as a") == '[{"a":1}]'
        streams.finish(acks=True)
        assert {len(asked.table()) for asked in streams.of.values()} == {5000}


def wire_rows_between(streams: Streams, sql: str) -> Any:
    streams.wire.send(type="json", sql=sql, queryId="between")
    return streams.until("json")["data"]


def test_a_stalled_client_costs_little_memory(serve: Callable[..., ServerProcess]) -> None:
    process = serve("--workers", "1")
    server = psutil.Process(process.pid)
    with process.connect() as wire:
        wire.table(BIG)
        before = server.memory_info().rss
        streams = Streams(wire)
        for number in range(10):
            streams.ask(ENDLESS_ROWS, number, window=1 << 20)
        while any(len(asked.body) < 1 << 20 for asked in streams.of.values()):
            streams.receive()
        streams.settle()
        # Each holds what the outbox and DuckDB's stream hold.
        assert server.memory_info().rss - before < 200 << 20


def test_a_client_that_does_not_go_on_gets_timeout(launch: Callable[..., LocalServer]) -> None:
    server = launch(stream_idle_timeout=1)
    with server.connect() as wire:
        streams = Streams(wire)
        endless = streams.ask(ENDLESS_ROWS, "endless", window=1000)
        # Its work is done long before its client has it.
        short = streams.ask("select range as a from range(1000)", "short", window=1000)
        streams.finish()
        for asked in (endless, short):
            assert asked.error is not None
            assert asked.code == "timeout"
            assert "--stream-idle-timeout" in asked.error["error"]
            assert len(asked.body) == 1000
        streams.settle()
        assert not server.server.main.requests.find(
            next(iter(server.server.main.requests._clients)), "s"
        )
        wait_until(lambda: not jobs_of(server))
        assert wire.rows("select 1 as a") == [{"a": 1}]


def test_an_ack_in_time_keeps_the_stream(launch: Callable[..., LocalServer]) -> None:
    with launch(stream_idle_timeout=1).connect() as wire:
        streams = Streams(wire)
        asked = streams.ask("select range as a from range(100)", window=200)
        began = time.monotonic()
        # Each pause is shorter than the limit, all of them together are not.
        while not asked.ended:
            streams.receive()
            if not asked.ended and len(asked.body) % 200 == 0:
                if time.monotonic() < began + 1.5:
                    wire.socket.ping().wait(DEADLINE)
                    time.sleep(0.3)
                streams.ack(asked)
        assert asked.table().num_rows == 100


@pytest.mark.parametrize("window", [None, 1000])
def test_a_disconnect_frees_everything(server: LocalServer, window: int | None) -> None:
    for _ in range(5):
        wire = server.connect()
        streams = Streams(wire)
        for number in range(12):
            sql = ENDLESS_ROWS if number % 2 else "select range as a from range(1000)"
            streams.ask(sql, number, window=window)
        streams.receive()
        abort(wire)
    wait_until(lambda: not jobs_of(server))
    wait_until(lambda: not server.server.main.requests._clients)
    with server.connect() as wire:
        # No transaction is left open that would hold a checkpoint up.
        wire.exec("create table t as select 1 as i")
        wire.exec("force checkpoint")


def test_an_error_in_the_middle_never_ends_with_last(wire: Wire) -> None:
    value = "case when i = 500000 then error('half-way') else i end"
    sql = f"select {value} as a from range(1000000) t(i)"
    failed = stream(wire, sql)
    assert failed.summary is None
    assert failed.error is not None
    assert failed.code == "query_error"
    assert "half-way" in failed.error["error"]
    assert stream(wire, "select 1 as a").table().num_rows == 1


@pytest.mark.parametrize("sql", ["selec", "select * from nowhere", "select 1::int / 'x'"])
def test_an_error_at_once(wire: Wire, sql: str) -> None:
    failed = stream(wire, sql)
    assert failed.code == "query_error"
    assert failed.sizes == []


def test_single_messages_and_chunks_beside_each_other(wire: Wire) -> None:
    streams = Streams(wire)
    for number in range(6):
        if number % 2:
            streams.ask(MILLION, number, window=1 << 20)
        else:
            wire.send(type="arrow", sql=MILLION, queryId=number)
    streams.finish(acks=True)
    while len(streams.others) < 3:
        streams.receive()
    wholes = [other for other in streams.others if isinstance(other, Arrow)]
    assert sorted(whole.header["queryId"] for whole in wholes) == [0, 2, 4]
    bodies = {whole.body for whole in wholes} | {bytes(s.body) for s in streams.of.values()}
    assert len(bodies) == 1


def test_dictionaries_in_a_stream(wire: Wire) -> None:
    sql = "select ('v' || i % 100)::enum(" + ", ".join(f"'v{n}'" for n in range(100)) + ") as e"
    table = stream(wire, sql + " from range(300000) t(i)", compression="zstd").table()
    assert pa.types.is_dictionary(table.schema.field("e").type)
    assert table["e"][299_999].as_py() == "v99"


def test_cancel_of_a_stalled_stream_whose_work_is_done(wire: Wire) -> None:
    streams = Streams(wire)
    asked = streams.ask("select range as a from range(1000)", window=10)
    streams.receive()
    streams.settle()
    wire.send(type="cancel", queryId="s")
    assert streams.until("cancelAck")["cancelled"] is True
    streams.finish()
    assert asked.code == "cancelled"
    assert wire.rows("select 1 as a") == [{"a": 1}]


def test_the_id_is_free_after_the_last_chunk(wire: Wire) -> None:
    for number in range(30):
        assert stream(wire, f"select {number} as a", query_id="same").table().num_rows == 1
    streams = Streams(wire)
    asked = streams.ask(ENDLESS_ROWS, "same", window=10)
    streams.receive()
    wire.send(type="exec", sql="select 1", queryId="same")
    streams.finish()
    assert asked.code == "conflict"


def test_a_signal_while_streams_run(serve: Callable[..., ServerProcess]) -> None:
    """Flowing, stalled in the middle, and stalled with the work done."""
    process = serve()
    with process.connect() as wire:
        streams = Streams(wire)
        streams.ask(ENDLESS_ROWS, "flows")
        streams.ask(ENDLESS_ROWS, "stalls", window=1000)
        streams.ask("select range as a from range(1000)", "done", window=1000)
        while any(len(asked.body) < 1000 for asked in streams.of.values()):
            streams.receive()
        process.process.send_signal(signal.SIGTERM)
        streams.finish()
        assert {asked.code for asked in streams.of.values()} == {"shutting_down"}
    assert process.wait() == 0


def test_a_table_in_chunks_of_every_size(wire: Wire) -> None:
    """Cuts fall anywhere, also inside of the header of an Arrow message."""
    whole = wire.arrow("select range as a, range::varchar as b from range(20)").body
    for window in range(1, 40):
        asked: Stream = stream(
            wire, "select range as a, range::varchar as b from range(20)", window=window
        )
        assert bytes(asked.body) == whole
        assert max(asked.sizes) <= window
