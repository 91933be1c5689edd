"""Runs one target for a time, in processes that are begun again when an input ends one."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .targets import load
from .worker import MAX_FINDINGS, Current

_STATUS = re.compile(r"^#(\d+)\s+\S+\s*(.*)$", re.MULTILINE)

# Seconds that a process may take longer than it was given: for its start, and for one input.
_SPARE = 120


@dataclass
class Outcome:
    """What became of a run: ``findings`` are files with the input that each needs."""

    seconds: float = 0.0
    executions: int = 0
    coverage: str = ""
    crashes: int = 0
    findings: list[Path] = field(default_factory=list)


def run(name: str, home: Path, *, seconds: float, runs: int, seed: int, plain: bool) -> Outcome:
    """Try inputs for ``seconds``, or ``runs`` of them (-1 for any number)."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "findings").mkdir(exist_ok=True)
    outcome = Outcome()
    began = time.monotonic()
    while (left := began + seconds - time.monotonic()) > 0:
        if _run_once(name, home, left, runs, seed, outcome, plain=plain):
            break
        seed += 1
        if outcome.crashes >= MAX_FINDINGS:
            break
    outcome.seconds = time.monotonic() - began
    outcome.findings = sorted(p for p in (home / "findings").iterdir() if not p.suffix)
    return outcome


def _run_once(
    name: str, home: Path, seconds: float, runs: int, seed: int, outcome: Outcome, *, plain: bool
) -> bool:
    """One process; whether it came to its end."""
    log = home / "log"
    command = [sys.executable, "-X", "faulthandler", "-m", f"{__package__}.worker", name]
    command += ["--home", str(home), "--seconds", str(seconds), "--runs", str(runs)]
    command += ["--seed", str(seed), *(["--plain"] if plain else [])]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            status = process.wait(seconds + _SPARE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if line.startswith("FINDING"):
            print(line, flush=True)
    found = _STATUS.findall(text)
    if found:
        outcome.executions += max(int(number) for number, _ in found)
        outcome.coverage = next((c for _, c in reversed(found) if "cov:" in c), outcome.coverage)
    data = Current.read(home / "current")
    if status != 0 and not data:
        print(f"The worker ended with {status}:\n{text[-3000:]}", flush=True)
        outcome.crashes += 1
        return "findings are enough" in text
    if status != 0:
        outcome.crashes += 1
        path = home / "findings" / f"crash-{hashlib.sha256(data).hexdigest()[:8]}"
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"status {status}\n{text[-20_000:]}")
        print(f"FINDING {path.name}: the process ended with {status}", flush=True)
    return status == 0


def replay(name: str, path: Path) -> None:
    """Try the input in ``path`` in this process."""
    load(name).try_one(path.read_bytes())
