"""Who somebody is by what is presented, and how often that was wrong."""

from __future__ import annotations

from sqlrooms_server.access import Access
from sqlrooms_server.access.failures import Failures
from sqlrooms_server.access.roles import Identity
from sqlrooms_server.transport import HttpRequest, Refusal

# Clients look for this word, and close then.
UNAUTHORIZED = "unauthorized"


class Credentials:
    """One way to present them, of which the failures count apart. For one thread."""

    def __init__(self, access: Access, max_failures: int) -> None:
        self._access = access
        self._failures = Failures(max_failures)

    def of(self, request: HttpRequest) -> Identity | Refusal | None:
        """Who sent ``request``; None when it does not say."""
        identity = self._access.of_proxy(request)
        if identity is not None:
            return identity
        token = self._access.token_of(request)
        return None if token is None else self.identify(token, request.remote_address)

    def identify(self, token: str, address: str) -> Identity | Refusal:
        """Whose ``token`` is that ``address`` presents."""
        wait = self._failures.wait(address, token)
        if wait:
            text = f"Too many wrong tokens from {address}; wait {wait} s (--max-auth-failures).\n"
            return Refusal(429, text)
        identity = self._access.identify(token)
        if identity is None:
            self._failures.count(address)
            return Refusal(401, UNAUTHORIZED)
        self._failures.remember(address, token)
        return identity

    def forget_known(self) -> None:
        """Other tokens may be right from here on."""
        self._failures.forget_known()
