"""``--queries``: queries that clients ask for by their names."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlrooms_server.access.roles import Role
from sqlrooms_server.builtin.http_queries import HttpPeer, HttpQueries
from sqlrooms_server.builtin.query_files import NamedQuery, Parameter, read_queries
from sqlrooms_server.errors import BadRequest, Forbidden, NotFound, ServerError, StartupError
from sqlrooms_server.features import Feature, Route
from sqlrooms_server.messages import PluginMessage, Query
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode_reply
from sqlrooms_server.protocol.queries import named_query
from sqlrooms_server.settings import Settings

log = logging.getLogger(__name__)

_IN_ERRORS = 10


class NamedQueries(Feature):
    """Messages and HTTP requests that name a query, made into those with its SQL."""

    name = "queries"

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._queries: Mapping[str, NamedQuery] = {}
        self._http = HttpQueries(self, settings)

    @property
    def handlers(self) -> Mapping[Any, Callable[[Peer, PluginMessage], None]]:
        return {"named": self._run, "namedQueries": self._list}

    @property
    def routes(self) -> Sequence[Route]:
        return self._http.routes

    def started(self) -> None:
        found = read_queries(
            self._settings.queries, self.server.engine, self._settings.max_sql_length
        )
        if found.bad:
            first, *others = found.bad.values()
            more = f" There are mistakes in {len(others)} more files." if others else ""
            raise StartupError(f"--queries: {first}.{more}")
        for line in found.warnings.values():
            log.warning(
                "The columns of a query are not known; once its tables are there, SIGHUP reads "
                "them: %s",
                line,
            )
        self._queries = found.queries

    def reload(self) -> None:
        """Read the files again. Of one that is wrong now, what was read before holds."""
        try:
            found = read_queries(
                self._settings.queries, self.server.engine, self._settings.max_sql_length
            )
        except (StartupError, ServerError) as error:
            log.error("The queries stay as they were. %s", error)
            return
        before = self._queries
        for name, line in found.bad.items():
            fate = "stays as it was" if name in before else "is left out"
            log.error("The query %s %s. %s.", name, fate, line)
        kept = {name: before[name] for name in found.bad if name in before}
        # In one step: the loop thread looks at one or the other.
        self._queries = {**found.queries, **kept}
        log.info("Read %d queries again.", len(self._queries))

    def listed(self, role: Role) -> list[dict[str, Any]]:
        """What clients are told of the queries that ``role`` may run."""
        return [
            _described(query)
            for name, query in sorted(self._queries.items())
            if role.queries is None or name in role.queries
        ]

    def find(self, name: object, role: Role) -> NamedQuery:
        """The query ``name``. Raises ``BadRequest``, ``NotFound`` or ``Forbidden``."""
        if not isinstance(name, str):
            raise BadRequest("named needs a field name, a string.")
        queries = self._queries
        if role.queries is not None and name not in role.queries:
            raise Forbidden(
                f"The role {role.name!r} may not run the query {name[:100]!r} (queries)."
            )
        if name in queries:
            return queries[name]
        allowed = [one for one in queries if role.queries is None or one in role.queries]
        near = difflib.get_close_matches(name[:100], allowed, 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise NotFound(f"There is no query {name[:100]!r}{hint}.")

    def submit(self, peer: Peer, query: NamedQuery, asked: Query) -> None:
        """Run ``query`` as ``asked``, whose parameters are those of the client, would be run."""
        params = asked.options.params
        if params is not None and not isinstance(params, dict):
            raise BadRequest("params of a named query must be an object.")
        is_trusted = peer.role.queries is not None
        if is_trusted and asked.options.session is not None:
            # What the client made there might stand before what the file means.
            raise BadRequest(
                f"session is not for named queries of the role {peer.role.name!r}, which may do "
                "more than the SQL of that role."
            )
        values = {**_given(query, params or {}), **_injected(query, peer)}
        options = dataclasses.replace(asked.options, params=values or None)
        self.server.perform(
            peer,
            dataclasses.replace(asked, sql=query.sql, options=options, is_trusted=is_trusted),
        )

    def _run(self, peer: Peer, message: PluginMessage) -> None:
        try:
            if message.body is not None:
                raise BadRequest("named is a text message.")
            query = self.find(message.fields.get("name"), peer.role)
            asked = named_query(message, query.sql)
            options = dataclasses.replace(asked.options, size=message.size)
            self.submit(peer, query, dataclasses.replace(asked, options=options))
        except ServerError as error:
            error.query_id = message.query_id
            raise

    def _list(self, peer: Peer, message: PluginMessage) -> None:
        answer = self.listed(peer.role)
        peer.send(encode_reply("namedQueries", message.query_id, queries=answer))


def _given(query: NamedQuery, params: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all parameters of clients. Raises ``BadRequest``."""
    given: dict[str, Any] = {}
    for name, value in params.items():
        key = name.lower()
        if key in query.injected:
            raise BadRequest(f"params.{name[:100]} is set by the server, and by nobody else.")
        if key not in query.parameters:
            raise BadRequest(f"params has {name[:100]!a}, but {_wants(query)}.")
        if key in given:
            raise BadRequest(f"params has {name[:100]!r} twice, in upper and lower case.")
        given[key] = value
    values = {}
    for key, parameter in query.parameters.items():
        if key not in given and parameter.is_required:
            raise BadRequest(f"params has no value for {parameter.name}; {_wants(query)}.")
        value = given.get(key, parameter.default)
        if value is None and parameter.default is not None:
            raise BadRequest(
                f"params.{parameter.name} must be {parameter.type_name}, not null: only a "
                "parameter whose default is NULL can be that."
            )
        values[parameter.name] = parameter.value(value)
    return values


def _injected(query: NamedQuery, peer: Peer) -> dict[str, str]:
    """The values that the server knows. Raises ``Forbidden`` for one that it does not."""
    identity = peer.identity
    known = {
        "user": identity.user if identity is not None else "",
        "role": peer.role.name,
        "connection": "" if isinstance(peer, HttpPeer) else peer.id,
    }
    values = {name: known[name] for name in query.injected}
    for name, value in values.items():
        if not value:
            what = (
                "come with a token that says who you are (--tokens)"
                if name == "user"
                else "ask for it over a WebSocket"
            )
            raise Forbidden(f"The query {query.name!r} uses ${name}: {what}.")
    return values


def _wants(query: NamedQuery) -> str:
    if not query.parameters:
        return f"the query {query.name!r} has no parameters"
    parameters = list(query.parameters.values())
    listed = ", ".join(f"{one.name} {one.type_name}" for one in parameters[:_IN_ERRORS])
    more = ", …" if len(parameters) > _IN_ERRORS else ""
    return f"the query {query.name!r} has {listed}{more}"


def _described(query: NamedQuery) -> dict[str, Any]:
    columns = None
    if query.columns is not None:
        columns = [{"name": one.name, "type": str(one.type)} for one in query.columns]
    return {
        "name": query.name,
        "description": query.description,
        "params": [_parameter(one) for one in query.parameters.values()],
        "columns": columns,
    }


def _parameter(parameter: Parameter) -> dict[str, Any]:
    described = {
        "name": parameter.name,
        "type": str(parameter.type),
        "description": parameter.description,
        "required": parameter.is_required,
    }
    return described if parameter.is_required else {**described, "default": parameter.default}
