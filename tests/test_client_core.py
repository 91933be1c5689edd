"""The parts of the client that know no socket: values, streams, which texts are reads."""

from __future__ import annotations

import json
import math
import queue
import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.client.bar import NotebookBar, TerminalBar, describe, reporter
from sqlrooms_server.client.channels import Hearing
from sqlrooms_server.client.errors import ConnectionLost
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import decode
from sqlrooms_server.client.reads import is_read
from sqlrooms_server.client.replies import Message, Progress, Subscribed
from sqlrooms_server.client.streams import BatchDecoder, as_reader, upload_chunks
from sqlrooms_server.client.values import encode_parameters
from tests.wire import ipc


@pytest.mark.parametrize("value", [None, True, -(1 << 63), (1 << 63) - 1, 1.5, "x", [1, None]])
def test_plain_parameters(value: Any) -> None:
    assert encode_parameters([value]) == [value]
    assert encode_parameters({"a": value}) == {"a": value}


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (1 << 63, "HUGEINT", "9223372036854775808"),
        ((1 << 128) - 1, "UHUGEINT", str((1 << 128) - 1)),
        (math.nan, "DOUBLE", "nan"),
        (-math.inf, "DOUBLE", "-infinity"),
        (b"\0a", "BLOB", "AGE="),
        (Decimal("-1.100"), "DECIMAL(4,3)", "-1.100"),
        (Decimal("1E+3"), "DECIMAL(4,0)", "1000"),
        (Decimal("0.001"), "DECIMAL(3,3)", "0.001"),
        (datetime(2026, 1, 2, 3, 4, 5, 6), "TIMESTAMP", "2026-01-02 03:04:05.000006"),
        (
            datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=1))),
            "TIMESTAMPTZ",
            "2026-01-02 02:00:00+00:00",
        ),
        (date(1, 1, 2), "DATE", "0001-01-02"),
        (time(1, 2, 3), "TIME", "01:02:03"),
        (timedelta(days=-1, seconds=5), "INTERVAL", "-1 days 5 seconds 0 microseconds"),
        (uuid.UUID(int=5), "UUID", "00000000-0000-0000-0000-000000000005"),
    ],
)
def test_typed_parameters(value: Any, kind: str, text: str) -> None:
    typed = {"$type": kind, "value": text}
    assert encode_parameters([value]) == [typed]
    assert encode_parameters({"a": {"b": [value]}}) == {"a": {"b": [typed]}}


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ([1, object()], r"params\[1\] .*object"),
        ({"a": [0, {"b": 1j}]}, r"params\.a\[1\]\.b .*complex"),
        ([1 << 128], r"params\[0\] .*128 bits"),
        ([Decimal("NaN")], r"params\[0\] .*not finite"),
        ([Decimal(10) ** 40], r"params\[0\] .*38 digits"),
        ([{1: 2}], r"in params\[0\]"),
        ({1: 2}, "The name 1"),
        ("text", "params is a str"),
        (5, "params is a int"),
    ],
)
def test_what_cannot_be_a_parameter_is_named(params: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        encode_parameters(params)


@pytest.mark.parametrize("size", [1, 7, 8, 100, 1 << 20])
def test_streams_can_be_cut_anywhere(size: int) -> None:
    values = pa.array(["a", "b", None]).dictionary_encode()
    table = pa.table({"e": values, "i": [1, 2, 3], "l": [[1], None, [2, 3]]})
    stream = memoryview(ipc(pa.concat_tables([table, table])))
    decoder = BatchDecoder()
    batches = []
    for start in range(0, len(stream), size):
        decoder.feed(stream[start : start + size])
        while (batch := decoder.next_batch()) is not None:
            batches.append(batch)
    decoder.check_end()
    assert pa.Table.from_batches(batches, decoder.schema).equals(pa.concat_tables([table, table]))


def test_cut_and_broken_streams_are_refused() -> None:
    stream = ipc(pa.table({"a": [1]}))
    cut = BatchDecoder()
    cut.feed(memoryview(stream[:-8]))
    assert cut.next_batch() is not None
    assert cut.next_batch() is None
    longer = BatchDecoder()
    longer.feed(memoryview(stream + b"more"))
    assert longer.next_batch() is not None
    assert longer.next_batch() is None
    for decoder in (cut, longer):
        with pytest.raises(ConnectionLost, match="cut"):
            decoder.check_end()
    with pytest.raises(ConnectionLost, match="no Arrow stream"):
        BatchDecoder().feed(memoryview(b"no stream at all"))


def test_uploads_are_chunks_of_messages_of_a_limited_size() -> None:
    table = pa.table({"a": ["x" * 1000] * 30_000, "b": range(30_000)}).combine_chunks()
    chunks = list(upload_chunks(as_reader(table)))
    assert [is_last for _, is_last in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {len(chunk) for chunk, _ in chunks[:-1]} == {1 << 20}
    reader = pa.ipc.open_stream(b"".join(chunk for chunk, _ in chunks))
    batches = list(reader)
    assert len(batches) == 4
    assert all(batch.nbytes <= 8 << 20 for batch in batches)
    assert pa.Table.from_batches(batches).equals(table)


def test_a_large_dictionary_does_not_split_its_rows() -> None:
    words = pa.array([f"{number:01000d}" for number in range(10_000)])
    table = pa.table({"d": pa.DictionaryArray.from_arrays(pa.array([1, 2, 3]), words)})
    stream = b"".join(chunk for chunk, _ in upload_chunks(as_reader(table)))
    assert len(list(pa.ipc.open_stream(stream))) == 1


def test_what_can_be_uploaded() -> None:
    class Exporter:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return table.__arrow_c_stream__(requested_schema)

    table = pa.table({"a": [1, 2]})
    batch = table.to_batches()[0]
    for data in (table, batch, table.to_reader(), Exporter()):
        assert as_reader(data).read_all().equals(table)
    with pytest.raises(TypeError, match="list"):
        as_reader([1, 2])


@pytest.mark.parametrize(
    "sql",
    [
        "select 1",
        " ( select 1) ;\n",
        "-- why\n/* because */ FROM t",
        "with a as (select 1) from a",
        "values (1)",
        "describe t",
        "explain select 1",
    ],
)
def test_reads(sql: str) -> None:
    assert is_read(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "create table t(i int)",
        "insert into t values (1)",
        "with a as (select 1) insert into t from a",
        "WITH a AS (DELETE FROM t RETURNING i) FROM a",
        "select 1; select 2",
        "select 1; drop table t",
        "explain analyze insert into t values (1)",
        "select nextval('s')",
        "begin",
        "call f()",
        "/* select",
    ],
)
def test_what_might_change_something_is_no_read(sql: str) -> None:
    assert not is_read(sql)


def test_messages_of_unknown_types_and_cut_results_are_ignored() -> None:
    assert decode('{"type": "crdt-update", "payload": 1}') is None
    assert decode('{"type":"json","queryId":1,"data":"[{') is None
    for broken in ('{"type": "ok"}', "[1]", "1", "{", b"\xff\xff\xff\xff{}"):
        with pytest.raises((ValueError, LookupError, TypeError)):
            decode(broken)


# What a connection hears when a subscription to its channel is added to another one, which was
# told the messages 1 to 7: numbers are messages, None says that the new one is subscribed.
@pytest.mark.parametrize(
    ("since", "stream", "first", "second"),
    [
        (None, [8, 9, None, 10], [8, 9, 10], [10]),
        ("r-5", [6, 7, None, 8], [8], [6, 7, 8]),
        ("r-5", [8, 9, 6, 7, 8, 9, None, 10], [8, 9, 10], [6, 7, 8, 9, 10]),
        ("r-5", [8, 8, None, 9], [8, 9], [8, 9]),
        ("r-7", [8, 9, 8, 9, None], [8, 9], [8, 9]),
        ("r-9", [8, 9, None, 10], [8, 9, 10], [10]),
        # For a third one, which has read less, and then for the second.
        ("r-5", [4, 5, 6, 7, 6, 7, None, 8], [8], [6, 7, 8]),
        ("r-5", [4, 5, 6, 7, 8, 6, 7, 8, None, 9], [8, 9], [6, 7, 8, 9]),
        # Another run of the server, and nonsense.
        ("q-3", [8, 9, None, 10], [8, 9, 10], [10]),
        ("", [8, 9, None, 10], [8, 9, 10], [10]),
    ],
)
def test_subscriptions_of_one_connection_tell_their_messages_apart(
    since: str | None, stream: list[int | None], first: list[int], second: list[int]
) -> None:
    link = Link(lambda message: None, queue.SimpleQueue)
    hearings = [link.hear(1, "c", None, False)]
    newest = 7

    def receive(number: int | None) -> None:
        if number is not None:
            fields = {"type": "notify", "payload": number, "offset": f"r-{number}"}
        else:
            fields = {"type": "subscribed", "queryId": len(hearings), "recovered": True}
            fields["offset"] = f"r-{newest}"
        link.receive(json.dumps({"channel": "c", **fields}))

    receive(None)
    hearings.append(link.hear(2, "c", since, False))
    for number in stream:
        newest = max(newest, number or 0)
        receive(number)
    assert [told(hearing) for hearing in hearings] == [first, second]


def told(hearing: Hearing) -> list[int]:
    """The messages that wait, after the reply that it is subscribed."""
    assert isinstance(hearing.read(), Subscribed)
    messages = []
    while isinstance(message := hearing.read(), Message):
        messages.append(message.payload)
    return messages


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def running(percent: float | None, ms: float) -> Progress:
    return Progress("running", percent, None, 0, ms)


def test_the_bar_of_a_terminal() -> None:
    terminal = Terminal()
    bar: Any = TerminalBar(terminal)  # type: ignore[arg-type]
    bar.show(running(10, 400))
    bar.clear()
    assert terminal.text == ""
    bar.show(running(50, 12_000))
    assert terminal.text == f"\r[{'#' * 15}{'.' * 15}] 50 %, 12 s\x1b[K"
    bar.clear()
    assert terminal.text.endswith("\r\x1b[K")


def test_progress_in_words() -> None:
    assert describe(running(None, 3000)) == "running, 3 s"
    assert describe(Progress("queued", None, 4, 2000, 0)) == "waiting, 4 before it, 2 s"


def test_the_bar_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython is not installed here; this is what is used of it."""
    import sys
    import types

    shown: list[str] = []

    class Handle:
        def update(self, html: str) -> None:
            shown.append(html)

    def display(html: str, *, display_id: bool) -> Handle:
        assert display_id
        shown.append(html)
        return Handle()

    class ZMQInteractiveShell: ...

    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = ZMQInteractiveShell
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.HTML = str
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)

    bar = reporter(True)
    assert isinstance(bar, NotebookBar)
    bar.show(running(5, 100))
    bar.show(running(50, 1000))
    bar.show(running(None, 2000))
    bar.clear()
    assert shown == [
        '<progress max="100" value="50"></progress> 50 %, 1 s',
        '<progress max="100" ></progress> running, 2 s',
        "",
    ]


def test_progress_goes_to_a_function_or_nowhere() -> None:
    seen: list[Progress] = []
    reporter(seen.append).show(running(1, 2))
    assert seen == [running(1, 2)]
    for option in (None, False, True):
        # Under pytest standard error is no terminal.
        assert not reporter(option).is_wanted
