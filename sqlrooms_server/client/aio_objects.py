"""Objects that are open, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from sqlrooms_server.client import objects
from sqlrooms_server.client.blocks import Begun
from sqlrooms_server.client.objects import ObjectMessage, Reference

if TYPE_CHECKING:
    from sqlrooms_server.client.aio import AsyncClient


class AsyncOpenObject(Begun):
    """``OpenObject`` for asyncio: entered by ``async with``, or awaited."""

    def __init__(self, client: AsyncClient, opened: objects.OpenObject) -> None:
        self._client = client
        self._opened = opened

    async def send(self, payload: bytes | str, references: Sequence[Reference] = ()) -> None:
        """Say something to the object, when it has room for it."""
        await self._client._run(self._opened.send(payload, references))

    async def receive(self, timeout: float | None = None) -> ObjectMessage | None:
        """What it says next, or None when it is closed."""
        return await self._client._run(self._opened.receive(timeout))

    async def close(self) -> None:
        """Send no more, and wait until the object has handled what was sent."""
        await self._client._run(self._opened.close())

    async def __aiter__(self) -> AsyncIterator[ObjectMessage]:
        while (message := await self.receive()) is not None:
            yield message

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
        else:
            self._opened.abandon()

    async def _begun(self) -> AsyncOpenObject:
        await self._client._run(self._opened.begin())
        return self

    def __del__(self) -> None:
        self._opened.abandon()
