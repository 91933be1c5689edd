"""One WebSocket for programs that wait.

Messages are handed to a thread that sends them, so that Ctrl+C never leaves half a frame behind.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import ExitStack, suppress
from ssl import SSLContext
from typing import Any

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

from sqlrooms_server.client.link import Link
from sqlrooms_server.client.opening import opening, refused

# Windows does not interrupt a wait for Ctrl+C; so that it is looked at, no wait is longer.
_LONGEST_WAIT_S = 1.0


class Wire:
    """One WebSocket and its two threads."""

    def __init__(self, url: str, token: str | None, timeout: float, ssl: SSLContext | None) -> None:
        # Its put may be called by a finalizer, in the middle of another put.
        self._outgoing: queue.SimpleQueue[str | bytes | None] = queue.SimpleQueue()
        self.link = Link(self._outgoing.put, queue.SimpleQueue)
        with ExitStack() as stack:
            try:
                address, options = opening(url, token, timeout, ssl)
                connecting = connect_websocket(address, **options)
                self._socket: ClientConnection = stack.enter_context(connecting)
            except WebSocketException as error:
                raise refused(url, error) from error
            self._stack = stack.pop_all()
        self._threads = [
            threading.Thread(target=target, name="sqlrooms-client", daemon=True)
            for target in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stack.close()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        # The thread that receives knows why the connection closed, and tells.
        with suppress(ConnectionClosed):
            while (message := self._outgoing.get()) is not None:
                self._socket.send(message)

    def _receive(self) -> None:
        reason = "The connection was closed."
        try:
            for message in self._socket:
                self.link.receive(message)
        except ConnectionClosed as closed:
            reason = f"The connection was lost: {closed}."
        except (ValueError, LookupError, TypeError) as broken:
            reason = f"The server sent what is no reply: {broken}"
        finally:
            self.link.fail(reason)
            self._outgoing.put(None)
            self._socket.close()


def receive(inbox: queue.SimpleQueue[Any], deadline: float | None) -> Any:
    """The next reply, or None when ``deadline`` passes before it comes."""
    while True:
        wait = _LONGEST_WAIT_S
        if deadline is not None:
            wait = min(wait, deadline - time.monotonic())
        try:
            return inbox.get(timeout=max(0, wait))
        except queue.Empty:
            if deadline is not None and time.monotonic() >= deadline:
                return None
