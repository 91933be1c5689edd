"""Node and the npm packages of `tests/browser`, for the tests that run JavaScript clients."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "browser"

# The connector asks for an `apache-arrow` of its own and for a `room-config` that the overrides of
# package.json replace, so peers are not resolved; no package has to run a script at installation.
INSTALL = ["install", "--no-package-lock", "--legacy-peer-deps", "--ignore-scripts"]
INSTALL_DEADLINE = 240


def find_program(*names: str, install: str) -> str:
    """The first of `names` on the PATH; without any, the test is skipped with the remedy."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{names[0]} is missing: {install}")


def run(command: list[str], *, cwd: Path, timeout: float, stdin: str = "") -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        command, cwd=cwd, timeout=timeout, input=stdin, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        output = done.stderr + done.stdout
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{output}")
    return done.stdout


def run_node(script: Path, *args: str, timeout: float, stdin: str = "") -> str:
    """Standard output of a script; Node 20 has a global WebSocket only behind its flag."""
    node = find_program("node", install="apt-get install nodejs npm")
    command = [node, "--experimental-websocket", str(script), *args]
    return run(command, cwd=PROJECT, timeout=timeout, stdin=stdin)


def install_packages() -> Path:
    """`node_modules`, installed when missing or when package.json has changed since."""
    find_program("node", install="apt-get install nodejs npm")
    packages = PROJECT / "node_modules"
    installed = packages / ".installed.json"
    wanted = (PROJECT / "package.json").read_text(encoding="utf-8")
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        npm = find_program("npm", install="apt-get install npm")
        run([npm, *INSTALL], cwd=PROJECT, timeout=INSTALL_DEADLINE)
        installed.write_text(wanted, encoding="utf-8")
    return packages
