"""What plugins are handed, and may hand back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlrooms_server.errors import QueryId, ServerError
from sqlrooms_server.messages import Message, Params
from sqlrooms_server.plugin.client import Client
from sqlrooms_server.transport import HttpRequest


@dataclass(frozen=True, slots=True)
class Credentials:
    """What somebody presents: ``request`` is the upgrade, or the HTTP request.

    ``token`` is that of an ``auth`` message, of ``Authorization: Bearer``, ``?token=`` or the
    cookie; None without one. Names of ``request.headers`` are lower case.
    """

    request: HttpRequest
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """What a client wants to do.

    ``kind`` is the type of its message (``arrow``, ``json``, ``exec``, ``live``, ``uploadArrow``,
    ``subscribe``, ``notify``, ``crdt-join``, that of a plugin, …), or ``http``. ``resource`` is
    what it is about: the SQL, the name of the table, channel, room or object; of HTTP,
    ``GET /path``. ``message`` is the decoded message, of :mod:`sqlrooms_server.messages`, if there
    is one.
    """

    kind: str
    resource: str
    message: Message | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """SQL that a client asks for. ``kind`` is ``arrow``, ``json``, ``exec`` or ``live``."""

    sql: str
    params: Params | None
    kind: str
    query_id: QueryId
    client: Client

    def replace(self, *, sql: str | None = None, params: Params | None = None) -> Query:
        """The same with another text, or other parameters."""
        return dataclasses.replace(
            self,
            sql=self.sql if sql is None else sql,
            params=self.params if params is None else params,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a query. Times are in seconds.

    ``rows`` and ``bytes`` are those of the reply, None where nobody counted. ``error`` is what the
    client was told, None when it got its result.
    """

    error: ServerError | None
    queued: float
    running: float
    total: float
    rows: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to an HTTP request. ``body`` may be a text, bytes, a JSON value, or an iterator of
    bytes, plain or asynchronous, which is asked for more as the client reads.

    Without a ``content_type`` it is that of the body. ``length`` is that of all that an iterator
    gives, if it is known; the client then notices when less comes.
    """

    body: Any = b""
    status: int = 200
    content_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
