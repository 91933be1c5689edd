"""What the clients of rooms are answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.errors import Busy, QueryId, ServerError
from sqlrooms_server.features.membership import Member
from sqlrooms_server.protocol import encode
from sqlrooms_server.rooms.room import Update


@dataclass(frozen=True, slots=True)
class Answer:
    """How an update is answered: with messages of type ``kind``, or if that is empty, a status."""

    kind: str
    id: QueryId | None = None


BARE = Answer("crdt-update-ack")
FRAMED = Answer("")
SNAPSHOT = Answer("crdt-snapshot-ack")


def about(name: str, error: ServerError) -> ServerError:
    """A copy of ``error`` that says which room it is about."""
    copy = type(error)(str(error))
    copy.room = name
    return copy


def presence_message(name: str, data: bytes) -> bytes:
    """``data`` is base64."""
    return encode({"type": "crdt-presence", "roomId": name, "data": data.decode()})


def acknowledge(items: Sequence[Update], statuses: Sequence[str | ServerError]) -> None:
    """Send the answers to ``items``, to each client together."""
    acks: dict[Member, list[dict[str, Any]]] = {}
    for item, status in zip(items, statuses, strict=True):
        _add_ack(acks.setdefault(item.client, []), item, status)
    for member, fields in acks.items():
        member.peer.send_all([encode(ack) for ack in fields])
        is_busy = any(ack["type"] == "error" and ack["code"] == Busy.code for ack in fields)
        if is_busy and not member.has_versions:
            # The published connector ignores errors, but sends all it has when it connects again.
            member.peer.close(1013, "What was sent to a room was not stored; connect again.")


def _add_ack(acks: list[dict[str, Any]], item: Update, status: str | ServerError) -> None:
    """Add the answer to ``item``, to the last one if that says the same."""
    answer: Answer = item.answer
    room = item.client.room
    if answer.kind:
        if isinstance(status, ServerError):
            acks.append({"type": "error", "roomId": room, **_told(status)})
        else:
            acks.append({"type": answer.kind, "roomId": room})
        return
    last = acks[-1] if acks else {}
    if last.get("status") == status:
        last["count"] = last.get("count", 1) + 1
        last.pop("id", None)
    else:
        last = {"type": "crdt-update-ack", "roomId": room}
        acks.append(last)
        if isinstance(status, ServerError):
            last.update(status="rejected", **_told(status))
        else:
            last["status"] = status
    if answer.id is not None:
        last["id"] = answer.id


def _told(error: ServerError) -> dict[str, str]:
    return {"error": str(error), "code": error.code}
