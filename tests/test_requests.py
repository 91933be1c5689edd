"""Requests without a server: the test is the loop thread, and decides when the work goes on."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sqlrooms_server.errors import Cancelled
from sqlrooms_server.features.chunked import ChunkedRequest
from sqlrooms_server.features.requests import Request, Requests
from sqlrooms_server.jobs import Pause, Scheduler, Work
from sqlrooms_server.peer import Peer
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport import FrameSource, Source
from tests.wire import DEADLINE


class SlowPeer(Peer):
    """A client that takes nothing of a reply but records its text messages."""

    __slots__ = ("messages",)

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Any] = []

    def send(self, message: bytes) -> None:
        self.messages.append(json.loads(message))

    def stream(self, source: Source, *, is_text: bool) -> None:
        pass

    def stream_frames(self, source: FrameSource) -> None:
        pass


class Loop:
    """What is posted to the loop thread, run by the test."""

    def __init__(self) -> None:
        self._posted: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.Queue()

    def post(self, callback: Callable[..., None], *arguments: Any) -> None:
        self._posted.put((callback, arguments))

    def run_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            callback, arguments = self._posted.get(timeout=DEADLINE)
            callback(*arguments)


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def requests(loop: Loop) -> Iterator[Requests]:
    timers = Timers()
    scheduler = Scheduler(1, 10, timers)
    yield Requests(scheduler, timers, loop.post, max_in_flight=10, max_held=1 << 20)
    assert scheduler.close(time.monotonic() + DEADLINE)
    timers.close()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_stop_between_the_last_chunk_and_the_end(
    loop: Loop, requests: Requests, is_chunked: bool
) -> None:
    """The work ends as if nothing had happened; the client still waits for the end it asked for."""
    peer = SlowPeer()
    request: Request
    if is_chunked:
        request = ChunkedRequest(requests, peer, "q", size=0, window=10, idle_timeout=DEADLINE)
    else:
        request = Request(requests, peer, "q")
    has_put, may_end = threading.Event(), threading.Event()

    def work() -> Work:
        yield Pause.TURN
        request.put(bytes(100_000))
        has_put.set()
        assert may_end.wait(DEADLINE)

    assert requests.submit(request, work())
    assert has_put.wait(DEADLINE)
    assert request.stop(Cancelled("The query was cancelled."))
    may_end.set()
    loop.run_until(lambda: request.answered)
    assert [message["code"] for message in peer.messages] == ["cancelled"]
    assert requests.find(peer, "q") is None
