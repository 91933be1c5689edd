"""Results of any size: whole, in bounded memory, and without delaying others."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import psutil
import pyarrow as pa

from tests.conftest import LocalServer, ServerProcess
from tests.wire import Wire

ROWS = 20_000_000
BIG = f"select range as a, range * 2 as b from range({ROWS})"


def read_stream(wire: Wire) -> Iterator[bytes]:
    """The fragments of the next message."""
    for fragment in wire.socket.recv_streaming():
        assert isinstance(fragment, bytes)
        yield fragment


class Joined:
    """A file over fragments, so that Arrow reads a message that is never whole in memory."""

    closed = False

    def __init__(self, fragments: Iterator[bytes]) -> None:
        self._fragments = fragments
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            fragment = next(self._fragments, None)
            if fragment is None:
                break
            self._rest += fragment
        result, self._rest = (
            (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        )
        return result

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def reader_of(wire: Wire) -> pa.RecordBatchReader:
    source = Joined(read_stream(wire))
    length = int.from_bytes(source.read(4), "big")
    source.read(length)
    return pa.ipc.open_stream(pa.PythonFile(source, "r"))


def test_twenty_million_rows_to_a_slow_reader(serve: Callable[..., ServerProcess]) -> None:
    """One intact message, while the server's memory grows by less than 100 MB."""
    process = serve()
    server = psutil.Process(process.pid)
    with process.connect() as wire, process.connect() as beside:
        wire.table("select 1")
        before = peak = server.memory_info().rss
        wire.send(type="arrow", sql=BIG, queryId="big")
        rows = total = 0
        for number, batch in enumerate(reader_of(wire)):
            rows += batch.num_rows
            total += pa.compute.sum(batch.column(1)).as_py()
            if number % 8 == 0:
                # A reader slowed down by another query between its batches.
                assert beside.table("select 1 as a").num_rows == 1
                peak = max(peak, server.memory_info().rss)
    assert rows == ROWS
    assert total == ROWS * (ROWS - 1)
    assert peak - before < 100 << 20


def test_a_json_result_is_streamed_too(serve: Callable[..., ServerProcess]) -> None:
    process = serve()
    server = psutil.Process(process.pid)
    with process.connect() as wire:
        wire.rows("select 1 as a")
        before = peak = server.memory_info().rss
        wire.send(
            type="json", sql="select i, 'text ' || i as s from range(5000000) t(i)", queryId=1
        )
        size = 0
        last = ""
        for number, fragment in enumerate(wire.socket.recv_streaming()):
            assert isinstance(fragment, str)
            size += len(fragment)
            last = fragment or last
            if number % 64 == 0:
                peak = max(peak, server.memory_info().rss)
    assert size > 150 << 20
    assert last.endswith(']"}')
    assert peak - before < 150 << 20


def test_slow_readers_do_not_delay_others(launch: Callable[..., LocalServer]) -> None:
    """24 clients ask for everything and read nothing; four workers are not theirs."""
    server = launch(workers=4)
    readers = [server.connect() for _ in range(24)]
    try:
        rows = 6_000_000
        for reader in readers:
            sql = f"select range as a, range * 2 as b from range({rows})"
            reader.send(type="arrow", sql=sql, queryId="big")
        with server.connect() as wire:
            for number in range(200):
                assert wire.table(f"select {number} as a").to_pydict() == {"a": [number]}
        for reader in readers[:2]:
            assert sum(batch.num_rows for batch in reader_of(reader)) == rows
    finally:
        for reader in readers:
            abort(reader)


def test_fast_streams_leave_workers_to_others(launch: Callable[..., LocalServer]) -> None:
    """More endless results than workers, all read at full speed."""
    server = launch(workers=1)
    readers = [server.connect() for _ in range(3)]

    def drain(reader: Wire) -> None:
        reader.send(type="arrow", sql=BIG, queryId="big")
        assert sum(batch.num_rows for batch in reader_of(reader)) == ROWS

    threads = [threading.Thread(target=drain, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    answered = 0
    with server.connect() as wire:
        while any(thread.is_alive() for thread in threads):
            assert wire.table("select 1 as a").num_rows == 1
            answered += 1
    for reader in readers:
        abort(reader)
    assert answered > 5


def abort(wire: Wire) -> None:
    """Leave without a closing handshake, which would read what is still under way."""
    raw = wire.socket.socket
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.shutdown(socket.SHUT_RDWR)
    raw.close()


def test_many_columns_are_no_more_memory(serve: Callable[..., ServerProcess]) -> None:
    process = serve()
    server = psutil.Process(process.pid)
    columns = ", ".join(f"i + {number} as c{number}" for number in range(200))
    with process.connect() as wire:
        wire.table("select 1")
        before = peak = server.memory_info().rss
        wire.send(type="arrow", sql=f"select {columns} from range(550000) t(i)", queryId=1)
        rows = 0
        for batch in reader_of(wire):
            rows += batch.num_rows
            peak = max(peak, server.memory_info().rss)
    assert rows == 550_000
    # The result has 0.9 GB; DuckDB 1.5 itself buffers some 300 MB of it.
    assert peak - before < 500 << 20


def test_dictionary_columns_stream_as_well(wire: Wire) -> None:
    wire.exec("create type mood as enum ('sad', 'ok', 'happy')")
    sql = "select (['sad', 'ok', 'happy'][1 + i % 3])::mood as m, i from range(1000000) t(i)"
    table = wire.table(sql)
    assert table.num_rows == 1_000_000
    assert pa.types.is_dictionary(table.schema.field("m").type)
    assert table["m"][999_998].as_py() == "happy"
