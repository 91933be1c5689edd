"""One HTTP request: its body as it comes, and its answer, which may be produced while it is sent.

All methods belong to the loop thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from sqlrooms_server.transport import native
from sqlrooms_server.transport.connection import (
    FRAGMENT_BYTES,
    TURN_BYTES,
    Pull,
    Source,
    Whole,
)
from sqlrooms_server.transport.http import check_headers

# uWebSockets gives a client ten seconds to take what fills its socket, or to send 160 KiB. On a
# slow link, a socket that holds megabytes tells only after a minute that it has room again.
_STALLED_SECONDS = 120
_SILENT_SECONDS = 10

_NO_BODY = (204, 304)

_REASONS = {int(status): status.phrase for status in HTTPStatus}


class Receiver(Protocol):
    """Takes the body of a request as it comes."""

    def received(self, data: bytes, last: bool) -> None:
        """The next bytes, at most half a megabyte, perhaps none, and whether they are the last."""

    def dropped(self) -> None:
        """There will be no more: the client went away, or was answered before the end."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What an exchange needs of its transport.

    ``forget`` is told the number of one that was answered, ``refused`` the pointer of one that was
    answered before its body came, and whether its socket closes then, ``active`` that of one whose
    answer goes on.
    """

    post: Callable[..., None]
    loop: Any
    on_writable: Any
    forget: Callable[[int], None]
    refused: Callable[[Any, bool], None]
    active: Callable[[Any], None]


class Exchange:
    """An HTTP request that waits for its answer.

    Its body, if there is one, waits until :meth:`collect` or :meth:`receive` is called.
    """

    def __init__(
        self,
        tls: int,
        res: Any,
        wire: Wire | None = None,
        *,
        number: int = 0,
        is_head: bool = False,
        has_body: bool = False,
    ) -> None:
        """Without a ``wire``, all that it can do is to :meth:`respond`."""
        self._tls = tls
        self._res = res
        self._wire = wire
        self._number = number
        self._is_head = is_head
        self._headers: dict[str, str] = {}
        # The body of the request.
        self._body_ended = not has_body
        self._receiver: Receiver | None = None
        self._early = bytearray()
        self._is_paused = False
        # The answer.
        self._source: Source | None = None
        self._length: int | None = None
        self._written = 0
        self._rest: memoryview | None = None
        self._is_last = False
        self._is_full = False
        self._is_posted = False

    @property
    def is_open(self) -> bool:
        """False once it was answered or the client went away."""
        return self._res is not None

    @property
    def is_answered(self) -> bool:
        """Whether its answer has begun, or nobody is there for it."""
        return self._res is None or self._source is not None

    def add_headers(self, headers: Mapping[str, str]) -> None:
        """Whatever the answer is, it has ``headers``, too."""
        self._headers.update(headers)

    # The body of the request.

    def collect(self, limit: int, flag: str, then: Callable[[bytes], None]) -> None:
        """Call ``then`` with the body; above ``limit`` bytes, which ``flag`` sets, answer 413."""
        self.receive(_Collected(self, limit, flag, then))

    def receive(self, receiver: Receiver) -> None:
        """Hand the body to ``receiver``, from its beginning."""
        if self._res is None:
            receiver.dropped()
            return
        self._receiver = receiver
        early, self._early = bytes(self._early), bytearray()
        if self._is_paused:
            self.resume_reading()
        receiver.received(early, self._body_ended)

    def pause_reading(self) -> None:
        """Let the client wait with the rest of the body. What is on its way still comes: at most
        half a megabyte."""
        if self._res is not None and not (self._is_paused or self._body_ended):
            self._is_paused = True
            native.pause_reading(self._tls, self._res)

    def resume_reading(self) -> None:
        """Take more of the body again."""
        if self._is_paused and self._res is not None and self._wire is not None:
            self._is_paused = False
            native.resume_reading(self._tls, self._res, self._wire.loop, _SILENT_SECONDS)

    def body_came(self, data: bytes, last: bool) -> None:
        """For the transport."""
        self._body_ended = last
        if self._receiver is not None:
            self._receiver.received(data, last)
        else:
            self._early += data
            self.pause_reading()

    # The answer.

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer; does nothing when that was done or the client is gone.

        ``headers`` are further ones. Raises ``ValueError`` for one that holds the end of a line.
        """
        given = self._all_headers(content_type, headers)
        if self._source is not None:
            # An answer is under way: all that is left is to break it off.
            self.abort()
            return
        if self._res is None:
            return
        if len(body) > FRAGMENT_BYTES and self._wire is not None:
            self.stream(status, Whole(body), content_type, headers, length=len(body))
            return
        # A client that was refused may go on with what it was refused for.
        closes = status >= 400
        is_bare = self._is_head or status in _NO_BODY
        length = len(body) if self._is_head else None

        def write() -> None:
            tls, res, ends = self._tls, self._res, closes and self._body_ended
            self._write_head(status, given, length, closes=closes)
            if is_bare:
                native.lib.uws_res_end_without_body(tls, res, ends)
            else:
                native.lib.uws_res_end(tls, res, body, len(body), ends)

        self._answer_with(write, closes)

    def respond_json(self, status: int, body: bytes) -> None:
        """Answer with JSON text."""
        self.respond(status, body, "application/json")

    def stream(
        self,
        status: int,
        source: Source,
        content_type: str,
        headers: Mapping[str, str] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Answer with what ``source`` gives, of ``length`` bytes if that is known.

        A source that gives less, or is withdrawn, breaks the answer off, and the client notices.
        """
        given = self._all_headers(content_type, headers)
        if self._res is None or self._source is not None or self._wire is None:
            source.dropped()
            return
        if self._is_head or length == 0:
            source.dropped()

            def write_all() -> None:
                self._write_head(status, given, length)
                native.lib.uws_res_end_without_body(self._tls, self._res, False)

            self._answer_with(write_all, False)
            return
        self._source, self._length = source, length
        pointer = native.integer_pointer(self._number)
        native.lib.uws_res_on_writable(self._tls, self._res, self._wire.on_writable, pointer)
        native.corked_response(self._tls, self._res, lambda: self._write_head(status, given, None))
        self.pump()

    def pump(self) -> None:
        """Send what the source has, as far as the socket takes it."""
        self._is_posted = False
        budget = TURN_BYTES
        while self._source is not None and self._res is not None and not self._is_full:
            if self._rest is None:
                if budget <= 0:
                    self._go_on_later()
                    return
                pulled = self._source.pull()
                if pulled is Pull.NOT_READY:
                    # The client is not to blame for the silence.
                    native.limit_silence(self._tls, self._res, 0)
                    return
                if isinstance(pulled, Pull):
                    self.abort()
                    return
                chunk, self._is_last = pulled
                budget -= len(chunk)
                self._rest = memoryview(chunk)
            if self._length is None:
                self._write_chunk()
            else:
                self._write_part(self._length)

    def abort(self) -> None:
        """Break off: close the socket."""
        if self._res is not None:
            # Calls aborted().
            native.lib.uws_res_close(self._tls, self._res)

    def writable(self) -> bool:
        """For the transport: the socket has room again. Whether what was to be sent is."""
        self._is_full = False
        if self._wire is not None:
            self._wire.active(self._res)
        self.pump()
        return not self._is_full

    def aborted(self) -> None:
        """For the transport: the client went away."""
        self._answered()
        self._end(lambda source: source.dropped())

    def _go_on_later(self) -> None:
        if not self._is_posted and self._wire is not None:
            self._is_posted = True
            self._wire.post(self.pump)

    def _write_part(self, length: int) -> None:
        """Send what is left of a chunk of an answer whose length is known."""
        assert self._rest is not None
        rest = self._rest[: length - self._written]
        if not len(rest):
            # Less than was promised.
            self.abort()
            return
        res = self._res
        if len(rest) == length - self._written:
            self._leave_body(closes=False)
        result = native.lib.uws_res_try_end(
            self._tls, res, native.ffi.from_buffer(rest), len(rest), length, False
        )
        if result.has_responded:
            self._complete()
            return
        before = self._written
        self._written = int(native.lib.uws_res_get_write_offset(self._tls, res))
        rest = rest[self._written - before :]
        if len(rest):
            self._rest = rest
            self._fill()
        elif self._is_last:
            self.abort()
        else:
            self._rest = None

    def _write_chunk(self) -> None:
        assert self._rest is not None
        rest, self._rest = self._rest, None
        tls, res = self._tls, self._res
        has_room = True
        if len(rest):
            has_room = native.lib.uws_res_write(tls, res, native.ffi.from_buffer(rest), len(rest))
        if self._is_last:
            self._leave_body(closes=False)
            native.lib.uws_res_end(tls, res, b"", 0, False)
            self._complete()
        elif not has_room:
            self._fill()

    def _fill(self) -> None:
        self._is_full = True
        native.limit_silence(self._tls, self._res, _STALLED_SECONDS)

    def _complete(self) -> None:
        self._answered()
        self._end(lambda source: source.sent())

    def _end(self, tell: Callable[[Source], None]) -> None:
        source, self._source = self._source, None
        receiver, self._receiver = self._receiver, None
        self._rest = None
        self._early = bytearray()
        if source is not None:
            tell(source)
        if receiver is not None and not self._body_ended:
            receiver.dropped()

    def _answer_with(self, write: Callable[[], None], closes: bool) -> None:
        """Let ``write`` write all of the answer, in one call of the kernel."""
        self._leave_body(closes)
        native.corked_response(self._tls, self._res, write)
        self._answered()
        self._end(lambda source: source.dropped())

    def _leave_body(self, closes: bool) -> None:
        """The answer will be complete, and what comes of the body then is for nobody. Before it is:
        a client may have asked that the socket closes with it."""
        if self._body_ended or self._wire is None:
            return
        self.resume_reading()
        self._wire.refused(self._res, closes)

    def _answered(self) -> None:
        self._res = None
        if self._wire is not None:
            self._wire.forget(self._number)

    def _all_headers(self, content_type: str, headers: Mapping[str, str] | None) -> dict[str, str]:
        given = {"Content-Type": content_type, "Cache-Control": "no-store", **(headers or {})}
        for name, value in self._headers.items():
            # Vary is a list.
            given[name] = f"{given[name]}, {value}" if name in given else value
        check_headers(given)
        return given

    def _write_head(
        self, status: int, headers: Mapping[str, str], length: int | None, *, closes: bool = False
    ) -> None:
        """``length`` is that of a body that is not sent."""
        tls, res = self._tls, self._res
        shown = dict(headers)
        if status in _NO_BODY:
            del shown["Content-Type"]
        elif length is not None:
            shown["Content-Length"] = str(length)
        if closes and not self._body_ended:
            shown["Connection"] = "close"
        line = f"{status} {_REASONS.get(status, '')}".encode()
        native.lib.uws_res_write_status(tls, res, line, len(line))
        for name, value in shown.items():
            key, text = name.encode("latin-1"), value.encode("latin-1")
            native.lib.uws_res_write_header(tls, res, key, len(key), text, len(text))


class _Collected:
    """A body that is kept until it is complete."""

    def __init__(
        self, exchange: Exchange, limit: int, flag: str, then: Callable[[bytes], None]
    ) -> None:
        self._exchange = exchange
        self._limit = limit
        self._flag = flag
        self._then = then
        self._body = bytearray()

    def received(self, data: bytes, last: bool) -> None:
        if not self._exchange.is_open:
            return
        self._body += data
        if len(self._body) > self._limit:
            text = f"The body has more than {self._limit} bytes ({self._flag})."
            self._exchange.respond(413, text.encode())
        elif last:
            self._then(bytes(self._body))

    def dropped(self) -> None:
        self._body.clear()
