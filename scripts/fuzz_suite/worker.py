"""The process that tries inputs. It may die of one: the input is on disk before it is tried."""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from .targets import Target, load

# More different findings than this are one defect seen from many sides.
MAX_FINDINGS = 20

# Seconds for one input, and memory of the process, before it counts as a finding.
_TIMEOUT = 60
_MAX_MEGABYTES = 3000


class Current:
    """The input under way, in a file that outlives the process."""

    def __init__(self, path: Path, max_size: int) -> None:
        path.write_bytes(bytes(8 + max_size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8 + max_size)

    def __enter__(self) -> Current:
        return self

    def __exit__(self, *_: object) -> None:
        self.set(b"")

    def set(self, data: bytes) -> None:
        data = data[: len(self._map) - 8]
        self._map[8 : 8 + len(data)] = data
        self._map[:8] = len(data).to_bytes(8, "little")

    @staticmethod
    def read(path: Path) -> bytes:
        """What was tried last; nothing when that ended."""
        content = path.read_bytes() if path.exists() else b""
        return content[8 : 8 + int.from_bytes(content[:8], "little")]


class Trial:
    """Tries inputs and keeps those that break something, one for each place where it shows."""

    def __init__(self, target: Target, home: Path) -> None:
        self.executions = 0
        self._target = target
        self._findings = home / "findings"
        self._findings.mkdir(exist_ok=True)
        self._current = Current(home / "current", target.max_size)
        self._seen: set[str] = set()

    def run(self, data: bytes) -> None:
        self.executions += 1
        self._current.set(data)
        try:
            self._target.try_one(data)
        except Exception as error:  # whatever it is, it is a finding
            self._keep(data, error)
        self._current.set(b"")

    def _keep(self, data: bytes, error: Exception) -> None:
        where = [
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
        ]
        place = f"{type(error).__name__} {' '.join(where[-3:])}"
        name = hashlib.sha256(place.encode()).hexdigest()[:8]
        if name in self._seen or (self._findings / name).exists():
            return
        self._seen.add(name)
        (self._findings / name).write_bytes(data)
        text = "".join(traceback.format_exception(error))
        (self._findings / f"{name}.txt").write_text(text, errors="backslashreplace")
        print(f"FINDING {name}: {text.splitlines()[-1][:300]!a}", file=sys.stderr, flush=True)
        if len(self._seen) >= MAX_FINDINGS:
            sys.exit(f"{MAX_FINDINGS} findings are enough.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    if arguments.plain:
        target = load(arguments.target)
        trial = Trial(target, arguments.home)
        try_plainly(target, trial, arguments.seconds, arguments.runs, arguments.seed)
        print(f"#{trial.executions} DONE", file=sys.stderr, flush=True)
    else:
        try_guided(arguments)


def try_plainly(target: Target, trial: Trial, seconds: float, runs: int, seed: int) -> None:
    """Seeds, then mutations of them: what can be done without knowing what an input reaches."""
    chance = random.Random(seed)
    seeds = list(target.seeds())
    until = time.monotonic() + seconds
    for data in seeds:
        trial.run(data)
    while time.monotonic() < until and trial.executions != runs:
        data = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 2, 3))):
            data = target.mutated(data, chance)[: target.max_size]
        trial.run(data)


def try_guided(arguments: argparse.Namespace) -> None:
    """Let atheris prefer what reaches new code. Ends the process."""
    import atheris

    with atheris.instrument_imports(include=["sqlrooms_server"]):
        target = load(arguments.target)
    home: Path = arguments.home
    corpus, seeds = home / "corpus", home / "seeds"
    corpus.mkdir(exist_ok=True)
    seeds.mkdir(exist_ok=True)
    for data in target.seeds():
        (seeds / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    trial = Trial(target, home)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.4:
            changed: bytes = atheris.Mutate(data, len(data) + 64)
        else:
            changed = target.mutated(bytes(data), chance)
        return changed[:max_size]

    options = {
        "max_total_time": max(1, int(arguments.seconds)),
        "runs": arguments.runs,
        "seed": arguments.seed % (1 << 31) or 1,
        "max_len": target.max_size,
        "timeout": _TIMEOUT,
        "rss_limit_mb": _MAX_MEGABYTES,
        "artifact_prefix": f"{home}/artifact-",
        "print_final_stats": 1,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    one: Callable[[bytes], None] = trial.run
    atheris.Setup(["fuzz", str(corpus), str(seeds), *flags], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException:  # told here, since the process ends below
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # A server of the target has threads that would go on.
        os._exit(status)
