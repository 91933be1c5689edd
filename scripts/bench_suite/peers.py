"""The servers that are measured: how each is started, and how a question is put to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import bare_process, quack, quack_process
from .answers import Query
from .bare_client import BareConnection
from .http_client import HttpConnection, Mosaic, Roapi
from .websocket import Connection, Conversation


@dataclass(frozen=True)
class Peer:
    """One kind of server.

    `command` takes its environment, the port, the Parquet files of the tables it shall have, and
    options; a server that `executes` is told to load the tables when it runs. It runs when it
    answers the path in `healthy` with these bytes, or takes connections if that is None. `module`
    is what its process imports first, where that is Python. Where answers are not Arrow, `checks`
    and `times` ask with a client of its own, and raise `WrongAnswer`.
    """

    command: Callable[[Path, int, Sequence[Path], Sequence[str]], list[str | Path]]
    healthy: tuple[str, bytes] | None
    connect: Callable[[int], Conversation]
    module: str = ""
    executes: bool = True
    multiplexes: bool = False
    speaks_duckdb: bool = True
    checks: Callable[[Path, int, Query], None] | None = None
    times: Callable[[Path, int, Query], dict[str, float]] | None = None


def _sqlrooms(
    environment: Path, port: int, tables: Sequence[Path], options: Sequence[str]
) -> list[str | Path]:
    return [environment / "bin" / "sqlrooms-server", "--port", str(port), *options]


def _mosaic(
    environment: Path, port: int, tables: Sequence[Path], options: Sequence[str]
) -> list[str | Path]:
    return [environment / "bin" / "duckdb-server", "--port", str(port)]


def _quack(
    environment: Path, port: int, tables: Sequence[Path], options: Sequence[str]
) -> list[str | Path]:
    return [environment / "bin" / "python", quack_process.__file__, "serve", str(port), *tables]


def _bare(
    environment: Path, port: int, tables: Sequence[Path], options: Sequence[str]
) -> list[str | Path]:
    return [environment / "bin" / "python", bare_process.__file__, str(port), *tables]


def _roapi(
    environment: Path, port: int, tables: Sequence[Path], options: Sequence[str]
) -> list[str | Path]:
    command: list[str | Path] = [environment / "bin" / "roapi", "-a", f"127.0.0.1:{port}"]
    command += ["-p", "127.0.0.1:0", "--addr-flight-sql", "127.0.0.1:0"]
    for table in tables or [environment.parent / "data" / "one.parquet"]:
        command += ["-t", f"{table.stem}={table}"]
    return command


SQLROOMS = Peer(_sqlrooms, ("/healthz", b"ok"), Connection, "sqlrooms_server", multiplexes=True)

PEERS = {
    "published": SQLROOMS,
    "ours": SQLROOMS,
    "mosaic": Peer(
        # It has no page of its own for this; what it says to a question it does not know will do.
        _mosaic,
        ("/", b""),
        lambda port: HttpConnection(port, Mosaic()),
        "pkg.app",
    ),
    "quack": Peer(
        _quack,
        ("/", b"Quack"),
        quack.connect,
        executes=False,
        checks=quack.check,
        times=quack.timed,
    ),
    "roapi": Peer(
        _roapi,
        ("/health", b"OK"),
        lambda port: HttpConnection(port, Roapi()),
        executes=False,
        speaks_duckdb=False,
    ),
    "bare": Peer(_bare, None, BareConnection, executes=False),
}
