"""What flows need, and what every flow is made of.

A flow is a generator. It yields what it needs, one of the dataclasses below, and is sent that, or
has thrown into it why it cannot be had. ``sync`` and ``aio`` run flows, each in its own way.
Sending does not wait, so that it is a plain call of ``Link.send``.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlrooms_server.client.bar import Reporter
from sqlrooms_server.client.errors import ConnectionLost, QueryTimeout, request_failed
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import HELLO, encode
from sqlrooms_server.client.replies import Failed, Lost, Progress, Reply, Welcome

T = TypeVar("T")

# So many attempts and pauses last about as long as a server needs to start again.
_ATTEMPTS = 9
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 3.0


@dataclass(frozen=True, slots=True)
class Receive:
    """The next reply; None when ``deadline``, of ``time.monotonic``, passes before it comes."""

    exchange: Exchange
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Nothing, for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Connect:
    """A link that is open, before ``deadline``; ``OSError`` when there is none to be had."""

    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Next:
    """The next item, None after the last. Only asyncio can get it."""

    items: AsyncIterator[Any]


Need = Receive | Sleep | Connect | Next
Flow = Generator[Need, Any, T]


@dataclass(slots=True)
class ClientState:
    """What flows know of their client."""

    is_closed: bool = False


class Retries:
    """The pauses between attempts, after each of which the connection was lost."""

    def __init__(
        self, client: ClientState, deadline: float | None, can_repeat: bool = True
    ) -> None:
        self._client = client
        self._deadline = deadline
        self._pauses = pauses() if can_repeat else iter(())

    def pause(self, error: ConnectionLost) -> Flow[None]:
        """Wait before another attempt, or raise ``error``."""
        pause = next(self._pauses, None)
        if pause is None or self._is_late(pause) or self._client.is_closed:
            raise error
        yield Sleep(pause)

    def _is_late(self, pause: float) -> bool:
        return self._deadline is not None and time.monotonic() + pause >= self._deadline


def connected(deadline: float | None = None) -> Flow[Link]:
    """A link that is open."""
    try:
        link: Link = yield Connect(deadline)
    except ConnectionLost:
        raise
    except OSError as error:
        raise ConnectionLost(str(error)) from error
    return link


def greet(link: Link, timeout: float, user: str | None) -> Flow[None]:
    """Say who this is, and ask what the server offers.

    Raises ``RequestFailed`` for a wrong token, or for what is no name of a ``user``.
    """
    exchange = link.open(HELLO)
    link.send(encode(type="hello", user=user))
    try:
        reply = yield from answer(exchange, time.monotonic() + timeout)
    except QueryTimeout:
        raise ConnectionLost("What listens there does not answer.") from None
    assert isinstance(reply, Welcome)
    link.upload_window = reply.upload_window
    link.connection_id = reply.connection_id


def answer(
    exchange: Exchange, deadline: float | None = None, reporter: Reporter | None = None
) -> Flow[Reply]:
    """The next reply that tells more than progress. Raises the error that it tells of."""
    while True:
        reply: Reply | None = yield Receive(exchange, deadline)
        if reply is None:
            raise QueryTimeout("The server did not answer in time.")
        if not isinstance(reply, Progress):
            return checked(reply)
        if reporter is not None:
            reporter.show(reply)


def checked(reply: Reply) -> Reply:
    """``reply``. Raises the error that it tells of."""
    match reply:
        case Failed(text, code):
            raise request_failed(text, code)
        case Lost(text, None):
            raise ConnectionLost(text)
        case Lost(text, str(code)):
            raise request_failed(text, code)
    return reply


def pauses() -> Generator[float, None, None]:
    """The seconds between attempts."""
    pause = _FIRST_PAUSE_S
    for _ in range(_ATTEMPTS - 1):
        # Many clients lose a server at one time; they need not come back at one time.
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
