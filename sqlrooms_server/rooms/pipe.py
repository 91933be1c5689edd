"""Messages between the server and a process of documents: a tuple and some bytes objects.

A message is ``[header length][header][bytes]…``; the header holds the tuple and the lengths of the
bytes, written by ``marshal``, since both ends are the same interpreter and the fields are plain.
"""

from __future__ import annotations

import marshal
import socket
from collections.abc import Callable, Sequence
from typing import Any

Blob = bytes | bytearray

# Below this a copy is cheaper than another call of the kernel.
_JOINED_BYTES = 64 << 10


class Closed(Exception):
    """The other end is gone."""


class Pipe:
    """One end. For one thread.

    When the socket has a timeout, ``on_wait`` is called each time it passes while a message is
    awaited; it may raise ``Closed``.
    """

    def __init__(self, end: socket.socket, on_wait: Callable[[], None] = lambda: None) -> None:
        self._socket = end
        self._on_wait = on_wait
        self._buffer = b""

    def send(self, fields: tuple[Any, ...], blobs: Sequence[Blob] = ()) -> None:
        """Send a message. Raises ``Closed``."""
        header = marshal.dumps((fields, [len(blob) for blob in blobs]))
        waiting = [len(header).to_bytes(4, "big"), header]
        size = 0
        try:
            for blob in blobs:
                if len(blob) < _JOINED_BYTES:
                    waiting.append(bytes(blob))
                    size += len(blob)
                else:
                    self._socket.sendall(b"".join(waiting))
                    self._socket.sendall(blob)
                    waiting, size = [], 0
                if size >= _JOINED_BYTES:
                    self._socket.sendall(b"".join(waiting))
                    waiting, size = [], 0
            self._socket.sendall(b"".join(waiting))
        except OSError as error:
            raise Closed from error

    def receive(self) -> tuple[tuple[Any, ...], list[Blob]]:
        """The next message. Raises ``Closed``."""
        length = int.from_bytes(self._take(4), "big")
        fields, lengths = marshal.loads(self._take(length))
        return fields, [self._take(length) for length in lengths]

    def _take(self, length: int) -> Blob:
        try:
            if length > _JOINED_BYTES:
                return self._take_large(length)
            while len(self._buffer) < length:
                try:
                    more = self._socket.recv(_JOINED_BYTES)
                except TimeoutError:
                    self._on_wait()
                    continue
                if not more:
                    raise Closed
                self._buffer += more
        except OSError as error:
            raise Closed from error
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _take_large(self, length: int) -> bytearray:
        """Receive into place: nothing is copied while the interpreter lock is held."""
        whole = bytearray(length)
        begun = min(length, len(self._buffer))
        whole[:begun] = self._buffer[:begun]
        self._buffer = self._buffer[begun:]
        view = memoryview(whole)[begun:]
        while len(view):
            try:
                received = self._socket.recv_into(view)
            except TimeoutError:
                self._on_wait()
                continue
            if not received:
                raise Closed
            view = view[received:]
        return whole

    def close(self) -> None:
        self._socket.close()
