"""What the client raises."""

from __future__ import annotations


class ConnectionLost(ConnectionError):
    """The server left, is not to be reached again, or sent what is no reply."""


class RequestFailed(Exception):
    """The server answered with an error: its text, and ``code`` for programs.

    The codes are those of docs/protocol.md, such as ``query_error`` or ``cancelled``.
    """

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class QueryTimeout(RequestFailed):
    """The query took longer than its ``timeout``, or than a limit of the server."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "timeout")


class SessionEnded(RequestFailed):
    """The session ended, by itself or with its connection; its transaction was rolled back."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "gone")


def request_failed(text: str, code: str) -> RequestFailed:
    """The exception for an error of the server."""
    if code == "timeout":
        return QueryTimeout(text)
    if code == "gone":
        return SessionEnded(text)
    return RequestFailed(text, code)
