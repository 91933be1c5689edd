"""What results and feeds tell about themselves, waiting or for asyncio."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import ujson

from sqlrooms_server.client import batch_streams, result_streams
from sqlrooms_server.client.messages import Id
from sqlrooms_server.client.replies import Rows, Summary


class ResultState:
    """The part of a result that waits for nothing. A result that is dropped is abandoned."""

    def __init__(self, stream: result_streams.Stream) -> None:
        self._stream = stream
        self._table = stream.whole

    @property
    def schema(self) -> pa.Schema:
        """The columns; none when the statement has no result."""
        return self._stream.schema

    @property
    def query_id(self) -> Id:
        """The name of the query on its connection."""
        return self._stream.request.query_id

    @property
    def summary(self) -> Summary | None:
        """Rows, bytes and times. None before the last batch was read, and without a result."""
        return self._stream.summary

    @property
    def truncated(self) -> bool:
        """True when there were more rows than a limit lets through. Known after the last batch."""
        return self._stream.truncated

    @property
    def cached(self) -> bool:
        """True when the server had the result already. Known after the last batch."""
        return self._stream.cached

    def __del__(self) -> None:
        # Ctrl+C may come before it has a stream.
        with suppress(AttributeError):
            self._stream.abandon()


class BatchStreamState:
    """The part of a stream of batches that waits for nothing."""

    _stream: batch_streams.BatchStream

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its inputs."""
        return tuple(feeding.source.name for feeding in self._stream.feedings)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs."""
        return tuple(self._stream.outputs)

    def _output(self, name: str) -> batch_streams.Output:
        try:
            return self._stream.outputs[name]
        except KeyError:
            known = ", ".join(map(repr, self._stream.outputs)) or "none"
            raise KeyError(f"There is no output {name!r}; the stream has {known}.") from None


class OutputState:
    """The part of an output that waits for nothing."""

    _output: batch_streams.Output

    @property
    def name(self) -> str:
        return self._output.name

    @property
    def schema(self) -> pa.Schema | None:
        """The columns; None before they have come, which is with the first batch."""
        return self._output.schema


class WatchState:
    """The part of a watch that waits for nothing."""

    _feed: Any

    @property
    def versions(self) -> Mapping[str, int]:
        """When each table changed last, as far as it was read here: larger is later, 0 never."""
        versions: Mapping[str, int] = self._feed.versions
        return versions

    @property
    def version(self) -> str | None:
        """The version of the last change that was read, for ``since`` of a later watch."""
        version: str | None = self._feed.version
        return version


class SubscriptionState:
    """The part of a subscription that waits for nothing."""

    _feed: Any

    @property
    def offset(self) -> str | None:
        """Where the reader is, for ``since`` of a later subscription."""
        offset: str | None = self._feed.offset
        return offset


class RowList(list[dict[str, Any]]):
    """Rows as dictionaries. ``cached`` is True when the server had the result already."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(ujson.loads(rows.data))
        self.cached = rows.cached
