"""The command line: arguments to settings to a server that runs until a signal."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sqlrooms_server import __version__
from sqlrooms_server.configuration import Configuration, load
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings, environment_variable, fields, flag, parse

if TYPE_CHECKING:
    from sqlrooms_server.app import App
    from sqlrooms_server.server import Server

# The settings of what is read again when a signal asks for it.
_READ_AGAIN = ("tokens", "queries")

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Windows has none.
_SIGHUP: int | None = getattr(signal, "SIGHUP", None)
# That may wait to be looked at.
_MAX_SIGNALS = 64 << 10

_EPILOG = """\
"sqlrooms-server query SQL" asks a server that is running, "sqlrooms-server token new" makes a
token, "sqlrooms-server types" writes TypeScript types of named queries; each has a --help.

Every setting is also an environment variable (SQLROOMS_DB_PATH for --db-path) and a key of the
TOML file given with --config (db_path = "my.duckdb"). The command line wins over the environment,
and the environment over the file. What is a LIST has commas, or its option several times.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 2 when the server cannot start; else the process ends here.

    ``query``, ``token`` or ``types`` as the first argument is another command, of which this
    returns the exit status.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments[:1] not in (["query"], ["token"], ["types"]):
            _hide_token(arguments)
    if arguments[:1] == ["query"]:
        # Not at the top: either command starts without what only the other one needs.
        from sqlrooms_server import query_command

        return query_command.main(arguments[1:])
    if arguments[:1] == ["types"]:
        from sqlrooms_server import types_command

        return types_command.main(arguments[1:])
    if arguments[:1] == ["token"]:
        from sqlrooms_server import token_command

        return token_command.main(arguments[1:])
    try:
        configuration = _configuration(arguments)
        _forget_secrets()
        _serve(configuration)
    except StartupError as error:
        print(f"sqlrooms-server: {error}", file=sys.stderr)
        return 2


def _hide_token(arguments: Sequence[str]) -> None:
    """Begin again when a token is among ``arguments``: all users of the machine see those."""
    flag_name = flag("auth_token")
    rest, token = [], None
    waiting = iter(arguments)
    for argument in waiting:
        if argument == flag_name:
            token = next(waiting, None)
        elif argument.startswith(f"{flag_name}="):
            token = argument.partition("=")[2]
        else:
            rest.append(argument)
    # Windows would start another process, which nobody waits for.
    if token is not None and os.name == "posix":
        os.environ[environment_variable("auth_token")] = token
        interpreter = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
        os.execv(sys.executable, [*interpreter, *rest])


def _forget_secrets() -> None:
    """Keep secrets from the processes that this one starts."""
    for field in fields():
        if field.metadata["secret"]:
            os.environ.pop(environment_variable(field.name), None)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, made from the table of settings."""
    parser = argparse.ArgumentParser(
        prog="sqlrooms-server",
        description="A native DuckDB for browser apps, notebooks and teams, over one WebSocket.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sqlrooms-server {__version__}")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings.")
    for field in fields():
        parser.add_argument(flag(field.name), dest=field.name, **_argument(field))
    return parser


def _argument(field: dataclasses.Field[Any]) -> dict[str, Any]:
    shown = _default_text(field)
    text = field.metadata["help"] + (f" Default: {shown}." if shown else "")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if isinstance(field.default, bool):
        return {**options, "action": "store_true"}
    if isinstance(field.default, tuple):
        # Given twice it is one list: --plugin a.py --plugin b.py.
        return {**options, "action": "append", "metavar": "LIST"}
    metavar = "VALUE"
    if isinstance(field.default, int):
        metavar = "SIZE" if field.metadata["unit"] == "size" else "N"
    return {**options, "metavar": metavar}


def _default_text(field: dataclasses.Field[Any]) -> str:
    default: Any = field.default
    if isinstance(default, bool) or default in ("", ()):
        return ""
    return size_text(default) if field.metadata["unit"] == "size" else str(default)


def size_text(size: int) -> str:
    """``size`` bytes as settings have them."""
    if size % 2**20:
        return f"{size >> 10}KiB"
    return f"{size >> 20}MiB" if size else "0"


def _configuration(arguments: Sequence[str] | None) -> Configuration:
    given = vars(build_parser().parse_args(arguments))
    config = given.pop("config", None)
    by_name = {field.name: field for field in fields()}
    texts = {
        name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()
    }
    flags = {
        name: parse(by_name[name], value, flag(name)) if isinstance(value, str) else value
        for name, value in texts.items()
    }
    return load(flags, os.environ, config or os.environ.get(environment_variable("config")))


def _serve(configuration: Configuration) -> NoReturn:
    settings = configuration.settings
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    _raise_file_limit()
    # Of DuckDB 2.x: sql() streams Arrow, but may report an interrupt for a committed change.
    warnings.filterwarnings("ignore", "Arrow output on a DB-API result", UserWarning)
    # A thread that computes in Python would otherwise keep the loop waiting 5 ms at a time.
    sys.setswitchinterval(0.001)

    # Not at the top: --help needs neither DuckDB nor the native library, which may be missing.
    from sqlrooms_server.server import Server

    every = [vars(settings), *(app.settings for app in configuration.apps)]
    signals = _Signals(reloads=any(of.get(name) for of in every for name in _READ_AGAIN))
    server = Server(settings, apps=configuration.apps, options=configuration.options)
    port = server.start()
    signals.started()
    # What lives now lives as long as the process; the collector need not visit it again.
    gc.freeze()
    print(_welcome(settings, port, server), flush=True)
    while signals.asks_to_reload():
        server.reload()
    signals.last()
    ended = server.stop()
    if not ended:
        logging.getLogger(__name__).warning("A query could not be interrupted; left it behind.")
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that is left behind in DuckDB would keep, or on its way out abort, the process.
    os._exit(0)


def _raise_file_limit() -> None:
    """Allow as many connections as the system does: out of descriptors, the accept loop spins."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Signals:
    """SIGINT and SIGTERM: the first one stops the server, the second one the process.

    With ``reloads``, SIGHUP asks for another look at files, unless it tells that the terminal of
    the server is gone.

    The system may hand a signal to any thread, while Python handles it in the main one, which
    may sleep; so that is woken through a socket, which works from every thread.
    """

    def __init__(self, *, reloads: bool) -> None:
        self._receiver, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._has_started = False
        self._has_terminal = os.isatty(0)
        for number in _STOP_SIGNALS:
            signal.signal(number, self._received)
        if reloads and _SIGHUP is not None:
            signal.signal(_SIGHUP, lambda *_: None)

    def started(self) -> None:
        """From here on there is something to stop."""
        self._has_started = True

    def asks_to_reload(self) -> bool:
        """Wait for a signal; False when it is to stop. Those that came meanwhile are one."""
        if any(number != _SIGHUP for number in self._receiver.recv(_MAX_SIGNALS)):
            return False
        return os.isatty(0) or not self._has_terminal

    def last(self) -> None:
        """The next signal ends the process."""
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _received(self, number: int, _: object) -> None:
        if not self._has_started:
            os._exit(128 + number)


def _welcome(settings: Settings, port: int, server: Server) -> str:
    from sqlrooms_server.db import room_files
    from sqlrooms_server.db.library import DUCKDB_VERSION
    from sqlrooms_server.transport.addresses import is_loopback

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if host == "127.0.0.1":
        host = "localhost"

    def database(of: Settings) -> str:
        return of.db_path + (", read-only" if of.read_only else "")

    def access(app: App) -> str:
        if app.gate.needs_token:
            return "token required"
        if settings.unix_socket or is_loopback(settings.host):
            return "pages and programs of this machine"
        return "whoever can reach it"

    def plugins(of: App) -> str:
        return ", ".join(plugin.name for plugin in of.plugins.all if not plugin.on_loop)

    secure = "s" if settings.tls_cert else ""
    address, health = f"ws{secure}://{host}:{port}", f"http{secure}://{host}:{port}/readyz"
    if settings.unix_socket:
        path = os.path.abspath(settings.unix_socket)
        address, health = f"ws+unix://{path}", f"curl --unix-socket {path} http://localhost/readyz"
    lines = [
        f"sqlrooms-server {__version__}, DuckDB {DUCKDB_VERSION}",
        "",
        f"  address   {address}",
        f"  database  {database(settings)}",
    ]
    if settings.sync:
        where = room_files.place(settings.db_path, settings.meta_db, settings.rooms_db)
        lines.append(f"  rooms     {where}")
    lines.append(f"  access    {access(server.main)}")
    if plugins(server.main):
        lines.append(f"  plugins   {plugins(server.main)}")
    for app in server.apps.values():
        more = f"; {plugins(app)}" if plugins(app) else ""
        lines.append(
            f"  app       {address}{app.path}: {database(app.settings)}; {access(app)}{more}"
        )
    lines += [
        f"  health    {health}",
        "",
        "Press Ctrl+C to stop.",
    ]
    return "\n".join(lines)
