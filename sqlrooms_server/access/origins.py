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
        self._serves_pages = bool(settings.static)

    def refuses(self, request: HttpRequest) -> str | None:
        """Why a WebSocket of this origin or host is refused; None when it may come.

        Every page that a user visits can reach a server on the user's machine. Its browser
        tells the page's origin, and the host name that the page used, which is foreign when a
        domain was pointed at this address (DNS rebinding). Other programs send no origin.
        """
        reason = self.refuses_host(request)
        if reason is not None:
            return reason
        origin = request.headers.get("origin")
        if origin is None or ANY in self._origins or origin.lower() in self._origins:
            return None
        if _is_page_of_this_machine(origin) or self._is_own(origin, request):
            return None
        return f"origin {origin!r} is not allowed; --allow-origin {origin} would"

    def refuses_host(self, request: HttpRequest) -> str | None:
        """Why this host name is refused; None when the server may be called so."""
        for host in (request.headers.get("host", ""), request.forwarded_host):
            if host is not None and ANY not in self._hosts and not self._is_named(host):
                return (
                    f"host {host!r} is not allowed; --allow-host {_host_name(host) or 'NAME'} would"
                )
        return None

    def _is_named(self, host: str) -> bool:
        name = _host_name(host)
        return is_loopback(name) or name in self._hosts

    def _is_own(self, origin: str, request: HttpRequest) -> bool:
        """Whether it is a page of this server, under a name that was given to it: ``*`` would let
        in every page whose domain was pointed here."""
        host = request.forwarded_host or request.headers.get("host", "")
        is_page_of_host = origin.lower() == f"{request.scheme}://{host}".lower()
        return self._serves_pages and is_page_of_host and self._is_named(host)


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
