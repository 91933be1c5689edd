"""A front end served by the server itself, at ``/``, with what it needs to know to connect.

Everybody who reaches the port can load it, as the page is where a token is asked for. Tokens are
never in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any

from sqlrooms_server.access.origins import Origins
from sqlrooms_server.builtin.beneath import OpenFile, Root, ServesFiles, names_in
from sqlrooms_server.builtin.serving import answer, is_known
from sqlrooms_server.errors import Forbidden, NotFound, ServerError, TooLarge
from sqlrooms_server.plugin import Response, Route
from sqlrooms_server.plugins.http import HttpCall
from sqlrooms_server.settings import Settings

_INDEX = "index.html"
_MARKER = b"<!--sqlrooms-config-->"
_HEAD = re.compile(rb"<head(?:\s[^>]*)?>", re.IGNORECASE)
_MAX_PAGE_BYTES = 8 << 20

_HTML = "text/html; charset=utf-8"
# Not those of the system, which differ from one machine to the next.
_TYPES = {
    "html": _HTML,
    "htm": _HTML,
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "map": "application/json",
    "webmanifest": "application/manifest+json",
    "wasm": "application/wasm",
    "txt": "text/plain; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "xml": "application/xml",
    "pdf": "application/pdf",
    "svg": "image/svg+xml",
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "ico": "image/vnd.microsoft.icon",
    "woff": "font/woff",
    "woff2": "font/woff2",
    "ttf": "font/ttf",
    "otf": "font/otf",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.file",
}

# Compressed beforehand, the best first.
_ENCODINGS = (("br", ".br"), ("gzip", ".gz"))

# What every app can bear: other sites cannot show it in a frame, nor plugins run. An app that loads
# scripts from elsewhere or compiles WebAssembly goes on to work; it can be stricter by itself.
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'self'; object-src 'none'; base-uri 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    # A browser asks each time whether it has changed, which costs one empty answer.
    "Cache-Control": "no-cache",
}


class Static(ServesFiles):
    """The directory of ``--static``. Raises ``StartupError`` when it is not there."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("static")
        self._root = Root(settings.static, "--static")
        self.roots = [self._root]
        self.keep_from([settings])
        self._origins = Origins(settings)

    @property
    def routes(self) -> list[Route]:
        return [
            Route("GET", "/sqlrooms-config.json", self._config, is_public=True),
            Route("GET", "/", self._get, is_public=True, is_fallback=True),
        ]

    def _config(self, call: HttpCall) -> Response:
        self._check_host(call)
        return Response(self.configuration(call), headers={"Cache-Control": "no-store"})

    def configuration(self, call: HttpCall) -> dict[str, Any]:
        """What a page is told of the server that it came from."""
        place = f"{call.origin}{call.base}/"
        return {
            "url": place.replace("http", "ws", 1),
            "httpUrl": place,
            "needToken": self.server.needs_token,
        }

    def _check_host(self, call: HttpCall) -> None:
        # Under another name, the page could not connect, and would be one of somebody else.
        reason = self._origins.refuses_host(call.request)
        if reason is not None:
            raise Forbidden(reason)

    def _get(self, call: HttpCall) -> Response:
        self._check_host(call)
        names = names_in(call.rest, quoted=True)
        is_page = not names or call.rest.endswith("/")
        try:
            if is_page:
                return self._page((*names, _INDEX), call)
            if names[-1].lower().endswith((".html", ".htm")):
                return self._page(names, call)
            return self._asset(names, call)
        except NotFound:
            if not is_page and self._root.is_directory(names):
                # Or links of the page in it would lead elsewhere.
                last = call.path.rpartition("/")[2]
                return Response("", 308, headers={"Location": f"./{last}/"})
            wants_page = "text/html" in call.headers.get("accept", "")
            if not wants_page or (names and "." in names[-1]):
                raise
            # A place in a single-page app, which its scripts know.
            return self._page((_INDEX,), call)

    def _page(self, names: tuple[str, ...], call: HttpCall) -> Response:
        with self._root.open(names) as file:
            if file.size > _MAX_PAGE_BYTES:
                raise TooLarge(f"{names[-1]} has more than {_MAX_PAGE_BYTES} bytes.")
            page = file.read(0, file.size)
            modified = file.modified
        body = with_configuration(page, self.configuration(call))
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {**_HEADERS, "ETag": tag}
        known = {name: value for name, value in call.headers.items() if name == "if-none-match"}
        if is_known(known, tag, modified):
            return Response(b"", 304, _HTML, headers)
        return Response(body, 200, _HTML, headers)

    def _asset(self, names: tuple[str, ...], call: HttpCall) -> Response:
        suffix = os.path.splitext(names[-1])[1].lower().removeprefix(".")
        kind = _TYPES.get(suffix, "application/octet-stream")
        accepted = _accepted(call.headers.get("accept-encoding", ""))
        headers = {**_HEADERS, "Vary": "Accept-Encoding"}
        for encoding, end in _ENCODINGS:
            # A range is one of the file itself.
            if encoding in accepted and "range" not in call.headers:
                file = self._beside((*names[:-1], names[-1] + end))
                if file is not None:
                    return answer(
                        file, call.headers, kind, {**headers, "Content-Encoding": encoding}
                    )
        return answer(self._root.open(names), call.headers, kind, headers)

    def _beside(self, names: tuple[str, ...]) -> OpenFile | None:
        try:
            return self._root.open(names)
        except ServerError:
            return None


def with_configuration(page: bytes, configuration: dict[str, Any]) -> bytes:
    """``page`` with a script that sets ``__SQLROOMS__``: in the place of the marker, or before all
    other scripts."""
    # Nothing in it may end the script, or a line of it in old browsers.
    text = json.dumps(configuration, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    script = f"<script>window.__SQLROOMS__={text}</script>".encode()
    if _MARKER in page:
        return page.replace(_MARKER, script, 1)
    head = _HEAD.search(page)
    if head is not None:
        return page[: head.end()] + script + page[head.end() :]
    at = page.lower().find(b"</head>")
    return page[:at] + script + page[at:] if at >= 0 else script + page


def _accepted(header: str) -> set[str]:
    """The encodings in ``Accept-Encoding``, without those of weight 0."""
    accepted = set()
    for part in header.lower().split(","):
        name, _, weight = part.partition(";")
        if not re.fullmatch(r"\s*q=0(\.0*)?\s*", weight):
            accepted.add(name.strip())
    return accepted
