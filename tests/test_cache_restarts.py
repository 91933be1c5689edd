"""When the cache outlives a restart, and when it must not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sqlrooms_server.cache import ResultCache, fingerprint
from sqlrooms_server.cache.records import Record
from tests.test_cache import SIZE, STATE, body, entry_of, leaf
from tests.test_cache_files import CONTENTS, values

ENVIRONMENT = {"duckdb": "1.5", "extensions": ("json",)}


def duckdb(path: Path, sql: str, end: str = "connection.close()") -> None:
    code = f"import duckdb, os; connection = duckdb.connect({str(path)!r})\n"
    code += f"connection.execute({sql!r}); {end}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A database file whose server was stopped cleanly, with a cache."""
    path = tmp_path / "some.db"
    duckdb(path, "CREATE TABLE t AS SELECT 1 AS i")
    cache = ResultCache(str(tmp_path / "cache"), SIZE, name=str(path))
    assert cache.recover(fingerprint(str(path), ENVIRONMENT)) is None
    for key, content in CONTENTS.items():
        cache.store(key, entry_of(cache, content))
    cache.close(fingerprint(str(path), ENVIRONMENT), STATE)
    return path


def restarted(path: Path, environment: Any = ENVIRONMENT) -> tuple[ResultCache, Any]:
    cache = ResultCache(str(path.parent / "cache"), SIZE, name=str(path))
    return cache, cache.recover(fingerprint(str(path), environment))


def assert_lost(path: Path, environment: Any = ENVIRONMENT) -> None:
    cache, state = restarted(path, environment)
    assert state is None
    assert [cache.find(key) for key in CONTENTS] == [None] * 3
    entry_of(cache, bytes(2_000_000))
    assert values(leaf(path.parent / "cache")) == [], "what is out of date does not take room"
    cache.close(None)


def test_results_outlive_restarts(closed: Path) -> None:
    for _ in range(2):
        unused, state = restarted(closed)
        assert state == STATE
        assert unused.sizes()["entries"] >= 3
        unused.close(fingerprint(str(closed), ENVIRONMENT), STATE)
        cache, state = restarted(closed)
        assert state == STATE
        for key, content in CONTENTS.items():
            assert body(cache.find(key)) == content
        cache.store(("more",), entry_of(cache, b"more"))
        cache.close(fingerprint(str(closed), ENVIRONMENT), STATE)
    cache, _ = restarted(closed)
    assert body(cache.find(("more",))) == b"more"
    assert cache.sizes()["entries"] == 4
    cache.close(None)
    assert_lost(closed)


def test_another_process_changed_the_file(closed: Path) -> None:
    duckdb(closed, "UPDATE t SET i = 2")
    assert_lost(closed)


def test_another_process_changed_the_file_and_its_times_were_put_back(closed: Path) -> None:
    before = closed.stat()
    duckdb(closed, "UPDATE t SET i = 2")
    os.utime(closed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_lost(closed)


def test_the_file_was_replaced(closed: Path) -> None:
    shutil.copy2(closed, closed.with_suffix(".copy"))
    closed.with_suffix(".copy").replace(closed)
    assert_lost(closed)


def test_the_file_has_a_log(closed: Path) -> None:
    duckdb(closed, "UPDATE t SET i = 2", end="os._exit(0)")
    assert Path(f"{closed}.wal").exists()
    assert fingerprint(str(closed), ENVIRONMENT) is None
    assert_lost(closed)


def test_a_file_that_is_gone(closed: Path) -> None:
    closed.unlink()
    assert fingerprint(str(closed), ENVIRONMENT) is None
    assert_lost(closed)


def test_another_environment(closed: Path) -> None:
    assert_lost(closed, {**ENVIRONMENT, "duckdb": "2.0"})


def test_a_stop_that_was_not_clean(closed: Path) -> None:
    cache, state = restarted(closed)
    assert state == STATE
    cache.close(None)
    assert_lost(closed)


def test_the_manifest_is_gone_before_anything_is_used(closed: Path) -> None:
    path = leaf(closed.parent / "cache")
    assert json.loads((path / "manifest.json").read_text())["state"] == STATE
    cache, _ = restarted(closed)
    assert not (path / "manifest.json").exists()
    cache.close(None)


def test_reading_does_not_write(closed: Path) -> None:
    cache, _ = restarted(closed)
    path = leaf(closed.parent / "cache")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for key in CONTENTS:
        assert cache.find(key) is not None
    for file, content in before.items():
        assert file.read_bytes() == content
    cache.close(None)


def test_a_smaller_cache_removes_what_is_too_much(closed: Path) -> None:
    cache = ResultCache(str(closed.parent / "cache"), 3 << 20, name=str(closed))
    assert cache.recover(fingerprint(str(closed), ENVIRONMENT)) == STATE
    cache.store(("q",), entry_of(cache, b"x"))
    cache.flush()
    assert cache.sizes()["diskBytes"] < 3 << 20
    cache.discard(("q",))
    assert body(cache.find(("q",))) == b"x"
    cache.close(None)


def test_a_record_knows_its_size() -> None:
    cache = ResultCache("", 0, name=":memory:")
    record = Record.of("key", entry_of(cache))
    assert len(b"".join(record.pieces())) == record.size
