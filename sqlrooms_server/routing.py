"""Which route answers an HTTP request. For the loop thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from sqlrooms_server.access import Identity
from sqlrooms_server.access.cors import permission
from sqlrooms_server.gate import HttpGate
from sqlrooms_server.plugin import Route
from sqlrooms_server.transport import Exchange, HttpRequest


def route_for(
    routes: Iterable[Route], request: HttpRequest, exchange: Exchange, gate: HttpGate
) -> Route | None:
    """The one of ``routes`` that has the longest path, and a method that fits.

    None when there is none, or a browser only asks what may be sent, which is answered here.
    """
    at_path = [route for route in routes if _is_below(request.path, route.path)]
    at_path = [route for route in at_path if not route.is_fallback] or at_path
    methods = _methods(at_path)
    if request.method in methods:
        return _chosen(at_path, request.method)
    if not at_path:
        exchange.respond(404, b"not found")
    elif request.method == "OPTIONS":
        _answer_options(methods, request, exchange, gate)
    else:
        allowed = {"Allow": ", ".join(methods)}
        text = f"only {' or '.join(methods)} is allowed here"
        exchange.respond(405, text.encode(), headers=allowed)
    return None


def answer_with(
    route: Route,
    request: HttpRequest,
    exchange: Exchange,
    identity: Identity | None,
    max_body: int,
) -> None:
    """Let ``route`` answer, once the body is there, unless it takes that as it comes."""
    if route.streams_body:
        route.answer(request, exchange, identity)
        return

    def answer(body: bytes) -> None:
        whole = dataclasses.replace(request, body=body) if body else request
        route.answer(whole, exchange, identity)

    exchange.collect(max_body, "--max-notify-size", answer)


def _answer_options(
    methods: Sequence[str], request: HttpRequest, exchange: Exchange, gate: HttpGate
) -> None:
    headers = {"Allow": ", ".join(methods)}
    if "access-control-request-method" in request.headers:
        refusal = gate.refusal(request)
        if refusal is not None:
            exchange.respond(refusal.status, refusal.text.encode())
            return
        headers.update(permission(methods))
    exchange.respond(204, b"", headers=headers)


def _methods(routes: Iterable[Route]) -> list[str]:
    methods = {route.method for route in routes}
    # HEAD is a GET of which the body is not sent.
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _chosen(routes: Sequence[Route], method: str) -> Route:
    fitting = [route for route in routes if route.method == method]
    if not fitting:
        fitting = [route for route in routes if route.method == "GET"]
    return max(fitting, key=lambda route: len(route.path))


def _is_below(path: str, place: str) -> bool:
    """Whether ``place`` is ``path``, or a directory of it."""
    return path.startswith(place) if place.endswith("/") else path == place
