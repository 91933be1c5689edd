"""The processes of documents, without a server."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest
from loro import LoroDoc

from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.rooms import driver
from sqlrooms_server.rooms.child import Child
from sqlrooms_server.rooms.keeping import RoomLimits
from sqlrooms_server.rooms.pool import Pool
from sqlrooms_server.rooms.room import Applied, Outcome, Update
from tests.loro_client import updates_of
from tests.wire import DEADLINE

LIMITS = RoomLimits(max_size=1 << 20, memory=0, history=0, idle_seconds=60)


def test_rooms_that_move_while_the_pool_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every room is too large for the process of the small ones.
    monkeypatch.setattr(driver, "LARGE_BYTES", 0)
    store = RoomStore(":memory:")
    told: list[Outcome] = []
    pool = Pool(store, LIMITS, told.append)
    doc = LoroDoc()
    doc.get_map("m").insert("a", 1)
    doc.commit()
    for name in "abc":
        pool.put(pool.room(name), Update("client", updates_of(doc)))
    deadline = time.monotonic() + DEADLINE
    pool.close(deadline)
    assert {(type(outcome), outcome.room.name) for outcome in told} == {
        (Applied, name) for name in "abc"
    }
    assert not pool.pids
    assert store.close(deadline)
    assert not [one.name for one in threading.enumerate() if one.name.startswith("rooms-")]


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = socket.socketpair()
    monkeypatch.setattr(socket, "socketpair", lambda: pair)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError, match="nowhere"):
        Child(0)
    assert [end.fileno() for end in pair] == [-1, -1]
