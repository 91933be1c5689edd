"""One document, without its process: what is applied, and what each sender has to hear of."""

from __future__ import annotations

import struct

import pytest
from loro import ExportMode, LoroDoc, VersionVector

from sqlrooms_server.rooms.documents import NOBODY, Broken, Document
from tests.loro_client import checksum

SPACE = 1 << 30


class Author:
    """A client that makes updates."""

    def __init__(self) -> None:
        self.doc = LoroDoc()

    def set(self, key: str, value: object) -> bytes:
        before = self.doc.oplog_vv
        self.doc.get_map("m").insert(key, value)
        return self._since(before)

    def write(self, text: str) -> bytes:
        before = self.doc.oplog_vv
        self.doc.get_text("t").insert(0, text)
        return self._since(before)

    def snapshot(self) -> bytes:
        return bytes(self.doc.export(ExportMode.Snapshot()))

    def _since(self, before: VersionVector) -> bytes:
        self.doc.commit()
        return bytes(self.doc.export(ExportMode.Updates(before)))


def test_each_part_is_what_its_sender_has_made() -> None:
    one, two = Author(), Author()
    document = Document()
    updates = [
        (0, one.set("a", 1)),
        (0, one.set("b", 2)),
        (1, two.set("c", 3)),
        (1, b"loro no update"),
        (0, one.set("d", 4)),
    ]
    applied = document.apply(updates, SPACE)
    assert [status if isinstance(status, str) else "refused" for status in applied.statuses] == [
        "applied",
        "applied",
        "applied",
        "refused",
        "applied",
    ]
    assert [sender for sender, _ in applied.parts] == [0, 1, 0]
    hears_two, hears_all = LoroDoc(), LoroDoc()
    for sender, part in applied.parts:
        if sender == 1:
            hears_two.import_(part)
    hears_all.import_(applied.delta)
    assert hears_two.get_deep_value() == {"m": {"c": 3}}
    assert hears_all.get_deep_value() == {"m": {"a": 1, "b": 2, "c": 3, "d": 4}}
    assert document.apply(updates[:1], SPACE).delta == b""


def test_an_update_that_waits_for_another() -> None:
    author = Author()
    first, second = author.set("a", 1), author.set("b", 2)
    document = Document()
    waits = document.apply([(0, second)], SPACE)
    assert (waits.statuses, waits.delta, waits.pending) == (["pending"], b"", [second])
    both = document.apply([(1, first)], SPACE)
    assert both.statuses == ["applied"]
    copy = LoroDoc()
    copy.import_(both.delta)
    assert copy.get_deep_value() == {"m": {"a": 1, "b": 2}}


def test_a_snapshot_without_history_among_others() -> None:
    author, other = Author(), Author()
    for number in range(10):
        author.set("n", number)
    cut = ExportMode.ShallowSnapshot(author.doc.oplog_frontiers)
    shallow = bytes(author.doc.export(cut))
    document = Document()
    updates = [(0, shallow), (1, author.set("x", 1)), (1, other.set("y", 1))]
    applied = document.apply(updates, SPACE)
    assert applied.statuses[:2] == ["applied", "applied"]
    # It is concurrent with what nobody knows any more.
    assert applied.statuses[2][1] == "gone"
    assert applied.is_whole
    assert [sender for sender, _ in applied.parts] == [NOBODY]
    copy = LoroDoc()
    copy.import_(applied.delta)
    assert copy.get_deep_value() == {"m": {"n": 9, "x": 1}}


# The document on which Loro panicked is given up, and complains of that when it is freed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_crafted_update_that_spoils_snapshots() -> None:
    """What others have done stays readable, by way of updates."""
    author, other = Author(), Author()
    author.doc.peer_id = 1
    author.set("good", 1)
    author.doc.get_map("m").insert("evil", [1, {"a": "b"}])
    author.doc.commit()
    crafted = bytearray(author.doc.export(ExportMode.Updates(VersionVector())))
    crafted[55] = 18
    crafted[16:20] = struct.pack("<I", checksum(bytes(crafted[20:])))
    updates = [(0, bytes(crafted)), (1, other.set("kept", True))]
    document = Document()
    assert document.apply(updates, SPACE).statuses == ["applied", "applied"]
    with pytest.raises(Broken):
        document.snapshot()
    plain = Document(is_plain=True)
    plain.apply(updates, SPACE)
    again = Document(is_plain=True)
    again.load(plain.snapshot()[0], [])
    assert again.version == plain.version
    update = other.set("more", 2)
    assert again.apply([(1, update)], SPACE).statuses == ["applied"]


@pytest.mark.parametrize("as_snapshot", [False, True])
def test_a_long_text(as_snapshot: bool) -> None:
    """Loro would take minutes for it in a document whose state is behind its log."""
    author = Author()
    update = author.write("abcdefgh" * (1 << 20))
    document = Document()
    small = author.set("a", 1)
    whole = author.snapshot() if as_snapshot else update
    assert document.apply([(0, whole), (0, small)], SPACE).statuses == ["applied", "applied"]
    loaded = Document()
    assert loaded.load(b"", [update, small]) == {}
    assert loaded.version == document.version
