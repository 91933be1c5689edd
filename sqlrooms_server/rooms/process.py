"""A process that holds documents: answers one command after the other until the server is gone."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from sqlrooms_server.rooms.documents import Broken, Document, Refused, decoded
from sqlrooms_server.rooms.pipe import Blob, Closed, Pipe

Reply = tuple[tuple[Any, ...], list[Blob]]


class Documents:
    """The documents of this process, by the names of their rooms. Each method is a command."""

    def __init__(self) -> None:
        self._documents: dict[str, Document] = {}

    def load(self, name: str, is_plain: bool, *blobs: Blob) -> Reply:
        """Snapshot, then updates -> why some of the updates cannot be read."""
        document = Document(is_plain)
        unreadable = document.load(bytes(blobs[0]), [bytes(blob) for blob in blobs[1:]])
        self._documents[name] = document
        return (unreadable,), []

    def apply(
        self, name: str, senders: list[int], base64_ones: list[int], space: int, *blobs: Blob
    ) -> Reply:
        """Updates and their senders -> statuses, and what is new.

        ``base64_ones`` are the numbers of those that are still text. What is new in snapshots may
        have ``space`` bytes.
        """
        document = self._documents[name]
        texts = frozenset(base64_ones)
        updates: list[tuple[int, bytes]] = []
        refused: dict[int, tuple[str, str]] = {}
        for number, (sender, blob) in enumerate(zip(senders, blobs, strict=True)):
            try:
                is_text = number in texts
                updates.append((sender, decoded(bytes(blob)) if is_text else bytes(blob)))
            except Refused as error:
                refused[number] = (str(error), error.code)
        applied = document.apply(updates, space)
        found = iter(applied.statuses)
        statuses = [refused.get(number) or next(found) for number in range(len(senders))]
        fields = statuses, [sender for sender, _ in applied.parts], applied.is_whole
        parts: list[Blob] = [document.version, applied.delta]
        return fields, [*parts, *(part for _, part in applied.parts), *applied.pending]

    def missing(self, name: str, version: Blob) -> Reply:
        """A version -> what a document at it lacks."""
        document = self._documents[name]
        data, kind = document.missing(bytes(version))
        return (kind,), [document.version, data, document.presence()]

    def whole(self, name: str, has_base: bool, base_size: int, base_version: Blob) -> Reply:
        """The version of a snapshot -> another one if need be, and what completes it."""
        document = self._documents[name]
        snapshot, since = document.whole(bytes(base_version) if has_base else None, base_size)
        return (snapshot is not None,), [document.version, snapshot or b"", since]

    def snapshot(self, name: str, cut: Blob) -> Reply:
        document = self._documents[name]
        snapshot, pending = document.snapshot(bytes(cut))
        return (), [document.version, snapshot, pending, document.frontiers]

    def json(self, name: str) -> Reply:
        return (), [self._documents[name].json().encode("utf-8", "replace")]

    def presence(self, name: str, data: Blob) -> Reply:
        self._documents[name].tell_presence(decoded(bytes(data)))
        return (), []

    def unload(self, name: str) -> Reply:
        self._documents.pop(name, None)
        return (), []

    def run(self, fields: tuple[Any, ...], blobs: list[Blob]) -> Reply:
        """Carry out a command. The first field of a reply is "ok", "refused" or "broken"."""
        command, name, *arguments = fields
        method: Callable[..., Reply] = getattr(self, command)
        try:
            answer, parts = method(name, *arguments, *blobs)
        except Refused as error:
            return ("refused", str(error)), []
        except (Broken, MemoryError) as error:
            self._documents.pop(name, None)
            return ("broken", str(error) or "out of memory"), []
        return ("ok", *answer), parts


def main(descriptor: int, memory: int) -> None:
    """Serve the socket ``descriptor`` with at most ``memory`` bytes of address space; 0 is any."""
    # The server decides when this process ends: it closes the socket, or dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if memory:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    pipe = Pipe(socket.socket(fileno=descriptor))
    documents = Documents()
    try:
        pipe.send(("ready",))
        while True:
            fields, blobs = pipe.receive()
            pipe.send(*documents.run(fields, blobs))
            del blobs
    except Closed:
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
