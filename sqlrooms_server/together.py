"""Functions that wait, called at one time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def together(functions: Sequence[Callable[[], T]]) -> list[T]:
    """What ``functions`` return, each on a thread of its own if there are several.

    Raises what the first one raises, once all have ended.
    """
    if len(functions) == 1:
        return [functions[0]()]
    outcomes: list[Future[T]] = [Future() for _ in functions]
    # No pool: those refuse to work while the interpreter ends, which is when some servers stop.
    threads = [
        threading.Thread(target=_call, args=(function, outcome), name="together")
        for function, outcome in zip(functions, outcomes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome.result() for outcome in outcomes]


def _call(function: Callable[[], T], outcome: Future[T]) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:  # handed to the thread that waits
        outcome.set_exception(error)
