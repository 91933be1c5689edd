"""What plugins of the server answer and tell, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """What a plugin tells before its answer."""

    data: Any


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer of a plugin: a JSON value, or bytes."""

    value: Any


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object that is published. ``object_type`` is the name of its type.

    ``can_fetch`` and ``can_open`` say what it is good for.
    """

    name: str
    object_type: str
    can_fetch: bool
    can_open: bool


class ObjectList(list[ObjectInfo]):
    """What is published for this client, in the order of the names."""


@dataclass(frozen=True, slots=True)
class ObjectChanges:
    """What is published now and was not, or was replaced, and the names of what is no more."""

    published: tuple[ObjectInfo, ...]
    removed: frozenset[str]

    def after(self, before: ObjectList) -> ObjectList:
        """What is published, when ``before`` was."""
        objects = {one.name: one for one in before if one.name not in self.removed}
        objects.update((one.name, one) for one in self.published)
        return ObjectList(objects[name] for name in sorted(objects))

    def following(self, earlier: ObjectChanges) -> ObjectChanges:
        """What has changed since before ``earlier``."""
        kept = [one for one in earlier.published if one.name not in self.removed]
        return ObjectChanges(
            tuple({one.name: one for one in (*kept, *self.published)}.values()),
            (earlier.removed | self.removed) - {one.name for one in self.published},
        )


@dataclass(frozen=True, slots=True)
class Referred:
    """A reference as it comes: its ticket, and what its object is good for."""

    ticket: str
    object_type: str
    can_fetch: bool
    can_open: bool


@dataclass(frozen=True, slots=True)
class ObjectBytes:
    """An object that was fetched, or a message of one that is open. ``size`` is that of all."""

    payload: bytes
    references: tuple[Referred, ...]
    size: int


@dataclass(frozen=True, slots=True)
class ObjectData(ObjectBytes):
    """A message of one that is open."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An object is open; ``window`` bytes may be sent that it has not acknowledged."""

    window: int


@dataclass(frozen=True, slots=True)
class ObjectAck:
    """So many bytes that were sent to an object have been taken."""

    bytes: int


@dataclass(frozen=True, slots=True)
class ObjectClosed:
    """There are no more messages."""


@dataclass(frozen=True, slots=True)
class StreamBegun:
    """A stream of batches has begun; ``window`` bytes of each input may be under way."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    window: int


@dataclass(frozen=True, slots=True)
class OutputData:
    """A piece of the Arrow IPC stream of an output."""

    output: str
    seq: int
    body: memoryview
    is_last: bool


@dataclass(frozen=True, slots=True)
class InputAck:
    """So many bytes of an input have been taken."""

    input: str
    bytes: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """A stream of batches has come to its end."""
