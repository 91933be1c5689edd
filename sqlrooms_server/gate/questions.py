"""Asking plugins who somebody is, whose messages wait for the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sqlrooms_server.access import Identity
from sqlrooms_server.errors import ServerError
from sqlrooms_server.peer import Peer
from sqlrooms_server.transport import HttpRequest

# While plugins are asked who somebody is, who does not know that and begins to ask. Somebody else
# can make that last as long, with as much: so many times --max-strangers.
MAX_WAITING_BYTES = 1 << 20

# What a message that waits costs besides its bytes.
_ENTRY_BYTES = 200


class Question(Protocol):
    """What plugins are asked. ``asked`` is the one whose answer is awaited."""

    asked: str

    def forget(self) -> None:
        """Nobody waits for the answer any more."""


class Plugins(Protocol):
    """Those that know who somebody is; false when there are none."""

    def __bool__(self) -> bool: ...

    def ask(
        self,
        request: HttpRequest,
        token: str | None,
        then: Callable[[Identity | ServerError | None], None],
    ) -> Question:
        """Tell ``then``, soon, who presents that; None when nobody knows."""


@dataclass(eq=False)
class Asked:
    """Somebody about whom plugins are asked, and the messages that wait for the answer."""

    token: str | None
    # Whether it came in a message, which is answered.
    is_message: bool
    question: Question | None = None
    waiting: list[tuple[bytes, bool]] = field(default_factory=list)
    size: int = 0


class Questions:
    """Those about whom plugins are asked, one question each. For the loop thread."""

    def __init__(
        self,
        plugins: Plugins,
        told: Callable[[Peer, Asked, Identity | ServerError | None], None],
    ) -> None:
        """``told`` gets each answer, unless nobody waits for it any more."""
        self._plugins = plugins
        self._told = told
        self._asked: dict[Peer, Asked] = {}

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._asked

    def ask(self, peer: Peer, token: str | None, *, is_message: bool) -> None:
        """Ask who ``peer`` is."""
        assert peer.request is not None
        asked = self._asked[peer] = Asked(token, is_message)

        def then(found: Identity | ServerError | None) -> None:
            if self._asked.get(peer) is asked:
                del self._asked[peer]
                self._told(peer, asked, found)

        asked.question = self._plugins.ask(peer.request, token, then)

    def keep(self, peer: Peer, data: bytes, is_text: bool) -> bool:
        """Let a message wait for the answer; False when too much waits already."""
        asked = self._asked[peer]
        asked.size += len(data) + _ENTRY_BYTES
        if asked.size > MAX_WAITING_BYTES:
            return False
        asked.waiting.append((data, is_text))
        return True

    def awaited(self, peer: Peer) -> str | None:
        """The name of the plugin whose answer about ``peer`` is awaited."""
        asked = self._asked.get(peer)
        return None if asked is None or asked.question is None else asked.question.asked

    def forget(self, peer: Peer) -> None:
        """``peer`` is gone."""
        asked = self._asked.pop(peer, None)
        if asked is not None and asked.question is not None:
            asked.question.forget()


def presented(request: HttpRequest, token: str | None) -> str:
    """What somebody is known by: what plugins look at if there is no token."""
    return token or request.headers.get("cookie", "")
