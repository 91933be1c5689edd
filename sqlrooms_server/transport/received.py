"""How much a connection has sent, complete messages or not. uWebSockets does not tell."""

from __future__ import annotations

import socket
import struct
import sys

from sqlrooms_server.transport import native
from sqlrooms_server.transport.connection import Connection

# tcpi_bytes_received in struct tcp_info of Linux.
_BYTES_RECEIVED = slice(128, 136)


def received_bytes(connection: Connection) -> int:
    """Bytes that were taken from its socket; 0 where the system does not tell."""
    if sys.platform != "linux" or connection.ws is None:
        return 0
    import fcntl
    import termios

    descriptor = native.descriptor(connection.ws)
    borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
    try:
        about = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.stop)
        waiting = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    except OSError:
        # That of a Unix socket, whose peers are on this machine.
        return 0
    finally:
        borrowed.detach()
    if len(about) < _BYTES_RECEIVED.stop:
        return 0
    received: int = struct.unpack("=Q", about[_BYTES_RECEIVED])[0]
    return received - int(struct.unpack("=i", waiting)[0])
