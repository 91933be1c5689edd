"""Bodies of HTTP requests and answers on their way: any size, any speed, bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqlrooms_server import Plugin, Response
from sqlrooms_server.settings import Settings
from tests.certificates import Files
from tests.conftest import LocalServer
from tests.http_client import ask
from tests.wire import DEADLINE

STEP = 256 << 10


class Blocks:
    """Blocks of bytes, each another one, which tell how many were taken."""

    def __init__(self, count: int | None) -> None:
        self._numbers = iter(itertools.count() if count is None else range(count))
        self.taken = 0
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        number = next(self._numbers)
        self.taken += 1
        return number.to_bytes(4, "big") * (STEP // 4)

    def close(self) -> None:
        self.closed.set()


class Bodies(Plugin):
    """Answers of all kinds, and what became of them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Blocks] = []
        self.lost: list[str] = []
        self.has_begun = threading.Event()
        self.was_lost = threading.Event()
        self.release = threading.Event()

        def register(method: str, path: str, streams: bool) -> Callable[[Any], Any]:
            return self.route(method, path, streams_body=streams)

        register("GET", "/known/", False)(self.known)
        register("GET", "/unknown/", False)(self.unknown)
        register("GET", "/async", False)(self.asynchronous)
        register("GET", "/endless", False)(self.endless)
        register("GET", "/short", False)(self.short)
        register("GET", "/broken", False)(self.broken)
        register("GET", "/stuck", False)(self.stuck)
        register("GET", "/large", False)(lambda call: b"x" * (20 << 20))
        register("GET", "/nothing", False)(lambda call: Response(iter(()), length=0))
        register("POST", "/digest", True)(self.digest)
        register("PUT", "/digest", True)(self.digest_async)
        register("POST", "/slow", True)(self.slow)
        register("POST", "/early", True)(lambda call: Response("enough", 200))
        register("POST", "/refuse", True)(lambda call: Response("no", 403))
        register("POST", "/late", True)(self.late)
        register("POST", "/late-stream", True)(self.late_stream)
        register("POST", "/wait", True)(self.wait)

    def blocks(self, count: int | None) -> Blocks:
        self.made.append(Blocks(count))
        return self.made[-1]

    def known(self, call: Any) -> Response:
        count = int(call.rest)
        return Response(self.blocks(count), length=count * STEP)

    def unknown(self, call: Any) -> Response:
        return Response(self.blocks(int(call.rest)), content_type="text/odd")

    def endless(self, call: Any) -> Response:
        return Response(self.blocks(None))

    def asynchronous(self, call: Any) -> Any:
        async def body() -> AsyncIterator[bytes]:
            for number in range(3):
                await asyncio.sleep(0)
                yield b"%d," % number

        return body()

    def short(self, call: Any) -> Response:
        return Response(iter([b"abc"]), length=10)

    def broken(self, call: Any) -> Iterator[bytes]:
        yield b"abc"
        raise ValueError("no more")

    def stuck(self, call: Any) -> Iterator[bytes]:
        yield b"abc"
        self.release.wait(DEADLINE)

    def digest(self, call: Any) -> str:
        digest = hashlib.sha256()
        for data in call.chunks:
            digest.update(data)
        return digest.hexdigest()

    async def digest_async(self, call: Any) -> str:
        digest = hashlib.sha256()
        async for data in call.chunks:
            digest.update(data)
        return digest.hexdigest()

    def slow(self, call: Any) -> str:
        self.release.wait(DEADLINE)
        return str(sum(len(data) for data in call.chunks))

    async def late(self, call: Any) -> Response:
        await asyncio.sleep(0.05)
        return Response("late", 403)

    async def late_stream(self, call: Any) -> Iterator[bytes]:
        await asyncio.sleep(0.05)
        return iter([b"late"])

    async def wait(self, call: Any) -> None:
        try:
            async for _ in call.chunks:
                self.has_begun.set()
        except BaseException as error:
            self.lost.append(type(error).__name__)
            self.was_lost.set()
            raise


@pytest.fixture(scope="module")
def bodies() -> Bodies:
    return Bodies()


@pytest.fixture(scope="module")
def server(bodies: Bodies) -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0, plugin_timeout=1), [bodies])
    yield local
    local.server.stop()


def content(count: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") * (STEP // 4) for number in range(count))


def raw(port: int, request: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), DEADLINE)
    connection.sendall(request)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    with connection:
        parts = []
        while part := connection.recv(1 << 20):
            parts.append(part)
        return b"".join(parts)


def test_answers_come_whole(server: LocalServer, bodies: Bodies) -> None:
    answer = ask(server.port, "GET", "/known/200")
    assert (answer.status, answer.headers["content-length"]) == (200, str(200 * STEP))
    assert answer.body == content(200)
    answer = ask(server.port, "GET", "/unknown/200")
    assert (answer.headers["content-type"], answer.headers["transfer-encoding"]) == (
        "text/odd",
        "chunked",
    )
    assert answer.body == content(200)
    assert all(made.closed.wait(DEADLINE) for made in bodies.made)
    assert ask(server.port, "GET", "/unknown/0").body == b""
    assert ask(server.port, "GET", "/async").body == b"0,1,2,"
    assert ask(server.port, "GET", "/nothing").headers["content-length"] == "0"
    assert len(ask(server.port, "GET", "/large").body) == 20 << 20


def test_head_has_the_length_and_no_body(server: LocalServer, bodies: Bodies) -> None:
    answer = ask(server.port, "HEAD", "/known/9")
    assert (answer.headers["content-length"], answer.body) == (str(9 * STEP), b"")
    assert bodies.made[-1].closed.wait(DEADLINE) and bodies.made[-1].taken == 0
    assert "content-length" not in ask(server.port, "HEAD", "/unknown/9").headers
    assert ask(server.port, "HEAD", "/version").body == b""


def test_one_connection_serves_many(server: LocalServer) -> None:
    request = b"%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with raw(server.port, request % b"GET /async") as connection:
        received = b""
        for line in (b"HEAD /known/3", b"GET /version", b"OPTIONS /async", b"GET /async"):
            while not received.endswith(b"0\r\n\r\n") and b"Content-Length" not in received:
                if b"204 No Content" in received and received.endswith(b"\r\n\r\n"):
                    break
                received += connection.recv(1 << 16)
            received = b""
            connection.sendall(request % line)
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(1 << 16)
        assert b"0,1,2" in received.replace(b"\r\n2\r\n", b"")


def test_a_client_that_does_not_read_stops_the_source(server: LocalServer, bodies: Bodies) -> None:
    with raw(server.port, b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        before, pauses = -1, 0
        while pauses < 3:
            threading.Event().wait(0.05)
            made = bodies.made[-1].taken
            pauses = pauses + 1 if made == before and made else 0
            before = made
        # What the system holds of a socket, and two steps.
        assert made * STEP < 32 << 20
    assert bodies.made[-1].closed.wait(DEADLINE)


@pytest.mark.parametrize("path", ["/short", "/broken"])
def test_an_answer_that_is_broken_off_is_no_complete_one(server: LocalServer, path: str) -> None:
    received = rest_of(raw(server.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()))
    assert b"abc" in received and not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 0\r\nContent-Length: 40",
        "Content-Length: 40\r\nContent-Length: 0",
        "Content-Length:\r\nContent-Length: 40",
        "Content-Length: 0\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: chunked, gzip",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    ],
)
def test_a_body_of_unclear_length_is_refused(server: LocalServer, framing: str) -> None:
    head = f"POST /digest HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n"
    received = rest_of(raw(server.port, head.encode()))
    assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1") == 1
    # What would be a request of its own to some, and a part of the body to others.
    smuggled = "GET /async HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert b"0,1,2" not in rest_of(raw(server.port, (head + smuggled).encode())).replace(
        b"\r\n2\r\n", b""
    )


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_come_as_they_are_sent(server: LocalServer, method: str, chunked: bool) -> None:
    data = content(40)
    body: Any = (data[at : at + 99_999] for at in range(0, len(data), 99_999)) if chunked else data
    answer = ask(server.port, method, "/digest", body)
    assert answer.body.decode() == hashlib.sha256(data).hexdigest()
    empty = hashlib.sha256(b"").hexdigest()
    assert ask(server.port, method, "/digest").body.decode() == empty
    assert ask(server.port, method, "/digest", b"").body.decode() == empty


def test_a_body_waits_for_the_plugin(launch: Callable[..., LocalServer]) -> None:
    bodies = Bodies()
    local = launch(bodies, plugin_timeout=0)
    size = 64 << 20
    head = b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
    with raw(local.port, head) as connection:
        connection.settimeout(0.3)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < size:
                sent += connection.send(b"x" * min(1 << 20, size - sent))
        assert sent < size // 2
        bodies.release.set()
        connection.settimeout(DEADLINE)
        connection.sendall(b"x" * (size - sent))
        assert str(size).encode() in connection.recv(1 << 16)


def test_what_a_plugin_does_not_go_on_with_ends(server: LocalServer, bodies: Bodies) -> None:
    waiting = raw(server.port, b"GET /stuck HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = ask(server.port, "POST", "/slow", b"x" * 1000)
    assert answer.status == 504 and "--plugin-timeout" in answer.json()["error"]
    received = rest_of(waiting)
    assert b"abc" in received and not received.endswith(b"0\r\n\r\n")
    bodies.release.set()


def test_a_client_that_goes_away_ends_the_handler(server: LocalServer, bodies: Bodies) -> None:
    head = b"POST /wait HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc"
    with raw(server.port, head):
        assert bodies.has_begun.wait(DEADLINE)
    assert bodies.was_lost.wait(DEADLINE)
    assert bodies.lost[0] in ("Cancelled", "CancelledError")


def test_who_answers_early_leaves_the_connection_as_it_should_be(server: LocalServer) -> None:
    size = 200_000
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with raw(server.port, head % (b"/early", size)) as connection:
        while not connection.recv(1 << 16).endswith(b"enough"):
            pass
        connection.sendall(b"x" * size + b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    connection = raw(server.port, head % (b"/refuse", size))
    connection.sendall(b"x" * size)
    received = rest_of(connection)
    assert received.startswith(b"HTTP/1.1 403") and received.endswith(b"no")
    # The client may want the socket to be closed with the answer, while its body waits.
    closing = head.replace(b"Host", b"Connection: close\r\nHost")
    for path in (b"/early", b"/refuse", b"/late", b"/late-stream"):
        connection = raw(server.port, closing % (path, 10 * size) + b"x" * 10_000)
        with contextlib.suppress(OSError):
            assert rest_of(connection).startswith(b"HTTP/1.1")
    # Without an end, it is not listened to for ever.
    connection = raw(server.port, head % (b"/refuse", 1 << 40))
    with connection, pytest.raises(OSError):
        while True:
            connection.sendall(b"x" * (1 << 20))


def test_the_same_over_tls(launch: Callable[..., LocalServer], tmp_path: Path) -> None:
    files = Files(tmp_path)
    local = launch(Bodies(), **files.settings)
    context = files.context()
    with context.wrap_socket(
        socket.create_connection(("127.0.0.1", local.port), DEADLINE), server_hostname="localhost"
    ) as connection:
        connection.sendall(b"GET /known/100 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with connection.makefile("rb") as stream:
            while stream.readline() != b"\r\n":
                pass
            assert stream.read(100 * STEP) == content(100)
        data = content(40)
        connection.sendall(
            b"PUT /digest HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
        )
        connection.sendall(data)
        assert connection.recv(1 << 16).endswith(hashlib.sha256(data).hexdigest().encode())


PAGE = "http://localhost:5173"


def test_pages_that_may_connect_may_read(server: LocalServer) -> None:
    answer = ask(server.port, "GET", "/version", Origin=PAGE)
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in ask(server.port, "GET", "/version").headers
    evil = ask(server.port, "GET", "/version", Origin="https://evil.example")
    assert "access-control-allow-origin" not in evil.headers and evil.headers["vary"] == "Origin"


def test_pages_may_ask_what_they_may_send(server: LocalServer) -> None:
    wanted = {"Access_Control_Request_Method": "PUT"}
    answer = ask(server.port, "OPTIONS", "/digest", Origin=PAGE, **wanted)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-methods"] == "POST, PUT"
    assert "Authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    for origin, path, status in (
        ("https://evil.example", "/digest", 403),
        ("null", "/digest", 403),
        (PAGE, "/nowhere", 404),
    ):
        answer = ask(server.port, "OPTIONS", path, Origin=origin, **wanted)
        assert answer.status == status and "access-control-allow-methods" not in answer.headers
    answer = ask(server.port, "OPTIONS", "/digest")
    assert (answer.status, answer.headers["allow"]) == (204, "POST, PUT")
    answer = ask(server.port, "DELETE", "/version")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    for method in ("GET", "POST", "DELETE"):
        assert ask(server.port, method, "/digest", Origin="https://evil.example").status in (
            403,
            405,
        )


def test_foreign_pages_still_cannot_send_what_needs_no_permission(server: LocalServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        for origin, status in ((PAGE, 400), ("https://evil.example", 403)):
            answer = ask(
                server.port, "POST", "/channels/c", b'"x"', Origin=origin, Content_Type=kind
            )
            assert answer.status == status


def test_a_server_that_stops_says_so(launch: Callable[..., LocalServer]) -> None:
    plugin = Plugin("late")
    begun, ends = threading.Event(), threading.Event()

    @plugin.route("POST", "/late", streams_body=True)
    def late(call: Any) -> str:
        begun.set()
        assert ends.wait(DEADLINE)
        return "late"

    local = launch(plugin)
    head = b"POST /late HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with raw(local.port, head) as connection:
        assert begun.wait(DEADLINE)
        stopping = threading.Thread(target=local.server.stop)
        stopping.start()
        received = rest_of(connection)
        ends.set()
        stopping.join(DEADLINE)
    assert received.startswith(b"HTTP/1.1 503 ") and received.endswith(b"is shutting down")
