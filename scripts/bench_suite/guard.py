"""A guard against regressions that no clock is needed for: counts of one answer, and their limits.

Of what can be counted, these were the steadiest. In five runs each with DuckDB 1.5 and 2 on two
cores, beside none to four other programs that never waited, the calls of a small answer varied by
1 %, those of a large one by 13 %, the switches by 8 %, and the modules not at all, while answers a
second of the same servers varied by a factor of three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .servers import run_module

TRIES = 3
SECONDS = 60.0


@dataclass(frozen=True)
class Count:
    """Something that is counted, and the most it may be by DuckDB series.

    A limit is what was found plus some three times what it varies by, and 5 % for modules. Where a
    change needs more, the limit goes up in the commit of that change, which says why.
    """

    key: str
    label: str
    limits: Mapping[str, float]


COUNTS = (
    Count("calls", "calls of Python for select 1", {"1.5": 217, "2": 209}),
    Count("rows", "calls of Python for 1 M rows", {"1.5": 1900, "2": 1900}),
    Count("switches", "switches of context for select 1", {"1.5": 6.5, "2": 8.5}),
    # An answer that leaves something behind leaves more than one block each time.
    Count("blocks", "blocks of memory that select 1 leaves", {"1.5": 1, "2": 1}),
    Count("modules", "modules loaded by a server", {"1.5": 417, "2": 432}),
)


def count(environment: Path, duckdb: str) -> dict[str, float]:
    """The counts of the server in an environment; the least of some tries, if one is too many.

    What disturbs the machine can only add to them. Raises `ServerFailed`.
    """
    least = _count(environment)
    for _ in range(TRIES - 1):
        if not list(exceeded(least, duckdb)):
            break
        least = {key: min(value, least[key]) for key, value in _count(environment).items()}
    return least


def exceeded(found: Mapping[str, float], duckdb: str) -> Iterator[str]:
    """What is more than its limit, in words."""
    for one in COUNTS:
        if found[one.key] > one.limits[duckdb]:
            yield f"{one.label}: {found[one.key]:g}, more than {one.limits[duckdb]:g}"


def lines(found: Mapping[str, float], duckdb: str) -> Iterator[str]:
    """The counts beside their limits, for people."""
    for one in COUNTS:
        mark = "✓" if found[one.key] <= one.limits[duckdb] else "✗"
        yield f"{one.label:40}{found[one.key]:>10,.5g}  ≤ {one.limits[duckdb]:g} {mark}"


def _count(environment: Path) -> dict[str, float]:
    return run_module(environment, "counts", seconds=SECONDS)
