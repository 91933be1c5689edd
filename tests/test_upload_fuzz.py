"""Damaged uploads: an error or a table, but never the end of the process.

``SQLROOMS_FUZZ=100000`` tries that many, with a seed of its own each time it is set.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from decimal import Decimal

import pyarrow as pa
import pytest

from tests.conftest import ServerProcess
from tests.wire import Wire, framed

ROWS = 300
TABLE = pa.table(
    {
        "i": pa.array(range(ROWS), pa.int64()),
        "s": pa.array([None if n % 3 == 0 else "text " * (n % 9) for n in range(ROWS)]),
        "l": pa.array([[f"x{n}", None][: n % 3] for n in range(ROWS)], pa.list_(pa.string())),
        "t": pa.array([{"a": n, "b": [n] * (n % 4)} for n in range(ROWS)]),
        "m": pa.array([[("k", n)] for n in range(ROWS)], pa.map_(pa.string(), pa.int32())),
        "f": pa.array([[n, n] for n in range(ROWS)], pa.list_(pa.int16(), 2)),
        "d": pa.array([f"word {n % 5}" for n in range(ROWS)]).dictionary_encode(),
        "b": pa.array([n % 2 == 0 for n in range(ROWS)]),
        "x": pa.array([Decimal(n) for n in range(ROWS)], pa.decimal128(20, 3)),
        "y": pa.array([bytes([n % 256]) * 5 for n in range(ROWS)], pa.binary()),
        "z": pa.array([f"view {n}" * 3 for n in range(ROWS)], pa.string_view()),
        "n": pa.nulls(ROWS),
    }
)


def stream(compression: str | None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, TABLE.schema, options=options) as writer:
        writer.write_table(TABLE, max_chunksize=100)
    return sink.getvalue()


def damaged(payload: bytes, chance: random.Random) -> bytes:
    data = bytearray(payload)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data))
        match chance.randrange(6):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                at -= at % 4
                data[at : at + 4] = chance.choice((b"\xff\xff\xff\x7f", b"\0\0\0\x80", bytes(4)))
            case 3:
                del data[at : at + chance.choice((1, 4, 8, 64, 1000))]
            case 4:
                part = data[at : at + chance.choice((1, 8, 64, 1000))]
                data[at:at] = part
            case _:
                data = data[: at + 1]
        if not data:
            return b"\0"
    return bytes(data)


def try_one(wire: Wire, payload: bytes, number: int, chance: random.Random) -> None:
    header = {"type": "uploadArrow", "tableName": "t", "queryId": number}
    if number % 2:
        wire.send_raw(framed(header, payload))
    else:
        cut = chance.randrange(len(payload))
        wire.send_raw(framed({**header, "seq": 0, "last": False}, payload[: cut + 1]))
        wire.send_raw(framed({**header, "seq": 1, "last": True}, payload[cut + 1 :]))
    while True:
        reply = wire.receive()
        if reply["type"] != "uploadProgress":
            break
    assert reply["type"] in ("uploadAck", "error") and reply["queryId"] == number, reply
    assert reply.get("code") != "internal", reply
    if reply["type"] == "uploadAck":
        # What was let in must be readable.
        read = wire.arrow("from t", f"read {number}")
        assert isinstance(read, dict) or read.table() is not None


@pytest.mark.timeout(0)
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_damaged_uploads(serve: Callable[..., ServerProcess], compression: str | None) -> None:
    server = serve()
    payload = stream(compression)
    count = int(os.environ.get("SQLROOMS_FUZZ", "0"))
    seed = random.randrange(1 << 30) if count else 2026
    chance = random.Random(seed)
    with server.connect() as wire:
        for number in range(count or 200):
            try:
                try_one(wire, damaged(payload, chance), number, chance)
            except BaseException:
                print(f"payload {number} of seed {seed}, {compression}")
                raise
        assert wire.rows("select 1 as a") == [{"a": 1}]
