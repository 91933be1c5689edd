"""What outlives the server: everything after a clean stop, nothing that is out of date ever.

``SQLROOMS_RESTARTS=100`` kills that many servers, with a seed of its own each time it is set.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pytest
from websockets.exceptions import WebSocketException

from tests.conftest import ServerProcess
from tests.test_cached_queries import ask, is_cached, rows
from tests.test_client import in_thread
from tests.wire import DEADLINE

Serve = Callable[..., ServerProcess]

TABLES = 3
# Chunks of it are a file of their own.
LARGE = "select max(n) as n, list(range) as l from {}, range(20000)"


class Load:
    """Writers and readers of counters that only grow, until their server is gone."""

    def __init__(self) -> None:
        self.acked = dict.fromkeys(range(TABLES), 0)
        self.tried = dict.fromkeys(range(TABLES), 0)
        self.count = 0
        self.reads = threading.Semaphore(0)
        self.stale: list[str] = []

    def write(self, server: ServerProcess, table: int, chance: random.Random) -> None:
        with server.connect() as wire:
            while True:
                self.tried[table] += 1
                value = self.tried[table]
                sql = chance.choice(
                    (
                        f"update c{table} set n = {value}",
                        f"insert into c{table} values ({value})",
                        f"begin; truncate c{table}; insert into c{table} values ({value}); commit",
                        f"create or replace table c{table} as select {value} as n",
                        f"update c{table} set n = {value}; checkpoint",
                    )
                )
                if wire.request(type="exec", sql=sql)["type"] == "ok":
                    self.acked[table] = value

    def read(self, server: ServerProcess, chance: random.Random) -> None:
        with server.connect() as wire:
            while True:
                self.check(wire, chance.randrange(TABLES), chance.random() < 0.1)
                self.reads.release()

    def check(self, wire: Any, table: int, is_large: bool) -> bool:
        """Read a counter; whether the answer was a kept one."""
        floor = self.acked[table]
        text = LARGE if is_large else "select max(n) as n from {}"
        reply = ask(wire, text.format(f"c{table}"))
        if reply["type"] != "json":
            # The server is about to stop, or the table was just replaced.
            assert reply["code"] in ("shutting_down", "query_error", "conflict"), reply
            return False
        value = rows(reply)[0]["n"]
        self.count += 1
        if not floor <= value <= self.tried[table]:
            self.stale.append(f"c{table} is {value}, not {floor} to {self.tried[table]}")
        return is_cached(reply)


def until_it_is_gone(loop: Callable[[], None]) -> None:
    try:
        loop()
    except (WebSocketException, OSError, EOFError):
        pass


@pytest.mark.timeout(0)
def test_killed_at_any_moment(serve: Serve, tmp_path: Path) -> None:
    count = int(os.environ.get("SQLROOMS_RESTARTS", "0"))
    seed = random.randrange(1 << 30) if count else 2026
    chance = random.Random(seed)
    load = Load()
    arguments = ("--db-path", str(tmp_path / "db"), "--cache-dir", str(tmp_path / "cache"))
    kept = 0
    for number in range(count or 3):
        server = serve(*arguments)
        with server.connect() as wire:
            if number == 0:
                for table in range(TABLES):
                    wire.exec(f"create table c{table} as select 0 as n")
            for table in range(TABLES):
                for is_large in (False, True):
                    kept += load.check(wire, table, is_large)
        seeds = [f"{seed} {number} {loop}" for loop in range(4)]
        loops: list[Callable[[], None]] = [
            partial(load.write, server, 0, random.Random(seeds[0])),
            partial(load.write, server, 1, random.Random(seeds[1])),
            partial(load.read, server, random.Random(seeds[2])),
            partial(load.read, server, random.Random(seeds[3])),
        ]
        load.reads.acquire(blocking=False)
        ended = [in_thread(partial(until_it_is_gone, loop)) for loop in loops]
        for _ in range(chance.randrange(100)):
            load.reads.acquire(timeout=DEADLINE)
        server.stop(chance.choice((signal.SIGKILL, signal.SIGTERM)))
        for future in ended:
            future.result()
    print(f"seed {seed}: {load.count} reads, {kept} of them kept, {len(load.stale)} stale")
    assert not load.stale, load.stale[:10]


class Files:
    """A database and a cache that one server after the other uses."""

    def __init__(self, launch: Any, folder: Path) -> None:
        self.database = folder / "db"
        self._options = {"db_path": str(self.database), "cache_dir": str(folder / "cache")}
        self._launch = launch

    def run(self, *texts: str, session: str | None = None, **settings: Any) -> list[bool]:
        """Start, ask, carry out ``texts``, ask again and stop; which answers were kept ones."""
        local = self._launch(**self._options, **settings)
        with local.connect() as wire:
            found = [is_cached(ask(wire, query)) for query in QUERIES]
            for text in texts:
                assert wire.request(type="exec", sql=text, session=session)["type"] == "ok"
            for query in QUERIES:
                assert rows(ask(wire, query)) == wire.rows(query)
        assert local.server.stop()
        return found


QUERIES = ("from t", "select n, range as i from t, range(20000)")
NEW, KEPT = [False, False], [True, True]


@pytest.fixture
def files(launch: Any, tmp_path: Path) -> Files:
    files = Files(launch, tmp_path)
    with duckdb.connect(str(files.database)) as connection:
        connection.execute("create table t as select 1 as n")
    assert files.run() == NEW
    return files


def test_a_clean_stop_keeps_the_cache(files: Files) -> None:
    assert files.run() == KEPT
    assert files.run("update t set n = 2") == KEPT
    assert files.run() == KEPT
    # As far as it goes: nothing is asked again after this.
    assert files.run("create table other as select 1 as n") == KEPT
    assert files.run() == KEPT


def test_a_change_before_a_clean_stop(files: Files, launch: Any) -> None:
    for change in ("update t set n = 2", "create or replace table t as select 3 as n"):
        local = launch(**files._options)
        with local.connect() as wire:
            wire.exec(change)
        assert local.server.stop()
        assert files.run() == NEW
        assert files.run() == KEPT


def changed_by_another(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("update t set n = 2")


def touched(path: Path) -> None:
    os.utime(path)


def replaced(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def log_is_left(path: Path) -> None:
    Path(f"{path}.wal").write_bytes(b"")


def test_a_file_that_was_changed(files: Files) -> None:
    for change in (changed_by_another, touched, replaced, log_is_left):
        change(files.database)
        assert files.run() == NEW, change
        assert files.run() == KEPT, change


@pytest.mark.parametrize("session", [None, "s"])
def test_settings_are_undone_by_a_stop(files: Files, session: str | None) -> None:
    for sql in (
        "set global timezone = 'Asia/Tokyo'",
        "reset global timezone",
        "pragma enable_checkpoint_on_shutdown",
        "attach ':memory:' as other",
    ):
        # Of the server before, too, from the second on.
        assert files.run(sql, session=session) == KEPT, sql
        assert files.run() == NEW, sql
    assert files.run() == KEPT


def test_other_versions_and_settings(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    # It decides how much of a result is remembered.
    assert files.run(max_result_rows=20_000) == NEW
    assert files.run(max_result_rows=20_000) == KEPT
    assert files.run() == NEW
    with monkeypatch.context() as patch:
        patch.setattr(duckdb, "__version__", duckdb.__version__ + ".1")
        assert files.run() == NEW
        assert files.run() == KEPT
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert files.run() == NEW
    assert files.run() == KEPT
    assert files.run("update t set n = 3", no_cache=True) == NEW
    assert files.run() == NEW


def test_a_killed_server_keeps_nothing(serve: Serve, files: Files) -> None:
    options = files._options
    server = serve("--db-path", options["db_path"], "--cache-dir", options["cache_dir"])
    with server.connect() as wire:
        assert [is_cached(ask(wire, query)) for query in QUERIES] == KEPT
    server.stop(signal.SIGKILL)
    assert files.run() == NEW
