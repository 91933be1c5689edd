"""A client in a room: what it is sent, and in which order."""

from __future__ import annotations

import binascii
import functools
from collections.abc import Callable

from sqlrooms_server.db.room_store import Blob
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import binary_head, encode
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Chunk, Pull

# A multiple of three, so that the base64 of each piece has no padding and the pieces can be joined.
_PIECE_BYTES = FRAGMENT_BYTES // 4 * 3 // 3 * 3


# Head, body and tail, whether it is text, and whether others are sent the same body.
_Message = tuple[bytes, Blob, bytes, bool, bool]


class Large:
    """A large message, sent piece by piece; a :class:`transport.Source`."""

    def __init__(
        self, head: bytes, body: Blob, tail: bytes, *, as_base64: bool, ended: Callable[[], None]
    ) -> None:
        self._head = head
        self._rest = memoryview(body)
        self._tail = tail
        self._as_base64 = as_base64
        self._ended = ended

    def pull(self) -> tuple[Chunk, bool] | Pull:
        if self._head:
            head, self._head = self._head, b""
            return head, False
        if len(self._rest):
            size = _PIECE_BYTES if self._as_base64 else FRAGMENT_BYTES
            piece, self._rest = self._rest[:size], self._rest[size:]
            last = not len(self._rest) and not self._tail
            return (_base64(piece) if self._as_base64 else piece), last
        return self._tail, True

    def sent(self) -> None:
        self._ended()

    def dropped(self) -> None:
        pass


class Change:
    """An update that several members are sent, with its header or without."""

    def __init__(self, room: str, update: Blob) -> None:
        self._room = room
        self.bare = bytes(update)

    @functools.cached_property
    def framed(self) -> bytes:
        return binary_head(type="crdt-update", roomId=self._room) + self.bare


class Member:
    """One client and one room, from its first ``crdt-join`` until it left.

    ``is_in``: it may send; ``is_joined``: it is sent what others change. ``asked``: so many joins
    and leaves are not answered yet. ``has_versions``: it knows more than the first protocol.
    ``all_sent`` is called when nothing large is being sent any more.
    """

    def __init__(
        self, peer: Peer, room: str, max_waiting: int, all_sent: Callable[[Member], None]
    ) -> None:
        self.peer = peer
        self.room = room
        self.is_in = True
        self.is_joined = False
        self.asked = 0
        self.has_versions = False
        self._max_waiting = max_waiting
        self._all_sent = all_sent
        # Short messages overtake a large one that is still to be sent. Those about its document
        # must not.
        self.is_sending = False
        self._waiting: list[_Message] = []
        self._waiting_bytes = 0

    def tell(self, message: bytes) -> None:
        """Send a text message, behind the documents before it."""
        self._send(message, b"", b"", True)

    def send_document(self, kind: str, data: Blob) -> None:
        """Send ``data`` with a header; the document itself, if ``kind`` is a snapshot."""
        head = binary_head(type=kind, roomId=self.room)
        self._send(head, data, b"", False, is_shared=False)

    def send_snapshot(self, data: Blob) -> None:
        """Send a snapshot as the first protocol has it."""
        head = encode({"type": "crdt-snapshot", "roomId": self.room})[:-1] + b',"data":"'
        self._send(head, data, b'"}', True)

    def send_update(self, change: Change) -> None:
        """Send what others have changed."""
        message = change.framed if self.has_versions else change.bare
        self._send(b"", message, b"", False)

    def _send(
        self, head: bytes, body: Blob, tail: bytes, is_text: bool, is_shared: bool = True
    ) -> None:
        if self.is_sending:
            self._wait((head, body, tail, is_text, is_shared))
        elif len(head) + len(body) > _PIECE_BYTES:
            self.is_sending = True
            source = Large(head, body, tail, as_base64=is_text, ended=self._sent)
            self.peer.stream(source, is_text=is_text)
        elif is_text:
            self.peer.send(head + _base64(body) + tail)
        else:
            self.peer.send_binary(bytes(head + body))

    def _wait(self, message: _Message) -> None:
        head, body, _, _, is_shared = message
        # What is large and shared, all who wait for it have together.
        size = min(len(body), _PIECE_BYTES) if is_shared else len(body)
        self._waiting_bytes += len(head) + size
        # A single one may be larger.
        if self._waiting_bytes > self._max_waiting and self._waiting:
            self._waiting.clear()
            self.is_joined = False
            self.peer.close(1013, "The client does not read what it is sent (--max-queued-bytes).")
        else:
            self._waiting.append(message)

    def _sent(self) -> None:
        self.is_sending = False
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for message in waiting:
            self._send(*message)
        if not self.is_sending:
            self._all_sent(self)


def _base64(data: Blob | memoryview) -> bytes:
    return binascii.b2a_base64(data, newline=False)
