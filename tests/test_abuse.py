"""Clients that want too much: only they are refused, and the others are served."""

from __future__ import annotations

import dataclasses
import http.client
import random
import shlex
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psutil
import pyarrow as pa
import pytest
from websockets.exceptions import InvalidStatus

from sqlrooms_server.db.inflation import Table
from sqlrooms_server.transport import Proxies
from sqlrooms_server.transport.sockets import SocketLimits, Sockets
from tests.conftest import LocalServer, ServerProcess, started
from tests.recorder import LIMITS, Recorder
from tests.wire import DEADLINE, Wire, framed, ipc

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def closes(client: socket.socket) -> bool:
    """Whether the server closes, whatever it says before."""
    client.settimeout(DEADLINE)
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


# How many there are


def test_counts_of_addresses() -> None:
    sockets = Sockets(SocketLimits(waiting=100, of_address=2, descriptors=1000))
    for key in range(3):
        assert sockets.opened(key, "2001:db8::1:0:0:0" if key else "2001:db8::", 9) is None
    # All of one network; over the limit, requests are refused.
    assert sockets.opened(3, "2001:db8::2", 9) is None
    assert not sockets.asked(3)
    sockets.closed(3)
    sockets.closed(3)
    sockets.closed(2)
    assert sockets.asked(0) and sockets.asked(1)
    place = sockets.upgraded(0, None)
    assert not sockets.may_join("2001:db8::3") and sockets.may_join("2001:db8:0:1::")
    sockets.left(place)
    assert sockets.may_join("2001:db8::3")
    # Those of a proxy are not limited, what they bring is.
    for key in range(50, 60):
        assert sockets.opened(key, None, 9) is None
        assert sockets.asked(key)
    for key, address in ((50, "1.1.1.1"), (51, "1.1.1.1"), (52, "2.2.2.2")):
        assert sockets.may_join(address)
        sockets.upgraded(key, address)
    assert not sockets.may_join("1.1.1.1") and sockets.may_join("2.2.2.2")


def test_who_makes_room() -> None:
    sockets = Sockets(SocketLimits(waiting=3, of_address=100, descriptors=20))
    assert [sockets.opened(key, "1.1.1.1", 10) for key in (1, 2, 3, 4)] == [None, None, None, 1]
    sockets.closed(1)
    sockets.asked(2)
    assert sockets.opened(5, "1.1.1.1", 10) == 3
    sockets.closed(3)
    # No descriptors: each new one costs an old one, also when its own descriptor is a low one.
    sockets.upgraded(4, None)
    assert sockets.opened(6, "1.1.1.1", 20) == 2
    sockets.closed(2)
    assert sockets.opened(7, "1.1.1.1", 5) == 5
    for key in (5, 6, 7):
        sockets.closed(key)
    assert sockets.opened(8, "1.1.1.1", 5) is None


@pytest.fixture
def strict() -> Iterator[Recorder]:
    """Few connections for each address, and few sockets that are silent."""
    limits = dataclasses.replace(LIMITS, max_per_address=5, max_waiting=10)
    made = Recorder(limits, proxies=Proxies(("127.0.0.2",)))
    made.start()
    yield made
    made.transport.stop(time.monotonic() + 2)


def test_this_machine_may_connect_as_often_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlrooms_server.transport.loop._MAX_PER_ADDRESS", 2)
    made = Recorder(LIMITS, proxies=Proxies(("127.0.0.2",)))
    made.start()
    client = {
        "source_address": ("127.0.0.2", 0),
        "additional_headers": {"X-Forwarded-For": "203.0.113.7"},
    }
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(Wire(made.url))
        for _ in range(2):
            stack.enter_context(Wire(made.url, **client))
        with pytest.raises(InvalidStatus):
            Wire(made.url, **client)
    made.transport.stop(time.monotonic() + 2)


def test_an_address_with_too_many_connections(strict: Recorder) -> None:
    # Another address of this machine is that of a proxy, and brings others.
    behind_proxy = {"source_address": ("127.0.0.2", 0)}
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(strict.url)) for _ in range(5)]
        with pytest.raises(InvalidStatus) as refused:
            Wire(strict.url)
        response = refused.value.response
        assert response.status_code == 429
        assert b"127.0.0.1 (--max-connections-per-address)" in response.body
        connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=DEADLINE)
        connection.request("GET", "/")
        assert connection.getresponse().status == 429
        connection.close()
        for number in range(6):
            headers = {"X-Forwarded-For": f"203.0.113.{number % 2}"}
            wire = Wire(strict.url, additional_headers=headers, **behind_proxy)
            wires.append(stack.enter_context(wire))
        for _ in range(5):
            headers = {"X-Forwarded-For": "203.0.113.7"}
            wire = Wire(strict.url, additional_headers=headers, **behind_proxy)
            wires.append(stack.enter_context(wire))
        with pytest.raises(InvalidStatus) as refused:
            Wire(strict.url, additional_headers=headers, **behind_proxy)
        assert b"203.0.113.7 (--max-connections-per-address)" in refused.value.response.body
        for wire in wires:
            wire.send_raw("x")
            assert wire.socket.recv(timeout=DEADLINE) == "x"
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            Wire(strict.url).__exit__()
            return
        except InvalidStatus:
            assert time.monotonic() < deadline


def test_silent_sockets_make_room(strict: Recorder) -> None:
    with ExitStack() as stack:

        def opened(data: bytes) -> socket.socket:
            made = socket.create_connection(
                ("127.0.0.1", strict.port), DEADLINE, source_address=("127.0.0.2", 0)
            )
            made.sendall(data)
            return stack.enter_context(made)

        first = [opened(b"GET / HTTP/1.1\r\nX: ") for _ in range(10)]
        last = opened(GET)
        assert last.recv(15) == b"HTTP/1.1 200 OK"
        assert closes(first[0])
        with Wire(strict.url) as wire:
            wire.send_raw("x")
            assert wire.socket.recv(timeout=DEADLINE) == "x"
        assert closes(first[1])


def test_without_descriptors_new_clients_still_come_in(
    serve: Callable[..., ServerProcess],
) -> None:
    command = f"ulimit -n 64; exec {shlex.quote(sys.executable)} -m sqlrooms_server --port 0"
    server = serve(start=lambda *_: started(command=("bash", "-c", command)))
    process = psutil.Process(server.pid)
    with ExitStack() as stack:
        early = stack.enter_context(server.connect())
        for _ in range(150):
            silent = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
            stack.enter_context(silent)
        with server.connect() as late:
            assert late.rows("select 1 as a") == [{"a": 1}]
        assert early.rows("select 1 as a") == [{"a": 1}]
        assert process.num_fds() < 60
    assert server.stop() == 0
    assert "ulimit -n" in server.errors


# What they send


def test_hostile_http(recorder: Any) -> None:
    post = b"POST /x HTTP/1.1\r\nHost: localhost\r\n"
    for data in (
        GET * 5000,
        UPGRADE.replace(b"Version: 13", b"Version: 99") * 500,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 1_000_000,
        b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
        post + b"Content-Length: 99999999999999999999\r\n\r\n",
        post + b"Content-Length: -1\r\n\r\n",
        post + b"Content-Length: 999999999\r\n\r\n" + b"y" * 100_000,
        post + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 100_000,
        post + b"Transfer-Encoding: chunked\r\n\r\n" + b"800\r\n" + b"y" * 2048 + b"\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzzz",
        post + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n" + b"y" * 5000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", recorder.port), DEADLINE) as client:
            # It may close before it has read all of it.
            with suppress(OSError):
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            assert closes(client), data[:60]
    with Wire(recorder.url) as wire:
        wire.send_raw("x")
        assert wire.socket.recv(timeout=DEADLINE) == "x"


def bomb(size: int) -> bytes:
    """An Arrow stream with a buffer that really decompresses to ``size`` zeros."""
    # RFC 8878: a frame without its size, of blocks that repeat one byte 128 Ki times.
    count = size >> 17
    block = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"\x00"
    end = (1).to_bytes(3, "little")
    frame = b"\x28\xb5\x2f\xfd\x00\x38" + block * count + end
    # It takes the place of noise, of which Arrow compresses half.
    noise = random.Random(1).randbytes(len(frame) + 100)
    column = pa.Array.from_buffers(
        pa.uint8(), 2 * len(noise), [None, pa.py_buffer(noise + bytes(len(noise)))]
    )
    batch = pa.record_batch([column], ["a"])
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    stream = bytearray(sink.getvalue().to_pybytes())
    _, message = pa.ipc.MessageReader.open_stream(sink.getvalue())
    header = Table.root(message.metadata.to_pybytes()).table(2)
    assert header is not None
    (_, (_, length)) = header.structs(2, "<qq")
    # What is left of the noise is skipped.
    frame += struct.pack("<II", 0x184D2A50, length - 8 - len(frame) - 8)
    start = stream.index(struct.pack("<q", 2 * len(noise)) + b"\x28\xb5\x2f\xfd")
    stream[start : start + 8 + len(frame)] = struct.pack("<q", size) + frame
    return bytes(stream)


def test_the_bomb_is_one() -> None:
    (column,) = pa.ipc.open_stream(bomb(16 << 20)).read_all()
    (chunk,) = column.chunks
    assert chunk.buffers()[1].size == 16 << 20


def test_a_bomb_of_100_gigabytes(launch: Callable[..., LocalServer]) -> None:
    server = launch()
    data = bomb(100 << 30)
    with server.connect() as wire:
        before = psutil.Process().memory_info().rss
        refusal = wire.upload(data, tableName="t", queryId="u")
        assert (refusal["type"], refusal["code"]) == ("error", "bad_request")
        assert f"has {100 << 30} bytes when it is decompressed" in refusal["error"]
        assert "--max-message-size" in refusal["error"]
        chunk = {"type": "uploadArrow", "tableName": "t", "queryId": "u", "seq": 0, "last": True}
        wire.send_raw(framed(chunk, data))
        reply = wire.receive()
        while reply["type"] != "error":
            reply = wire.receive()
        assert "when it is decompressed" in reply["error"]
        assert psutil.Process().memory_info().rss - before < 64 << 20
        assert wire.rows(
            "select count(*)::int as n from duckdb_tables() where table_name = 't'"
        ) == [{"n": 0}]


@pytest.mark.parametrize("codec", ["lz4", "zstd", None])
def test_what_is_not_too_large(server: LocalServer, codec: str | None) -> None:
    """Compressed or not, with dictionaries that are replaced."""
    sink = pa.BufferOutputStream()
    schema = pa.schema([("i", pa.int64()), ("d", pa.dictionary(pa.int32(), pa.string()))])
    with pa.ipc.new_stream(
        sink, schema, options=pa.ipc.IpcWriteOptions(compression=codec)
    ) as writer:
        for number in range(3):
            words = pa.array([f"{number} {i % 9}" for i in range(1000)]).dictionary_encode()
            writer.write_batch(pa.record_batch([pa.array(range(1000)), words], schema=schema))
    data = sink.getvalue().to_pybytes()
    with server.connect() as wire:
        assert wire.upload(data, tableName="t", queryId="u")["type"] == "uploadAck"
        chunk = {"type": "uploadArrow", "tableName": "c", "queryId": "c", "seq": 0, "last": True}
        wire.send_raw(framed(chunk, data))
        while wire.receive()["type"] != "uploadAck":
            pass
        count = "select count(*)::int as n, count(distinct d)::int as d, sum(i)::int as s from "
        for table in ("t", "c"):
            assert wire.rows(count + table) == [{"n": 3000, "d": 27, "s": 3 * 499_500}]


def test_dictionaries_together_are_bounded(launch: Callable[..., LocalServer]) -> None:
    """Deltas add up; and what an old Arrow compressed is not looked into, but refused."""
    server = launch(max_message_size=1 << 20)
    sink = pa.BufferOutputStream()
    words = [pa.array(["x" * 3_000_000]), pa.array(["x" * 3_000_000, "y" * 3_000_000])]
    options = pa.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=True)
    schema = pa.schema([("d", pa.dictionary(pa.int32(), pa.string()))])
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for dictionary in words:
            column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), dictionary)
            writer.write_batch(pa.record_batch([column], schema=schema))
    old = ipc(pa.table({"a": [1]}))
    _, message = pa.ipc.MessageReader.open_stream(old)
    metadata = message.metadata.to_pybytes() + b"ARROW:experimental_compression\0\0"
    head = struct.pack("<II", 0xFFFFFFFF, len(metadata))
    old = old[: old.index(message.metadata.to_pybytes()) - 8] + head + metadata
    old += message.body.to_pybytes()
    with server.connect() as wire:
        refusal = wire.upload(bytes(sink.getvalue()), tableName="t", queryId="u")
        assert "when it is decompressed" in refusal["error"], refusal
        assert "Arrow 0.17" in wire.upload(old, tableName="t", queryId="u")["error"]
