"""Addresses and ports to listen on, and why one of them cannot be had."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys

from sqlrooms_server.errors import StartupError


def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, IPv4 first. uWebSockets binds one for each listen."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise StartupError(f"--host {host} is not an address of this machine: {error}.") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if len(addresses) > 1:
        # localhost has an IPv6 address in many places where the machine has no IPv6.
        addresses = [address for address in addresses if _exists(address)] or addresses
    return sorted(addresses, key=lambda address: ":" in address)


def only_closed_connections(address: str, port: int) -> bool:
    """Whether nobody listens there, and only connections of the past keep the port.

    After a server was killed they do so for a minute.
    """
    return sys.platform != "win32" and _probe(address, port) is None


def let_others_follow(descriptor: int) -> None:
    """Let a server that starts after this one was killed listen at once.

    Linux looks at this option of both sides: connections inherit it from the socket that listens.
    """
    if sys.platform != "win32":
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def why_not(address: str, port: int) -> str:
    """Why listening failed; uWebSockets does not say, so it is tried again in Python."""
    reason, hint = "unknown reason", "choose another --port or --host"
    error = _probe(address, port)
    if error is not None:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            hint = "another program listens there; stop it or choose another --port"
        elif error.errno == errno.EADDRNOTAVAIL:
            hint = "this machine has no such address; choose another --host"
        elif error.errno == errno.EACCES:
            hint = "ports below 1024 need privileges; choose another --port"
    return f"Cannot listen on {address} port {port}: {reason}; {hint}."


def is_loopback(host: str) -> bool:
    """Whether ``host`` names this machine only."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def place_of(address: str) -> str:
    """What is limited together: an IPv4 address, or a network of IPv6 as one subscriber has it."""
    if ":" not in address:
        return address
    number = int(ipaddress.IPv6Address(address.partition("%")[0]))
    return str(ipaddress.IPv6Address(number >> 64 << 64))


def _probe(address: str, port: int) -> OSError | None:
    """What a socket says that listens there for a moment, despite connections of the past."""
    try:
        with socket.socket(_family(address)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _exists(address: str) -> bool:
    try:
        with socket.socket(_family(address)) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
