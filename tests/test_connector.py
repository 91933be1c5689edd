"""The published JavaScript connectors, unmodified, in Node and in Chromium, with a real server.

`tests/browser/scenario.mjs` is the test; this module gives it servers, files and a place to run.
"""

from __future__ import annotations

import http.server
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.conftest import ServerProcess
from tests.npm import PROJECT, find_program, install_packages, run, run_node

# The scenario gives up by itself after 150 seconds and reports what it has.
SCENARIO_DEADLINE = 180
TEST_DEADLINE = 300
SHUTDOWN_DEADLINE = 10

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

CHROMIUM_FLAGS = [
    "--headless",
    # The sandbox refuses root and most containers; the only page is ours.
    "--no-sandbox",
    "--disable-gpu",
    # Containers often have a /dev/shm too small for it.
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]

Report = dict[str, Any]
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
    """Serves the page, opens it in a Chromium of its own and waits for what it posts."""
    program = find_program(
        "chromium",
        "chromium-browser",
        "google-chrome-stable",
        "google-chrome",
        install="apt-get install chromium",
    )
    reports: queue.Queue[Report] = queue.Queue()
    log = tmp_path / "chromium.log"
    with (
        serve_page(bundle, request, reports) as url,
        open_browser([program, *CHROMIUM_FLAGS, url], log, reports),
    ):
        try:
            return reports.get(timeout=SCENARIO_DEADLINE)
        except queue.Empty:
            return {"error": f"no report:\n{log.read_text(errors='replace')[-4000:]}"}


@contextmanager
def serve_page(bundle: Path, request: str, reports: queue.Queue[Report]) -> Iterator[str]:
    """The page's own server, on a port that is free: the URL of the page."""
    content = {
        "/page.html": ("text/html", (bundle / "page.html").read_bytes()),
        "/page.js": ("text/javascript", (bundle / "page.js").read_bytes()),
        "/request": ("application/json", request.encode()),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            media_type, body = content.get(self.path, ("", b""))
            self.send_response(200 if media_type else 404)
            self.send_header("Content-Type", media_type or "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            reports.put(json.loads(self.rfile.read(length)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the output of the tests clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/page.html"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def open_browser(command: list[str], log: Path, reports: queue.Queue[Report]) -> Iterator[None]:
    """A browser with a fresh profile; one that ends before its time reports that itself."""
    with (
        # Short, because it holds a socket; a helper may still write while it is removed.
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        log.open("wb") as output,
    ):
        process = subprocess.Popen(
            [*command, f"--user-data-dir={directory}/profile"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": directory},
            # Its helpers are its process group, which can then be ended as one.
            start_new_session=True,
        )

        def watch() -> None:
            status = process.wait()
            tail = log.read_text(errors="replace")[-4000:]
            reports.put({"error": f"the browser ended with {status}:\n{tail}"})

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                watcher.join(SHUTDOWN_DEADLINE)
                os.killpg(process.pid, signal.SIGKILL)
            watcher.join()


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
