"""What tells that a database file is still the one a server closed."""

from __future__ import annotations

import hashlib
import os
from typing import Any

# DuckDB's main header and its two alternating headers: one changes with every checkpoint.
_HEADER_BYTES = 12288


def fingerprint(db_path: str, environment: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON object that is equal only for the same state of the same file, or None for no file.

    ``environment`` is whatever else results depend on. A write-ahead log means that the file was
    not closed cleanly, and what it will hold cannot be told: None. Call it while no DuckDB has the
    file open for writing.
    """
    try:
        if db_path == ":memory:" or os.path.lexists(db_path + ".wal"):
            return None
        with open(db_path, "rb") as file:
            header = file.read(_HEADER_BYTES)
            status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns,
        "header": hashlib.sha256(header).hexdigest(),
        "environment": environment,
    }
