"""Damage to the files of the cache, and attacks through them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest

from sqlrooms_server.cache import ResultCache
from tests.test_cache import SIZE, STATE, body, entry_of, leaf

KNOWN = {"a": 1}
SMALL, MIDDLE, LARGE = ("small",), ("middle",), ("large",)
CONTENTS = {SMALL: b"s" * 500, MIDDLE: b"m" * 90_000, LARGE: b"l" * 2_500_000}

Damage = Callable[[Path], None]


@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path / "cache.db", isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def run(path: Path, sql: str, *parameters: object) -> None:
    with database(path) as connection:
        connection.execute(sql, parameters)


def values(path: Path) -> list[Path]:
    return sorted(path.rglob("*.val"))


def garbage(path: Path) -> None:
    (path / "cache.db").write_bytes(os.urandom(40_000))


def database_is_replaced(path: Path) -> None:
    (path / "cache.db").unlink()
    garbage(path)


def database_is_deleted(path: Path) -> None:
    (path / "cache.db").unlink()


def database_is_a_pipe(path: Path) -> None:
    (path / "cache.db").unlink()
    os.mkfifo(path / "cache.db")


def database_is_a_link(path: Path) -> None:
    (path / "cache.db").rename(path.parent / "moved.db")
    (path / "cache.db").symlink_to(path.parent / "moved.db")


def another_schema(path: Path) -> None:
    run(path, "DROP TABLE Cache")
    run(path, "CREATE TABLE Cache (key, other)")


def endless_view(path: Path) -> None:
    run(path, "DROP TABLE Cache")
    run(
        path,
        "CREATE VIEW Cache AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i AS rowid, 1 AS raw, 'x' AS key, 1 AS mode, 'f' AS filename, x'00' AS value "
        "FROM n WHERE i < 0",
    )


def endless_trigger(path: Path) -> None:
    run(
        path,
        "CREATE TRIGGER endless AFTER INSERT ON Cache BEGIN "
        "UPDATE Settings SET value = (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL "
        "SELECT i + 1 FROM n) SELECT count(*) FROM n) WHERE key = 'hits'; END",
    )


def odd_settings(path: Path) -> None:
    run(path, "INSERT INTO Settings VALUES ('_sql', 'x'), ('disk_evil', 1)")
    run(path, "UPDATE Settings SET value = 'many' WHERE key = 'size'")


def odd_rows(path: Path) -> None:
    run(path, "UPDATE Cache SET key = CAST(rowid AS BLOB), raw = 0, mode = 'x', value = 17")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (open, (str(self._path), "w"))


def pickles_in_rows(path: Path) -> None:
    data = pickle.dumps(Payload(path.parent / "executed"))
    run(path, "UPDATE Cache SET mode = 4, filename = NULL, value = ?", data)


def pickles_in_files(path: Path) -> None:
    for file in values(path):
        file.write_bytes(pickle.dumps(Payload(path.parent / "executed")))
    run(path, "UPDATE Cache SET mode = 4")


def pickled_keys(path: Path) -> None:
    data = pickle.dumps(Payload(path.parent / "executed"))
    run(path, "UPDATE Cache SET raw = 0, key = CAST(? || rowid AS BLOB)", data)


def names_outside(path: Path) -> None:
    run(path, "UPDATE Cache SET mode = 2, value = NULL, filename = '/etc/hostname'")


def names_above(path: Path) -> None:
    run(path, "UPDATE Cache SET mode = 2, value = NULL, filename = '../../../../etc/hostname'")


def linked_file(path: Path) -> None:
    for file in values(path):
        file.unlink()
        file.symlink_to("/etc/hostname")


def linked_folder(path: Path) -> None:
    for number, file in enumerate(values(path)):
        target = path.parent / f"moved-{number}"
        file.parent.rename(target)
        file.parent.symlink_to(target)


def file_is_a_pipe(path: Path) -> None:
    for file in values(path):
        file.unlink()
        os.mkfifo(file)


def file_is_a_folder(path: Path) -> None:
    for file in values(path):
        file.unlink()
        file.mkdir()


def files_are_deleted(path: Path) -> None:
    for file in values(path):
        file.unlink()


def files_are_truncated(path: Path) -> None:
    for file in values(path):
        os.truncate(file, file.stat().st_size - 1)
    run(path, "UPDATE Cache SET value = substr(value, 1, 20) WHERE value IS NOT NULL")


def files_are_empty(path: Path) -> None:
    for file in values(path):
        os.truncate(file, 0)


def files_are_extended(path: Path) -> None:
    for file in values(path):
        with file.open("ab") as out:
            out.write(b"x")


def a_bit_is_flipped(path: Path) -> None:
    for file in values(path):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def entries_are_exchanged(path: Path) -> None:
    first, second = values(path)
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


def forged_description(path: Path) -> None:
    """A right hash over a description that lies, and one that is too deep to be parsed."""
    for file, text in zip(values(path), (b"[" * 100_000, b'{"token":1}'), strict=True):
        data = b"sqlroom1" + len(text).to_bytes(4, "big") + text + b"body"
        file.write_bytes(data + hashlib.sha256(data).digest())


def directory_is_removed(path: Path) -> None:
    shutil.rmtree(path)


def directory_is_replaced(path: Path) -> None:
    shutil.move(path, path.parent / "moved")
    path.symlink_to(path.parent / "moved")


def log_is_garbage(path: Path) -> None:
    (path / "cache.db-wal").write_bytes(os.urandom(40_000))


DAMAGES: list[Damage] = [
    value
    for name, value in sorted(globals().items())
    if getattr(value, "__annotations__", {}) == {"path": "Path", "return": "None"}
    and name not in ("run",)
]


def filled(directory: Path) -> ResultCache:
    cache = ResultCache(str(directory), SIZE, name="/data/some.db")
    cache.recover(KNOWN)
    for key, content in CONTENTS.items():
        cache.store(key, entry_of(cache, content))
    cache.flush()
    return cache


def use(cache: ResultCache) -> None:
    """Nothing raises, what is found is right, and what is stored after that is found."""
    for key, content in CONTENTS.items():
        cache.discard(key)
        found = cache.find(key)
        assert found is None or body(found) == content
    for number in range(3):
        cache.store((number,), entry_of(cache, b"n"))
        assert body(cache.find((number,))) == b"n"
        cache.flush()
        for key in CONTENTS:
            cache.find(key)
        cache.discard((number,))
        found = cache.find((number,))
        assert found is None or body(found) == b"n"


def check_nothing_happened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not (tmp_path / "cache" / "executed").exists()
    assert Path("/etc/hostname").exists()
    warnings = [record for record in caplog.records if record.levelname != "DEBUG"]
    assert len(warnings) <= 1, [record.getMessage() for record in warnings]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_while_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage
) -> None:
    cache = filled(tmp_path / "cache")
    try:
        damage(leaf(tmp_path / "cache"))
        # The writer of this process is believed; only an endless lookup is ended.
        if damage is not endless_trigger:
            use(cache)
    finally:
        cache.close(KNOWN, STATE)
    check_nothing_happened(tmp_path, caplog)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_between_two_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage
) -> None:
    filled(tmp_path / "cache").close(KNOWN, STATE)
    damage(leaf(tmp_path / "cache"))
    cache = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    if damage is directory_is_replaced:
        shutil.rmtree(tmp_path / "cache")
    try:
        cache.recover(KNOWN)
        use(cache)
    finally:
        cache.close(KNOWN, STATE)
    check_nothing_happened(tmp_path, caplog)


def test_the_attacks_would_work_on_diskcache_itself(tmp_path: Path) -> None:
    """So that the tests above prove something."""
    (tmp_path / "cache" / "leaf").mkdir(parents=True)
    path = tmp_path / "cache" / "leaf"
    with diskcache.Cache(str(path)) as cache:
        cache["k"] = b"v"
        pickles_in_rows(path)
        cache["k"].close()
        assert (tmp_path / "cache" / "executed").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        random.Random(1).randbytes(100),
        b'{"format":1,"fingerprint":{"a":1}}',
    ],
)
def test_a_manifest_that_was_not_written_by_it(tmp_path: Path, text: bytes) -> None:
    filled(tmp_path / "cache").close(KNOWN, STATE)
    (leaf(tmp_path / "cache") / "manifest.json").write_bytes(text)
    cache = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    assert cache.recover(KNOWN) is None
    use(cache)
    cache.close(None)


def test_what_json_cannot_say_is_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    spool = cache.spool()
    cache.store(("q",), spool.finish(object(), {}))
    cache.flush()
    assert cache.peek(("q",)) is not None
    cache.discard(("q",))
    assert cache.find(("q",)) is None
    cache.close(KNOWN, object())
    assert "not JSON serializable" in caplog.text


def test_a_write_that_takes_too_long_is_broken_off(tmp_path: Path) -> None:
    cache = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    for number in range(10):
        cache.store((number,), entry_of(cache, *[bytes(1_000_000)] * 6))
    cache.close(KNOWN, STATE, deadline=0)
    again = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    assert again.recover(KNOWN) == STATE
    for number in range(10):
        found = again.find((number,))
        assert found is None or body(found) == bytes(6_000_000)
    again.close(None)
