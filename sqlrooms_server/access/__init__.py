"""Who may come, who somebody is, and what that one may do."""

from __future__ import annotations

import hmac
from urllib.parse import parse_qs

from sqlrooms_server.access.origins import Origins, is_loopback
from sqlrooms_server.access.roles import ADMIN, Identity
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport.http import HttpRequest

__all__ = ["Access", "Identity", "is_loopback"]


class Access:
    """The rules of one server."""

    def __init__(self, settings: Settings) -> None:
        self.origins = Origins(settings)
        self._token = settings.auth_token.encode()
        self._cookie = settings.auth_cookie

    @property
    def needs_token(self) -> bool:
        return bool(self._token)

    def identify(self, token: str) -> Identity | None:
        """Whose ``token`` is; None when it is wrong. Takes the same time wherever it differs."""
        if hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._token):
            return Identity("", ADMIN)
        return None

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
                if name == self._cookie:
                    return value
        return None
