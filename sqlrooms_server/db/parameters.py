"""Values of ``params`` to values that DuckDB binds; the table is in ``docs/protocol.md``."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import duckdb

from sqlrooms_server.db.declared import Declared, bound
from sqlrooms_server.db.statements import Statements
from sqlrooms_server.errors import BadRequest
from sqlrooms_server.messages import Params

_TYPE = "$type"
_MAX_DEPTH = 100
_MAX_TYPE_LENGTH = 1000
_MIN_INTEGER = -(1 << 127)
_MAX_INTEGER = (1 << 128) - 1


def bindable(cursor: duckdb.DuckDBPyConnection, params: Params, statements: Statements) -> Params:
    """``params`` as DuckDB takes them. Raises ``BadRequest`` naming the one that does not fit."""
    if statements.parameters is not None:
        _check_names(params, statements.parameters)
    if isinstance(params, list):
        return [_value(cursor, value, f"params[{i}]", 0) for i, value in enumerate(params)]
    return {name: _value(cursor, value, f"params.{name}", 0) for name, value in params.items()}


def check_binds(cursor: duckdb.DuckDBPyConnection, params: Params) -> None:
    """Raise ``BadRequest`` for one of ``params``, as :func:`bindable` made them, that cannot be
    bound at all."""
    named = enumerate(params) if isinstance(params, list) else params.items()
    for name, value in named:
        try:
            cursor.execute("SELECT typeof($1)", [value]).fetchall()
        except _UNBINDABLE as error:
            where = f"params[{name}]" if isinstance(params, list) else f"params.{name}"
            raise BadRequest(f"{where} cannot be bound: {error}") from error


# RuntimeError and ValueError come from the binding of Python and DuckDB.
_UNBINDABLE = (duckdb.Error, TypeError, ValueError, RuntimeError)


def _check_names(params: Params, wanted: frozenset[str]) -> None:
    """DuckDB's names of parameters are its numbers too, and their case does not matter."""
    if isinstance(params, list):
        given = {str(number) for number in range(1, len(params) + 1)}
        if len(given) != len(wanted):
            raise BadRequest(f"params has {_counted(len(given), 'value')}, but {_wants(wanted)}.")
    else:
        given = {name.lower() for name in params}
        if len(given) < len(params):
            raise BadRequest("params has names that differ only in upper and lower case.")
    lowered = {name.lower() for name in wanted}
    missing, extra = sorted(lowered - given), sorted(given - lowered)
    if missing:
        raise BadRequest(f"params has no value for {_listed(missing)}; {_wants(wanted)}.")
    if extra:
        raise BadRequest(f"params has {_listed(extra)}, but {_wants(wanted)}.")


def _wants(names: frozenset[str]) -> str:
    if not names:
        return "the last statement has no parameters"
    plural = "parameter" if len(names) == 1 else "parameters"
    return f"the last statement has the {plural} {_listed(sorted(names))}"


def _listed(names: list[str]) -> str:
    shown = [f"${name}" for name in names[:10]]
    return ", ".join(shown) + (", …" if len(names) > 10 else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _value(cursor: duckdb.DuckDBPyConnection, value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise BadRequest(f"{where} is nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, Declared):
        return bound(cursor, value, where)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest(f"{where} is too large for a DOUBLE.")
    if isinstance(value, int) and not _MIN_INTEGER <= value <= _MAX_INTEGER:
        raise BadRequest(
            f"{where} does not fit into 128 bits; send it as text with its type: "
            '{"$type": "BIGNUM", "value": "…"}.'
        )
    if isinstance(value, list):
        items = enumerate(value)
        return [_value(cursor, item, f"{where}[{i}]", depth + 1) for i, item in items]
    if not isinstance(value, dict):
        return value
    if _TYPE in value:
        return _typed(cursor, value, where)
    if not value:
        raise BadRequest(f"{where} is an empty object, which no SQL type has.")
    members = {
        _text(name, where): _value(cursor, item, f"{where}.{name}", depth + 1)
        for name, item in value.items()
    }
    return _not_a_map(cursor, members, where) if members.keys() == {"key", "value"} else members


def _not_a_map(cursor: duckdb.DuckDBPyConnection, members: dict[str, Any], where: str) -> Any:
    """``members``, key and value, so that they are a MAP only if both are lists.

    DuckDB takes any two of one length for a MAP, also texts, where it then fails for good.
    """
    if all(isinstance(member, list) for member in members.values()):
        return members
    lengths = {len(member) for member in members.values() if isinstance(member, list | dict)}
    if all(isinstance(member, list | dict) for member in members.values()) and len(lengths) == 1:
        raise BadRequest(f"{where} would be taken for a MAP; send it with its $type, a STRUCT.")
    # A Value has no length.
    text = cursor.sqltype("VARCHAR")
    return {
        name: duckdb.Value(member, text) if isinstance(member, str | None) else member
        for name, member in members.items()
    }


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{where[:200]!a} holds half of a surrogate pair.") from error
    return value


def _typed(cursor: duckdb.DuckDBPyConnection, fields: dict[str, Any], where: str) -> Any:
    """The value of ``{"$type": …, "value": …}``, converted by DuckDB as a cast does."""
    name, value = fields[_TYPE], fields.get("value")
    if fields.keys() != {_TYPE, "value"}:
        raise BadRequest(f"{where} must have exactly the fields $type and value.")
    if not isinstance(name, str) or not 0 < len(_text(name, where)) <= _MAX_TYPE_LENGTH:
        raise BadRequest(f"$type of {where} must be the name of a DuckDB type.")
    try:
        type_ = cursor.sqltype(name)
        if isinstance(value, str):
            value = _decoded(value, where) if type_.id == "blob" else _text(value, where)
        bound = duckdb.Value(value, type_)
        # Binding it alone tells whether it can be, before anything has run. Its type alone is
        # read, since Python reads TIMESTAMPTZ only with pytz.
        bound_type = cursor.execute("SELECT typeof($1)", [bound]).fetchall()[0][0]
    except _UNBINDABLE as error:
        raise BadRequest(f"{where} is no {name[:100]}: {error}") from error
    # DuckDB takes some values as what they look like; NULL and an empty list have no type.
    if bound_type != str(type_) and '"NULL"' not in bound_type:
        raise BadRequest(f"{where} is no {name[:100]}, but {bound_type[:100]}.")
    return bound


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where} is no base64: {error}.") from error
