"""Extensions without a network: from a file, and by the name of an installed one.

The files come from the wheels on PyPI, which exist for one exact version of DuckDB, so that the
server runs on that version here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, started
from tests.wire import DEADLINE

VERSION = "1.5.5"
PACKAGES = [f"duckdb=={VERSION}", f"duckdb-extension-fts=={VERSION}"]
DOWNLOAD_DEADLINE = 90


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with that version and the wheel of an extension."""
    target = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run(
        [*command, str(target), *PACKAGES],
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_DEADLINE,
    )
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(PACKAGES)}: {done.stderr[-300:]}")
    return target


@pytest.fixture
def extension(packages: Path) -> Path:
    return next(packages.rglob("fts.duckdb_extension"))


def is_loaded(process: ServerProcess) -> bool:
    with process.connect() as wire:
        rows = wire.rows(
            "select loaded, version() as v from duckdb_extensions() where extension_name = 'fts'"
        )
        assert rows[0]["v"] == f"v{VERSION}"
        return bool(rows[0]["loaded"])


def test_from_a_file(
    serve: Callable[..., ServerProcess], packages: Path, extension: Path, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(packages), "HOME": str(tmp_path)}
    assert is_loaded(serve("--extensions", str(extension), start=started, environment=environment))


def test_by_name_when_it_is_installed(
    serve: Callable[..., ServerProcess], packages: Path, extension: Path, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(packages), "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", f"import duckdb; duckdb.install_extension({str(extension)!r})"],
        env=environment,
        check=True,
        timeout=DEADLINE,
    )
    assert not is_loaded(serve(start=started, environment=environment))
    assert is_loaded(serve("--extensions", "fts", start=started, environment=environment))
