"""A network between peers and a server, which cuts and holds connections when it is told."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import cast

# Closing sends a reset, and throws away what was not sent.
_RESET = struct.pack("ii", 1, 0)


class Network:
    """An address for each of ``count`` peers, which stays while the server behind it changes.

    ``port`` is that of the server; while it is ``None`` connections are held, not refused.
    """

    def __init__(self, count: int) -> None:
        self.links = [Link(self) for _ in range(count)]
        self._port: int | None = None
        self._up = asyncio.Event()

    async def start(self) -> None:
        for link in self.links:
            await link.start()

    async def stop(self) -> None:
        for link in self.links:
            await link.stop()

    def connect_to(self, port: int | None) -> None:
        """Cut what there is; connections lead to ``port`` from now on."""
        for link in self.links:
            link.cut()
        self._port = port
        if port is None:
            self._up.clear()
        else:
            self._up.set()

    async def port(self) -> int:
        while self._port is None:
            await self._up.wait()
        return self._port


class Link:
    """The address of one peer."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.url = ""
        self._tunnels: set[_Tunnel] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._dialing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Tunnel(self).client, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        for task in self._dialing:
            task.cancel()
        await asyncio.gather(*self._dialing, return_exceptions=True)

    def cut(self) -> None:
        """Reset the connections that there are."""
        for tunnel in list(self._tunnels):
            tunnel.reset()

    def cut_after(self, count: int, *, is_sending: bool) -> None:
        """Let ``count`` more bytes pass from the peer, or to it, and cut in the middle."""
        for tunnel in self._tunnels:
            side = tunnel.client if is_sending else tunnel.server
            side.left = count

    def hold(self) -> None:
        """Let nothing pass, and cut nothing."""
        self._open.clear()
        for tunnel in self._tunnels:
            tunnel.pause()

    def release(self) -> None:
        self._open.set()
        for tunnel in self._tunnels:
            tunnel.resume()

    def __str__(self) -> str:
        state = "open" if self._open.is_set() else "held"
        return f"link {state}: {', '.join(map(str, self._tunnels)) or 'no connection'}"

    def opened(self, tunnel: _Tunnel) -> None:
        self._tunnels.add(tunnel)
        task = asyncio.create_task(self._dial(tunnel))
        self._dialing.add(task)
        task.add_done_callback(self._dialing.discard)

    def closed(self, tunnel: _Tunnel) -> None:
        self._tunnels.discard(tunnel)

    async def _dial(self, tunnel: _Tunnel) -> None:
        await self._open.wait()
        port = await self.network.port()
        if tunnel not in self._tunnels:
            return
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: tunnel.server, "127.0.0.1", port
            )
        except OSError:
            tunnel.reset()
            return
        if tunnel not in self._tunnels:
            tunnel.reset()
        elif self._open.is_set():
            tunnel.resume()


class _Tunnel:
    """One connection: both of its ends."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.client = _Side(self)
        self.server = _Side(self)

    def __str__(self) -> str:
        dialled = "" if self.server.transport else ", not dialled"
        return f"{self.client.passed} bytes sent, {self.server.passed} received{dialled}"

    def other(self, side: _Side) -> _Side:
        return self.server if side is self.client else self.client

    def opened(self, side: _Side) -> None:
        side.pause()
        if side is self.client:
            self.link.opened(self)

    def closed(self, side: _Side) -> None:
        """One end has closed: what has come goes to the other end before that closes, too."""
        other = self.other(side).transport
        if other is not None:
            other.close()
        self.link.closed(self)

    def pause(self) -> None:
        self.client.pause()
        self.server.pause()

    def resume(self) -> None:
        if self.server.transport is not None:
            self.client.resume()
            self.server.resume()

    def reset(self) -> None:
        for side in (self.client, self.server):
            if side.transport is not None:
                end = side.transport.get_extra_info("socket")
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                side.transport.abort()
        self.link.closed(self)


class _Side(asyncio.Protocol):
    """What comes from one end goes to the other. ``left``: so many bytes more, then a cut."""

    def __init__(self, tunnel: _Tunnel) -> None:
        self._tunnel = tunnel
        self.transport: asyncio.Transport | None = None
        self.left: int | None = None
        self.passed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._tunnel.opened(self)

    def data_received(self, data: bytes) -> None:
        other = self._tunnel.other(self).transport
        if other is None:
            return
        self.passed += len(data)
        if self.left is None:
            other.write(data)
            return
        other.write(data[: self.left])
        self.left -= min(self.left, len(data))
        if not self.left:
            self._tunnel.reset()

    def connection_lost(self, error: Exception | None) -> None:
        self._tunnel.closed(self)

    def pause(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
