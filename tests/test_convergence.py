"""Documents become equal whatever happens, and what was acked is never lost.

Peers in Python and in Node edit documents of the same rooms; connections are cut in the middle of
frames, peers leave and come back, the server is stopped and killed. ``SQLROOMS_ROOMS=1000`` tries
so many schedules, with seeds of their own; ``SQLROOMS_ROOMS_SEED`` begins at that seed instead.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.convergence.plan import Member, Plan, draw
from tests.convergence.schedule import Crew, Schedule, World, arguments
from tests.npm import install_packages
from tests.nursery import Nursery

SCHEDULES = int(os.environ.get("SQLROOMS_ROOMS", "4"))
FIRST_SEED = int(
    os.environ.get(
        "SQLROOMS_ROOMS_SEED", time.time_ns() >> 20 if "SQLROOMS_ROOMS" in os.environ else 1
    )
)

TOKEN = "right/token+with=signs&more"


@dataclass(frozen=True)
class Kind:
    """Of a server: whether it keeps its rooms, its part of the schedules, and what it is told."""

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
def test_documents_converge(name: str, tmp_path: Path, nursery: Nursery) -> None:
    install_packages()
    kind = KINDS[name]
    # Each kind of server meets seeds of its own.
    first = FIRST_SEED + SCHEDULES * list(KINDS).index(name)
    seeds = range(first, first + max(1, round(SCHEDULES * kind.share)))
    drawn = [draw(seed, kind.is_durable) for seed in seeds]
    plans = [connectors_only(kind.is_durable), *drawn]
    asyncio.run(run(kind, plans, tmp_path, nursery))


def connectors_only(is_durable: bool) -> Plan:
    """The published connector and a server that is killed."""
    plan = Plan(0, is_durable)
    plan.members = [Member("connector", ("plan",), seed) for seed in range(4)]
    seeds = itertools.count(1)

    def edit(*peers: int) -> None:
        plan.steps += [("edit", peer, "plan", next(seeds), 0) for peer in peers]

    def settle(*peers: int) -> None:
        plan.steps += [("settle", peer) for peer in peers]

    edit(0, 0, 1)
    plan.steps += [("connect", peer) for peer in range(3)]
    edit(2, 2)
    settle(0, 1, 2)
    for number in ("SIGKILL", "SIGTERM"):
        edit(0, 1, 2, 0, 1, 2)
        plan.steps.append(("stop_server", number))
        edit(0, 1, 3)
        plan.steps.append(("start_server",))
        edit(2, 0)
        settle(0, 1, 2)
        if is_durable:
            plan.steps.append(("refresh", 1))
            edit(1)
            settle(1)
    plan.steps.append(("heal",))
    return plan


async def run(kind: Kind, plans: Sequence[Plan], directory: Path, nursery: Nursery) -> None:
    keeps = directory if kind.is_durable or kind.token else None
    world = World(nursery.fork, kind.token, *arguments(keeps, kind.token, *kind.settings))
    await world.network.start()
    crew = await Crew.start()
    try:
        await world.start_server()
        world.open()
        for plan in plans:
            schedule = Schedule(plan, world, crew)
            try:
                await schedule.run()
            except (asyncio.CancelledError, KeyboardInterrupt):
                raise
            except BaseException as error:  # Loro's errors are no better than that.
                what = f"{type(error).__name__}: {error}\nat {schedule.at}"
                waits = await schedule.describe()
                raise AssertionError(f"{what}\n{waits}\n{plan}") from error
        await world.stop_server(signal.SIGTERM)
    finally:
        await world.stop_server(signal.SIGKILL)
        await crew.stop()
        await world.network.stop()
