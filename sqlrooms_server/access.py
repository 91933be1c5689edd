"""Who may connect: tokens, origins and host names."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import parse_qs, urlsplit

from sqlrooms_server.settings import Settings
from sqlrooms_server.transport.http import HttpRequest

ANY = "*"


class Access:
    """The rules of one server."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.auth_token.encode()
        self._cookie = settings.auth_cookie
        self._origins = {origin.rstrip("/").lower() for origin in settings.allow_origin}
        self._hosts = {host.lower() for host in settings.allow_host}
        if not is_loopback(settings.host):
            self._hosts.add(settings.host.lower())

    @property
    def needs_token(self) -> bool:
        return bool(self._token)

    def accepts(self, token: str) -> bool:
        """Whether ``token`` is right; takes the same time wherever it differs."""
        return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._token)

    def refuses(self, request: HttpRequest) -> str | None:
        """Why a WebSocket of this origin or host is refused; None when it may come.

        Every page that a user visits can reach a server on the user's machine. Its browser
        tells the page's origin, and the host name that the page used, which is foreign when a
        domain was pointed at this address (DNS rebinding). Other programs send no origin.
        """
        for host in (request.headers.get("host", ""), request.forwarded_host):
            if host is None or ANY in self._hosts:
                continue
            name = _host_name(host)
            if not is_loopback(name) and name not in self._hosts:
                return f"host {host!r} is not allowed; --allow-host {name or 'NAME'} would"
        origin = request.headers.get("origin")
        if origin is None or ANY in self._origins or origin.lower() in self._origins:
            return None
        if _is_page_of_this_machine(origin):
            return None
        return f"origin {origin!r} is not allowed; --allow-origin {origin} would"

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


def _is_page_of_this_machine(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and is_loopback(_host_name(parts.netloc))


def is_loopback(host: str) -> bool:
    """Whether ``host`` names this machine only."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """The name in a ``Host`` header or a network location, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
