"""The file of tokens (``--tokens``): roles, tokens, and whom else to believe.

A role allows what it names, and otherwise only reading the database. Mistakes end in
``StartupError``, which names the key: a rule that is misread would let somebody in.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlrooms_server.access.key_files import read_key_file
from sqlrooms_server.access.roles import ADMIN, Identity, Names, Role, is_user_name
from sqlrooms_server.access.signed import SignedTokens, open_signed_tokens
from sqlrooms_server.configuration import parse_toml
from sqlrooms_server.db.policy import KINDS, Policy
from sqlrooms_server.errors import StartupError

HASH_PREFIX = "sha256:"
_HASH = re.compile(rf"{HASH_PREFIX}[0-9a-f]{{64}}")

_MAX_NUMBER = 1 << 53


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token. ``digest`` is the SHA-256 of it, ``expires_at`` seconds since 1970."""

    user: str
    role: Role
    digest: bytes = field(repr=False)
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class ProxyUsers:
    """Users whom a trusted proxy names in a header; names of headers are lower case."""

    user_header: str
    role: Role | None
    role_header: str | None

    def made(self, identity: Identity) -> bool:
        """Whether ``identity`` comes from these very rules."""
        return identity.digest == self.digest

    @property
    def digest(self) -> bytes:
        """Tells these rules from others."""
        role = None if self.role is None else self.role.name
        return hashlib.sha256(repr((self.user_header, role, self.role_header)).encode()).digest()


@dataclass(frozen=True, slots=True)
class TokenFile:
    """What the file says."""

    roles: Mapping[str, Role]
    tokens: tuple[TokenEntry, ...]
    signed: SignedTokens | None
    proxy: ProxyUsers | None


def read_token_file(path: Path) -> TokenFile:
    """The contents of ``path``. Raises ``StartupError``."""
    what = "token file"
    table = _Table(parse_toml(read_key_file(path, what), path, what), "", path)
    roles = {"admin": ADMIN}
    for name, entry in table.tables("roles"):
        if name in roles:
            raise entry.error("", "stands for the one who may do everything; choose another name")
        roles[name] = _role(name, entry)
    tokens = tuple(_token(name, entry, roles) for name, entry in table.tables("tokens"))
    jwt, proxy = table.table("jwt"), table.table("proxy")
    found = TokenFile(
        roles,
        tokens,
        None if jwt is None else _signed(jwt, roles, path),
        None if proxy is None else _proxy(proxy, roles),
    )
    table.end()
    if not (tokens or found.signed or found.proxy):
        raise StartupError(
            f"The token file {path} has no [tokens.NAME], no [jwt] and no [proxy], so that nobody "
            "could come; sqlrooms-server token new makes a token."
        )
    return found


class _Table:
    """A table of the file: each key is taken once, and those that are left are mistakes."""

    def __init__(self, values: dict[str, Any], name: str, path: Path) -> None:
        self._values = values
        self._name = name
        self._path = path

    def error(self, key: str, problem: str) -> StartupError:
        where = ".".join(part for part in (self._name, key) if part)
        return StartupError(f"{where} in {self._path} {problem}.")

    def tables(self, key: str) -> list[tuple[str, _Table]]:
        """The tables below ``key``, each with its name."""
        found = self._values.pop(key, {})
        if not isinstance(found, dict):
            raise self.error(key, f"must be tables, such as [{key}.ada]")
        entries = []
        for name, values in found.items():
            if not isinstance(values, dict):
                raise self.error(f"{key}.{name}", "must be a table")
            if not is_user_name(name):
                raise self.error(f"{key}.{name!r}", "must be a name of 1 to 255 characters")
            entries.append((name, _Table(values, f"{key}.{name}", self._path)))
        return entries

    def table(self, key: str) -> _Table | None:
        """The table ``key``, if there is one."""
        if key not in self._values:
            return None
        values = self._values.pop(key)
        if not isinstance(values, dict):
            raise self.error(key, "must be a table")
        return _Table(values, ".".join(part for part in (self._name, key) if part), self._path)

    def text(self, key: str) -> str | None:
        value = self._values.pop(key, None)
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        raise self.error(key, "must be a text that is not empty")

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.pop(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def number(self, key: str) -> int:
        value = self._values.pop(key, 0)
        if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
            raise self.error(key, "must be a whole number, or 0 for no limit")
        return value

    def texts(self, key: str) -> list[str] | None:
        value = self._values.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise self.error(key, "must be a list of texts")
        return value

    def moment(self, key: str) -> float | None:
        """A date, of which the beginning in UTC counts, or a time, as seconds since 1970."""
        value = self._values.pop(key, None)
        if value is None:
            return None
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
        if not isinstance(value, datetime.datetime):
            raise self.error(key, "must be a date such as 2030-01-31, without quotes")
        return (value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)).timestamp()

    def role(self, key: str, roles: Mapping[str, Role]) -> Role | None:
        name = self.text(key)
        if name is None or name in roles:
            return None if name is None else roles[name]
        raise self.error(key, f"names the role {name!r}, which is none of {_listed(roles)}")

    def end(self) -> None:
        """Nothing may be left."""
        for key in self._values:
            raise self.error(key, "is no known key")


def _role(name: str, entry: _Table) -> Role:
    schemas, kinds, queries = (entry.texts(key) for key in ("schemas", "statements", "queries"))
    if queries is not None and kinds is None:
        # Named queries show a part of the tables. SQL of its own would show all of them, and watch
        # which of them change.
        kinds, schemas = [], schemas or []
    if kinds is not None:
        kinds = [kind.upper().replace(" ", "_") for kind in kinds]
        for kind in kinds:
            if kind not in KINDS:
                known = ", ".join(sorted(KINDS))
                raise entry.error("statements", f"has {kind!r}, which is none of {known}")
    role = Role(
        name=name,
        sql=Policy(
            read_only=entry.flag("read_only", True),
            files=entry.flag("files", False),
            extensions=entry.flag("extensions", False),
            schemas=None if schemas is None else frozenset(map(str.lower, schemas)),
            kinds=None if kinds is None else frozenset(kinds),
            source=f"role {name!r}",
        ),
        queries=None if queries is None else Names(queries),
        read_channels=Names(entry.texts("read_channels") or ()),
        write_channels=Names(entry.texts("write_channels") or ()),
        read_rooms=Names(entry.texts("read_rooms") or ()),
        write_rooms=Names(entry.texts("write_rooms") or ()),
        read_files=Names(entry.texts("read_files") or ()),
        write_files=Names(entry.texts("write_files") or ()),
        max_result_rows=entry.number("max_result_rows"),
        query_timeout=entry.number("query_timeout"),
        request_rate=entry.number("request_rate"),
    )
    entry.end()
    return role


def _token(name: str, entry: _Table, roles: Mapping[str, Role]) -> TokenEntry:
    text = entry.text("hash")
    if text is None or not _HASH.fullmatch(text):
        raise entry.error("hash", f"must be {HASH_PREFIX} and 64 digits; see sqlrooms-server token")
    role = entry.role("role", roles)
    if role is None:
        raise entry.error("role", f"is missing; it is one of {_listed(roles)}")
    user = entry.text("user") or name
    if not is_user_name(user):
        raise entry.error("user", "must be a name of 1 to 255 characters")
    token = TokenEntry(
        user, role, bytes.fromhex(text.removeprefix(HASH_PREFIX)), entry.moment("expires")
    )
    entry.end()
    return token


def _signed(entry: _Table, roles: Mapping[str, Role], path: Path) -> SignedTokens:
    sources = {
        key: value
        for key in ("secret_file", "public_key_file", "jwks_file")
        if (value := entry.text(key)) is not None
    }
    if len(sources) != 1:
        raise entry.error("", "needs one of secret_file, public_key_file and jwks_file")
    ((kind, place),) = sources.items()
    signed = open_signed_tokens(
        kind,
        # Beside the file of tokens, unless it is absolute.
        path.parent / place,
        issuer=entry.text("issuer"),
        audience=entry.text("audience"),
        user_claim=entry.text("user_claim") or "sub",
        role_claim=entry.text("role_claim") or "role",
        default_role=entry.role("role", roles),
        roles=roles,
    )
    entry.end()
    return signed


def _proxy(entry: _Table, roles: Mapping[str, Role]) -> ProxyUsers:
    user_header = entry.text("user_header")
    if user_header is None:
        raise entry.error("user_header", "is missing: the header in which the proxy names the user")
    role, role_header = entry.role("role", roles), entry.text("role_header")
    if role is None and role_header is None:
        raise entry.error("role", "is missing; say which role its users have, or a role_header")
    entry.end()
    return ProxyUsers(user_header.lower(), role, role_header and role_header.lower())


def _listed(roles: Mapping[str, Role]) -> str:
    return ", ".join(sorted(roles))
