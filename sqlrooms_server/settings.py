"""The table of settings: one declaration gives the flag, the environment variable, the TOML key
and the row of the README. Where values come from is in :mod:`configuration`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from sqlrooms_server.errors import StartupError

ENVIRONMENT_PREFIX = "SQLROOMS_"

# Of a chunked upload: what may have been sent and not yet been consumed.
UPLOAD_WINDOW_BYTES = 32 << 20

# The process takes a third of it before the first query.
_LEAST_PROCESS_MEMORY = 256 << 20

_SIZE = re.compile(r"(\d+)\s*(B|KB|MB|GB|KiB|MiB|GiB)?", re.IGNORECASE)
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}


def _setting(default: Any, help: str, *, unit: str = "", secret: bool = False) -> Any:
    metadata = {"help": help, "unit": unit, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a server can be told. Sizes are bytes, times are seconds."""

    host: str = _setting("127.0.0.1", "Address or host name to listen on.")
    port: int = _setting(4000, "TCP port to listen on; 0 takes a free one.")
    unix_socket: str = _setting(
        "", "Path of a Unix socket to listen on, instead of an address and a port."
    )
    unix_socket_mode: str = _setting(
        "600", "Who may connect to it, as chmod takes it: 660 lets its group in, for a proxy."
    )
    tls_cert: str = _setting(
        "",
        "PEM file of a certificate, with those between it and its authority: clients use wss:// "
        "and https:// then, and nothing else.",
    )
    tls_key: str = _setting("", "PEM file of the key of that certificate, not encrypted.")
    trusted_proxy: tuple[str, ...] = _setting(
        (),
        "Proxies that are believed what they say of their clients: addresses, networks such as "
        "10.0.0.0/8, or unix for all that come over the Unix socket.",
    )
    proxy_headers: str = _setting(
        "x-forwarded",
        "The headers in which they say it: x-forwarded (X-Forwarded-For, -Proto and -Host) or "
        "forwarded (RFC 7239).",
    )
    db_path: str = _setting(
        ":memory:", "DuckDB database file; created with its directory when it does not exist."
    )
    read_only: bool = _setting(False, "Open the database files for reading only.")
    meta_db: str = _setting(
        "", "Separate DuckDB file for the meta tables, instead of a schema in the main file."
    )
    meta_namespace: str = _setting(
        "__sqlrooms", "Schema (or, with a separate file, database name) of the meta tables."
    )
    extensions: tuple[str, ...] = _setting(
        (),
        "DuckDB extensions to load at start: name, name@repository or the absolute path of a file.",
    )
    sandbox: str = _setting(
        "",
        "What the SQL of clients may do at most: select (any SELECT on the database, nothing "
        "outside of it) or database (any SQL on the database, nothing outside of it). Without it, "
        "they may read and write files as the server can.",
    )
    allow_dir: tuple[str, ...] = _setting(
        (), "With --sandbox: directories whose files clients can read all the same."
    )
    sandbox_functions: tuple[str, ...] = _setting(
        (), "Functions of extensions that clients may call whom --sandbox or their role restricts."
    )
    sandbox_temp_size: int = _setting(
        16 << 30,
        "With --sandbox: bytes that DuckDB may put into its temporary directory.",
        unit="size",
    )
    auth_token: str = _setting(
        "",
        "Token that clients must present. Prefer the environment variable or the file: "
        "a command line is visible to other users of the machine.",
        secret=True,
    )
    auth_token_file: str = _setting("", "File whose first line is the token.")
    insecure_no_auth: bool = _setting(
        False,
        "Listen for other machines without a token: whoever reaches the port can do whatever the "
        "server can.",
    )
    auth_cookie: str = _setting("", "Name of a cookie that may carry the token at the upgrade.")
    tokens: str = _setting(
        "", "TOML file with several tokens, their roles, and keys of signed tokens (JWT)."
    )
    auth_timeout: int = _setting(
        10, "Seconds in which a client must present a token before it is disconnected."
    )
    max_auth_failures: int = _setting(
        20,
        "Wrong tokens of one address in a minute; after them it must wait, but for tokens that "
        "were right there before.",
    )
    max_strangers: int = _setting(
        1000, "Connections at one time that have not presented a token yet."
    )
    allow_origin: tuple[str, ...] = _setting(
        (),
        "Origins of web pages that may connect, besides pages from this machine: "
        "https://app.example.com, or * for any.",
    )
    allow_host: tuple[str, ...] = _setting(
        (),
        "Host names that clients may use to reach the server, besides those of this machine: "
        "data.example.com, or * for any.",
    )
    max_connections: int = _setting(10_000, "WebSocket connections at one time.")
    max_connections_per_address: int = _setting(
        0,
        "Connections of one IP address (of IPv6: of a /64 network), requests over HTTP included; "
        "those of a trusted proxy count for the clients behind it. 0 means 1000, and any number "
        "from this machine.",
    )
    max_http_connections: int = _setting(
        1000,
        "Sockets that are no WebSockets: over it, the one that has been silent longest is closed.",
    )
    max_message_size: int = _setting(
        128 << 20, "Largest message a client may send, uploads included.", unit="size"
    )
    max_sql_length: int = _setting(
        4 << 20, "Longest SQL text of one message, in bytes of UTF-8.", unit="size"
    )
    max_sql_nesting: int = _setting(
        250,
        "Depth of brackets in a SQL text. DuckDB spends seconds and gigabytes on deep ones, before "
        "it refuses them.",
    )
    max_in_flight: int = _setting(256, "Unanswered requests of one connection.")
    max_queue: int = _setting(1000, "Queries of all connections that wait for a worker.")
    query_timeout: int = _setting(
        0, "Seconds that a query may wait and run; 0 means without limit."
    )
    max_result_rows: int = _setting(
        0, "Rows that a result may have; 0 means without limit. Clients see when it was reached."
    )
    stream_idle_timeout: int = _setting(
        60,
        "Seconds after which a chunked result that its client does not acknowledge, or a chunked "
        "upload or stream that it does not go on with, is given up.",
    )
    session_idle_timeout: int = _setting(
        600, "Seconds without a query after which a session ends and is rolled back."
    )
    max_sessions_per_connection: int = _setting(16, "Sessions of one connection.")
    max_sessions: int = _setting(256, "Sessions of all connections.")
    max_channels_per_connection: int = _setting(1000, "Channels that one connection may hear.")
    max_channels: int = _setting(100_000, "Channels at one time.")
    max_notify_size: int = _setting(
        64 << 10, "Largest message to a channel, as a message or over HTTP.", unit="size"
    )
    notify_rate: int = _setting(
        5000, "Messages to channels that a connection may send in a second; 0 means any number."
    )
    channel_history: int = _setting(100, "Messages that a channel remembers for reconnects.")
    channel_history_ttl: int = _setting(300, "Seconds for which it remembers them.")
    max_live_per_connection: int = _setting(64, "Live queries of one connection.")
    max_live: int = _setting(4096, "Live queries of all connections.")
    sync: bool = _setting(False, "Share documents: rooms that clients join and change together.")
    rooms_db: str = _setting(
        "",
        "DuckDB file of the rooms; without it, one beside the database: my.rooms.duckdb beside "
        "my.duckdb.",
    )
    max_rooms: int = _setting(1000, "Rooms in memory at one time.")
    max_rooms_per_connection: int = _setting(100, "Rooms that one connection may be in.")
    max_room_size: int = _setting(
        64 << 20, "Largest document of a room, with its history.", unit="size"
    )
    max_update_size: int = _setting(16 << 20, "Largest update of a room.", unit="size")
    update_rate: int = _setting(
        20_000, "Updates of rooms that a connection may send in a second; 0 means any number."
    )
    room_history: int = _setting(
        0, "Seconds for which rooms keep the history of their documents; 0 keeps all of it."
    )
    room_idle_timeout: int = _setting(
        60, "Seconds after which a room without members leaves the memory."
    )
    room_memory: int = _setting(
        4 << 30,
        "Memory that a process of documents may use; 0 means any.",
        unit="size",
    )
    cache_dir: str = _setting(
        "",
        "Directory for results that clients ask to keep (persist); without it, one of the user's "
        "cache directory.",
    )
    cache_size: int = _setting(
        1 << 30, "Bytes of kept results, in memory and on disk together.", unit="size"
    )
    no_cache: bool = _setting(False, "Keep no results, whatever clients ask for.")
    plugin: tuple[str, ...] = _setting(
        (),
        "Plugins: module:Name, the path of a .py file, or the name of one that is installed.",
    )
    plugin_timeout: int = _setting(
        30, "Seconds that a function of a plugin may take to answer; 0 means any time."
    )
    plugin_workers: int = _setting(
        0, "Threads for functions of plugins; 0 means four for each core, at least 8."
    )
    plugin_backlog: int = _setting(
        10_000,
        "Queries that are done and of which a plugin has not been told; it misses those over it.",
    )
    files: tuple[str, ...] = _setting(
        (),
        "Directories whose files clients can list, download and preview, as NAME=DIR; with "
        "NAME=DIR:rw they can also upload, make directories and delete.",
    )
    # The transport takes bodies that say that they have 999,999,999 bytes at most.
    max_file_size: int = _setting(
        900 << 20,
        "Largest file that a client may upload; over 999,999,999 bytes only with "
        "Transfer-Encoding: chunked.",
        unit="size",
    )
    static: str = _setting(
        "", "Directory with a front end, served at / to everybody who may reach the port."
    )
    queries: str = _setting(
        "",
        "Directory of named queries, a .sql file each, which clients ask for by name.",
    )
    max_http_result: int = _setting(
        32 << 20,
        "Largest result of a named query over HTTP, which waits in memory until it is complete.",
        unit="size",
    )
    max_object_streams: int = _setting(
        64, "Objects of plugins that one connection may have open (object-open)."
    )
    max_object_references: int = _setting(
        1000,
        "References to tables and other objects that one connection may hold; each keeps its "
        "object in memory.",
    )
    # As much as a connection with 100 ms to the server needs for 80 MB/s.
    stream_window: int = _setting(
        8 << 20,
        "Bytes that a client may send ahead on each input of a stream of a plugin.",
        unit="size",
    )
    max_streams_per_connection: int = _setting(32, "Streams of plugins of one connection.")
    resume_window: int = _setting(
        0,
        "Bytes that are kept of each chunked result whose client asks to resume it (resumable) "
        "after a lost connection; 0 means that none can be resumed.",
        unit="size",
    )
    resume_timeout: int = _setting(
        60, "Seconds for which such a result waits for its client to come back."
    )
    resume_memory: int = _setting(
        256 << 20,
        "Bytes that are kept of all of them; over it less is kept than the window.",
        unit="size",
    )
    # Each has a cursor open, with some 10 MB of its result.
    max_waiting_streams: int = _setting(
        64, "Results that wait for their clients at one time; over it the oldest is given up."
    )
    max_waiting_streams_per_user: int = _setting(
        16, "Those of one user, or of one address for clients without a name."
    )
    memory_limit: str = _setting(
        "", "Memory that DuckDB may use, such as 4GB; without it, four fifths of the machine's."
    )
    process_memory: int = _setting(
        0,
        "Memory of the whole process above which the query that makes it grow is cancelled, on "
        "Linux; 0 means any. It also sees what --memory-limit does not count: large values, "
        "results under way. Without --memory-limit, that becomes half of this.",
        unit="size",
    )
    threads: int = _setting(0, "Threads of DuckDB; 0 means one for each core.")
    temp_directory: str = _setting(
        "", "Directory where DuckDB puts what does not fit into memory; made when needed."
    )
    max_queued_bytes: int = _setting(
        64 << 20,
        "Bytes of short replies that wait for a client which does not read; over it, "
        "the connection is closed.",
        unit="size",
    )
    workers: int = _setting(0, "Queries that run at one time; 0 means twice the cores, at least 4.")
    idle_timeout: int = _setting(
        46,
        "Seconds of silence after which a client is disconnected that does not answer a ping, "
        "which it is sent 16 s before (8 to 960).",
    )
    log_level: str = _setting("info", "debug, info, warning or error.")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_connections", 1, 1_000_000),
            ("max_connections_per_address", 0, 1_000_000),
            ("max_http_connections", 1, 1_000_000),
            # The transport counts a message in 32 bits and is told twice this size.
            ("max_message_size", 1 << 10, 1 << 30),
            ("max_sql_length", 1 << 10, 1 << 30),
            ("auth_timeout", 1, 3600),
            ("max_auth_failures", 1, 1_000_000),
            ("max_strangers", 1, 1_000_000),
            ("max_sql_nesting", 10, 1000),
            ("max_in_flight", 1, 1_000_000),
            ("max_queue", 1, 1_000_000),
            ("max_queued_bytes", 1 << 20, 1 << 40),
            ("query_timeout", 0, 7 * 24 * 3600),
            ("max_result_rows", 0, 1 << 53),
            ("stream_idle_timeout", 1, 7 * 24 * 3600),
            ("session_idle_timeout", 1, 7 * 24 * 3600),
            ("max_sessions_per_connection", 1, 1_000_000),
            ("max_sessions", 1, 1_000_000),
            ("max_channels_per_connection", 1, 1_000_000),
            ("max_channels", 1, 10_000_000),
            ("max_notify_size", 256, 1 << 30),
            ("notify_rate", 0, 1_000_000_000),
            ("channel_history", 0, 1_000_000),
            ("channel_history_ttl", 1, 7 * 24 * 3600),
            ("max_live_per_connection", 1, 1_000_000),
            ("max_live", 1, 1_000_000),
            ("max_rooms", 1, 1_000_000),
            ("max_rooms_per_connection", 1, 1_000_000),
            ("max_room_size", 1 << 10, 1 << 30),
            ("max_update_size", 1 << 10, 1 << 30),
            ("update_rate", 0, 1_000_000_000),
            ("room_history", 0, 100 * 365 * 24 * 3600),
            ("room_idle_timeout", 0, 7 * 24 * 3600),
            ("room_memory", 0, 1 << 50),
            ("cache_size", 0, 1 << 50),
            ("sandbox_temp_size", 0, 1 << 50),
            ("process_memory", 0, 1 << 50),
            ("max_http_result", 1 << 10, 1 << 30),
            ("resume_window", 0, 1 << 40),
            ("resume_timeout", 1, 7 * 24 * 3600),
            ("resume_memory", 0, 1 << 50),
            ("max_waiting_streams", 1, 1_000_000),
            ("max_waiting_streams_per_user", 1, 1_000_000),
            ("plugin_timeout", 0, 7 * 24 * 3600),
            ("plugin_workers", 0, 1024),
            ("plugin_backlog", 1, 1_000_000),
            ("max_file_size", 1, 1 << 50),
            ("max_object_streams", 1, 1_000_000),
            ("max_object_references", 1, 10_000_000),
            ("stream_window", 1 << 10, 1 << 30),
            ("max_streams_per_connection", 1, 1_000_000),
            ("threads", 0, 1024),
            ("workers", 0, 1024),
            # uWebSockets ends the process for anything outside.
            ("idle_timeout", 8, 960),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise StartupError(f"{flag(name)} must be from {low} to {high}, not {value}.")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise StartupError(
                f"--log-level must be debug, info, warning or error, not {self.log_level!r}."
            )
        if self.sandbox not in ("", "select", "database"):
            raise StartupError(f"--sandbox must be select or database, not {self.sandbox!r}.")
        if self.allow_dir and not self.sandbox:
            raise StartupError(
                "--allow-dir opens directories to the clients of a sandbox; give --sandbox too. "
                "Without it they can read every file that the server can."
            )
        if 0 < self.process_memory < _LEAST_PROCESS_MEMORY:
            raise StartupError(
                f"--process-memory must be 256MiB or more, or 0, not {self.process_memory}."
            )
        if self.proxy_headers not in ("x-forwarded", "forwarded"):
            raise StartupError(
                f"--proxy-headers must be x-forwarded or forwarded, not {self.proxy_headers!r}."
            )
        if not re.fullmatch(r"0?[0-7]{3}", self.unix_socket_mode):
            raise StartupError(
                f"--unix-socket-mode must be three octal digits, not {self.unix_socket_mode!r}."
            )
        if self.unix_socket and self.tls_cert:
            raise StartupError(
                "--unix-socket has no TLS: what it carries stays on this machine; drop --tls-cert."
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("cert", "key") if self.tls_cert else ("key", "cert")
            raise StartupError(f"--tls-{given} needs --tls-{missing}, which is missing.")
        if self.max_notify_size > self.max_queued_bytes:
            raise StartupError(
                f"--max-notify-size ({self.max_notify_size}) is more than --max-queued-bytes "
                f"({self.max_queued_bytes}): such a message would cut off whoever hears it."
            )
        if not self.host.strip():
            raise StartupError("--host is empty; use 127.0.0.1, or 0.0.0.0 for every interface.")
        if not self.auth_token.isascii():
            # A header or a cookie carries nothing else reliably.
            raise StartupError("The token must consist of ASCII characters.")
        if not self.meta_namespace.strip():
            raise StartupError("--meta-namespace must not be empty.")
        if self.sync and self.read_only:
            raise StartupError("--sync stores rooms, which --read-only forbids; drop one of them.")

    @property
    def worker_count(self) -> int:
        """Threads that run queries. More do not raise throughput, fewer let long queries block."""
        return self.workers or max(4, 2 * (os.cpu_count() or 1))

    @property
    def duckdb_limits(self) -> dict[str, str]:
        """The settings of DuckDB itself that were given."""
        limits = {
            "memory_limit": self.memory_limit or self._half_of_process_memory,
            "threads": str(self.threads or ""),
            "temp_directory": self.temp_directory,
        }
        return {name: value for name, value in limits.items() if value}

    @property
    def _half_of_process_memory(self) -> str:
        return f"{self.process_memory >> 21}MiB" if self.process_memory else ""


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def environment_variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def fields() -> tuple[dataclasses.Field[Any], ...]:
    """The rows of the table, in order."""
    return dataclasses.fields(Settings)


def parse(field: dataclasses.Field[Any], text: str, source: str) -> Any:
    """The value that ``text`` stands for. Raises ``StartupError`` naming ``source``."""
    default = field.default
    text = text.strip()
    if isinstance(default, bool):
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off", ""):
            return False
        raise StartupError(f"{source} must be true or false, not {text!r}.")
    if isinstance(default, int):
        match = _SIZE.fullmatch(text)
        if match and (match[2] is None or field.metadata["unit"] == "size"):
            return int(match[1]) * _UNITS[(match[2] or "B").lower()]
        wanted = "a size such as 128MiB" if field.metadata["unit"] == "size" else "a whole number"
        raise StartupError(f"{source} must be {wanted}, not {text!r}.")
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text
