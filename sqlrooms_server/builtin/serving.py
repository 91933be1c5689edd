"""A file as the answer to an HTTP request: whole, in part, or not at all because the client has it.

The rules are those of RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import quote

from sqlrooms_server.builtin.beneath import OpenFile
from sqlrooms_server.plugin import Response

# A step of an answer: large enough that its cost does not count, small enough for many clients.
_STEP_BYTES = 256 << 10

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

_PLAIN = re.compile(r"[^A-Za-z0-9!#$&+.^_`|~ -]")


class FileBody:
    """The bytes of ``file`` from ``start`` to before ``end``, step by step. Closes it."""

    def __init__(self, file: OpenFile, start: int, end: int) -> None:
        self._file = file
        self._at = start
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data = self._file.read(self._at, min(_STEP_BYTES, self._end - self._at))
        if not data:
            raise StopIteration
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()


def answer(
    file: OpenFile, asked: Mapping[str, str], content_type: str, headers: Mapping[str, str]
) -> Response:
    """The answer to a GET with the headers ``asked``; ``headers`` are further ones of it."""
    tag = etag(file.size, file.modified)
    given = {
        "ETag": tag,
        "Last-Modified": http_date(file.modified),
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        **headers,
    }
    if is_known(asked, tag, file.modified):
        file.close()
        return Response(b"", 304, content_type, given)
    start, end, status = 0, file.size, 200
    wanted = _RANGE.fullmatch(asked.get("range", "").replace(" ", ""))
    if wanted and any(wanted.groups()) and _is_same(asked.get("if-range"), tag, file.modified):
        start, end = _bounds(wanted[1], wanted[2], file.size)
        if start >= end:
            file.close()
            given["Content-Range"] = f"bytes */{file.size}"
            return Response("The file has no such range.", 416, headers=given)
        status = 206
        given["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    body = FileBody(file, start, end)
    return Response(body, status, content_type, given, length=end - start)


def is_known(asked: Mapping[str, str], tag: str, modified: int) -> bool:
    """Whether the client has the file that has ``tag`` and was ``modified`` then."""
    tags = asked.get("if-none-match")
    if tags is not None:
        known = {one.strip().removeprefix("W/") for one in tags.split(",")}
        return tag in known or "*" in known
    since = asked.get("if-modified-since")
    return since is not None and modified // 10**9 <= _seconds(since)


def etag(size: int, modified: int) -> str:
    """What tells a file from the one that it was before."""
    return f'"{modified:x}-{size:x}"'


def http_date(modified: int) -> str:
    return formatdate(modified // 10**9, usegmt=True)


def attachment(name: str) -> str:
    """The value of ``Content-Disposition`` for a file to be saved as ``name`` (RFC 6266)."""
    return f"attachment; filename=\"{_PLAIN.sub('_', name)}\"; filename*=UTF-8''{quote(name, '')}"


def _is_same(condition: str | None, tag: str, modified: int) -> bool:
    """Whether the file is the one of which the client has a part (``If-Range``)."""
    return condition is None or condition.strip() in (tag, http_date(modified))


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _seconds(date: str) -> float:
    """``date`` in seconds since 1970; before all files if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return -1.0
