"""The meta tables: the state of SQLRooms user interfaces, and snapshots of shared rooms.

Their layout is shared with the published server, whose files open here and keep their data.
"""

from __future__ import annotations

from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.statements import quote_identifier
from sqlrooms_server.errors import QueryError, StartupError

# What clients use, and what may still hold rooms, which have permissions of their own.
_STATE = "ui_state"
_ROOMS = "sync_rooms"

_TABLES = (
    f"{_STATE} (key TEXT PRIMARY KEY, payload_json JSON, updated_at TIMESTAMPTZ DEFAULT now())",
    f"{_ROOMS} (room_id TEXT PRIMARY KEY, snapshot BLOB, updated_at TIMESTAMPTZ DEFAULT now())",
)


def create_meta_tables(engine: Engine, namespace: str, meta_db: str) -> None:
    """Create what is missing under ``namespace``: a schema, or with ``meta_db`` an attached file.

    A database that is open for reading only is left as it is. Raises ``StartupError``.
    """
    if meta_db:
        engine.attach(meta_db, namespace)
    engine.reach.protect(namespace, is_catalog=bool(meta_db), closed=_ROOMS, kept=[_STATE])
    if engine.read_only:
        return
    quoted = quote_identifier(namespace)
    try:
        with engine.cursor() as cursor:
            if not meta_db:
                cursor.native.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted}")
            for table in _TABLES:
                cursor.native.execute(f"CREATE TABLE IF NOT EXISTS {quoted}.{table}")
    except QueryError as error:
        raise StartupError(
            f"Cannot create the meta tables in {namespace}: {error}; "
            "choose another --meta-namespace."
        ) from error
