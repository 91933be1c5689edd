"""The hooks: where a plugin can take part in what the server does for others.

Each is a method to override, or a function with its name given to :meth:`Plugin.hook`. Those of
several plugins are called in the order in which the plugins were given. What they raise ends the
request that they were called for, and nothing else: a :class:`ServerError` is what the client is
told, anything else is ``internal`` with the name of the plugin, and in the log.

``authenticate`` and ``authorize`` may be ``async def``, and have ``--plugin-timeout`` seconds.
``prepare_cursor`` and ``around_query`` run on the worker of the query, which waits for them.
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

        With a plugin that has it, everybody needs to be known. Plugins are asked about each
        WebSocket, each ``auth`` message and each HTTP request that carries nothing the server
        itself knows, until one of them knows it. Raise :class:`Unauthorized` to refuse without
        asking the others. Nobody is asked about requests for public routes.
        """
        return None

    def authorize(self, client: Client, action: Action) -> None:
        """Raise :class:`Forbidden` when ``client`` may not do ``action``.

        Asked before each message and each HTTP request is carried out, in addition to what the role
        says. Messages of a client wait for the answers to those before them. Nobody is asked about
        ``auth``, ``hello``, ``ack``, ``cancel``, chunks of an upload after the first, what belongs
        to a stream or an object that is open, updates and presence in a room whose join was
        allowed, and public routes.
        """

    def prepare_cursor(self, cursor: Any, client: Client) -> None:
        """Set up ``cursor``, the ``duckdb.DuckDBPyConnection`` of one query, before that runs.

        Such as variables, ``USE``, temporary tables and views. The cursor of a session is set up
        when the session begins; that of ``call.query`` of a plugin is, too. What is changed in the
        database here is not announced to anybody, and no transaction may be left open.
        """

    def around_query(self, query: Query, run: Run) -> Any:
        """Return what ``run(query)`` returns, or something else instead.

        An interceptor: it may ask with another text (``query.replace(sql=…)``), try again, measure,
        or answer from elsewhere. Each is called once for each call of ``run`` by the one before it,
        so exactly once when nobody tries again. ``run`` returns a result, whose rows have not been
        read yet (``result.table()`` reads them all), or None when there is nothing to tell. Such a
        result, None, or a table of Arrow, pandas or polars may be returned. ``run`` raises
        :class:`QueryError`, :class:`Conflict` and others; what it runs is checked by the rules for
        the client, as always.
        """
        return run(query)

    def query_done(self, query: Query, outcome: Outcome) -> None:
        """``query`` has been answered, and will not be again; a live one has ended.

        Called once for each that came, also for those that were refused. On a thread of its own, in
        order.
        """


HOOKS = ("authenticate", "authorize", "prepare_cursor", "around_query", "query_done")
