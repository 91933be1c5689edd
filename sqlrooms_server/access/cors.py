"""What browsers are told about pages of other origins (the CORS protocol of the Fetch standard).

Pages that may open a WebSocket can read answers over HTTP, too. Cookies are not sent for them:
they present their token in a header.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlrooms_server.transport.http import HttpRequest

# What pages may read of an answer, besides its body.
_SHOWN = (
    "Accept-Ranges, Content-Disposition, Content-Encoding, Content-Length, Content-Range, ETag, "
    "Last-Modified, Location"
)
# What they may send, besides what forms can.
_TAKEN = "Authorization, Content-Type, If-Match, If-Modified-Since, If-None-Match, If-Range, Range"
# Long enough for one sitting, short enough for changes of the settings.
_SECONDS = 600


def shared_with(request: HttpRequest, *, may_come: bool) -> dict[str, str]:
    """The headers of the answer to ``request`` of a page; ``may_come`` is whether its origin may
    connect. Without an origin, there are none."""
    origin = request.headers.get("origin")
    if origin is None:
        return {}
    if not may_come:
        return {"Vary": "Origin"}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": _SHOWN,
        "Vary": "Origin",
    }


def permission(methods: Iterable[str]) -> dict[str, str]:
    """The headers that let a page send ``methods``."""
    return {
        "Access-Control-Allow-Methods": ", ".join(methods),
        "Access-Control-Allow-Headers": _TAKEN,
        "Access-Control-Max-Age": str(_SECONDS),
    }
