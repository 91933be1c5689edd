"""Opening the file of the rooms, and where it is."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb

from sqlrooms_server.db import files
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.statements import quote_identifier
from sqlrooms_server.errors import QueryError, StartupError

log = logging.getLogger(__name__)

_FORMAT = "sqlrooms rooms 1"

# Rows that were committed and are not in the file yet stay in memory, up to the threshold.
_CONFIG = {
    "threads": "1",
    "memory_limit": "512MB",
    "checkpoint_threshold": "64MB",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "enable_external_access": "true",
}

# No keys: one thread writes, and an index would cost more than it saves.
_TABLES = (
    "about (format VARCHAR)",
    "rooms (room_id VARCHAR, updated_ms BIGINT, generation BIGINT, size BIGINT, pending BLOB, "
    "marks VARCHAR)",
    "parts (room_id VARCHAR, generation BIGINT, part INTEGER, data BLOB)",
    "log (seq BIGINT, room_id VARCHAR, at_ms BIGINT, data BLOB)",
    "quarantine (room_id VARCHAR, at_ms BIGINT, kind VARCHAR, reason VARCHAR, seq BIGINT, "
    "data BLOB)",
)


def place(db_path: str, meta_db: str, rooms_db: str, app: str = "") -> str:
    """Where the rooms of ``app`` are: where they were wanted, or beside the database."""
    if rooms_db:
        return rooms_db
    main = meta_db or db_path
    if main == files.MEMORY:
        return main
    path = Path(main)
    # Those of an app apart, since several may have one database, and none the rooms of another.
    stem = f"{path.stem}.{app}" if app else path.stem
    return str(path.with_name(f"{stem}.rooms{path.suffix or '.duckdb'}"))


def open_store(path: str) -> tuple[duckdb.DuckDBPyConnection, bool]:
    """The connection, and whether the file is new. Raises ``StartupError``."""
    try:
        connection = files.open_database(path, read_only=False, config=_CONFIG)
    except StartupError as error:
        if not _cut_tail(path, str(error)):
            raise
        connection = files.open_database(path, read_only=False, config=_CONFIG)
    try:
        with files.explained(path):
            is_new = _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection, is_new


_TORN = re.compile(r"Corrupt WAL file: entry at byte position (\d+)")


def _cut_tail(path: str, failure: str) -> bool:
    """Cut the log of DuckDB where it cannot be read on; False when that is not what failed.

    After a loss of power its end may be anything. What was acked stands before it.
    """
    torn = _TORN.search(failure)
    if torn is None:
        return False
    wal = Path(path + ".wal")
    kept = wal.with_name(wal.name + ".damaged")
    try:
        shutil.copy2(wal, kept)
        with wal.open("r+b") as file:
            # It stands behind the head of the entry: its length and its checksum.
            file.truncate(max(0, int(torn[1]) - 16))
    except OSError as error:
        raise StartupError(f"Cannot repair {wal}: {error.strerror}.") from error
    log.error("The end of %s was damaged and is left out; a copy is in %s.", wal, kept)
    return True


def _prepare(connection: duckdb.DuckDBPyConnection, path: str) -> bool:
    tables = {
        name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
    }
    if not tables:
        connection.execute("BEGIN")
        for table in _TABLES:
            connection.execute(f"CREATE TABLE {table}")
        connection.execute("COMMIT")
        return True
    found = []
    if "about" in tables:
        found = connection.execute("SELECT * FROM about").fetchall()
        if not found and tables == {table.split()[0] for table in _TABLES}:
            # It ended before :func:`complete`.
            _drop_unfinished(connection)
            return True
    if not found or not str(found[0][0]).startswith("sqlrooms rooms"):
        raise StartupError(
            f"{path} is a DuckDB database, but none of rooms; choose another --rooms-db."
        )
    if found[0][0] != _FORMAT:
        raise StartupError(f"The rooms in {path} were written by a newer server; install that.")
    _drop_unfinished(connection)
    return False


def _drop_unfinished(connection: duckdb.DuckDBPyConnection) -> None:
    """Remove the parts of snapshots that were never ended, whose numbers will come again."""
    connection.execute(
        "DELETE FROM parts WHERE (room_id, generation) NOT IN "
        "(SELECT (room_id, generation) FROM rooms)"
    )


def complete(connection: duckdb.DuckDBPyConnection) -> None:
    """What a new file begins with is in it."""
    connection.execute("INSERT INTO about VALUES (?)", [_FORMAT])


def published_rooms(engine: Engine, namespace: str) -> Iterator[tuple[str, bytes]]:
    """The snapshots that the published server has left in the meta tables."""
    quoted = quote_identifier(namespace)
    try:
        with engine.cursor() as cursor:
            names = cursor.native.execute(
                f"SELECT room_id FROM {quoted}.sync_rooms WHERE snapshot IS NOT NULL"
            ).fetchall()
            for (name,) in names:
                row = cursor.native.execute(
                    f"SELECT snapshot FROM {quoted}.sync_rooms WHERE room_id = ?", [name]
                ).fetchone()
                if row is not None:
                    yield name, row[0]
    except QueryError as error:
        raise StartupError(f"Cannot read the rooms in {namespace}.sync_rooms: {error}") from error
