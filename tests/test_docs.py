"""The README and docs tell the truth: tables match the code, snippets run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sqlrooms_server import errors, protocol
from sqlrooms_server.errors import ServerError
from sqlrooms_server.protocol.decode import TEXT_DECODERS
from tests.conftest import LocalServer, ServerProcess
from tests.npm import PROJECT, install_packages, run_node
from tests.readme import README, renewed
from tests.wire import DEADLINE

ROOT = README.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def snippets(language: str) -> list[tuple[str, str]]:
    """Each tested piece of the README, and what is said of what it prints."""
    text = README.read_text(encoding="utf-8")
    tested = rf"<!-- tested: [^>]*-->\n```{language}\n(.*?)```\n\nprints (.*?)\n\n"
    return re.findall(tested, text, re.S)


def test_the_settings_table_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert renewed(text) == text, "run python -m tests.readme"


@pytest.mark.parametrize("number", range(3))
def test_the_python_snippets_run(server: LocalServer, tmp_path: Path, number: int) -> None:
    code, said = snippets("python")[number]
    script = tmp_path / "snippet.py"
    script.write_text(code.replace("ws://localhost:4000", server.url))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    printed = [f"`{line}`" for line in done.stdout.splitlines()]
    assert printed == re.findall("`.*?`", said, re.S)[: len(printed)]
    assert printed


def test_every_python_snippet_is_run() -> None:
    assert len(snippets("python")) == 3


@pytest.mark.timeout(300)
def test_the_browser_snippet_runs(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    packages = install_packages()
    [(code, said)] = snippets("js")
    code = code.replace("ws://localhost:4000", serve().url)
    script = tmp_path / "snippet.mjs"
    script.write_text(code + "\nsocket.close();\n")
    (tmp_path / "node_modules").symlink_to(packages)
    printed = run_node(script, timeout=DEADLINE)
    assert printed == "Oslo: 2, Rome: 1\n"
    assert f"`{printed.strip()}`" in said
    assert PROJECT.exists()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_protocol_page_names_every_code_and_message() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, ServerError):
            assert f"| `{error.code}` |" in page, error.code
    for kind in (*TEXT_DECODERS, "uploadArrow"):
        assert f'type: "{kind}"' in page, kind
    assert f"Version {protocol.PROTOCOL_VERSION}." in page


def test_the_architecture_page_names_every_part() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "sqlrooms_server").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert f"| `{path.stem}` |" in page, path.name
        elif path.is_dir() and path.name != "__pycache__":
            assert f"| `{path.name}/` |" in page, path.name
            modules = page.partition(f"\n| `{path.name}/` | |\n")[2].partition("\n\n")[0]
            for module in path.glob("[!_]*.py"):
                assert f"`{module.stem}`" in modules, module


def test_every_script_is_in_the_contributing_page() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in ("serve", "test", "check", "bench", "fuzz"):
        assert f"./scripts/{name}" in page


def test_pins_have_no_addresses_and_no_hashes() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        pin = r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?'
        assert line.startswith("#") or re.fullmatch(pin, line), line
