"""What is measured, how often, and what is asked of the figures. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass

DUCKDBS = ("1.5", "2")
"""The engine series the benchmark has environments for."""

PEERS = {
    "mosaic": "Mosaic's duckdb-server",
    "quack": "DuckDB's Quack",
    "roapi": "roapi, which is DataFusion",
}
"""What else one might use. By the names of their columns."""

SUBJECTS = ("published", "ours", *PEERS, "bare", "in-process")
"""The servers, the smallest that could be, and the engine alone: what no server can beat."""


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    `required` and `aim` limit ours / published, or ours itself if `absolute`; `bound` limits
    ours / in-process, and `beside` ours / the best of the peers. Each is a least value if
    `more_is_better`, else a greatest one.
    """

    key: str
    label: str
    unit: str
    more_is_better: bool
    required: float | None = None
    aim: float | None = None
    absolute: bool = False
    bound: float | None = None
    beside: float | None = None


@dataclass(frozen=True)
class Curve:
    """How a figure grows: the keys of its points are `key` and one of `at`, as in `q64`."""

    key: str
    title: str
    unit: str
    across: str
    at: tuple[int, ...]


CLIENTS = (1, 4, 16, 64, 256, 512)
ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 60_000_000)
QUICK_ROWS = ROWS[:-1]


@dataclass(frozen=True)
class Workload:
    """A name for `--only`, the metrics found, and who besides ours can do it too.

    `tables` are read. Samples may have more figures than metrics: the points of `curves`, whose
    keys are a name and a number. One that is not `usual` runs with `--only` alone, and one that is
    not `brief` not with `--quick` either.
    """

    name: str
    metrics: tuple[Metric, ...]
    in_process: bool
    published: bool = True
    peers: bool = False
    bare: bool = False
    tables: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    usual: bool = True
    brief: bool = True

    @property
    def subjects(self) -> list[str]:
        able = {
            "published": self.published,
            "ours": True,
            "bare": self.bare,
            "in-process": self.in_process,
        }
        return [subject for subject in SUBJECTS if able.get(subject, self.peers)]


WORKLOADS = (
    Workload(
        "one",
        (
            Metric("qps", "select 1, 1 at a time", "q/s", True, required=2.5, aim=4, beside=1.5),
            Metric("p50", "  median latency", "ms", False, bound=1.5),
            Metric("p99", "  p99 latency", "ms", False),
        ),
        in_process=True,
        peers=True,
        bare=True,
    ),
    Workload(
        "parts",
        tuple(
            Metric(key, label, "us", False)
            for key, label in (
                ("arrive", "select 1: to the loop"),
                ("accept", "  decoded, checked, queued"),
                ("wake", "  a worker wakes"),
                ("work", "  DuckDB, encoding"),
                ("return", "  the loop wakes"),
                ("send", "  sent and received"),
            )
        ),
        in_process=False,
        published=False,
    ),
    Workload(
        "many",
        (
            Metric("qps", "select 1, 8 x 4 in flight", "q/s", True, required=3, aim=4, beside=1.5),
            Metric("p99", "  p99 latency", "ms", False),
        ),
        in_process=False,
        peers=True,
    ),
    Workload(
        "clients",
        (
            Metric("q64", "select 1, 64 clients", "q/s", True, aim=4, beside=1.5),
            Metric("p64", "  p99 latency", "ms", False),
            Metric("q512", "  512 clients", "q/s", True, aim=4, beside=1.5),
            Metric("p512", "  p99 latency", "ms", False),
            Metric("p99", "  to that of 64", "x", False, aim=10, absolute=True),
        ),
        brief=False,
        in_process=False,
        peers=True,
        curves=(
            Curve("q", "select 1", "answers a second", "clients", CLIENTS),
            Curve("p", "select 1, p99 latency", "ms", "clients", CLIENTS),
        ),
    ),
    Workload(
        "mixed",
        (
            Metric("mbps", "1 M mixed rows", "MB/s", True, required=2, aim=3, bound=0.85, beside=1),
            Metric("seconds", "  whole answer", "s", False),
        ),
        in_process=True,
        peers=True,
        bare=True,
        tables=("mixed",),
    ),
    Workload(
        "tpch",
        tuple(
            Metric(key, label, "q/s", True, beside=1)
            for key, label in (
                ("q1", "TPC-H Q1, 16 clients"),
                ("q6", "  Q6"),
                ("q3", "  Q3"),
            )
        ),
        brief=False,
        in_process=True,
        peers=True,
        tables=("customer", "lineitem", "orders"),
    ),
    Workload(
        "large",
        (
            Metric("first", "30 M rows, first byte", "ms", False, required=1 / 20, aim=1 / 50),
            Metric("rows", "  first rows", "ms", False),
            Metric("mbps", "  throughput", "MB/s", True, bound=0.85, beside=1),
            Metric("growth", "  memory growth", "MB", False, required=1 / 20, aim=1 / 40),
        ),
        in_process=True,
        peers=True,
        bare=True,
    ),
    Workload(
        "rows",
        (
            Metric("r1000000", "1 M rows of two", "MB/s", True, bound=0.85, beside=1),
            Metric("r10000000", "  10 M", "MB/s", True, bound=0.85, beside=1),
            Metric("r60000000", "  60 M", "MB/s", True, bound=0.85, beside=1),
        ),
        brief=False,
        in_process=True,
        peers=True,
        bare=True,
        curves=(
            Curve("r", "two columns of integers", "MB/s", "rows", ROWS),
            Curve("s", "two columns of integers, whole answer", "ms", "rows", ROWS),
        ),
    ),
    Workload(
        "chunked",
        (
            Metric("mbps", "30 M rows in chunks", "MB/s", True),
            Metric("share", "  to one message", "x", True, required=0.9, absolute=True),
            Metric("client", "  first rows, client", "x", False, required=1 / 20, absolute=True),
        ),
        in_process=False,
        published=False,
    ),
    Workload(
        "streams",
        (
            Metric("mbps", "50 streams at once", "MB/s", True),
            Metric("cancel", "  cancel among ten", "ms", False, required=100, absolute=True),
        ),
        brief=False,
        in_process=False,
        published=False,
    ),
    Workload(
        "upload",
        (Metric("mbps", "1 GB in", "MB/s", True, bound=0.8),),
        in_process=True,
        published=False,
    ),
    Workload(
        "cached",
        (
            Metric("qps", "cached, 8 x 4 in flight", "q/s", True),
            Metric("share", "  to running select 1", "x", True, required=5, absolute=True),
            Metric("aggregate", "aggregate of 12 MB, run", "ms", False),
            Metric("disk", "  run to read from disk", "x", True, required=3, absolute=True),
        ),
        in_process=False,
        published=False,
    ),
    Workload(
        "burst",
        (
            Metric("seconds", "1,000 equal queries", "s", False),
            Metric("share", "  to one alone", "x", False),
        ),
        brief=False,
        in_process=False,
        published=False,
    ),
    Workload(
        "watch",
        (
            Metric("median", "1,000 watchers, median", "ms", False, required=50, absolute=True),
            Metric("last", "  the last one", "ms", False),
        ),
        brief=False,
        in_process=False,
        published=False,
    ),
    Workload(
        "live",
        (
            Metric("last", "200 live, the last one", "ms", False),
            Metric("cpu", "  CPU, to one subscriber", "x", False, required=2, absolute=True),
        ),
        brief=False,
        in_process=False,
        published=False,
    ),
    Workload(
        "fanout",
        (
            Metric("rate", "one message to 1,000", "/s", True, required=1.5, aim=3),
            Metric("p99", "  p99 latency", "ms", False, required=1),
            Metric("burst", "  in bursts of eight", "/s", True),
        ),
        in_process=True,
    ),
    Workload(
        "stalled",
        (Metric("rate", "10 of 100 stalled", "msg/s", True),),
        brief=False,
        in_process=False,
        published=False,
    ),
    Workload(
        "subscribed",
        (
            Metric("size", "2,000 subscribed, each", "kB", False, required=10, absolute=True),
            Metric("cpu", "  CPU of all, idle", "%", False, required=0.2, absolute=True),
        ),
        brief=False,
        in_process=False,
    ),
    Workload(
        "rooms",
        (
            Metric("rate", "edits in a room of ten", "/s", True, required=1),
            Metric("lone", "  each after its ack", "/s", True),
            Metric("flood", "  acks in batches", "/s", True, required=10),
            Metric("size", "coming back to 5 MB", "kB", False, required=1 / 20),
            Metric("join", "  time", "ms", False),
        ),
        in_process=False,
    ),
    Workload(
        "plugins",
        (
            Metric("none", "select 1, no plugin", "ms", False),
            Metric("hooks", "  three hooks to none", "x", False, required=1.05, absolute=True),
            Metric("authorize", "  authorize to none", "x", False),
            Metric("quiet", "p99, nobody sleeps", "ms", False),
            Metric("sleeps", "  beside handlers of 1 s", "ms", False),
        ),
        in_process=False,
        published=False,
    ),
    Workload(
        "idle",
        (
            # The aim is none at all, met by what rounds to 0.0 %: a timer a second is a little.
            Metric("cpu", "idle, CPU", "%", False, required=0.2, aim=0.05, absolute=True),
        ),
        brief=False,
        in_process=False,
        peers=True,
    ),
    Workload(
        "start",
        (
            Metric("first", "start to first answer", "s", False, aim=0.5, absolute=True),
            Metric("module", "  its import", "s", False),
            Metric("memory", "  memory then", "MB", False),
        ),
        in_process=True,
        peers=True,
    ),
    Workload(
        "memory",
        (
            Metric("connection", "memory, one of 500 clients", "kB", False),
            Metric("stream", "  one of 8 results of 160 MB", "MB", False),
        ),
        brief=False,
        in_process=False,
        peers=True,
    ),
    Workload(
        "soak",
        (
            Metric("rate", "ten minutes of everything", "/s", True),
            Metric("p99", "  p99 of select 1", "ms", False),
            Metric("late", "  to that of the first minute", "x", False),
            Metric("memory", "  memory after the first minute", "MB", False),
            Metric("growth", "  growth in the last half", "MB", False),
            Metric("descriptors", "  left open", "descriptors", False),
            Metric("threads", "  more than at its start", "threads", False),
        ),
        in_process=False,
        published=False,
        tables=("mixed",),
        usual=False,
    ),
)


@dataclass(frozen=True)
class Effort:
    """How often each workload is repeated, and how long a repetition takes, in seconds."""

    repetitions: dict[str, int]
    warm_up: float
    window: float
    mixed_answers: int
    # Of each member of a room.
    edits: int
    rows: tuple[int, ...] = ROWS
    # The workloads that peers take part in.
    peers: tuple[str, ...] = tuple(workload.name for workload in WORKLOADS if workload.peers)
    settle: float = 1.0
    idle: float = 5.0
    soak: float = 600.0


FULL = Effort(
    {
        "one": 5,
        "parts": 5,
        "many": 5,
        "clients": 3,
        "mixed": 5,
        "tpch": 3,
        "large": 3,
        "rows": 3,
        "chunked": 5,
        "streams": 3,
        "upload": 3,
        "cached": 5,
        "burst": 3,
        "watch": 3,
        "live": 3,
        "fanout": 3,
        "stalled": 3,
        "subscribed": 2,
        "rooms": 3,
        "plugins": 3,
        "idle": 2,
        "start": 5,
        "memory": 3,
        "soak": 1,
    },
    warm_up=0.5,
    window=2.0,
    mixed_answers=5,
    edits=500,
)
QUICK = Effort(
    dict.fromkeys(FULL.repetitions, 1),
    warm_up=0.2,
    window=0.8,
    mixed_answers=3,
    edits=200,
    rows=QUICK_ROWS,
    peers=("one", "many"),
    settle=0.5,
    idle=2.0,
    soak=20.0,
)
