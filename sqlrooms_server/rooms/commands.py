"""What the items of a room ask of its document, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from sqlrooms_server.db.room_store import Blob
from sqlrooms_server.errors import BadRequest, Gone, InternalError, ServerError, TooLarge
from sqlrooms_server.rooms.child import RefusedByLoro
from sqlrooms_server.rooms.keeping import LARGE_BYTES, Keeping
from sqlrooms_server.rooms.room import (
    Answered,
    Applied,
    Document,
    Failed,
    Item,
    Join,
    Joined,
    Outcome,
    Presence,
    Read,
    Room,
    Told,
    Update,
)

Tell = Callable[[Outcome], None]


def changes(item: Item) -> bool:
    """Whether the document is changed, rather than read."""
    return isinstance(item, Update | Presence)


def run(room: Room, items: Sequence[Any], keeping: Keeping, tell: Tell) -> None:
    """Ask what ``items`` are about, and tell it when everything before is stored.

    Raises what :meth:`Child.ask` does, but what Loro refuses is told as that.
    """
    item = items[0]
    outcome: Outcome
    try:
        if isinstance(item, Update):
            _apply(room, items, keeping, tell)
            return
        if isinstance(item, Join):
            outcome = _join(room, item, keeping)
        elif isinstance(item, Presence):
            keeping.ask("presence", room.name, blobs=[item.data])
            outcome = Told(room, [item])
        else:
            assert isinstance(item, Read)
            _read(room, item, keeping, tell)
            return
    except RefusedByLoro as error:
        outcome = Failed(room, list(items), BadRequest(str(error)))
    _tell_stored(room, (), outcome, keeping, tell)


def _tell_stored(
    room: Room, updates: Sequence[Blob], outcome: Outcome, keeping: Keeping, tell: Tell
) -> None:
    def done(error: BaseException | None) -> None:
        tell(outcome if error is None else Failed(room, outcome.items, _not_stored(room, error)))

    keeping.store.append(room.name, updates, room.line, done)


def _not_stored(room: Room, error: BaseException) -> ServerError:
    return InternalError(f"What was sent to room {room.name!r} could not be stored: {error}")


def _apply(room: Room, items: Sequence[Update], keeping: Keeping, tell: Tell) -> None:
    refused, space = _refused(room, items, keeping)
    fitting = [item for item, error in zip(items, refused, strict=True) if error is None]
    if not fitting:
        outcome = Applied(room, list(items), [e for e in refused if e is not None], b"", [])
        _tell_stored(room, (), outcome, keeping, tell)
        return
    # Numbers for the clients, which the process does not know.
    clients: list[Hashable] = list(dict.fromkeys(item.client for item in fitting))
    numbers = {client: number for number, client in enumerate(clients)}
    (told, senders, is_whole), (_, delta, *rest) = keeping.ask(
        "apply",
        room.name,
        [numbers[item.client] for item in fitting],
        [number for number, item in enumerate(fitting) if item.is_text],
        space,
        blobs=[item.data if type(item.data) is bytes else bytes(item.data) for item in fitting],
    )
    answers = iter(told)
    statuses = [
        _status(room, next(answers), keeping) if error is None else error for error in refused
    ]
    # The number of nobody is -1.
    parts = [
        (clients[number] if number >= 0 else None, part)
        for number, part in zip(senders, rest, strict=False)
    ]
    pending = rest[len(senders) :]
    outcome = Applied(room, list(items), statuses, delta, parts)
    if delta or pending:
        room.updated_ms = int(time.time() * 1000)
    if is_whole or len(delta) > LARGE_BYTES:
        # Written once, as a snapshot in parts, and with other rooms in between.
        keeping.compact(room, wait=True)
        delta = b""
    stored = [part for part in (delta, *pending) if part]
    _note(room, stored)
    _tell_stored(room, stored, outcome, keeping, tell)


def _refused(
    room: Room, items: Sequence[Update], keeping: Keeping
) -> tuple[list[ServerError | None], int]:
    """Why each of ``items`` is not taken: the room has no space for it, for one.

    And the space that is left for what is new in snapshots of clients. Those who connect again send
    all that they have, most of which the room has, too.
    """
    wanted = sum(item.size for item in items)
    if room.size + room.log_bytes + wanted > keeping.limits.max_size and room.log_rows:
        # The log is larger than what a snapshot makes of it.
        keeping.compact(room)
        keeping.load(room)
    size = room.size + room.log_bytes
    refused: list[ServerError | None] = []
    for item in items:
        error = item.refused
        if error is None and not item.is_text:
            if size + item.size > keeping.limits.max_size:
                error = _no_space(room, keeping)
            else:
                size += item.size
        refused.append(error)
    return refused, keeping.limits.max_size - size


def _no_space(room: Room, keeping: Keeping) -> TooLarge:
    return TooLarge(
        f"Room {room.name!r} would have more than {keeping.limits.max_size} bytes "
        "(--max-room-size)."
    )


def _status(room: Room, status: Any, keeping: Keeping) -> str | ServerError:
    if isinstance(status, str):
        return status
    text, code = status
    if code == "too_large":
        return _no_space(room, keeping)
    if code == "gone":
        return Gone(f"The update needs history that is gone (--room-history): {text}")
    return BadRequest(f"This is no update that Loro can take: {text}")


def _note(room: Room, stored: Sequence[Blob]) -> None:
    if stored:
        if not room.log_rows:
            room.log_since = time.monotonic()
        room.log_rows += len(stored)
        room.log_bytes += sum(map(len, stored))


def _join(room: Room, item: Join, keeping: Keeping) -> Joined:
    if item.version is not None:
        (kind,), (version, data, presence) = keeping.ask("missing", room.name, blobs=[item.version])
        return Joined(room, [item], bytes(version), kind, data, presence=presence)
    (is_new,), (version, snapshot, since) = keeping.ask(
        "whole", room.name, bool(room.base), len(room.base), blobs=[room.base_version]
    )
    if is_new:
        room.base, room.base_version = snapshot, bytes(version)
    return Joined(room, [item], bytes(version), "snapshot", room.base, since)


def _read(room: Room, item: Read, keeping: Keeping, tell: Tell) -> None:
    (), (json,) = keeping.ask("json", room.name)
    document = Document(room.name, bytes(json), room.updated_ms)

    def done(error: BaseException | None) -> None:
        tell(Answered(room, [item]))
        item.tell(document if error is None else _not_stored(room, error))

    keeping.store.append(room.name, (), room.line, done)
