"""``sqlrooms-server query``: formats, errors, exit statuses, Ctrl+C."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from sqlrooms_server.client import Client, Progress, connect
from sqlrooms_server.query_command.cells import json_texts, texts
from sqlrooms_server.query_command.table import TablePreview
from tests.conftest import LocalServer
from tests.nursery import Done, Nursery
from tests.test_queries import ENDLESS
from tests.wire import DEADLINE

COMMAND = (sys.executable, "-m", "sqlrooms_server", "query")


Run = Callable[..., Done]
Output = Callable[..., bytes]


@pytest.fixture
def run(nursery: Nursery) -> Run:
    """Runs the command to its end; keywords are variables of its environment."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> Done:
        return nursery.run("query", *arguments, environment=environment, stdin=stdin.encode())

    return run


@pytest.fixture
def output(run: Run) -> Output:
    """What a command that succeeds prints."""

    def output(url: str, *arguments: str, **options: str) -> bytes:
        done = run("--url", url, *arguments, **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        return done.stdout

    return output


# Values


def test_values_as_text_and_as_json(server: LocalServer) -> None:
    """Beside each value, its text and its JSON."""
    values = {
        "1.50::decimal(5,2)": ("1.50", "1.50"),
        "12345678901234567890123::hugeint": ("12345678901234567890123",) * 2,
        "0.1::double": ("0.1", "0.1"),
        "'nan'::double": ("nan", "null"),
        "true": ("true", "true"),
        "'a\"ü'": ('a"ü', '"a\\"ü"'),
        "''": ("", '""'),
        "'a'::enum('a')": ("a", '"a"'),
        "'\\xAA'::blob": ("\\xaa", '"qg=="'),
        "date '10000-01-02'": ("10000-01-02", '"10000-01-02"'),
        "time '01:02:03.5'": ("01:02:03.5", '"01:02:03.5"'),
        "timestamp '2026-01-02 03:04:05'": ("2026-01-02 03:04:05", '"2026-01-02 03:04:05"'),
        "'2026-01-02 03:04:05.000000001'::timestamp_ns": (
            "2026-01-02 03:04:05.000000001",
            '"2026-01-02 03:04:05.000000001"',
        ),
        "timestamptz '2026-01-02 03:04:05.25+01'": (
            "2026-01-02 02:04:05.25Z",
            '"2026-01-02 02:04:05.25Z"',
        ),
        "interval '1 month -2 days 3.5 seconds'": (
            "1 month -2 days 00:00:03.5",
            '"1 month -2 days 00:00:03.5"',
        ),
        "interval '0 days'": ("00:00:00", '"00:00:00"'),
        "[1, null]": ("[1,null]", "[1,null]"),
        "{'a': date '2026-01-02', 'b': 1.5::double}": ('{"a":"2026-01-02","b":1.5}',) * 2,
        "map {'k': [1]}": ('{"k":[1]}', '{"k":[1]}'),
    }
    columns = ", ".join(f"{value} as c{number}" for number, value in enumerate(values))
    with connect(server.url) as db:
        table = db.query(f"set timezone = 'UTC'; select {columns}").to_arrow()
    for column, expected in zip(table.columns, values.values(), strict=True):
        assert (texts(column.chunk(0)), json_texts(column.chunk(0))) == (
            [expected[0]],
            [expected[1]],
        )
    nothing = pa.array([None], pa.int32())
    assert (texts(nothing), json_texts(nothing)) == ([None], ["null"])


# The table


def lines(
    batches: list[dict[str, Any]], width: int | None = None, styled: bool = False
) -> list[str]:
    records = [pa.RecordBatch.from_pydict(batch) for batch in batches]
    preview = TablePreview(records[0].schema)
    for batch in records:
        preview.add(batch)
    return preview.lines(width, styled)


def test_numbers_stand_right_and_null_is_distinct() -> None:
    batch = {"n": [1, None, 300], "s": ["a", None, "c"]}
    assert lines([batch]) == ["   n  s", "────  ────", "   1  a", "NULL  NULL", " 300  c"]
    assert lines([batch], styled=True)[3] == "\x1b[2mNULL\x1b[0m  \x1b[2mNULL\x1b[0m"


def test_long_cells_are_cut_to_the_width() -> None:
    batch = {"id": [1], "long": ["x" * 100], "other": ["y" * 30]}
    shown = lines([batch], width=60)
    assert shown[2] == f" 1  {'x' * 26}…  {'y' * 26}…"
    assert all(len(line) <= 60 for line in shown)


def test_columns_that_do_not_fit_are_left_out() -> None:
    shown = lines([{f"column_{number}": ["value"] for number in range(30)}], width=50)
    assert all(len(line) <= 50 for line in shown)
    assert shown[-1] == "(5 of 30 columns are shown)"


def test_only_the_first_and_last_rows_are_shown() -> None:
    batches = [{"i": list(range(start, start + 7))} for start in range(0, 7000, 7)]
    shown = [line.strip() for line in lines(batches)[2:]]
    assert shown == [*map(str, range(20)), "…", *map(str, range(6980, 7000))]
    assert len(lines([{"i": list(range(40))}])) == 42


def test_text_stays_on_its_line_and_commands_no_terminal() -> None:
    assert lines([{"a": ["x\n\x1b[2J", "日本"]}]) == ["a", "──────────", "x\\n\\x1b[2J", "日本"]
    assert lines([{"a": ["日本語"]}], width=4)[2] == "日…"


# Formats


def test_table(output: Output, server: LocalServer) -> None:
    sql = "from (values ('Oslo', 2), ('Rome', null)) t(city, n)"
    shown = output(server.url, "--format", "table", sql).decode().splitlines()
    assert shown[:-1] == ["city     n", "────  ────", "Oslo     2", "Rome  NULL"]
    assert shown[-1].startswith("2 rows, 2 columns, ")
    created = output(server.url, "--format", "table", "create table t(i int)").decode()
    assert created.startswith("ok, ")
    cut = output(server.url, "--format", "table", "--max-rows", "1", sql).decode()
    assert cut.splitlines()[-1].endswith(" ms, there are more")


def test_csv_is_what_a_pipe_gets(output: Output, server: LocalServer) -> None:
    sql = "from (values ('a,\"b', 1, [1, 2], null), ('', 2, [], 1.5)) t(\"s,\", i, l, d)"
    text = output(server.url, sql).decode()
    assert text.splitlines()[1:] == ['"a,""b",1,"[1,2]",', '"",2,"[]",1.5']
    assert next(csv.reader(io.StringIO(text))) == ["s,", "i", "l", "d"]
    assert output(server.url, "create table t(i int)") == b""


def test_json(output: Output, server: LocalServer) -> None:
    sql = 'select i, 1.50::decimal(5,2) as d, null as "d " from range(3) t(i)'
    text = output(server.url, "--format", "json", sql).decode()
    assert text.splitlines()[1] == '{"i":0,"d":1.50,"d ":null},'
    assert json.loads(text) == [{"i": i, "d": 1.5, "d ": None} for i in range(3)]
    assert output(server.url, "--format", "json", "select 1 where false") == b"[]\n"
    assert len(json.loads(output(server.url, "--format", "json", "from range(100000)"))) == 100_000


def test_arrow_and_parquet(output: Output, server: LocalServer, tmp_path: Path) -> None:
    sql = "select i, i::varchar as s from range(300000) t(i) order by i"
    with connect(server.url) as db:
        table = db.query(sql).to_arrow()
    stream = output(server.url, "--format", "arrow", sql)
    assert pa.ipc.open_stream(stream).read_all().equals(table)
    file = parquet.ParquetFile(io.BytesIO(output(server.url, "--format", "parquet", sql)))
    assert file.read().equals(table)
    assert 1 < file.num_row_groups <= 3
    path = tmp_path / "out.parquet"
    assert output(server.url, "--output", str(path), sql) == b""
    assert parquet.read_table(path).equals(table)


def test_an_output_file(
    run: Run, output: Output, launch: Callable[..., LocalServer], tmp_path: Path
) -> None:
    # Or the second thread of DuckDB finds the error before the first has a row.
    server = launch(threads=1)
    path = tmp_path / "out.json"
    output(server.url, "--output", str(path), "select 1 as a")
    assert json.loads(path.read_text()) == [{"a": 1}]
    # What fails at once leaves the old file; what fails later, no file.
    assert run("--url", server.url, "--output", str(path), "selec").returncode == 1
    assert json.loads(path.read_text()) == [{"a": 1}]
    late = "select if(i < 2000000, 1, error('late'))::int as a from range(3000000) t(i)"
    failed = run("--url", server.url, "--output", str(path), late)
    assert (failed.returncode, path.exists()) == (1, False), failed
    nowhere = run("--url", server.url, "--output", str(tmp_path / "no" / "x.csv"), "select 1")
    assert nowhere.returncode == 1
    assert b"No such file" in nowhere.stderr


# Live queries

COUNT = "select count(*)::int as n from t"


@contextmanager
def following(url: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command with ``--live``; it ends with Ctrl+C at the end of the block."""
    command = [*COMMAND, "--url", url, "--live", *arguments, COUNT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.fixture
def db(server: LocalServer) -> Iterator[Client]:
    with connect(server.url) as client:
        client.execute("create table t(i int)")
        yield client


@pytest.mark.parametrize(
    ("format_", "first", "next_"),
    [
        ("csv", '"n"\n{}\n', '\n"n"\n{}\n'),
        ("json", '[{{"n":{}}}]\n', '[{{"n":{}}}]\n'),
    ],
)
def test_live_results(
    server: LocalServer, db: Client, format_: str, first: str, next_: str
) -> None:
    with following(server.url, "--format", format_) as process:
        assert process.stdout is not None
        for number, expected in enumerate((first, next_, next_)):
            text = expected.format(number).encode()
            assert process.stdout.read(len(text)) == text
            db.execute("insert into t values (1)")


def test_live_results_as_arrow(server: LocalServer, db: Client) -> None:
    with following(server.url, "--format", "arrow") as process:
        for number in range(3):
            assert pa.ipc.open_stream(process.stdout).read_all().to_pydict() == {"n": [number]}
            db.execute("insert into t values (1)")


def test_live_results_in_a_terminal(server: LocalServer, db: Client) -> None:
    main, terminal = pty.openpty()
    with following(server.url, stdout=terminal):
        shown = b""
        for number in range(1, 3):
            while len(re.findall(rb"1 row, 1 column, \d\d:\d\d:\d\d\r\n", shown)) < number:
                shown += os.read(main, 1 << 16)
            db.execute("insert into t values (1)")
        assert shown.split(b"\r\n\r\n")[1].splitlines()[:3] == [b"n", b"\xe2\x94\x80", b"1"]
    os.close(terminal)
    os.close(main)


def test_a_live_query_ends_with_the_error_of_the_server(
    run: Run, server: LocalServer, db: Client
) -> None:
    with subprocess.Popen(
        [*COMMAND, "--url", server.url, "--live", "--format", "json", COUNT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b'[{"n":0}]\n'
        db.execute("drop table t")
        assert process.wait(DEADLINE) == 1
        assert process.stdout.read() == b""
        assert b"t does not exist" in process.stderr.read()
    refused = run("--url", server.url, "--live", "from 'x.csv'")
    assert refused.returncode == 1
    assert refused.stderr.startswith(b"sqlrooms-server query: IO Error: No files found")
    assert refused.stdout == b""


# Arguments


def test_the_sql_and_the_settings(
    run: Run, output: Output, server: LocalServer, tmp_path: Path
) -> None:
    assert output(server.url, "-", stdin="select 1 as a") == b'"a"\n1\n'
    done = run("select 1 as a", SQLROOMS_URL=server.url.removeprefix("ws://"))
    assert done.stdout == b'"a"\n1\n'


def test_parameters(output: Output, server: LocalServer) -> None:
    named = ("--param", "a=40", "--param", "$b=x=y", "select $a::int + 2 as n, $b as t")
    assert output(server.url, *named) == b'"n","t"\n42,"x=y"\n'
    numbered = ("--param", "2=b", "--param", "1=a", "select $1 || $2 as t")
    assert output(server.url, *numbered) == b'"t"\n"ab"\n'


def test_tokens(
    run: Run, output: Output, launch: Callable[..., LocalServer], tmp_path: Path
) -> None:
    server = launch(auth_token="right")
    path = tmp_path / "token"
    path.write_text("right\nmore\n")
    assert output(server.url, "select 1 as a", SQLROOMS_AUTH_TOKEN="right")
    assert output(server.url, "--token-file", str(path), "select 1 as a")
    done = run("--url", server.url, "select 1", SQLROOMS_AUTH_TOKEN="wrong")
    assert done.returncode == 3
    assert b"SQLROOMS_AUTH_TOKEN" in done.stderr
    assert b"wrong" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "SQL"),
        (("--format", "xml", "select 1"), "xml"),
        (("--timeout", "0", "select 1"), "--timeout: '0' is no number of seconds"),
        (("--max-rows", "-1", "select 1"), "--max-rows: '-1' is no whole number"),
        (("--param", "a", "select 1"), "NAME=VALUE"),
        (("--param", "1=a", "--param", "3=b", "select 1"), "without a gap"),
        (("--token-file", "/nowhere", "select 1"), "/nowhere"),
        (("--url", "http://localhost", "select 1"), "no address"),
        (("--db-path", "x", "select 1"), "--db-path"),
        (("--live", "--output", "x.csv", "select 1"), "--live takes neither --output"),
        (("--live", "--format", "parquet", "select 1"), "nor --format parquet"),
    ],
)
def test_wrong_arguments(run: Run, arguments: tuple[str, ...], expected: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert expected.encode() in done.stderr
    assert done.stdout == b""


def test_help_of_both_commands(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--format", "parquet", "SQLROOMS_URL", "exit status"):
        assert word in done.stdout.decode()
    server = subprocess.run(
        [sys.executable, "-m", "sqlrooms_server", "--help"], capture_output=True, text=True
    )
    assert "sqlrooms-server query" in server.stdout


def test_neither_command_imports_what_only_the_other_needs() -> None:
    script = """
import sys
from sqlrooms_server.cli import main
assert not {"pyarrow", "duckdb", "websockets"} & set(sys.modules)
main(["query", "--url", "127.0.0.1:9", "select 1"])
assert {"pyarrow", "websockets"} <= set(sys.modules)
assert not {"duckdb", "socketify", "cffi"} & set(sys.modules)
import sqlrooms_server.server
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    only_server = """
import sys
import sqlrooms_server.server
assert "websockets" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", only_server]).returncode == 0


# Failures


def test_errors_of_sql(run: Run, server: LocalServer) -> None:
    done = run("--url", server.url, "selec")
    assert done.returncode == 1
    assert done.stderr.startswith(b"sqlrooms-server query: Parser Error: ")
    assert done.stdout == b""
    late = run("--url", server.url, "--timeout", "0.2", ENDLESS)
    assert late.returncode == 1
    assert b"longer than 0.2 s" in late.stderr


def test_nothing_listens(run: Run) -> None:
    done = run("--url", "ws://127.0.0.1:9", "select 1")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert b"ws://127.0.0.1:9" in done.stderr
    assert b"--url" in done.stderr


def test_a_reader_that_has_enough(launch: Callable[..., LocalServer]) -> None:
    """``| head``: quiet, and the server is rid of the query."""
    for format_ in ("csv", "json", "arrow"):
        server = launch(workers=1)
        sql = "select i, i as j from range(100000000) t(i)"
        with subprocess.Popen(
            [*COMMAND, "--url", server.url, "--format", format_, sql],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert len(process.stdout.read(100)) == 100
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(DEADLINE) == 0
        with connect(server.url) as db:
            assert db.rows("select 1 as a") == [{"a": 1}]


def test_ctrl_c_cancels(launch: Callable[..., LocalServer]) -> None:
    """The server has one worker: while the command's query runs, another one is queued."""
    server = launch(workers=1)
    with (
        connect(server.url) as db,
        subprocess.Popen(
            [*COMMAND, "--url", server.url, ENDLESS], stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stderr is not None

        def interrupt(progress: Progress) -> None:
            if progress.state == "queued":
                process.send_signal(signal.SIGINT)

        while process.poll() is None:
            assert db.rows("select 1 as a", progress=interrupt, timeout=DEADLINE) == [{"a": 1}]
        assert process.wait(DEADLINE) == 130
        assert process.stderr.read() == b""


def test_in_a_terminal_there_is_a_table_and_a_bar(server: LocalServer) -> None:
    """The bar after half a second; what failed, and a NULL that is dim."""
    main, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "--url", server.url, "--timeout", "1.2", ENDLESS],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "COLUMNS": "60", "TERM": "xterm"},
    ) as process:
        assert process.wait(DEADLINE) == 1
    with subprocess.Popen(
        [*COMMAND, "--url", server.url, "select null as n"], stdout=terminal, stderr=terminal
    ) as process:
        assert process.wait(DEADLINE) == 0
    refused = subprocess.run(
        [*COMMAND, "--url", server.url, "--format", "arrow", "select 1"],
        stdout=terminal,
        stderr=subprocess.PIPE,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(main, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert re.search(rb"\[[#.]{30}\] [^\r]*, 1 s\x1b\[K", shown)
    assert b"longer than 1.2 s" in shown
    assert b"\x1b[2mNULL\x1b[0m" in shown
    assert refused.returncode == 2
    assert b"not for a terminal" in refused.stderr
