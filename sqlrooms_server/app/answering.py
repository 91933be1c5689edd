"""Answering HTTP requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from sqlrooms_server import routing
from sqlrooms_server.access import Identity
from sqlrooms_server.errors import ServerError
from sqlrooms_server.features import Route
from sqlrooms_server.gate import HttpGate
from sqlrooms_server.plugins.authorizing import Authorizer
from sqlrooms_server.plugins.http import error_response
from sqlrooms_server.transport import Exchange, HttpRequest, Refusal

log = logging.getLogger(__name__)


class Answering:
    """Finds the route of a request, and asks whoever must be asked before it answers.

    For the loop thread.
    """

    def __init__(
        self,
        routes: Callable[[], Iterable[Route]],
        gate: HttpGate,
        authorizer: Authorizer | None,
        max_body: int,
    ) -> None:
        self._routes = routes
        self._gate = gate
        self._authorizer = authorizer
        self._max_body = max_body
        self._is_ready = False

    def begin(self) -> None:
        """Plugins have started."""
        self._is_ready = True

    def answer(self, request: HttpRequest, exchange: Exchange) -> None:
        """Answer ``request``, now or later."""
        exchange.add_headers(self._gate.shared_with(request))
        route = routing.route_for(self._routes(), request, exchange, self._gate)
        if route is None:
            return
        if route.is_public:
            self._answer_with(route, request, exchange, self._gate.known(request))
        else:
            self._gate.identify(
                request, lambda found: self._answer_found(route, request, exchange, found)
            )

    def _answer_found(
        self,
        route: Route,
        request: HttpRequest,
        exchange: Exchange,
        found: Identity | Refusal,
    ) -> None:
        """Answer ``request`` of somebody who was ``found``, if that one may ask it."""
        if isinstance(found, Refusal):
            exchange.respond(found.status, found.text.encode())
            return
        if self._authorizer is None:
            self._answer_with(route, request, exchange, found)
            return
        if not self._is_ready:
            # Plugins have not started.
            exchange.respond(503, b"the server is starting")
            return

        def then(error: ServerError | None) -> None:
            if error is None:
                self._answer_with(route, request, exchange, found)
            else:
                refused = error_response(error)
                exchange.respond(refused.status, refused.body, refused.content_type)

        self._authorizer.http(request, found, then)

    def _answer_with(
        self, route: Route, request: HttpRequest, exchange: Exchange, identity: Identity | None
    ) -> None:
        try:
            routing.answer_with(route, request, exchange, identity, self._max_body)
        except Exception:  # loop-callback guard: one that is never answered ends the process
            log.exception("An HTTP request failed.")
            exchange.respond(500, b"internal error")
