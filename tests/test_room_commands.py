"""What the items of a room ask of its document, with a document that answers as told."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.rooms import commands
from sqlrooms_server.rooms.child import RefusedByLoro
from sqlrooms_server.rooms.driver import Driver
from sqlrooms_server.rooms.keeping import Keeping, RoomLimits
from sqlrooms_server.rooms.room import Failed, Item, Join, Outcome, Presence, Room, Update


class Store:
    """A store that has stored everything at once."""

    def append(self, room: str, updates: Any, line: Any, done: Any) -> None:
        done(None)


@pytest.mark.parametrize(
    "items",
    [
        [Update("a", b"1"), Update("b", b"2"), Update("a", b"3")],
        [Join("a", b"")],
        [Presence("a", b"")],
    ],
)
def test_all_that_is_refused_is_told(items: list[Item]) -> None:
    def ask(*fields: Any, blobs: Any = ()) -> Any:
        raise RefusedByLoro("no")

    limits = RoomLimits(max_size=1000, memory=0, history=0, idle_seconds=1)
    keeping = Keeping(cast(Any, Store()), limits, ask)
    told: list[Outcome] = []
    commands.run(Room("r", cast(Driver, None)), items, keeping, told.append)
    (outcome,) = told
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, BadRequest)
    assert outcome.items == items
