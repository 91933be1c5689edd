"""Which texts only read, so that they can be sent again after the connection was lost."""

from __future__ import annotations

import re

_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*([a-z]+)", re.IGNORECASE | re.DOTALL)
_READS = frozenset(("select", "from", "with", "values", "describe", "show", "summarize", "explain"))
# WITH and EXPLAIN ANALYZE may hold a change, and a function may make one. Found in a string or a
# comment they only prevent a second attempt.
_CHANGES = re.compile(
    r"\b(?:insert|update|delete|merge|truncate|copy|create|drop|alter|attach|detach|install|load"
    r"|import|export|call|pragma|set|use|vacuum|checkpoint|execute|nextval)\b",
    re.IGNORECASE,
)


def is_read(sql: str) -> bool:
    """True only for a single statement that certainly changes nothing."""
    first = _FIRST_WORD.match(sql)
    return (
        first is not None
        and first[1].lower() in _READS
        and ";" not in sql.rstrip().removesuffix(";")
        and _CHANGES.search(sql) is None
    )
