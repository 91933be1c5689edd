"""Chunked results as a client puts them together, checking every frame on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from tests.wire import Arrow, Wire


@dataclass
class Stream:
    """One chunked result: what came of it so far."""

    query_id: Any
    body: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.summary is not None or self.error is not None

    @property
    def code(self) -> Any:
        return None if self.error is None else self.error["code"]

    def add(self, frame: Arrow) -> None:
        assert not self.ended, frame.header
        assert frame.header["type"] == "arrow"
        assert frame.header["seq"] == len(self.sizes)
        self.sizes.append(len(frame.body))
        self.body += frame.body
        if frame.header["last"]:
            self.summary = frame.header
            assert frame.header["bytes"] == len(self.body)
        else:
            assert set(frame.header) == {"type", "queryId", "seq", "last"}
            assert frame.body

    def table(self) -> pa.Table:
        assert self.summary is not None, self.error
        return pa.ipc.open_stream(bytes(self.body)).read_all()


class Streams:
    """The chunked results of one connection. ``others`` are the messages between them."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.of: dict[Any, Stream] = {}
        self.others: list[Any] = []

    def ask(self, sql: str, query_id: Any = "s", **options: Any) -> Stream:
        self.of[query_id] = Stream(query_id)
        self.wire.send(type="arrow", sql=sql, queryId=query_id, stream=True, **options)
        return self.of[query_id]

    def receive(self) -> Stream | None:
        """Take the next frame; its stream, None when it belongs to none."""
        frame = self.wire.receive()
        if isinstance(frame, Arrow):
            stream = self.of.get(frame.header["queryId"])
            if stream is not None and "seq" in frame.header:
                stream.add(frame)
                return stream
        elif frame["type"] == "error" and frame.get("queryId") in self.of:
            stream = self.of[frame["queryId"]]
            assert not stream.ended
            stream.error = frame
            return stream
        self.others.append(frame)
        return None

    def ack(self, stream: Stream) -> None:
        self.wire.send(type="ack", queryId=stream.query_id, bytes=len(stream.body))

    def finish(self, streams: Iterable[Stream] | None = None, *, acks: bool = False) -> None:
        """Read until ``streams``, or all, have ended."""
        wanted = list(self.of.values() if streams is None else streams)
        for stream in wanted:
            if acks and stream.body and not stream.ended:
                self.ack(stream)
        while not all(stream.ended for stream in wanted):
            received = self.receive()
            if acks and received is not None and not received.ended:
                self.ack(received)

    def until(self, kind: str) -> Any:
        """Read until a message of type ``kind`` comes that belongs to no stream."""
        while True:
            for frame in self.others:
                if isinstance(frame, dict) and frame["type"] == kind:
                    self.others.remove(frame)
                    return frame
            self.receive()

    def settle(self) -> None:
        """Return when the server has handled everything that was sent before."""
        self.wire.send(type="hello")
        self.until("welcome")


def stream(wire: Wire, sql: str, **options: Any) -> Stream:
    """The chunked result of ``sql``, read to its end."""
    streams = Streams(wire)
    asked = streams.ask(sql, **options)
    streams.finish(acks="window" in options)
    assert not streams.others
    return asked
