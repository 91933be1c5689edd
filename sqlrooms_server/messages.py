"""The messages that clients send, decoded: one frozen dataclass each.

The contract is ``docs/protocol.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlrooms_server.errors import QueryId

QueryKind = Literal["arrow", "json", "exec"]
Format = Literal["arrow", "json"]
Compression = Literal["lz4", "zstd"]
UploadMode = Literal["replace", "create", "append"]
Params = list[Any] | dict[str, Any]
TableName = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Auth:
    """``{type: "auth", token}``."""

    token: str


@dataclass(frozen=True, slots=True)
class Hello:
    """``{type: "hello", user?}``. ``user`` is what the client calls itself."""

    user: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What a client may ask of a query besides its result.

    ``timeout`` is in seconds, ``window`` in bytes; None is without a limit. ``size`` is that of
    the message in bytes, when ``params`` make it more than its SQL.
    """

    params: Params | None = None
    timeout: float | None = None
    max_rows: int | None = None
    progress: bool = False
    compression: Compression | None = None
    stream: bool = False
    window: int | None = None
    resumable: bool = False
    session: str | None = None
    persist: bool = False
    size: int = 0


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Query:
    """``{type: "arrow" | "json" | "exec", sql, queryId?}`` and options.

    ``formats`` are those the reply may have, the best first; none for ``exec``. ``is_trusted``: the
    server itself made the text, which no client can say, so that no role bounds what it does.
    """

    kind: QueryKind
    sql: str
    query_id: QueryId
    formats: tuple[Format, ...]
    options: Options = NO_OPTIONS
    is_trusted: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """``{type: "cancel", queryId}``."""

    query_id: QueryId


@dataclass(frozen=True, slots=True)
class Ack:
    """``{type: "ack", queryId, bytes, last?}``: the bytes of a chunked result consumed so far.

    ``last``: so was its last message.
    """

    query_id: QueryId
    size: int
    last: bool = False


@dataclass(frozen=True, slots=True)
class CloseSession:
    """``{type: "closeSession", session}``."""

    session: str


@dataclass(frozen=True, slots=True)
class Watch:
    """``{type: "watch", tables, since?, queryId?}``. ``tables`` is None for all of them."""

    tables: tuple[TableName, ...] | None
    since: str | None
    query_id: QueryId | None


@dataclass(frozen=True, slots=True)
class Unwatch:
    """``{type: "unwatch", queryId?}``."""

    query_id: QueryId | None


@dataclass(frozen=True, slots=True)
class Live:
    """``{type: "live", sql, queryId?}`` and the options that make sense for it."""

    sql: str
    query_id: QueryId
    options: Options


@dataclass(frozen=True, slots=True)
class Subscribe:
    """``{type: "subscribe", channel, recover?, since?, presence?, queryId?}``."""

    channel: str
    query_id: QueryId | None
    recover: bool
    since: str | None
    presence: bool


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """``{type: "unsubscribe", channel, queryId?}``."""

    channel: str
    query_id: QueryId | None


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a message reaches: connections of ``user``, or the one with an id."""

    user: str | None = None
    connection: str | None = None


@dataclass(frozen=True, slots=True)
class Notify:
    """``{type: "notify", channel, payload, to?, queryId?}``. ``size`` is its own in bytes."""

    channel: str
    payload: Any
    query_id: QueryId | None
    to: Target | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class Presence:
    """``{type: "presence", channel, queryId?}``."""

    channel: str
    query_id: QueryId | None


@dataclass(frozen=True, slots=True)
class CacheStats:
    """``{type: "cacheStats", queryId?}``."""

    query_id: QueryId | None


@dataclass(frozen=True, slots=True)
class Upload:
    """Binary, header ``{type: "uploadArrow", tableName, queryId?, mode?}``, body an Arrow IPC
    stream.

    ``table`` holds one to three parts: table, schema and table, or catalog, schema and table.
    """

    table: TableName
    query_id: QueryId
    body: memoryview
    mode: UploadMode = "replace"


@dataclass(frozen=True, slots=True)
class UploadChunk:
    """An ``uploadArrow`` whose header has ``seq`` and ``last``: a part of the stream.

    ``table`` is None unless ``seq`` is 0.
    """

    table: TableName | None
    query_id: QueryId
    body: memoryview
    mode: UploadMode
    seq: int
    last: bool


@dataclass(frozen=True, slots=True)
class RoomJoin:
    """``{type: "crdt-join", roomId, version?}``. ``version`` is decoded; empty for no document."""

    room: str
    version: bytes | None


@dataclass(frozen=True, slots=True)
class RoomLeave:
    """``{type: "crdt-leave", roomId}``."""

    room: str


@dataclass(frozen=True, slots=True)
class RoomSnapshot:
    """``{type: "crdt-snapshot", roomId, data}``. ``data`` is the base64 text, unchecked."""

    room: str
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class RoomUpdate:
    """Binary: a bare Loro update, or one behind a header ``{type: "crdt-update", roomId, id?}``.

    ``room`` is None for a bare one.
    """

    room: str | None
    id: QueryId | None
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class RoomPresence:
    """``{type: "crdt-presence", roomId, data}``. ``data`` is the base64 text, unchecked."""

    room: str
    data: str


@dataclass(frozen=True, slots=True)
class PluginMessage:
    """A message of a type that a plugin has: text, or a header and ``body`` in a binary message.

    ``fields`` are those that are not of the protocol; of ``options``, a reply can have a deadline
    (``timeoutMs``), be cut into chunks (``stream``, ``window``, ``resumable``) and compressed
    (``compression``).
    """

    kind: str
    query_id: QueryId
    fields: dict[str, Any]
    options: Options = NO_OPTIONS
    body: memoryview | None = None
    size: int = 0


# Kinds of messages that go on with an object that their sender has opened or fetched.
OF_OPEN_OBJECTS = ("object-data", "object-ack", "object-close", "object-release")


@dataclass(frozen=True, slots=True)
class StreamData:
    """Binary, header ``{type: "streamData", queryId, input, seq, last?}``, body a part of the
    Arrow IPC stream of an input."""

    query_id: QueryId
    input: str
    body: memoryview
    seq: int
    last: bool


@dataclass(frozen=True, slots=True)
class StreamAck:
    """``{type: "streamAck", queryId, output, bytes}``: the bytes of an output consumed so far."""

    query_id: QueryId
    output: str
    size: int


Message = (
    Auth
    | Hello
    | Query
    | Cancel
    | Ack
    | CloseSession
    | Watch
    | Unwatch
    | Live
    | CacheStats
    | Subscribe
    | Unsubscribe
    | Notify
    | Presence
    | Upload
    | UploadChunk
    | RoomJoin
    | RoomLeave
    | RoomSnapshot
    | RoomUpdate
    | RoomPresence
    | PluginMessage
    | StreamData
    | StreamAck
)
