"""``room(name)`` and ``rooms()`` in SQL: what rooms hold, as tables of one cursor.

They are macros over Arrow tables that belong to the cursor and that nobody can write. Only a text
that seems to call them gets them, just before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import duckdb
import pyarrow as pa

from sqlrooms_server.db.lexical import LITERAL_OR_COMMENT
from sqlrooms_server.messages import Params

_CALL = re.compile(r"\brooms?\s*\(", re.IGNORECASE)

# The group of LITERAL_OR_COMMENT, its first, is the fourth here; chr(92) is a backslash.
_CALL_OR_LITERAL = rf"""
    (?<![\w.])(?P<function>rooms?)\s*\(\s*
        (?: (?P<name>'[^']*(?:''[^']*){{0,255}}')\s*\) | (?P<parameter>[?$]\w*)\s*\) | )
    | {LITERAL_OR_COMMENT.replace(chr(92) + "1", chr(92) + "4")}
    """

_TIME = pa.timestamp("ms", tz="UTC")


@cache
def _call_or_literal() -> re.Pattern[str]:
    # Not when this module is loaded: few texts have the words.
    return re.compile(_CALL_OR_LITERAL, re.VERBOSE | re.DOTALL | re.IGNORECASE)


# What the macros are over; part of the text by which ours are told from others.
_ONE, _ALL = "__sqlrooms_room", "__sqlrooms_rooms"

# What they are copied from.
_COPIED = "__sqlrooms_arriving"

_MACROS = {
    "room": (
        "CREATE OR REPLACE TEMP MACRO room(name) AS TABLE SELECT room_id, document::JSON AS "
        f"document, updated_at FROM temp.{_ONE} WHERE room_id = name"
    ),
    "rooms": (f"CREATE OR REPLACE TEMP MACRO rooms() AS TABLE SELECT * FROM temp.{_ALL}"),
}

# Whether each of that name is ours. DuckDB has an empty text for functions that are no macros.
_KNOWN = (
    f"SELECT database_name = 'temp' AND contains(coalesce(macro_definition, ''), '{_ONE}') "
    "FROM duckdb_functions() WHERE lower(function_name) = ? "
    "AND function_type IN ('table', 'table_macro')"
)


@dataclass(frozen=True)
class Wanted:
    """What a text asks about rooms: those of ``names``, or ``all`` when the names are not told.

    ``texts`` are parameters of which some may be names, too.
    """

    functions: frozenset[str]
    names: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    all: bool = False


@dataclass
class RoomTables:
    """What is known of rooms: ``documents`` (name, JSON, milliseconds since 1970), and ``listed``
    (name, bytes, milliseconds)."""

    documents: list[tuple[str, bytes, int]] = field(default_factory=list)
    listed: list[tuple[str, int, int]] = field(default_factory=list)


def wanted_rooms(sql: str, params: Params | None) -> Wanted | None:
    """What ``sql`` asks about rooms; None for nothing."""
    if _CALL.search(sql) is None:
        return None
    functions: set[str] = set()
    names: set[str] = set()
    texts: set[str] = set()
    is_all = False
    for match in _call_or_literal().finditer(sql):
        function = match["function"]
        if function is None:
            continue
        functions.add(function.lower())
        if function.lower() != "room":
            continue
        if match["name"] is not None:
            names.add(match["name"][1:-1].replace("''", "'"))
        elif match["parameter"] is not None:
            # Which of them it is matters little.
            texts.update(_texts(params))
        else:
            is_all = True
    if not functions:
        return None
    if len(texts) == 1:
        names, texts = names | texts, set()
    return Wanted(frozenset(functions), frozenset(names), frozenset(texts), is_all)


def _texts(params: Params | None) -> Iterable[str]:
    values: Sequence[Any] = list(params.values()) if isinstance(params, dict) else params or ()
    return [value for value in values if isinstance(value, str)]


def provide(
    native: duckdb.DuckDBPyConnection,
    functions: Iterable[str],
    tables: RoomTables,
    *,
    is_fresh: bool,
    copied: bool = False,
) -> None:
    """Let ``native`` know the ``functions``. One that somebody has defined stays as it is.

    ``is_fresh``: nothing is left in it by an earlier call. ``copied``: into temporary tables,
    which DuckDB can plan; 2.x writes no plan of what reads the memory of this process.
    """
    for function in functions:
        try:
            if is_fresh:
                is_theirs = _is_known(native, function)
            else:
                known = [is_ours for (is_ours,) in native.execute(_KNOWN, [function]).fetchall()]
                is_theirs = not all(known)
                if is_theirs and any(known):
                    native.execute(f"DROP MACRO TABLE IF EXISTS temp.{function}")
            if not is_theirs:
                name, table = _table(function, tables)
                if copied:
                    native.register(_COPIED, table)
                    native.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS FROM {_COPIED}")
                    native.unregister(_COPIED)
                else:
                    native.register(name, table)
                native.execute(_MACROS[function])
        except duckdb.TransactionException:
            # A transaction that failed takes nothing but its end; the text will hear of it.
            return


def _is_known(native: duckdb.DuckDBPyConnection, function: str) -> bool:
    """Whether there is a table function or macro of this name. To list them all takes 25 ms."""
    try:
        native.sql(f"SELECT * FROM {function}({'NULL' if function == 'room' else ''})")
    except duckdb.CatalogException as error:
        return f"name {function} does not exist" not in str(error)
    except duckdb.Error:
        return True
    return True


def _table(function: str, tables: RoomTables) -> tuple[str, pa.Table]:
    if function == "room":
        columns = list(zip(*tables.documents, strict=True)) or [(), (), ()]
        types = {"room_id": pa.string(), "document": pa.binary(), "updated_at": _TIME}
        arrays = [pa.array(c, t) for c, t in zip(columns, types.values(), strict=True)]
        arrays[1] = arrays[1].cast(pa.string())
        return _ONE, pa.table(arrays, names=list(types))
    columns = list(zip(*tables.listed, strict=True)) or [(), (), ()]
    types = {"room_id": pa.string(), "bytes": pa.int64(), "updated_at": _TIME}
    arrays = [pa.array(c, t) for c, t in zip(columns, types.values(), strict=True)]
    return _ALL, pa.table(arrays, names=list(types))
