"""Puts load on a server, checks every answer, and takes the times. Times are in seconds."""

from __future__ import annotations

import json
import selectors
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .answers import Query, Upload, WrongAnswer
from .replies import (
    Answers,
    Chunks,
    Message,
    Passing,
    UploadReplies,
    Whole,
    arrow_header,
    arrow_reply,
)
from .websocket import SILENCE, Connection, Conversation, Disconnected

if TYPE_CHECKING:
    from .servers import Server

Sample = dict[str, float]
"""What one repetition of a workload found, by the key of the metric."""


def p99(latencies: Sequence[float]) -> float:
    """The 99th percentile. Raises `WrongAnswer` when there is no answer."""
    if not latencies:
        raise WrongAnswer("no answer in a part of the time")
    return sorted(latencies)[len(latencies) * 99 // 100]


@dataclass(frozen=True)
class Rate:
    """Answers received in a window of `seconds`, and how long each of them took."""

    seconds: float
    latencies: list[float]

    def sample(self) -> Sample:
        """Queries per second (`qps`), and the median and 99th percentile in ms (`p50`, `p99`)."""
        ordered = sorted(self.latencies)
        if not ordered:
            raise WrongAnswer(f"no answer within {self.seconds:.1f} s")
        return {
            "qps": len(ordered) / self.seconds,
            "p50": ordered[len(ordered) // 2] * 1e3,
            "p99": p99(ordered) * 1e3,
        }


@dataclass(frozen=True)
class Stream:
    """One large answer: its Arrow bytes, and when what had arrived after the question."""

    size: int
    first_byte: float
    first_rows: float
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        return self.size / 1e6 / self.seconds


def execute(connection: Conversation, sql: str) -> None:
    """Execute a statement without a result."""
    connection.send(_question("exec", sql, "setup"))
    binary, message = _reply(connection, Whole())
    if binary or json.loads(message).get("type") != "ok":
        raise WrongAnswer(f"a statement was answered with {bytes(message[:300])!r}")


def decode(connection: Conversation, query: Query) -> None:
    """Ask once, and decode and check the whole answer."""
    connection.send(_question("arrow", query.sql, "decode"))
    answered, body = arrow_reply(_reply(connection, Whole()))
    _expect_id(answered, "decode")
    query.decode(body)


def one_at_a_time(
    connection: Conversation,
    query: Query,
    seconds: float,
    answers: Answers | None = None,
    *,
    least: int = 0,
) -> Rate:
    """Ask again as soon as the answer is there, for `seconds`, and `least` times."""
    whole, answers = Whole(), answers or Answers(query)
    latencies: list[float] = []
    start = perf_counter()
    until = start + seconds
    for number in count():
        asked_id = f"q{number}"
        question = _question("arrow", query.sql, asked_id)
        asked = perf_counter()
        if asked >= until and number >= least:
            break
        connection.send(question)
        reply = _reply(connection, whole)
        latencies.append(perf_counter() - asked)
        _expect_id(answers.accept(reply), asked_id)
    return Rate(asked - start, latencies)


def many_at_once(
    server: Server,
    query: Query,
    seconds: float,
    connections: int,
    in_flight: int,
    *,
    late: bool = False,
    **options: Any,
) -> Rate:
    """Keep `in_flight` questions open on each of `connections` connections, for `seconds`.

    With `late`, answers that come later count as well, and the time they took; that is for
    questions that take long.
    A server that takes one question at a time gets as many connections as there are questions.
    """
    if not server.peer.multiplexes:
        connections, in_flight = connections * in_flight, 1
    answers = server.answers(query)
    latencies: list[float] = []
    numbers = count()
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        question = _question("arrow", query.sql, "%s", **options)
        clients = [
            _Client(stack.enter_context(server.connect()), question, selector)
            for _ in range(connections)
        ]
        start = perf_counter()
        until = start + seconds
        for client in clients:
            for _ in range(in_flight):
                client.ask(f"q{next(numbers)}")
        while any(client.asked for client in clients):
            ready = selector.select(SILENCE)
            if not ready:
                raise Disconnected(f"no answer within {SILENCE:.0f} s")
            for key, _ in ready:
                client = key.data
                client.connection.receive(client.whole)
                client.watch()
                now = perf_counter()
                for reply in client.whole.take():
                    asked = client.asked.pop(answers.accept(reply), None)
                    if asked is None:
                        raise WrongAnswer("an answer to a question that is not open")
                    if late or now < until:
                        latencies.append(now - asked)
                    if now < until:
                        client.ask(f"q{next(numbers)}")
    return Rate(now - start if late else seconds, latencies)


def stream(connection: Conversation, query: Query) -> Stream:
    """Ask once and let the answer pass, counting its rows."""
    passing = Passing()
    question = _question("arrow", query.sql, "stream")
    asked = perf_counter()
    connection.send(question)
    while not passing.ended:
        connection.receive(passing)
    done = perf_counter()
    _expect_id(passing.query_id(), "stream")
    query.expect_rows(passing.scan.rows)
    return Stream(
        size=passing.scan.size,
        first_byte=passing.first_byte - asked,
        first_rows=passing.first_rows - asked,
        seconds=done - asked,
    )


def chunked_stream(connection: Connection, query: Query, window: int) -> Stream:
    """Ask once for chunks, let them pass, and acknowledge half a window at a time."""
    chunks = Chunks()
    asked = perf_counter()
    connection.send(_question("arrow", query.sql, "chunked", stream=True, window=window))
    acknowledged = 0
    while not chunks.ended:
        connection.receive(chunks)
        if chunks.scan.size - acknowledged > window // 2 and not chunks.ended:
            acknowledged = chunks.scan.size
            connection.send(as_message("ack", queryId="chunked", bytes=acknowledged))
    done = perf_counter()
    query.expect_rows(chunks.scan.rows)
    return Stream(
        size=chunks.scan.size,
        first_byte=chunks.first_byte - asked,
        first_rows=chunks.first_rows - asked,
        seconds=done - asked,
    )


def first_rows_of_client(port: int, query: Query) -> float:
    """When the Python client hands out the first batch, as a part of the time of all."""
    from sqlrooms_server.client import connect

    with connect(f"ws://127.0.0.1:{port}") as client:
        asked = perf_counter()
        first, rows = 0.0, 0
        for batch in client.query(query.sql):
            first = first or perf_counter() - asked
            rows += batch.num_rows
        whole = perf_counter() - asked
    query.expect_rows(rows)
    return first / whole


def streams_at_once(connection: Connection, queries: Sequence[Query]) -> float:
    """Ask for all at once in chunks, decode and check every answer; MB/s of all together."""
    whole = Whole()
    bodies = [bytearray() for _ in queries]
    open_streams = set(range(len(queries)))
    asked = perf_counter()
    for number, query in enumerate(queries):
        connection.send(_question("arrow", query.sql, str(number), stream=True))
    while open_streams:
        connection.receive(whole)
        for reply in whole.take():
            head_size = 4 + int.from_bytes(reply[1][:4], "big")
            number_text, body = arrow_reply(reply)
            bodies[int(number_text)] += body
            if arrow_header(reply[1][:head_size])["last"]:
                open_streams.remove(int(number_text))
    seconds = perf_counter() - asked
    for query, stream_body in zip(queries, bodies, strict=True):
        query.decode(stream_body)
    return sum(map(len, bodies)) / 1e6 / seconds


def cancel_among_streams(connection: Connection, query: Query, others: int) -> float:
    """How long one of many streams, all at full speed, takes to be cancelled, in seconds.

    Until the acknowledgement and the error are both there. The other streams stay unread.
    """
    whole = Whole()
    for number in range(others + 1):
        connection.send(_question("arrow", query.sql, str(number), stream=True))
    flowing: set[str] = set()
    while len(flowing) <= others:
        connection.receive(whole)
        flowing |= {arrow_reply(reply)[0] for reply in whole.take()}
    connection.send(as_message("cancel", queryId="0"))
    asked = perf_counter()
    expected = {"cancelAck", "error"}
    while expected:
        connection.receive(whole)
        for binary, message in whole.take():
            if not binary:
                expected.discard(json.loads(message)["type"])
    return perf_counter() - asked


def upload(connection: Connection, data: Upload, window: int) -> float:
    """Upload to table `t` within `window` bytes; MB/s."""
    replies = UploadReplies()
    sent = 0
    began = perf_counter()
    for seq, (message, last) in enumerate(data.messages()):
        while sent and sent - replies.consumed + len(message) > window:
            connection.receive(replies)
        fields = {"queryId": "u", "tableName": "t", "seq": seq, "last": last}
        header = as_message("uploadArrow", **fields)
        header += b" " * (-(4 + len(header)) % 8)
        connection.send_binary(len(header).to_bytes(4, "big") + header, message)
        sent += len(message)
    while replies.rows is None:
        connection.receive(replies)
    seconds = perf_counter() - began
    if replies.rows != data.rows:
        raise WrongAnswer(f"{replies.rows} rows instead of {data.rows}")
    return sent / 1e6 / seconds


class _Client:
    """One of many connections, with the time at which each of its open questions was asked.

    `question` has `%s` where the query id goes: what a client costs is missing to the server.
    """

    def __init__(
        self, connection: Conversation, question: bytes, selector: selectors.BaseSelector
    ) -> None:
        self.connection = connection
        self._selector = selector
        self._generation = self._file = 0
        self._before, self._after = question.split(b"%s")
        self.whole = Whole()
        self.asked: dict[str, float] = {}

    def ask(self, query_id: str) -> None:
        question = self._before + query_id.encode() + self._after
        self.asked[query_id] = perf_counter()
        self.connection.send(question)
        self.watch()

    def watch(self) -> None:
        """Watch for the next event; a new socket may have the number of the one before."""
        if self._generation == self.connection.generation:
            return
        if self._generation:
            self._selector.unregister(self._file)
        self._generation, self._file = self.connection.generation, self.connection.fileno()
        self._selector.register(self._file, self.connection.events, self)


def _question(kind: str, sql: str, query_id: str, **options: Any) -> bytes:
    return as_message(kind, sql=sql, queryId=query_id, **options)


def as_message(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, **fields}).encode()


def _reply(connection: Conversation, whole: Whole) -> Message:
    while not whole.messages:
        connection.receive(whole)
    messages = whole.take()
    if len(messages) > 1:
        raise WrongAnswer("two answers to one question")
    return messages[0]


def _expect_id(found: str, right: str) -> None:
    if found != right:
        raise WrongAnswer(f"query {right!r} was answered as {found!r}")
