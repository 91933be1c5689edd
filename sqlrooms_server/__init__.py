"""One command that gives a browser app, a notebook or a team a native DuckDB over a WebSocket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlrooms_server.errors import ServerError, StartupError
from sqlrooms_server.settings import Settings

if TYPE_CHECKING:
    from sqlrooms_server.server import Server

__version__ = "0.2.0.dev0"
__all__ = ["Server", "ServerError", "Settings", "StartupError", "__version__"]


def __getattr__(name: str) -> Any:
    # The server loads DuckDB and the WebSocket library, which the client needs neither of.
    if name == "Server":
        from sqlrooms_server.server import Server

        return Server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
