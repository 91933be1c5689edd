"""The hooks of all plugins, one after the other."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sqlrooms_server.db.batches import Result
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.statements import Classifier
from sqlrooms_server.db.values import is_table
from sqlrooms_server.errors import InternalError, ServerError, StartupError
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.plugin.client import Client
from sqlrooms_server.plugin.hooks import HOOKS, Hooks, Run
from sqlrooms_server.plugin.values import Query

log = logging.getLogger(__name__)

# These may wait for others; the worker of a query does nothing else meanwhile.
_MAY_BE_ASYNC = ("authenticate", "authorize")

Hook = tuple[Plugin, Callable[..., Any]]


class Chain:
    """For each hook, the plugins that have it, in their order. Raises ``StartupError``.

    ``takes_part``: whether there is one that queries go through. ``is_personal``: whether what a
    query returns may depend on who asks, so that it is neither kept nor shared.
    """

    def __init__(self, plugins: Sequence[Plugin] = ()) -> None:
        hooks = {name: tuple(_of(plugins, name)) for name in HOOKS}
        self.authenticate = hooks["authenticate"]
        self.authorize = hooks["authorize"]
        self.prepare_cursor = hooks["prepare_cursor"]
        self.around_query = hooks["around_query"]
        self.query_done = hooks["query_done"]
        for name in HOOKS:
            for plugin, hook in hooks[name]:
                if name not in _MAY_BE_ASYNC and inspect.iscoroutinefunction(hook):
                    raise StartupError(
                        f"{name} of plugin {plugin.name!r} must be a plain function; only "
                        f"{' and '.join(_MAY_BE_ASYNC)} may be async."
                    )
        taking_part = (*self.prepare_cursor, *self.around_query)
        self.takes_part = bool(taking_part)
        self.is_personal = any(not plugin.is_transparent for plugin, _ in taking_part)
        # Of cursors that these plugins prepare.
        self._classifier: Classifier | None = None
        self._interceptors = tuple(reversed(self.around_query))

    def prepare(self, cursor: Cursor, client: Client) -> None:
        """Let plugins set up ``cursor``, for a query of ``client``."""
        if self.prepare_cursor:
            cursor.prepare(lambda native: self._prepare(native, client), self._classifier_of)

    def _classifier_of(self, engine: Engine) -> Classifier:
        # Apps that share an engine have plugins of their own.
        if self._classifier is None:
            self._classifier = engine.new_classifier()
        return self._classifier

    def _prepare(self, native: Any, client: Client) -> None:
        for plugin, hook in self.prepare_cursor:
            try:
                hook(native, client)
            except BaseException as error:  # guard: a plugin must fail alone
                raise failure(plugin, "prepare_cursor", error) from error

    def run(self, query: Query, run: Run) -> Any:
        """What the first interceptor makes of ``query``, the last of which asks ``run``: a result
        that can be read, a table, or None."""
        for plugin, hook in self._interceptors:
            run = _around(plugin, hook, run)
        return run(query)


def _around(plugin: Plugin, hook: Callable[[Query, Run], Any], run: Run) -> Run:
    def call(query: Query) -> Any:
        try:
            value = hook(query, run)
        except BaseException as error:  # guard: a plugin must fail alone
            raise failure(plugin, "around_query", error) from error
        if isinstance(value, Result):
            if value.is_lost:
                _refuse(plugin, "a result that ended when it ran something else; keep its table()")
        elif value is not None and not is_table(value):
            _refuse(plugin, f"a {type(value).__name__}, which is neither a result nor a table")
        return value

    return call


def _refuse(plugin: Plugin, what: str) -> None:
    text = f"around_query of plugin {plugin.name!r} returned {what}."
    log.error("%s", text)
    raise InternalError(text)


def failure(plugin: Plugin, what: str, error: BaseException) -> ServerError:
    """What a client is told about ``error`` of ``plugin``; the log gets all of it."""
    if isinstance(error, ServerError):
        return error
    log.error("Plugin %r failed on %s.", plugin.name, what, exc_info=error)
    return InternalError(
        f"Plugin {plugin.name!r} failed on {what} ({type(error).__name__}); the log of the server "
        "tells more."
    )


def _of(plugins: Sequence[Plugin], name: str) -> list[Hook]:
    """The hooks ``name`` that are not those of the base class."""
    found = []
    for plugin in plugins:
        hook = getattr(plugin, name)
        if getattr(hook, "__func__", hook) is not getattr(Hooks, name):
            found.append((plugin, hook))
    return found
