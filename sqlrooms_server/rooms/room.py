"""One room as the server knows it: what waits for its document, and what came of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlrooms_server.db.room_store import Blob, Line
from sqlrooms_server.errors import ServerError

if TYPE_CHECKING:
    from sqlrooms_server.rooms.driver import Driver

# A command imports up to so many updates, so that no other room waits long for its turn.
_MAX_BATCH = 1000
_MAX_BATCH_BYTES = 1 << 20


@dataclass
class Item:
    """Something to do, in the order in which it came.

    ``attempts`` counts how often it was under way when a document or its process broke; ``size`` is
    what it holds, in bytes.
    """

    client: Any
    attempts: int = field(default=0, kw_only=True)
    size: int = field(default=0, init=False)


@dataclass
class Update(Item):
    """A Loro update or snapshot, as base64 if ``is_text``. ``answer`` is for whoever sent it.

    One that is ``refused`` already only waits for the answers before its own.
    """

    data: Blob | memoryview
    answer: Any = None
    is_text: bool = False
    refused: ServerError | None = None

    def __post_init__(self) -> None:
        self.size = len(self.data) * 3 // 4 if self.is_text else len(self.data)


@dataclass
class Join(Item):
    """Ask for the document: what is missing at ``version``, or all of it."""

    version: bytes | None

    def __post_init__(self) -> None:
        self.size = len(self.version or b"")


@dataclass
class Leave(Item):
    """Pass through behind everything before."""


@dataclass
class Presence(Item):
    """Ephemeral state, as base64."""

    data: bytes

    def __post_init__(self) -> None:
        self.size = len(self.data)


@dataclass
class Read(Item):
    """Ask for the document as JSON; ``tell`` gets it, or the error, on any thread."""

    tell: Callable[[Document | ServerError], None]


@dataclass
class Unload(Item):
    """Free the memory."""


@dataclass(frozen=True)
class Document:
    """What a room holds: ``json``, and when that last changed, in milliseconds since 1970."""

    name: str
    json: bytes
    updated_ms: int


@dataclass
class Outcome:
    """What came of some items. Told on the loop thread, in the order of the items."""

    room: Room
    items: list[Any]


@dataclass
class Failed(Outcome):
    error: ServerError


@dataclass
class Applied(Outcome):
    """Updates were taken. ``statuses``: "applied", "pending" or an error, one for each.

    ``delta`` is what is new, and ``parts`` the same by the client it came from.
    """

    statuses: list[str | ServerError]
    delta: Blob
    parts: list[tuple[Hashable, Blob]]


@dataclass
class Joined(Outcome):
    """``kind`` of ``data``: "update", "snapshot" or "reset". ``since`` completes a snapshot."""

    version: bytes
    kind: str
    data: Blob
    since: Blob = b""
    presence: Blob = b""


@dataclass
class Left(Outcome):
    pass


@dataclass
class Told(Outcome):
    """Presence to be passed on."""


@dataclass
class Answered(Outcome):
    """A document was read; whoever asked for it has it."""


@dataclass
class Unloaded(Outcome):
    pass


class Room:
    """One room. Fields below the line belong to the thread of its driver; the queue is shared.

    Made and forgotten on the loop thread; while it lives no other stands for the same name, since
    each believes that what is stored is what it has stored.
    """

    def __init__(self, name: str, driver: Driver) -> None:
        self.name = name
        self.driver = driver
        self.queue: deque[Item] = deque()
        # Whether a driver has it among those that wait.
        self.is_scheduled = False
        # Clients that are in it or on their way. Written by the loop.
        self.members = 0
        self.waiting_bytes = 0
        self.last_used = time.monotonic()
        # -----
        self.is_loaded = False
        self.is_plain = False
        # Why it is not loaded, and until when that is not tried again.
        self.blocked = ""
        self.blocked_until = 0.0
        self.line = Line()
        self.size = 0
        self.log_bytes = 0
        self.log_rows = 0
        self.log_since = 0.0
        self.marks: list[Any] = []
        self.updated_ms = 0
        # The snapshot for those who join, and the version it is of.
        self.base: Blob = b""
        self.base_version: bytes = b""

    def touch(self) -> None:
        """Somebody uses it."""
        self.last_used = time.monotonic()

    def take(self) -> list[Item]:
        """The next items that make one command."""
        taken: list[Item] = [self.queue.popleft()]
        size = taken[0].size
        if not isinstance(taken[0], Update) or taken[0].attempts:
            return taken
        while self.queue and len(taken) < _MAX_BATCH:
            item = self.queue[0]
            size += item.size
            if not isinstance(item, Update) or item.attempts or size > _MAX_BATCH_BYTES:
                break
            taken.append(self.queue.popleft())
        return taken

    def put_back(self, items: list[Item]) -> None:
        self.queue.extendleft(reversed(items))
