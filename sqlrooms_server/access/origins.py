"""Which pages may connect, under which host names."""

from __future__ import annotations

from urllib.parse import urlsplit

from sqlrooms_server.settings import Settings
from sqlrooms_server.transport.addresses import is_loopback
from sqlrooms_server.transport.http import HttpRequest

ANY = "*"


class Origins:
    """The rules of one server."""

    def __init__(self, settings: Settings) -> None:
        self._origins = {origin.rstrip("/").lower() for origin in settings.allow_origin}
        self._hosts = {host.lower() for host in settings.allow_host}
        if not is_loopback(settings.host):
            self._hosts.add(settings.host.lower())

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


def _is_page_of_this_machine(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and is_loopback(_host_name(parts.netloc))


def _host_name(host: str) -> str:
    """The name in a ``Host`` header or a network location, without the port."""
    address, bracket, port = host.lower().partition("]")
    if bracket:
        # Of an IPv6 address, nothing but a port may follow.
        return address.removeprefix("[") if port[:1] in ("", ":") else host.lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
