"""Pages in a real browser, and a server of theirs to which they report."""

from __future__ import annotations

import http.server
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.npm import find_program

SHUTDOWN_DEADLINE = 10

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


class Site:
    """A server of pages, on a port of its own. A page reports with a POST of JSON."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reports: queue.Queue[Report] = queue.Queue()
        self.log: Path | None = None

    def url(self, host: str = "127.0.0.1") -> str:
        """The URL of ``page.html``, under a name that leads here."""
        return f"http://{host}:{self.port}/page.html"

    def report(self, deadline: float) -> Report:
        """What a page reports; an error when none does in ``deadline`` seconds."""
        try:
            return self.reports.get(timeout=deadline)
        except queue.Empty:
            assert self.log is not None
            return {"error": f"no report:\n{self.log.read_text(errors='replace')[-4000:]}"}


@contextmanager
def serve_pages(content: Mapping[str, tuple[str, bytes]]) -> Iterator[Site]:
    """Serves ``content``: the media type and the body of each path."""

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
            site.reports.put(json.loads(self.rfile.read(length)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the output of the tests clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(server.server_port)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def open_page(site: Site, url: str, log: Path, flags: Sequence[str] = ()) -> Iterator[None]:
    """Opens ``url`` in a Chromium of its own. Skips the test where there is none."""
    program = find_program(
        "chromium",
        "chromium-browser",
        "google-chrome-stable",
        "google-chrome",
        install="apt-get install chromium",
    )
    site.log = log
    with open_browser([program, *CHROMIUM_FLAGS, *flags, url], log, site.reports):
        yield


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
