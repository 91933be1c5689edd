"""Where the time of `select 1` goes: `python -m bench_suite.timeline` prints JSON.

The server runs in this process, and it is noted when an answer passes from one thread to the next.
The client is a process of its own, as it always is; both read the same clock of the kernel. So that
the parts add up, they are those of the median answers: the tenth around the median.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from statistics import mean
from time import perf_counter
from typing import Any

from sqlrooms_server import Server, Settings
from sqlrooms_server.features.requests import Request
from sqlrooms_server.jobs import Scheduler

from . import load
from .answers import ONE
from .replies import Answers, Whole
from .websocket import Connection

WARM_UP, QUERIES = 500, 3000

# From one moment to the next. The client has the answer before the loop is done with sending it.
PARTS = ("arrive", "accept", "wake", "work", "return", "send")


class _Moments:
    """When each step of the answers was reached, in their order."""

    def __init__(self) -> None:
        self.lists: list[list[float]] = []

    def watch(self, owner: type, name: str, *, at_end: bool = False) -> None:
        """Note when a method begins, or ends. To be called in the order of the steps."""
        inner: Callable[..., Any] = getattr(owner, name)
        moments: list[float] = []
        self.lists.append(moments)

        @wraps(inner)
        def noted(*arguments: Any, **named: Any) -> Any:
            if not at_end:
                moments.append(perf_counter())
            result = inner(*arguments, **named)
            if at_end:
                moments.append(perf_counter())
            return result

        setattr(owner, name, noted)


def measure() -> dict[str, float]:
    """The microseconds of each of the parts."""
    moments = _Moments()
    moments.watch(Server, "message")
    moments.watch(Scheduler, "submit", at_end=True)
    moments.watch(Scheduler, "_advance")
    moments.watch(Request, "done")
    moments.watch(Request, "_finish")
    server = Server(Settings(port=0, host="127.0.0.1"))
    port = server.start()
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.timeline", str(port)],
            capture_output=True,
            text=True,
            timeout=60.0,
            check=True,
        )
    finally:
        server.stop()
    asked, answered = json.loads(done.stdout)
    answers = list(zip(asked, *moments.lists, answered, strict=True))[WARM_UP:]
    answers.sort(key=lambda times: times[-1] - times[0])
    middle = answers[len(answers) * 9 // 20 : len(answers) * 11 // 20]
    return {
        part: mean(times[number + 1] - times[number] for times in middle) * 1e6
        for number, part in enumerate(PARTS)
    }


def _ask(port: int) -> tuple[list[float], list[float]]:
    """When the questions were asked and answered."""
    asked, answered = [], []
    answers, whole = Answers(ONE), Whole()
    with Connection(port) as connection:
        for number in range(WARM_UP + QUERIES):
            question = load.as_message("arrow", sql=ONE.sql, queryId=f"q{number}")
            asked.append(perf_counter())
            connection.send(question)
            while not (messages := whole.take()):
                connection.receive(whole)
            answered.append(perf_counter())
            answers.accept(messages[0])
    return asked, answered


def main() -> None:
    # With a port, it is the client.
    print(json.dumps(_ask(int(sys.argv[1])) if len(sys.argv) > 1 else measure()))


if __name__ == "__main__":
    main()
