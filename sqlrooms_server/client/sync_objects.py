"""Objects that are open, for programs that wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from sqlrooms_server.client import objects
from sqlrooms_server.client.blocks import Block
from sqlrooms_server.client.objects import ObjectMessage, Reference

if TYPE_CHECKING:
    from sqlrooms_server.client.sync import Client


class OpenObject(Block):
    """An object of a plugin that is open: messages both ways, until either side closes it.

    Iterate over what it says, ``(payload, references)`` each; one thread may do so while another
    one sends. It does not survive its connection. Dropping it cancels it.
    """

    def __init__(self, client: Client, opened: objects.OpenObject) -> None:
        self._client = client
        self._opened = opened
        client._run(opened.begin())

    def send(self, payload: bytes | str, references: Sequence[Reference] = ()) -> None:
        """Say something to the object, when it has room for it.

        Raises ``RequestFailed`` with what ended it, or ``RuntimeError`` when it is closed.
        """
        self._client._run(self._opened.send(payload, references))

    def receive(self, timeout: float | None = None) -> ObjectMessage | None:
        """What it says next, or None when it is closed. Raises ``TimeoutError`` when nothing comes
        within ``timeout`` seconds, and ``RequestFailed`` for what ended it."""
        return self._client._run(self._opened.receive(timeout))

    def close(self) -> None:
        """Send no more, and wait until the object has handled what was sent."""
        self._client._run(self._opened.close())

    def __iter__(self) -> Iterator[ObjectMessage]:
        while (message := self.receive()) is not None:
            yield message

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._opened.abandon()

    def __del__(self) -> None:
        # Ctrl+C may come before it is there.
        with suppress(AttributeError):
            self._opened.abandon()
