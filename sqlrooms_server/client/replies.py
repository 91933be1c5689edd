"""What the server answers and tells, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlrooms_server.client.plugin_replies import (
    Answered,
    Event,
    InputAck,
    ObjectAck,
    ObjectBytes,
    ObjectChanges,
    ObjectClosed,
    ObjectList,
    Opened,
    OutputData,
    StreamBegun,
    StreamEnded,
)


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
class Resumable:
    """The chunks that follow can go on over another connection, for whoever has ``token``."""

    token: str


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
class Message:
    """What was said in a channel. ``payload`` is a JSON value.

    It is not to be changed: other subscriptions of this client get the same one. ``offset`` is
    where a later subscription can go on (``since``); what was said only to some has none.
    """

    payload: Any
    offset: str | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A connection that hears a channel. ``user`` is what it calls itself, which nobody checks."""

    connection_id: str
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """``member`` hears the channel from now on."""

    member: Member


@dataclass(frozen=True, slots=True)
class Left:
    """``member`` hears the channel no more."""

    member: Member


@dataclass(frozen=True, slots=True)
class Missed:
    """Something that a subscription does not tell may have come before what follows.

    ``messages`` is False when that can only be joins and leaves, which nobody remembers.
    """

    messages: bool = True


Heard = Message | Joined | Left | Missed


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The subscription begins after the message of ``offset``, None when such messages follow.

    ``recovered``: what was said since the offset that was asked for has been sent.
    """

    offset: str | None
    recovered: bool


@dataclass(frozen=True, slots=True)
class NotifyAck:
    """It was said, to so many if it was for some only."""

    delivered: int | None


class MemberList(list[Member]):
    """Members of a channel, the first 1000; ``total`` is the number of all."""

    total = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the server offers. ``upload_window`` is in bytes."""

    upload_window: int
    connection_id: str | None


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
    | Resumable
    | Rows
    | Done
    | Progress
    | Consumed
    | CancelAck
    | SessionClosed
    | CacheStats
    | Watching
    | Change
    | Heard
    | Subscribed
    | NotifyAck
    | MemberList
    | Event
    | Answered
    | ObjectList
    | ObjectChanges
    | ObjectBytes
    | Opened
    | ObjectAck
    | ObjectClosed
    | StreamBegun
    | OutputData
    | InputAck
    | StreamEnded
    | Welcome
    | Failed
    | Lost
)
