"""The wheel builds, holds what it should, and the installed wheel serves."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from sqlrooms_server import __version__
from tests.conftest import ServerProcess, started

ROOT = Path(__file__).parent.parent
BUILD_DEADLINE = 200


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "sqlrooms_server",
        f"sqlrooms_server-{__version__}.dist-info",
    }
    assert "sqlrooms_server/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.timeout(300)
def test_the_installed_wheel_serves(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, with this one's dependencies but not this checkout."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*install, "--target", site, wheel], check=True, timeout=BUILD_DEADLINE, capture_output=True
    )
    packages = Path(sys.modules["duckdb"].__file__ or "").parent.parent
    script = tmp_path / "entry.py"
    script.write_text(
        f"import sys; sys.path.append({str(packages)!r})\n"
        "import sqlrooms_server; print(sqlrooms_server.__file__, file=sys.stderr)\n"
        "from sqlrooms_server.cli import main; sys.exit(main())\n"
    )
    python = tmp_path / "env" / "bin" / "python"
    process = ServerProcess(started, command=[str(python), str(script)], cwd=tmp_path)
    try:
        with process.connect() as wire:
            assert wire.table("select 42 as answer").to_pydict() == {"answer": [42]}
    finally:
        assert process.stop() == 0
    assert str(tmp_path) in process.errors
    assert os.path.realpath(ROOT) not in process.errors
