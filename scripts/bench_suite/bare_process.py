"""The smallest program that answers over a socket: what any server in a process of its own costs.

    python bare_process.py PORT [TABLE.parquet ...]

One thread and DuckDB: one connection after another, one question at a time. A question is its
length and SQL; an answer is frames, each with its length and whether it is the last, of an Arrow
stream. A question that fails ends the process. It imports nothing of this package.
"""

from __future__ import annotations

import socket
import struct
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb

QUESTION = struct.Struct("!I")
FRAME = struct.Struct("!Q?")

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# The fastest of 8,192 to 131,072, by little.
BATCH_ROWS = 1 << 14
# A small answer goes out in one piece.
FRAME_SIZE = 1 << 16


@cache
def _executes() -> bool:
    # Late, since the load generator reads how questions look from here.
    import duckdb

    return duckdb.__version__.startswith("1.")


def reader_of(cursor: duckdb.DuckDBPyConnection, sql: str) -> Any:
    """Run a SELECT in the fastest way that this DuckDB has from Python."""
    if _executes():
        return cursor.execute(sql).to_arrow_reader(BATCH_ROWS)
    # What sql() of 2.x does itself, without the relation around it; its execute() copies all rows.
    # Should a later one lack it, that must be noticed: a slow bound would flatter everybody.
    submit: Any = getattr(cursor, "_submit")  # noqa: B009
    return submit(sql, None, "stream", BATCH_ROWS).arrow_reader()


def _answer(peer: socket.socket, database: duckdb.DuckDBPyConnection, sql: str) -> None:
    with database.cursor() as cursor:
        reader = reader_of(cursor, sql)
        parts: list[Any] = [reader.schema.serialize()]
        size = parts[0].size
        for batch in reader:
            message = batch.serialize()
            parts.append(message)
            size += message.size
            if size > FRAME_SIZE:
                _send(peer, parts, size, last=False)
                parts, size = [], 0
        _send(peer, [*parts, END_OF_STREAM], size + len(END_OF_STREAM), last=True)


def _send(peer: socket.socket, parts: list[Any], size: int, *, last: bool) -> None:
    head = FRAME.pack(size, last)
    if size < FRAME_SIZE:
        peer.sendall(b"".join([head, *parts]))
        return
    peer.sendall(head)
    for part in parts:
        peer.sendall(part)


def _questions(peer: socket.socket, database: duckdb.DuckDBPyConnection) -> None:
    buffer = bytearray()
    while data := peer.recv(1 << 16):
        buffer += data
        while len(buffer) >= QUESTION.size:
            end = QUESTION.size + QUESTION.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            sql = buffer[QUESTION.size : end].decode()
            del buffer[:end]
            _answer(peer, database, sql)


def main(port: str, *tables: str) -> None:
    # Late, as above.
    import duckdb

    with duckdb.connect() as database:
        for table in tables:
            database.execute(f"create table {Path(table).stem} as from '{table}'")
        with socket.create_server(("127.0.0.1", int(port))) as listener:
            while True:
                peer, _ = listener.accept()
                with peer:
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    try:
                        _questions(peer, database)
                    except ConnectionError:
                        # Whoever asked is gone.
                        continue


if __name__ == "__main__":
    main(*sys.argv[1:])
