"""One WebSocket connection: what it is sent, in order and with bounded memory.

All methods belong to the loop thread. A message longer than a fragment, and every stream, goes
out as fragments of one message, taken from its source only while the socket keeps up.
"""

from __future__ import annotations

import enum
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sqlrooms_server.transport import native

if TYPE_CHECKING:
    from sqlrooms_server.transport.topics import Topic, Topics

Chunk = bytes | memoryview

# A batch of 64 Ki values of 8 bytes, with its metadata, is one fragment. Larger ones are no faster
# and would enlarge the buffers of each connection.
FRAGMENT_BYTES = 576 << 10

# Nothing is written above this, so that the buffer of uWebSockets, which does not shrink before it
# closes, holds at most this and one fragment, or one frame of a chunked result (1.6 MiB).
NATIVE_HIGH_BYTES = 1 << 20

# A fast reader never fills the socket; without a budget it would starve the other connections.
TURN_BYTES = 1 << 20

# The longest head of a frame that a server sends.
FRAME_HEAD_BYTES = 10

# What a message that waits costs besides its bytes, which others may share.
_ENTRY_BYTES = 100


class Pull(enum.Enum):
    """Why a source has nothing to give."""

    NOT_READY = "not ready"
    """The producer calls :meth:`Connection.pump` once there is a fragment, or
    :meth:`Connection.stream_frames` once there is a frame."""
    WITHDRAWN = "withdrawn"
    """It ended before its first byte left; there is nothing to send."""


class Source(Protocol):
    """A message that is produced while it is sent."""

    def pull(self) -> tuple[Chunk, bool] | Pull:
        """At most ``FRAGMENT_BYTES`` and whether they are the last of the message."""

    def sent(self) -> None:
        """The last fragment was handed to the socket."""

    def dropped(self) -> None:
        """The connection closed first."""


class FrameSource(Protocol):
    """Messages that are produced while others are sent between them. Hashable by identity."""

    def pull_frame(self) -> list[Chunk] | Pull:
        """The next message, in parts of at most ``FRAGMENT_BYTES``."""

    def dropped(self) -> None:
        """The connection closed while there was something to send."""


class Whole:
    """A complete message as a source."""

    def __init__(self, data: Chunk) -> None:
        self._rest = memoryview(data)

    def pull(self) -> tuple[Chunk, bool]:
        fragment, self._rest = self._rest[:FRAGMENT_BYTES], self._rest[FRAGMENT_BYTES:]
        return fragment, not self._rest

    def sent(self) -> None:
        pass

    def dropped(self) -> None:
        pass


_Entry = tuple[Source, int, int]
"""A message to send: its source, its opcode, and the bytes it counts in ``_queued``."""

# "Try again later" of the registry of close codes (RFC 6455, section 7.4.2).
_TOO_SLOW = 1013


class Connection:
    """An open WebSocket. After it closed, every method does nothing.

    Complete messages go first; streams and the circle of frame sources take turns.
    """

    __slots__ = (
        "_begun",
        "_buffered_at_most",
        "_close_when_sent",
        "_frame_sources",
        "_frames_are_next",
        "_is_cut_off",
        "_max_queued",
        "_messages",
        "_meter",
        "_metered",
        "_on_cut_off",
        "_post",
        "_queued",
        "_repost",
        "_streams",
        "_topics",
        "_under_way",
        "_ws",
        "handler_data",
        "remote_address",
        "tls",
    )

    def __init__(
        self,
        post: Callable[..., None],
        *,
        tls: int,
        remote_address: str,
        max_queued: int,
        on_cut_off: Callable[[Connection], None],
        handler_data: Any,
    ) -> None:
        """``on_cut_off`` is called, later, when it is given up because the client does not read."""
        self.tls = tls
        self.remote_address = remote_address
        self._on_cut_off = on_cut_off
        self._is_cut_off = False
        self.handler_data = handler_data
        self._post = post
        self._max_queued = max_queued
        self._ws: Any = None
        # What uWebSockets holds, or less: asking it costs as much as a small part of a query.
        self._buffered_at_most = 0
        self._messages: deque[tuple[bytes, int]] = deque()
        self._queued = 0
        self._streams: deque[_Entry] = deque()
        # A dictionary for its order. Holds only sources that may have something to send.
        self._frame_sources: dict[FrameSource, None] = {}
        self._frames_are_next = False
        # Nothing can go between the fragments of a message.
        self._under_way: _Entry | None = None
        self._begun = False
        self._repost = False
        self._close_when_sent: tuple[int, bytes] | None = None
        # Those that are published to it, which goes past this class as long as nothing waits here.
        self._topics: dict[Topic, None] = {}
        self._meter: Topics | None = None
        self._metered = 0

    @property
    def ws(self) -> Any:
        """The socket, for the transport; None when it is closed."""
        return self._ws

    @property
    def is_open(self) -> bool:
        return self._ws is not None and not self._is_cut_off

    @property
    def is_cut_off(self) -> bool:
        """Whether it was given up. Only the close is still sent."""
        return self._is_cut_off

    @property
    def is_behind(self) -> bool:
        """Whether complete messages wait, or the socket is full."""
        return self._ws is not None and (
            bool(self._messages) or self._buffered() >= NATIVE_HIGH_BYTES
        )

    def send(self, data: bytes, *, is_text: bool) -> None:
        """Send one message, after those before it. A client that does not read is cut off."""
        if self._ws is None or self._is_cut_off:
            return
        opcode = native.TEXT if is_text else native.BINARY
        if len(data) <= FRAGMENT_BYTES and self._is_idle():
            self._write(data, opcode, last=True)
            return
        self.leave_topics()
        self._queued += len(data) + _ENTRY_BYTES
        if self._queued > self._max_queued:
            self._cut_off()
            return
        self._messages.append((data, opcode))
        self.pump()

    def send_all(self, messages: Sequence[bytes]) -> None:
        """Send text messages as :meth:`send` does, together."""
        if len(messages) > 1 and self._ws is not None and self._is_idle():
            native.corked(self.tls, self._ws, lambda: self._send_each(messages))
        else:
            self._send_each(messages)

    def _send_each(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            self.send(message, is_text=True)

    def _is_idle(self) -> bool:
        """Whether nothing waits, so that what is sent now goes out now."""
        return self._under_way is None and not self._messages and self._has_room()

    def stream(self, source: Source, *, is_text: bool) -> None:
        """Send the message that ``source`` produces, after the streams before it."""
        if not self.is_open:
            source.dropped()
            return
        self.leave_topics()
        self._streams.append((source, native.TEXT if is_text else native.BINARY, 0))
        self.pump()

    def stream_frames(self, source: FrameSource) -> None:
        """Send the binary messages that ``source`` has ready. To be called when it has more."""
        if not self.is_open:
            source.dropped()
            return
        self._frame_sources[source] = None
        self.pump()

    def close(self, code: int, reason: str) -> None:
        """Close with ``code`` once everything before was sent, and not before this returns."""
        self.leave_topics()
        self._close_when_sent = (code, reason.encode())
        self.pump()

    def abort(self) -> None:
        """Close at once and without a closing handshake."""
        if self._ws is not None:
            native.ws_close(self.tls, self._ws)

    def pump(self) -> None:
        """Send as much as the socket takes. For sources that have data again."""
        budget = TURN_BYTES
        while self._ws is not None:
            if budget <= 0:
                self._pump_later()
                return
            if not self._has_room():
                return
            if self._under_way is None:
                self._take_up()
            size = self._send_frame() if self._under_way is None else self._send_fragment()
            if size is None:
                break
            budget -= size
        self._close_if_sent()

    def join_topic(self, topic: Topic, topics: Topics) -> bool:
        """For ``topic``: whether it may be published here until :meth:`Topic.serve_apart`."""
        if not self.is_open or self._close_when_sent is not None:
            return False
        if self._under_way is not None or self._messages or self._streams:
            return False
        if self._meter is None:
            self._meter = topics
            self._metered = topics.published
            topics.joined(self)
        self._topics[topic] = None
        return True

    def leave_topic(self, topic: Topic) -> None:
        """For ``topic``: it is published here no more."""
        del self._topics[topic]
        if not self._topics:
            self._stop_metering()

    def leave_topics(self) -> None:
        """From here on everything goes through this class, which decides what is sent when."""
        if not self._topics:
            return
        topics, self._topics = self._topics, {}
        self._stop_metering()
        for topic in topics:
            topic.serve_apart(self)

    @property
    def falls_behind(self) -> bool:
        """Whether half of what may wait in the socket does."""
        return self._ws is not None and self._buffered() >= NATIVE_HIGH_BYTES // 2

    def _stop_metering(self) -> None:
        assert self._meter is not None
        self._add_published()
        self._meter.left(self)
        self._meter = None

    def _add_published(self) -> None:
        """Count what was published as if it had all been sent here."""
        assert self._meter is not None
        self._buffered_at_most += self._meter.published - self._metered
        self._metered = self._meter.published

    def _buffered(self) -> int:
        """What uWebSockets holds, in bytes."""
        return int(native.ws_buffered(self.tls, self._ws))

    def _has_room(self) -> bool:
        """Whether more may be written now."""
        if self._meter is not None:
            self._add_published()
        if self._buffered_at_most >= NATIVE_HIGH_BYTES:
            self._buffered_at_most = self._buffered()
        return self._buffered_at_most < NATIVE_HIGH_BYTES

    def _take_up(self) -> None:
        """Choose the message to send next; none when it is the turn of a frame."""
        if self._messages:
            data, opcode = self._messages.popleft()
            self._under_way = Whole(data), opcode, len(data) + _ENTRY_BYTES
        elif self._streams and not (self._frames_are_next and self._frame_sources):
            self._under_way = self._streams.popleft()
            self._frames_are_next = True

    def _send_fragment(self) -> int | None:
        """Send a part of the message under way; its size, or None when it is not there yet."""
        assert self._under_way is not None
        source, opcode, size = self._under_way
        pulled = source.pull()
        if pulled is Pull.NOT_READY:
            return None
        if pulled is Pull.WITHDRAWN:
            self._under_way = None
            return 0
        data, last = pulled
        self._write(data, native.CONTINUATION if self._begun else opcode, last=last)
        self._begun = not last
        if last and self._ws is not None:
            self._under_way = None
            self._queued -= size
            source.sent()
        return len(data)

    def _send_frame(self) -> int | None:
        """Send one message of the next source that has one; None when nothing waits at all."""
        self._frames_are_next = False
        while self._frame_sources:
            source = next(iter(self._frame_sources))
            del self._frame_sources[source]
            pulled = source.pull_frame()
            if isinstance(pulled, Pull):
                continue
            self._frame_sources[source] = None
            native.corked(self.tls, self._ws, functools.partial(self._write_parts, pulled))
            return sum(map(len, pulled))
        return 0 if self._streams else None

    def _write_parts(self, parts: list[Chunk]) -> None:
        """Send one binary message, as fragments because joining ``parts`` would copy them."""
        for number, part in enumerate(parts, 1):
            opcode = native.BINARY if number == 1 else native.CONTINUATION
            if self._ws is not None:
                self._write(part, opcode, last=number == len(parts))

    def _close_if_sent(self) -> None:
        # Later, because the handler is told at once: whoever sends would see clients vanish.
        if self._close_when_sent is not None and self._may_close():
            self._post(self._close_now)

    def _close_now(self) -> None:
        if self._close_when_sent is not None and self._may_close():
            code, reason = self._close_when_sent
            native.ws_end(self.tls, self._ws, code, reason, len(reason))

    def _may_close(self) -> bool:
        """Whether everything was sent. The drain callback asks again."""
        if self._ws is None:
            return False
        if self._under_way or self._messages or self._streams or self._frame_sources:
            return False
        # What uWebSockets still holds would be lost.
        return self._buffered() == 0

    def opened(self, ws: Any) -> None:
        """For the transport: the socket is ``ws``."""
        self._ws = ws

    def closed(self) -> None:
        """For the transport: the socket is gone. Nothing may touch it from here on."""
        self._ws = None
        self.leave_topics()
        self._drop_all()

    def _cut_off(self) -> None:
        """Give up a client that does not read, and tell it if it ever does."""
        self._is_cut_off = True
        self.leave_topics()
        reason = b"The client does not read what it is sent (--max-queued-bytes)."
        self._close_when_sent = _TOO_SLOW, reason
        self._drop_all()
        self._post(self._on_cut_off, self)
        # What waited may have waited for its producer: then there is no drain callback.
        self._close_if_sent()

    def _drop_all(self) -> None:
        entries = list(self._streams)
        if self._under_way is not None:
            entries.append(self._under_way)
        frame_sources = list(self._frame_sources)
        self._under_way = None
        self._messages.clear()
        self._streams.clear()
        self._frame_sources.clear()
        for source, _, _ in entries:
            source.dropped()
        for frame_source in frame_sources:
            frame_source.dropped()

    def _pump_later(self) -> None:
        if not self._repost:
            self._repost = True
            self._post(self._pump_again)

    def _pump_again(self) -> None:
        self._repost = False
        self.pump()

    def _write(self, data: Chunk, opcode: int, *, last: bool) -> None:
        length = len(data)
        self._buffered_at_most += length + FRAME_HEAD_BYTES
        if type(data) is not bytes:
            data = native.ffi.from_buffer("char[]", data)
        # "compress" on a route without compression takes the path that copies. The other one
        # loses the payload of 16 KiB and more when the kernel's buffer is full.
        native.ws_send(self.tls, self._ws, data, length, opcode, True, last)
