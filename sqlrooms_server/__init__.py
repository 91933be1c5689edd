"""One command that gives a browser app, a notebook or a team a native DuckDB over a WebSocket."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sqlrooms_server.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    QueryError,
    ServerError,
    StartupError,
    Unauthorized,
)

if TYPE_CHECKING:
    from sqlrooms_server.access import Identity
    from sqlrooms_server.access.roles import Role
    from sqlrooms_server.app_config import AppConfig
    from sqlrooms_server.db.policy import Policy
    from sqlrooms_server.plugin import (
        Action,
        Client,
        Credentials,
        ObjectType,
        Outcome,
        Plugin,
        Query,
        Response,
        on,
        route,
        stream,
    )
    from sqlrooms_server.server import Server
    from sqlrooms_server.settings import Settings

__version__ = "0.2.0.dev0"
__all__ = [
    "Action",
    "AppConfig",
    "BadRequest",
    "Client",
    "Conflict",
    "Credentials",
    "Forbidden",
    "Identity",
    "NotFound",
    "ObjectType",
    "Outcome",
    "Plugin",
    "Policy",
    "Query",
    "QueryError",
    "Response",
    "Role",
    "Server",
    "ServerError",
    "Settings",
    "StartupError",
    "Unauthorized",
    "__version__",
    "on",
    "route",
    "stream",
]

# The client needs none of them: most load DuckDB and the WebSocket library.
_LATER = {
    "Action": "plugin",
    "AppConfig": "app_config",
    "Client": "plugin",
    "Credentials": "plugin",
    "Identity": "access",
    "ObjectType": "plugin",
    "Outcome": "plugin",
    "Plugin": "plugin",
    "Policy": "db.policy",
    "Query": "plugin",
    "Response": "plugin",
    "Role": "access.roles",
    "Server": "server",
    "Settings": "settings",
    "on": "plugin",
    "route": "plugin",
    "stream": "plugin",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"sqlrooms_server.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
