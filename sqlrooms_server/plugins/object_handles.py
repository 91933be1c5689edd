"""What functions of plugins hold of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlrooms_server.plugin import Client
from sqlrooms_server.plugins.object_streams import OpenObject
from sqlrooms_server.plugins.object_types import Target
from sqlrooms_server.plugins.outgoing import Outgoing
from sqlrooms_server.plugins.tickets import Tickets


class Handle:
    """A stream as plugins see it, see :class:`plugin.objects.ObjectStream`. From any thread."""

    def __init__(
        self,
        client: Client,
        stream: OpenObject,
        outgoing: Outgoing,
        tickets: Tickets,
        resolve: Callable[[Any], Target],
        post: Callable[..., None],
    ) -> None:
        self.client = client
        self._stream = stream
        self._outgoing = outgoing
        self._tickets = tickets
        self._resolve = resolve
        self._post = post

    @property
    def is_open(self) -> bool:
        return not self._outgoing.has_ended

    @property
    def waiting_bytes(self) -> int:
        return self._outgoing.waiting

    def send(self, payload: bytes | str, references: Sequence[Any] = ()) -> None:
        data = payload.encode() if isinstance(payload, str) else bytes(payload)
        targets = [self._resolve(obj) for obj in references]
        if not self.is_open:
            return
        told = self._tickets.add(targets, self._stream) if targets else []
        if self._stream.answered:
            # It ended meanwhile, and released those from before.
            self.release()
        self._outgoing.put(self._stream.query_id, data, told)

    def release(self) -> None:
        self._tickets.release_of(self._stream)

    def close(self) -> None:
        self._outgoing.end()
        self._post(self._stream.close)
