"""Compares this server with others one might use instead, and with the engine alone.

How to repeat it, on Linux, from a checkout::

    scripts/bench                       # both DuckDB series, about 40 minutes
    scripts/bench --quick               # DuckDB 1.5, fewer and shorter, under 2 minutes
    scripts/bench --duckdb 1.5 --only large --json large.json
    scripts/bench --json all.json --page docs/benchmarks.md

`scripts/bench` makes the virtual environments and tables below `.bench/`; the first time this takes
some minutes. The others are the published `sqlrooms-server`, Mosaic's `duckdb-server`, DuckDB's
own Quack and `roapi`; docs/benchmarks.md says how each is asked. All get the same DuckDB and
pyarrow, as far as they use them. The published server declares DuckDB 1.5 only and is given
2.x all the same; should one fail, the table says so.

The workloads, by the names that `--only` takes:

one     `select 1` as Arrow on one connection, asked again when the answer is there.
parts   where the time of one answer goes: on its way, on the loop, to a worker, DuckDB, and back.
many    the same on 8 connections with 4 questions open on each.
clients `select 1`, one at a time on each of 1 to 512 connections.
mixed   a million rows of a stored table with eight columns of seven types.
tpch    three queries of TPC-H at scale factor 1, each asked by 16 clients one at a time.
large   30 million rows, 480 MB: the time until the first byte of the data message and until the
        first rows, the throughput, and how far the server's resident memory rose above what it
        was before the question.
rows    two columns of integers, 1,000 rows to 60 million: how throughput and time grow.
chunked the same 30 million rows in chunks with a window of 16 MiB, beside one message on the same
        server; and how soon the Python client has the first rows, as a part of the time of all.
streams 50 chunked results at once on one connection, 200,000 rows each, every one decoded;
        and how long it takes to cancel one of 11 that send 30 million rows each.
upload  1 GB of integers, doubles and texts in chunks into a table in memory; in-process, DuckDB
        creates the table from the same Arrow stream.
cached  `select 1` from the cache as in `many`, beside running it; and an aggregate of 500,000 rows,
        12 MB, run and read from the cache on disk.
burst   a slow aggregate asked 1,000 times at once on 20 connections with the cache; it must run
        once, and is compared with one alone.
watch   a table that 1,000 connections watch changes: when they are told after the change was
        asked for, median and last of them.
live    200 connections follow one live query of which a run takes long, and what it reads
        changes: when the last one has the new result, and the server's CPU time for a change
        beside that with one subscriber.
fanout  a message to 1,000 connections that subscribe to its channel, the next one when all have it:
        deliveries a second, and when each arrived; and in bursts of eight messages. Beside it, as
        in-process, a program that does nothing but hand each message to each socket.
stalled 10,000 messages to 100 subscribers, of which 10 do not read until the others have all; the
        messages a second that those get. Nobody may miss one or get one twice.
subscribed  what each of 2,000 subscribed connections costs in memory, and the CPU time of all
        while nothing is said.
rooms   edits a second that ten members of a room of a database file have acknowledged, each with
        up to 16 under way, with one, and with 256, of which this server then acks several at once;
        and what comes over the wire, and how long it takes, when a member comes back to a document
        of 5 MB of which it lacks ten edits. Every member must end with the same document. Only
        this server has stored what it acks.
plugins `select 1` one at a time on servers without a plugin, with one whose prepare_cursor,
        around_query and query_done do nothing, and with one whose authorize does nothing, which
        take turns of 0.1 s; and the p99 of it while somebody else keeps calling handlers of a
        plugin that sleep 1 s, beside the p99 while nobody does.
idle    CPU time of a server with one connected client that says nothing, as % of one core.
start   a server from nothing to its first answer; what importing it takes, and its memory then.
memory  what each of 500 clients that have asked once costs in memory, and each of 8 clients that
        receive 160 MB at once.
soak    not unless asked for with --only: ten minutes of small, cached, large and abandoned queries,
        watchers and channels at once. Nothing may fail; it says how much later answers take than
        those of the first minute, how memory grows, and how many more descriptors and threads
        there are at the end than before. The cache has a connection of two or three descriptors
        for each thread that has used it.

A whole run and --quick also count what an answer costs in calls of Python and switches of context,
which a busy machine tells as well as an idle one. Too many are a failure.

In-process is the same DuckDB called from Python without any server: for `one` a new cursor and
the joined bytes of the Arrow stream per query, for the others a reader whose serialized batches
are counted and dropped. Bare is a process of one thread that sends them over a socket, and does
nothing else. MB are 10^6 bytes of Arrow stream.

Each repetition has a fresh process, warmed up before the clock starts, and the subjects take
turns in a random order. The tables show the median, and the least and the greatest value in
brackets; ratios are those of the medians, ours / another. The last lines name the limits that are
not kept. The load comes from this same machine, so that every figure includes the cost of a client.

Mosaic, Quack and roapi have 60 s for a repetition and keep the figures that they have by then;
whoever else than ours needs more than 15 s is not asked again. No server but ours may take more
than four fifths of the free memory.

Every answer is checked: small ones are decoded, large ones have their rows counted in the metadata
of the Arrow stream, and each is decoded as a whole once per server (`mixed`) or once per run
(`large`), with the sums of its columns compared.

Exit code: 1 for a wrong answer of ours, a server of ours that did not start, did not stay or took
300 s for a repetition, a bound that failed, or a count above its limit; otherwise 0, however slow.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

from .plan import DUCKDBS, PEERS, WORKLOADS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--duckdb",
        choices=(*DUCKDBS, "both"),
        help="the series (default: both, or 1.5 with --quick)",
    )
    parser.add_argument(
        "--only", choices=[workload.name for workload in WORKLOADS], help="one workload"
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        default=tuple(PEERS),
        metavar="NAMES",
        help=f"who else to measure, or none (default: {','.join(PEERS)})",
    )
    parser.add_argument("--quick", action="store_true", help="under 2 minutes, less certain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="put tables and plots into FILE, as Markdown"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: make --page of the JSON in FILE",
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path(".bench"),
        metavar="DIR",
        help="where the virtual environments are (default: .bench)",
    )
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _leave)
    return _run(arguments)


def _peers(names: str) -> tuple[str, ...]:
    chosen = tuple(name for name in names.split(",") if name != "none")
    for name in chosen:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}, none")
    return chosen


def _leave(number: int, _: FrameType | None) -> None:
    """Unwind, so that the `with` blocks end what they started."""
    sys.exit(128 + number)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.source:
        document = json.loads(arguments.source.read_text(encoding="utf-8"))
        return _write_page(document, arguments.page)
    # Late, so that --help needs no pyarrow.
    from . import report
    from .session import Session

    began, start = datetime.now(timezone.utc), perf_counter()
    sheets = []
    environments = arguments.environments.absolute()
    series = arguments.duckdb or (DUCKDBS[0] if arguments.quick else "both")
    for duckdb in DUCKDBS if series == "both" else (series,):
        session = Session(
            duckdb,
            home=environments,
            peers=arguments.peers,
            quick=arguments.quick,
            alone=bool(arguments.only),
        )
        workloads = [w for w in WORKLOADS if arguments.only == w.name]
        if not arguments.only:
            workloads = [w for w in WORKLOADS if w.usual and (w.brief or not arguments.quick)]
        sheets.append(session.measure(workloads, say=lambda line: print(line, file=sys.stderr)))
        if not arguments.only:
            session.guard(sheets[-1])
        print(f"\n{report.table(sheets[-1])}\n", flush=True)
    minutes, seconds = divmod(round(perf_counter() - start), 60)
    print(f"took {minutes}:{seconds:02}", flush=True)
    document = report.document(sheets, sys.argv[1:], began)
    if arguments.json:
        text = json.dumps(document, indent=2, ensure_ascii=False)
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    failed = any(sheet.failures for sheet in sheets)
    if arguments.page:
        failed |= bool(_write_page(document, arguments.page))
    return 1 if failed else 0


def _write_page(document: Mapping[str, Any], file: Path | None) -> int:
    from . import page

    try:
        page.write(document, file or Path("benchmarks.md"))
    except page.NoPlace as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
