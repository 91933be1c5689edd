"""Names of tables in messages, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.messages import TableName

MAX_IDENTIFIER_LENGTH = 255

# Three parts of nothing but double quotes, each written twice. Matching takes two hundred times the
# memory of a text, so that a longer one must not be looked at.
_MAX_NAME_LENGTH = 3 * (2 * MAX_IDENTIFIER_LENGTH + 2) + 2

_TABLE_PART = re.compile(r'([^\W\d]\w*)|"((?:[^"]|"")+)"')


def parse_table_name(text: object, field: str = "tableName") -> TableName:
    """The parts of ``table``, ``schema.table`` or ``catalog.schema.table``.

    Each part is plain (a letter or underscore, then letters, digits and underscores) or in
    double quotes, where a double quote is written twice. Anything else is ``BadRequest``.
    """
    refused = BadRequest(
        f"{field} must be table, schema.table or catalog.schema.table; a part that is not "
        "letters, digits and underscores stands in double quotes."
    )
    if not isinstance(text, str) or "\0" in text:
        raise refused
    if len(text) > _MAX_NAME_LENGTH:
        raise BadRequest(f"A part of {field} is over {MAX_IDENTIFIER_LENGTH} bytes long.")
    parts = []
    position = 0
    while True:
        match = _TABLE_PART.match(text, position)
        if match is None:
            raise refused
        part = match[1] or match[2].replace('""', '"')
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            raise refused from None
        if length > MAX_IDENTIFIER_LENGTH:
            raise BadRequest(f"A part of {field} is over {MAX_IDENTIFIER_LENGTH} bytes long.")
        parts.append(part)
        position = match.end()
        if position == len(text) and len(parts) <= 3:
            return tuple(parts)
        if text[position : position + 1] != ".":
            raise refused
        position += 1


_PLAIN = re.compile(r"[^\W\d]\w*")


def table_text(parts: Sequence[str]) -> str:
    """What :func:`parse_table_name` makes ``parts`` of."""
    return ".".join(
        part if _PLAIN.fullmatch(part) else '"' + part.replace('"', '""') + '"' for part in parts
    )
