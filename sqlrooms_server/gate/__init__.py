"""The gate: stands before every kind of frame and every request."""

from sqlrooms_server.gate.http import HttpGate
from sqlrooms_server.gate.sockets import Gate

__all__ = ["Gate", "HttpGate"]
