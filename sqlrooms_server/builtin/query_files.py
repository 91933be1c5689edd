"""The files of named queries: ``DIR/*.sql``, one query each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlrooms_server.db import named_texts
from sqlrooms_server.db.columns import Column
from sqlrooms_server.db.declared import Declared, is_nested, unsupported
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.lexical import LITERAL_OR_COMMENT
from sqlrooms_server.db.named_texts import BadText
from sqlrooms_server.errors import BadRequest, StartupError

# What the server sets, and no client can.
INJECTED = ("user", "role", "connection")
# A query over HTTP may come with a token in the place where its parameters are.
_RESERVED = (*INJECTED, "token")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(/[A-Za-z][A-Za-z0-9_-]*)*")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DECLARATION = re.compile(r"\s*--\s*@(\w*)\s*(.*)")
_LITERALS = re.compile(LITERAL_OR_COMMENT, re.VERBOSE | re.DOTALL)
_TEXT = re.compile(r"'((?:[^']|'')*)'")

REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Parameter:
    """``type_name`` is as the file has it, ``type`` the ``DuckDBPyType``.

    ``default`` is a value as clients send them, ``REQUIRED`` without one.
    """

    name: str
    type_name: str
    type: Any
    default: Any = REQUIRED
    description: str = ""

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_nested(self) -> bool:
        return is_nested(self.type)

    def value(self, value: Any) -> Declared:
        return Declared(self.type_name, value)


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """One file. ``parameters`` are those of clients by their names in lower case; ``injected`` are
    those of the server.

    ``columns`` are those of the result, None when they are not known. ``only_reads``: it is one
    query that changes nothing.
    """

    name: str
    description: str
    sql: str
    parameters: Mapping[str, Parameter]
    injected: tuple[str, ...]
    columns: tuple[Column, ...] | None
    only_reads: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What is in a directory. ``bad`` has a line for each file that cannot be used, by its name;
    ``warnings`` one for each whose columns are not known."""

    queries: dict[str, NamedQuery] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


def read_queries(directory: str, engine: Engine, max_length: int) -> Found:
    """The queries in ``directory``, with what ``engine`` says about them.

    Raises ``StartupError`` when there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise StartupError(f"--queries names {directory}, which is no directory.")
    found = Found()
    for path in sorted(root.rglob("*.sql")):
        place = path.relative_to(root)
        if any(part.startswith(".") for part in place.parts):
            continue
        name = place.with_suffix("").as_posix()
        try:
            query, problem = _query(name, _text_of(path, max_length), engine)
        except BadText as error:
            found.bad[name] = _line(path, error)
        else:
            found.queries[name] = query
            if problem is not None:
                found.warnings[name] = _line(path, problem)
    return found


def _line(path: Path, problem: BadText) -> str:
    return f"{path}, line {problem.line}: {problem}" if problem.line else f"{path}: {problem}"


def _text_of(path: Path, max_length: int) -> str:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadText(str(getattr(error, "strerror", None) or "it is not UTF-8")) from error
    if len(data) > max_length:
        raise BadText(f"it has {len(data)} bytes; {max_length} are allowed (--max-sql-length)")
    if "\0" in text:
        raise BadText("it holds a NUL character")
    return text


def _query(name: str, text: str, engine: Engine) -> tuple[NamedQuery, BadText | None]:
    if not _NAME.fullmatch(name):
        raise BadText(
            f"{name!r} is no name of a query: a letter, then letters, digits, _ and -; / between "
            "directories"
        )
    description, parameters = _header(text, engine)
    wanted = _wanted(text, engine)
    for parameter in parameters.values():
        if parameter.name.lower() not in wanted:
            raise BadText(f"@param {parameter.name} is not used: there is no ${parameter.name}")
    undeclared = sorted(wanted - parameters.keys() - set(INJECTED))
    if undeclared:
        names = ", ".join(f"${one}" for one in undeclared)
        raise BadText(f"{names} is not declared; write -- @param {undeclared[0]} TYPE")
    injected = tuple(one for one in INJECTED if one in wanted)
    samples = {one: Declared("VARCHAR", None) for one in injected}
    for key, parameter in parameters.items():
        samples[key] = parameter.value(None if parameter.is_required else parameter.default)
    examined = named_texts.examine(engine, text, samples)
    query = NamedQuery(
        name, description, examined.sql, parameters, injected, examined.columns,
        examined.only_reads,
    )  # fmt: skip
    return query, examined.problem


def _wanted(text: str, engine: Engine) -> set[str]:
    """The names of the parameters in ``text``, in lower case."""
    try:
        names = named_texts.parameters_of(engine, text)
    except BadText as error:
        named = re.search(rf"(?<![:\w]):({'|'.join(INJECTED)})\b", text)
        hint = f" (a parameter is written ${named[1]})" if named and error.line else ""
        raise BadText(f"{error}{hint}", error.line) from error
    for name in names:
        if not _PARAMETER.fullmatch(name):
            raise BadText(f"the parameter {name!r} has no name; write $name instead of ? and $1")
    return {name.lower() for name in names}


def _header(text: str, engine: Engine) -> tuple[str, dict[str, Parameter]]:
    """What the comments at the beginning say: a description, and parameters."""
    description: list[str] = []
    parameters: dict[str, Parameter] = {}
    is_header = True
    for number, line in enumerate(text.split("\n"), 1):
        declaration = _DECLARATION.fullmatch(line)
        if declaration is None:
            is_header = is_header and (line.lstrip().startswith("--") or not line.strip())
            if is_header and line.strip():
                description.append(line.strip().removeprefix("--").strip())
            continue
        if declaration[1] != "param":
            raise BadText(f"@{declaration[1]} is not known; @param is", number)
        if not is_header:
            raise BadText("@param must stand before the statement", number)
        try:
            parameter = _parameter(declaration[2], engine)
        except BadText as error:
            raise BadText(str(error), number) from error
        if parameter.name.lower() in parameters:
            raise BadText(f"@param {parameter.name} is there twice", number)
        parameters[parameter.name.lower()] = parameter
    return "\n".join(description).strip(), parameters


def _parameter(text: str, engine: Engine) -> Parameter:
    """``NAME TYPE [= DEFAULT] [-- DESCRIPTION]``."""
    name = _PARAMETER.match(text)
    if name is None:
        raise BadText("@param needs a name and a type: -- @param region VARCHAR = 'EU' -- where")
    if name[0].lower() in _RESERVED:
        raise BadText(f"{name[0]} is set by the server; choose another name")
    rest, _, description = _cut(text[name.end() :], "--")
    type_name, has_default, default = _cut(rest, "=")
    type_name, default = type_name.strip(), default.strip()
    if not type_name:
        raise BadText(f"@param {name[0]} needs a type, such as VARCHAR")
    try:
        type_ = named_texts.type_of(engine, type_name)
    except BadText as error:
        raise BadText(f"@param {name[0]}: {type_name} is no type: {error}") from error
    part = unsupported(type_)
    if part is not None:
        raise BadText(f"@param {name[0]}: no parameter can be of type {part}")
    parameter = Parameter(name[0], type_name, type_, description=description.strip())
    if not has_default:
        return parameter
    value = _default(default)
    try:
        named_texts.check_value(engine, parameter.value(value), f"the default of {name[0]}")
    except BadRequest as error:
        raise BadText(str(error).rstrip(".")) from error
    return Parameter(name[0], type_name, type_, value, parameter.description)


def _cut(text: str, sign: str) -> tuple[str, str, str]:
    """``text`` before the first ``sign`` that stands in no literal, the sign, and what follows."""
    for start in _plain_starts(text):
        if text.startswith(sign, start):
            return text[:start], sign, text[start + len(sign) :]
    return text, "", ""


def _plain_starts(text: str) -> Iterator[int]:
    """Where what stands in no literal begins, comments included."""
    position = 0
    for match in _LITERALS.finditer(text):
        yield from range(position, match.start())
        position = match.end()
        if match[0].startswith("--"):
            yield match.start()
    yield from range(position, len(text))


def _default(text: str) -> Any:
    """A text of SQL, or a JSON value."""
    quoted = _TEXT.fullmatch(text)
    if quoted:
        return quoted[1].replace("''", "'")
    if text.upper() in ("NULL", "TRUE", "FALSE"):
        return json.loads(text.lower())
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadText(
            f"the default {text} is neither a text in single quotes, nor NULL, nor JSON"
        ) from error
