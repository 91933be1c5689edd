"""Python values as parameters of a query, exactly."""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

Parameters = Sequence[Any] | Mapping[str, Any]

_INT64 = range(-(1 << 63), 1 << 63)
_HUGEINT = range(-(1 << 127), 1 << 127)
_UHUGEINT = range(1 << 128)
_DECIMAL_DIGITS = 38


def encode_parameters(params: Parameters) -> list[Any] | dict[str, Any]:
    """``params`` as the field of a message.

    A sequence is for ``?`` and ``$1``, a mapping for ``$name``. Values are None, bool, int, float,
    str, bytes, Decimal, datetime (with a time zone: TIMESTAMPTZ), date, time, timedelta, UUID, and
    lists and dictionaries of them; also ``{"$type": type, "value": text}`` for any type of DuckDB.
    Raises ``TypeError`` naming the parameter for everything else.
    """
    if isinstance(params, Mapping):
        return {_name(name): _encode(value, f"params.{name}") for name, value in params.items()}
    if isinstance(params, str | bytes) or not isinstance(params, Sequence):
        raise TypeError(f"params is a {_kind(params)}; it must be a sequence or a mapping.")
    return [_encode(value, f"params[{index}]") for index, value in enumerate(params)]


def _encode(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return _integer(value, name)
    if isinstance(value, float):
        return value if math.isfinite(value) else _typed("DOUBLE", _non_finite(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _typed("BLOB", base64.b64encode(value).decode())
    if isinstance(value, Decimal):
        return _decimal(value, name)
    if isinstance(value, uuid.UUID):
        return _typed("UUID", str(value))
    if isinstance(value, list | tuple):
        return [_encode(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {_name(key, name): _encode(item, f"{name}.{key}") for key, item in value.items()}
    return _temporal(value, name)


def _integer(value: int, name: str) -> Any:
    if value in _INT64:
        return value
    if value in _HUGEINT:
        return _typed("HUGEINT", str(value))
    if value in _UHUGEINT:
        return _typed("UHUGEINT", str(value))
    raise TypeError(f"{name} is an integer of more than 128 bits.")


def _non_finite(value: float) -> str:
    return "nan" if math.isnan(value) else "infinity" if value > 0 else "-infinity"


def _decimal(value: Decimal, name: str) -> Any:
    _, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise TypeError(f"{name} is a Decimal that is not finite.")
    scale = max(0, -exponent)
    width = max(len(digits) + max(0, exponent), scale)
    if width > _DECIMAL_DIGITS:
        raise TypeError(f"{name} is a Decimal of more than {_DECIMAL_DIGITS} digits.")
    return _typed(f"DECIMAL({width},{scale})", format(value, "f"))


def _temporal(value: Any, name: str) -> Any:
    # A datetime is a date too, so that it comes first.
    if isinstance(value, datetime):
        if value.tzinfo is None:
            return _typed("TIMESTAMP", value.isoformat(" "))
        return _typed("TIMESTAMPTZ", value.astimezone(timezone.utc).isoformat(" "))
    if isinstance(value, date):
        return _typed("DATE", value.isoformat())
    if isinstance(value, time):
        return _typed("TIME" if value.tzinfo is None else "TIMETZ", value.isoformat())
    if isinstance(value, timedelta):
        parts = f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"
        return _typed("INTERVAL", parts)
    raise TypeError(f"{name} is a {_kind(value)}, which has no SQL type here.")


def _typed(kind: str, value: str) -> dict[str, str]:
    return {"$type": kind, "value": value}


def _name(key: Any, inside: str = "") -> str:
    if not isinstance(key, str):
        place = f" in {inside}" if inside else ""
        raise TypeError(f"The name {key!r}{place} is a {_kind(key)}; it must be a string.")
    return key


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
