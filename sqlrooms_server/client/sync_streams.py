"""Streams of batches for programs that wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sqlrooms_server.client import batch_streams
from sqlrooms_server.client.blocks import Block
from sqlrooms_server.client.opening import to_pandas
from sqlrooms_server.client.results import BatchStreamState, OutputState

if TYPE_CHECKING:
    from sqlrooms_server.client.sync import Client


class BatchStream(BatchStreamState, Block):
    """A stream of batches through a plugin: ``stream["line"]`` is the ``Output`` of that name.

    Inputs are sent by threads of their own, meanwhile. Iterate over the stream for
    ``(name, batch)`` of all outputs as they come, or over its outputs, each in a thread of its own
    if there are several: the server waits for whichever is not read. Closing the stream, also by
    ``with``, or dropping it and its outputs cancels what is not complete.

    Reading raises ``RequestFailed`` with what ended the stream, ``ConnectionLost``, or what reading
    an input raised.
    """

    def __init__(self, client: Client, stream: batch_streams.BatchStream) -> None:
        self._client = client
        self._stream = stream
        if stream.has_async_inputs:
            raise TypeError("Only the client for asyncio reads asynchronous iterables.")
        client._run(stream.begin())
        try:
            for feeding in stream.feedings:
                if feeding.source.is_empty:
                    client._run(feeding.run())
                    continue
                # Daemons: they may wait for what an input gives next.
                threading.Thread(
                    target=client._run,
                    args=(feeding.run(),),
                    name="sqlrooms-client-input",
                    daemon=True,
                ).start()
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Drop what outputs still have, and wait until the stream has ended."""
        self._client._run(self._stream.finish())

    def close(self) -> None:
        """Cancel what is not complete."""
        self._stream.abandon()
        self._stream.wake()

    def __getitem__(self, output: str) -> Output:
        return Output(self, self._output(output))

    def __iter__(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        while (item := self._client._run(self._stream.next())) is not None:
            yield item

    def __del__(self) -> None:
        # Ctrl+C may come before it has a stream.
        with suppress(AttributeError):
            self.close()


class Output(OutputState):
    """One output of a stream. Iterate over its ``pyarrow.RecordBatch``, once and in bounded memory.

    For one thread at a time.
    """

    def __init__(self, stream: BatchStream, output: batch_streams.Output) -> None:
        # As long as it is there, so is the stream.
        self._stream = stream
        self._output = output

    def to_arrow(self) -> pa.Table:
        """What has not been read yet."""
        return self._stream._client._run(self._output.table())

    def to_pandas(self) -> Any:
        """The same as a DataFrame. Raises ``ImportError`` without the extra ``pandas``."""
        return to_pandas(self.to_arrow())

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        run = self._stream._client._run
        while (batch := run(self._output.next_batch())) is not None:
            yield batch
