"""One pass over the workloads with one DuckDB: who is measured when, and what became of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .answers import WrongAnswer
from .load import Sample
from .plan import FULL, QUICK, Effort, Workload
from .servers import ServerFailed, running
from .workloads import RUNS

IN_PROCESS_SECONDS = 120.0


@dataclass
class Sheet:
    """The samples of one DuckDB series, by workload and subject, and what went wrong.

    `failures` are faults of ours or of the machine; `remarks` concern the published server with
    an engine it does not declare.
    """

    duckdb: str
    versions: dict[str, dict[str, str]]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Session:
    """The virtual environments of one DuckDB series, below `.bench`."""

    duckdb: str
    ours: Path
    published: Path
    quick: bool

    def measure(self, workloads: Sequence[Workload], say: Callable[[str], None]) -> Sheet:
        """Run every workload, its subjects in a new random order in each repetition."""
        versions = {"ours": _versions(self.ours), "published": _versions(self.published)}
        sheet = Sheet(self.duckdb, versions)
        for workload in workloads:
            subjects = workload.subjects
            found = sheet.samples[workload.name] = {subject: [] for subject in subjects}
            failed: set[str] = set()
            for repetition in range(self._effort.repetitions[workload.name]):
                # Not only by turns: what disturbs the machine at intervals must hit all alike.
                random.shuffle(subjects)
                for subject in (s for s in subjects if s not in failed):
                    where = f"DuckDB {self.duckdb}, {workload.name}, {subject}"
                    try:
                        sample = self._sample(workload, subject, first=repetition == 0)
                    except (ServerFailed, WrongAnswer) as error:
                        say(f"{where}: {error}")
                        failed.add(subject)
                        self._problems(sheet, subject).append(f"{where}: {error}")
                    else:
                        found[subject].append(sample)
                        figures = "  ".join(f"{key} {value:.4g}" for key, value in sample.items())
                        say(f"{where}, {repetition + 1}: {figures}")
        return sheet

    @property
    def _effort(self) -> Effort:
        return QUICK if self.quick else FULL

    def _problems(self, sheet: Sheet, subject: str) -> list[str]:
        undeclared = subject == "published" and not self.duckdb.startswith("1.")
        return sheet.remarks if undeclared else sheet.failures

    def _sample(self, workload: Workload, subject: str, *, first: bool) -> Sample:
        if subject == "in-process":
            return self._in_process(workload)
        with running(self.ours if subject == "ours" else self.published) as server:
            return RUNS[workload.name](server, self._effort, first)

    def _in_process(self, workload: Workload) -> Sample:
        command = [
            str(self.ours / "bin" / "python"),
            *("-m", f"{__package__}.inprocess", workload.name, "quick" if self.quick else "full"),
        ]
        surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        try:
            done = subprocess.run(
                command,
                env=surroundings,
                capture_output=True,
                text=True,
                timeout=IN_PROCESS_SECONDS,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerFailed(f"not done after {error.timeout:.0f} s") from error
        if done.returncode:
            raise WrongAnswer(done.stderr.strip()[-2000:])
        sample: Sample = json.loads(done.stdout)
        return sample


def _versions(environment: Path) -> dict[str, str]:
    """The versions of what is installed in an environment, and of its Python."""
    names = ("sqlrooms-server", "duckdb", "pyarrow", "socketify", "ujson")
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version(), "
        "**{name: version(name) for name in sys.argv[1:]}}))"
    )
    python = environment / "bin" / "python"
    done = subprocess.run(
        [python, "-c", code, *names], capture_output=True, text=True, timeout=30.0
    )
    if done.returncode:
        sys.exit(f"{environment} is not complete: {done.stderr.strip()[-500:]}")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
