"""Database files, meta tables and extensions: what opens, and what is said when it does not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sqlrooms_server.errors import StartupError
from tests.conftest import LocalServer, ServerProcess

Launch = Callable[..., LocalServer]


def fails(launch: Launch, **settings: Any) -> str:
    with pytest.raises(StartupError) as refused:
        launch(**settings)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_directories_are_created(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.duckdb"
    with launch(db_path=str(path)).connect() as wire:
        wire.exec("create table t as select 1")
    assert path.exists()


def test_an_empty_file_becomes_a_database(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "empty.duckdb"
    path.touch()
    with launch(db_path=str(path)).connect() as wire:
        wire.exec("create table t as select 1")


def test_a_file_that_is_no_database_is_left_alone(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 2000)
    text = fails(launch, db_path=str(path))
    assert text.startswith(f"{path} is not a DuckDB database")
    assert path.read_text() == "my notes\n" * 2000


def test_a_file_held_by_another_process_names_it(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "held.duckdb"
    script = f"""
import duckdb, sys
connection = duckdb.connect({str(path)!r})
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        text = fails(launch, db_path=str(path))
        assert f"PID {holder.pid}" in text
        assert str(path) in text
        assert "stop that process or choose another file" in text
        holder.stdin.close()


def test_a_directory_is_no_file(launch: Launch, tmp_path: Path) -> None:
    assert "is a directory" in fails(launch, db_path=str(tmp_path))


def test_a_place_that_cannot_be_written(launch: Launch) -> None:
    assert "Cannot create /proc/x/y.duckdb" in fails(launch, db_path="/proc/x/y.duckdb")
    assert "/proc/y.duckdb" in fails(launch, db_path="/proc/y.duckdb")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(launch: Launch, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "cannot be written" in fails(launch, db_path=str(tmp_path / "x.duckdb"))


def test_a_file_of_a_newer_version(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "new.duckdb"
    duckdb.connect(str(path)).close()
    content = bytearray(path.read_bytes())
    # The storage version follows the checksum and the magic bytes, which are left as they are.
    position = content.index(b"DUCK") + 4
    content[position] = 250
    path.write_bytes(content)
    assert str(path) in fails(launch, db_path=str(path))


def test_read_only(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "r.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("create table t as select 7 as i")
    before = path.read_bytes()
    server = launch(db_path=str(path), read_only=True)
    with server.connect() as wire:
        assert wire.rows("from t") == [{"i": 7}]
        assert "read-only" in wire.arrow("insert into t values (8)")["error"]
    server.server.stop()
    assert path.read_bytes() == before


def test_read_only_needs_a_file(launch: Launch, tmp_path: Path) -> None:
    assert "--db-path" in fails(launch, read_only=True)
    assert "does not exist" in fails(launch, read_only=True, db_path=str(tmp_path / "none.duckdb"))


META = [
    ("key", "VARCHAR", "NO", "PRI", None),
    ("payload_json", "JSON", "YES", None, None),
    ("updated_at", "TIMESTAMP WITH TIME ZONE", "YES", None, "now()"),
]


def described(wire: Any, table: str) -> list[tuple[Any, ...]]:
    rows = wire.rows(f"describe {table}")
    keys = ("column_name", "column_type", "null", "key", "default")
    return [tuple(row[key] for key in keys) for row in rows]


def test_meta_tables_in_the_main_file(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "m.duckdb")
    server = launch(db_path=path)
    with server.connect() as wire:
        assert described(wire, "__sqlrooms.ui_state") == META
        assert [row[:2] for row in described(wire, "__sqlrooms.sync_rooms")] == [
            ("room_id", "VARCHAR"),
            ("snapshot", "BLOB"),
            ("updated_at", "TIMESTAMP WITH TIME ZONE"),
        ]
        wire.exec("insert into __sqlrooms.ui_state (key, payload_json) values ('a', '{\"x\": 1}')")
    server.server.stop()
    with launch(db_path=path).connect() as wire:
        rows = wire.rows("select key, payload_json->>'x' as x, updated_at from __sqlrooms.ui_state")
        assert [(row["key"], row["x"]) for row in rows] == [("a", "1")]
        assert rows[0]["updated_at"] > 1_700_000_000_000


def test_meta_tables_in_a_file_of_their_own(launch: Launch, tmp_path: Path) -> None:
    meta = tmp_path / "deep" / "meta.duckdb"
    server = launch(db_path=str(tmp_path / "m.duckdb"), meta_db=str(meta), meta_namespace="Meta x")
    with server.connect() as wire:
        wire.exec("insert into \"Meta x\".ui_state (key) values ('k')")
        assert wire.rows(
            "select database_name as d from duckdb_tables() where table_name = 'ui_state'"
        ) == [{"d": "Meta x"}]
    server.server.stop()
    with duckdb.connect(str(meta)) as connection:
        assert connection.execute("select key from ui_state").fetchall() == [("k",)]


def test_meta_database_errors(launch: Launch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("x" * 5000)
    assert str(broken) in fails(launch, meta_db=str(broken))
    same = str(tmp_path / "same.duckdb")
    assert same in fails(launch, db_path=same, meta_db=same)


def test_a_file_of_the_published_server_keeps_its_data(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "published.duckdb")
    with duckdb.connect(path) as connection:
        connection.execute(
            """
            create schema __sqlrooms;
            create table __sqlrooms.ui_state (
                key TEXT PRIMARY KEY, payload_json JSON, updated_at TIMESTAMPTZ DEFAULT now());
            create table __sqlrooms.sync_rooms (
                room_id TEXT PRIMARY KEY, snapshot BLOB, updated_at TIMESTAMPTZ DEFAULT now());
            insert into __sqlrooms.ui_state (key, payload_json) values ('default', '{"tabs": []}');
            insert into __sqlrooms.sync_rooms (room_id, snapshot) values ('r', '\\x01\\x02'::blob);
            create table mine as select 42 as answer;
            """
        )
    with launch(db_path=path).connect() as wire:
        assert wire.rows("from mine") == [{"answer": 42}]
        assert wire.rows("select key, payload_json from __sqlrooms.ui_state") == [
            {"key": "default", "payload_json": '{"tabs": []}'}
        ]
        assert wire.rows("select room_id, snapshot from __sqlrooms.sync_rooms") == [
            {"room_id": "r", "snapshot": "AQI="}
        ]


def test_an_unusable_extension_is_a_start_up_error(launch: Launch, tmp_path: Path) -> None:
    for wanted in (
        "no_such_extension",
        "x@no_such_repository",
        str(tmp_path / "x.duckdb_extension"),
    ):
        text = fails(launch, extensions=(wanted,))
        assert wanted in text
    assert "is not name" in fails(launch, extensions=("a b; drop table x",))


def test_start_up_without_extensions_fetches_nothing(launch: Launch) -> None:
    with launch().connect() as wire:
        assert wire.rows("select current_setting('autoinstall_known_extensions') as a") == [
            {"a": False}
        ]


def test_every_acked_exec_survives_a_kill(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    path = tmp_path / "durable.duckdb"
    process = serve("--db-path", str(path))
    with process.connect() as wire:
        wire.exec("create table t(i int)")
        for number in range(300):
            wire.exec(f"insert into t values ({number})")
        process.process.kill()
        process.process.wait()
    with serve("--db-path", str(path)).connect() as wire:
        assert wire.rows("select count(*) as n, max(i) as m from t") == [{"n": 300, "m": 299}]
