"""Arrow batches to JSON rows, exactly and without a Python object per value.

Each column becomes an array of JSON texts, nested ones from those of their children, and the
rows are joined from these. The forms are those of ``docs/protocol.md``: integers and decimals
keep every digit, doubles are the shortest text that reads back the same, NaN and infinities are
null, dates and timestamps are milliseconds since 1970, times, intervals, bits and UUIDs are
DuckDB's text, blobs are base64.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ujson

_NULL = pa.scalar("null")

_MS_PER_DAY = 86_400_000
_PER_MS = {"us": 1_000, "ns": 1_000_000}
_DAY = {unit: _MS_PER_DAY * factor for unit, factor in _PER_MS.items()}

# DuckDB's infinite dates and timestamps are the ends of their integers.
_INFINITE_DAYS = pa.array([2**31 - 1, -(2**31) + 1], pa.int32())
_INFINITE_TIMES = pa.array([2**63 - 1, -(2**63) + 1], pa.int64())

_NEEDS_ESCAPE = r'["\\\x00-\x1f]'
_CONTROL = r"[\x00-\x1f]"
_ESCAPES = (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"))


class RowEncoder:
    """Encodes batches of one result. ``names`` and ``types`` (``DuckDBPyType``) are its columns."""

    def __init__(self, names: list[str], types: list[Any]) -> None:
        self._keys = [_key(name) for name in names]
        self._types = types

    def encode(self, batch: pa.RecordBatch) -> bytes:
        """The rows of ``batch`` as JSON objects with commas between them, UTF-8."""
        texts = [
            encode_array(array, type_)
            for array, type_ in zip(batch.columns, self._types, strict=True)
        ]
        rows = _objects(self._keys, texts)
        return _joined(rows, pa.array([0, len(rows)], pa.int32()))[0].as_buffer().to_pybytes()  # type: ignore[no-any-return]


def encode_array(array: pa.Array, type_: Any) -> pa.Array:
    """The JSON text of each value of ``array``, a string array; nulls stay null.

    ``type_`` is the DuckDB type, which tells UHUGEINT, BIGNUM and BIT from their storage.
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    plain = _plain_type(array.type)
    if plain is not None:
        array = array.cast(plain)
    special = _BY_DUCKDB_TYPE.get(type_.id)
    if special is not None:
        return special(array)
    for matches, encoder in _BY_ARROW_TYPE:
        if matches(array.type):
            return encoder(array, type_)
    return _texts(array, lambda value: _quoted(str(value)))


def _plain_type(type_: Any) -> Any:
    """The usual form of a type that DuckDB's arrow settings, which any client can SET, replace."""
    if pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_large_list(type_) or pa.types.is_list_view(type_):
        return pa.list_(type_.value_type)
    return None


def _texts(array: pa.Array, text: Callable[[Any], str]) -> pa.Array:
    return pa.array([None if v is None else text(v) for v in array.to_pylist()], pa.string())


def _quoted(text: str) -> str:
    return ujson.dumps(text, ensure_ascii=False, escape_forward_slashes=False)


def _key(name: str) -> str:
    return _quoted(name) + ":"


def _objects(keys: list[str], texts: list[pa.Array]) -> pa.Array:
    """Objects from the texts of their members, element by element."""
    parts: list[Any] = []
    for key, text in zip(keys, texts, strict=True):
        parts += [("," if parts else "{") + key, pc.fill_null(text, _NULL)]
    return pc.binary_join_element_wise(*parts, "}", "")


def _joined(texts: pa.Array, offsets: pa.Array, mask: pa.Array | None = None) -> pa.Array:
    lists = pa.ListArray.from_arrays(offsets, pc.fill_null(texts, _NULL), mask=mask)
    return pc.binary_join(lists, ",")


def _wrapped(before: str, texts: pa.Array, after: str) -> pa.Array:
    return pc.binary_join_element_wise(before, texts, after, "")


def _number(array: pa.Array, _: Any) -> pa.Array:
    return pc.cast(array, pa.string())


def _boolean(array: pa.Array, _: Any) -> pa.Array:
    return pc.if_else(array, "true", "false")


def _floating(array: pa.Array, _: Any) -> pa.Array:
    text = pc.cast(array, pa.string())
    if pc.any(pc.equal(array, pc.trunc(array))).as_py():
        # So that readers which tell integers from doubles see one type in the column.
        text = pc.replace_substring_regex(text, r"^(-?\d+)$", r"\1.0")
    return pc.if_else(pc.is_finite(array), text, pa.scalar(None, pa.string()))


def _string(array: pa.Array, _: Any) -> pa.Array:
    if pc.any(pc.match_substring_regex(array, _NEEDS_ESCAPE)).as_py():
        for plain, escaped in _ESCAPES:
            array = pc.replace_substring(array, plain, escaped)
        if pc.any(pc.match_substring_regex(array, _CONTROL)).as_py():
            array = _texts(array, _escape_control)
    return _wrapped('"', array, '"')


def _escape_control(text: str) -> str:
    return "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in text)


def _date(array: pa.Array, _: Any) -> pa.Array:
    days = array.view(pa.int32())
    days = pc.if_else(pc.is_in(days, _INFINITE_DAYS), pa.scalar(None, pa.int32()), days)
    return pc.cast(pc.multiply(pc.cast(days, pa.int64()), _MS_PER_DAY), pa.string())


def _timestamp(array: pa.Array, _: Any) -> pa.Array:
    unit = array.type.unit
    value = array.view(pa.int64())
    value = pc.if_else(pc.is_in(value, _INFINITE_TIMES), pa.scalar(None, pa.int64()), value)
    if unit == "s":
        value = pc.multiply(value, 1000)
    elif unit in _PER_MS:
        # Integer division cuts towards zero; before 1970 that would round up.
        whole = pc.divide(value, _PER_MS[unit])
        cut = pc.and_(pc.less(value, 0), pc.not_equal(pc.multiply(whole, _PER_MS[unit]), value))
        value = pc.subtract(whole, pc.cast(cut, pa.int64()))
    return pc.cast(value, pa.string())


def _time(array: pa.Array, _: Any) -> pa.Array:
    text = pc.replace_substring_regex(pc.cast(array, pa.string()), r"\.?0+$", "")
    # The last moment of a day is a TIME for DuckDB, but out of range for Arrow.
    is_midnight = pc.equal(array.view(pa.int64()), _DAY[array.type.unit])
    return _wrapped('"', pc.if_else(is_midnight, "24:00:00", text), '"')


def _interval(value: Any) -> str:
    """DuckDB's text of an interval of months, days and nanoseconds."""
    parts = []
    years = int(value.months / 12)
    for count, unit in ((years, "year"), (value.months - 12 * years, "month"), (value.days, "day")):
        if count:
            parts.append(f"{count} {unit}" + ("" if abs(count) == 1 else "s"))
    if value.nanoseconds or not parts:
        seconds, micros = divmod(abs(value.nanoseconds) // 1000, 1_000_000)
        minutes, second = divmod(seconds, 60)
        fraction = f".{micros:06}".rstrip("0") if micros else ""
        sign = "-" if value.nanoseconds < 0 else ""
        parts.append(f"{sign}{minutes // 60:02}:{minutes % 60:02}:{second:02}{fraction}")
    return f'"{" ".join(parts)}"'


def _binary(array: pa.Array, _: Any) -> pa.Array:
    return _texts(array, lambda value: f'"{base64.b64encode(value).decode()}"')


def _dictionary(array: pa.Array, type_: Any) -> pa.Array:
    return _string(array.dictionary, type_).take(array.indices)


def _element(type_: Any) -> Any:
    """The DuckDB type of the elements of a list or array type."""
    return type_.children[0][1]


def _list(array: pa.Array, type_: Any) -> pa.Array:
    texts = encode_array(array.values, _element(type_))
    joined = _joined(texts, array.offsets, pc.is_null(array) if array.null_count else None)
    return _wrapped("[", joined, "]")


def _fixed_list(array: pa.Array, type_: Any) -> pa.Array:
    size = array.type.list_size
    start = array.offset * size
    texts = encode_array(array.values.slice(start, len(array) * size), _element(type_))
    offsets = pa.array(range(0, (len(array) + 1) * size, size), pa.int32())
    return _wrapped("[", _joined(texts, offsets, pc.is_null(array)), "]")


def _struct(array: pa.Array, type_: Any) -> pa.Array:
    keys, texts = [], []
    for index, (name, child) in enumerate(type_.children):
        keys.append(_key(name))
        texts.append(encode_array(array.field(index), child))
    return pc.if_else(pc.is_valid(array), _objects(keys, texts), pa.scalar(None, pa.string()))


def _map(array: pa.Array, type_: Any) -> pa.Array:
    (_, key_type), (_, item_type) = type_.children
    keys = encode_array(array.keys, key_type)
    is_text = pc.starts_with(keys, '"')
    keys = pc.if_else(is_text, keys, _string(keys, None))
    items = pc.fill_null(encode_array(array.items, item_type), _NULL)
    pairs = pc.binary_join_element_wise(keys, items, ":")
    joined = _joined(pairs, array.offsets, pc.is_null(array) if array.null_count else None)
    return _wrapped("{", joined, "}")


def _union(array: pa.Array, type_: Any) -> pa.Array:
    members = [
        encode_array(array.field(index), child)
        for index, (_, child) in enumerate(type_.children[1:])
    ]
    return pc.choose(pc.cast(array.type_codes, pa.int64()), *members)


def _unsigned_hugeint(array: pa.Array) -> pa.Array:
    # Arrow shows the 128 bits as a signed decimal.
    return _texts(array, lambda value: str(int(value) % (1 << 128)))


def _bignum(raw: bytes) -> str:
    """Three bytes of sign and length, then the magnitude, all inverted when negative."""
    if raw[0] & 0x80:
        return str(int.from_bytes(raw[3:], "big"))
    return str(-int.from_bytes(bytes(0xFF ^ byte for byte in raw[3:]), "big"))


def _bit(raw: bytes) -> str:
    """One byte that counts the padding bits, then the bits."""
    bits = "".join(f"{byte:08b}" for byte in raw[1:])
    return f'"{bits[raw[0] :]}"'


def _variant(array: pa.Array) -> pa.Array:
    # A query's VARIANT was cast to JSON text by DuckDB; elsewhere it comes as binary parts.
    return array if pa.types.is_string(array.type) else _texts(array, lambda v: _quoted(str(v)))


_BY_DUCKDB_TYPE: dict[str, Callable[[pa.Array], pa.Array]] = {
    "uhugeint": _unsigned_hugeint,
    "bignum": lambda array: _texts(array, _bignum),
    "bit": lambda array: _texts(array, _bit),
    "variant": _variant,
}

_BY_ARROW_TYPE: tuple[tuple[Callable[[Any], bool], Callable[[pa.Array, Any], pa.Array]], ...] = (
    (pa.types.is_integer, _number),
    (pa.types.is_string, _string),
    (pa.types.is_floating, _floating),
    (pa.types.is_boolean, _boolean),
    (pa.types.is_decimal, _number),
    (pa.types.is_date32, _date),
    (pa.types.is_timestamp, _timestamp),
    (pa.types.is_time, _time),
    (pa.types.is_interval, lambda array, _: _texts(array, _interval)),
    (pa.types.is_binary, _binary),
    (pa.types.is_dictionary, _dictionary),
    # A map is a list to Arrow, so it comes first.
    (pa.types.is_map, _map),
    (pa.types.is_list, _list),
    (pa.types.is_fixed_size_list, _fixed_list),
    (pa.types.is_struct, _struct),
    (pa.types.is_union, _union),
    (pa.types.is_null, lambda array, _: pa.nulls(len(array), pa.string())),
)
