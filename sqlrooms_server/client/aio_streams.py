"""Streams of batches for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sqlrooms_server.client import batch_streams
from sqlrooms_server.client.blocks import Begun
from sqlrooms_server.client.opening import to_pandas
from sqlrooms_server.client.results import BatchStreamState, OutputState
from sqlrooms_server.client.stream_inputs import Feeding

if TYPE_CHECKING:
    from sqlrooms_server.client.aio import AsyncClient


class AsyncBatchStream(BatchStreamState, Begun):
    """``BatchStream`` for asyncio, entered by ``async with`` or awaited.

    Inputs are sent by tasks of their own. Several outputs are read by ``async for name, batch in
    stream``, or by a task for each.
    """

    def __init__(self, client: AsyncClient, stream: batch_streams.BatchStream) -> None:
        self._client = client
        self._stream = stream
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def finish(self) -> None:
        """Drop what outputs still have, and wait until the stream has ended."""
        await self._client._run(self._stream.finish())

    async def close(self) -> None:
        """Cancel what is not complete."""
        self._stream.abandon()
        _let_go(self._stream, self._tasks)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __getitem__(self, output: str) -> AsyncOutput:
        return AsyncOutput(self, self._output(output))

    async def __aiter__(self) -> AsyncIterator[tuple[str, pa.RecordBatch]]:
        while (item := await self._client._run(self._stream.next())) is not None:
            yield item

    async def _begun(self) -> AsyncBatchStream:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            await self._client._run(self._stream.begin())
            self._tasks = [
                asyncio.create_task(_feed(self._client, feeding))
                for feeding in self._stream.feedings
            ]
        return self

    def __del__(self) -> None:
        self._stream.abandon()
        # A finalizer may run in any thread, and after the loop has ended.
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_let_go, self._stream, self._tasks)


async def _feed(client: AsyncClient, feeding: Feeding) -> None:
    try:
        await client._run(feeding.run())
    finally:
        if isinstance(feeding.source.batches, AsyncGenerator):
            await feeding.source.batches.aclose()


def _let_go(stream: batch_streams.BatchStream, tasks: list[asyncio.Task[None]]) -> None:
    stream.wake()
    for task in tasks:
        task.cancel()


class AsyncOutput(OutputState):
    """One output of a stream: ``Output`` for asyncio, for one task at a time."""

    def __init__(self, stream: AsyncBatchStream, output: batch_streams.Output) -> None:
        # As long as it is there, so is the stream.
        self._stream = stream
        self._output = output

    async def to_arrow(self) -> pa.Table:
        """What has not been read yet."""
        return await self._stream._client._run(self._output.table())

    async def to_pandas(self) -> Any:
        """The same as a DataFrame. Raises ``ImportError`` without the extra ``pandas``."""
        return to_pandas(await self.to_arrow())

    async def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        run = self._stream._client._run
        while (batch := await run(self._output.next_batch())) is not None:
            yield batch
