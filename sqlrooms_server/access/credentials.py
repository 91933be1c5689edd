"""Who somebody is by what is presented, and how often that was wrong."""

from __future__ import annotations

from sqlrooms_server.access import Access
from sqlrooms_server.access.failures import Failures
from sqlrooms_server.access.roles import Identity
from sqlrooms_server.transport import HttpRequest, Refusal

# Clients look for this word, and close then.
UNAUTHORIZED = "unauthorized"


class Credentials:
    """One way to present them, of which the failures count apart. For one thread.

    When ``others_know``, a token that is wrong here may be right for somebody else, who is asked
    next; then follows :meth:`right` or :meth:`wrong`.
    """

    def __init__(self, access: Access, max_failures: int, *, others_know: bool) -> None:
        self._access = access
        self._others_know = others_know
        self._failures = Failures(max_failures)

    @property
    def needs_token(self) -> bool:
        """Whether everybody must present something."""
        return self._access.needs_token or self._others_know

    def of(self, request: HttpRequest) -> Identity | Refusal | None:
        """Who sent ``request``; None when it does not say, or somebody else may know."""
        identity = self._access.of_proxy(request)
        if identity is not None:
            return identity
        token = self._access.token_of(request)
        return None if token is None else self.identify(token, request.remote_address)

    def identify(self, token: str, address: str) -> Identity | Refusal | None:
        """Whose ``token`` is that ``address`` presents; None when somebody else may know."""
        refusal = self.wait(address, token)
        if refusal is not None:
            return refusal
        identity = self._access.identify(token)
        if identity is not None:
            self.right(address, token)
        elif not self._others_know:
            return self.wrong(address)
        return identity

    def wait(self, address: str, presented: str) -> Refusal | None:
        """Why what ``address`` presents is not looked at now; None when it is."""
        wait = self._failures.wait(address, presented)
        if not wait:
            return None
        text = f"Too many wrong tokens from {address}; wait {wait} s (--max-auth-failures).\n"
        return Refusal(429, text)

    def right(self, address: str, presented: str) -> None:
        """What ``address`` presented was right."""
        self._failures.remember(address, presented)

    def wrong(self, address: str) -> Refusal:
        """What ``address`` presented was wrong."""
        self._failures.count(address)
        return Refusal(401, UNAUTHORIZED)

    def forget_known(self) -> None:
        """Other tokens may be right from here on."""
        self._failures.forget_known()
