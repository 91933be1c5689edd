"""Who somebody is, and what that one may do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlrooms_server.db.policy import UNRESTRICTED, Policy


class Names:
    """A set of names of channels or rooms, given by patterns.

    In a pattern ``*`` stands for any text and ``{user}`` for the name of the identity.
    """

    def __init__(self, patterns: Iterable[str], user: str = "") -> None:
        self.patterns = tuple(patterns)
        self._has_all = "*" in self.patterns
        self._matches = re.compile("|".join(_expression(pattern, user) for pattern in patterns))

    def __contains__(self, name: str) -> bool:
        if self._has_all:
            return True
        return bool(self.patterns) and self._matches.fullmatch(name) is not None

    def of(self, user: str) -> Names:
        """The names when ``{user}`` is ``user``."""
        return Names(self.patterns, user) if any("{user}" in p for p in self.patterns) else self


def _expression(pattern: str, user: str) -> str:
    parts = (re.escape(part).replace(r"\*", "(?s:.*)") for part in pattern.split("{user}"))
    return "(?:" + re.escape(user).join(parts) + ")"


ALL_NAMES = Names(["*"])
NO_NAMES = Names([])


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What everybody of a role may do. Of the numbers, 0 means that the role sets no limit.

    ``query_timeout`` is seconds, ``message_rate`` messages in a second and connection.
    """

    name: str
    sql: Policy = UNRESTRICTED
    read_channels: Names = ALL_NAMES
    write_channels: Names = ALL_NAMES
    read_rooms: Names = ALL_NAMES
    write_rooms: Names = ALL_NAMES
    max_result_rows: int = 0
    query_timeout: int = 0
    message_rate: int = 0


ADMIN = Role(name="admin")

# Of strangers, who are not heard at all.
NOBODY = Role(
    name="",
    sql=Policy(read_only=True, files=False, extensions=False, kinds=frozenset()),
    read_channels=NO_NAMES,
    write_channels=NO_NAMES,
    read_rooms=NO_NAMES,
    write_rooms=NO_NAMES,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody whose credentials were right. ``user`` is empty for those who share one token.

    ``credential`` tells which one it was, so that it can be looked up again after the file of
    tokens has changed. ``expires_at`` is in seconds since 1970.
    """

    user: str
    role: Role
    credential: bytes = field(default=b"", repr=False)
    expires_at: float | None = None
