"""Puts the questions of this benchmark to `bare_process.py`, in place of `websocket.Connection`."""

from __future__ import annotations

import json
import selectors
import socket
import time

from .bare_process import FRAME, QUESTION
from .replies import arrow_head
from .websocket import READ_SIZE, SILENCE, Disconnected, Receiver, limit_silence


class BareConnection:
    """One connection to 127.0.0.1:`port`, a `with` block. One question at a time.

    Calls block, for `SILENCE` at most. An answer is handed on as that of a `sqlrooms-server` would
    be, with its header, which that program does not know.
    """

    # There is just the one socket.
    generation = 1
    events: int = selectors.EVENT_READ

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=SILENCE)
        limit_silence(self._socket)
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._head = bytearray()
        self._left = 0
        self._last = False
        self._prefix = b""
        self._questions: dict[bytes, bytes] = {}

    def __enter__(self) -> BareConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, text: bytes) -> None:
        """Send one question."""
        before, _, rest = text.partition(b'"queryId": "')
        if before not in self._questions:
            sql = json.loads(text)["sql"].encode()
            self._questions[before] = QUESTION.pack(len(sql)) + sql
        self._prefix = arrow_head(rest[: rest.index(b'"')])
        self._socket.sendall(self._questions[before])

    def receive(self, receiver: Receiver) -> None:
        """Hand on what one read brings."""
        try:
            size = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            raise Disconnected(f"no answer within {SILENCE:.0f} s") from None
        if not size:
            raise Disconnected("the server closed the connection")
        if self._prefix:
            receiver.piece(memoryview(self._prefix))
            self._prefix = b""
        at = 0
        while at < size:
            if not self._left:
                part = self._buffer[at : min(size, at + FRAME.size - len(self._head))]
                self._head += part
                at += len(part)
                if len(self._head) < FRAME.size:
                    return
                self._left, self._last = FRAME.unpack(self._head)
                self._head.clear()
            part = self._buffer[at : min(size, at + self._left)]
            if part:
                receiver.piece(part)
            at += len(part)
            self._left -= len(part)
            if self._last and not self._left:
                self._last = False
                receiver.end(True)

    def idle(self, seconds: float, receiver: Receiver) -> None:
        """Say nothing for `seconds`."""
        time.sleep(seconds)
