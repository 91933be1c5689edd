"""A cached result, and one that is being collected."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

# Larger results are not worth the memory: reading a file of this size takes a millisecond.
SMALL_BYTES = 1 << 20


class Overflow(Exception):
    """The result is too large to be remembered, or there is no room for it now."""


class OpenFile:
    """A file that stays readable after it was removed, and is closed with its last user."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def append(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises ``OSError``."""
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise OSError("A file of the result cache became shorter.")
            data += more
        return data

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def is_regular(self) -> bool:
        return stat.S_ISREG(os.fstat(self._fd).st_mode)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A complete result. It never changes and may be used by any thread.

    In ``token`` and ``facts`` every list and tuple is a tuple, whether the entry comes from memory
    or from disk. ``size`` is in bytes; ``body`` is there when all of it is in memory.
    """

    token: Any
    facts: dict[str, Any]
    size: int
    body: bytes | None
    lengths: tuple[int, ...] = ()
    file: OpenFile | None = None
    offset: int = 0

    def chunks(self) -> Iterator[bytes]:
        """The body: a file in the pieces that were appended, memory as one. Any number of threads
        may iterate at once. Raises ``OSError`` when the file is damaged meanwhile."""
        if self.file is None:
            if self.body:
                yield self.body
            return
        offset = self.offset
        for length in self.lengths:
            yield self.file.read(offset, length)
            offset += length


class Spool:
    """Collects a result of at most ``limit`` bytes for one worker.

    The first MiB stays in memory; after that all of it is in the file that ``open_file`` gives,
    which has no name.
    """

    def __init__(self, limit: int, open_file: Callable[[], OpenFile]) -> None:
        self._limit = limit
        self._open_file = open_file
        self._pieces: list[bytes] = []
        self._lengths: list[int] = []
        self._size = 0
        self._file: OpenFile | None = None
        self._closed = False

    def append(self, chunk: bytes | memoryview) -> None:
        """Raises ``Overflow``, and from then on always."""
        length = memoryview(chunk).nbytes
        if self._closed or self._size + length > self._limit:
            self.close()
            raise Overflow(f"The result is larger than {self._limit} bytes.")
        if not length:
            return
        self._size += length
        self._lengths.append(length)
        if self._file is None and self._size <= SMALL_BYTES:
            self._pieces.append(bytes(chunk))
            return
        try:
            if self._file is None:
                self._file = self._open_file()
                for piece in self._pieces:
                    self._file.append(piece)
                self._pieces.clear()
            self._file.append(chunk)
        except OSError as error:
            self.close()
            raise Overflow(f"The result cannot be kept: {error.strerror or error}.") from error

    def finish(self, token: Any, facts: dict[str, Any]) -> Entry:
        """The entry. ``token`` and ``facts`` are JSON values. Raises ``Overflow``."""
        if self._closed:
            raise Overflow("The result was given up.")
        body = b"".join(self._pieces) if self._file is None else None
        entry = Entry(
            token=frozen(token),
            facts={name: frozen(value) for name, value in facts.items()},
            size=self._size,
            body=body,
            lengths=(self._size,) if body else tuple(self._lengths),
            file=self._file,
        )
        self.close()
        return entry

    def close(self) -> None:
        self._closed = True
        self._pieces = []
        self._file = None


def frozen(value: Any) -> Any:
    """``value`` with tuples for lists, at every depth."""
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    if isinstance(value, dict):
        return {name: frozen(item) for name, item in value.items()}
    return value
