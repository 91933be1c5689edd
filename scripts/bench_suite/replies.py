"""Receivers for a server's replies, and the checks of what they received."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

from .answers import Query, WrongAnswer
from .arrow_scan import BrokenStream, StreamScan

Message = tuple[bool, bytearray]
"""Whether it is binary, and its bytes."""


def arrow_reply(message: Message) -> tuple[str, memoryview]:
    """The query id and the Arrow bytes of a reply."""
    binary, data = message
    if not binary:
        raise WrongAnswer(f"a query was answered with {bytes(data[:300])!r}")
    end = 4 + int.from_bytes(data[:4], "big")
    return query_id(data[:end]), memoryview(data)[end:]


def arrow_head(answered: bytes) -> bytes:
    """What comes before the Arrow bytes of a reply to the query of this id."""
    header = b'{"type": "arrow", "queryId": "%b"}' % answered
    return len(header).to_bytes(4, "big") + header


def query_id(head: bytearray) -> str:
    """The query id in the head of an Arrow reply."""
    return str(arrow_header(head).get("queryId"))


def arrow_header(head: bytearray) -> dict[str, Any]:
    """The header in the head of an Arrow reply: four bytes of length, then JSON."""
    try:
        header: dict[str, Any] = json.loads(head[4:])
    except ValueError as error:
        raise WrongAnswer(f"header {bytes(head[:300])!r}: {error}") from error
    if header.get("type") != "arrow":
        raise WrongAnswer(f"header {header!r}")
    return header


class Answers:
    """Checks small answers. One whose bytes were decoded before is not decoded again."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._right: set[bytes] = set()

    def accept(self, message: Message) -> str:
        """The id of the query that got this right answer."""
        answered, view = arrow_reply(message)
        body = bytes(view)
        if body not in self._right:
            self._query.decode(body)
            self._right.add(body)
        return answered


class SameAnswers(Answers):
    """Checks small answers that are not Arrow: all have to equal the first, which is right."""

    def accept(self, message: Message) -> str:
        answered, view = arrow_reply(message)
        body = bytes(view)
        self._right = self._right or {body}
        if body not in self._right:
            raise WrongAnswer(f"{body[:300]!r} is not the first answer")
        return answered


class Whole:
    """A receiver that keeps whole messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._current = bytearray()

    def piece(self, data: memoryview) -> None:
        self._current += data

    def end(self, binary: bool) -> None:
        self.messages.append((binary, self._current))
        self._current = bytearray()

    def take(self) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages


class Passing:
    """A receiver that lets one large answer pass and keeps only its head, or an error's text.

    The times are those of `perf_counter`; `first_rows` is when a record batch with rows began.
    """

    def __init__(self) -> None:
        self.scan = StreamScan()
        self.first_byte = 0.0
        self.first_rows = 0.0
        self.ended = False
        self._head = bytearray()
        self._head_size = 0
        self._head_complete = False

    def piece(self, data: memoryview) -> None:
        if not self.first_byte:
            self.first_byte = perf_counter()
        if not self._head_complete:
            data = self._read_head(data)
        try:
            self.scan.feed(data)
        except BrokenStream as error:
            raise WrongAnswer(str(error)) from error
        if self.scan.rows and not self.first_rows:
            self.first_rows = perf_counter()

    def end(self, binary: bool) -> None:
        if self.ended:
            raise WrongAnswer("two answers to one question")
        if not binary:
            raise WrongAnswer(f"a query was answered with {bytes(self._head[:300])!r}")
        if not self.scan.complete:
            raise WrongAnswer("the Arrow stream has no end")
        self.ended = True

    def query_id(self) -> str:
        return query_id(self._head)

    def _read_head(self, data: memoryview) -> memoryview:
        """Take what belongs to the head; the rest is Arrow's."""
        self._head += data
        if not self._head_size and len(self._head) >= 4:
            self._head_size = 4 + int.from_bytes(self._head[:4], "big")
        self._head_complete = 0 < self._head_size <= len(self._head)
        if not self._head_complete:
            return memoryview(b"")
        rest = memoryview(bytes(self._head[self._head_size :]))
        del self._head[self._head_size :]
        return rest


class Chunks(Passing):
    """A receiver that lets one large answer pass that comes in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self._seq = 0

    def end(self, binary: bool) -> None:
        if self.ended or not binary:
            raise WrongAnswer(f"a query was answered with {bytes(self._head[:300])!r}")
        header = arrow_header(self._head)
        if header.get("seq") != self._seq:
            raise WrongAnswer(f"chunk {self._seq} came as {header!r}")
        self._seq += 1
        self.ended = header["last"]
        if self.ended:
            if not self.scan.complete:
                raise WrongAnswer("the Arrow stream has no end")
            if (header["rows"], header["bytes"]) != (self.scan.rows, self.scan.size):
                raise WrongAnswer(f"the summary does not fit: {header!r}")
        else:
            self._head.clear()
            self._head_size = 0
            self._head_complete = False


class UploadReplies:
    """A receiver for the answers to an upload in chunks."""

    def __init__(self) -> None:
        self.consumed = 0
        self.rows: int | None = None
        self._current = bytearray()

    def piece(self, data: memoryview) -> None:
        self._current += data

    def end(self, binary: bool) -> None:
        message = json.loads(self._current)
        self._current.clear()
        if message["type"] == "uploadProgress":
            self.consumed = message["bytes"]
        elif message["type"] == "uploadAck":
            self.rows = message["rows"]
        else:
            raise WrongAnswer(f"an upload was answered with {message!r}")
