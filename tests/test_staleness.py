"""No cached result is older than the last change that was answered before it was asked for.

Counters that only grow are written in every way there is, while others read them through the cache.
``SQLROOMS_STALENESS=200000`` makes that many reads, with a seed of its own each time it is set.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from tests.conftest import ServerProcess
from tests.test_client import in_thread
from tests.wire import Arrow, Wire, framed, ipc

TABLES = 4
WRITERS = 3
READERS = 3
# Reads that pass for each change, so that many of them are hits however fast either is.
READS_PER_WRITE = 80
PIPELINED = 8

HAS_TRIGGERS = int(duckdb.__version__.split(".")[0]) >= 2

# A text that is judged by its first word.
PADDING = "-- " + "x" * (70 << 10) + "\n"


class Model:
    """What each counter must be by now, and what it may be.

    ``acked`` was answered, ``tried`` was asked for. Counters of tables are their numbers; those of
    definitions (views, macros) are their names.
    """

    def __init__(self, reads: int, seed: int) -> None:
        self.acked: Counter[Any] = Counter()
        self.tried: Counter[Any] = Counter()
        self.locks = {name: threading.Lock() for name in (*range(TABLES), "v", "step", "reads_of")}
        self.seed = seed
        self.stale: list[str] = []
        self.failed: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.answered = self.cached = 0
        self.turns = threading.Semaphore(0)
        self.over = threading.Event()
        self._counting = threading.Lock()
        self._left = reads

    def take_reads(self) -> bool:
        with self._counting:
            self._left -= PIPELINED
            for _ in range(
                self._left // READS_PER_WRITE, (self._left + PIPELINED) // READS_PER_WRITE
            ):
                self.turns.release()
            return self._left > -PIPELINED

    def count(self, cached: bool) -> None:
        with self._counting:
            self.answered += 1
            self.cached += cached

    def check(self, floor: dict[Any, int], counter: Any, value: Any, what: str) -> None:
        value = 0 if value is None else value
        if not floor.get(counter, 0) <= value <= self.tried[counter]:
            self.stale.append(
                f"{what}: {counter} is {value}, not {floor.get(counter, 0)} to "
                f"{self.tried[counter]}"
            )


# Writers


def ok(reply: Any) -> bool:
    return isinstance(reply, Arrow) or reply["type"] in ("ok", "json", "uploadAck")


def execute(wire: Wire, sql: str, **options: Any) -> bool:
    return ok(wire.request(type="exec", sql=sql, **options))


def in_session(wire: Wire, *texts: str) -> bool:
    """Whether the last of ``texts``, one after the other in a session, was carried out."""
    replies = [execute(wire, text, session="s") for text in texts]
    if not all(replies):
        execute(wire, "rollback", session="s")
    return all(replies)


def rows_of(value: int) -> pa.Table:
    return pa.table({"k": pa.array([0], pa.int64()), "n": pa.array([value], pa.int64())})


def upload_in_chunks(wire: Wire, table: str, value: int, mode: str) -> bool:
    body = ipc(rows_of(value))
    header = {"type": "uploadArrow", "queryId": "u", "tableName": table, "mode": mode}
    wire.send_raw(framed({**header, "seq": 0, "last": False}, body[:100]))
    wire.send_raw(framed({**header, "seq": 1, "last": True}, body[100:]))
    while (reply := wire.receive())["type"] == "uploadProgress":
        pass
    return ok(reply)


def rolled_back(wire: Wire, table: str, value: int) -> bool:
    in_session(wire, "begin", f"update {table} set n = 1000000000", "rollback")
    execute(wire, f"begin; delete from {table}; insert into {table} values (0, 1000000000)")
    return in_session(wire, f"update {table} set n = {value}")


def altered(wire: Wire, table: str, value: int) -> bool:
    return (
        execute(wire, f"alter table {table} add column x{value} integer default 7")
        and execute(wire, f"update {table} set n = {value}")
        and execute(wire, f"alter table {table} drop column x{value}")
    )


def prepared(wire: Wire, table: str, value: int) -> bool:
    done = in_session(wire, f"prepare p as update {table} set n = {value}", "execute p")
    return execute(wire, "deallocate p", session="s") and done


def triggered(wire: Wire, table: str, value: int) -> bool:
    """One change by way of another. While there is a trigger, nobody may replace the table."""
    trigger = (
        f"create trigger tr_{table} after insert on feeds_{table} for each statement "
        f"update {table} set n = {value}"
    )
    done = (
        execute(wire, f"create or replace table feeds_{table} (i int)")
        and execute(wire, trigger)
        and execute(wire, f"insert into feeds_{table} values (1)")
    )
    return execute(wire, f"drop table feeds_{table}") and done


Write = Callable[[Wire, str, int], bool]

WRITES: dict[str, Write] = {
    "update": lambda w, t, n: execute(w, f"update {t} set n = {n}"),
    "qualified": lambda w, t, n: execute(w, f'update main."{t.upper()}" set n = {n}'),
    "commented": lambda w, t, n: execute(w, f"/* a */ update /* b */ {t} -- c\nset n = {n}"),
    "params": lambda w, t, n: execute(w, f"update {t} set n = $n", params={"n": n}),
    "insert": lambda w, t, n: execute(w, f"insert into {t} (k, n) values (0, {n})"),
    "long": lambda w, t, n: execute(w, f"insert into {t} (k, n) {PADDING} values (0, {n})"),
    "returning": lambda w, t, n: ok(w.arrow(f"insert into {t} (k, n) values (0, {n}) returning n")),
    "several": lambda w, t, n: execute(
        w, f"insert into {t} (k, n) values (0, {n}); delete from {t} where n < {n}"
    ),
    "transaction": lambda w, t, n: execute(
        w, f"begin; truncate {t}; insert into {t} (k, n) values (0, {n}); commit"
    ),
    "session": lambda w, t, n: in_session(
        w, "begin", f"delete from {t}", f"insert into {t} (k, n) values (0, {n})", "commit"
    ),
    "truncate": lambda w, t, n: in_session(
        w, "begin", f"truncate {t}", f"insert into {t} by name select 0 as k, {n} as n", "commit"
    ),
    "rolled back": rolled_back,
    "prepared": prepared,
    "merge": lambda w, t, n: execute(
        w,
        f"merge into {t} using (select 0 as k, {n} as n) as s on {t}.k = s.k "
        "when matched then update set n = s.n when not matched then insert (k, n) "
        "values (s.k, s.n)",
    ),
    "from": lambda w, t, n: execute(w, f"update {t} set n = s.m from (select {n} as m) as s"),
    "alter": altered,
    "replace": lambda w, t, n: execute(
        w, f"create or replace table {t} as select 0::bigint as k, {n}::bigint as n"
    ),
    "rename": lambda w, t, n: execute(
        w,
        f"begin; create table {t}_new as select 0::bigint as k, {n}::bigint as n; "
        f"drop table {t}; alter table {t}_new rename to {t}; commit",
    ),
    "upload": lambda w, t, n: ok(w.upload(rows_of(n), tableName=t, queryId="u")),
    "append": lambda w, t, n: ok(w.upload(rows_of(n), tableName=t, queryId="u", mode="append")),
    "chunks": lambda w, t, n: upload_in_chunks(w, t, n, "replace"),
    "append chunks": lambda w, t, n: upload_in_chunks(w, t, n, "append"),
    "copy": lambda w, t, n: (
        execute(w, f"copy (select 0 as k, {n} as n) to 'rows_{t}.csv'")
        and execute(w, f"copy {t} (k, n) from 'rows_{t}.csv'")
    ),
}
if HAS_TRIGGERS:
    WRITES["clause"] = lambda w, t, n: ok(
        w.arrow(f"with x as (insert into {t} (k, n) values (0, {n}) returning n) select n from x")
    )
    WRITES["trigger"] = triggered

# These spoil every plan; there are enough of them among the others.
SELDOM = {"alter", "replace", "rename", "upload", "chunks", "rolled back", "prepared", "trigger"}


def define(wire: Wire, model: Model, what: str, number: int, chance: random.Random) -> bool:
    """Another definition of a view or a macro, which tells its number."""
    table = chance.randrange(TABLES)
    body = f"select {number} as s, {table} as t, max(n) as n from c{table}"
    return execute(
        wire,
        {
            "v": f"create or replace view v as {body}",
            "step": f"create or replace macro step() as {number}",
            "reads_of": f"create or replace macro reads_of() as table {body}",
        }[what],
    )


def write(server: ServerProcess, model: Model, number: int) -> None:
    chance = random.Random(f"{model.seed} writer {number}")
    names = sorted(WRITES)
    weights = [1 if name in SELDOM else 3 for name in names]
    with server.connect() as wire:
        while model.turns.acquire() and not model.over.is_set():
            if chance.random() < 0.06:
                counter: Any = chance.choice(("v", "step", "reads_of"))
                how = "define"
            else:
                counter = chance.randrange(TABLES)
                how = chance.choices(names, weights)[0]
            with model.locks[counter]:
                model.tried[counter] += 1
                value = model.tried[counter]
                if how == "define":
                    done = define(wire, model, counter, value, chance)
                else:
                    done = WRITES[how](wire, f"c{counter}", value)
                if done:
                    model.acked[counter] = value
                    model.written[how] += 1
                else:
                    model.failed[how] += 1


# Readers

QUERIES: list[tuple[str, list[Any], Callable[[Model, dict[Any, int], dict[str, Any]], None]]] = []


def check_tables(*tables: int) -> Callable[[Model, dict[Any, int], dict[str, Any]], None]:
    def check(model: Model, floor: dict[Any, int], row: dict[str, Any]) -> None:
        for table in tables:
            model.check(floor, table, row[f"n{table}"], "table")

    return check


def check_view(name: str) -> Callable[[Model, dict[Any, int], dict[str, Any]], None]:
    def check(model: Model, floor: dict[Any, int], row: dict[str, Any]) -> None:
        model.check(floor, name, row["s"], name)
        if row["t"] >= 0:
            model.check(floor, row["t"], row["n"], f"table by {name}")

    return check


def check_step(model: Model, floor: dict[Any, int], row: dict[str, Any]) -> None:
    model.check(floor, "step", row["s"], "step")
    model.check(floor, 0, row["n0"], "table by step")


for one in range(TABLES):
    QUERIES.append((f"select max(n) as n{one} from c{one}", [], check_tables(one)))
    QUERIES.append(
        (f"from (select max(n) as n{one} from c{one}) where $1", [True], check_tables(one))
    )
    other = (one + 1) % TABLES
    text = f"with x as (select max(n) as m from c{other}) select max(n) as n{one}, any_value(m) as "
    QUERIES.append((f"{text}n{other} from c{one}, x", [], check_tables(other)))
    QUERIES.append(
        (
            f"select (select max(n) from c{one}) as n{one}, "
            f"(select max(n) from c{other}) as n{other}",
            [],
            check_tables(one, other),
        )
    )
QUERIES.append(("from v", [], check_view("v")))
QUERIES.append(("select s, t, n from reads_of()", [], check_view("reads_of")))
QUERIES.append(("select step() as s, max(n) as n0 from c0", [], check_step))
KINDS: list[dict[str, Any]] = [
    {"type": "json"},
    {"type": "json", "maxRows": 3},
    {"type": "arrow"},
    {"type": "arrow", "stream": True},
    {"type": "arrow", "format": ["json", "arrow"]},
]
KIND_WEIGHTS = [20, 1, 4, 2, 1]


def read(server: ServerProcess, model: Model, number: int) -> None:
    chance = random.Random(f"{model.seed} reader {number}")
    ids = itertools.count()
    with server.connect() as wire:
        while model.take_reads():
            asked = {}
            floor = dict(model.acked)
            for _ in range(PIPELINED):
                query_id = next(ids)
                asked[query_id] = chance.choice(QUERIES)
                sql, params, _check = asked[query_id]
                kind = chance.choices(KINDS, KIND_WEIGHTS)[0]
                more = {"params": params} if params else {}
                wire.send(sql=sql, queryId=query_id, persist=True, **kind, **more)
            while asked:
                look_at(model, floor, wire.receive(), asked)


def look_at(model: Model, floor: dict[Any, int], reply: Any, asked: dict[int, Any]) -> None:
    if not isinstance(reply, Arrow):
        _, _, check = asked.pop(reply["queryId"])
        if reply["type"] == "error":
            model.failed["read: " + reply["error"][:60]] += 1
            assert reply["code"] in ("query_error", "conflict"), reply
            return
        rows, header = json.loads(reply["data"]), reply
    else:
        header = reply.header
        if "seq" in header and reply.body:
            # All there is: the last message tells only the summary.
            asked[header["queryId"]] = (*asked[header["queryId"]], reply.table().to_pylist())
        if not header.get("last", True):
            return
        _, _, check, *bodies = asked.pop(header["queryId"])
        rows = bodies[0] if bodies else reply.table().to_pylist()
    model.count(header.get("cached", False))
    check(model, floor, rows[0])


@pytest.mark.timeout(0)
def test_nothing_is_stale(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    count = int(os.environ.get("SQLROOMS_STALENESS", "0"))
    reads = count or 2000
    model = Model(reads, random.randrange(1 << 30) if count else 2026)
    arguments = ("--db-path", str(tmp_path / "db"), "--cache-dir", str(tmp_path / "cache"))
    server = serve(*arguments, cwd=tmp_path)
    with server.connect() as wire:
        for table in range(TABLES):
            wire.exec(f"create table c{table} as select 0::bigint as k, 0::bigint as n")
        wire.exec("create view v as select 0 as s, -1 as t, 0 as n")
        wire.exec("create macro step() as 0")
        wire.exec("create macro reads_of() as table select 0 as s, -1 as t, 0 as n")
        writers = [in_thread(partial(write, server, model, n)) for n in range(WRITERS)]
        readers = [in_thread(partial(read, server, model, n)) for n in range(READERS)]
        try:
            for reader in readers:
                reader.result()
        finally:
            model.over.set()
            for _ in writers:
                model.turns.release()
        for writer in writers:
            writer.result()
        stats = wire.request(type="cacheStats")
    print(
        f"seed {model.seed}: {model.answered} reads, {model.cached} hits, {len(model.stale)} stale"
    )
    print(f"changes: {dict(model.written)}; failed: {dict(model.failed)}; {stats}")
    assert not model.stale, model.stale[:10]
    assert model.answered > 0.95 * reads
    assert model.cached > 0.5 * reads
    assert stats["hits"] == model.cached
