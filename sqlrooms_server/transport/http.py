"""Plain HTTP requests on the WebSocket port."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.transport import native

_REASONS = {
    200: b"200 OK",
    400: b"400 Bad Request",
    401: b"401 Unauthorized",
    403: b"403 Forbidden",
    404: b"404 Not Found",
    405: b"405 Method Not Allowed",
    413: b"413 Content Too Large",
    415: b"415 Unsupported Media Type",
    429: b"429 Too Many Requests",
    500: b"500 Internal Server Error",
    503: b"503 Service Unavailable",
}

# What the server looks at; uWebSockets reads headers by name.
_HEADERS = (b"host", b"origin", b"authorization", b"cookie", b"content-type", b"content-length")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request, or the one that a WebSocket begins with. Names of ``headers`` are lower case.

    ``body`` is that of a ``POST``.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    remote_address: str
    body: bytes = b""
    is_from_proxy: bool = False


def read_request(res: Any, req: Any) -> HttpRequest:
    """The request of a callback. Bytes that are no ASCII are read as Latin-1."""
    target = native.ffi.new("const char**")

    def text(length: int) -> str:
        return native.unpack(target[0], length).decode("latin-1")

    headers = {}
    for name in _HEADERS:
        length = native.lib.uws_req_get_header(req, name, len(name), target)
        if length:
            headers[name.decode()] = text(length)
    method = text(native.lib.uws_req_get_method(req, target)).upper()
    url = text(native.lib.uws_req_get_full_url(req, target))
    address = native.lib.uws_res_get_remote_address_as_text(native.PLAIN, res, target)
    path, _, query = url.partition("?")
    return HttpRequest(method, path, query, headers, text(address))


class Exchange:
    """An HTTP request that waits for its answer. Methods belong to the loop thread."""

    def __init__(self, res: Any) -> None:
        self._res = res

    @property
    def is_open(self) -> bool:
        """False once it was answered or the client went away."""
        return self._res is not None

    def respond(
        self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8"
    ) -> None:
        """Answer; does nothing when that was done or the client is gone."""
        res, self._res = self._res, None
        if res is None:
            return
        reason = _REASONS[status]
        kind = content_type.encode()
        native.lib.uws_res_write_status(native.PLAIN, res, reason, len(reason))
        for name, value in ((b"Content-Type", kind), (b"Cache-Control", b"no-store")):
            native.lib.uws_res_write_header(native.PLAIN, res, name, len(name), value, len(value))
        # A refused request may have a body under way, which nothing reads: close then.
        native.lib.uws_res_end(native.PLAIN, res, body, len(body), status != 200)

    def respond_json(self, status: int, body: bytes) -> None:
        """Answer with JSON text."""
        self.respond(status, body, "application/json")

    def aborted(self) -> None:
        """For the transport: the client went away."""
        self._res = None


class Arriving:
    """A request whose body has not all arrived."""

    def __init__(self, request: HttpRequest, exchange: Exchange) -> None:
        self.exchange = exchange
        self._request = request
        self._body = bytearray()

    @property
    def size(self) -> int:
        return len(self._body)

    def add(self, data: bytes) -> None:
        self._body += data

    def request(self) -> HttpRequest:
        """The whole request."""
        return dataclasses.replace(self._request, body=bytes(self._body))
