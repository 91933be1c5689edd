"""The error tree. Every error that can reach a client carries the wire ``code`` of its kind.

``str(error)`` is the text a person reads; ``code`` is for programs. The list of codes is
part of the protocol, see ``docs/protocol.md``.
"""

from __future__ import annotations

from typing import ClassVar

QueryId = str | int


class StartupError(Exception):
    """The server cannot start. The text is one line: what failed, why, and what to do."""


class ServerError(Exception):
    """Base of the errors a client is told about.

    ``query_id`` is the id of the request that failed, as far as the sender knows it, ``channel``
    the channel that it is about, ``room`` the room.
    """

    code: ClassVar[str] = "internal"
    channel: str | None = None
    room: str | None = None

    def __init__(self, message: str, query_id: QueryId | None = None) -> None:
        super().__init__(message)
        self.query_id = query_id


class BadRequest(ServerError):
    """The message is malformed; the text names the field and what it should be."""

    code = "bad_request"


class Unauthorized(ServerError):
    """No token, or a wrong one."""

    code = "unauthorized"


class Forbidden(ServerError):
    """The client may not do that; the text says what, and which rule forbids it."""

    code = "forbidden"


class QueryError(ServerError):
    """DuckDB refused or failed the statement; the text is DuckDB's own."""

    code = "query_error"


class Cancelled(ServerError):
    """The client cancelled the query, or went away."""

    code = "cancelled"


class Timeout(ServerError):
    """A deadline passed; the text says which and how to raise it."""

    code = "timeout"


class NotFound(ServerError):
    """No such thing."""

    code = "not_found"


class Gone(ServerError):
    """What the message speaks of has ended."""

    code = "gone"


class Busy(ServerError):
    """A queue or a per-connection limit is full; the text says which and how to raise it."""

    code = "busy"


class TooLarge(ServerError):
    """A message or a part of it is over its limit; the text says which and how to raise it."""

    code = "too_large"


class Conflict(ServerError):
    """The query id is in use, or a concurrent transaction won."""

    code = "conflict"


class ShuttingDown(ServerError):
    """The server is stopping and takes or finishes no more work."""

    code = "shutting_down"


class InternalError(ServerError):
    """A defect of the server; details are in its log."""

    code = "internal"
