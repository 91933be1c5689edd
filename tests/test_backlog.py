"""Messages of other threads on their way to the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sqlrooms_server.features.backlog import Backlog
from tests.conftest import LocalServer
from tests.wire import DEADLINE


def waiting(add: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=add, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    return thread


@pytest.mark.parametrize(("sizes", "size"), [((1, 1, 1), 1), ((40,), 61), ((101,), 1)])
def test_who_finds_no_room_waits(sizes: tuple[int, ...], size: int) -> None:
    backlog = Backlog(3, 100)
    for one in sizes:
        assert backlog.add(one)
    thread = waiting(lambda: backlog.add(size))
    for one in sizes:
        backlog.remove(one)
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_nobody_waits_after_the_end() -> None:
    backlog = Backlog(1, 100)
    assert backlog.add(1)
    threads = [waiting(lambda: backlog.add(1)) for _ in range(3)]
    backlog.end()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert not backlog.add(1)


def test_publishers_do_not_wait_for_a_server_that_has_stopped(
    launch: Callable[..., LocalServer],
) -> None:
    server = launch(channel_history=0).server
    is_over = threading.Event()

    def publish() -> None:
        while not is_over.is_set():
            server.channels.publish("c", 1)

    threads = [threading.Thread(target=publish, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.stop()
    # More than may wait.
    for _ in range(10_001):
        server.channels.publish("c", 1)
    is_over.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
