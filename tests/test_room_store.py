"""What was acked is there after whatever ended the server; SQL does not reach it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from loro import ExportMode, LoroDoc

from sqlrooms_server.db.room_store import Line, RoomStore
from sqlrooms_server.errors import StartupError
from sqlrooms_server.rooms import keeping
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess
from tests.loro_client import EMPTY, Client, updates_of
from tests.wire import DEADLINE


def values_of(server: ServerProcess | LocalServer, room: str = "r") -> dict[str, Any]:
    with server.connect() as wire:
        client = Client(wire, room)
        client.join()
        return client.values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "my.duckdb"


@pytest.fixture
def run(serve: Callable[..., ServerProcess], path: Path) -> Callable[..., ServerProcess]:
    """Starts a server of the same rooms again."""
    return lambda *more: serve("--db-path", str(path), "--sync", *more)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_ack_means_stored(run: Callable[..., ServerProcess], number: int) -> None:
    acked: dict[str, int] = {}
    rng = random.Random(7)
    for turn in range(int(os.environ.get("SQLROOMS_ROOM_KILLS", "3"))):
        server = run()
        with server.connect() as wire:
            client = Client(wire)
            client.join()
            assert acked.items() <= client.values.items()
            sent = {}
            for index in range(rng.randrange(5, 60)):
                sent[str(index)] = 1000 * turn + index
                client.send(client.change(str(index), 1000 * turn + index))
            for key in list(sent)[: rng.randrange(1, len(sent))]:
                assert client.ack() == {"type": "crdt-update-ack", "roomId": "r"}
                acked[key] = sent[key]
            # Acks of more may be on their way, and what they are about is stored or not.
            os.kill(server.pid, number)
            server.wait()
            for key in sent:
                if acked.get(key) != sent[key]:
                    acked.pop(key, None)
    assert acked.items() <= values_of(run()).items()


def test_steady_editing_is_stored_and_compacted(
    run: Callable[..., ServerProcess], path: Path
) -> None:
    server = run()
    with server.connect() as wire:
        client = Client(wire)
        client.join()
        for number in range(2500):
            client.send(client.change("n", number))
        for _ in range(2500):
            assert client.ack()["type"] == "crdt-update-ack"
        client.write("text", os.urandom(200_000).hex())
        client.write("last", 1)
    server.stop(signal.SIGKILL)
    with duckdb.connect(str(path.with_name("my.rooms.duckdb"))) as connection:
        (snapshot,) = connection.execute("SELECT size FROM rooms").fetchall()
        (log,) = connection.execute("SELECT sum(octet_length(data)) FROM log").fetchall()
    assert snapshot[0] > 200_000 > log[0]
    server = run()
    assert values_of(server)["n"] == 2499
    server.stop()


def test_pending_survives(run: Callable[..., ServerProcess]) -> None:
    server = run()
    other = LoroDoc()
    with server.connect() as wire:
        client = Client(wire, doc=other)
        client.join()
        first = client.change("a", 1)
        client.send_framed(client.change("b", 2))
        assert client.ack()["status"] == "pending"
        # What waits goes with the snapshot.
        third = Client(wire)
        for number in range(3):
            client.send(third.change("filler", [number, os.urandom(150_000).hex()]))
            assert client.ack()["type"] == "crdt-update-ack"
    server.stop(signal.SIGKILL)
    server = run()
    with server.connect() as wire:
        client = Client(wire)
        client.join()
        assert "b" not in client.values
        client.send_framed(first)
        assert client.ack()["status"] == "applied"
    server.stop(signal.SIGKILL)
    values = values_of(run())
    assert (values["a"], values["b"]) == (1, 2)


def test_many_rooms_and_connections(run: Callable[..., ServerProcess]) -> None:
    server = run()
    acked: dict[str, int] = {}

    def edit(name: str) -> None:
        with server.connect() as wire:
            client = Client(wire, name)
            client.join()
            try:
                for number in range(10_000):
                    client.write("n", number)
                    acked[name] = number
            except Exception:
                return

    threads = [threading.Thread(target=edit, args=(f"room {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    while min(acked.get(f"room {n}", 0) for n in range(4)) < 30:
        time.sleep(0.01)
    server.stop(signal.SIGKILL)
    for thread in threads:
        thread.join()
    server = run()
    for name, number in acked.items():
        assert values_of(server, name)["n"] >= number


def test_a_torn_tail(run: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = run()
    with server.connect() as wire:
        client = Client(wire)
        client.join()
        for number in range(20):
            client.write(str(number), number)
    server.stop(signal.SIGKILL)
    rooms, wal = tmp_path / "my.rooms.duckdb", tmp_path / "my.rooms.duckdb.wal"
    whole = wal.read_bytes()
    rng = random.Random(3)
    tails = [whole[: rng.randrange(len(whole) * 3 // 4, len(whole))] for _ in range(2)]
    tails += [whole + bytes(500), whole + rng.randbytes(500)]
    for tail in tails:
        torn = tmp_path / "torn"
        torn.mkdir()
        shutil.copy(rooms, torn / "my.rooms.duckdb")
        (torn / "my.rooms.duckdb.wal").write_bytes(tail)
        store = RoomStore(str(torn / "my.rooms.duckdb"))
        stored = store.load("r")
        store.close(time.monotonic() + 5)
        doc = LoroDoc()
        doc.import_batch([bytes(update) for _, update in stored.updates])
        kept = doc.get_deep_value()["m"]
        assert kept == {str(n): n for n in range(len(kept))}
        assert len(kept) >= (20 if len(tail) >= len(whole) else 10)
        zeros = tail[len(whole) :] == bytes(500) and duckdb.__version__ < "2"
        assert (torn / "my.rooms.duckdb.wal.damaged").exists() == zeros
        shutil.rmtree(torn)


def damage(path: Path, *statements: str) -> None:
    with duckdb.connect(str(path.with_name("my.rooms.duckdb"))) as connection:
        for statement in statements:
            connection.execute(statement)


def filled(run: Callable[..., ServerProcess], *rooms: str) -> None:
    server = run()
    for room in rooms:
        with server.connect() as wire:
            client = Client(wire, room)
            client.join()
            client.write("a", 1)
            client.write("b", 2)
    server.stop()


def test_a_snapshot_that_cannot_be_read(run: Callable[..., ServerProcess], path: Path) -> None:
    filled(run, "good", "bad")
    doc = LoroDoc()
    doc.get_map("m").insert("a", 1)
    doc.commit()
    snapshot = bytearray(doc.export(ExportMode.Snapshot()))
    snapshot[40:60] = bytes(20)
    damage(
        path,
        "UPDATE rooms SET generation = 77, size = (SELECT size FROM rooms LIMIT 1) "
        "WHERE room_id = 'bad'",
        f"INSERT INTO parts VALUES ('bad', 77, 0, '{_blob(bytes(snapshot))}'::BLOB)",
        f"UPDATE rooms SET size = {len(snapshot)} WHERE room_id = 'bad'",
    )
    server = run()
    for _ in range(2):
        with server.connect() as wire:
            error = wire.request(type="crdt-join", roomId="bad")
            assert (error["type"], error["code"], error["roomId"]) == ("error", "internal", "bad")
            assert "'bad'" in error["error"]
            assert "kept aside" in error["error"]
    assert values_of(server, "good") == {"a": 1, "b": 2}
    server.stop()
    assert "'bad'" in server.errors
    # It stays so until somebody decides; nothing was lost.
    server = run()
    with server.connect() as wire:
        assert wire.request(type="crdt-join", roomId="bad")["code"] == "internal"
    server.stop()
    damage(
        path,
        "DELETE FROM quarantine WHERE room_id = 'bad'",
        "UPDATE rooms SET generation = 0, size = 0 WHERE room_id = 'bad'",
    )
    # The log is still there.
    assert values_of(run(), "bad") == {"a": 1, "b": 2}


def _blob(data: bytes) -> str:
    return "".join(f"\\x{byte:02X}" for byte in data)


def test_an_update_that_cannot_be_read(run: Callable[..., ServerProcess], path: Path) -> None:
    server = run()
    with server.connect() as wire:
        client = Client(wire)
        client.join()
        client.write("a", 1)
        client.write("b", 2)
    server.stop(signal.SIGKILL)
    damage(path, "INSERT INTO log VALUES (999, 'r', 0, 'loro garbage'::BLOB)")
    server = run()
    assert values_of(server) == {"a": 1, "b": 2}
    server.stop()
    with duckdb.connect(str(path.with_name("my.rooms.duckdb"))) as connection:
        rows = connection.execute("SELECT room_id, kind, seq, data FROM quarantine").fetchall()
    assert rows == [("r", "update", 999, b"loro garbage")]


def test_snapshots_of_the_published_server(run: Callable[..., ServerProcess], path: Path) -> None:
    doc = LoroDoc()
    doc.get_map("m").insert("old", 1)
    doc.commit()
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA __sqlrooms")
        connection.execute(
            "CREATE TABLE __sqlrooms.sync_rooms (room_id TEXT PRIMARY KEY, snapshot BLOB, "
            "updated_at TIMESTAMPTZ DEFAULT now())"
        )
        connection.execute(
            "INSERT INTO __sqlrooms.sync_rooms (room_id, snapshot) VALUES ('r', ?), ('e', ?)",
            [doc.export(ExportMode.Snapshot()), EMPTY],
        )
    # A first start that ended before all were taken over.
    store = RoomStore(str(path.with_name("my.rooms.duckdb")))
    assert store.is_new
    assert store.close(time.monotonic() + 5)
    server = run()
    assert values_of(server) == {"old": 1}
    with server.connect() as wire:
        client = Client(wire)
        client.join()
        client.write("old", 2)
    server.stop()
    # Once: what is in the meta tables does not come back.
    assert values_of(run()) == {"old": 2}


def test_sql_does_not_reach_rooms(launch: Callable[..., LocalServer], path: Path) -> None:
    server = launch(sync=True, db_path=str(path))
    rooms = path.with_name("my.rooms.duckdb")
    with server.connect() as wire, server.connect() as other:
        client = Client(other)
        client.join()
        client.write("a", 1)
        for statement in (
            f"ATTACH '{rooms}' AS x",
            f"ATTACH '{rooms}' AS x (READ_ONLY)",
            f"ATTACH '{path.parent}/./my.rooms.duckdb' AS x (READ_ONLY)",
            "COPY FROM DATABASE rooms TO main",
            "SELECT * FROM rooms.log",
            "DELETE FROM log",
        ):
            reply = wire.request(type="exec", sql=statement, queryId="q")
            assert reply["type"] == "error", statement
        wire.exec("DELETE FROM __sqlrooms.sync_rooms")
        wire.exec("DROP TABLE __sqlrooms.sync_rooms")
        names = wire.rows("SELECT DISTINCT database_name AS n FROM duckdb_databases()")
        assert {row["n"] for row in names} == {"my", "system", "temp"}
        # As the interface of SQLRooms does.
        wire.exec("INSERT INTO __sqlrooms.ui_state (key, payload_json) VALUES ('k', '{}')")
        wire.exec("UPDATE __sqlrooms.ui_state SET payload_json = '[1]' WHERE key = 'k'")
        rows = wire.rows("SELECT payload_json::VARCHAR AS p FROM __sqlrooms.ui_state")
        assert rows == [{"p": "[1]"}]
        client.write("b", 2)
    assert values_of(server) == {"a": 1, "b": 2}


def refused(**settings: Any) -> str:
    with pytest.raises(StartupError) as error:
        Server(Settings(port=0, sync=True, **settings)).start()
    (line,) = str(error.value).splitlines()
    return line


def test_files_that_are_not_ours(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.duckdb"
    with duckdb.connect(str(other)) as connection:
        connection.execute("CREATE TABLE t (a INTEGER)")
    assert "--rooms-db" in refused(db_path=str(path), rooms_db=str(other))
    text = tmp_path / "text.duckdb"
    text.write_text("no database at all" * 1000)
    assert "not a DuckDB database" in refused(db_path=str(path), rooms_db=str(text))
    assert text.read_text().startswith("no database")
    assert "open in this server" in refused(db_path=str(path), rooms_db=str(path))
    assert "--read-only" in refused(db_path=str(path), read_only=True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rooms")]


def test_without_loro() -> None:
    script = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'loro' else find(name, *a)\n"
        "from sqlrooms_server.cli import main; sys.exit(main(['--sync', '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 2
    assert "sqlrooms-server[sync]" in done.stderr


def test_where_rooms_are(launch: Callable[..., LocalServer], path: Path, tmp_path: Path) -> None:
    launch(sync=True, db_path=str(path), meta_db=str(tmp_path / "meta.db"))
    assert (tmp_path / "meta.rooms.db").exists()
    launch(sync=True, rooms_db=str(tmp_path / "chosen.duckdb"))
    assert (tmp_path / "chosen.duckdb").exists()


def test_a_store_that_is_cut_off_while_it_compacts(tmp_path: Path) -> None:
    name = str(tmp_path / "s.duckdb")
    store = RoomStore(name)
    done: list[Any] = []
    store.append("r", [b"one", b"two"], Line(), done.append)
    store.compact("r", b"x" * (3 << 20), b"p", [], 0, done.append)
    store.append("r", [b"three"], Line(), done.append)
    assert store.flush(DEADLINE)
    while len(done) < 3:
        time.sleep(0.001)
    stored = store.load("r")
    assert (len(stored.snapshot), stored.pending) == (3 << 20, b"p")
    assert [update for _, update in stored.updates] == [b"three"]
    assert done == [None] * 3
    # Parts of a snapshot that was never ended.
    store._writer.native.execute("INSERT INTO parts VALUES ('r', 99, 0, 'zz'::BLOB)")
    assert store.close(time.monotonic() + 5)
    store = RoomStore(name)
    assert store.load("r").snapshot == stored.snapshot
    assert store._writer._all("SELECT * FROM parts WHERE generation = 99") == []
    store.close(time.monotonic() + 5)


def test_what_fails_to_be_stored(launch: Callable[..., LocalServer]) -> None:
    """Nobody is told of an update that was not stored; the room goes on when that works again."""
    server = launch(sync=True)
    store: Any = server.server.main.room_store
    with server.connect() as a, server.connect() as b:
        one, two = Client(a), Client(b)
        one.join(), two.join()
        one.write("a", 1)
        two.await_value("a", 1)
        store._writer.native.execute("ALTER TABLE log RENAME TO gone")
        lost = one.change("b", 2)
        one.send(lost)
        error = one.ack()
        assert (error["type"], error["code"], error["roomId"]) == ("error", "internal", "r")
        store._writer.native.execute("ALTER TABLE gone RENAME TO log")
        one.send(lost)
        assert one.ack()["type"] == "crdt-update-ack"
        two.await_value("b", 2)
    assert values_of(server) == {"a": 1, "b": 2}


class Clock:
    """The time, as :mod:`sqlrooms_server.rooms.keeping` knows it."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def test_history_is_cut(
    launch: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(keeping, "_MAX_LOG_ROWS", 0)
    monkeypatch.setattr(keeping, "time", clock)
    server = launch(sync=True, room_history=100)
    with server.connect() as a, server.connect() as b, server.connect() as c:
        one, behind, part1 = Client(a), Client(b), Client(c)
        one.join_with_version("")

        def write(key: str, value: Any) -> None:
            one.send_framed(one.change(key, value))
            assert one.ack()["status"] == "applied"
            # Behind the snapshot that this has led to.
            one.join_with_version()

        write("a", 0)
        behind.doc.import_(updates_of(one.doc))
        for number in range(1, 5):
            # Each makes a snapshot; the history of those before is cut when it is old.
            clock.now += 50
            write("a", number)
        current = LoroDoc()
        current.import_(updates_of(one.doc))
        write("b", 1)
        behind.change("lost", 1)
        joined, header, _ = behind.join_with_version()
        assert joined["reset"] is True
        assert header["type"] == "crdt-snapshot"
        assert behind.values == one.values == {"a": 4, "b": 1}
        # One that is only a little behind goes on.
        little = Client(c, doc=current)
        joined, header, _ = little.join_with_version()
        assert "reset" not in joined
        assert header["type"] == "crdt-update"
        assert little.values == one.values
        # Edits on what is gone are refused with the reason.
        stranger = Client(c)
        little.send_framed(stranger.change("lost", 1), id=1)
        ack = little.ack()
        assert (ack["status"], ack["code"], ack["id"]) == ("rejected", "gone", 1)
        # An empty document of the first protocol gets all there is.
        part1.room = "r"
        with server.connect() as d:
            fresh = Client(d)
            fresh.join()
            assert fresh.values == one.values
            fresh.write("c", 1)
        one.await_value("c", 1)
        behind.await_value("c", 1)
        behind.send_framed(behind.change("d", 1))
        assert behind.ack()["status"] == "applied"
        one.await_value("d", 1)
    assert values_of(server) == {"a": 4, "b": 1, "c": 1, "d": 1}
