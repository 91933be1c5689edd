"""Who sent an HTTP request, and whether it is answered."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlrooms_server.access import EVERYBODY, Access, Identity
from sqlrooms_server.access.cors import shared_with
from sqlrooms_server.access.credentials import UNAUTHORIZED, Credentials
from sqlrooms_server.errors import ServerError, Unauthorized
from sqlrooms_server.gate.questions import Plugins, presented
from sqlrooms_server.gate.request_rates import RequestRates
from sqlrooms_server.transport import HttpRequest, Refusal

log = logging.getLogger(__name__)


class HttpGate:
    """Stands before every request. For the loop thread."""

    def __init__(
        self, access: Access, credentials: Credentials, plugins: Plugins, rates: RequestRates
    ) -> None:
        self._access = access
        self._credentials = credentials
        self._plugins = plugins
        self._rates = rates

    def identify(self, request: HttpRequest, then: Callable[[Identity | Refusal], None]) -> None:
        """Tell ``then`` who sent ``request``, or why it is not answered. Later, if plugins are
        asked."""
        found: Identity | Refusal | None = self.refusal(request)
        if found is None and not self._credentials.needs_token:
            then(EVERYBODY)
            return
        found = found or self._credentials.of(request)
        if found is None and self._plugins:
            token = self._access.token_of(request)
            shown = presented(request, token)
            found = self._credentials.wait(request.remote_address, shown)
            if found is None:
                self._plugins.ask(
                    request, token, lambda found: then(self._told(request, token, found))
                )
                return
        then(self._in_rate(found or Refusal(401, UNAUTHORIZED)))

    def _told(
        self, request: HttpRequest, token: str | None, found: Identity | ServerError | None
    ) -> Identity | Refusal:
        address = request.remote_address
        if isinstance(found, Identity):
            self._credentials.right(address, presented(request, token))
            return self._in_rate(found)
        if found is None and token is None:
            return Refusal(401, UNAUTHORIZED)
        if found is None or isinstance(found, Unauthorized):
            self._credentials.wrong(address)
            return Refusal(401, UNAUTHORIZED if found is None else f"{UNAUTHORIZED}: {found}")
        log.warning("Could not tell who sent a request from %s: %s", address, found)
        return Refusal(503, f"{found}\n")

    def _in_rate(self, found: Identity | Refusal) -> Identity | Refusal:
        if isinstance(found, Refusal) or self._rates.may_ask(found.role, found.user):
            return found
        role = found.role
        text = f"More than {role.request_rate} requests a second, the limit of role {role.name!r}."
        return Refusal(429, text)

    def known(self, request: HttpRequest) -> Identity | None:
        """Who sent ``request``, which is answered in any case, and at once; None for a stranger,
        and for somebody whom only plugins know."""
        if self._access.origins.refuses(request) is not None:
            return None
        if not self._credentials.needs_token:
            return EVERYBODY
        found = self._credentials.of(request)
        return None if isinstance(found, Refusal) else found

    def shared_with(self, request: HttpRequest) -> dict[str, str]:
        """The headers that let the page which sent ``request`` read the answer, if it may."""
        if "origin" not in request.headers:
            return {}
        may_come = self._access.origins.refuses(request) is None
        return shared_with(request, may_come=may_come)

    def refusal(self, request: HttpRequest) -> Refusal | None:
        """Why a page of that origin, or under that host name, may not come."""
        reason = self._access.origins.refuses(request)
        if reason is None:
            return None
        log.warning("Refused a request from %s: %s.", request.remote_address, reason)
        return Refusal(403, f"{reason}\n")
