"""One WebSocket for asyncio."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from ssl import SSLContext
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, WebSocketException

from sqlrooms_server.client.errors import ConnectionLost
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.opening import opening, refused


class Wire:
    """One WebSocket and its two tasks."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[str | bytes] = asyncio.Queue()
        self._stack = AsyncExitStack()
        self.link = Link(self._post, asyncio.Queue)

    async def open(
        self, url: str, token: str | None, timeout: float, ssl: SSLContext | None
    ) -> None:
        try:
            address, options = opening(url, token, timeout, ssl)
            connecting = connect_websocket(address, **options)
            socket = await self._stack.enter_async_context(connecting)
        except WebSocketException as error:
            raise refused(url, error) from error
        except asyncio.TimeoutError:
            # Before Python 3.11 this is no OSError.
            raise ConnectionLost(f"Nothing answers at {url}.") from None
        self._tasks = [
            asyncio.create_task(self._receive(socket)),
            asyncio.create_task(self._send(socket)),
        ]

    async def close(self) -> None:
        await self._stack.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.link.fail("The connection was closed.")

    def _post(self, message: str | bytes) -> None:
        # A finalizer may run in any thread, and after the loop has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._outgoing.put_nowait, message)

    async def _send(self, socket: ClientConnection) -> None:
        # The task that receives knows why the connection closed, and tells.
        with suppress(ConnectionClosed):
            while True:
                await socket.send(await self._outgoing.get())

    async def _receive(self, socket: ClientConnection) -> None:
        reason = "The connection was closed."
        try:
            async for message in socket:
                self.link.receive(message)
        except ConnectionClosed as closed:
            reason = f"The connection was lost: {closed}."
        except (ValueError, LookupError, TypeError) as broken:
            reason = f"The server sent what is no reply: {broken}"
        finally:
            self.link.fail(reason)
        await socket.close()


async def receive(inbox: asyncio.Queue[Any], deadline: float | None) -> Any:
    """The next reply, or None when ``deadline`` passes before it comes."""
    if deadline is None or not inbox.empty():
        return await inbox.get()
    try:
        return await asyncio.wait_for(inbox.get(), deadline - time.monotonic())
    except asyncio.TimeoutError:
        return None
