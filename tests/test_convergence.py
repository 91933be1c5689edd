"""Documents become equal whatever happens, and what was acked is never lost.

Peers in Python and in Node edit documents of the same rooms; connections are cut in the middle of
frames, peers leave and come back, the server is stopped and killed. ``SQLROOMS_ROOMS=1000`` tries
so many schedules, with seeds of their own; ``SQLROOMS_ROOMS_SEED`` begins at that seed instead.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.convergence.plan import draw
from tests.convergence.schedule import Crew, Schedule, World, arguments
from tests.npm import install_packages

SCHEDULES = int(os.environ.get("SQLROOMS_ROOMS", "12"))
FIRST_SEED = int(
    os.environ.get(
        "SQLROOMS_ROOMS_SEED", time.time_ns() >> 20 if "SQLROOMS_ROOMS" in os.environ else 1
    )
)

TOKEN = "right/token+with=signs&more"


@dataclass(frozen=True)
class Kind:
    """Of a server: whether it keeps its rooms, what it is told besides, and its part of the runs."""

    is_durable: bool
    share: float
    token: str | None = None
    settings: tuple[str, ...] = ()


KINDS = {
    "file": Kind(True, 0.5),
    # Rooms are written as snapshots and unloaded whenever nobody is in them.
    "forgetful": Kind(True, 0.25, TOKEN, ("--room-idle-timeout", "0")),
    "memory": Kind(False, 0.25),
}


@pytest.mark.timeout(60 + 10 * SCHEDULES)
@pytest.mark.parametrize("name", KINDS)
def test_random_schedules(name: str, tmp_path: Path) -> None:
    install_packages()
    kind = KINDS[name]
    asyncio.run(run(kind, max(1, round(SCHEDULES * kind.share)), tmp_path))


async def run(kind: Kind, count: int, directory: Path) -> None:
    keeps = directory if kind.is_durable or kind.token else None
    world = World(kind.token, *arguments(keeps, kind.token, *kind.settings))
    await world.network.start()
    crew = await Crew.start()
    try:
        await world.start_server()
        world.open()
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            plan = draw(seed, kind.is_durable)
            schedule = Schedule(plan, world, crew)
            try:
                await schedule.run()
            except AssertionError as error:
                waits = await schedule.describe()
                raise AssertionError(f"{error}\nat {schedule.at}\n{waits}\n{plan}") from error
        await world.stop_server(signal.SIGTERM)
    finally:
        await world.stop_server(signal.SIGKILL)
        await crew.stop()
        await world.network.stop()
