"""``crdt-join`` and the other messages of rooms: documents that clients change together."""

from __future__ import annotations

import base64
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sqlrooms_server.errors import BadRequest, Busy, Forbidden, ServerError, TooLarge
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.membership import Change, Member
from sqlrooms_server.features.room_answers import (
    BARE,
    FRAMED,
    SNAPSHOT,
    Answer,
    about,
    acknowledge,
    presence_message,
)
from sqlrooms_server.messages import (
    RoomJoin,
    RoomLeave,
    RoomPresence,
    RoomSnapshot,
    RoomUpdate,
)
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode, encode_error
from sqlrooms_server.rates import Rates
from sqlrooms_server.rooms.pool import Pool
from sqlrooms_server.rooms.room import (
    Answered,
    Applied,
    Failed,
    Item,
    Join,
    Joined,
    Leave,
    Left,
    Outcome,
    Presence,
    Read,
    Room,
    Told,
    Unload,
    Unloaded,
    Update,
)
from sqlrooms_server.settings import Settings

# What may wait for one room, and from one connection. A message of its own may be larger.
MAX_WAITING_BYTES = 64 << 20

# What an item costs besides its bytes.
_ITEM_BYTES = 300

MAX_PRESENCE_BYTES = 64 << 10

# Joins and leaves of one connection and one room that are not answered yet. None of them is large,
# but the answers are.
_MAX_ASKED = 32


@dataclass(eq=False)
class _Entry:
    room: Room
    members: dict[Peer, Member] = field(default_factory=dict)
    # It is to leave the memory.
    is_ending: bool = False


class Rooms(Feature):
    """A feature. ``open_pool`` makes the pool; it gets what is to be told of outcomes."""

    def __init__(
        self,
        settings: Settings,
        post: Callable[..., None],
        open_pool: Callable[[Callable[[Outcome], None]], Pool],
    ) -> None:
        self._settings = settings
        self._entries: dict[str, _Entry] = {}
        self._of_peer: dict[Peer, dict[str, Member]] = {}
        self._waiting: Counter[Peer] = Counter()
        self._rates: Rates[Peer] = Rates(settings.update_rate)
        self._tellers: dict[type, Callable[[Any], None]] = {
            Applied: self._applied,
            Joined: self._joined,
            Left: self._left,
            Told: self._told,
            Answered: lambda outcome: None,
            Failed: self._failed,
            Unloaded: self._unloaded,
        }
        self.pool = open_pool(lambda outcome: post(self._tell, outcome))

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {
            RoomJoin: self._join,
            RoomLeave: self._leave,
            RoomUpdate: self._update,
            RoomSnapshot: self._snapshot,
            RoomPresence: self._presence,
        }

    def closed(self, peer: Peer) -> None:
        self._rates.forget(peer)
        self._waiting.pop(peer, None)
        for name, member in self._of_peer.pop(peer, {}).items():
            member.is_in = member.is_joined = False
            self._drop(name, member)

    def read(self, name: str, item: Read) -> None:
        """Ask for the document of a room. Raises ``Busy``."""
        self._put(self._entry(name), item)

    def _join(self, peer: Peer, message: RoomJoin) -> None:
        name = message.room
        if name not in peer.role.read_rooms:
            text = f"The role {peer.role.name!r} may not join room {name!r} (read_rooms)."
            self._refuse(name, Forbidden(text))
        mine = self._of_peer.setdefault(peer, {})
        member = mine.get(name)
        if member is None:
            limit = self._settings.max_rooms_per_connection
            if len(mine) >= limit:
                self._refuse(
                    name,
                    Busy(
                        f"This connection is in {limit} rooms, which is the limit "
                        "(--max-rooms-per-connection)."
                    ),
                )
            entry = self._entry(name)
            member = Member(peer, name, self._settings.max_queued_bytes, self._settle)
        else:
            entry = self._entries[name]
            self._check_asked(member)
        self._put(entry, Join(member, message.version))
        member.is_in = True
        member.asked += 1
        mine[name] = entry.members[peer] = member
        entry.room.members = len(entry.members)

    def _leave(self, peer: Peer, message: RoomLeave) -> None:
        member = self._of_peer.get(peer, {}).get(message.room)
        if member is None:
            peer.send(encode({"type": "crdt-left", "roomId": message.room}))
            return
        self._check_asked(member)
        member.is_in = False
        self._put(self._entries[message.room], Leave(member))
        member.asked += 1

    def _check_asked(self, member: Member) -> None:
        if member.asked >= _MAX_ASKED:
            text = f"{member.asked} joins and leaves of this connection wait to be answered."
            self._refuse(member.room, Busy(text))

    def _update(self, peer: Peer, message: RoomUpdate) -> None:
        if message.room is None:
            member, answer = self._only_room(peer), BARE
        else:
            member = self._member(peer, message.room)
            answer = FRAMED if message.id is None else Answer("", message.id)
        limit = self._settings.max_update_size
        if member.room not in peer.role.write_rooms:
            error: ServerError = _read_only(member)
        elif not self._rates.allows(peer):
            error = self._too_fast()
        elif len(message.data) > limit:
            error = TooLarge(
                f"The update has {len(message.data)} bytes; at most {limit} are allowed "
                "(--max-update-size)."
            )
        else:
            self._put(self._entries[member.room], Update(member, message.data, answer))
            return
        # Behind the answers to those before.
        self._put(self._entries[member.room], Update(member, b"", answer, refused=error))

    def _only_room(self, peer: Peer) -> Member:
        """Where a bare update belongs."""
        mine = [member for member in self._of_peer.get(peer, {}).values() if member.is_in]
        if len(mine) == 1:
            return mine[0]
        if mine:
            raise BadRequest(
                f"A bare update was sent, but this connection is in {len(mine)} rooms; say "
                'which with the header {"type": "crdt-update", "roomId"}.'
            )
        raise BadRequest("A Loro update was sent, but this connection joined no room.")

    def _member(self, peer: Peer, name: str) -> Member:
        member = self._of_peer.get(peer, {}).get(name)
        if member is None or not member.is_in:
            self._refuse(name, BadRequest(f"This connection is not in room {name!r}; join first."))
        return member

    def _snapshot(self, peer: Peer, message: RoomSnapshot) -> None:
        member = self._member(peer, message.room)
        size = len(message.data) * 3 // 4
        error: ServerError | None = None
        if message.room not in peer.role.write_rooms:
            error = _read_only(member)
        elif size > self._settings.max_room_size:
            error = TooLarge(
                f"The snapshot has {size} bytes; at most {self._settings.max_room_size} are "
                "allowed (--max-room-size)."
            )
        if error is None:
            update = Update(member, message.data, SNAPSHOT, is_text=True)
        else:
            # Behind the answers to those before.
            update = Update(member, b"", SNAPSHOT, refused=error)
        self._put(self._entries[message.room], update)

    def _presence(self, peer: Peer, message: RoomPresence) -> None:
        member = self._member(peer, message.room)
        if len(message.data) > MAX_PRESENCE_BYTES:
            text = f"Presence has at most {MAX_PRESENCE_BYTES} bytes."
            self._refuse(message.room, TooLarge(text))
        if not self._rates.allows(peer):
            self._refuse(message.room, self._too_fast())
        self._put(self._entries[message.room], Presence(member, message.data.encode()))

    def _too_fast(self) -> Busy:
        rate = self._settings.update_rate
        return Busy(f"This connection sends more than {rate} updates a second (--update-rate).")

    def _entry(self, name: str) -> _Entry:
        """The room, taken up if need be. Raises ``Busy``."""
        entry = self._entries.get(name)
        if entry is None:
            limit = self._settings.max_rooms
            if len(self._entries) >= limit and not self._unload_idle():
                self._refuse(
                    name, Busy(f"There are {limit} rooms in use, which is the limit (--max-rooms).")
                )
            entry = self._entries[name] = _Entry(self.pool.room(name))
        return entry

    def _unload_idle(self) -> bool:
        """Begin to free the memory of rooms that nobody is in; whether there are any."""
        idle = (entry for entry in self._entries.values() if not entry.members)
        found = list(itertools.islice(idle, 10))
        for entry in found:
            if not entry.is_ending:
                entry.is_ending = True
                self.pool.put(entry.room, Unload(None))
        return bool(found) and len(self._entries) < self._settings.max_rooms + 10

    def _put(self, entry: _Entry, item: Item) -> None:
        room = entry.room
        size = item.size + _ITEM_BYTES
        peer = item.client.peer if isinstance(item.client, Member) else None
        waits = max(room.waiting_bytes, 0 if peer is None else self._waiting[peer])
        if item.size and waits and waits + size > MAX_WAITING_BYTES:
            error = Busy(
                f"{waits} bytes wait to be handled in room {room.name!r}, or from this connection; "
                "send more when they are answered."
            )
            if not isinstance(item, Update):
                self._refuse(room.name, error)
            item = Update(item.client, b"", item.answer, refused=error)
            size = _ITEM_BYTES
        room.waiting_bytes += size
        if peer is not None:
            self._waiting[peer] += size
        self.pool.put(room, item)

    def _tell(self, outcome: Outcome) -> None:
        """Something came of items, and is stored."""
        room = outcome.room
        room.touch()
        for item in outcome.items:
            size = item.size + _ITEM_BYTES
            room.waiting_bytes -= size
            if isinstance(item.client, Member) and item.client.peer in self._waiting:
                self._waiting[item.client.peer] -= size
        self._tellers[type(outcome)](outcome)

    def _applied(self, outcome: Applied) -> None:
        entry = self._entries[outcome.room.name]
        # The acks first: who sent something hears of it before it hears of more.
        acknowledge(outcome.items, outcome.statuses)
        if not outcome.delta:
            return
        senders = {client for client, _ in outcome.parts}
        whole = Change(outcome.room.name, outcome.delta)
        parts = [(client, Change(outcome.room.name, part)) for client, part in outcome.parts]
        for member in entry.members.values():
            if not member.is_joined:
                continue
            if member not in senders:
                member.send_update(whole)
                continue
            for client, part in parts:
                if client is not member:
                    member.send_update(part)

    def _joined(self, outcome: Joined) -> None:
        (item,) = outcome.items
        member: Member = item.client
        if not self._is_here(member):
            return
        member.asked -= 1
        member.is_joined = True
        member.has_versions = item.version is not None
        joined: dict[str, Any] = {"type": "crdt-joined", "roomId": member.room}
        if not member.has_versions:
            member.tell(encode(joined))
            member.send_snapshot(outcome.data)
            if outcome.since:
                member.send_update(Change(member.room, outcome.since))
            return
        joined["version"] = base64.b64encode(outcome.version).decode()
        if outcome.kind == "reset":
            joined["reset"] = True
        member.tell(encode(joined))
        kind = "crdt-update" if outcome.kind == "update" else "crdt-snapshot"
        member.send_document(kind, outcome.data)
        if outcome.presence:
            member.peer.send(presence_message(member.room, base64.b64encode(outcome.presence)))

    def _left(self, outcome: Left) -> None:
        member: Member = outcome.items[0].client
        if not self._is_here(member):
            return
        member.asked -= 1
        member.is_joined = False
        member.tell(encode({"type": "crdt-left", "roomId": member.room}))
        self._settle(member)

    def _told(self, outcome: Told) -> None:
        (item,) = outcome.items
        message = presence_message(outcome.room.name, item.data)
        for member in self._entries[outcome.room.name].members.values():
            if member.is_joined and member.has_versions and member is not item.client:
                member.peer.send(message)

    def _failed(self, outcome: Failed) -> None:
        for item in outcome.items:
            member = item.client
            if isinstance(item, Update):
                acknowledge([item], [outcome.error])
            elif isinstance(member, Member):
                member.tell(encode_error(about(outcome.room.name, outcome.error)))
                if isinstance(item, Join | Leave) and self._is_here(member):
                    member.asked -= 1
                    if not member.is_joined and not member.asked:
                        member.is_in = False
                    self._settle(member)

    def _unloaded(self, outcome: Unloaded) -> None:
        # It may have been asked for more than once.
        entry = self._entries.get(outcome.room.name)
        if entry is None or entry.room is not outcome.room:
            return
        entry.is_ending = False
        if self.pool.forget(outcome.room):
            del self._entries[outcome.room.name]

    def _is_here(self, member: Member) -> bool:
        """Whether its connection is."""
        return self._of_peer.get(member.peer, {}).get(member.room) is member

    def _settle(self, member: Member) -> None:
        """Forget ``member`` if it is out of its room and has been sent all of it."""
        is_out = not (member.is_in or member.is_joined or member.asked or member.is_sending)
        if is_out and self._is_here(member):
            del self._of_peer[member.peer][member.room]
            self._drop(member.room, member)

    def _drop(self, name: str, member: Member) -> None:
        entry = self._entries[name]
        if entry.members.get(member.peer) is member:
            del entry.members[member.peer]
            entry.room.members = len(entry.members)
            entry.room.touch()

    def _refuse(self, name: str, error: ServerError) -> NoReturn:
        raise about(name, error)


def _read_only(member: Member) -> Forbidden:
    role = member.peer.role.name
    return Forbidden(f"The role {role!r} may not change room {member.room!r} (write_rooms).")


class NoRooms(Feature):
    """A feature: says how to get rooms."""

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        kinds = (RoomJoin, RoomLeave, RoomUpdate, RoomSnapshot, RoomPresence)
        return {kind: self._refuse for kind in kinds}

    def _refuse(self, peer: Peer, message: Any) -> None:
        error = BadRequest("This server has no rooms; start it with --sync.")
        error.room = message.room
        raise error
