"""Puts the questions of this benchmark to `bare_process.py`, in place of `websocket.Connection`."""

from __future__ import annotations

import json
import time

from .bare_process import FRAME, QUESTION
from .replies import arrow_head
from .websocket import OneSocket, Receiver, limit_silence


class BareConnection(OneSocket):
    """One connection to 127.0.0.1:`port`, a `with` block. One question at a time.

    Calls block, for `SILENCE` at most. An answer is handed on as that of a `sqlrooms-server` would
    be, with its header, which that program does not know.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        limit_silence(self._socket)
        self._head = bytearray()
        self._left = 0
        self._last = False
        self._prefix = b""
        self._questions: dict[bytes, bytes] = {}

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
        data = self._read()
        size = len(data)
        if self._prefix:
            receiver.piece(memoryview(self._prefix))
            self._prefix = b""
        at = 0
        while at < size:
            if not self._left:
                part = data[at : at + FRAME.size - len(self._head)]
                self._head += part
                at += len(part)
                if len(self._head) < FRAME.size:
                    return
                self._left, self._last = FRAME.unpack(self._head)
                self._head.clear()
            part = data[at : at + self._left]
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
