"""What both clients need around a connection and a result: headers, refusals, pandas."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException

from sqlrooms_server.client.errors import ConnectionLost, RequestFailed

# A server that does not answer the close frame is left.
CLOSE_TIMEOUT_S = 2.0


def headers(token: str | None) -> dict[str, str]:
    """The headers of the upgrade."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


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
