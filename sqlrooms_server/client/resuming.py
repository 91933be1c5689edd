"""A result that goes on over another connection, where the server keeps it for that."""

from __future__ import annotations

from collections.abc import Callable

from sqlrooms_server.client.errors import ConnectionLost, RequestFailed, SessionEnded
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.needs import Flow, Retries


class Resumption:
    """What is known of how a result can be resumed.

    ``retries`` makes the pauses between attempts; ``ask`` sends ``resume`` with a token, the chunk
    that is missing and the bytes that were consumed, over a new connection.
    """

    def __init__(
        self,
        retries: Callable[[], Retries],
        ask: Callable[[str, int, int], Flow[Exchange]],
        is_wanted: bool,
    ) -> None:
        self._new_retries = retries
        self._ask = ask
        self._is_wanted = is_wanted
        self._retries: Retries | None = None
        self._token: str | None = None

    @property
    def is_offered(self) -> bool:
        return self._token is not None

    def offer(self, token: str) -> None:
        """The server keeps the result under ``token``."""
        self._token = token

    def went_on(self) -> None:
        """Something came, so that the next loss is another one."""
        self._retries = None

    def go_on(
        self, error: ConnectionLost | RequestFailed, seq: int, consumed: int
    ) -> Flow[Exchange]:
        """Where the rest will come, after the result broke off with ``error``.

        Raises that when the result cannot be resumed, and ``ConnectionLost`` when it cannot any
        more.
        """
        if self._token is None:
            if self._is_wanted and isinstance(error, ConnectionLost):
                text = f"{error} The server keeps no results to go on with (--resume-window)."
                raise ConnectionLost(text) from error
            raise error
        if isinstance(error, SessionEnded):
            self._token = None
            text = f"The connection was lost, and the server has not kept the result: {error}"
            raise ConnectionLost(text) from error
        if not isinstance(error, ConnectionLost):
            raise error
        if self._retries is None:
            self._retries = self._new_retries()
        while True:
            yield from self._retries.pause(error)
            try:
                return (yield from self._ask(self._token, seq, consumed))
            except ConnectionLost as again:
                error = again
