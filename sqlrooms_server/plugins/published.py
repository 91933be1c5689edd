"""The objects that are published: under which names, and who may use them."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.access import Identity
from sqlrooms_server.plugins.object_types import Target

# People read it: neither control characters nor halves of surrogate pairs.
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,255}")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One object. ``version`` is larger for what was published later.

    ``users`` and ``roles`` may use it, both None when it is for everybody who may read every table.
    """

    name: str
    target: Target
    version: int
    users: frozenset[str] | None
    roles: frozenset[str] | None

    def is_for(self, identity: Identity | None) -> bool:
        """Whether ``identity`` may use it."""
        if identity is None:
            return False
        role = identity.role
        if role.is_admin:
            return True
        if self.users is None and self.roles is None:
            # What is published may tell anything of the database, and hand out its tables.
            kinds = role.sql.kinds
            return role.sql.schemas is None and (kinds is None or "SELECT" in kinds)
        # Not what a client calls itself, which nobody checks.
        return identity.user in (self.users or ()) or role.name in (self.roles or ())


class Published:
    """All of them. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._versions = itertools.count(1)

    def add(
        self,
        name: str,
        target: Target,
        users: Iterable[str] | None,
        roles: Iterable[str] | None,
    ) -> Entry | None:
        """Publish ``target``; what had its name before. Raises ``ValueError`` for what is no name,
        ``TypeError`` for what are no users or roles."""
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise ValueError(
                f"The name of an object has 1 to 255 characters, no control characters: {name!r}."
            )
        users, roles = _names("users", users), _names("roles", roles)
        with self._lock:
            before = self._entries.get(name)
            self._entries[name] = Entry(name, target, next(self._versions), users, roles)
        return before

    def remove(self, name: str) -> Entry | None:
        """Take back what is published as ``name``; None when nothing is."""
        with self._lock:
            return self._entries.pop(name, None)

    def find(self, name: str) -> Entry | None:
        with self._lock:
            return self._entries.get(name)

    def visible_to(self, identity: Identity | None) -> dict[str, Entry]:
        """What ``identity`` may use, in the order of the names."""
        with self._lock:
            entries = sorted(self._entries.items())
        return {name: entry for name, entry in entries if entry.is_for(identity)}


def _names(what: str, given: Any) -> frozenset[str] | None:
    if given is None:
        return None
    # Not the empty name, which everybody has who shares a token.
    if isinstance(given, str) or not all(isinstance(name, str) and name for name in given):
        raise TypeError(f"{what} must be a list of names, not {given!r}.")
    return frozenset(given)
