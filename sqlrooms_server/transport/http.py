"""Plain HTTP requests on the WebSocket port."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlrooms_server.transport import native
from sqlrooms_server.transport.proxies import UNIX, Client, Proxies, normalised

# RFC 9110, sections 5.1 and 5.5.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

# What the server looks at; uWebSockets reads headers by name.
_HEADERS = (
    *(b"host", b"origin", b"authorization", b"cookie", b"content-type", b"content-length"),
    *(b"transfer-encoding", b"accept", b"accept-encoding", b"range", b"if-range", b"if-match"),
    *(b"if-none-match", b"if-modified-since", b"access-control-request-method"),
)

# What tells where a body ends.
_CODING = "transfer-encoding"
_FRAMING = frozenset(("content-length", _CODING))


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request, or the one that a WebSocket begins with. Names of ``headers`` are lower case.

    ``remote_address`` is that of the client, also behind a trusted proxy, and ``unix`` for one that
    comes over a Unix socket. ``scheme`` and ``forwarded_host`` are what the client asked the proxy
    for; without one, the latter is None. ``body`` is empty until it was read, see
    :class:`Exchange`. ``base`` is what stood before ``path`` and belongs to whoever serves an app.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    remote_address: str
    body: bytes = b""
    is_from_proxy: bool = False
    scheme: str = "http"
    forwarded_host: str | None = None
    base: str = ""

    @property
    def has_body(self) -> bool:
        """Whether a body follows, or may follow."""
        length = self.headers.get("content-length", "0")
        return length.strip() != "0" or "transfer-encoding" in self.headers


class RequestReader:
    """Makes requests of those of uWebSockets.

    ``proxy_headers`` are names of further headers, which a request has only when it comes from a
    trusted proxy, and with all of its lines, joined by commas, when there are several.
    """

    def __init__(
        self,
        tls: int,
        proxies: Proxies | None = None,
        proxy_headers: Sequence[str] = (),
        *,
        is_unix: bool = False,
    ) -> None:
        self._tls = tls
        self._is_unix = is_unix
        self._proxies = proxies or Proxies()
        self._proxy_headers = frozenset(name.lower() for name in proxy_headers)
        self._looked_at = self._proxies.headers | self._proxy_headers
        # Whether requests have all headers, but for those that only a trusted proxy may send.
        self.reads_all = False

    def peer(self, res: Any) -> str:
        """The address at the other end of the socket, normalised; empty when that is gone."""
        if self._is_unix:
            return UNIX
        target = native.ffi.new("const char**")
        length = native.lib.uws_res_get_remote_address_as_text(self._tls, res, target)
        return normalised(native.unpack(target[0], length).decode("latin-1"))

    def is_trusted(self, peer: str) -> bool:
        """Whether ``peer`` is a trusted proxy."""
        return self._proxies.trusts(peer)

    def read(self, res: Any, req: Any) -> HttpRequest:
        """The request of a callback. Bytes that are no ASCII are read as Latin-1."""
        target = native.ffi.new("const char**")

        def text(length: int) -> str:
            return native.unpack(target[0], length).decode("latin-1")

        headers = {}
        for name in _HEADERS:
            length = native.lib.uws_req_get_header(req, name, len(name), target)
            if length:
                headers[name.decode()] = text(length)
        if self.reads_all:
            self._add_others(req, headers)
        method = text(native.lib.uws_req_get_method(req, target)).upper()
        url = text(native.lib.uws_req_get_full_url(req, target))
        client = self._client(self.peer(res), req, headers)
        path, _, query = url.partition("?")
        return HttpRequest(
            method,
            path,
            query,
            headers,
            client.address,
            is_from_proxy=client.is_proxied,
            scheme=client.scheme or ("https" if self._tls else "http"),
            forwarded_host=client.host,
        )

    def refusal(self, request: HttpRequest, req: Any) -> str | None:
        """Why nobody can say where the body of ``request`` ends; None when that is clear.

        uWebSockets looks at the first of several lines only, and at no coding. A proxy before it
        that looks at others would take the rest of the body for a request, or the other way round.
        """
        if request.method == "GET" and not (_FRAMING & request.headers.keys()):
            return None
        lines = [(name, value) for name, value in native.request_headers(req) if name in _FRAMING]
        if len(lines) > 1:
            return "a request has one Content-Length, or one Transfer-Encoding"
        if any(name == _CODING and value.strip().lower() != "chunked" for name, value in lines):
            return "the only Transfer-Encoding is chunked"
        return None

    def _add_others(self, req: Any, headers: dict[str, str]) -> None:
        lines: dict[str, list[str]] = {}
        for name, value in native.request_headers(req):
            if name not in headers and name not in self._looked_at:
                lines.setdefault(name, []).append(value)
        headers.update((name, ", ".join(values)) for name, values in lines.items())

    def _client(self, peer: str, req: Any, headers: dict[str, str]) -> Client:
        if not self.is_trusted(peer):
            return Client(peer)
        lines: dict[str, list[str]] = {}
        for name, value in native.request_headers(req):
            if name in self._looked_at:
                lines.setdefault(name, []).append(value)
        for name in self._proxy_headers & lines.keys():
            headers[name] = ", ".join(lines[name])
        return self._proxies.client(peer, lines)


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise ``ValueError`` for what cannot be a header, or would be more than one."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"This cannot be a header: {name!r}: {value!r}.")
