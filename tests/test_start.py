"""What a start loads: each of these takes milliseconds that its first answer need not wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from tests.wire import DEADLINE, Wire

# Not numpy, which pyarrow itself loads where it is installed.
NOT_FOR_AN_ANSWER = {
    *("asyncio", "http.client", "logging.config", "multiprocessing", "ssl"),
    *("tomllib", "tomli", "cryptography", "diskcache", "jwt", "loro", "websockets"),
    # The types of the native library are kept, so that nothing parses them.
    *("cffi", "pycparser", "socketify"),
    *("pandas", "pyarrow.compute", "pyarrow.dataset", "pyarrow.fs", "pyarrow.parquet"),
    *("sqlrooms_server.client", "sqlrooms_server.query_command", "sqlrooms_server.db.json_rows"),
}


def test_what_the_first_answer_loads() -> None:
    assert loaded_by_a_first_answer() & NOT_FOR_AN_ANSWER == set()


def loaded_by_a_first_answer() -> set[str]:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "sqlrooms_server", "--port", "0"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    lines: list[str] = []
    # A pipe that is full would stop the server.
    reading = threading.Thread(target=lines.extend, args=(process.stderr,))
    reading.start()
    deadline = threading.Timer(DEADLINE, process.kill)
    deadline.start()
    with process:
        try:
            address = next(line.split()[1] for line in process.stdout if "  address " in line)
            with Wire(address) as client:
                assert client.arrow("select 1").table().num_rows == 1
        finally:
            process.terminate()
            reading.join()
            deadline.cancel()
    names = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "duckdb" in names
    return names


def test_the_package_alone_loads_little() -> None:
    """A notebook imports it long before it starts a server."""
    script = "import sys, sqlrooms_server; print(*(n for n in sys.modules if 'sqlrooms' in n))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    # The hook of an installation that can be edited has our name, too.
    names = {name for name in found.stdout.split() if name.startswith("sqlrooms_server")}
    assert names == {"sqlrooms_server", "sqlrooms_server.errors"}
