"""What a server costs before it does anything: time to start, and memory of clients and streams."""

from __future__ import annotations

import subprocess
import threading
from contextlib import ExitStack
from time import perf_counter

from . import load
from .answers import ONE, WrongAnswer, counted
from .load import Sample
from .plan import Effort
from .replies import Answers, Message, arrow_reply
from .servers import Server, ServerFailed, starting

CLIENTS = 500
STREAMS = 8
# 160 MB each.
STREAM_ROWS = 10_000_000
IMPORTS = 3


def start(server: Server, effort: Effort, _: bool) -> Sample:
    """Another server of the same kind, from nothing to its first answer. `server` says which."""
    began = perf_counter()
    with starting(server.environment, peer=server.peer) as (another, wait):
        wait()
        with another.connect() as connection:
            # Its own client, where there is one, would take part of the time.
            answers = None if another.peer.checks is None else _AnyAnswer(ONE)
            load.one_at_a_time(connection, ONE, 0, answers, least=1)
        first = perf_counter() - began
        sample = {"first": first, "memory": another.usage.memory() / 1e6}
    if server.peer.module:
        sample["module"] = min(_import(server) for _ in range(IMPORTS))
    return sample


class _AnyAnswer(Answers):
    """Takes an answer that is checked elsewhere."""

    def accept(self, message: Message) -> str:
        return arrow_reply(message)[0]


def _import(server: Server) -> float:
    """Seconds that importing the server's module takes, without starting Python."""
    code = (
        "from time import perf_counter as now; began = now(); "
        f"import {server.peer.module}; print(now() - began)"
    )
    python = server.environment / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30.0)
    if done.returncode:
        raise ServerFailed(done.stderr.strip()[-500:])
    return float(done.stdout)


def memory(server: Server, effort: Effort, _: bool) -> Sample:
    """Resident memory of each of many clients that have asked once, and of each large result."""
    answers = server.answers(ONE)
    with ExitStack() as stack:
        # What it loads or allocates for the first few is no part of what each costs.
        for _warm in range(20):
            with server.connect() as connection:
                load.one_at_a_time(connection, ONE, 0, answers, least=1)
        before = server.usage.memory()
        for _client in range(CLIENTS):
            connection = stack.enter_context(server.connect())
            load.one_at_a_time(connection, ONE, 0, answers, least=1)
        clients = server.usage.memory() - before
    return {"connection": clients / CLIENTS / 1e3, "stream": _streams(server) / STREAMS / 1e6}


def _streams(server: Server) -> int:
    """How far memory rises while several clients receive a large result each."""
    query = server.version_of(counted(STREAM_ROWS))
    failed: list[Exception] = []

    def receive() -> None:
        try:
            with server.connect() as connection:
                server.stream(connection, query)
        except (OSError, WrongAnswer, ServerFailed) as error:
            failed.append(error)

    before = server.usage.memory()
    server.usage.reset_peak()
    threads = [threading.Thread(target=receive, daemon=True) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return server.usage.peak_memory() - before
