"""Feeds this server what nobody should send it, and says what that broke.

    scripts/fuzz protocol --seconds 60      # messages of clients
    scripts/fuzz uploads                    # bodies of uploads, into a real DuckDB
    scripts/fuzz sql                        # what the server makes of SQL before it runs
    scripts/fuzz session                    # sequences of messages of two connections
    scripts/fuzz chaos --seconds 1200       # hostile connections to a server process

docs/fuzzing.md says what must hold. Everything is written below .fuzz/: inputs that broke something
in .fuzz/TARGET/findings, each with a text of the same name, and the inputs that reach all the code
that is known to be reachable in .fuzz/TARGET/corpus, where the next run begins.

    scripts/fuzz protocol --replay .fuzz/protocol/findings/0123abcd

Exit code: 0 when nothing was found, 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from pathlib import Path

from . import campaign
from .targets import NAMES


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=(*NAMES, "chaos"))
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--runs", type=int, default=-1, help="how many inputs at most")
    parser.add_argument("--seed", type=int, help="repeats the choices of an earlier run")
    parser.add_argument(
        "--plain", action="store_true", help="without atheris: mutations of seeds, unguided"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try this one input")
    parser.add_argument("--home", type=Path, default=Path(".fuzz"), help="default: .fuzz")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 31) if arguments.seed is None else arguments.seed
    if arguments.target == "chaos":
        from . import chaos

        return chaos.run(arguments.home.absolute() / "chaos", arguments.seconds, seed)
    if arguments.replay is not None:
        campaign.replay(arguments.target, arguments.replay)
        print("Nothing broke.")
        return 0
    if not arguments.plain and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install 'sqlrooms-server[fuzz]', or --plain.")
        return 2
    return fuzz(arguments, seed)


def fuzz(arguments: argparse.Namespace, seed: int) -> int:
    name, home = arguments.target, arguments.home.absolute() / arguments.target
    print(f"{name}: {arguments.seconds:g} s, seed {seed}", flush=True)
    outcome = campaign.run(
        name,
        home,
        seconds=arguments.seconds,
        runs=arguments.runs,
        seed=seed,
        plain=arguments.plain,
    )
    print(
        f"{name}: {outcome.executions} inputs in {outcome.seconds:.0f} s, {outcome.crashes} "
        f"processes ended, {len(outcome.findings)} findings. {outcome.coverage}"
    )
    for path in outcome.findings:
        print(f"  scripts/fuzz {name} --replay {path}")
    return 1 if outcome.findings or outcome.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
