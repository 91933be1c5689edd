"""Values of parameters whose types the server itself knows, in the forms of JSON results.

What a result says comes back as the same value: dates and timestamps as milliseconds or text, BLOBs
as base64, MAPs as objects. A text does for every type, also where JSON would write a number.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import re
from collections.abc import Callable
from typing import Any

import duckdb

from sqlrooms_server.errors import BadRequest

_MS_PER_DAY = 86_400_000
_EPOCH = datetime.datetime(1970, 1, 1)

_INTEGERS = {
    **{f"{name}int": (-(1 << bits - 1), (1 << bits - 1) - 1) for name, bits in
       (("tiny", 8), ("small", 16), ("big", 64), ("huge", 128))},
    **{f"u{name}int": (0, (1 << bits) - 1) for name, bits in
       (("tiny", 8), ("small", 16), ("big", 64), ("huge", 128))},
    "integer": (-(1 << 31), (1 << 31) - 1),
    "uinteger": (0, (1 << 32) - 1),
}  # fmt: skip
# Python converts no longer texts.
_WHOLE = re.compile(r"[+-]?\d{1,4000}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?")
# Doubles hold every whole number up to here.
_EXACT = 1 << 53

# What the errors of DuckDB begin with.
_PREFIX = re.compile(r"^(?:[A-Z][A-Za-z ]* Error: |Failed to cast value: )+")


class Declared(dict[str, Any]):
    """``{"$type": type, "value": value}`` of the server, where clients send plain objects.

    A dictionary, so that the key of a kept result has it.
    """

    def __init__(self, type_: str, value: Any) -> None:
        super().__init__({"$type": type_, "value": value})


def bound(cursor: duckdb.DuckDBPyConnection, declared: Declared, where: str) -> Any:
    """What DuckDB binds for ``declared``. Raises ``BadRequest``, which calls it ``where``."""
    name, value = declared["$type"], declared["value"]
    if value is None:
        return None
    try:
        type_ = cursor.sqltype(name)
        conversion = _Conversion()
        bindable = duckdb.Value(conversion.of(value, type_), type_)
        if not conversion.is_certain:
            # Binding it alone tells whether it can be, before anything has run.
            cursor.execute("SELECT typeof($1)", [bindable]).fetchall()
    except _Unfit as error:
        raise BadRequest(f"{where} must be {name}, not {_shown(value)}: {error}.") from error
    except (duckdb.Error, TypeError, ValueError, RuntimeError) as error:
        # The last ones come from the binding of Python and DuckDB.
        reason = _PREFIX.sub("", str(error)).partition("\n")[0].rstrip(".")
        raise BadRequest(f"{where} must be {name}, not {_shown(value)}: {reason}.") from error
    return bindable


def unsupported(type_: Any) -> str | None:
    """The part of ``type_`` that no parameter can have; None when there is none."""
    if type_.id in _PARTS:
        children = [child for _, child in type_.children if not isinstance(child, int)]
        if type_.id == "array":
            children = children[:1]
        return next((part for child in children if (part := unsupported(child))), None)
    return None if type_.id in _INTEGERS or type_.id in _CONVERSIONS else str(type_)


def is_nested(type_: Any) -> bool:
    """Whether JSON writes values of ``type_`` as arrays or objects."""
    return type_.id in _PARTS


def _shown(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return text if len(text) <= 80 else text[:80] + "…"


class _Unfit(Exception):
    """A value does not fit its type. The text says why."""


class _Conversion:
    """One value, and all that it holds. ``is_certain``: nothing is left for DuckDB to refuse."""

    def __init__(self) -> None:
        self.is_certain = True

    def of(self, value: Any, type_: Any) -> Any:
        if value is None:
            return None
        kind = type_.id
        if kind in _INTEGERS:
            return _integer(value, *_INTEGERS[kind])
        if kind in _PARTS:
            converted: Any = _PARTS[kind](self, value, type_)
            return converted
        if kind not in _CERTAIN:
            self.is_certain = False
        return _CONVERSIONS[kind](value, type_)

    def _list(self, value: Any, type_: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _Unfit("it is no array")
        children = dict(type_.children)
        size = children.get("size", len(value))
        if len(value) != size:
            raise _Unfit(f"it has {len(value)} elements")
        element = children["child"]
        return [self.of(item, element) for item in value]

    def _struct(self, value: Any, type_: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Unfit("it is no object")
        children = dict(type_.children)
        for name in value.keys() - children.keys():
            raise _Unfit(f"it has a field {_shown(name)}")
        for name in children.keys() - value.keys():
            raise _Unfit(f"it has no field {_shown(name)}")
        return {name: self.of(value[name], child) for name, child in children.items()}

    def _map(self, value: Any, type_: Any) -> dict[str, list[Any]]:
        if not isinstance(value, dict):
            raise _Unfit("it is no object")
        children = dict(type_.children)
        keys = [self.of(_text(name), children["key"]) for name in value]
        if len(set(map(str, keys))) < len(keys):
            raise _Unfit("two of its keys are the same")
        # DuckDB would take an object of two lists for these.
        return {"key": keys, "value": [self.of(item, children["value"]) for item in value.values()]}


def _integer(value: Any, low: int, high: int) -> int:
    number = _whole(value)
    if number is None or not low <= number <= high:
        raise _Unfit(f"it is no whole number from {low} to {high}")
    return number


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isascii() and _WHOLE.fullmatch(value) else None
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bignum(value: Any, _: Any) -> str:
    number = _whole(value)
    if number is None:
        raise _Unfit("it is no whole number")
    return str(number)


def _decimal(value: Any, _: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)
    if isinstance(value, str) and value.isascii() and _NUMBER.fullmatch(value):
        return value
    raise _Unfit("it is no number")


def _double(value: Any, _: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    return _text(value, "it is no number")


def _boolean(value: Any, _: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise _Unfit("it is neither true nor false")


def _text(value: Any, problem: str = "it is no text") -> str:
    if not isinstance(value, str):
        raise _Unfit(problem)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Unfit("it holds half of a surrogate pair") from error
    return value


def _varchar(value: Any, type_: Any) -> str:
    if str(type_) != "JSON":
        return _text(value)
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        json.loads(_text(text))
    except (ValueError, RecursionError) as error:
        raise _Unfit(f"it is no JSON text, {error}") from error
    return text


def _enum(value: Any, type_: Any) -> str:
    ((_, known),) = type_.children
    if value not in known:
        listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        raise _Unfit(f"it is none of {listed}")
    return str(value)


def _blob(value: Any, _: Any) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Unfit("it is no base64") from error


def _plain(value: Any, _: Any) -> str:
    return _text(value)


def _date(value: Any, _: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    moment = _moment(value)
    if moment != datetime.datetime.combine(moment, datetime.time()):
        raise _Unfit("it is not the beginning of a day in UTC")
    return moment.date().isoformat()


def _timestamp(value: Any, _: Any) -> str:
    return _text(value) if isinstance(value, str) else _moment(value).isoformat(" ")


def _timestamptz(value: Any, _: Any) -> str:
    return _text(value) if isinstance(value, str) else _moment(value).isoformat(" ") + "+00"


def _moment(value: Any) -> datetime.datetime:
    """The time that is so many milliseconds after the beginning of 1970."""
    milliseconds = _whole(value)
    if milliseconds is None:
        raise _Unfit("it is neither a text nor a whole number of milliseconds")
    try:
        return _EPOCH + datetime.timedelta(
            milliseconds // _MS_PER_DAY, milliseconds=milliseconds % _MS_PER_DAY
        )
    except OverflowError as error:
        raise _Unfit("a year of more than four digits must be sent as text") from error


_CONVERSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "bignum": _bignum,
    "decimal": _decimal,
    "double": _double,
    "float": _double,
    "boolean": _boolean,
    "varchar": _varchar,
    "enum": _enum,
    "blob": _blob,
    "date": _date,
    "timestamp": _timestamp,
    "timestamp_s": _timestamp,
    "timestamp_ms": _timestamp,
    "timestamp_ns": _timestamp,
    "timestamp with time zone": _timestamptz,
    **dict.fromkeys(("uuid", "time", "time with time zone", "time_ns", "interval", "bit"), _plain),
}
_CERTAIN = frozenset(("boolean", "varchar", "enum", "blob", "bignum"))

_PARTS: dict[str, Callable[[_Conversion, Any, Any], Any]] = {
    "list": _Conversion._list,
    "array": _Conversion._list,
    "struct": _Conversion._struct,
    "map": _Conversion._map,
}
