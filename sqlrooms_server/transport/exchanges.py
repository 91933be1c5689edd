"""HTTP requests under way, from their first byte to their answer. For the loop thread."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from typing import Any

from sqlrooms_server.transport import native
from sqlrooms_server.transport.http import Exchange, HttpRequest, RequestReader
from sqlrooms_server.transport.sockets import Sockets

log = logging.getLogger(__name__)

ffi, lib = native.ffi, native.lib

# Requests that one socket may have sent at once. Half a megabyte of them would take a second, in
# which nobody else is served. Clients wait for the answer to each.
_MAX_AT_ONCE = 64

TOO_MANY = "There are too many connections from {} (--max-connections-per-address)."


class _Arriving:
    """A request whose body has not all arrived."""

    def __init__(self, request: HttpRequest, exchange: Exchange) -> None:
        self.exchange = exchange
        self._request = request
        self._body = bytearray()

    @property
    def size(self) -> int:
        return len(self._body)

    def add(self, data: bytes) -> None:
        self._body += data

    def request(self) -> HttpRequest:
        """The whole request."""
        return dataclasses.replace(self._request, body=bytes(self._body))


class Exchanges:
    """The requests of one app of uWebSockets. No callback may raise, and each must be answered."""

    def __init__(
        self,
        tls: int,
        reader: RequestReader,
        sockets: Sockets,
        answer: Callable[[HttpRequest, Exchange], None],
        max_body: int,
    ) -> None:
        self._tls = tls
        self._reader = reader
        self._sockets = sockets
        self._answer = answer
        self._max_body = max_body
        self._open: dict[int, Exchange] = {}
        self._arriving: dict[int, _Arriving] = {}
        self._numbers = itertools.count(1)
        # The socket that asked last in this turn of the loop, and how often.
        self._asking = 0
        self._times = 0
        self._on_http_callback = ffi.callback("void(uws_res_t*, uws_req_t*, void*)", self._on_http)
        self._on_abort_callback = ffi.callback("void(uws_res_t*, void*)", self._on_abort)
        self._on_data_callback = ffi.callback(
            "void(uws_res_t*, const char*, size_t, bool, void*)", self._on_data
        )

    def serve(self, app: Any) -> None:
        """Answer the requests of ``app`` that are no upgrades."""
        lib.uws_app_any(self._tls, app, b"/*", self._on_http_callback, ffi.NULL)

    def turn_ended(self) -> None:
        """For the transport: what comes now was not sent at once."""
        self._asking = 0

    def asks_too_often(self, key: int) -> bool:
        """Whether a socket, by its address, sent more requests at once than anybody needs."""
        self._times = self._times + 1 if key == self._asking else 1
        self._asking = key
        return self._times > _MAX_AT_ONCE

    def _on_http(self, res: Any, req: Any, user_data: Any) -> None:
        key = native.pointer_key(res)
        if self.asks_too_often(key):
            lib.uws_res_close(self._tls, res)
            return
        number = next(self._numbers)
        exchange = self._open[number] = Exchange(self._tls, res)
        pointer = native.integer_pointer(number)
        lib.uws_res_on_aborted(self._tls, res, self._on_abort_callback, pointer)
        try:
            may_ask = self._sockets.asked(key)
            request = self._reader.read(res, req)
            if not may_ask:
                exchange.respond(429, TOO_MANY.format(request.remote_address).encode())
            elif request.method == "POST":
                self._arriving[number] = _Arriving(request, exchange)
                lib.uws_res_on_data(self._tls, res, self._on_data_callback, pointer)
            else:
                self._answer(request, exchange)
        except Exception:  # loop-callback guard
            log.exception("An HTTP request failed.")
            exchange.respond(500, b"internal error")
        self._forget_answered()

    def _on_data(self, res: Any, data: Any, length: int, last: bool, user_data: Any) -> None:
        number = native.pointer_key(user_data)
        arriving = self._arriving.get(number)
        if arriving is None:
            return
        arriving.add(native.unpack(data, length))
        if arriving.size > self._max_body:
            text = f"The body has more than {self._max_body} bytes (--max-notify-size)."
            arriving.exchange.respond(413, text.encode())
        elif last:
            try:
                self._answer(arriving.request(), arriving.exchange)
            except Exception:  # loop-callback guard
                log.exception("An HTTP request failed.")
                arriving.exchange.respond(500, b"internal error")
        if last or not arriving.exchange.is_open:
            self._arriving.pop(number, None)
        self._forget_answered()

    def _forget_answered(self) -> None:
        """Most are answered at once; those that wait are few."""
        self._open = {n: e for n, e in self._open.items() if e.is_open}

    def _on_abort(self, res: Any, user_data: Any) -> None:
        self._arriving.pop(native.pointer_key(user_data), None)
        exchange = self._open.pop(native.pointer_key(user_data), None)
        if exchange is not None:
            exchange.aborted()
