"""What plugins cost those who ask nothing of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from . import load
from .answers import ONE
from .replies import Whole
from .websocket import Connection

PLUGINS = Path(__file__).with_name("example_plugins.py")

TURN_SECONDS = 0.1

SLEEP_SECONDS = 1.0
SLEEPERS = 4


def in_turn(ports: Sequence[int], seconds: float) -> list[list[float]]:
    """How long `select 1` takes on each of the servers, asked for so many seconds of each."""
    found: list[list[float]] = [[] for _ in ports]
    order = list(range(len(ports)))
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(port)) for port in ports]
        for connection in connections:
            load.one_at_a_time(connection, ONE, 2 * TURN_SECONDS)
        for _ in range(round(seconds / TURN_SECONDS)):
            random.shuffle(order)
            for number in order:
                rate = load.one_at_a_time(connections[number], ONE, TURN_SECONDS)
                found[number] += rate.latencies
    return found


def beside_sleepers(port: int, seconds: float) -> tuple[list[float], list[float]]:
    """How long `select 1` takes while nobody else asks anything, and while somebody else keeps
    calling handlers that sleep."""
    quiet: list[float] = []
    beside: list[float] = []
    with Connection(port) as connection, Connection(port) as other:
        load.one_at_a_time(connection, ONE, TURN_SECONDS)
        for _ in range(max(1, round(seconds / SLEEP_SECONDS))):
            quiet += load.one_at_a_time(connection, ONE, SLEEP_SECONDS).latencies
            for number in range(SLEEPERS):
                message = load.as_message("sleep", queryId=f"s{number}", seconds=SLEEP_SECONDS)
                other.send(message)
            beside += load.one_at_a_time(connection, ONE, SLEEP_SECONDS).latencies
            answered, whole = 0, Whole()
            while answered < SLEEPERS:
                other.receive(whole)
                answered += len(whole.take())
    return quiet, beside


def ratio(latencies: list[float], base: list[float]) -> float:
    """Of the medians."""
    return median(latencies) / median(base)
