"""What both clients need around a connection and a result: addresses, refusals, pandas."""

from __future__ import annotations

from ssl import SSLContext
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException

from sqlrooms_server.client.errors import ConnectionLost, RequestFailed

# A server that does not answer the close frame is left.
CLOSE_TIMEOUT_S = 2.0


_UNIX = "ws+unix://"


def opening(
    url: str, token: str | None, timeout: float, ssl: SSLContext | None
) -> tuple[str, dict[str, Any]]:
    """The address and the options for ``connect`` of websockets."""
    options: dict[str, Any] = {
        "additional_headers": {} if token is None else {"Authorization": f"Bearer {token}"},
        "compression": None,
        "max_size": None,
        "open_timeout": timeout,
        "close_timeout": CLOSE_TIMEOUT_S,
    }
    if ssl is not None:
        options["ssl"] = ssl
    if not url.startswith(_UNIX):
        return url, options
    path = unquote(url.removeprefix(_UNIX))
    if not path.startswith("/"):
        raise ValueError(f"{url} is no address such as ws+unix:///run/sqlrooms.sock.")
    return "ws://localhost/", {**options, "unix": True, "path": path}


def refused(url: str, error: WebSocketException) -> Exception:
    """The exception for a connection that cannot be opened."""
    if isinstance(error, InvalidURI):
        return ValueError(f"{url} is no address such as ws://localhost:4000.")
    status = error.response.status_code if isinstance(error, InvalidStatus) else None
    if status == 401:
        return RequestFailed("unauthorized", "unauthorized")
    if status == 403:
        return RequestFailed(f"The server at {url} refuses this host or origin.", "forbidden")
    return ConnectionLost(f"What listens at {url} is no WebSocket server: {error}")


def to_pandas(table: pa.Table) -> Any:
    """``table`` as a DataFrame."""
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise ImportError("to_pandas needs pandas: pip install 'sqlrooms-server[pandas]'") from None
    return table.to_pandas()
