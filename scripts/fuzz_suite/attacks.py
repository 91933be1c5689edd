"""What hostile clients do. Each is bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections.abc import Awaitable, Callable

import pyarrow as pa

from . import mutation, protocol
from .raw import BINARY, CLOSE, PING, TEXT, UPGRADE, Raw, frame, text, upload
from .uploads import stream

Attack = Callable[[int, random.Random], Awaitable[None]]

# Rows of eight bytes: 400 MB, of which no client here takes more than a part.
_LARGE = "select i, i * 2 as j from range(25000000) t(i)"

_TABLE = stream(pa.table({"i": list(range(5000)), "s": [f"text {n}" for n in range(5000)]}))

# A process that is stopped costs one, and what waits for it a part of the server's memory.
_STOPPED = asyncio.Semaphore(2)


async def garbage(port: int, chance: random.Random) -> None:
    """Bytes of no protocol at all."""
    async with Raw(port) as raw:
        for _ in range(chance.randrange(1, 6)):
            await raw.send(chance.randbytes(chance.choice((1, 10, 1000, 100_000))))
        if chance.random() < 0.5:
            await raw.drain(0.2)


async def half_handshake(port: int, chance: random.Random) -> None:
    """The beginning of an upgrade, and its end at any byte."""
    async with Raw(port) as raw:
        await raw.send(UPGRADE[: chance.randrange(1, len(UPGRADE))])
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() / 5)
        if chance.random() < 0.5:
            raw.finish()


async def tls_hello(port: int, chance: random.Random) -> None:
    """TLS where none is spoken."""
    body = b"\x03\x03" + chance.randbytes(200)
    record = b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body
    async with Raw(port) as raw:
        await raw.send(record[: chance.randrange(3, len(record))])
        await raw.drain(0.2)


async def slow_handshake(port: int, chance: random.Random) -> None:
    """A handshake of some bytes at a time, of one or of many."""
    size = chance.choice((1, 10, 40))
    async with Raw(port) as raw:
        for start in range(0, min(len(UPGRADE), 20 * size), size):
            await raw.send(UPGRADE[start : start + size])
            await asyncio.sleep(0.1)


async def http_nonsense(port: int, chance: random.Random) -> None:
    """Requests that are none, and bodies that do not come or do not end."""
    long = b"x" * chance.choice((100, 5000, 70_000))
    post = b"POST /channels/c HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = chance.choice(
        (
            b"GET /" + long + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + long + b"\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
            b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n" * chance.choice((1, 2, 20)),
            b"\xff\xfe /\r\n\r\n",
            b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
            post + b"Content-Length: 100\r\n\r\n{",
            post + b"Content-Length: -5\r\n\r\n{}",
            post + b"Content-Length: 99999999999999999999\r\n\r\n{}",
            post + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}",
            post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
            post + b"Content-Length: 2\r\n\r\n{}" + post,
            post + b"Content-Length: 70000\r\n\r\n" + b" " * 70_000,
            UPGRADE.replace(b"13", b"12"),
            UPGRADE.replace(b"Key: ", b"Key: " + long),
            UPGRADE.replace(b"127.0.0.1", chance.randbytes(20).replace(b"\n", b"")),
            UPGRADE.replace(b"GET / ", b"GET /?token=%ff&token=" + long + b" "),
        )
    )
    async with Raw(port) as raw:
        cut = len(request) if chance.random() < 0.7 else chance.randrange(1, len(request))
        await raw.send(request[:cut])
        if chance.random() < 0.8:
            await raw.drain(0.2)
        if chance.random() < 0.5:
            raw.finish()


async def bad_frames(port: int, chance: random.Random) -> None:
    """Frames that RFC 6455 forbids."""
    bad = (
        frame(TEXT, b"\xff\xfe invalid"),
        frame(TEXT, b"\xed\xa0\x80"),
        frame(TEXT, b"a", reserved=chance.randrange(1, 8)),
        frame(chance.choice((3, 7, 11, 15)), b"a"),
        frame(TEXT, b'{"type":"hello"}', masked=False),
        frame(0, b"a continuation of nothing"),
        frame(PING, b"x" * 126),
        frame(PING, b"x", last=False),
        frame(CLOSE, b"\x00"),
        frame(CLOSE, b"\x00\x05reserved"),
        frame(CLOSE, b"\x03\xe8\xff\xff"),
        frame(BINARY, b"", length=1 << 62),
        frame(BINARY, b"", length=(1 << 64) - 1),
        frame(TEXT, b"x", length=1 << 31),
        frame(TEXT, b"half", last=False) + frame(TEXT, b"a second begins"),
        frame(TEXT, b"\xc3", last=False) + frame(PING, b"") + frame(0, b"\x28"),
        b"\x81\xff" + bytes(7),
    )
    async with Raw(port) as raw:
        await raw.open()
        for _ in range(chance.choice((1, 1, 3))):
            await raw.send(chance.choice(bad))
        await raw.drain(0.2)


async def oversized(port: int, chance: random.Random) -> None:
    """Messages over every limit."""
    size = chance.choice((1 << 16, 1 << 20, 4 << 20, 9 << 20, 20 << 20))
    opening = b'{"type":"notify","channel":"c","payload":"'
    async with Raw(port) as raw:
        await raw.open()
        if chance.random() < 0.5:
            await raw.send(frame(TEXT, opening, last=False))
            for _ in range(size >> 16):
                await raw.send(frame(0, b"x" * (1 << 16), last=False))
        else:
            await raw.send(frame(chance.choice((TEXT, BINARY)), opening + b"x" * size))
        await raw.drain(0.3)


async def reset_in_result(port: int, chance: random.Random) -> None:
    """A large result, of which a part is read."""
    async with Raw(port, receive_buffer=chance.choice((0, 4096))) as raw:
        await raw.open()
        for number in range(chance.choice((1, 1, 4))):
            options = chance.choice(({}, {"stream": True}, {"stream": True, "window": 1 << 20}))
            kind = "arrow" if options else chance.choice(("arrow", "json"))
            await raw.send(text(type=kind, sql=_LARGE, queryId=number, **options))
        until = chance.choice((0, 1000, 1 << 20, 10 << 20))
        while until > 0:
            until -= len(await raw.receive()) or until


async def slow_reader(port: int, chance: random.Random) -> None:
    """A large result, read a little at a time."""
    async with Raw(port, receive_buffer=4096) as raw:
        await raw.open()
        await raw.send(text(type="arrow", sql=_LARGE, queryId=1))
        for _ in range(chance.randrange(5, 20)):
            await raw.receive(1000)
            await asyncio.sleep(0.1)


async def reset_in_upload(port: int, chance: random.Random) -> None:
    """An upload that ends at any byte."""
    async with Raw(port) as raw:
        await raw.open()
        if chance.random() < 0.4:
            message = upload(_TABLE, tableName="uploaded", queryId="u")
            await raw.send(message[: chance.randrange(10, len(message))])
        else:
            for seq in range(chance.randrange(1, 5)):
                part = _TABLE[seq * 5000 : seq * 5000 + 5000]
                fields = {"tableName": "uploaded", "queryId": "u", "seq": seq, "last": False}
                await raw.send(upload(part, **fields))
        if chance.random() < 0.5:
            await raw.drain(0.1)
        if chance.random() < 0.3:
            raw.finish()


async def damaged_upload(port: int, chance: random.Random) -> None:
    """Arrow streams with flipped bytes."""
    async with Raw(port) as raw:
        await raw.open()
        for number in range(10):
            body = mutation.of_bytes(_TABLE, chance)
            await raw.send(upload(body, tableName="damaged", queryId=number))
        await raw.drain(0.3)


async def flood(port: int, chance: random.Random) -> None:
    """Many small messages at once, whose answers nobody reads."""
    kind = chance.randrange(7)
    one = (
        lambda n: text(type="notify", channel="flood", payload=n),
        lambda n: frame(PING, b"ping"),
        lambda n: text(type="cancel", queryId=n),
        lambda n: text(type="exec", sql="select 1", queryId="same"),
        lambda n: text(type="json", sql="select 1 as a", queryId=n),
        lambda n: text(type="hello", user=f"user {n}"),
        lambda n: frame(TEXT, b"{"),
    )[kind]
    count = chance.choice((100, 1000, 5000))
    async with Raw(port, receive_buffer=4096) as raw:
        await raw.open()
        if kind == 0:
            await raw.send(text(type="subscribe", channel="flood"))
        await asyncio.wait_for(raw.send(b"".join(one(n) for n in range(count))), 10)
        await asyncio.sleep(chance.random() / 2)


async def subscribe_storm(port: int, chance: random.Random) -> None:
    """Channels without end."""
    async with Raw(port) as raw:
        await raw.open()
        prefix = chance.choice(("common", f"own {chance.random()}"))
        messages = [
            text(type="subscribe", channel=f"{prefix} {n}", presence=n % 3 == 0, recover=n % 2 == 0)
            for n in range(1100)
        ]
        await raw.send(b"".join(messages))
        await raw.drain(0.1)
        if chance.random() < 0.5:
            leave = [text(type="unsubscribe", channel=f"{prefix} {n}") for n in range(1100)]
            await raw.send(b"".join(leave))


async def join_and_leave(port: int, chance: random.Random) -> None:
    """Rooms joined by those who are gone when the answer is there."""
    name = chance.choice(("common", f"own {chance.randrange(300)}"))
    joins = [
        text(type="crdt-join", roomId=f"{name} {n}", **({"version": ""} if n % 2 else {}))
        for n in range(chance.choice((1, 20, 110)))
    ]
    async with Raw(port) as raw:
        await raw.open()
        await raw.send(b"".join(joins))
        if chance.random() < 0.3:
            await raw.drain(0.1)
        if chance.random() < 0.3:
            raw.finish()


async def broken_edits(port: int, chance: random.Random) -> None:
    """Updates and snapshots of rooms that are none."""
    async with Raw(port) as raw:
        await raw.open()
        await raw.send(text(type="crdt-join", roomId="broken"))
        for _ in range(20):
            update = b"loro" + chance.randbytes(chance.choice((0, 10, 100, 5000)))
            header = json.dumps({"type": "crdt-update", "roomId": "broken", "id": 1}).encode()
            framed = len(header).to_bytes(4, "big") + header + update
            snapshot = text(type="crdt-snapshot", roomId="broken", data="bG9yb" + "A" * 90)
            presence = text(type="crdt-presence", roomId="broken", data="AAAA")
            await raw.send(
                chance.choice((frame(BINARY, update), frame(BINARY, framed), snapshot, presence))
            )
        await raw.drain(0.2)


async def open_transaction(port: int, chance: random.Random) -> None:
    """Sessions that begin what they never end."""
    async with Raw(port) as raw:
        await raw.open()
        for number in range(chance.choice((1, 5, 20))):
            sql = "create temp table t as from range(1000); begin; create table left_behind(i int)"
            await raw.send(text(type="exec", sql=sql, session=f"s{number}", queryId=number))
        if chance.random() < 0.7:
            await raw.drain(0.1)


async def watch_and_leave(port: int, chance: random.Random) -> None:
    """Live queries and watches of those who leave while their tables change."""
    async with Raw(port) as raw:
        await raw.open()
        table = f"watched_{chance.randrange(3)}"
        await raw.send(text(type="exec", sql=f"create table if not exists {table}(i int)"))
        await raw.send(text(type="watch", tables="*"))
        for number in range(chance.choice((1, 10, 70))):
            sql = f"select count(*), {number % 5} from {table}"
            await raw.send(text(type="live", sql=sql, queryId=number))
        for _ in range(5):
            await raw.send(text(type="exec", sql=f"insert into {table} values (1)"))
        await raw.send(text(type="exec", sql=f"delete from {table}"))
        if chance.random() < 0.5:
            await raw.drain(0.2)


async def cancelled_queries(port: int, chance: random.Random) -> None:
    """Long queries that are cancelled, twice, or left."""
    async with Raw(port) as raw:
        await raw.open()
        for number in range(8):
            sql = "select sum(a.i * b.i) from range(100000) a(i), range(100000) b(i)"
            await raw.send(text(type="arrow", sql=sql, queryId=number, persist=number % 2 == 0))
        await asyncio.sleep(chance.random() / 4)
        for number in range(chance.choice((0, 8))):
            await raw.send(text(type="cancel", queryId=number) * 2)
        if chance.random() < 0.5:
            await raw.drain(0.2)


async def message_soup(port: int, chance: random.Random) -> None:
    """Valid messages in any order, and what is almost one."""
    async with Raw(port) as raw:
        await raw.open()
        for _ in range(40):
            message = json.dumps(chance.choice(protocol.SEEDS)).encode()
            if chance.random() < 0.5:
                message = mutation.of_json(message, chance, protocol.NAMES)
            if len(message) < 5000:
                await raw.send(frame(TEXT, message))
        await raw.drain(0.2)


async def stopped_reader(port: int, chance: random.Random) -> None:
    """A process that asks for gigabytes and is stopped."""
    async with _STOPPED:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"{__package__}.reader", str(port), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            await process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(2 + 2 * chance.random())
            if chance.random() < 0.5:
                process.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.5)
        finally:
            process.kill()
            await process.wait()


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        garbage,
        half_handshake,
        tls_hello,
        slow_handshake,
        http_nonsense,
        bad_frames,
        oversized,
        reset_in_result,
        slow_reader,
        reset_in_upload,
        damaged_upload,
        flood,
        subscribe_storm,
        join_and_leave,
        broken_edits,
        open_transaction,
        watch_and_leave,
        cancelled_queries,
        message_soup,
        stopped_reader,
    )
}

# Those that take seconds by themselves.
LASTING = frozenset({"slow_handshake", "slow_reader", "stopped_reader"})
