"""Objects of Python that clients use: what a plugin says of a type of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from sqlrooms_server.plugin.client import Client

T = TypeVar("T")


class ObjectStream(Protocol):
    """What a connection of an object sends to its client. From any thread; none of it waits.

    ``client`` is whom it belongs to. After the end its methods do nothing.
    """

    client: Client

    @property
    def is_open(self) -> bool:
        """Whether the client still hears it."""

    @property
    def waiting_bytes(self) -> int:
        """What was sent and has not left, as the client reads slowly. Over --max-queued-bytes the
        stream ends with ``busy``."""

    def send(self, payload: bytes | str, references: Sequence[Any] = ()) -> None:
        """Send a message, and references to tables and other objects with it.

        They are the client's until :meth:`release`, or the end of the stream. Raises ``TypeError``
        for one that no type of object knows, ``Busy`` for too many.
        """

    def release(self) -> None:
        """What was referred to so far is the client's no more, and nothing holds it for that."""

    def close(self) -> None:
        """End it, after what was sent before."""


class ObjectConnection(Protocol):
    """What an object does for one client. Plain functions, or ``async def``.

    They are called one at a time, ``on_data`` in the order of the messages, and after the stream
    ended ``on_close``, exactly once.
    """

    def on_data(self, payload: bytes, references: list[Any]) -> Any:
        """The client sent ``payload``. ``references`` are the objects that its references stand
        for. What it raises ends the stream."""

    def on_close(self) -> Any:
        """The stream has ended, however that came."""


class ObjectType:
    """A type of objects. Derive from it, and override :meth:`is_type` and one of the others."""

    name: str = ""

    def is_type(self, obj: Any) -> bool:
        """Whether ``obj`` is of this type. Of several types that say so, the first one has it."""
        raise NotImplementedError

    def to_bytes(self, obj: Any) -> Any:
        """What a client gets that fetches ``obj``: bytes, a table, which comes as Arrow, or bytes
        and a sequence of references, see :class:`ObjectStream`. May be ``async def``."""
        raise NotImplementedError

    def create_client_connection(self, obj: Any, stream: ObjectStream) -> Any:
        """The :class:`ObjectConnection` of a client that opens ``obj``. May be ``async def``."""
        raise NotImplementedError

    @property
    def can_fetch(self) -> bool:
        return type(self).to_bytes is not ObjectType.to_bytes

    @property
    def can_open(self) -> bool:
        return type(self).create_client_connection is not ObjectType.create_client_connection


def as_type(given: Any) -> ObjectType:
    """``given``, a type of objects or a class of one. Raises ``TypeError``, ``ValueError``."""
    made = given() if isinstance(given, type) else given
    if not isinstance(made, ObjectType):
        raise TypeError(f"{given!r} is not a sqlrooms_server.ObjectType.")
    if not made.name:
        made.name = type(made).__name__
    if type(made).is_type is ObjectType.is_type:
        raise ValueError(f"The object type {made.name!r} needs is_type().")
    if not made.can_fetch and not made.can_open:
        raise ValueError(
            f"The object type {made.name!r} needs to_bytes() or create_client_connection()."
        )
    return made
