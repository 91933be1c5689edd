"""The parts of ``scripts/bench`` that measure nothing: its clients, its limits and its page."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
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


def test_the_smallest_server_answers_batch_by_batch(suite: Any) -> None:
    servers, answers, load = suite("servers"), suite("answers"), suite("load")
    wire = suite("bare_process")
    bare = suite("peers").PEERS["bare"]
    with servers.running(Path(sys.prefix), peer=bare) as server, server.connect() as connection:
        assert load.one_at_a_time(connection, answers.ONE, 0, least=3).latencies
        load.decode(connection, answers.counted(100_000))
        assert load.stream(connection, answers.counted(100_000)).size > 1_600_000
        sql = answers.counted(100_000).sql.encode()
        frames = []
        plain = socket.socket(fileno=os.dup(connection.fileno()))
        with plain, plain.makefile("rb") as file:
            plain.sendall(wire.QUESTION.pack(len(sql)) + sql)
            last = False
            while not last:
                size, last = wire.FRAME.unpack(file.read(wire.FRAME.size))
                frames.append(file.read(size))
        assert len(frames) > 5
        assert pa.ipc.open_stream(b"".join(frames)).read_all().num_rows == 100_000


def test_who_takes_too_long_is_left(suite: Any) -> None:
    patience = suite("patience")
    with pytest.raises(patience.TookTooLong) as told, patience.at_most(0.01):
        threading.Event().wait(60)
    assert patience.reason(told.value) == "> 0.01 s"
    refused = suite("answers").WrongAnswer("a query was answered with b'no'")
    assert patience.reason(refused) == "an error"


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_server_may_not_take_all_memory(suite: Any) -> None:
    patience = suite("patience")
    code = (
        "import resource; input(); print(open('/proc/self/oom_score_adj').read(), "
        "*resource.getrlimit(resource.RLIMIT_DATA)); "
        "bytearray(1 << 45)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        patience.sacrifice(process.pid, limited=True)
        output, errors = process.communicate("\n", timeout=60)
    score, soft, hard = map(int, output.split())
    # Without a limit, they are -1.
    assert score == 1000 and 0 < soft == hard < _physical_memory()
    assert patience.reason(OSError(errors)) == "out of memory"


def sheet(suite: Any) -> Any:
    """What a run might have found: few rows, one peer that failed, and aims that are missed."""
    found = suite("session").Sheet(
        "1.5", {"ours": {"duckdb": "1.5.6", "pyarrow": "26", "python": "3.11", SERVER: "0.2"}}
    )
    found.samples["one"] = {
        subject: [{"qps": rate, "p50": 1e3 / rate, "p99": 2e3 / rate}]
        for subject, rate in {"published": 1000.0, "ours": 3500.0, "bare": 5000.0}.items()
    }
    found.samples["one"] |= {"roapi": [], "mosaic": [{"qps": 2000.0}], "in-process": []}
    found.missing["one"] = {"roapi": "> 60 s"}
    found.samples["clients"] = {
        "ours": [{"q1": 100.0, "q64": 900.0, "q512": 4000.0, "p99": 12.0}],
        "published": [{"q1": 90.0, "q64": 300.0}],
    }
    return found


SERVER = "sqlrooms-server"


def test_ours_is_compared_with_the_best_peer_and_the_bounds(suite: Any) -> None:
    rows = {f"{row.workload}/{row.metric.key}": row for row in suite("rows").rows(sheet(suite))}
    rate = rows["one/qps"].as_json()
    assert rate["best_peer"] == "mosaic"
    assert rate["ratios"] == {
        "published": 3.5,
        "mosaic": 1.75,
        "bare": 0.7,
        "roapi": None,
    }
    assert [(demand["kind"], demand["against"], demand["met"]) for demand in rate["demands"]] == [
        ("required", "published", True),
        ("aim", "published", False),
        ("aim", "mosaic", True),
    ]
    assert rate["missing"] == {"roapi": "> 60 s"}
    # Nothing to compare with is no miss.
    assert list(rows["one/p50"].missed()) == []
    assert list(rows["clients/p99"].missed()) == [
        "select 1, 64 clients: to that of 64: 12 x, aim ≤ 10 x"
    ]


def test_the_table_ends_with_the_limits_that_are_not_kept(suite: Any) -> None:
    text = suite("report").table(sheet(suite))
    assert text.splitlines()[-4:] == [
        "missed:",
        "  select 1, 1 at a time: 3.5x of published, aim ≥ 4x",
        "  select 1, 64 clients: 3x of published, aim ≥ 4x",
        "  select 1, 64 clients: to that of 64: 12 x, aim ≤ 10 x",
    ]
    assert "> 60 s" in text and "ours vs bare" in text


def page_of(suite: Any, tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--environments", "/somewhere", "--quick", "--json=/a/file"]
    began = datetime(2026, 1, 2, tzinfo=timezone.utc)
    document = suite("report").document([sheet(suite)], arguments, began)
    (tmp_path / "all.json").write_text(json.dumps(document))
    (tmp_path / "page.md").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "bench_suite", "--from", "all.json", "--page", "page.md"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_page_is_renewed_between_its_marks(suite: Any, tmp_path: Path) -> None:
    done = page_of(suite, tmp_path, f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith(f"{END}\nafter\n")
    assert "old" not in page
    assert (
        "| select 1, 1 at a time | 3,500 q/s | 1,000 q/s, **3.5x**, ≥ 2.5x ✓, aim ≥ 4x ✗ |" in page
    )
    assert "| mosaic, 2,000 q/s, **1.75x**, aim ≥ 1.5x ✓ | 5,000 q/s, **0.7x** |" in page
    assert "- select 1, 1 at a time: 3.5x of published, aim ≥ 4x" in page
    assert "`scripts/bench --quick` on 2026-01-02" in page
    for image in tmp_path.glob("page/*.svg"):
        assert f"(page/{image.name})" in page
        ElementTree.parse(image)
        assert "prefers-color-scheme:dark" in image.read_text()
    assert {image.name for image in tmp_path.glob("page/*.svg")} == {
        "small-1.5.svg",
        "clients-q-1.5.svg",
    }


def test_a_page_without_marks_is_left_alone(suite: Any, tmp_path: Path) -> None:
    done = page_of(suite, tmp_path, "words\n")
    assert done.returncode == 1
    assert BEGIN in done.stderr
    assert (tmp_path / "page.md").read_text() == "words\n"


def test_the_page_of_this_project_has_its_marks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.index(BEGIN) < page.index(END)
