"""``sqlrooms-server types``: writes TypeScript types of named queries."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sqlrooms_server.builtin.query_files import Found, read_queries
from sqlrooms_server.builtin.typescript import typescript
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings

_CLOSE_SECONDS = 5.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 when all is well, 1 when a query or the file is not right, 2 for other
    mistakes."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except StartupError as error:
        print(f"sqlrooms-server: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sqlrooms-server types",
        description="Writes TypeScript types of named queries: of their parameters, and of their "
        "rows as JSON results have them. Their columns are asked of the database.",
        allow_abbrev=False,
    )
    parser.add_argument("--queries", metavar="DIR", required=True, help="directory of the queries")
    parser.add_argument("--db-path", metavar="FILE", default=":memory:", help="DuckDB database")
    parser.add_argument(
        "--extensions", metavar="LIST", default="", help="extensions of DuckDB that they need"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="file instead of the terminal")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 when FILE is not what it should be"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.check and options.output is None:
        raise StartupError("--check needs --output: the file to compare with.")
    found = _read(options.queries, options.db_path, options.extensions)
    lines = [*found.bad.values(), *found.warnings.values()]
    for line in lines:
        print(f"sqlrooms-server: {line}", file=sys.stderr)
    if lines:
        return 1
    text = typescript(found.queries)
    path: Path | None = options.output
    if path is None:
        sys.stdout.write(text)
        return 0
    if _is_already(path, text):
        return 0
    if options.check:
        print(
            f"sqlrooms-server: {path} is not what the queries say; write it again without --check.",
            file=sys.stderr,
        )
        return 1
    _write(path, text)
    return 0


def _read(directory: str, db_path: str, extensions: str) -> Found:
    names = tuple(part.strip() for part in extensions.split(",") if part.strip())
    if db_path != ":memory:" and not Path(db_path).exists():
        raise StartupError(f"--db-path: there is no database {db_path}.")
    # Nothing is changed, so that a database which others only read can be asked, too.
    engine = Engine(db_path, read_only=db_path != ":memory:", extensions=names)
    try:
        return read_queries(directory, engine, Settings().max_sql_length)
    finally:
        engine.close(time.monotonic() + _CLOSE_SECONDS)


def _is_already(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    """Replace ``path``, whole or not at all."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(text.encode())
            # Unlike temporary files, sources are for everybody who may read their directory.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise StartupError(f"Cannot write {path}: {error.strerror}.") from error
