"""Results and sessions for programs that wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from sqlrooms_server.client import queries, result_streams
from sqlrooms_server.client.blocks import Block
from sqlrooms_server.client.errors import ConnectionLost, RequestFailed
from sqlrooms_server.client.opening import to_pandas
from sqlrooms_server.client.results import ResultState, RowList
from sqlrooms_server.client.values import Parameters

if TYPE_CHECKING:
    from sqlrooms_server.client.sync import Client


class Result(ResultState, Block):
    """The result of a query, whose batches arrive while it is read.

    Iterate over its ``pyarrow.RecordBatch``, once and in bounded memory, or take it as a whole,
    as often as you like. For one thread at a time. Closing it, also by ``with``, or dropping it
    cancels what has not arrived.

    Reading raises what ``Client`` says, also after the first batches.
    """

    def __init__(self, client: Client, stream: result_streams.Stream) -> None:
        super().__init__(stream)
        self._client = client

    def to_arrow(self) -> pa.Table:
        """The whole result. Raises ``RuntimeError`` when batches of it were taken already."""
        if self._table is None:
            self._table = self._client._run(self._stream.table())
        return self._table

    def to_pandas(self) -> Any:
        """The whole result as a DataFrame. Raises ``ImportError`` without the extra ``pandas``."""
        return to_pandas(self.to_arrow())

    def to_pylist(self) -> list[dict[str, Any]]:
        """The whole result as one dictionary for each row."""
        return cast(list[dict[str, Any]], self.to_arrow().to_pylist())

    def cancel(self) -> bool:
        """Cancel the query; False when it has ended. Reading then raises ``RequestFailed``."""
        return self._client.cancel(self)

    def close(self) -> None:
        """Cancel what has not arrived."""
        self._stream.abandon()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        if self._table is not None:
            yield from self._table.to_batches()
            return
        while (batch := self._client._run(self._stream.next_batch())) is not None:
            yield batch


class Session(Block):
    """Queries that share one cursor of the server and run one after the other.

    It lives as long as the connection of its first use. After that, or after the server ended it,
    its methods raise ``SessionEnded``. A result that is not read to its end when the next
    statement is sent, is read into memory first. For one thread at a time.
    """

    def __init__(self, client: Client, state: queries.Session) -> None:
        self._client = client
        self._state = state

    @property
    def name(self) -> str:
        """The name of the session on its connection."""
        return self._state.name

    def query(self, sql: str, params: Parameters | None = None, **options: Any) -> Result:
        """Like ``Client.query``, in this session."""
        return self._client.query(sql, params, session=self, **options)

    def rows(self, sql: str, params: Parameters | None = None, **options: Any) -> RowList:
        """Like ``Client.rows``, in this session."""
        return self._client.rows(sql, params, session=self, **options)

    def execute(self, sql: str, params: Parameters | None = None, **options: Any) -> None:
        """Like ``Client.execute``, in this session."""
        self._client.execute(sql, params, session=self, **options)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """``BEGIN``, and at the end of the block ``COMMIT``, or ``ROLLBACK`` when it raises."""
        self.execute("BEGIN")
        try:
            yield self
        except BaseException:
            # A session that ended was rolled back by the server.
            with suppress(RequestFailed, ConnectionLost):
                self.execute("ROLLBACK")
            raise
        self.execute("COMMIT")

    def close(self) -> bool:
        """End the session and roll back what is open; False when it had ended already."""
        return self._client._run(self._client._requests.close_session(self._state))
