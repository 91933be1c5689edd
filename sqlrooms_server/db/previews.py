"""The first rows of files, read by a DuckDB of its own.

That of the clients may be locked, and must not read files for them. This one never sees SQL of
theirs, nor the name of a file: it is given an open descriptor.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa

from sqlrooms_server.db import values
from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.columns import unique_names
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.json_rows import RowEncoder
from sqlrooms_server.errors import BadRequest, Gone

# Beside that of the clients, which has four fifths of the machine's. Nothing is remembered of a
# file: the next one that has the same descriptor is another one.
_LIMITS = {"memory_limit": "512MB", "threads": "2", "enable_external_file_cache": "false"}

_PARQUET, _CSV, _JSON = "read_parquet", "read_csv", "read_json"
_READERS = {
    ".parquet": _PARQUET,
    ".csv": _CSV,
    ".tsv": _CSV,
    ".json": _JSON,
    ".jsonl": _JSON,
    ".ndjson": _JSON,
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Previews:
    """Opened with the first file. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._is_closed = False

    def table(
        self,
        descriptor: int,
        name: str,
        limit: int,
        offset: int,
        interrupting: Callable[[Cursor], AbstractContextManager[Any]],
    ) -> pa.Table:
        """Rows of the open file ``descriptor``, whose ``name`` tells what it is.

        ``interrupting`` is entered while a cursor runs. Raises ``BadRequest`` for another kind of
        file, and ``QueryError`` for one that is broken.
        """
        with self._open().cursor() as cursor, interrupting(cursor):
            return values.table_of(self._run(cursor, descriptor, name, limit, offset))

    def json(
        self,
        descriptor: int,
        name: str,
        limit: int,
        offset: int,
        interrupting: Callable[[Cursor], AbstractContextManager[Any]],
    ) -> tuple[list[dict[str, str]], bytes]:
        """The columns of the file, and the rows as a JSON array, in the forms of the protocol."""
        with self._open().cursor() as cursor, interrupting(cursor):
            result = self._run(cursor, descriptor, name, limit, offset, ("json",))
            types = [column.type for column in result.columns]
            names = unique_names(result.columns)
            encoder = RowEncoder(names, types)
            rows = b",".join(encoder.encode(batch) for batch in result.batches if batch.num_rows)
            described = [
                {"name": name, "type": str(type_)} for name, type_ in zip(names, types, strict=True)
            ]
            return described, b"[" + rows + b"]"

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close(time.monotonic() + 1)

    def _run(
        self,
        cursor: Cursor,
        descriptor: int,
        name: str,
        limit: int,
        offset: int,
        formats: tuple[str, ...] = ("arrow",),
    ) -> Result:
        function, options = _reader(name)
        folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
        result = cursor.run(
            f"SELECT * FROM {function}(?{options}) LIMIT ? OFFSET ?",
            [f"{folder}/{descriptor}", limit, offset],
            formats,
        )
        assert result is not None
        return result

    def _open(self) -> Engine:
        with self._lock:
            if self._is_closed:
                raise Gone("The server is shutting down.")
            if self._engine is None:
                self._engine = Engine(":memory:", read_only=False, extensions=(), limits=_LIMITS)
            return self._engine


def _reader(name: str) -> tuple[str, str]:
    """What reads the file ``name``, and how it is told of a compression."""
    plain, compression = name.lower(), ""
    for end, kind in _COMPRESSIONS.items():
        if plain.endswith(end):
            plain, compression = plain.removesuffix(end), f", compression = '{kind}'"
    for end, function in _READERS.items():
        if plain.endswith(end) and not (function == _PARQUET and compression):
            return function, compression
    known = ", ".join(_READERS)
    raise BadRequest(
        f"There is no preview of {name!r}, only of {known}, and of text with .gz or .zst."
    )
