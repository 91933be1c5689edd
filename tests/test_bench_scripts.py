"""The parts of ``scripts/bench`` that measure nothing: its clients, its limits and its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: scripts/bench --page -->", "<!-- end of figures -->"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: import_module(f"bench_suite.{name}")


@contextmanager
def answering(answers: list[tuple[int, bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """An HTTP server on a free port with these answers, and the bodies it was sent."""
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def ask(suite: Any, connection: Any, question: bytes) -> tuple[bool, bytes]:
    whole = suite("replies").Whole()
    connection.send(question)
    while not whole.messages:
        connection.receive(whole)
    [(binary, data)] = whole.take()
    return binary, bytes(data)


def test_a_question_over_http_is_answered_as_over_a_websocket(suite: Any) -> None:
    http, load = suite("http_client"), suite("load")
    answers = [(200, b"arrow"), (200, b"x" * 3_000_000), (500, b"no"), (200, b"")]
    with answering(answers) as (port, asked):
        with http.HttpConnection(port, http.Mosaic()) as connection:
            question = load.as_message("arrow", sql="select 1", queryId="q1")
            binary, data = ask(suite, connection, question)
            assert binary
            assert suite("replies").arrow_reply((binary, bytearray(data))) == ("q1", b"arrow")
            assert len(ask(suite, connection, question)[1]) > 3_000_000
            assert ask(suite, connection, question) == (False, b"no")
            execute = load.as_message("exec", sql="create table t", queryId="e")
            assert ask(suite, connection, execute) == (False, b'{"type": "ok"}')
        assert [json.loads(body) for body in asked] == [
            *[{"type": "arrow", "sql": "select 1"}] * 3,
            {"type": "exec", "sql": "create table t"},
        ]


def test_quack_is_asked_with_the_bytes_of_its_own_client(suite: Any) -> None:
    session = b"0123456789ABCDEF0123456789ABCDEF"
    # Answers of a server of 1.5.5 to CONNECTION_REQUEST and to PREPARE_REQUEST.
    began = b"\x01\x00\x02\x02\x00 " + session + b"\x03\x00\x01\xff\xff\x01\x00\x06v1.5.5\xff\xff"
    found = b"\x01\x00\x04\x03\x00\x01\xff\xff\x01\x00\x01d\x00\r\xff\xff\x02\x00\x01\x011\xff\xff"
    number = b"\x05\x00\xe0\x9e\xc1\x9a\xb2\xf2\x9c\xad\xc8\x00\xfb\x8b\x80\xdb\x9d\xad\x01\xff\xff"
    load = suite("load")
    with answering([(200, began), (200, found + number)]) as (port, asked):
        with suite("quack").connect(port) as connection:
            question = load.as_message("arrow", sql="select 1", queryId="q1")
            _, answer = ask(suite, connection, question)
    # Without the number of the result.
    assert answer.endswith(found[:-2])
    assert asked[1] == (
        b"\x01\x00\x03\x02\x00 " + session + b"\x03\x00\x01\xff\xff\x01\x00\x08select 1\xff\xff"
    )


def test_a_count_above_its_limit_is_told(suite: Any) -> None:
    guard = suite("guard")
    found = {count.key: count.limits["1.5"] for count in guard.COUNTS}
    assert list(guard.exceeded(found, "1.5")) == []
    found["calls"] += 1
    [told] = guard.exceeded(found, "1.5")
    assert "calls of Python for select 1: 218, more than 217" in told


def document() -> dict[str, Any]:
    row = {
        "workload": "one",
        "metric": "qps",
        "label": "select 1, 1 at a time",
        "unit": "q/s",
        "more_is_better": True,
        "median": {"published": 1000.0, "ours": 4000.0, "roapi": None},
        "best_peer": "roapi",
    }
    points = {"ours": [[1, 100.0], [512, 4000.0]], "published": [[1, 90.0], [512, 4000.0]]}
    curve = {
        "workload": "clients",
        "key": "q",
        "title": "select <1>",
        "unit": "q/s",
        "across": "clients",
        "points": points,
    }
    return {
        "began": "2026-01-02T03:04:05+00:00",
        "arguments": ["--environments", "/somewhere", "--quick", "--json=/a/file"],
        "machine": {"cores": 2, "cpu": "A", "memory": 8e9, "kernel": "Linux 6", "load": 0.5},
        "tables": [
            {
                "duckdb": "1.5",
                "versions": {"ours": {"duckdb": "1.5.6"}},
                "rows": [row],
                "curves": [curve],
                "text": "the table",
            }
        ],
    }


def page_of(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "all.json").write_text(json.dumps(document()))
    (tmp_path / "page.md").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "bench_suite", "--from", "all.json", "--page", "page.md"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_page_is_renewed_between_its_marks(tmp_path: Path) -> None:
    done = page_of(tmp_path, f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith(f"{END}\nafter\n")
    assert "old" not in page and "the table" in page
    assert "`scripts/bench --quick` on 2026-01-02" in page
    for image in tmp_path.glob("page/*.svg"):
        assert f"(page/{image.name})" in page
        ElementTree.parse(image)
        assert "prefers-color-scheme:dark" in image.read_text()
    assert {image.name for image in tmp_path.glob("page/*.svg")} == {
        "small-1.5.svg",
        "clients-q-1.5.svg",
    }


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    done = page_of(tmp_path, "words\n")
    assert done.returncode == 1
    assert BEGIN in done.stderr
    assert (tmp_path / "page.md").read_text() == "words\n"


def test_the_page_of_this_project_has_its_marks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.index(BEGIN) < page.index(END)
