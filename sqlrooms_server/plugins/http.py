"""HTTP requests that plugins answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from sqlrooms_server.access import Identity
from sqlrooms_server.errors import BadRequest, Cancelled, ServerError
from sqlrooms_server.jobs import Lane
from sqlrooms_server.plugin import Plugin, Response, Route
from sqlrooms_server.plugins.bodies import BodyReader, Patience, ProducedAnswer, is_produced
from sqlrooms_server.plugins.runner import Runner, Running, out_of_time
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
    ``base`` is what stands before ``path`` for the client, and ``origin`` the scheme and host that
    it used. The body is in ``body``, or of a route that ``streams_body``, in ``chunks``.
    """

    def __init__(
        self,
        request: HttpRequest,
        identity: Identity | None,
        route: Route,
        chunks: BodyReader | None = None,
    ) -> None:
        self.method = request.method
        self.path = request.path
        self.rest = request.path.removeprefix(route.path)
        self.headers: Mapping[str, str] = request.headers
        self.body = request.body
        self.identity = identity
        self.request = request
        self.base = request.base
        host = request.forwarded_host or request.headers.get("host", "")
        self.origin = f"{request.scheme}://{host}"
        self._chunks = chunks
        self._query = request.query

    @property
    def query(self) -> dict[str, str]:
        """The query string; of a name that is there twice, the last value."""
        return dict(parse_qsl(self._query, keep_blank_values=True))

    @property
    def chunks(self) -> BodyReader:
        """The body as it comes."""
        if self._chunks is None:
            raise RuntimeError("This route does not stream bodies: its body is call.body.")
        return self._chunks

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
            if route.streams_body:
                self._stream(plugin, route, request, exchange, identity)
            else:
                call = HttpCall(request, identity, route)
                self._begin(plugin, route, call, exchange, self._lane)

        return dataclasses.replace(route, answer=answer)

    def _begin(
        self,
        plugin: Plugin,
        route: Route,
        call: HttpCall,
        exchange: Exchange,
        lane: Lane,
        seconds: float | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> Running:
        what = f"{route.method} {route.path}"

        def then(response: Response, error: ServerError | None) -> None:
            ended()
            if error is not None:
                response = error_response(error)
            if is_produced(response.body):
                ProducedAnswer(self._runner, plugin, what, response, exchange)
                return
            body, kind = response.body, response.content_type
            exchange.respond(response.status, body, kind, response.headers)

        return self._runner.begin(
            *(plugin, what, route.answer, call),
            then=then,
            finish=as_response,
            lane=lane,
            seconds=seconds,
        )

    def _stream(
        self,
        plugin: Plugin,
        route: Route,
        request: HttpRequest,
        exchange: Exchange,
        identity: Identity | None,
    ) -> None:
        """Let the body come while the function runs, which has any time as long as it takes it."""
        reader = BodyReader(exchange, self._runner.post)
        call = HttpCall(request, identity, route, reader)
        running: Running | None = None
        seconds = self._runner.timeout
        late = out_of_time(plugin, f"{route.method} {route.path}", seconds)

        def stop(reason: ServerError) -> None:
            if running is not None:
                running.stop(reason)

        patience = Patience(
            *(self._runner.timers, self._runner.post, seconds),
            *(reader.step, lambda: stop(late)),
        )
        reader.on_lost = lambda: stop(Cancelled("The client went away."))
        exchange.receive(reader)
        # A lane of its own: those whose clients are slow keep nobody waiting.
        running = self._begin(plugin, route, call, exchange, Lane(), 0, patience.end)
        if not exchange.is_open:
            reader.on_lost()


def as_response(value: Any) -> Response:
    """``value``, a :class:`Response` or its body, with a body of bytes. Raises ``ValueError``."""
    response = value if isinstance(value, Response) else Response(value)
    if not 200 <= response.status <= 599:
        raise ValueError(f"The status must be from 200 to 599, not {response.status}.")
    body, kind = _encoded(response.body)
    response = dataclasses.replace(response, body=body, content_type=response.content_type or kind)
    check_headers({"Content-Type": response.content_type, **response.headers})
    return response


def error_response(error: ServerError) -> Response:
    body = encode({"error": str(error), "code": error.code})
    return Response(body, _STATUS.get(error.code, 500), _JSON)


def _encoded(body: Any) -> tuple[Any, str]:
    if body is None:
        return b"", _TEXT
    if is_produced(body):
        return body, _BYTES
    if isinstance(body, str):
        return body.encode(), _TEXT
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body), _BYTES
    try:
        return encode_value(body), _JSON
    except BadRequest as error:
        # Of the plugin, not of the client.
        raise TypeError(f"It returned neither text, nor bytes, nor JSON: {error}") from error
