"""Named queries over HTTP: ``GET /queries/NAME?region=EU``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from sqlrooms_server.access import Identity
from sqlrooms_server.access.roles import Role
from sqlrooms_server.builtin.query_files import NamedQuery
from sqlrooms_server.errors import BadRequest, ServerError, TooLarge
from sqlrooms_server.features import Route
from sqlrooms_server.messages import Format, Options, Query
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugins.host import Host
from sqlrooms_server.plugins.http import error_response
from sqlrooms_server.protocol import decode_json, encode, json_prefix, json_suffix
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import Exchange, HttpRequest, Source
from sqlrooms_server.transport.connection import Pull

ARROW = "application/vnd.apache.arrow.stream"
_JSON = "application/json"
_ID = "http"
# What follows the rows of a JSON reply.
_END = json_suffix()

# What is taken from a result in one turn of the loop, as much as a WebSocket would be given.
_TURN_BYTES = 1 << 20
# How often it is looked whether the client is still there.
_LOOK_SECONDS = 0.5


class Queries(Protocol):
    """What :class:`named_queries.NamedQueries` does."""

    server: Host

    def listed(self, role: Role) -> list[dict[str, Any]]: ...
    def find(self, name: object, role: Role) -> NamedQuery: ...
    def submit(self, peer: Peer, query: NamedQuery, asked: Query) -> None: ...


class HttpQueries:
    """The routes. For the loop thread."""

    def __init__(self, queries: Queries, settings: Settings) -> None:
        self._queries = queries
        self._max_result = settings.max_http_result

    @property
    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/queries", self._list),
            Route("GET", "/queries/", self._run),
            Route("POST", "/queries/", self._run),
        )

    def _list(self, request: HttpRequest, exchange: Exchange, identity: Identity) -> None:
        exchange.respond_json(200, encode({"queries": self._queries.listed(identity.role)}))

    def _run(self, request: HttpRequest, exchange: Exchange, identity: Identity) -> None:
        peer = HttpPeer(self._queries.server, request, exchange, identity, self._max_result)
        try:
            query = self._queries.find(_name(request), identity.role)
            if request.method == "GET" and not query.only_reads:
                # Whoever follows a link must not change anything.
                raise BadRequest(f"The query {query.name!r} may change something; use POST.")
            params = _params_of_text(request, query) if request.method == "GET" else _body(request)
            formats: tuple[Format, ...] = ("json",)
            if ARROW in request.headers.get("accept", ""):
                formats = ("arrow",)
            options = Options(params=params, size=len(request.query) + len(request.body))
            peer.begin()
            self._queries.submit(peer, query, Query("arrow", query.sql, _ID, formats, options))
        except ServerError as error:
            peer.send_error(error)


def _name(request: HttpRequest) -> str:
    try:
        return unquote(request.path.removeprefix("/queries/"), errors="strict")
    except UnicodeDecodeError as error:
        raise BadRequest("The name of the query is not UTF-8.") from error


def _params_of_text(request: HttpRequest, query: NamedQuery) -> dict[str, Any]:
    """The query string: texts, and JSON for what is nested."""
    params: dict[str, Any] = {}
    try:
        pairs = parse_qsl(
            request.query, keep_blank_values=True, errors="strict", max_num_fields=1000
        )
    except ValueError as error:
        raise BadRequest(f"The query string cannot be read: {error}.") from error
    for name, text in pairs:
        if name == "token":
            continue
        if name in params:
            raise BadRequest(f"The query string has {name[:100]!a} twice.")
        parameter = query.parameters.get(name.lower())
        is_json = parameter is not None and parameter.is_nested
        params[name] = decode_json(text.encode(), f"params.{name}") if is_json else text
    return params


def _body(request: HttpRequest) -> dict[str, Any]:
    # Pages of other origins may send forms and plain text without asking, JSON not.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON:
        raise BadRequest(f"The body must be JSON, with Content-Type: {_JSON}.")
    params = decode_json(request.body, "The body")
    if not isinstance(params, dict):
        raise BadRequest("The body must be an object: the parameters by their names.")
    return params


class HttpPeer(Peer):
    """Who asked over HTTP, as a client that asks once, and whose answer is one body."""

    __slots__ = ("_begun", "_body", "_cut_off", "_exchange", "_host", "_is_text", "_max_result",
                 "_size", "_source")  # fmt: skip

    def __init__(
        self,
        host: Host,
        request: HttpRequest,
        exchange: Exchange,
        identity: Identity,
        max_result: int,
    ) -> None:
        super().__init__(request)
        self.identify(identity)
        self._host = host
        self._exchange = exchange
        self._max_result = max_result
        self._begun = False
        self._source: Source | None = None
        self._is_text = False
        self._body: list[bytes] = []
        # A backslash whose character comes with the next fragment.
        self._cut_off = b""
        self._size = 0

    def begin(self) -> None:
        """Look after the client from here on, until it is answered or gone."""
        self._begun = True
        self._look()

    @property
    def is_open(self) -> bool:
        return self._exchange.is_open

    @property
    def remote_address(self) -> str:
        return self.request.remote_address if self.request is not None else ""

    @property
    def is_behind(self) -> bool:
        return False

    def send(self, message: bytes) -> None:
        if message.startswith(json_prefix(_ID)):
            self._answer(_unescaped(message)[len(json_prefix(_ID)) : -len(_END)])
        else:
            # The server has nothing to tell but that it is done.
            self._answer(b"[]")

    def send_binary(self, message: bytes) -> None:
        self._answer(_without_header(message), ARROW)

    def send_error(self, error: ServerError) -> None:
        response = error_response(error)
        self._end()
        self._exchange.respond(response.status, response.body, response.content_type)

    def stream(self, source: Source, *, is_text: bool) -> None:
        self._source, self._is_text = source, is_text
        self.pump()

    def pump(self) -> None:
        taken = 0
        while self._source is not None:
            if not self.is_open:
                self._leave()
                return
            if taken > _TURN_BYTES:
                self._host.post(self.pump)
                return
            pulled = self._source.pull()
            if pulled is Pull.NOT_READY:
                return
            if isinstance(pulled, Pull):
                # An error follows.
                self._source = None
                return
            fragment, is_last = pulled
            taken += len(fragment)
            self._take(bytes(fragment), is_last)

    def _take(self, fragment: bytes, is_last: bool) -> None:
        self._body.append(self._plain(fragment) if self._is_text else fragment)
        self._size += len(fragment)
        if self._size > self._max_result:
            text = f"The result has more than {self._max_result} bytes (--max-http-result)."
            self.send_error(TooLarge(text))
        elif is_last:
            source, self._source = self._source, None
            message = b"".join(self._body)
            if self._is_text:
                self._answer(message[len(json_prefix(_ID)) : -len(_END)])
            else:
                self._answer(_without_header(message), ARROW)
            if source is not None:
                source.sent()

    def _plain(self, fragment: bytes) -> bytes:
        """``fragment`` without the backslashes that make it a part of a JSON string."""
        fragment = self._cut_off + fragment
        count = len(fragment) - len(fragment.rstrip(b"\\"))
        self._cut_off = fragment[len(fragment) - count % 2 :]
        return _unescaped(fragment[: len(fragment) - count % 2])

    def _answer(self, body: bytes, kind: str = _JSON) -> None:
        self._exchange.respond(200, body, kind)
        self._end()

    def _look(self) -> None:
        if self._begun and not self.is_open:
            self._leave()
        elif self._begun:
            self._host.timers.after(_LOOK_SECONDS, lambda: self._host.post(self._look))

    def _end(self) -> None:
        """There is nothing more to say."""
        if self._begun:
            self._begun = False
            # When what is under way has been told so.
            self._host.post(self._leave)

    def _leave(self) -> None:
        self._begun = False
        source, self._source = self._source, None
        self._body.clear()
        if source is not None:
            source.dropped()
        self._host.leave(self)


def _unescaped(text: bytes) -> bytes:
    # A quotation mark follows an odd number of backslashes, of which the last is its own.
    return text.replace(b'\\"', b'"').replace(b"\\\\", b"\\")


def _without_header(message: bytes) -> bytes:
    return message[4 + int.from_bytes(message[:4], "big") :]
