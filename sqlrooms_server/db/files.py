"""Opening database files and extensions, and saying in one line why that failed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import duckdb

from sqlrooms_server.db.statements import quote_identifier, quote_literal
from sqlrooms_server.errors import StartupError

MEMORY = ":memory:"

_LOCK_HOLDER = re.compile(r"Conflicting lock is held in (.*?\(PID \d+\))")


def open_database(
    path: str, *, read_only: bool, config: Mapping[str, str]
) -> duckdb.DuckDBPyConnection:
    """The connection to ``path``. Raises ``StartupError`` naming the file and the way out."""
    if path == MEMORY:
        if read_only:
            raise StartupError("--read-only needs a database file; give one with --db-path.")
    else:
        prepare(Path(path), read_only=read_only)
    with explained(path):
        return duckdb.connect(path, read_only=read_only, config=dict(config))


def prepare(path: Path, *, read_only: bool) -> None:
    """Make ``path`` a file that DuckDB opens: create its directory, drop it when it is empty."""
    if path.is_dir():
        raise StartupError(f"{path} is a directory; name a file in it.")
    if read_only:
        if not path.exists():
            raise StartupError(
                f"The database {path} does not exist; start once without --read-only to create it."
            )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # DuckDB refuses a file of zero bytes, which is what tempfile and touch make.
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise StartupError(
            f"Cannot create {path}: {error.strerror}; choose a place that can be written."
        ) from error
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise StartupError(
            f"Cannot create {path}: its directory cannot be written; choose another one."
        )


def limit(connection: duckdb.DuckDBPyConnection, name: str, value: str) -> None:
    """Set a limit of DuckDB for the whole database. Raises ``StartupError``."""
    try:
        connection.execute(f"SET GLOBAL {name} = {quote_literal(value)}")
    except duckdb.Error as error:
        flag = "--" + name.replace("_", "-")
        raise StartupError(f"{flag} {value!r} was refused: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn what DuckDB says of a file into a ``StartupError`` of one line."""
    try:
        yield
    except duckdb.Error as error:
        raise StartupError(_explanation(path, str(error))) from error


def _explanation(path: str, text: str) -> str:
    holder = _LOCK_HOLDER.search(text)
    if holder:
        return (
            f"The database {path} is in use by another process, {holder[1]}; "
            "stop that process or choose another file."
        )
    if "already attached" in text or "Unique file handle" in text or "different config" in text:
        return f"The database {path} is open in this server already; choose another file."
    if "version number" in text:
        return (
            f"The database {path} was written by another version of DuckDB than "
            f"{duckdb.__version__}, which cannot read it; install the newer one."
        )
    if "not a valid DuckDB database" in text:
        return f"{path} is not a DuckDB database; choose another file. It was left as it is."
    first_line = text.splitlines()[0]
    return f"Cannot open the database {path}: {first_line}"


def load_extension(connection: duckdb.DuckDBPyConnection, wanted: str) -> None:
    """Load ``name``, ``name@repository`` or the absolute path of an extension file.

    Fetches it only when it is not installed yet. Raises ``StartupError`` naming it.
    """
    if "/" in wanted or wanted.endswith(".duckdb_extension"):
        _load(connection, f"LOAD {quote_literal(wanted)}", wanted)
        return
    name, _, repository = wanted.partition("@")
    if not re.fullmatch(r"\w+", name) or not re.fullmatch(r"[\w.:-]*", repository):
        raise StartupError(
            f"--extensions: {wanted!r} is not name, name@repository or the path of a file."
        )
    load = f"LOAD {quote_identifier(name)}"
    try:
        connection.execute(load)
    except duckdb.Error:
        source = f" FROM {quote_identifier(repository)}" if repository else ""
        _load(connection, f"INSTALL {quote_identifier(name)}{source}", wanted)
        _load(connection, load, wanted)


def _load(connection: duckdb.DuckDBPyConnection, statement: str, wanted: str) -> None:
    try:
        connection.execute(statement)
    except duckdb.Error as error:
        raise StartupError(
            f"--extensions: {wanted} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
