"""Messages for plugins: how one is sent, and what may be answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlrooms_server.client.messages import encode_payload, framed
from sqlrooms_server.client.needs import Flow
from sqlrooms_server.client.plugin_replies import (
    Answered,
    Event,
    ObjectBytes,
    StreamBegun,
)
from sqlrooms_server.client.queries import WINDOW, Attempts, Request
from sqlrooms_server.client.replies import (
    Reply,
)
from sqlrooms_server.client.result_streams import Stream

# Fields that say how a message is answered, and not what it is.
_OF_PROTOCOL = ("type", "queryId", "timeoutMs", "stream", "window", "compression", "resumable")


@dataclass(slots=True)
class CallRequest(Request):
    """A message of a type that a plugin has. With a ``body`` it is a binary one."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    repeats: bool = False
    # What must live as long as it is asked for.
    holds: Any = None

    @property
    def can_repeat(self) -> bool:
        return self.repeats

    def message(self, remaining: float | None) -> str | bytes:
        options: dict[str, Any] = {"stream": True, "window": WINDOW}
        if remaining is not None:
            options["timeoutMs"] = max(1, round(1000 * remaining))
        if self.compression is not None:
            options["compression"] = self.compression
        head = {"type": self.kind, "queryId": self.query_id}
        text = encode_payload(**{**self.fields, **options, **head})
        return text if self.body is None else framed(text, self.body)


def checked_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """``fields``. Raises ``ValueError`` for one that is of the protocol."""
    for name in _OF_PROTOCOL:
        if name in fields:
            raise ValueError(f"The field {name!r} is of the protocol itself; choose another name.")
    return fields


class CallStream(Stream):
    """The answer of a plugin: a value, a table whose batches come one by one, or nothing."""

    def __init__(self, attempts: Attempts, on_event: Callable[[Any], None] | None = None) -> None:
        super().__init__(attempts)
        self.answer: Answered | ObjectBytes | None = None
        self._on_event = on_event

    @property
    def is_table(self) -> bool:
        """Whether a table is answered. Known when it has begun."""
        return self._decoder.schema is not None

    def _take(self, reply: Reply) -> None:
        if isinstance(reply, Event):
            if self._on_event is not None:
                self._on_event(reply.data)
        elif isinstance(reply, Answered | ObjectBytes):
            self.answer = reply
            self._is_complete = True
        elif isinstance(reply, StreamBegun):
            raise ValueError(f"{self.request.kind!r} is a stream of batches; use stream().")
        else:
            Stream._take(self, reply)


def value_of(stream: CallStream) -> Flow[Any]:
    """What a plugin answered, as a whole: a JSON value, bytes, a ``pyarrow.Table``, or None."""
    if isinstance(stream.answer, Answered):
        return stream.answer.value
    if not stream.is_table:
        return None
    return (yield from stream.table())
