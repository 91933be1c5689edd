"""WebSocket and HTTP on one port. The only package that touches sockets.

uWebSockets runs on a thread of its own, driven through the native layer of socketify: its
Python classes poll the loop, never report a drained socket, and can lose data.
"""

from sqlrooms_server.transport.certificates import Certificate
from sqlrooms_server.transport.connection import Connection, FrameSource, Source
from sqlrooms_server.transport.exchange import Exchange, Receiver
from sqlrooms_server.transport.http import HttpRequest, check_headers
from sqlrooms_server.transport.loop import Handler, Refusal, Transport, TransportLimits
from sqlrooms_server.transport.proxies import Proxies
from sqlrooms_server.transport.topics import Topic
from sqlrooms_server.transport.unix_sockets import UnixSocket

__all__ = [
    "Certificate",
    "Connection",
    "Exchange",
    "FrameSource",
    "Handler",
    "HttpRequest",
    "Proxies",
    "Receiver",
    "Refusal",
    "Source",
    "Topic",
    "Transport",
    "TransportLimits",
    "UnixSocket",
    "check_headers",
]
