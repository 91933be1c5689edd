"""Changes to bytes, to JSON and to texts that leave most of them as they were."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

_NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    65536,
    2**31,
    -(2**31) - 1,
    2**53,
    2**63,
    2**64,
    10**40,
    1.5,
    1e300,
)
_TEXTS = (
    "",
    "a",
    "*",
    "\0",
    "é",
    "\ud800",
    "\U0001f600",
    "a.b",
    '"a"',
    '"',
    "'",
    "1-2",
    "__proto__",
)
_WORDS = (
    b"\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"{",
    b"[",
    b'"',
    b"loro",
)


def of_bytes(data: bytes, chance: random.Random) -> bytes:
    """``data`` with one to eight small damages."""
    changed = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(changed))
        match chance.randrange(8):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                # What Arrow counts and points with stands at multiples of four.
                at -= at % 4
                changed[at : at + 4] = chance.choice(
                    (b"\xff\xff\xff\x7f", b"\0\0\0\x80", bytes(4), b"\1\0\0\0")
                )
            case 3:
                del changed[at : at + chance.choice((1, 4, 8, 64, 1000))]
            case 4:
                changed[at:at] = changed[at : at + chance.choice((1, 8, 64, 1000))]
            case 5:
                changed[at:at] = chance.choice(_WORDS)
            case 6:
                other = chance.randrange(len(changed))
                size = chance.choice((4, 8, 64))
                changed[at : at + size] = changed[other : other + size]
            case _:
                del changed[at + 1 :]
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)


def of_json(text: bytes, chance: random.Random, names: Sequence[str]) -> bytes:
    """The JSON object in ``text`` with other values and fields; some of ``names`` among them."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return of_bytes(text, chance)
    if not isinstance(fields, dict):
        return of_bytes(text, chance)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not fields or chance.random() < 0.3:
            fields[chance.choice(names)] = value(chance, names)
        name = chance.choice(list(fields))
        match chance.randrange(6):
            case 0:
                del fields[name]
            case 1:
                fields[chance.choice(names)] = fields[name]
            case 2:
                fields[name] = [fields[name]]
            case 3 if isinstance(fields[name], str):
                fields[name] = of_text(fields[name], chance, _TEXTS)
            case _:
                fields[name] = value(chance, names)
    return json.dumps(fields, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")


def value(chance: random.Random, names: Sequence[str], depth: int = 0) -> Any:
    """Any JSON value."""
    match chance.randrange(8 if depth < 4 else 5):
        case 0:
            return None
        case 1:
            return chance.random() < 0.5
        case 2:
            return chance.choice(_NUMBERS)
        case 3:
            return chance.choice(_TEXTS)
        case 4:
            return chance.choice(names)
        case 5:
            return chance.choice(_TEXTS[1:]) * chance.choice((64, 255, 256, 300, 3000))
        case 6:
            return [value(chance, names, depth + 1) for _ in range(chance.randrange(4))]
        case _:
            count = chance.randrange(4)
            return {chance.choice(names): value(chance, names, depth + 1) for _ in range(count)}


def of_text(text: str, chance: random.Random, parts: Sequence[str]) -> str:
    """``text`` with some of ``parts`` in it, or something missing."""
    at, other = chance.randrange(len(text) + 1), chance.randrange(len(text) + 1)
    first, last = min(at, other), max(at, other)
    match chance.randrange(5):
        case 0:
            return text[:first] + text[last:]
        case 1:
            return text[:at] + text[first : first + 20] + text[at:]
        case 2:
            return text[:first] + chance.choice(parts) + text[last:]
        case _:
            return text[:at] + chance.choice(parts) + text[at:]


def stretched(data: bytes, size: int) -> bytes:
    """The bytes after the first two, with a part that these choose repeated up to ``size``."""
    if len(data) < 3:
        return data
    body = data[2:]
    first, last = sorted((data[0] * len(body) // 256, data[1] * len(body) // 256))
    part = body[first : last + 1]
    return body[:first] + part * (size // len(part)) + body[last + 1 :]
