"""Clients that do everything right beside those that do not, and check every answer."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pyarrow as pa
from loro import ExportMode, LoroDoc
from websockets.asyncio.client import ClientConnection, connect

from .uploads import stream

# Seconds for an answer. The machine is busy with attacks, and so is this process.
DEADLINE = 60.0

_ROWS = 200_000
_SUM = _ROWS * (_ROWS - 1) // 2


class Failed(AssertionError):
    """A well-behaved client got something that it should not get."""


def expect(condition: object, got: Any) -> None:
    if not condition:
        raise Failed(f"got {str(got)[:300]}")


class Client:
    """One WebSocket, one question at a time. ``seconds`` are the times that answers took."""

    def __init__(self, socket: ClientConnection, seconds: list[float]) -> None:
        self._socket = socket
        self._seconds = seconds

    async def receive(self) -> Any:
        """A dictionary for text, a pair of header and body for binary."""
        message = await asyncio.wait_for(self._socket.recv(), DEADLINE)
        if isinstance(message, str):
            return json.loads(message)
        if message[:4] == b"loro":
            return {"type": "update"}, message
        end = 4 + int.from_bytes(message[:4], "big")
        return json.loads(message[4:end]), message[end:]

    async def ask(self, **fields: Any) -> Any:
        began = time.monotonic()
        await self._socket.send(json.dumps(fields))
        answer = await self.receive()
        self._seconds.append(time.monotonic() - began)
        return answer

    async def send(self, **fields: Any) -> None:
        await self._socket.send(json.dumps(fields))

    async def send_binary(self, header: dict[str, Any], body: bytes) -> None:
        head = json.dumps(header).encode()
        await self._socket.send(len(head).to_bytes(4, "big") + head + body)

    async def rows(self, sql: str, **options: Any) -> Any:
        answer = await self.ask(type="json", sql=sql, queryId="rows", **options)
        expect(isinstance(answer, dict) and answer["type"] == "json", answer)
        return json.loads(answer["data"])


async def small_queries(client: Client, number: int) -> None:
    answer = await client.ask(type="arrow", sql=f"select {number} as a", queryId=number)
    expect(isinstance(answer, tuple) and answer[0]["queryId"] == number, answer)
    expect(pa.ipc.open_stream(answer[1]).read_all().to_pydict() == {"a": [number]}, answer)
    rows = await client.rows("select $1 + 1 as b, $2 as c", params=[number, "text"], persist=True)
    expect(rows == [{"b": number + 1, "c": "text"}], rows)
    error = await client.ask(type="exec", sql="select from nowhere", queryId="e")
    expect(error["code"] == "query_error" and error["queryId"] == "e", error)
    await asyncio.sleep(0.02)


async def large_results(client: Client, number: int) -> None:
    sql = f"select i from range({_ROWS}) t(i)"
    window = {"window": 1 << 18} if number % 2 else {}
    await client.send(type="arrow", sql=sql, queryId=number, stream=True, **window)
    body = bytearray()
    while True:
        answer = await client.receive()
        expect(isinstance(answer, tuple) and answer[0]["queryId"] == number, answer)
        body += answer[1]
        if answer[0]["last"]:
            break
        if window:
            await client.send(type="ack", queryId=number, bytes=len(body))
    table = pa.ipc.open_stream(bytes(body)).read_all()
    expect(table.num_rows == _ROWS, table.num_rows)
    expect(sum(table["i"].to_pylist()[::1000]) == sum(range(0, _ROWS, 1000)), "other rows")
    rows = await client.rows(f"select sum(i)::BIGINT as s from ({sql})")
    expect(rows == [{"s": _SUM}], rows)
    await asyncio.sleep(0.2)


async def own_table(client: Client, number: int) -> None:
    body = stream(pa.table({"n": [number] * 500, "s": ["text"] * 500}))
    header = {"type": "uploadArrow", "tableName": "good_upload", "queryId": number}
    if number % 2:
        await client.send_binary({**header, "seq": 0, "last": False}, body[:1000])
        await client.send_binary({**header, "seq": 1, "last": True}, body[1000:])
    else:
        await client.send_binary(header, body)
    answer = await client.receive()
    while answer["type"] == "uploadProgress":
        answer = await client.receive()
    expect(answer["type"] == "uploadAck" and answer["queryId"] == number, answer)
    rows = await client.rows("select count(*) as c, min(n) as a, max(n) as b from good_upload")
    expect(rows == [{"c": 500, "a": number, "b": number}], rows)
    await asyncio.sleep(0.1)


async def channel(client: Client, number: int) -> None:
    if not number:
        answer = await client.ask(type="subscribe", channel="good")
        expect(answer == {"type": "subscribed", "channel": "good"}, answer)
    said = await client.ask(type="notify", channel="good", payload={"n": number})
    expect(said == {"type": "notify", "channel": "good", "payload": {"n": number}}, said)
    acked = await client.receive()
    expect(acked == {"type": "notifyAck", "channel": "good"}, acked)
    await asyncio.sleep(0.02)


async def transactions(client: Client, number: int) -> None:
    sql = "create table if not exists good_rows(i int); begin; insert into good_rows values (1)"
    for text in (sql, "insert into good_rows values (2)", "rollback" if number % 2 else "commit"):
        answer = await client.ask(type="exec", sql=text, session="s", queryId=number)
        expect(answer == {"type": "ok", "queryId": number}, answer)
    rows = await client.rows("select count(*) as c from good_rows")
    expect(rows == [{"c": 2 * (number // 2 + 1)}], rows)
    await asyncio.sleep(0.1)


class Room:
    """Edits a document, and looks whether all that was acked is in it."""

    def __init__(self) -> None:
        self._doc = LoroDoc()
        self._rooms = 0

    async def __call__(self, client: Client, number: int) -> None:
        if not number:
            await self._join(client)
        before = self._doc.oplog_vv
        self._doc.get_map("m").insert(f"k{number % 50}", number)
        self._doc.commit()
        update = bytes(self._doc.export(ExportMode.Updates(before)))
        await client.send_binary({"type": "crdt-update", "roomId": "good", "id": number}, update)
        answer = await client.receive()
        expect(isinstance(answer, dict) and answer.get("status") == "applied", answer)
        expect(answer["id"] == number, answer)
        if number % 20 == 19:
            copy = LoroDoc()
            await self._join(client, copy)
            expect(copy.get_deep_value() == self._doc.get_deep_value(), "the room has less")
        await asyncio.sleep(0.05)

    async def _join(self, client: Client, doc: Any = None) -> None:
        doc = self._doc if doc is None else doc
        version = base64.b64encode(doc.oplog_vv.encode()).decode()
        answer = await client.ask(type="crdt-join", roomId="good", version=version)
        expect(answer["type"] == "crdt-joined", answer)
        _, body = await client.receive()
        doc.import_(body)


Round = Callable[[Client, int], Awaitable[None]]


class Company:
    """All of them at once, each on a connection that lasts as long as the run."""

    def __init__(self, port: int) -> None:
        self.rounds: dict[str, int] = {}
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._port = port
        self._ends = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        works: dict[str, Round] = {
            "small queries": small_queries,
            "large results": large_results,
            "uploads": own_table,
            "channel": channel,
            "transactions": transactions,
            "room": Room(),
        }
        self.count = len(works)
        for name, work in works.items():
            self.rounds[name] = 0
            self._tasks.append(asyncio.create_task(self._go_on(name, work)))

    async def end(self) -> None:
        self._ends.set()
        await asyncio.gather(*self._tasks)

    async def _go_on(self, name: str, work: Round) -> None:
        seconds = self.seconds if name == "small queries" else []
        try:
            async with connect(
                f"ws://127.0.0.1:{self._port}",
                max_size=None,
                compression=None,
                open_timeout=DEADLINE,
                ping_interval=None,
            ) as socket:
                client = Client(socket, seconds)
                while not self._ends.is_set():
                    await work(client, self.rounds[name])
                    self.rounds[name] += 1
        except Exception as error:  # whatever it is, a well-behaved client must not see it
            self.failures.append(
                f"{name}, round {self.rounds[name]}: {type(error).__name__} {error}"
            )
