"""One pass over the workloads with one DuckDB: who is measured when, and what became of it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from . import guard, patience
from .answers import WrongAnswer
from .load import Sample
from .patience import TookTooLong
from .peers import PEERS as SERVERS
from .plan import FULL, PEERS, QUICK, Effort, Workload
from .servers import ServerFailed, run_module, running
from .workloads import RUNS

IN_PROCESS_SECONDS = 120.0


PACKAGES = (
    "sqlrooms-server",
    "duckdb-server",
    "duckdb-extension-quack",
    "roapi",
    "duckdb",
    "pyarrow",
    "socketify",
)

ELSEWHERE = {"2": {"quack": "PyPI has its extension for DuckDB 1.5.5 at most"}}
"""Who cannot be measured with a DuckDB series, and why."""


@dataclass
class Sheet:
    """The samples of one DuckDB series, by workload and subject, and what went wrong.

    `failures` are faults of ours or of the machine; `remarks` concern the other servers: what they
    did not do, and why. `missing` says the latter in few words, by workload and subject.
    """

    duckdb: str
    versions: dict[str, dict[str, str]]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """One DuckDB series, and `home`, where virtual environments and tables are.

    `alone`: just one workload, so that there is time for the peers even if it is to be `quick`.
    """

    duckdb: str
    home: Path
    peers: Sequence[str]
    quick: bool
    alone: bool = False

    def measure(self, workloads: Sequence[Workload], say: Callable[[str], None]) -> Sheet:
        """Run every workload, its subjects in a new random order in each repetition."""
        sheet = Sheet(self.duckdb, self._versions())
        peers = self._able(sheet)
        for workload in workloads:
            if missing := self._missing(workload):
                sheet.remarks.append(f"{workload.name}: {missing}")
                continue
            asked = self.alone or workload.name in self._effort.peers
            subjects = [
                subject
                for subject in workload.subjects
                if subject not in PEERS or (asked and subject in peers)
            ]
            sheet.samples[workload.name] = {subject: [] for subject in subjects}
            done: set[str] = set()
            for repetition in range(self._effort.repetitions[workload.name]):
                # Not only by turns: what disturbs the machine at intervals must hit all alike.
                random.shuffle(subjects)
                for subject in (s for s in subjects if s not in done):
                    if not self._repeat(sheet, workload, subject, repetition, say):
                        done.add(subject)
        return sheet

    def _repeat(
        self,
        sheet: Sheet,
        workload: Workload,
        subject: str,
        repetition: int,
        say: Callable[[str], None],
    ) -> bool:
        """Measure once, and keep what was found. Whether it may be asked again."""
        where = f"DuckDB {self.duckdb}, {workload.name}, {subject}"
        sample: Sample = {}
        error: Exception | None = None
        began = perf_counter()
        try:
            self._measure(workload, subject, sample, first=repetition == 0)
        except (
            ServerFailed,
            WrongAnswer,
            TookTooLong,
            OSError,
            subprocess.SubprocessError,
        ) as caught:
            error = caught
            sheet.missing.setdefault(workload.name, {})[subject] = patience.reason(error)
            self._problems(sheet, subject).append(f"{where}: {error}")
        if sample:
            sheet.samples[workload.name][subject].append(sample)
        figures = "  ".join(f"{key} {value:.4g}" for key, value in sample.items())
        problem = f"  ! {error}" if error else ""
        seconds = perf_counter() - began
        say(f"{where}, {repetition + 1}, {seconds:.1f} s: {figures}{problem}")
        slow = seconds > patience.SLOW_SECONDS and subject != "ours"
        return not error and not slow

    @property
    def _effort(self) -> Effort:
        return QUICK if self.quick else FULL

    def guard(self, sheet: Sheet) -> None:
        """Count what an answer of ours costs; too much is a failure."""
        try:
            sheet.counts = guard.count(self._environment("ours"), self.duckdb)
        except ServerFailed as error:
            sheet.failures.append(f"guard: {error}")
        else:
            sheet.failures += guard.exceeded(sheet.counts, self.duckdb)

    def _problems(self, sheet: Sheet, subject: str) -> list[str]:
        return sheet.remarks if subject in ("published", *PEERS) else sheet.failures

    def _able(self, sheet: Sheet) -> list[str]:
        """The peers that can be measured; why others cannot goes into the remarks."""
        able = []
        for peer in self.peers:
            if peer in ELSEWHERE.get(self.duckdb, {}):
                sheet.remarks.append(f"{peer}: {ELSEWHERE[self.duckdb][peer]}")
            elif not (self._environment(peer) / "stamp").exists():
                sheet.remarks.append(f"{peer}: could not be installed, see above")
            else:
                able.append(peer)
        return able

    def _missing(self, workload: Workload) -> str:
        tables = [table.name for table in self._tables(workload) if not table.exists()]
        return f"{', '.join(tables)} could not be made, see above" if tables else ""

    def _tables(self, workload: Workload) -> list[Path]:
        return [self.home / "data" / f"{table}.parquet" for table in workload.tables]

    def _environment(self, subject: str) -> Path:
        # The smallest server needs just DuckDB, and the same one.
        owner = "ours" if subject == "bare" else subject
        of_one_duckdb = self.home / f"{owner}-{self.duckdb}"
        return of_one_duckdb if of_one_duckdb.exists() else self.home / owner

    def _versions(self) -> dict[str, dict[str, str]]:
        return {
            subject: _versions(self._environment(subject))
            for subject in ("ours", "published", *self.peers)
            if (self._environment(subject) / "stamp").exists()
        }

    def _measure(self, workload: Workload, subject: str, sample: Sample, *, first: bool) -> None:
        """Put the figures of one repetition into `sample`, as they come."""
        if subject == "in-process":
            sample.update(self._in_process(workload))
            return
        peer, tables = SERVERS[subject], self._tables(workload)
        with running(self._environment(subject), peer=peer, tables=tables) as server:
            with patience.at_most(self._most_seconds(workload, subject)):
                found = RUNS[workload.name](server, self._effort, first)
                for some in [found] if isinstance(found, dict) else found:
                    sample.update(some)

    def _most_seconds(self, workload: Workload, subject: str) -> float:
        if subject in PEERS:
            return patience.PEER_SECONDS
        return patience.OTHERS_SECONDS + (0 if workload.usual else self._effort.soak)

    def _in_process(self, workload: Workload) -> Sample:
        return run_module(
            self._environment("ours"),
            *("inprocess", workload.name, "quick" if self.quick else "full"),
            *map(str, self._tables(workload)),
            seconds=IN_PROCESS_SECONDS,
        )


def _versions(environment: Path) -> dict[str, str]:
    """The versions of what is installed in an environment, and of its Python."""
    code = (
        "import json, platform; from importlib.metadata import distributions; "
        "print(json.dumps({'python': platform.python_version(), "
        "**{d.metadata['Name'].replace('_', '-'): d.version for d in distributions()}}))"
    )
    python = environment / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30.0)
    if done.returncode:
        sys.exit(f"{environment} is not complete: {done.stderr.strip()[-500:]}")
    found: dict[str, str] = json.loads(done.stdout)
    return {name: found[name] for name in ("python", *PACKAGES) if name in found}
