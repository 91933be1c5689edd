"""Who may come, who somebody is, and what that one may do."""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

from sqlrooms_server.access.key_files import digest_of
from sqlrooms_server.access.origins import Origins
from sqlrooms_server.access.roles import ADMIN, NOBODY, Identity, Role, is_user_name
from sqlrooms_server.access.signed import SIGNED
from sqlrooms_server.access.token_file import TokenEntry, TokenFile, read_token_file
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport.http import HttpRequest

__all__ = ["PLUGIN", "Access", "Identity"]

# What identities come from, besides signed tokens.
_SHARED = "shared token"
_LISTED = "token file"
_PROXY = "proxy"
PLUGIN = "plugin"

EVERYBODY = Identity("", ADMIN)


class Access:
    """The rules of one server. Raises ``StartupError`` for a file of tokens that is not right."""

    def __init__(self, settings: Settings) -> None:
        self.origins = Origins(settings)
        self._token = digest_of(settings.auth_token) if settings.auth_token else None
        self._cookie = settings.auth_cookie
        self._path = Path(settings.tokens) if settings.tokens else None
        self._file: TokenFile | None = None if self._path is None else read_token_file(self._path)

    @property
    def needs_token(self) -> bool:
        return self._token is not None or self._file is not None

    def roles(self) -> Mapping[str, Role]:
        """The roles of the file of tokens, and ``admin``."""
        return {ADMIN.name: ADMIN} if self._file is None else self._file.roles

    def read_again(self) -> TokenFile | None:
        """The file of tokens as it is now, for :meth:`use`. Raises ``StartupError``."""
        return None if self._path is None else read_token_file(self._path)

    def use(self, file: TokenFile | None) -> None:
        """From here on ``file`` holds."""
        self._file = file

    def identify(self, token: str) -> Identity | None:
        """Whose ``token`` is; None when it is wrong. Takes the same time wherever it differs."""
        digest = digest_of(token)
        found = None
        if self._token is not None and hmac.compare_digest(digest, self._token):
            found = Identity("", ADMIN, _SHARED)
        if self._file is None:
            return found
        # All of them, so that the time does not tell which one it resembles.
        for entry in self._file.tokens:
            if hmac.compare_digest(digest, entry.digest):
                found = _listed(entry)
        if found is None and self._file.signed is not None and token.count(".") == 2:
            found = self._file.signed.identify(token)
        return found

    def renewed(self, identity: Identity) -> Identity | None:
        """``identity`` by the rules that hold now; None when they no longer know it.

        What was signed stays right until it expires. One that was made by other rules, or another
        key, may do nothing: only its token, or its proxy, can tell whether it is still right. Those
        of plugins do not come from the file.
        """
        file = self._file
        if identity.source in (_SHARED, PLUGIN) or file is None:
            return identity
        if identity.source == _LISTED:
            entries = (one for one in file.tokens if one.digest == identity.digest)
            entry = next(entries, None)
            return None if entry is None else _listed(entry)
        known = file.signed if identity.source == SIGNED else file.proxy
        role = file.roles.get(identity.role.name)
        if known is None or role is None:
            return None
        role = role.of(identity.user) if known.made(identity) else NOBODY
        return replace(identity, role=role)

    def of_proxy(self, request: HttpRequest) -> Identity | None:
        """Whom a trusted proxy names; None when it names nobody."""
        proxy = None if self._file is None else self._file.proxy
        if proxy is None or self._file is None or not request.is_from_proxy:
            return None
        user = request.headers.get(proxy.user_header, "").strip()
        if "," in user:
            # Two lines, of which the client may have sent one.
            return None
        role = proxy.role
        if proxy.role_header is not None and request.headers.get(proxy.role_header):
            role = self._file.roles.get(request.headers[proxy.role_header].strip())
        if role is None or not is_user_name(user):
            return None
        return Identity(user, role.of(user), _PROXY, proxy.digest)

    @property
    def proxy_headers(self) -> tuple[str, ...]:
        """The names of the headers in which a trusted proxy names users, and their roles."""
        proxy = None if self._file is None else self._file.proxy
        names = () if proxy is None else (proxy.user_header, proxy.role_header)
        return tuple(name for name in names if name is not None)

    def token_of(self, request: HttpRequest) -> str | None:
        """The token that came with an upgrade; None when there was none."""
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and credentials.strip():
            return credentials.strip()
        values = parse_qs(request.query).get("token")
        if values:
            return values[0]
        if self._cookie:
            for pair in request.headers.get("cookie", "").split(";"):
                name, _, value = pair.strip().partition("=")
                if name == self._cookie and value:
                    return value
        return None


def _listed(entry: TokenEntry) -> Identity | None:
    """The identity of a token in the file, unless it has expired."""
    if entry.expires_at is not None and entry.expires_at <= time.time():
        return None
    role = entry.role.of(entry.user)
    return Identity(entry.user, role, _LISTED, entry.digest, entry.expires_at)
