"""Columns of a result: their DuckDB types, which tell more than their Arrow types do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlrooms_server.db.library import IS_2
from sqlrooms_server.db.statements import quote_identifier, without_end

# Arrow drops the offset of TIMETZ, and 1.5 has no Arrow form of VARIANT at all.
_CASTS = {"time with time zone": "VARCHAR", "variant": "JSON"}

_NESTED = ("list", "array", "struct", "map", "union")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result: its name and its DuckDB type (a ``DuckDBPyType``)."""

    name: str
    type: Any


def columns_of(description: list[Any]) -> tuple[Column, ...]:
    """The columns in a DB-API ``description``."""
    return tuple(Column(entry[0], entry[1]) for entry in description)


def unique_names(columns: tuple[Column, ...]) -> list[str]:
    """The names of ``columns``, a repeated one with the next free number: ``a``, ``a_1``."""
    taken = {column.name for column in columns}
    seen: set[str] = set()
    names = []
    for column in columns:
        name, number = column.name, 0
        while name in seen or (number and name in taken):
            number += 1
            name = f"{column.name}_{number}"
        seen.add(name)
        names.append(name)
    return names


def fits_arrow(columns: tuple[Column, ...]) -> bool:
    """Whether there is an Arrow form of all ``columns``. In 1.5 there is none of VARIANT."""
    return IS_2 or not any(_has_variant(column.type) for column in columns)


def _has_variant(type_: Any) -> bool:
    if type_.id == "variant":
        return True
    if type_.id not in _NESTED:
        return False
    return any(_has_variant(member) for _, member in type_.children if not isinstance(member, int))


def exact_for_json(sql: str, columns: tuple[Column, ...]) -> str | None:
    """The query ``sql`` with casts where Arrow would lose a part of a value; None when nowhere."""
    casts = [_cast(column.type) for column in columns]
    if not any(casts):
        return None
    expressions = []
    for number, (column, cast) in enumerate(zip(columns, casts, strict=True), 1):
        expression = f"CAST(#{number} AS {cast})" if cast else f"#{number}"
        expressions.append(f"{expression} AS {quote_identifier(column.name)}")
    return f"SELECT {', '.join(expressions)} FROM (\n{without_end(sql)}\n)"


def _cast(type_: Any) -> str | None:
    """The SQL type to cast ``type_`` to, or None when it can stay."""
    if type_.id in _CASTS:
        return _CASTS[type_.id]
    if type_.id not in _NESTED:
        return None
    members = [
        (name, member) for name, member in type_.children if name and not isinstance(member, int)
    ]
    if type_.id == "array":
        members = members[:1]
    casts = [_cast(member) for _, member in members]
    if not any(casts):
        return None
    types = [cast or str(member) for (_, member), cast in zip(members, casts, strict=True)]
    if type_.id == "list":
        return f"{types[0]}[]"
    if type_.id == "array":
        return f"{types[0]}[{dict(type_.children)['size']}]"
    if type_.id == "map":
        return f"MAP({types[0]}, {types[1]})"
    fields = (
        f"{quote_identifier(name)} {sql}" for (name, _), sql in zip(members, types, strict=True)
    )
    return f"{type_.id.upper()}({', '.join(fields)})"
