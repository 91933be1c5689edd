"""A stream as its handler sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.outputs import OtherColumns, batches_of, is_in_memory
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.errors import InternalError, ServerError
from sqlrooms_server.messages import PluginMessage
from sqlrooms_server.plugin import Client, Plugin
from sqlrooms_server.plugins.calls import Call
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.plugins.stream_outputs import Output

if TYPE_CHECKING:
    from sqlrooms_server.plugins.stream_inputs import Input
    from sqlrooms_server.plugins.stream_requests import StreamRequest


class StreamCall(Call):
    """A :class:`Call` that goes on: ``message`` is the one that began it.

    ``plugin`` is whose stream it is, ``inputs`` maps names to :class:`Input`.
    """

    def __init__(
        self,
        message: PluginMessage,
        client: Client,
        engine: Engine,
        policy: Policy,
        runner: Runner,
        prepare: Callable[[Cursor, Client], None],
        *,
        plugin: Plugin,
        request: StreamRequest,
    ) -> None:
        super().__init__(message, client, engine, policy, runner, prepare)
        self.plugin = plugin
        self._request = request

    @property
    def inputs(self) -> Mapping[str, Input]:
        return self._request.inputs

    def write(self, output: str, value: Any) -> Any:
        """Send ``value`` to ``output``: a batch, a table, or whatever gives batches.

        Waits while the client does not read what was written before; in a coroutine, ``await`` it.
        All that an output is sent has the columns of its first batch. Raises ``Cancelled`` when
        nobody reads it any more.
        """
        self.check()
        target = self._request.outputs.get(output)
        if target is None:
            known = ", ".join(map(repr, self._request.outputs)) or "none"
            raise self._error(output, f"there is no such output; the stream has {known}")
        try:
            batches = batches_of(value)
        except TypeError as error:
            raise self._error(output, str(error)) from error
        if self._runner.is_in_coroutine:
            return self._write_async(target, batches, is_in_memory(value))
        more = True
        while more:
            if target.is_full:
                with self._request.clock.paused():
                    target.waiting.until(lambda: not target.is_full)
            self.check()
            more = self._write(target, batches)
        return None

    async def _write_async(
        self, output: Output, batches: Iterator[Any], is_in_memory: bool
    ) -> None:
        import asyncio

        more = True
        while more:
            if output.is_full:
                with self._request.clock.paused():
                    await output.waiting.until_async(lambda: not output.is_full)
            self.check()
            if is_in_memory:
                more = self._write(output, batches)
            else:
                # What gives the batches may wait for somebody.
                more = await asyncio.to_thread(self._write, output, batches)

    def _write(self, output: Output, batches: Iterator[Any]) -> bool:
        try:
            return output.write(batches)
        except OtherColumns as error:
            raise self._error(output.name, str(error)) from error

    def _error(self, output: str, reason: str) -> ServerError:
        return InternalError(
            f"Plugin {self.plugin.name!r} failed to write to output {output!r} of {self.kind!r}: "
            f"{reason}."
        )
