"""What happens in a schedule: drawn from a seed, the same each time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

KINDS = ("connector", "versions in node", "plain", "versions")
MAX_PEERS = 10
ROOMS = ("plan", "räume/2", "🦆 'a' \"b\"")

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Member:
    """A peer: its kind and its rooms, of which only those with versions have several."""

    kind: str
    rooms: tuple[str, ...]
    seed: int


@dataclass
class Plan:
    """Steps are names of methods of :class:`tests.convergence.schedule.Schedule` and arguments."""

    seed: int
    is_durable: bool
    members: list[Member] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __str__(self) -> str:
        kind = "durable" if self.is_durable else "in memory"
        members = "\n".join(f"  peer {at}: {member}" for at, member in enumerate(self.members))
        steps = "\n".join(f"  {step}" for step in self.steps)
        return f"seed {self.seed}, {kind}\n{members}\n{steps}"


def draw(seed: int, is_durable: bool) -> Plan:
    numbers = random.Random(seed)
    plan = Plan(seed, is_durable)
    rooms = ROOMS[: numbers.choice((1, 1, 2, 3))]
    for _ in range(numbers.randint(2, MAX_PEERS)):
        kind = numbers.choice(KINDS)
        own = numbers.sample(rooms, numbers.randint(1, len(rooms)))
        several = kind.startswith("versions")
        member = Member(kind, tuple(own if several else own[:1]), numbers.getrandbits(32))
        plan.members.append(member)
        if numbers.random() < 0.6:
            plan.steps.append(("connect", len(plan.members) - 1))
    drawing = _Drawing(plan, numbers)
    for _ in range(numbers.randint(10, 60)):
        drawing.step()
    drawing.end()
    return plan


class _Drawing:
    def __init__(self, plan: Plan, numbers: random.Random) -> None:
        self._plan = plan
        self._numbers = numbers
        self._is_up = True
        self._has_lost = False
        # Each costs as much as a hundred edits.
        self._restarts = numbers.choice((0, 0, 1, 1, 2))
        # Enough for a log to become a snapshot; enough for a room to have a process of its own.
        self._large = numbers.choice((0,) * 80 + (20_000, 100_000) * 9 + (1_500_000,))
        # All may connect again at once, each with all of it, and what waits then is limited.
        self._largest = 5_000_000
        restarts = 2 if self._restarts else 0
        self._weights = {
            self._edit: 50,
            self._pause: 15,
            self._cut: 5,
            self._cut_after: 8,
            self._hold: 4,
            self._release: 6,
            self._disconnect: 4,
            self._connect: 12,
            self._leave: 3,
            self._join: 5,
            self._refresh: 2 if plan.is_durable else 0,
            self._settle: 2,
            self._toggle: restarts,
            self._lose_documents: 1,
        }

    def step(self) -> None:
        actions, weights = zip(*self._weights.items(), strict=True)
        (action,) = self._numbers.choices(actions, weights)
        action()

    def end(self) -> None:
        if not self._is_up:
            self._add("start_server")
        self._add("heal")
        if self._plan.is_durable and self._numbers.randrange(8) == 0:
            self._add("stop_server", self._numbers.choice(("SIGTERM", "SIGKILL")))
            self._add("start_server")
            self._add("heal")

    def _add(self, *step: Any) -> None:
        self._plan.steps.append(step)

    def _peer(self) -> int:
        return self._numbers.randrange(len(self._plan.members))

    def _edit(self) -> None:
        peer = self._peer()
        member = self._plan.members[peer]
        room = self._numbers.choice(member.rooms)
        seed = self._numbers.getrandbits(32)
        if member.kind == "versions" and self._numbers.randrange(4) == 0:
            self._add("shuffle", peer, room, seed)
            return
        size = self._large if self._numbers.randrange(4) == 0 else 0
        self._largest -= size
        if self._largest < 0:
            size = 0
        for number in range(self._numbers.choice((1, 1, 1, 5))):
            self._add("edit", peer, room, (seed + number) % 2**32, 0 if number else size)

    def _pause(self) -> None:
        self._add("pause", self._numbers.choice((0, 1, 3, 5, 10)))

    def _cut(self) -> None:
        self._add("cut", self._peer())

    def _cut_after(self) -> None:
        count = self._numbers.choice((1, 3, 20, 100, 400, 3000))
        count = self._numbers.randint(1, count)
        self._add("cut_after", self._peer(), count, self._numbers.random() < 0.5)

    def _hold(self) -> None:
        self._add("hold", self._peer())

    def _release(self) -> None:
        self._add("release", self._peer())

    def _disconnect(self) -> None:
        self._add("disconnect", self._peer())

    def _connect(self) -> None:
        self._add("connect", self._peer())

    def _in_several(self) -> tuple[int, str] | None:
        peer = self._peer()
        member = self._plan.members[peer]
        return (peer, self._numbers.choice(member.rooms)) if "versions" in member.kind else None

    def _leave(self) -> None:
        if found := self._in_several():
            self._add("leave", *found)
            if self._numbers.randrange(2):
                self._add("join", *found)

    def _join(self) -> None:
        if found := self._in_several():
            self._add("join", *found)

    def _refresh(self) -> None:
        self._add("refresh", self._peer())

    def _settle(self) -> None:
        self._add("settle", self._peer())

    def _lose_documents(self) -> None:
        if self._is_up and not self._has_lost:
            # Twice, it would look like the fault of what they were doing.
            self._has_lost = True
            self._add("lose_documents")

    def _toggle(self) -> None:
        if not self._is_up:
            self._add("start_server")
        elif self._restarts:
            self._restarts -= 1
            # What is just being acked is what a server may lose.
            for _ in range(self._numbers.choice((0, 4, 12))):
                self._edit()
            self._pause()
            self._add("stop_server", self._numbers.choice(("SIGTERM", "SIGKILL", "SIGKILL")))
        else:
            return
        self._is_up = not self._is_up
