"""Who somebody is, and what that one may do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from sqlrooms_server.db.policy import UNRESTRICTED, Policy

_USER = "{user}"

# Others see it, in terminals too: neither control characters nor halves of surrogate pairs.
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


def is_user_name(name: object) -> TypeGuard[str]:
    """Whether ``name`` can be that of a user."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


class Names:
    """A set of names of channels or rooms, or of paths of files, given by patterns.

    In a pattern ``*`` stands for any text and ``{user}`` for the name of the identity.
    """

    def __init__(self, patterns: Iterable[str], user: str = "") -> None:
        self._patterns = tuple(patterns)
        self._user = user if any(_USER in pattern for pattern in self._patterns) else ""
        self._has_all = "*" in self._patterns
        expressions = (_expression(pattern, user) for pattern in self._patterns)
        self._matches = re.compile("|".join(expressions))

    def __contains__(self, name: str) -> bool:
        if self._has_all:
            return True
        return bool(self._patterns) and self._matches.fullmatch(name) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return ", ".join(p.replace(_USER, self._user or _USER) for p in self._patterns) or "none"

    def of(self, user: str) -> Names:
        """The names when ``{user}`` is ``user``; the same object when that makes no difference."""
        names_user = any(_USER in pattern for pattern in self._patterns)
        return Names(self._patterns, user) if names_user else self

    def of_paths(self, user: str) -> Names:
        """The same for names that are paths: a user called ``ada/secret`` has no directory in that
        of Ada."""
        if "/" in user:
            return Names(pattern for pattern in self._patterns if _USER not in pattern)
        return self.of(user)

    @property
    def _key(self) -> tuple[tuple[str, ...], str]:
        return self._patterns, self._user


def _expression(pattern: str, user: str) -> str:
    parts = (re.escape(part).replace(r"\*", "(?s:.*)") for part in pattern.split(_USER))
    return "(?:" + re.escape(user).join(parts) + ")"


# What a role has of names.
_OF_NAMES = ("read_channels", "write_channels", "read_rooms", "write_rooms")
_OF_FILES = ("read_files", "write_files")

ALL_NAMES = Names(["*"])
NO_NAMES = Names([])


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What everybody of a role may do. Of the numbers, 0 means that the role sets no limit.

    ``queries`` are the named queries that it may run, whatever ``sql`` says; None for all of them,
    within that.
    ``query_timeout`` is seconds, ``request_rate`` requests in a second and connection.
    """

    name: str
    sql: Policy = UNRESTRICTED
    queries: Names | None = None
    read_channels: Names = ALL_NAMES
    write_channels: Names = ALL_NAMES
    read_rooms: Names = ALL_NAMES
    write_rooms: Names = ALL_NAMES
    read_files: Names = ALL_NAMES
    write_files: Names = ALL_NAMES
    max_result_rows: int = 0
    query_timeout: int = 0
    request_rate: int = 0

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything that the server allows anybody."""
        return self.name == ADMIN.name

    def of(self, user: str) -> Role:
        """The role as ``user`` has it."""
        names = {name: getattr(self, name).of(user) for name in _OF_NAMES}
        names |= {name: getattr(self, name).of_paths(user) for name in _OF_FILES}
        if self.queries is not None:
            names["queries"] = self.queries.of(user)
        if all(getattr(self, name) is value for name, value in names.items()):
            return self
        return replace(self, **names)


ADMIN = Role(name="admin")

# Of strangers, who are not heard at all.
NOBODY = Role(
    name="",
    sql=Policy(read_only=True, files=False, extensions=False, kinds=frozenset()),
    queries=NO_NAMES,
    read_channels=NO_NAMES,
    write_channels=NO_NAMES,
    read_rooms=NO_NAMES,
    write_rooms=NO_NAMES,
    read_files=NO_NAMES,
    write_files=NO_NAMES,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody whose credentials were right.

    ``user`` is empty for those who share one token, or need none. ``source`` tells what made it,
    see :class:`access.Access`; ``digest`` is the SHA-256 of its token in the file of tokens, or of
    the rules that it was made by. ``expires_at`` is in seconds since 1970.
    """

    user: str
    role: Role
    source: str = ""
    digest: bytes = field(default=b"", repr=False)
    expires_at: float | None = None
