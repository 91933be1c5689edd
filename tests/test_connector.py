"""The published JavaScript connectors, unmodified, in Node and in Chromium, with a real server.

`tests/browser/scenario.mjs` is the test; this module gives it servers, files and a place to run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from tests.chromium import Report, open_page, serve_pages
from tests.conftest import ServerProcess
from tests.npm import PROJECT, install_packages, run, run_node

# The scenario gives up by itself after 150 seconds and reports what it has.
SCENARIO_DEADLINE = 180
TEST_DEADLINE = 300

# A URL has to quote this one.
TOKEN = "right/token+with=signs&more"

# The scenario runs twice as many heavy queries, to see queued ones cancelled too.
WORKERS = 4

SALES = """
    select range as id, ['Zürich', 'New York', '東京'][range % 3 + 1] as city,
        range * 1.25 as amount, date '2024-01-01' + (range % 366)::integer as day,
        if(range % 10 = 0, null, 'note "' || range || '", ok') as note
    from range(1000)
"""

Runner = Callable[[Path, str, Path], Report]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the scenario and its packages in one file per runtime, and the page."""
    packages = install_packages()
    out = tmp_path_factory.mktemp("bundle")
    for source, platform in (("node.mjs", "node"), ("page.mjs", "browser")):
        command = [str(packages / ".bin" / "esbuild"), source, "--bundle", "--format=esm"]
        command += [f"--platform={platform}", f"--outdir={out}", "--log-level=warning"]
        # The only build of Loro that holds its WebAssembly itself.
        command += ["--alias:loro-crdt=loro-crdt/base64"]
        command += ["--out-extension:.js=.mjs"] if platform == "node" else []
        run(command, cwd=PROJECT, timeout=60)
    (out / "page.html").write_bytes((PROJECT / "page.html").read_bytes())
    return out


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The same sales as CSV and as Parquet."""
    paths = {"csv": str(tmp_path / "sales.csv"), "parquet": str(tmp_path / "sales.parquet")}
    with duckdb.connect() as connection:
        for path in paths.values():
            connection.execute(f"copy ({SALES}) to '{path}'")
    return paths


def in_node(bundle: Path, request: str, tmp_path: Path) -> Report:
    output = run_node(bundle / "node.mjs", stdin=request, timeout=SCENARIO_DEADLINE)
    report: Report = json.loads(output)
    return report


def in_chromium(bundle: Path, request: str, tmp_path: Path) -> Report:
    content = {
        "/page.html": ("text/html", (bundle / "page.html").read_bytes()),
        "/page.js": ("text/javascript", (bundle / "page.js").read_bytes()),
        "/request": ("application/json", request.encode()),
    }
    with serve_pages(content) as site, open_page(site, site.url(), tmp_path / "chromium.log"):
        return site.report(SCENARIO_DEADLINE)


@pytest.mark.timeout(TEST_DEADLINE)
@pytest.mark.parametrize("run_scenario", [in_node, in_chromium])
def test_published_connector(
    run_scenario: Runner,
    bundle: Path,
    files: dict[str, str],
    serve: Callable[..., ServerProcess],
    tmp_path: Path,
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n", encoding="utf-8")
    open_to_all = serve("--workers", str(WORKERS))
    locked = serve("--auth-token-file", str(token_file))
    request = {
        "wsUrl": open_to_all.url,
        "files": files,
        "locked": {"wsUrl": locked.url, "token": TOKEN},
    }
    assert_succeeds(run_scenario(bundle, json.dumps(request), tmp_path))


@pytest.mark.timeout(TEST_DEADLINE)
@pytest.mark.parametrize("run_scenario", [in_node, in_chromium])
def test_published_connector_of_rooms(
    run_scenario: Runner, bundle: Path, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n", encoding="utf-8")
    in_memory = serve("--sync")
    database = str(tmp_path / "some.duckdb")
    on_disk = serve("--sync", "--db-path", database, "--auth-token-file", str(token_file))
    servers = {
        "in memory": {"wsUrl": in_memory.url},
        "on disk": {"wsUrl": on_disk.url, "token": TOKEN},
    }
    assert_succeeds(run_scenario(bundle, json.dumps({"servers": servers}), tmp_path))


def assert_succeeds(report: Report) -> None:
    assert "error" not in report, report["error"]
    assert report["steps"]
    failed = [f"{step['name']}: {step['detail']}" for step in report["steps"] if not step["ok"]]
    assert not failed, "\n".join(failed)
