"""SQL texts of the operator, whose parameters have declared types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from sqlrooms_server.db.columns import Column, unique_names
from sqlrooms_server.db.declared import Declared, bound
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.statements import Statements, without_end
from sqlrooms_server.errors import BadRequest

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = re.compile(r"\bLINE (\d+):")


class BadText(Exception):
    """A text cannot be one of a named query. ``line`` counts from 1; 0 is the text as a whole."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Examined:
    """A text and what is known of it.

    ``sql`` has its parameters cast to their types. ``only_reads`` tells that it is one query which
    changes nothing, so far as its words tell. ``columns`` are those of its result, None when
    ``problem`` says why they are not known.
    """

    sql: str
    only_reads: bool
    columns: tuple[Column, ...] | None
    problem: BadText | None = None


def parameters_of(engine: Engine, sql: str) -> frozenset[str]:
    """The names of the parameters of ``sql``, one statement. Raises ``BadText``."""
    with engine.cursor() as cursor:
        return _parsed(engine, cursor.native, sql).parameters or frozenset()


def examine(engine: Engine, sql: str, values: Mapping[str, Declared]) -> Examined:
    """What ``sql``, of which :func:`parameters_of` knows the names, is.

    ``values`` has one for each of these. Raises ``BadText``.
    """
    with engine.cursor() as cursor:
        native = cursor.native
        statements = _parsed(engine, native, sql)
        types = {name: value["$type"] for name, value in values.items()}
        typed = _with_casts(sql, types)
        try:
            wanted, found = statements.parameters, _parsed(engine, native, typed)
            is_same = found.parameters == wanted and found.kinds == statements.kinds
        except BadText:
            # Such as USING SAMPLE, which takes a bare parameter.
            is_same = False
        if not is_same:
            typed = sql
        only_reads = statements.returns_rows and not statements.effects
        try:
            columns = _columns(native, typed, statements, values)
        except (duckdb.Error, BadRequest) as error:
            return Examined(typed, only_reads, None, _told(error))
        if columns is None:
            return Examined(typed, only_reads, None)
        names = unique_names(columns)
        columns = tuple(
            Column(name, column.type) for name, column in zip(names, columns, strict=True)
        )
        return Examined(typed, only_reads, columns)


def type_of(engine: Engine, name: str) -> Any:
    """The ``DuckDBPyType`` that is called ``name``. Raises ``BadText``."""
    with engine.cursor() as cursor:
        try:
            return cursor.native.sqltype(name)
        except (duckdb.Error, RuntimeError, ValueError) as error:
            raise BadText(_first_line(error)) from error


def check_value(engine: Engine, value: Declared, where: str) -> None:
    """Raise ``BadRequest`` when ``value`` cannot be bound."""
    with engine.cursor() as cursor:
        bound(cursor.native, value, where)


def _parsed(engine: Engine, native: duckdb.DuckDBPyConnection, sql: str) -> Statements:
    try:
        statements = engine.classifier.classify(native, sql)
    except BadRequest as error:
        raise BadText(str(error)) from error
    if statements.kinds is None or (statements.kinds and statements.parameters is None):
        try:
            native.extract_statements(sql)
        except (duckdb.Error, ValueError) as error:
            raise _told(error) from error
        raise BadText(f"it has {len(sql)} characters, more than can be looked into")
    if not statements.kinds:
        raise BadText("it holds no statement")
    if statements.is_several:
        raise BadText(f"it holds {len(statements.kinds)} statements; write a file for each")
    if "TRANSACTION" in statements.kinds:
        raise BadText("BEGIN, COMMIT and ROLLBACK are for sessions of clients")
    return statements


def _told(error: Exception) -> BadText:
    line = _LINE.search(str(error))
    return BadText(_first_line(error), int(line[1]) if line else 0)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _with_casts(sql: str, types: Mapping[str, str]) -> str:
    """``sql`` with a cast around each parameter, found by DuckDB's own lexer.

    So NULL and an empty list have a type as well, and the plan is known beforehand.
    """
    data = sql.encode()
    tokens = duckdb.tokenize(sql)
    cuts = [start for start, _ in tokens] + [len(data)]
    kinds = [kind.name for _, kind in tokens]
    pieces: list[bytes] = []
    done = 0
    for i in range(len(kinds) - 1):
        if kinds[i] != "operator" or data[cuts[i] : cuts[i + 1]].strip() != b"$":
            continue
        name = _NAME.match(data[cuts[i + 1] : cuts[i + 2]].decode())
        type_ = types.get(name[0].lower()) if name else None
        if name is not None and type_ is not None:
            end = cuts[i + 1] + len(name[0])
            pieces += [data[done : cuts[i]], f"CAST(${name[0]} AS {type_})".encode()]
            done = end
    return b"".join([*pieces, data[done:]]).decode()


def _columns(
    native: duckdb.DuckDBPyConnection,
    sql: str,
    statements: Statements,
    values: Mapping[str, Declared],
) -> tuple[Column, ...] | None:
    """The columns of the result; None of a statement whose result only running it tells."""
    if statements.returns_rows:
        params = {name: bound(native, value, f"${name}") for name, value in values.items()}
        described = native.execute(f"DESCRIBE {without_end(sql)}", params or None)
        return tuple(Column(row[0], native.sqltype(row[1])) for row in described.fetchall())
    if statements.end_in_change and not re.search(r"\breturning\b", sql, re.IGNORECASE):
        return (Column("Count", native.sqltype("BIGINT")),)
    return None
