"""HTTP requests under way, from their first byte to their answer. For the loop thread."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

from sqlrooms_server.transport import native
from sqlrooms_server.transport.exchange import Exchange, Wire
from sqlrooms_server.transport.http import HttpRequest, RequestReader
from sqlrooms_server.transport.sockets import Sockets

log = logging.getLogger(__name__)

ffi, lib = native.ffi, native.lib

# Requests that one socket may have sent at once. Half a megabyte of them would take a second, in
# which nobody else is served. Clients wait for the answer to each.
_MAX_AT_ONCE = 64

# Of a body that was refused, so much is read all the same: a client that is still sending hears
# nothing, and would be told by the system that the connection is broken.
_MAX_UNREAD_BYTES = 4 << 20

TOO_MANY = "There are too many connections from {} (--max-connections-per-address)."


class _Refused:
    """A body that comes after its request was answered, and whether its socket closes then."""

    def __init__(self, closes: bool) -> None:
        self.closes = closes
        self.size = 0


class Exchanges:
    """The requests of one app of uWebSockets. No callback may raise, and each must be answered."""

    def __init__(
        self,
        tls: int,
        reader: RequestReader,
        sockets: Sockets,
        answer: Callable[[HttpRequest, Exchange], None],
        post: Callable[..., None],
    ) -> None:
        self._tls = tls
        self._reader = reader
        self._sockets = sockets
        self._answer = answer
        self._post = post
        self._wire: Wire | None = None
        self._open: dict[int, Exchange] = {}
        # By their sockets.
        self._refused: dict[int, _Refused] = {}
        self._unclear: set[int] = set()
        self._numbers = itertools.count(1)
        # The socket that asked last in this turn of the loop, and how often.
        self._asking = 0
        self._times = 0
        self._on_http_callback = ffi.callback("void(uws_res_t*, uws_req_t*, void*)", self._on_http)
        self._on_abort_callback = ffi.callback("void(uws_res_t*, void*)", self._on_abort)
        self._on_data_callback = ffi.callback(
            "void(uws_res_t*, const char*, size_t, bool, void*)", self._on_data
        )
        self._on_writable_callback = ffi.callback(
            "bool(uws_res_t*, uintmax_t, void*)", self._on_writable
        )

    def serve(self, app: Any, loop: Any) -> None:
        """Answer the requests of ``app``, on ``loop``, that are no upgrades."""
        self._wire = Wire(
            self._post,
            loop,
            self._on_writable_callback,
            self._forget,
            self._add_refused,
            self._is_active,
        )
        lib.uws_app_any(self._tls, app, b"/*", self._on_http_callback, ffi.NULL)

    def turn_ended(self) -> None:
        """For the transport: what comes now was not sent at once."""
        self._asking = 0

    def socket_closed(self, key: int) -> None:
        """For the transport: the socket ``key`` is gone."""
        self._refused.pop(key, None)
        self._unclear.discard(key)

    def refuse_all(self) -> None:
        """The server stops: answer those that nobody has begun to answer."""
        for exchange in list(self._open.values()):
            if not exchange.is_answered:
                exchange.respond(503, b"the server is shutting down")

    def may_not_ask(self, key: int) -> bool:
        """Whether a socket, by its address, sent more requests at once than anybody needs, or what
        may be a part of its last one."""
        if key in self._unclear:
            return True
        self._times = self._times + 1 if key == self._asking else 1
        self._asking = key
        return self._times > _MAX_AT_ONCE

    def _on_http(self, res: Any, req: Any, user_data: Any) -> None:
        key = native.pointer_key(res)
        if self.may_not_ask(key):
            lib.uws_res_close(self._tls, res)
            return
        self._refused.pop(key, None)
        number = next(self._numbers)
        pointer = native.integer_pointer(number)
        lib.uws_res_on_aborted(self._tls, res, self._on_abort_callback, pointer)
        exchange: Exchange | None = None
        try:
            may_ask = self._sockets.asked(key)
            request = self._reader.read(res, req)
            unclear = self._reader.refusal(request, req)
            if unclear is not None:
                # This closes the socket, but what has come by then is still looked at.
                self._unclear.add(key)
                Exchange(self._tls, res).respond(400, unclear.encode())
                return
            exchange = self._open[number] = Exchange(
                self._tls,
                res,
                self._wire,
                number=number,
                is_head=request.method == "HEAD",
                has_body=request.has_body,
            )
            if request.has_body:
                lib.uws_res_on_data(self._tls, res, self._on_data_callback, pointer)
            if may_ask:
                self._answer(request, exchange)
            else:
                exchange.respond(429, TOO_MANY.format(request.remote_address).encode())
        except Exception:  # loop-callback guard
            log.exception("An HTTP request failed.")
            (exchange or Exchange(self._tls, res)).respond(500, b"internal error")

    def _on_data(self, res: Any, data: Any, length: int, last: bool, user_data: Any) -> None:
        exchange = self._open.get(native.pointer_key(user_data))
        if exchange is None:
            self._skip(res, length, last)
            return
        try:
            exchange.body_came(native.unpack(data, length), bool(last))
        except Exception:  # loop-callback guard
            log.exception("An HTTP request failed.")
            exchange.respond(500, b"internal error")

    def _on_writable(self, res: Any, offset: int, user_data: Any) -> bool:
        exchange = self._open.get(native.pointer_key(user_data))
        if exchange is None:
            return True
        try:
            return exchange.writable()
        except Exception:  # loop-callback guard
            log.exception("An HTTP answer failed.")
            exchange.abort()
            return True

    def _add_refused(self, res: Any, closes: bool) -> None:
        self._refused[native.pointer_key(res)] = _Refused(closes)

    def _skip(self, res: Any, length: int, last: bool) -> None:
        """Bytes of a body came that nobody waits for."""
        key = native.pointer_key(res)
        refused = self._refused.get(key)
        if refused is None:
            return
        refused.size += length
        if last and not refused.closes:
            del self._refused[key]
        elif last or refused.size > _MAX_UNREAD_BYTES:
            # Not now: the answer may leave only when this callback returns.
            self._post(self._close, key, refused)

    def _close(self, key: int, refused: _Refused) -> None:
        if self._refused.get(key) is refused:
            lib.uws_res_close(self._tls, native.integer_pointer(key))

    def _forget(self, number: int) -> None:
        self._open.pop(number, None)

    def _is_active(self, res: Any) -> None:
        """Others have been silent longer."""
        self._sockets.asked(native.pointer_key(res))

    def _on_abort(self, res: Any, user_data: Any) -> None:
        exchange = self._open.pop(native.pointer_key(user_data), None)
        if exchange is not None:
            try:
                exchange.aborted()
            except Exception:  # loop-callback guard
                log.exception("The end of an HTTP request failed.")
