"""The types of objects: those of plugins, and those that are built in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.db import values
from sqlrooms_server.errors import StartupError
from sqlrooms_server.plugin import ObjectType, Plugin
from sqlrooms_server.plugin.objects import as_type


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """An object, its type, and the plugin that brings the type."""

    obj: Any
    type: ObjectType
    plugin: Plugin


class Types:
    """What objects can be. Raises ``StartupError`` for a type that is not right."""

    def __init__(self, plugins: Sequence[Plugin], built_in: Plugin) -> None:
        self._types: list[tuple[ObjectType, Plugin]] = []
        for plugin in (*plugins, built_in):
            for given in plugin.object_types:
                try:
                    self._add(as_type(given), plugin)
                except (TypeError, ValueError) as error:
                    raise StartupError(f"Plugin {plugin.name!r}: {error}") from error

    def _add(self, made: ObjectType, plugin: Plugin) -> None:
        for other, owner in self._types:
            if other.name == made.name:
                raise StartupError(
                    f"The plugins {owner.name!r} and {plugin.name!r} both have the object type "
                    f"{made.name!r}."
                )
        self._types.append((made, plugin))

    def resolve(self, obj: Any) -> Target:
        """``obj`` and its type. Raises ``TypeError``, or what ``is_type`` raises."""
        if values.is_read_once(obj):
            raise TypeError(
                "A RecordBatchReader can be read only once; use a table, a dataset or "
                "server.relation(sql)."
            )
        for made, plugin in self._types:
            if made.is_type(obj):
                return Target(obj, made, plugin)
        known = ", ".join(made.name for made, _ in self._types)
        raise TypeError(
            f"No object type knows a {type(obj).__module__}.{type(obj).__qualname__}; there are "
            f"{known}. A plugin can bring another one (object_type)."
        )


class RelationType(ObjectType):
    """What ``server.relation`` makes."""

    name = "relation"

    def is_type(self, obj: Any) -> bool:
        return isinstance(obj, values.Relation)

    def to_bytes(self, obj: Any) -> Any:
        return obj


class ForeignRelationType(ObjectType):
    """A relation of DuckDB. Its connection can do one thing at a time, and which one it is, nobody
    tells: so they are read whole, one after the other."""

    name = "duckdb"

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def is_type(self, obj: Any) -> bool:
        return values.is_relation(obj)

    def to_bytes(self, obj: Any) -> Any:
        with self._lock:
            return obj.to_arrow_table()


class TableType(ObjectType):
    """A table of pyarrow, pandas, polars or anything else that speaks Arrow's C interface."""

    name = "table"

    def is_type(self, obj: Any) -> bool:
        return values.is_table(obj)

    def to_bytes(self, obj: Any) -> Any:
        return obj


BUILT_IN = (RelationType, ForeignRelationType, TableType)
