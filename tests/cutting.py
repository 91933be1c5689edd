"""A proxy that cuts connections after so many bytes, wherever in a frame that is."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress

from tests.proxy import Proxy

# "Linger for no time": closing sends RST instead of FIN.
_RESET = struct.pack("ii", 1, 0)


class CuttingProxy(Proxy):
    """Each connection carries the next of ``budgets`` to its client and is cut then, every other
    one with a reset. Those after the last are not cut."""

    def __init__(self, port: int, budgets: Iterable[int] = ()) -> None:
        self.budgets: Iterator[int | None] = itertools.chain(budgets, itertools.repeat(None))
        self.cuts = 0
        self._being_cut: set[socket.socket] = set()
        super().__init__(port)

    def __enter__(self) -> CuttingProxy:
        return self

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        if source.getpeername()[1] == self.port:
            self._to_client(source, target)
        else:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    target.sendall(data)
            if source not in self._being_cut:
                self._end(source, target)

    def _to_client(self, server: socket.socket, client: socket.socket) -> None:
        left = next(self.budgets)
        with suppress(OSError):
            while left is None or left > 0:
                data = server.recv(1 << 16 if left is None else min(left, 1 << 16))
                if not data:
                    break
                client.sendall(data)
                left = None if left is None else left - len(data)
        if left != 0:
            self._end(server, client)
            return
        self.cuts += 1
        self._being_cut.add(client)
        for end in (client, server):
            with suppress(OSError):
                if self.cuts % 2:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                # The other thread waits for it, which would keep it open.
                end.shutdown(socket.SHUT_RD)
            end.close()

    @staticmethod
    def _end(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
