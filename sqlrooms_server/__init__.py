"""One command that gives a browser app, a notebook or a team a native DuckDB over a WebSocket."""

from sqlrooms_server.errors import ServerError, StartupError
from sqlrooms_server.settings import Settings

__version__ = "0.2.0.dev0"
__all__ = ["ServerError", "Settings", "StartupError", "__version__"]
