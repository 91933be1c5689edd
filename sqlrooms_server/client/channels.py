"""Who hears the channels of one connection, and what was said there and is not read yet."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.messages import Id, encode
from sqlrooms_server.client.replies import Heard, Lost, Message, Reply, Subscribed

# What may wait for a consumer that is slow: more than a server remembers unless it is told to.
_MAX_UNREAD_BYTES = 16 << 20
# What an unread message costs besides its bytes.
_ENTRY_BYTES = 300


@dataclass(slots=True, eq=False)
class Hearing(Exchange):
    """A subscription to a channel, which may be one of several on its connection.

    | it has been | a message is heard when |
    |---|---|
    | only asked for | ``subscribed`` comes, if the server sent it for ``since``: see ``_missed`` |
    | subscribed | it is new; one for ``since`` of another subscription is not |
    | ended | never |

    What is heard waits in ``heard``, and ``ended`` says why there is no more; the inbox only wakes
    the consumer. So nothing is lost with a consumer that is interrupted. One that lets too much
    wait is treated as if its connection were lost.
    """

    channel: str = field(kw_only=True)
    since: str | None = field(kw_only=True)
    presence: bool = field(kw_only=True)
    heard: deque[tuple[Heard | Subscribed, int]] = field(default_factory=deque)
    ended: Reply | None = None
    is_feed: ClassVar[bool] = True
    # Written by one thread each: that which receives, and the consumer's.
    _bytes_heard: int = 0
    _bytes_read: int = 0
    _newest: tuple[str, int] = ("", 0)
    # The last messages whose numbers follow each other, before ``subscribed``.
    _in_a_row: list[tuple[Message, int]] = field(default_factory=list)

    def deliver(self, reply: Reply) -> None:
        if not isinstance(reply, Subscribed):
            self.finish(reply)
            return
        missed = self._missed()
        self._newest = _position(reply.offset)
        self.is_answered = True
        self._add(Subscribed(None if missed else reply.offset, reply.recovered), 0)
        for message, size in missed:
            self._add(message, size)

    def hear(self, said: Heard, size: int) -> None:
        """Take what was said in the channel; ``size`` is that of its message in bytes."""
        if isinstance(said, Message):
            if said.offset is not None:
                if not self.is_answered:
                    self._remember(said, size)
                    return
                position = _position(said.offset)
                if position[0] == self._newest[0] and position[1] <= self._newest[1]:
                    return
                self._newest = position
        elif not self.presence:
            return
        if self.is_answered:
            self._add(said, size)

    def finish(self, reply: Reply) -> None:
        if self.ended is None:
            self.ended = reply
            self._wake()

    def read(self) -> Reply | None:
        """What comes next, None when that is not there yet. For the consumer."""
        # Looked at first: what comes before it is there then.
        ended = self.ended
        if not self.heard:
            return ended
        reply, size = self.heard.popleft()
        self._bytes_read += size
        return reply

    def _add(self, item: Heard | Subscribed, size: int) -> None:
        if self.ended is not None:
            return
        size += _ENTRY_BYTES
        if self._bytes_heard + size - self._bytes_read > _MAX_UNREAD_BYTES:
            self.finish(Lost(f"The messages of channel {self.channel!r} were not read."))
            return
        self._bytes_heard += size
        self.heard.append((item, size))
        self._wake()

    def _wake(self) -> None:
        if self.inbox.empty():
            self.inbox.put_nowait(True)

    def _remember(self, said: Message, size: int) -> None:
        if self.since is None:
            return
        if self._in_a_row:
            run, number = _position(self._in_a_row[-1][0].offset)
            if _position(said.offset) != (run, number + 1):
                self._in_a_row = []
        self._in_a_row.append((said, size))

    def _missed(self) -> list[tuple[Message, int]]:
        """What the server has sent for ``since``.

        That ends where ``subscribed`` begins, and its numbers follow each other. What comes before
        it is for other subscriptions of the connection, and ends with the newest message too.
        """
        in_a_row, self._in_a_row = self._in_a_row, []
        try:
            run, number = _position(self.since)
        except ValueError:
            return []
        positions = (_position(message.offset) for message, _ in in_a_row)
        return [
            item
            for item, position in zip(in_a_row, positions, strict=True)
            if position[0] == run and position[1] > number
        ]


class Channels:
    """The subscriptions of one connection.

    The server knows one for each channel: it is asked again for each of those here, and to end it
    with the last. The lock keeps such an end from overtaking the next beginning. A finalizer may
    meet it in its own thread at any place, and does no harm there.
    """

    def __init__(self, send: Callable[[str | bytes], None]) -> None:
        self._send = send
        self._lock = threading.RLock()
        self._hearings: dict[str, dict[Id, Hearing]] = {}

    def add(self, hearing: Hearing) -> None:
        """Let ``hearing`` hear its channel, when it is subscribed."""
        with self._lock:
            hearings = self._hearings.get(hearing.channel, {})
            hearings[hearing.key[1]] = hearing
            # A finalizer may have taken it out as empty just before.
            self._hearings[hearing.channel] = hearings

    def subscribe(self, hearing: Hearing) -> None:
        """Send the request of ``hearing``."""
        with self._lock:
            # The options of the last request count for all.
            hearings = list(self._hearings.get(hearing.channel, {}).values())
            presence = hearing.presence or any(other.presence for other in hearings)
            self._send(
                encode(
                    type="subscribe",
                    channel=hearing.channel,
                    queryId=hearing.key[1],
                    recover=True,
                    since=hearing.since,
                    presence=presence or None,
                )
            )

    def discard(self, hearing: Hearing, *, is_open: bool) -> None:
        """Let ``hearing`` hear no more. ``is_open`` says whether the server can be told."""
        with self._lock:
            hearings = self._hearings.get(hearing.channel, {})
            if hearings.pop(hearing.key[1], None) is None or hearings:
                return
            self._hearings.pop(hearing.channel, None)
            if is_open:
                self._send(encode(type="unsubscribe", channel=hearing.channel))

    def hear(self, channel: str, said: Heard, size: int) -> None:
        """Hand what was said to all who hear it: to nobody when it is a copy for its sender."""
        with self._lock:
            hearings = list(self._hearings.get(channel, {}).values())
        for hearing in hearings:
            hearing.hear(said, size)


def _position(offset: str | None) -> tuple[str, int]:
    """The run of the server and the number of an offset. Raises ``ValueError`` for what is none."""
    run, _, number = (offset or "").rpartition("-")
    return run, int(number)
