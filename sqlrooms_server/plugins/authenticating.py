"""Asking plugins who somebody is whom the server itself does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sqlrooms_server.access import PLUGIN, Identity
from sqlrooms_server.access.roles import is_user_name
from sqlrooms_server.errors import Cancelled, ServerError
from sqlrooms_server.jobs import Lane
from sqlrooms_server.plugin import Credentials
from sqlrooms_server.plugin.chain import Hook
from sqlrooms_server.plugins.runner import Runner, Running
from sqlrooms_server.transport import HttpRequest

Told = Callable[[Identity | ServerError | None], None]

# Strangers must not take all threads of plugins: of the eight or more, so many.
_MAX_AT_ONCE = 4


class Authenticator:
    """The plugins that have the hook. For the loop thread."""

    def __init__(self, hooks: Sequence[Hook], runner: Runner) -> None:
        self._hooks = hooks
        self._runner = runner
        self._lane = Lane(_MAX_AT_ONCE)
        # Plugins that have not started may not know anybody yet.
        self._is_open = False
        self._early: list[Asking] = []

    def open(self) -> None:
        """Plugins have started."""
        self._is_open = True
        early, self._early = self._early, []
        for asking in early:
            asking.next()

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def ask(self, request: HttpRequest, token: str | None, then: Told) -> Asking:
        """Tell ``then`` who sent ``request``, or presents ``token``; None when nobody knows.

        What the first plugin says that knows something counts, and an error of one, too.
        """
        asking = Asking(self._hooks, self._runner, self._lane, Credentials(request, token), then)
        if self._is_open:
            asking.next()
        else:
            self._early.append(asking)
        return asking


class Asking:
    """A question under way."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        runner: Runner,
        lane: Lane,
        credentials: Credentials,
        then: Told,
    ) -> None:
        self._hooks = iter(hooks)
        self._runner = runner
        self._lane = lane
        self._credentials = credentials
        self._then: Told | None = then
        self._running: Running | None = None
        # Of the plugin that is being asked.
        self.asked = ""

    def next(self) -> None:
        """Ask the next plugin."""
        if self._then is None:
            return
        found = next(self._hooks, None)
        if found is None:
            self._tell(None)
            return
        plugin, hook = found
        self.asked = plugin.name
        self._running = self._runner.begin(
            plugin,
            "authenticate",
            hook,
            self._credentials,
            then=self._answered,
            finish=_identity,
            lane=self._lane,
        )

    def forget(self) -> None:
        """Nobody waits for the answer any more."""
        self._then = None
        if self._running is not None:
            self._running.stop(Cancelled("Nobody waits for the answer any more."))

    def _answered(self, identity: Identity | None, error: ServerError | None) -> None:
        if identity is None and error is None:
            self.next()
        else:
            self._tell(error or identity)

    def _tell(self, found: Identity | ServerError | None) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(found)


def _identity(value: Any) -> Identity | None:
    """What a plugin returned, as one of its own making. Raises ``TypeError`` or ``ValueError``."""
    if value is None:
        return None
    if not isinstance(value, Identity):
        raise TypeError(f"It returned a {type(value).__name__}, not an Identity or None.")
    if value.user and not is_user_name(value.user):
        raise ValueError(f"This cannot be the name of a user: {value.user!r}.")
    role = value.role.of(value.user)
    return dataclasses.replace(value, role=role, source=PLUGIN, digest=b"")
