"""A cheap stand-in for the client of DuckDB's Quack, for many small questions.

It sends what DuckDB's own client sends: CONNECTION_REQUEST once, and for each question a
PREPARE_REQUEST over a new TCP connection. It decodes nothing, and takes small results only: those
that come whole with the answer to PREPARE_REQUEST. Large results are for the client itself, in
`quack_process.py`, which also says whether the small ones are right.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import tempfile
from pathlib import Path

from . import quack_process
from .answers import Query, WrongAnswer
from .http_client import HttpConnection
from .websocket import SILENCE, Disconnected

# Fields are a number of two bytes and a value; a string is its length and its bytes; FFFF ends an
# object. Numbers and lengths are LEB128. The first object of a message is its head.
_END = b"\xff\xff"
_CONNECTION_REQUEST, _CONNECTION_RESPONSE, _PREPARE_REQUEST, _PREPARE_RESPONSE = 1, 2, 3, 4
_SESSION_SIZE = 32
_QUERY_NUMBER = 1
# What the server says it is does not depend on this.
_GREETING = (quack_process.TOKEN.encode(), b"v1.5.5", b"linux_amd64")
_BINARY = {"Content-Type": "application/octet-stream"}


class QuackSession:
    """The dialect of one session on a Quack server."""

    renewed = True
    suffix = b""

    def __init__(self, session: bytes) -> None:
        self._session = session

    def request(self, kind: str, sql: str) -> tuple[str, dict[str, str], bytes]:
        message = _message(_PREPARE_REQUEST, self._session, b"\x01\x00" + _string(sql.encode()))
        return "/quack", _BINARY, message

    def answer(self, body: memoryview) -> memoryview:
        """Without the number of the result, which is new each time and comes last."""
        if body[2] != _PREPARE_RESPONSE:
            raise Disconnected(f"a question was answered with {bytes(body[:300])!r}")
        # Two numbers of 64 bits as LEB128, and the end marks.
        tail = bytes(body[-28:])
        return body[: len(body) - len(tail) + tail.rfind(_END + b"\x05\x00")]


def connect(port: int) -> HttpConnection:
    """Begin a session. As with DuckDB's client, each question then has a connection of its own."""
    fields = [bytes([number, 0]) + _string(text) for number, text in enumerate(_GREETING, 1)]
    # The least and the greatest version of the protocol.
    fields.append(b"\x04\x00\x01\x05\x00\x01")
    answer = _post(port, _message(_CONNECTION_REQUEST, b"", b"".join(fields)))
    at = answer.find(b"\x02\x00" + bytes([_SESSION_SIZE])) + 3
    if answer[2] != _CONNECTION_RESPONSE or at < 3:
        raise Disconnected(f"a session was answered with {answer[:300]!r}")
    return HttpConnection(port, QuackSession(answer[at : at + _SESSION_SIZE]))


def check(environment: Path, port: int, query: Query) -> None:
    """Let DuckDB's client ask, and check its answer."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        file = Path(directory, "answer")
        _client(environment, "ask", port, query, str(file))
        query.decode(file.read_bytes())


def timed(environment: Path, port: int, query: Query) -> dict[str, float]:
    """Let DuckDB's client ask: seconds until the `first` rows and for all, and `size` in bytes."""
    figures: dict[str, float] = json.loads(_client(environment, "time", port, query))
    query.expect_rows(int(figures["rows"]))
    return figures


def _client(environment: Path, what: str, port: int, query: Query, *more: str) -> str:
    command: list[str | Path] = [
        environment / "bin" / "python",
        quack_process.__file__,
        what,
        str(port),
        *more,
    ]
    try:
        done = subprocess.run(
            command,
            input=query.sql,
            capture_output=True,
            text=True,
            timeout=SILENCE,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise Disconnected(f"no answer within {SILENCE:.0f} s") from error
    if done.returncode:
        raise WrongAnswer(done.stderr.strip()[-500:])
    return done.stdout


def _message(kind: int, session: bytes, fields: bytes) -> bytes:
    head = bytes([1, 0, kind]) + (b"\x02\x00" + _string(session) if session else b"")
    return head + bytes([3, 0, _QUERY_NUMBER]) + _END + fields + _END


def _string(text: bytes) -> bytes:
    size, coded = len(text), bytearray()
    while size > 127:
        coded.append(size & 127 | 128)
        size >>= 7
    return bytes([*coded, size]) + text


def _post(port: int, body: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SILENCE)
    try:
        connection.request("POST", "/quack", body, _BINARY)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200 or len(content) < 3:
            raise Disconnected(f"a session was answered with {answer.status} {answer.reason}")
        return content
    except http.client.HTTPException as error:
        raise Disconnected(f"a session was not answered: {error!r}") from error
    finally:
        connection.close()
