"""Messages of the server as dataclasses, and those of the client as text or bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ujson

Id = int | str
# What a reply belongs to: a kind of request, and its id or name.
Key = tuple[str, Id]

HELLO: Key = ("hello", "")
# Kinds of requests whose replies may have no id, and what belongs to the latest watch.
CACHE_STATS, WATCH = "cacheStats", "watch"
CHANGES: Key = ("changes", "")
NO_ID = ""

# How results of the server begin.
_JSON_RESULT = '{"type":"json",'


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a query is. ``state`` is ``"queued"`` or ``"running"``.

    ``percent`` is DuckDB's estimate from 0 to 100, None when it has none; ``position`` says how
    many queries come before a queued one; times are in milliseconds.
    """

    state: str
    percent: float | None
    position: int | None
    queued_ms: float
    running_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What the server says at the end of a result. Times are in milliseconds.

    ``bytes`` counts the Arrow stream, ``sending_ms`` is the time it waited for this client, and
    ``truncated_by`` names the limit that cut the result, ``"maxRows"`` or one of the server.
    """

    rows: int
    bytes: int
    queued_ms: float
    running_ms: float
    sending_ms: float
    truncated: bool
    truncated_by: str | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an Arrow IPC stream. ``summary`` and what follows come with the last."""

    seq: int
    body: memoryview
    is_last: bool
    summary: Summary | None
    truncated: bool = False
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """A JSON array of row objects, as text."""

    data: str
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """There is no table. ``rows`` counts those of an upload."""

    rows: int


@dataclass(frozen=True, slots=True)
class Consumed:
    """So many bytes of an upload are not under way any more."""

    bytes: int


@dataclass(frozen=True, slots=True)
class CancelAck:
    """``cancelled``: the request was in flight."""

    cancelled: bool


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """``closed``: there was such a session."""

    closed: bool


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the result cache of the server did since it began, and what it holds.

    Of the requests with ``persist``, ``hits`` were served from it, ``joined`` from a run that
    another had begun, ``misses`` ran, and ``uncacheable`` could not be remembered. Without a cache
    ``enabled`` is False.
    """

    enabled: bool
    hits: int
    misses: int
    joined: int
    uncacheable: int
    entries: int
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Watching:
    """The watch begins: when each table changed last, and now. ``resync`` as in ``Change``."""

    versions: dict[str, int]
    version: str
    resync: bool


@dataclass(frozen=True, slots=True)
class Change:
    """Tables that changed: ``tables`` tells the version of each, larger is later.

    ``op`` is ``"insert"``, ``"update"``, ``"delete"``, ``"merge"``, ``"copy"``, ``"upload"``,
    ``"create"``, ``"drop"`` or ``"alter"``, and ``"change"`` for several together or another one.
    With ``resync`` anything may have changed besides. ``version`` is where a later watch can go on.
    """

    tables: dict[str, int]
    op: str
    version: str
    resync: bool


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the server offers. ``upload_window`` is in bytes."""

    upload_window: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed."""

    text: str
    code: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection is gone. ``code`` is set when the server said why."""

    text: str
    code: str | None = None


Reply = (
    Chunk
    | Rows
    | Done
    | Progress
    | Consumed
    | CancelAck
    | SessionClosed
    | CacheStats
    | Watching
    | Change
    | Welcome
    | Failed
    | Lost
)


def decode(message: str | bytes) -> tuple[Key | None, Reply] | None:
    """What the server sent, and what it belongs to.

    None for types this client does not know, and for a JSON result that failed half-way: it is cut,
    and the error follows as a message of its own. The key is None for an error about no certain
    request. Raises ``ValueError``, ``LookupError`` or ``TypeError`` for what is no message of the
    protocol.
    """
    body = memoryview(b"")
    if isinstance(message, bytes):
        end = 4 + int.from_bytes(message[:4], "big")
        fields = ujson.loads(message[4:end])
        body = memoryview(message)[end:]
    else:
        try:
            fields = ujson.loads(message)
        except ValueError:
            if message.startswith(_JSON_RESULT):
                return None
            raise
    decoder = _DECODERS.get(fields["type"])
    return None if decoder is None else decoder(fields, body)


def encode(**fields: Any) -> str:
    """A text message. Fields that are None are left out."""
    return ujson.dumps(
        {name: value for name, value in fields.items() if value is not None},
        escape_forward_slashes=False,
    )


def framed(header: str, body: bytes) -> bytes:
    """A binary message, padded so that the server need not copy the body to align it."""
    encoded = header.encode()
    encoded += b" " * (-(4 + len(encoded)) % 8)
    return b"".join((len(encoded).to_bytes(4, "big"), encoded, body))


def _query(fields: dict[str, Any]) -> Key:
    return ("query", fields["queryId"])


def _arrow(fields: dict[str, Any], body: memoryview) -> tuple[Key, Reply]:
    # Without seq it is a whole result, from a server that sends no chunks.
    is_last = fields.get("last", True)
    summary = _summary(fields) if is_last and "rows" in fields else None
    return _query(fields), Chunk(
        seq=fields.get("seq", 0),
        body=body,
        is_last=is_last,
        summary=summary,
        truncated=fields.get("truncated", False),
        cached=fields.get("cached", False),
    )


def _summary(fields: dict[str, Any]) -> Summary:
    ms = fields["ms"]
    return Summary(
        rows=fields["rows"],
        bytes=fields["bytes"],
        queued_ms=ms["queued"],
        running_ms=ms["running"],
        sending_ms=ms["sending"],
        truncated=fields.get("truncated", False),
        truncated_by=fields.get("truncatedBy"),
    )


def _progress(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return _query(fields), Progress(
        state=fields["state"],
        percent=fields["percent"],
        position=fields["position"],
        queued_ms=fields["queuedMs"],
        running_ms=fields["runningMs"],
    )


def _cache_stats(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return (CACHE_STATS, fields.get("queryId", NO_ID)), CacheStats(
        enabled=fields.get("enabled", True),
        hits=fields["hits"],
        misses=fields["misses"],
        joined=fields["joined"],
        uncacheable=fields["uncacheable"],
        entries=fields["entries"],
        memory_bytes=fields["memoryBytes"],
        disk_bytes=fields["diskBytes"],
    )


def _watching(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    reply = Watching(fields["versions"], fields["version"], fields.get("resync", False))
    return (WATCH, fields.get("queryId", NO_ID)), reply


def _changed(fields: dict[str, Any], _: memoryview) -> tuple[Key, Reply]:
    return CHANGES, Change(
        tables=fields["tables"],
        op=fields["op"],
        version=fields["version"],
        resync=fields.get("resync", False),
    )


def _error(fields: dict[str, Any], _: memoryview) -> tuple[Key | None, Reply]:
    key = _query(fields) if "queryId" in fields else None
    return key, Failed(fields["error"], fields["code"])


_DECODERS: dict[str, Callable[[dict[str, Any], memoryview], tuple[Key | None, Reply]]] = {
    "arrow": _arrow,
    "json": lambda fields, _: (_query(fields), Rows(fields["data"], fields.get("cached", False))),
    "ok": lambda fields, _: (_query(fields), Done(0)),
    "uploadAck": lambda fields, _: (_query(fields), Done(fields.get("rows", 0))),
    "uploadProgress": lambda fields, _: (_query(fields), Consumed(fields["bytes"])),
    "progress": _progress,
    "cacheStats": _cache_stats,
    "watching": _watching,
    "changed": _changed,
    "cancelAck": lambda fields, _: (
        ("cancel", fields["queryId"]),
        CancelAck(fields["cancelled"]),
    ),
    "sessionClosed": lambda fields, _: (
        ("session", fields["session"]),
        SessionClosed(fields["closed"]),
    ),
    "welcome": lambda fields, _: (
        HELLO,
        Welcome(fields["limits"]["uploadWindow"]),
    ),
    "error": _error,
}
