"""A client of one resumable stream, which comes back whenever its connection is lost."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pyarrow as pa
from websockets.exceptions import ConnectionClosed

from tests.test_large_results import abort
from tests.wire import Arrow, Wire


class Resumer:
    """What came of a stream so far. ``others`` are messages that belong to nothing here."""

    def __init__(self, url: str, *, acks: bool = True, **options: Any) -> None:
        self.url = url
        self.acks = acks
        self.options = options
        self.token = ""
        self.window = 0
        self.body = bytearray()
        self.seq = 0
        self.acked = 0
        self.attempts = 0
        self.summary: dict[str, Any] | None = None
        self.answer: dict[str, Any] | None = None
        self.others: list[Any] = []
        self.wire: Wire | None = None
        self.query_id: Any = None
        self._ids = itertools.count()

    @property
    def is_over(self) -> bool:
        return self.summary is not None or self.answer is not None

    def ask(self, sql: str = "", **options: Any) -> None:
        """Ask, and wait for the token."""
        self.connect()
        self.send(
            **{"type": "arrow", "sql": sql, **options},
            queryId=self.query_id,
            stream=True,
            resumable=True,
        )
        while not self.token:
            self.receive()

    def read(self, size: int) -> None:
        """Receive until there are ``size`` bytes."""
        while len(self.body) < size:
            self.receive()

    def connect(self) -> None:
        self.attempts += 1
        self.query_id = f"attempt {next(self._ids)}"
        self.wire = Wire(self.url, **self.options)

    def send(self, **fields: Any) -> None:
        assert self.wire is not None
        self.wire.send(**fields)

    def resume(self) -> None:
        """Connect again, and ask for what is missing."""
        self.connect()
        self.send(
            type="resume",
            token=self.token,
            queryId=self.query_id,
            seq=self.seq,
            bytes=self.acked,
        )

    def lose(self) -> None:
        """Lose the connection, and what is under way on it."""
        assert self.wire is not None
        abort(self.wire)
        self.close()

    def receive(self) -> Any:
        assert self.wire is not None
        frame = self.wire.receive()
        self.take(frame)
        return frame

    def take(self, frame: Any) -> None:
        if isinstance(frame, Arrow):
            assert frame.header["queryId"] == self.query_id
            assert frame.header["seq"] == self.seq
            self.seq += 1
            self.body += frame.body
            if frame.header["last"]:
                self.summary = frame.header
                assert frame.header["bytes"] == len(self.body)
            if self.acks:
                self.acked = len(self.body)
                last = frame.header["last"]
                with suppress(ConnectionClosed):
                    self.send(type="ack", queryId=self.query_id, bytes=self.acked, last=last)
        elif frame["type"] == "resumable":
            self.token, self.window = frame["token"], frame["window"]
        elif frame["type"] in ("error", "ok", "reply") and frame["queryId"] == self.query_id:
            self.answer = frame
        elif frame["type"] != "resumed":
            self.others.append(frame)

    def finish(self) -> None:
        """Read to the end, over as many connections as that takes, and leave."""
        while not self.is_over:
            try:
                if self.wire is None:
                    self.resume()
                while not self.is_over:
                    self.receive()
            except (ConnectionClosed, OSError, EOFError):
                self.close()
        self.close()

    def close(self) -> None:
        if self.wire is not None:
            with self.wire:
                self.wire = None

    def table(self) -> pa.Table:
        assert self.summary is not None, self.answer
        return pa.ipc.open_stream(bytes(self.body)).read_all()
