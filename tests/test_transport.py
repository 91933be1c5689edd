"""The transport by itself: order, fragments, slow and dead clients, stop and start."""

from __future__ import annotations

import http.client
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sqlrooms_server.errors import StartupError
from sqlrooms_server.transport import Refusal
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull
from tests.leaks import assert_leaks_nothing
from tests.recorder import Recorder, open_connection
from tests.test_large_results import abort
from tests.wire import DEADLINE, Wire


class Produced:
    """A source of ``count`` fragments; the first bytes tell each one's number."""

    def __init__(self, count: int, size: int = FRAGMENT_BYTES) -> None:
        self._numbers = iter(range(count))
        self._last = count - 1
        self._size = size
        self.was_sent = threading.Event()
        self.was_dropped = threading.Event()

    def pull(self) -> tuple[Chunk, bool] | Pull:
        number = next(self._numbers)
        return struct.pack(">I", number) + b"." * (self._size - 4), number == self._last

    def sent(self) -> None:
        self.was_sent.set()

    def dropped(self) -> None:
        self.was_dropped.set()


class Paused:
    """A source of two fragments, the second one when ``is_ready``."""

    def __init__(self) -> None:
        self._has_begun = False
        self.is_ready = False

    def pull(self) -> tuple[Chunk, bool] | Pull:
        if self._has_begun:
            return (b"end", True) if self.is_ready else Pull.NOT_READY
        self._has_begun = True
        return b"begin ", False

    def sent(self) -> None:
        pass

    def dropped(self) -> None:
        pass


def test_messages_of_every_size_come_back_whole(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        for size in (0, 1, 125, 126, 65535, 65536, FRAGMENT_BYTES, FRAGMENT_BYTES + 1, 1 << 20):
            for data in ("x" * size, b"\x01" * size):
                wire.send_raw(data)
                assert wire.socket.recv(timeout=DEADLINE) == data


def test_a_stream_is_one_message_in_order_with_others(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        source = Produced(40)
        post = recorder.transport.post
        post(lambda: connection.send(b"before", is_text=False))
        post(lambda: connection.stream(source, is_text=False))
        post(lambda: connection.send(b"after", is_text=False))
        assert wire.socket.recv(timeout=DEADLINE) == b"before"
        message = wire.socket.recv(timeout=DEADLINE)
        assert isinstance(message, bytes)
        numbers = [
            int.from_bytes(message[start : start + 4], "big")
            for start in range(0, len(message), FRAGMENT_BYTES)
        ]
        assert numbers == list(range(40))
        assert wire.socket.recv(timeout=DEADLINE) == b"after"
        assert source.was_sent.wait(DEADLINE)


@pytest.mark.parametrize("size", [16 << 10, 64 << 10, 200 << 10])
def test_no_payload_is_lost_when_the_kernel_is_full(recorder: Any, size: int) -> None:
    """The library's other send path drops payloads of 16 KiB and more at this point."""
    count = 400
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        source = Produced(count, size)
        recorder.transport.post(lambda: connection.stream(source, is_text=False))
        for fragment in wire.socket.recv_streaming():
            assert len(fragment) in (0, size)
        numbers = []

        def send(number: int = 0) -> None:
            connection.send(struct.pack(">I", number) + b"." * (size - 4), is_text=False)

        for start in range(0, count, 20):
            for number in range(start, start + 20):
                recorder.transport.post(send, number)
            for _ in range(20):
                message = wire.socket.recv(timeout=DEADLINE)
                assert isinstance(message, bytes)
                assert len(message) == size
                numbers.append(int.from_bytes(message[:4], "big"))
        assert numbers == list(range(count))


def test_a_source_is_pulled_only_as_fast_as_the_client_reads(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        source = Produced(1_000_000)
        recorder.transport.post(lambda: connection.stream(source, is_text=False))
        settled = threading.Event()

        def look(before: int = -1) -> None:
            # Turns of the loop without progress: the socket is full and nothing is pulled.
            pulled = source._numbers.__length_hint__()  # type: ignore[attr-defined]
            if pulled == before:
                settled.set()
            else:
                threading.Timer(0.05, recorder.transport.post, (look, pulled)).start()

        recorder.transport.post(look)
        assert settled.wait(DEADLINE)
        taken = 1_000_000 - source._numbers.__length_hint__()  # type: ignore[attr-defined]
        assert taken * FRAGMENT_BYTES < 64 << 20
        abort(wire)
        assert source.was_dropped.wait(DEADLINE)


def test_a_client_that_does_not_read_is_cut_off(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        payload = b"x" * 100_000

        def flood() -> None:
            connection.send(payload, is_text=False)
            if connection.is_open:
                recorder.transport.post(flood)

        recorder.transport.post(flood)
        assert recorder.closed_event.wait(DEADLINE)
        assert not connection.is_open
        connection.send(b"late", is_text=False)
        late = Produced(3)
        recorder.transport.post(lambda: connection.stream(late, is_text=False))
        assert late.was_dropped.wait(DEADLINE)
        recorder.transport.post(connection.pump)
        recorder.transport.post(connection.abort)
        recorder.transport.post(connection.close, 1000, "")
        abort(wire)


def test_a_client_is_told_that_too_much_waits_behind_a_pause(recorder: Any) -> None:
    """Nothing is in the socket, so that no drain callback follows."""
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)

        def flood() -> None:
            connection.stream(Paused(), is_text=False)
            while connection.is_open:
                connection.send(b"x" * 100_000, is_text=False)

        recorder.transport.post(flood)
        with pytest.raises(ConnectionClosed) as closed:
            wire.socket.recv(timeout=DEADLINE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


def test_sending_closes_nothing_before_it_returns(recorder: Any) -> None:
    """Whoever sends to many must not see them leave meanwhile."""
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        source = Paused()
        closed_meanwhile = []

        def turn() -> None:
            connection.stream(source, is_text=False)
            connection.close(1000, "")
            source.is_ready = True
            connection.send(b"after", is_text=False)
            closed_meanwhile.append(recorder.closed_event.is_set())

        recorder.transport.post(turn)
        assert wire.socket.recv(timeout=DEADLINE) == b"begin end"
        assert wire.socket.recv(timeout=DEADLINE) == b"after"
        assert recorder.closed_event.wait(DEADLINE)
        assert closed_meanwhile == [False]


def test_closing_comes_after_what_was_sent(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        source = Produced(20)
        recorder.transport.post(lambda: connection.stream(source, is_text=False))
        recorder.transport.post(lambda: connection.close(4321, "bye"))
        assert len(wire.socket.recv(timeout=DEADLINE)) == 20 * FRAGMENT_BYTES
        with pytest.raises(ConnectionClosed) as closed:
            wire.socket.recv(timeout=DEADLINE)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "bye")


def test_a_flood_of_pings_is_cut_off(recorder: Any) -> None:
    """Its pongs, which nobody reads, would fill the memory."""
    ping = b"\x89\xfd\x00\x00\x00\x00" + b"p" * 125
    with raw_websocket(recorder.port) as raw:
        try:
            for _ in range(4000):
                raw.sendall(ping * 100)
        except OSError:
            pass
        assert recorder.closed_event.wait(DEADLINE)


def test_what_was_sent_arrives_before_the_end_of_a_stop(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        payload = b"x" * (4 << 20)
        recorder.transport.post(lambda: connection.send(payload, is_text=False))
        stopper = threading.Thread(
            target=recorder.transport.stop, args=(time.monotonic() + DEADLINE,)
        )
        stopper.start()
        assert wire.socket.recv(timeout=DEADLINE) == payload
        with pytest.raises(ConnectionClosed) as closed:
            wire.socket.recv(timeout=DEADLINE)
        stopper.join()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001


def test_a_stop_waits_for_what_was_posted_by_what_was_posted(recorder: Any) -> None:
    with Wire(recorder.url) as wire:
        connection = open_connection(recorder, wire)
        post = recorder.transport.post
        taken = threading.Event()
        # All that follows is posted in one turn.
        post(taken.wait, DEADLINE)
        post(lambda: post(lambda: connection.send(b"last", is_text=False)))
        stopper = threading.Thread(
            target=recorder.transport.stop, args=(time.monotonic() + DEADLINE,)
        )
        stopper.start()
        while len(recorder.transport._inbox) < 2:
            time.sleep(0.001)
        taken.set()
        assert wire.socket.recv(timeout=DEADLINE) == b"last"
        stopper.join()


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[Future[None]]:
    """A silent client and a dead one beside the other tests: no idle timeout is below 8 s."""
    recorder = Recorder()
    recorder.start()
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(be_silent, recorder)
        # Where another process runs the last test, nobody waits for this.
        recorder.transport.stop(time.monotonic())


def be_silent(recorder: Recorder) -> None:
    """Two pings mean that it outlived its idle timeout, as any will with a longer one."""
    ping, pong = b"\x89\x00", b"\x8a\x80\x00\x00\x00\x00"
    with raw_websocket(recorder.port) as alive, raw_websocket(recorder.port) as dead:
        assert dead.recv(2) == alive.recv(2) == ping
        alive.sendall(pong)
        assert dead.recv(100) == b""
        assert recorder.closed_event.wait(DEADLINE)
        assert alive.recv(2) == ping
        assert recorder.connections[0].is_open


def raw_websocket(port: int) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += raw.recv(1)
    assert b" 101 " in answer
    return raw


def test_path_query_headers_and_subprotocol(recorder: Any) -> None:
    with Wire(recorder.url + "/a/b?roomId=r&token=t", subprotocols=["one", "two"]) as wire:
        assert wire.socket.subprotocol == "one"
        request = recorder.request
        assert (request.path, request.query) == ("/a/b", "roomId=r&token=t")
        assert request.headers["host"].startswith("127.0.0.1:")
        assert request.remote_address == "127.0.0.1"


def test_http_beside_websockets(recorder: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", recorder.port, timeout=DEADLINE)
    for path in ("/x", "/y"):
        connection.request("GET", path)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, path.encode())
    connection.close()


def test_refusals_and_too_many_connections(recorder: Any) -> None:
    recorder.verdict = Refusal(403, "because")
    with pytest.raises(InvalidStatus) as refused, Wire(recorder.url):
        pass
    assert refused.value.response.status_code == 403
    assert refused.value.response.body == b"because"
    recorder.verdict = None
    wires = [Wire(recorder.url) for _ in range(100)]
    with pytest.raises(InvalidStatus) as full, Wire(recorder.url):
        pass
    assert full.value.response.status_code == 503
    for wire in wires:
        abort(wire)


def test_a_port_in_use_is_one_line(recorder: Any) -> None:
    other = Recorder()
    with pytest.raises(StartupError) as refused:
        other.transport.start("127.0.0.1", recorder.port)
    assert str(refused.value).startswith(
        f"Cannot listen on 127.0.0.1 port {recorder.port}: Address"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "999.1.1.1", "192.0.2.1", "a b"])
def test_a_bad_host_is_one_line(host: str) -> None:
    with pytest.raises(StartupError) as refused:
        Recorder().transport.start(host, 0)
    assert "--host" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_localhost_listens_on_every_address_of_it() -> None:
    made = Recorder()
    port = made.transport.start("localhost", 0)
    try:
        for address, _ in made.transport.addresses:
            with socket.create_connection((address, port), timeout=DEADLINE):
                pass
    finally:
        made.transport.stop(time.monotonic() + 2)


def test_hostile_bytes_do_no_harm(recorder: Any) -> None:
    handshake = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    masked = b"\x00\x00\x00\x00"
    attacks = [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        handshake.replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"short"),
        handshake.replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"x" * 4000),
        handshake.replace(b"localhost", b"\xff\xfe\x80"),
        handshake + b"\xff\xff\xff",
        handshake + b"\x81\xff" + b"\xff" * 8 + masked,
        handshake + b"\x82\xff" + struct.pack(">Q", 2**63) + masked,
        handshake + b"\x81\x82" + masked + b"\xff\xfe",
        handshake + b"\x81\x02hi",
        handshake + b"\xc1\x80" + masked,
        handshake + b"\x89\xfe\x01\x00" + masked + b"x" * 256,
        handshake + b"\x88\x81" + masked + b"\x00",
        handshake + b"\x00\x80" + masked,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf",
        b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: b\r\n\r\n",
    ]
    for attack in attacks * 5:
        with socket.create_connection(("127.0.0.1", recorder.port), timeout=DEADLINE) as raw:
            raw.sendall(attack)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with Wire(recorder.url) as wire:
        wire.send_raw("alive")
        assert wire.socket.recv(timeout=DEADLINE) == "alive"


def test_many_starts_and_stops_leak_nothing() -> None:
    def cycle() -> None:
        made = Recorder()
        port = made.transport.start("127.0.0.1", 0)
        with Wire(f"ws://127.0.0.1:{port}") as wire:
            wire.send_raw("x")
            assert wire.socket.recv(timeout=DEADLINE) == "x"
            made.transport.stop(time.monotonic() + 2)

    assert_leaks_nothing(cycle, ("uws",))


def test_posts_that_race_with_the_stop_do_no_harm() -> None:
    for _ in range(5):
        made = Recorder()
        made.transport.start("127.0.0.1", 0)
        stopped = threading.Event()

        def post(made: Recorder = made, stopped: threading.Event = stopped) -> None:
            while not stopped.is_set():
                made.transport.post(lambda: None)

        threads = [threading.Thread(target=post) for _ in range(2)]
        for thread in threads:
            thread.start()
        made.transport.stop(time.monotonic() + 2)
        stopped.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of Linux is what is tested")
def test_a_machine_without_libuv_is_told_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "libuv.so.1").write_text("")
    done = run_server({"LD_LIBRARY_PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "apt-get install libuv1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_libuv_elsewhere_that_is_none(tmp_path: Path) -> None:
    done = run_server({"SQLROOMS_LIBUV": str(tmp_path / "missing.so")})
    assert done.returncode == 2
    assert "SQLROOMS_LIBUV" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of Linux is what is tested")
def test_an_unsupported_platform_is_named(tmp_path: Path) -> None:
    package = tmp_path / "socketify"
    package.mkdir()
    (package / "__init__.py").write_text("")
    machine = "arm64" if "arm" in platform.machine().lower() else "amd64"
    library = package / f"libsocketify_linux_{machine}.so"
    library.write_bytes(b"\x7fELF of another machine")
    done = run_server({"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "no build for this platform" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def run_server(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sqlrooms_server", "--port", "0"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


@pytest.mark.parametrize("first", ["sqlrooms_server.transport", "pyarrow"])
def test_regular_expressions_of_other_libraries_survive(first: str) -> None:
    """Loaded first, the old C++ library inside socketify made Arrow crash on time zones."""
    script = f"""
import {first}, sqlrooms_server.transport, datetime, pyarrow
times = pyarrow.array([datetime.datetime(2020, 1, 2)], pyarrow.timestamp("ms", "UTC"))
print(times.to_pylist()[0].year)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2020\n"), done.stderr


def test_pings_keep_a_silent_client_and_find_a_dead_one(silence: Future[None]) -> None:
    """The last test, which the wait is over for."""
    silence.result(DEADLINE)
