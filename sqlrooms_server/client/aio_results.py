"""Results and sessions for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from sqlrooms_server.client import queries, result_streams
from sqlrooms_server.client.blocks import AsyncBlock
from sqlrooms_server.client.errors import ConnectionLost, RequestFailed
from sqlrooms_server.client.opening import to_pandas
from sqlrooms_server.client.results import ResultState, RowList
from sqlrooms_server.client.values import Parameters

if TYPE_CHECKING:
    from sqlrooms_server.client.aio import AsyncClient


class AsyncResult(ResultState, AsyncBlock):
    """The result of a query, whose batches arrive while it is read: ``Result`` for asyncio."""

    def __init__(self, client: AsyncClient, stream: result_streams.Stream) -> None:
        super().__init__(stream)
        self._client = client

    async def to_arrow(self) -> pa.Table:
        """The whole result. Raises ``RuntimeError`` when batches of it were taken already."""
        if self._table is None:
            self._table = await self._client._run(self._stream.table())
        return self._table

    async def to_pandas(self) -> Any:
        """The whole result as a DataFrame. Raises ``ImportError`` without the extra ``pandas``."""
        return to_pandas(await self.to_arrow())

    async def to_pylist(self) -> list[dict[str, Any]]:
        """The whole result as one dictionary for each row."""
        return cast(list[dict[str, Any]], (await self.to_arrow()).to_pylist())

    async def cancel(self) -> bool:
        """Cancel the query; False when it has ended. Reading then raises ``RequestFailed``."""
        return await self._client.cancel(self)

    async def close(self) -> None:
        """Cancel what has not arrived."""
        self._stream.abandon()

    async def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        if self._table is not None:
            for batch in self._table.to_batches():
                yield batch
            return
        while (batch := await self._client._run(self._stream.next_batch())) is not None:
            yield batch


class AsyncSession(AsyncBlock):
    """Queries that share one cursor of the server: ``Session`` for asyncio."""

    def __init__(self, client: AsyncClient, state: queries.Session) -> None:
        self._client = client
        self._state = state

    @property
    def name(self) -> str:
        """The name of the session on its connection."""
        return self._state.name

    async def query(
        self, sql: str, params: Parameters | None = None, **options: Any
    ) -> AsyncResult:
        """Like ``AsyncClient.query``, in this session."""
        return await self._client.query(sql, params, session=self, **options)

    async def rows(self, sql: str, params: Parameters | None = None, **options: Any) -> RowList:
        """Like ``AsyncClient.rows``, in this session."""
        return await self._client.rows(sql, params, session=self, **options)

    async def execute(self, sql: str, params: Parameters | None = None, **options: Any) -> None:
        """Like ``AsyncClient.execute``, in this session."""
        await self._client.execute(sql, params, session=self, **options)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """``BEGIN``, and at the end of the block ``COMMIT``, or ``ROLLBACK`` when it raises."""
        await self.execute("BEGIN")
        try:
            yield self
        except BaseException:
            # A session that ended was rolled back by the server.
            with suppress(RequestFailed, ConnectionLost):
                await self.execute("ROLLBACK")
            raise
        await self.execute("COMMIT")

    async def close(self) -> bool:
        """End the session and roll back what is open; False when it had ended already."""
        return await self._client._run(self._client._requests.close_session(self._state))
