"""What ends with its ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from types import TracebackType
from typing import Any, TypeVar

B = TypeVar("B", bound="Block")
A = TypeVar("A", bound="AsyncBlock")
T = TypeVar("T", bound="Begun")


class Block(ABC):
    """For programs that wait: ``with`` closes it."""

    @abstractmethod
    def close(self) -> Any: ...

    def __enter__(self: B) -> B:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncBlock(ABC):
    """For asyncio: ``async with`` closes it."""

    @abstractmethod
    async def close(self) -> Any: ...

    async def __aenter__(self: A) -> A:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Begun(AsyncBlock):
    """For asyncio: begun where it is awaited or entered."""

    @abstractmethod
    async def _begun(self: T) -> T: ...

    def __await__(self: T) -> Generator[Any, None, T]:
        return self._begun().__await__()

    async def __aenter__(self: T) -> T:
        return await self._begun()
