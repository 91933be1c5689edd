"""Arrow values as text for people, and as JSON."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

_FRACTION = re.compile(r"\.(\d*?)0*(?!\d)")


def texts(column: pa.Array) -> list[str | None]:
    """Each value as text, None for NULL."""
    return _each(column, text)


def json_texts(column: pa.Array) -> list[str]:
    """Each value as JSON text."""
    return [value or "null" for value in _each(column, json_text)]


def text(value: Any) -> str:
    """A value other than NULL as text: numbers with every digit, bytes as ``\\x`` and hex."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    if isinstance(value, pa.MonthDayNano):
        return _interval(value)
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, list | dict):
        return json_text(value)
    return str(value)


def json_text(value: Any) -> str:
    """A value as JSON: numbers with every digit, NaN and infinities as null, bytes as base64,
    dates, times and intervals as text."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | Decimal) and not isinstance(value, pa.MonthDayNano):
        return text(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "null"
    if isinstance(value, bytes):
        return json.dumps(base64.b64encode(value).decode())
    if isinstance(value, list) and value and all(type(item) is tuple for item in value):
        # This is how pyarrow gives a MAP.
        value = {text(key): item for key, item in value}
    if isinstance(value, list):
        return f"[{','.join(map(json_text, value))}]"
    if isinstance(value, dict):
        fields = (f"{json_text(str(key))}:{json_text(item)}" for key, item in value.items())
        return f"{{{','.join(fields)}}}"
    return json.dumps(text(value), ensure_ascii=False)


def _each(column: pa.Array, convert: Callable[[Any], str]) -> list[str | None]:
    if pa.types.is_temporal(column.type) and not pa.types.is_interval(column.type):
        # Python's own types have neither nanoseconds nor years after 9999.
        column = pa.array(
            [_without_zeros(value) for value in column.cast(pa.string()).to_pylist()], pa.string()
        )
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):
        values = [str(value) if value.is_valid else None for value in column]
    return [None if value is None else convert(value) for value in values]


def _without_zeros(value: str | None) -> str | None:
    return value and _FRACTION.sub(lambda found: f".{found[1]}" if found[1] else "", value)


def _interval(value: Any) -> str:
    counts = ((value.months, "month"), (value.days, "day"))
    parts = [f"{count} {unit}{'' if abs(count) == 1 else 's'}" for count, unit in counts if count]
    if value.nanoseconds or not parts:
        seconds, rest = divmod(abs(value.nanoseconds), 1_000_000_000)
        sign = "-" if value.nanoseconds < 0 else ""
        fraction = f".{rest:09d}".rstrip("0") if rest else ""
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        parts.append(f"{sign}{clock}{fraction}")
    return " ".join(parts)
