"""TypeScript types of named queries: their parameters, and their rows as JSON results have them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlrooms_server.builtin.query_files import NamedQuery, Parameter

_HEAD = """\
// Written by `sqlrooms-server types`. Do not edit: the next run replaces it.
"""

_PROPERTY = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")

_INTEGERS = frozenset("tinyint smallint integer utinyint usmallint uinteger".split())
# JavaScript has no number for all of their values; a text does for a parameter.
_LARGE = frozenset("bigint ubigint hugeint uhugeint bignum decimal".split())
_TIMES = frozenset(
    ("date", "timestamp", "timestamp_s", "timestamp_ms", "timestamp_ns", "timestamp with time zone")
)
_FLOATS = frozenset(("double", "float"))


def typescript(queries: Mapping[str, NamedQuery]) -> str:
    """A module with types for ``queries``; equal queries give the same text."""
    names = _interface_names(queries)
    parts = [_HEAD]
    for name, query in sorted(queries.items()):
        parts.append(_params(names[name], query))
        parts.append(_row(names[name], query))
    entries = "".join(
        f"  {json.dumps(name)}: {{ params: {names[name]}Params; row: {names[name]}Row }};\n"
        for name in sorted(queries)
    )
    parts.append(
        "/** The parameters and rows of each query, by its name. */\n"
        f"export interface Queries {{\n{entries}}}\n"
    )
    return "\n".join(parts)


def _interface_names(queries: Iterable[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    taken: set[str] = set()
    for query in sorted(queries):
        words = re.split(r"[^A-Za-z0-9]+", query)
        base = name = "".join(word[:1].upper() + word[1:] for word in words)
        number = 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        names[query] = name
    return names


def _params(name: str, query: NamedQuery) -> str:
    about = f"Parameters of {query.name}."
    comment = _comment("\n\n".join(filter(None, (query.description, about))), "")
    if not query.parameters:
        return f"{comment}export type {name}Params = Record<string, never>;\n"
    fields = "".join(_param(parameter) for parameter in query.parameters.values())
    return f"{comment}export interface {name}Params {{\n{fields}}}\n"


def _param(parameter: Parameter) -> str:
    lines = [parameter.description, parameter.type_name]
    if not parameter.is_required:
        lines[1] += f", by default {json.dumps(parameter.default, ensure_ascii=False)}"
    comment = _comment("\n".join(filter(None, lines)), "  ")
    type_ = _typed(parameter.type, _input)
    if parameter.default is None:
        type_ += " | null"
    mark = "" if parameter.is_required else "?"
    return f"{comment}  {_key(parameter.name)}{mark}: {type_};\n"


def _row(name: str, query: NamedQuery) -> str:
    comment = _comment(f"A row of {query.name}.", "")
    if query.columns is None:
        return f"{comment}export type {name}Row = Record<string, unknown>;\n"
    fields = "".join(
        f"{_comment(str(column.type), '  ')}"
        f"  {_key(column.name)}: {_typed(column.type, _output)} | null;\n"
        for column in query.columns
    )
    return f"{comment}export interface {name}Row {{\n{fields}}}\n"


def _comment(text: str, indent: str) -> str:
    # Nothing in a text may end the comment.
    lines = text.replace("*/", "*\u200b/").split("\n")
    if len(lines) == 1:
        return f"{indent}/** {lines[0]} */\n"
    body = "".join(f"{indent} * {line}".rstrip() + "\n" for line in lines)
    return f"{indent}/**\n{body}{indent} */\n"


def _key(name: str) -> str:
    return name if _PROPERTY.fullmatch(name) else _literal(name)


def _literal(text: str) -> str:
    return json.dumps(text)


def _typed(type_: Any, plain: Callable[[Any], str]) -> str:
    """The type of values of ``type_``, of which ``plain`` knows those that hold no others."""
    kind = type_.id
    if kind == "enum":
        ((_, values),) = type_.children
        return _union(_literal(value) for value in values)
    if kind in ("list", "array"):
        return f"({_typed(type_.children[0][1], plain)} | null)[]"
    if kind == "struct":
        fields = "; ".join(
            f"{_key(name)}: {_typed(child, plain)} | null" for name, child in type_.children
        )
        return f"{{ {fields} }}"
    if kind == "map":
        return f"Record<string, {_typed(dict(type_.children)['value'], plain)} | null>"
    if kind == "union":
        return _union(_typed(child, plain) for _, child in type_.children[1:])
    return plain(type_)


def _union(types: Iterable[str]) -> str:
    found = list(dict.fromkeys(types))
    return " | ".join(found) or "never"


def _output(type_: Any) -> str:
    kind = type_.id
    if kind == "boolean":
        return "boolean"
    if kind in _INTEGERS or kind in _LARGE or kind in _TIMES or kind in _FLOATS:
        return "number"
    if kind == "variant":
        return "unknown"
    return "null" if "null" in kind else "string"


def _input(type_: Any) -> str:
    kind = type_.id
    if kind == "boolean":
        return "boolean"
    if kind in _INTEGERS or kind in _FLOATS:
        return "number"
    if kind in _LARGE or kind in _TIMES:
        return "number | string"
    return "string"
