"""Timers: order, cancelling, and callbacks that fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sqlrooms_server.timers import Timers
from tests.wire import DEADLINE


@pytest.fixture
def timers() -> Iterator[Timers]:
    made = Timers()
    yield made
    made.close()


def test_calls_come_in_the_order_of_their_times(timers: Timers) -> None:
    called: list[int] = []
    ended = threading.Event()
    timers.after(0.10, ended.set)
    for number in (3, 1, 2):
        timers.after(number / 100, lambda number=number: called.append(number))  # type: ignore[misc]
    assert ended.wait(DEADLINE)
    assert called == [1, 2, 3]


def test_what_is_cancelled_is_not_called(timers: Timers) -> None:
    called: list[str] = []
    ended = threading.Event()
    cancelled = timers.after(0.01, lambda: called.append("cancelled"))
    timers.after(0.02, ended.set)
    cancelled.cancel()
    cancelled.cancel()
    assert ended.wait(DEADLINE)
    assert called == []


def test_a_callback_that_fails_does_not_stop_the_others(
    timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    timers.after(0.0, lambda: 1 / 0)  # type: ignore[arg-type]
    timers.after(0.01, ended.set)
    assert ended.wait(DEADLINE)
    assert "ZeroDivisionError" in caplog.text


def test_cancelled_timers_do_not_pile_up(timers: Timers) -> None:
    for _ in range(20_000):
        timers.after(3600, lambda: None).cancel()
    assert len(timers._heap) < 2000


def test_closing_calls_nothing_more() -> None:
    timers = Timers()
    called: list[int] = []
    timers.after(3600, lambda: called.append(1))
    timers.close()
    assert called == []


def test_a_timer_may_be_centuries_away(timers: Timers) -> None:
    timers.after(1e11, lambda: None)
    called = threading.Event()
    timers.after(0.01, called.set)
    # The thread waits for the one that is far away now.
    assert called.wait(DEADLINE)
    called.clear()
    timers.after(0.01, called.set)
    assert called.wait(DEADLINE)
