"""``scripts/fuzz`` for a moment: it runs, finds nothing, and would find something."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE = 90.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def fuzz(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fuzz_suite", *arguments, "--home", str(cwd), "--seed", "2026"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def test_messages_without_guidance(tmp_path: Path) -> None:
    done = fuzz("protocol", "--plain", "--runs", "600", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "protocol: 600 inputs" in done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed; scripts/fuzz installs it into an environment of its own",
)
def test_messages_with_guidance(tmp_path: Path) -> None:
    done = fuzz("protocol", "--runs", "2000", "--seconds", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cov:" in done.stdout


def test_what_is_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input raises, another ends the process; both can be tried again."""
    package = tmp_path / "sitecustomize.py"
    package.write_text(
        "import os, sys\n"
        "from fuzz_suite import targets\n"
        "class Bad:\n"
        "    max_size = 10\n"
        "    def seeds(self): return iter([b'fine', b'raises', b'dies'])\n"
        "    def mutated(self, data, chance): return data\n"
        "    def try_one(self, data):\n"
        "        if data == b'raises': raise targets.Broken('told')\n"
        "        if data == b'dies': os.abort()\n"
        "targets.load = lambda name: Bad()\n"
    )
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT / "scripts", ROOT))),
    }
    command = [sys.executable, "-m", "fuzz_suite", "sql", "--plain", "--runs", "3", "--seconds"]
    done = subprocess.run(
        [*command, "1", "--home", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "told" in done.stdout
    kept = {
        path.read_bytes() for path in (tmp_path / "sql" / "findings").iterdir() if not path.suffix
    }
    assert kept == {b"raises", b"dies"}
    assert done.stdout.count("scripts/fuzz sql --replay") == 2


def test_chaos(tmp_path: Path) -> None:
    done = fuzz("chaos", "--seconds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
