"""How an entry is written: magic, length of the JSON, JSON, body, SHA-256 of all before it.

The JSON has the digest of the key, the token, the facts and the lengths of the pieces of the body.
Nothing of a record is believed before its hash was compared; what the JSON says is checked anyway,
since whoever can write to the directory can also hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any

from sqlrooms_server.cache.entries import SMALL_BYTES, Entry, OpenFile, frozen

_MAGIC = b"sqlroom1"
_HEAD = struct.Struct(">8sI")
_HASH_BYTES = 32
_PIECE_BYTES = 1 << 20

# The lengths of a million pieces.
_MAX_JSON_BYTES = 16 << 20


class Damaged(ValueError):
    """This is not a record of that key as it was written."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An entry to be written under the digest of its key."""

    head: bytes
    entry: Entry

    @classmethod
    def of(cls, digest: str, entry: Entry) -> Record:
        """Raises ``ValueError`` or ``TypeError`` for what JSON cannot say."""
        facts = {
            "key": digest,
            "token": entry.token,
            "facts": entry.facts,
            "lengths": entry.lengths,
        }
        text = json.dumps(facts, separators=(",", ":"), allow_nan=False).encode()
        return cls(_HEAD.pack(_MAGIC, len(text)) + text, entry)

    @property
    def size(self) -> int:
        return len(self.head) + self.entry.size + _HASH_BYTES

    def pieces(self) -> Iterator[bytes]:
        hash_ = hashlib.sha256(self.head)
        yield self.head
        for chunk in self.entry.chunks():
            hash_.update(chunk)
            yield chunk
        yield hash_.digest()


def load(digest: str, source: bytes | OpenFile) -> Entry:
    """The entry of ``source``, in memory if it is small. Raises ``Damaged`` and ``OSError``."""
    size = len(source) if isinstance(source, bytes) else source.size()
    if isinstance(source, OpenFile) and size <= SMALL_BYTES:
        source = source.read(0, size)
    end = size - _HASH_BYTES
    if end < _HEAD.size:
        raise Damaged("A record of the result cache is too short.")
    _compare_hash(source, end)
    magic, length = _HEAD.unpack(_read(source, 0, _HEAD.size))
    offset = _HEAD.size + length
    if magic != _MAGIC or length > _MAX_JSON_BYTES or offset > end:
        raise Damaged("A record of the result cache has no valid head.")
    token, facts, lengths = _described(_read(source, _HEAD.size, length), digest, end - offset)
    body = None
    if isinstance(source, bytes):
        body = source[offset:end]
        lengths = (len(body),) if body else ()
    return Entry(
        token=token,
        facts=facts,
        size=end - offset,
        body=body,
        lengths=lengths,
        file=None if isinstance(source, bytes) else source,
        offset=offset,
    )


def _described(
    text: bytes | memoryview, digest: str, size: int
) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    try:
        value = json.loads(bytes(text))
        token, facts = frozen(value["token"]), frozen(value["facts"])
        lengths = tuple(value["lengths"])
        is_right = (
            value["key"] == digest
            and isinstance(facts, dict)
            and all(type(length) is int and length > 0 for length in lengths)
            and sum(lengths) == size
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged("A record of the result cache has no valid description.") from error
    if not is_right:
        raise Damaged("A record of the result cache belongs to something else.")
    return token, facts, lengths


def _compare_hash(source: bytes | OpenFile, end: int) -> None:
    hash_ = hashlib.sha256()
    for offset in range(0, end, _PIECE_BYTES):
        hash_.update(_read(source, offset, min(_PIECE_BYTES, end - offset)))
    if hash_.digest() != _read(source, end, _HASH_BYTES):
        raise Damaged("A record of the result cache was changed.")


def _read(source: bytes | OpenFile, offset: int, length: int) -> bytes | memoryview:
    if isinstance(source, bytes):
        return memoryview(source)[offset : offset + length]
    return source.read(offset, length)
