"""A reply under way: room, hunger, and ends that nobody takes for complete."""

from __future__ import annotations

from sqlrooms_server.outbox import HIGH_BYTES, LOW_BYTES, Outbox
from sqlrooms_server.transport.connection import FRAGMENT_BYTES, Pull


class Recorded:
    """An outbox and what it called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.outbox = Outbox(
            on_room=lambda: self.calls.append("room"),
            on_data=lambda: self.calls.append("data"),
            on_sent=lambda: self.calls.append("sent"),
        )


def test_chunks_come_out_in_order_as_fragments() -> None:
    outbox = Recorded().outbox
    outbox.put(b"a" * 10)
    outbox.put(b"b" * (FRAGMENT_BYTES + 5))
    assert outbox.pull() == (b"a" * 10, False)
    assert outbox.pull() == (b"b" * FRAGMENT_BYTES, False)
    outbox.finish()
    assert outbox.pull() == (b"b" * 5, True)


def test_an_end_after_the_last_chunk_is_an_empty_fragment() -> None:
    outbox = Recorded().outbox
    outbox.put(b"a")
    assert outbox.pull() == (b"a", False)
    assert outbox.pull() is Pull.NOT_READY
    outbox.finish()
    assert outbox.pull() == (b"", True)


def test_room_is_told_once_it_is_half_empty() -> None:
    recorded = Recorded()
    chunk = b"x" * (HIGH_BYTES // 4)
    assert [recorded.outbox.put(chunk) for _ in range(4)] == [False, False, False, True]
    pulled = 0
    while "room" not in recorded.calls:
        fragment = recorded.outbox.pull()
        assert not isinstance(fragment, Pull)
        pulled += len(fragment[0])
    assert HIGH_BYTES - pulled < LOW_BYTES
    assert recorded.calls == ["room"]


def test_data_is_told_only_to_who_asked_in_vain() -> None:
    recorded = Recorded()
    recorded.outbox.put(b"a")
    assert recorded.calls == []
    recorded.outbox.pull()
    assert recorded.outbox.pull() is Pull.NOT_READY
    recorded.outbox.put(b"b")
    recorded.outbox.put(b"c")
    assert recorded.calls == ["data"]


def test_a_failure_before_the_first_byte_leaves_nothing() -> None:
    recorded = Recorded()
    recorded.outbox.put(b"a")
    recorded.outbox.fail(b"broken")
    assert recorded.outbox.pull() is Pull.WITHDRAWN
    recorded.outbox.sent()
    assert recorded.calls == []


def test_a_failure_between_chunks_breaks_the_message() -> None:
    outbox = Recorded().outbox
    outbox.put(b"a")
    outbox.pull()
    outbox.put(b"b")
    outbox.fail(b"broken")
    assert outbox.pull() == (b"broken", True)


def test_a_failure_inside_a_chunk_ends_there() -> None:
    outbox = Recorded().outbox
    outbox.put(b"a" * (FRAGMENT_BYTES + 1))
    outbox.pull()
    outbox.fail(b"broken")
    assert outbox.pull() == (b"", True)
    assert not outbox.put(b"late")


def test_sent_is_told_for_a_whole_message() -> None:
    recorded = Recorded()
    recorded.outbox.put(b"a")
    recorded.outbox.finish()
    recorded.outbox.pull()
    recorded.outbox.sent()
    assert recorded.calls == ["sent"]
