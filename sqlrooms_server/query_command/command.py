"""Arguments to a query to its output, and what the exit status says."""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from ssl import SSLContext

    import pyarrow as pa

    from sqlrooms_server.client import Client
    from sqlrooms_server.query_command.formats import Writer

OK, FAILED, USAGE, NO_CONNECTION, INTERRUPTED = 0, 1, 2, 3, 130

_FORMATS = ("table", "json", "csv", "arrow", "parquet")
_BINARY_FORMATS = ("arrow", "parquet")
# Results in these are told apart by an empty line.
_PARTED_FORMATS = ("table", "csv")
_DEFAULT_URL = "ws://localhost:4000"

_EPILOG = """\
formats:
  table    aligned, cut to the width of the terminal, at most 40 rows; the default in a terminal
  csv      with a line of names; NULL is empty, "" an empty string; the default otherwise
  json     an array with one object on each line
  arrow    an Arrow IPC stream
  parquet  a Parquet file

--live:
  the result, and another one whenever a change of its tables makes it another, until Ctrl+C or an
  error; a table has the time below it, csv an empty line between results, json one line for each,
  arrow one stream after the other; --timeout bounds each run

exit status:
  0 done, 1 the query failed, 2 wrong arguments, 3 no connection, 130 interrupted by Ctrl+C, which
  also cancels the query on the server

environment:
  SQLROOMS_URL, SQLROOMS_AUTH_TOKEN
"""


def main(arguments: Sequence[str]) -> int:
    """Run ``sqlrooms-server query`` and return the exit status."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever reads has enough. Python would complain of it once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _main(arguments: Sequence[str]) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    options.format = options.format or _default_format(options.output)
    if options.format in _BINARY_FORMATS and options.output is None and sys.stdout.isatty():
        parser.error(f"{options.format} is not for a terminal; use --output or a pipe")
    if options.live and (options.output is not None or options.format == "parquet"):
        parser.error("--live takes neither --output nor --format parquet")
    try:
        params = _parameters(options.param)
        token = _token(options.token_file)
        authority = _authority(options.ca_file)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sql = sys.stdin.read() if options.sql == "-" else options.sql
    url = options.url if "://" in options.url else f"ws://{options.url}"

    # Not at the top: --help and wrong arguments need neither pyarrow nor websockets.
    from ssl import SSLCertVerificationError

    try:
        from sqlrooms_server.client import ConnectionLost, RequestFailed, connect
    except ModuleNotFoundError as error:
        return _fail(f"{error}. Install it with: pip install 'sqlrooms-server[client]'", USAGE)
    try:
        db = connect(url, token=token, ssl=authority)
    except SSLCertVerificationError as error:
        hint = "--ca-file gives the authority that signed it."
        return _fail(f"Cannot trust {url}: {error.verify_message}. {hint}", NO_CONNECTION)
    except ValueError as error:
        parser.error(str(error))
    except RequestFailed as error:
        return _fail(_refused(url, error.code, str(error)), NO_CONNECTION)
    except OSError as error:
        hint = "Is the server running there? Give its address with --url or SQLROOMS_URL."
        return _fail(f"Cannot connect to {url}: {error}. {hint}", NO_CONNECTION)
    with db:
        try:
            (_follow if options.live else _query)(db, sql, params, options)
        except RequestFailed as error:
            return _fail(str(error), FAILED)
        except ConnectionLost as error:
            return _fail(str(error), NO_CONNECTION)
        except BrokenPipeError:
            raise
        except OSError as error:
            return _fail(str(error), FAILED)
    return OK


def build_parser() -> argparse.ArgumentParser:
    """The parser of the arguments after ``query``."""
    parser = argparse.ArgumentParser(
        prog="sqlrooms-server query",
        description="Run SQL on a server that is running, and print the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sql", metavar="SQL", help="The text, or - to read it from standard input.")
    parser.add_argument(
        "--url",
        default=os.environ.get("SQLROOMS_URL", _DEFAULT_URL),
        help=f"Address of the server. Default: SQLROOMS_URL, or {_DEFAULT_URL}.",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="File whose first line is the token. Default: the token in SQLROOMS_AUTH_TOKEN.",
    )
    parser.add_argument(
        "--ca-file",
        metavar="FILE",
        help="PEM file of the authority that signed the certificate of a wss:// server. Default: "
        "the authorities of this machine.",
    )
    parser.add_argument("--format", choices=_FORMATS, help="See below.")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="Write to FILE; .csv, .json, .arrow and .parquet choose the format too.",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Text for $NAME, which DuckDB converts. Numbers are for $1 and so on.",
    )
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="Seconds that the query may take."
    )
    parser.add_argument("--max-rows", type=_whole, metavar="N", help="Fetch at most N rows.")
    parser.add_argument(
        "--live", action="store_true", help="Print the result again whenever it changes."
    )
    parser.add_argument("--no-progress", action="store_true", help="Show no progress bar.")
    return parser


def _query(db: Client, sql: str, params: Any, options: argparse.Namespace) -> None:
    from sqlrooms_server.client.bar import Reporter, TerminalBar

    began = time.monotonic()
    is_shown = not options.no_progress and sys.stderr.isatty()
    bar = TerminalBar(sys.stderr) if is_shown else Reporter()
    try:
        result = db.query(
            sql,
            params,
            timeout=options.timeout,
            max_rows=options.max_rows,
            progress=bar.show if is_shown else None,
        )
        # Opened now, so that a query that fails leaves the old file as it was.
        with result, _opened(options.output) as out:
            writer = _writer(options, result.schema, out, lambda: _took(began))
            for batch in result:
                if out.isatty():
                    bar.clear()
                writer.write(batch)
            bar.clear()
            writer.end(result.truncated)
            out.flush()
    finally:
        bar.clear()


def _follow(db: Client, sql: str, params: Any, options: argparse.Namespace) -> None:
    out = sys.stdout.buffer
    with db.live(sql, params, timeout=options.timeout, max_rows=options.max_rows) as results:
        for number, result in enumerate(results):
            if number and options.format in _PARTED_FORMATS:
                out.write(b"\n")
            writer = _writer(options, result.schema, out, lambda: time.strftime("%H:%M:%S"))
            for batch in result:
                writer.write(batch)
            writer.end(result.truncated)
            out.flush()


def _took(began: float) -> str:
    return f"{1000 * (time.monotonic() - began):,.0f} ms"


def _writer(
    options: argparse.Namespace, schema: pa.Schema, out: BinaryIO, note: Callable[[], str]
) -> Writer:
    from sqlrooms_server.query_command import formats

    if options.format == "table":
        is_terminal = options.output is None and sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else None
        is_styled = is_terminal and not os.environ.get("NO_COLOR")
        return formats.TableWriter(schema, out, width, is_styled, note)
    if options.format == "json":
        return formats.JsonWriter(schema, out, is_one_line=options.live)
    writers: dict[str, Callable[[pa.Schema, BinaryIO], Writer]] = {
        "csv": formats.CsvWriter,
        "arrow": formats.ArrowWriter,
        "parquet": formats.ParquetWriter,
    }
    return writers[options.format](schema, out)


@contextmanager
def _opened(path: str | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        return
    with open(path, "wb") as out:
        try:
            yield out
        except BaseException:
            # Half a result must not be taken for a whole one. A device or pipe stays.
            if stat.S_ISREG(os.fstat(out.fileno()).st_mode):
                os.unlink(path)
            raise


def _default_format(output: str | None) -> str:
    if output is not None:
        ending = os.path.splitext(output)[1].removeprefix(".")
        return ending if ending in _FORMATS else "csv"
    return "table" if sys.stdout.isatty() else "csv"


def _parameters(given: Sequence[str]) -> Sequence[str] | Mapping[str, str] | None:
    params: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--param {pair} must be NAME=VALUE")
        params[name.removeprefix("$")] = value
    if not params:
        return None
    if not any(name.isdecimal() for name in params):
        return params
    numbers = [str(number) for number in range(1, len(params) + 1)]
    if set(numbers) != set(params):
        raise ValueError("--param must be names, or numbers from 1 without a gap")
    return [params[number] for number in numbers]


def _token(path: str | None) -> str | None:
    if path is None:
        return os.environ.get("SQLROOMS_AUTH_TOKEN") or None
    with open(path, encoding="utf-8") as file:
        return file.readline().strip()


def _authority(path: str | None) -> SSLContext | None:
    if path is None:
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        reason = "it has no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise ValueError(f"cannot use --ca-file {path}: {reason}") from error


def _refused(url: str, code: str, text: str) -> str:
    if code == "unauthorized":
        return (
            f"The server at {url} wants a valid token: set SQLROOMS_AUTH_TOKEN or use --token-file."
        )
    return f"Cannot connect to {url}: {text}"


def _fail(text: str, status: int) -> int:
    print(f"sqlrooms-server query: {text}", file=sys.stderr)
    return status


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)
