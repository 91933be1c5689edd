"""The hooks: where a plugin can take part in what the server does for others.

Each is a method to override, or a function with its name given to :meth:`Plugin.hook`. Those of
several plugins are called in the order in which the plugins were given. What they raise ends the
request that they were called for, and nothing else: a :class:`ServerError` is what the client is
told, anything else is ``internal`` with the name of the plugin, and in the log.

``authenticate`` and ``authorize`` may be ``async def``. Others run on the worker of the query,
which waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlrooms_server.access import Identity
from sqlrooms_server.plugin.client import Client
from sqlrooms_server.plugin.values import Action, Credentials, Outcome, Query

Run = Callable[[Query], Any]


class Hooks:
    """What each hook is told, and what comes of what it returns."""

    def authenticate(self, credentials: Credentials) -> Identity | None:
        """Who presents ``credentials``; None when this plugin does not know.

        Asked for each WebSocket, each ``auth`` message and each HTTP request that carries nothing
        the server itself knows, until a plugin answers; then everybody needs to be known by
        somebody. Raise :class:`Unauthorized` to refuse without asking the others.
        """
        return None

    def authorize(self, client: Client, action: Action) -> None:
        """Raise :class:`Forbidden` when ``client`` may not do ``action``.

        Asked before each request is carried out, beyond what its role says. Messages of a client
        wait for the answers to those before them.
        """

    def prepare_cursor(self, cursor: Any, client: Client) -> None:
        """Set up ``cursor``, the ``duckdb.DuckDBPyConnection`` of one query, before that runs.

        Such as variables, ``USE``, or tables of Arrow data. The cursor of a session is set up when
        the session begins. What is changed in the database here is not announced to anybody.
        """

    def around_query(self, query: Query, run: Run) -> Any:
        """Return what ``run(query)`` returns, or something else instead.

        An interceptor: it may ask with another text (``query.replace(sql=…)``), try again, measure,
        or answer from elsewhere. Each is called once for each call of ``run`` by the one before it,
        so exactly once when nobody tries again. ``run`` returns a :class:`Result`, whose rows have
        not been read yet, or None when there is nothing to tell; an Arrow or pandas table may be
        returned in its place. What it runs is checked by the rules for the client, as always.
        """
        return run(query)

    def query_done(self, query: Query, outcome: Outcome) -> None:
        """``query`` has been answered, and will not be again. On a thread of its own, in order."""


HOOKS = ("authenticate", "authorize", "prepare_cursor", "around_query", "query_done")
