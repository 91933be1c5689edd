"""HTTP requests that plugins answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from sqlrooms_server.access import Identity
from sqlrooms_server.errors import ServerError
from sqlrooms_server.jobs import Lane
from sqlrooms_server.plugin import Plugin, Response, Route
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.protocol import decode_json, encode, encode_value
from sqlrooms_server.transport import Exchange, HttpRequest, check_headers

# The status for each code of an error; others are 500.
_STATUS = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "gone": 410,
    "too_large": 413,
    "query_error": 422,
    "busy": 429,
    "shutting_down": 503,
    "timeout": 504,
}

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_BYTES = "application/octet-stream"


class HttpCall:
    """A request. ``identity`` is who sent it, None for a stranger, whom only public routes hear.

    ``path`` is as it was sent, still quoted; ``rest`` is what follows the path of the route.
    """

    def __init__(self, request: HttpRequest, identity: Identity | None, route: Route) -> None:
        self.method = request.method
        self.path = request.path
        self.rest = request.path.removeprefix(route.path)
        self.headers: Mapping[str, str] = request.headers
        self.body = request.body
        self.identity = identity
        self._query = request.query

    @property
    def query(self) -> dict[str, str]:
        """The query string; of a name that is there twice, the last value."""
        return dict(parse_qsl(self._query, keep_blank_values=True))

    def json(self) -> Any:
        """The body as a JSON value. Raises ``BadRequest``."""
        return decode_json(self.body, "The body")


class HttpCalls:
    """Makes routes of the loop of those of plugins."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lane = Lane(16)

    def route(self, plugin: Plugin, route: Route) -> Route:
        """``route`` of ``plugin``, to be answered by the loop."""

        def answer(request: HttpRequest, exchange: Exchange, identity: Identity | None) -> None:
            call = HttpCall(request, identity, route)
            what = f"{route.method} {route.path}"

            def then(response: Response, error: ServerError | None) -> None:
                if error is not None:
                    response = error_response(error)
                body, kind = response.body, response.content_type
                exchange.respond(response.status, body, kind, response.headers)

            self._runner.begin(
                plugin, what, route.answer, call, then=then, finish=as_response, lane=self._lane
            )

        return dataclasses.replace(route, answer=answer)


def as_response(value: Any) -> Response:
    """``value``, a :class:`Response` or its body, with a body of bytes. Raises ``ValueError``."""
    response = value if isinstance(value, Response) else Response(value)
    body, kind = _encoded(response.body)
    response = dataclasses.replace(response, body=body, content_type=response.content_type or kind)
    check_headers({"Content-Type": response.content_type, **response.headers})
    return response


def error_response(error: ServerError) -> Response:
    body = encode({"error": str(error), "code": error.code})
    return Response(body, _STATUS.get(error.code, 500), _JSON)


def _encoded(body: Any) -> tuple[bytes, str]:
    if body is None:
        return b"", _TEXT
    if isinstance(body, str):
        return body.encode(), _TEXT
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body), _BYTES
    return encode_value(body), _JSON
