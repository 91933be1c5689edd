"""What trusted proxies say about the clients behind them.

Anybody can send these headers, so they count only when the peer of the socket is a trusted proxy,
and only one kind of them: a proxy sets its own and may pass the other one on as the client sent it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlrooms_server.errors import StartupError

UNIX = "unix"
"""The address of whoever comes over a Unix socket."""

X_FORWARDED = "x-forwarded"
FORWARDED = "forwarded"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# RFC 7239, section 4: a list of name=value pairs, the values tokens or quoted.
_PAIR = re.compile(r'\s*([!#$%&\'*+.^_`|~\w-]+)=("(?:[^"\\]|\\.)*"|[!#$%&\'*+.^_`|~\w:\[\]-]+)\s*')
_PORT = re.compile(r":\d{1,5}")


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks, in the words of the nearest trusted proxy, or of the socket without one."""

    address: str
    is_proxied: bool = False
    scheme: str | None = None
    host: str | None = None


class Proxies:
    """The proxies that are trusted. Raises ``StartupError`` for what is no address."""

    def __init__(self, trusted: Sequence[str] = (), kind: str = X_FORWARDED) -> None:
        self._networks = [_network(text) for text in trusted if text != UNIX]
        self._trusts_unix = UNIX in trusted
        self._kind = kind

    @property
    def headers(self) -> frozenset[str]:
        """The headers to look at, in lower case."""
        if self._kind == FORWARDED:
            return frozenset({"forwarded"})
        return frozenset({"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"})

    def trusts(self, address: str) -> bool:
        """Whether ``address``, as :func:`normalised`, is that of a trusted proxy."""
        if address == UNIX:
            return self._trusts_unix
        return bool(self._networks and address) and self._contains(ipaddress.ip_address(address))

    def client(self, peer: str, headers: Mapping[str, Sequence[str]]) -> Client:
        """The client of the trusted proxy ``peer``; ``headers`` has the lines of each header.

        Its address is the rightmost that is not one of a trusted proxy: what stands left of it,
        the client itself may have sent. Of what cannot be read, nothing is believed.
        """
        if self._kind == FORWARDED:
            elements = _elements(",".join(headers.get("forwarded", ())))
            hops = [element.get("for", "") for element in elements]
            last = elements[-1] if elements else {}
            scheme, host = last.get("proto"), last.get("host")
        else:
            hops = _list(headers.get("x-forwarded-for", ()))
            scheme = next(reversed(_list(headers.get("x-forwarded-proto", ()))), None)
            host = next(reversed(_list(headers.get("x-forwarded-host", ()))), None)
        if scheme is not None and scheme.lower() not in ("http", "https"):
            scheme = None
        address = self._farthest(peer, hops)
        return Client(address, True, scheme and scheme.lower(), host or None)

    def _farthest(self, peer: str, hops: Sequence[str]) -> str:
        address = peer
        for hop in reversed(hops):
            parsed = _address(hop)
            if parsed is None:
                return peer
            address = str(parsed)
            if not self._contains(parsed):
                break
        return address

    def _contains(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def normalised(text: str) -> str:
    """An address of a socket in its shortest form.

    uWebSockets writes IPv6 in full, and IPv4 as a part of it when it listens on both.
    """
    return text if ":" not in text else str(_unmapped(ipaddress.ip_address(text)))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise StartupError(
            f"--trusted-proxy takes addresses, networks such as 10.0.0.0/8, and unix: {error}."
        ) from error


def _address(hop: str) -> Address | None:
    """The address of ``hop``, which may have a port."""
    if hop.startswith("["):
        hop, _, port = hop[1:].partition("]")
        if port and not _PORT.fullmatch(port):
            return None
    elif hop.count(":") == 1:
        hop, _, port = hop.partition(":")
        if not _PORT.fullmatch(f":{port}"):
            return None
    try:
        return _unmapped(ipaddress.ip_address(hop))
    except ValueError:
        return None


def _unmapped(address: Address) -> Address:
    return getattr(address, "ipv4_mapped", None) or address


def _list(lines: Sequence[str]) -> list[str]:
    text = ",".join(lines)
    return [part.strip() for part in text.split(",")] if text else []


def _elements(text: str) -> list[dict[str, str]]:
    """The elements of a ``Forwarded`` header; an empty last one for what is none."""
    elements: list[dict[str, str]] = []
    position, pairs = 0, {}
    while position < len(text):
        match = _PAIR.match(text, position)
        if match is None:
            return [{}]
        name, value = match[1].lower(), match[2]
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        pairs[name] = value
        position = match.end()
        separator = text[position : position + 1]
        if separator not in (";", ",", ""):
            return [{}]
        if separator != ";":
            elements.append(pairs)
            pairs = {}
        position += 1
    return [{}] if pairs else elements
