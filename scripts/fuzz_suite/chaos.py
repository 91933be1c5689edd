"""Hostile connections to a server process, beside well-behaved clients that check every answer."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from websockets.asyncio.client import connect

from .attacks import ATTACKS, LASTING
from .victim import Held, Victim
from .wellbehaved import Client, Company

# Attackers at one time: what keeps a core busy, half of it in this process.
_ATTACKERS = 12

# A run of less has one server, one phase, and none of the attacks that last.
_GLANCE_SECONDS = 10.0

# Phases of a run, each followed by a pause. The first one or two reach what the server needs at
# most, and count as its base.
_PHASES = 8

# Seconds in a pause for what was left behind to end: the deadlines of `victim.OPTIONS`, and that of
# a reader that does not answer pings.
_PAUSE_SECONDS = 16.0

# What memory may grow after the base. Allocators keep pages for later, and how many depends on
# which attacks met: each reader that was stopped leaves up to 20 MiB until that is used again.
_TOLERANCE_MIB = 96.0
_TOLERANCE_SHARE = 0.25

# Each worker that reads the cache at the same time as others has a connection to it, of two
# descriptors, from then on; so has the writer.
_MAX_OF_CACHE = 2 * (max(4, 2 * (os.cpu_count() or 1)) + 1)

# Pauses in which the counts of descriptors and threads must not grow; and what may be added before,
# since pools (of workers, of Arrow) open what they need when they first need it. What leaked with
# connections would be hundreds.
_STEADY = 2
_POOLED = 8

# Of a core, that an idle server may use: timers of rooms and sessions.
_IDLE_SHARE = 0.2


@dataclass(frozen=True)
class _Plan:
    """What a run does in its time; ``seconds`` are those of each database."""

    databases: tuple[str, ...]
    attacks: tuple[str, ...]
    seconds: float
    phases: int
    pause: float
    compares: bool


@dataclass
class Report:
    """One server's run."""

    name: str
    attacks: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    pauses: list[Held] = field(default_factory=list)
    rounds: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lag: float = 0.0


def run(home: Path, seconds: float, seed: int) -> int:
    """Half of the time with a database in memory, half with one in a file; the exit code.

    A run of under ten seconds is a glance at the one in memory.
    """
    return asyncio.run(_run(home, seconds, seed))


def _plan(seconds: float) -> _Plan:
    if seconds < _GLANCE_SECONDS:
        quick = tuple(name for name in ATTACKS if name not in LASTING)
        return _Plan(("memory",), quick, seconds, 1, 0.1, compares=False)
    if seconds < 20 * _PAUSE_SECONDS:
        return _Plan(("memory", "file"), tuple(ATTACKS), seconds / 2, 2, 0.5, compares=False)
    attacks = tuple(ATTACKS)
    return _Plan(("memory", "file"), attacks, seconds / 2, _PHASES, _PAUSE_SECONDS, compares=True)


async def _run(home: Path, seconds: float, seed: int) -> int:
    print(f"chaos: {seconds:g} s, seed {seed}", flush=True)
    shutil.rmtree(home, ignore_errors=True)
    failed = False
    plan = _plan(seconds)
    for name in plan.databases:
        place = home / name
        options = ("--db-path", str(place / "chaos.duckdb")) if name == "file" else ()
        report = Report(name)
        victim = Victim(place, *options)
        try:
            await _attack(victim, report, plan, random.Random(seed))
            _look_at_the_end(victim, report)
        finally:
            victim.kill()
        if options:
            await _look_into_the_file(place, options, report)
        _print(report)
        failed = failed or bool(report.failures)
    return 1 if failed else 0


async def _attack(victim: Victim, report: Report, plan: _Plan, chance: random.Random) -> None:
    company = Company(victim.port)
    company.begin()
    clock = asyncio.create_task(_watch_clock(report))
    for number in range(plan.phases):
        # The first one has every kind of attack, so that the base does.
        first = list(plan.attacks) if number == 0 else []
        until = time.monotonic() + max(0.2, plan.seconds / plan.phases - plan.pause)
        workers = [_attacker(victim, report, plan, first, until, chance) for _ in range(_ATTACKERS)]
        await asyncio.gather(*workers)
        await asyncio.sleep(plan.pause)
        if not victim.is_alive:
            report.failures.append("the server is gone")
            break
        report.pauses.append(victim.held())
    await company.end()
    clock.cancel()
    report.rounds, report.seconds = company.rounds, company.seconds
    report.failures += company.failures
    if plan.compares and victim.is_alive:
        _compare(report, victim)


async def _watch_clock(report: Report) -> None:
    """How late this process is itself: so much of the times of its clients is its own."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.05)
        report.lag = max(report.lag, time.monotonic() - began - 0.05)


async def _attacker(
    victim: Victim,
    report: Report,
    plan: _Plan,
    first: list[str],
    until: float,
    chance: random.Random,
) -> None:
    while victim.is_alive and (first or time.monotonic() < until):
        name = first.pop() if first else chance.choice(plan.attacks)
        own = random.Random(chance.getrandbits(32))
        report.attacks[name] += 1
        try:
            await asyncio.wait_for(ATTACKS[name](victim.port, own), 30)
        except (OSError, asyncio.TimeoutError):
            # Closed by the server, or not answered in the time that an attacker has.
            report.refused[name] += 1


def _compare(report: Report, victim: Victim) -> None:
    """What is held in the last pause, with the same clients connected as in the first ones."""
    first, second, *_, last = report.pauses
    base = max(first.memory, second.memory)
    if last.memory > base * (1 + _TOLERANCE_SHARE) + _TOLERANCE_MIB:
        report.failures.append(f"memory grew from {base:.0f} to {last.memory:.0f} MiB")
    if last.of_cache > _MAX_OF_CACHE:
        report.failures.append(f"{last.of_cache} descriptors on the cache, over {_MAX_OF_CACHE}")
    for what in ("descriptors", "threads"):
        counts = [getattr(held, what) for held in report.pauses]
        if counts[-1] > max(counts[:-_STEADY]) or counts[-1] > counts[0] + _POOLED:
            report.failures.append(f"{what}: {counts}; open are {victim.descriptors()}")


def _look_at_the_end(victim: Victim, report: Report) -> None:
    """Everybody has left: the server answers, does nothing, says nothing bad, and stops."""
    failures = report.failures
    until = time.monotonic() + 30
    while victim.is_alive and time.monotonic() < until:
        status, body = victim.get("/connections")
        if status == 200 and body == b'{"connections":[]}':
            break
        time.sleep(0.1)
    else:
        failures.append("connections are left")
    if victim.is_alive:
        status, body = victim.get("/readyz")
        if (status, body) != (200, b"ok"):
            failures.append(f"/readyz says {status} {body!r}")
        if all(victim.busy_share(0.4) > _IDLE_SHARE for _ in range(10)):
            failures.append("it goes on working when nobody is there")
        status = victim.stop()
        if status != 0:
            failures.append(f"it ended with {status}")
    failures += [f"its log: {line}" for line in victim.complaints()[:10]]


async def _look_into_the_file(place: Path, options: tuple[str, ...], report: Report) -> None:
    """The next server has what well-behaved clients committed."""
    victim = Victim(place / "again", *options)
    try:
        found = await _committed(victim.port)
        expected = 2 * ((report.rounds["transactions"] + 1) // 2)
        # One more when the last round was under way.
        if found not in (expected, expected + 2):
            report.failures.append(f"{found} rows after a restart, not {expected}")
    finally:
        victim.stop()


async def _committed(port: int) -> int:
    async with connect(f"ws://127.0.0.1:{port}", compression=None) as socket:
        rows = await Client(socket, []).rows("select count(*) as c from good_rows")
        return int(rows[0]["c"])


def _print(report: Report) -> None:
    print(f"\n{report.name}: {sum(report.attacks.values())} hostile connections")
    for name in ATTACKS:
        print(f"  {name:20} {report.attacks[name]:7}  ended by the server: {report.refused[name]}")
    print(
        "  well-behaved: " + ", ".join(f"{count} {name}" for name, count in report.rounds.items())
    )
    if report.seconds:
        ordered = sorted(report.seconds)
        p50, p99 = (1000 * ordered[int(len(ordered) * part)] for part in (0.5, 0.99))
        print(
            f"  small queries: p50 {p50:.1f} ms, p99 {p99:.0f} ms, max {1000 * ordered[-1]:.0f} ms"
        )
    print("  pause   memory  of rooms  descriptors  threads")
    for number, held in enumerate(report.pauses):
        print(
            f"  {number:5} {held.memory:8.0f} {held.memory_of_rooms:9.0f} {held.descriptors:12} "
            f"{held.threads:8}"
        )
    for failure in report.failures:
        print(f"  FAILED: {failure}")
    print(f"  {'failed' if report.failures else 'nothing failed'}", flush=True)
