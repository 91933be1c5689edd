"""What a plugin is: the one interface of everything that clients can ask for.

The features of the server are plugins that live on its loop, see :mod:`sqlrooms_server.features`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sqlrooms_server.plugin.client import Client
from sqlrooms_server.plugin.hooks import HOOKS, Hooks
from sqlrooms_server.plugin.objects import ObjectConnection, ObjectStream, ObjectType, as_type
from sqlrooms_server.plugin.streams import Stream, check_handler, stream_of
from sqlrooms_server.plugin.values import Action, Credentials, Outcome, Query, Response

__all__ = [
    "HOOKS",
    "Action",
    "Client",
    "Credentials",
    "ObjectConnection",
    "ObjectStream",
    "ObjectType",
    "Outcome",
    "Plugin",
    "Query",
    "Response",
    "Route",
    "Stream",
    "on",
    "route",
    "stream",
]

_F = TypeVar("_F", bound=Callable[..., Any])
# Where decorators of methods leave what they were told.
_MARK = "_sqlrooms_marks"


@dataclass(frozen=True, slots=True)
class Route:
    """What answers an HTTP request.

    A ``path`` that ends in ``/`` stands for everything below it; of several, the longest answers,
    and one that ``is_fallback`` only where there is no other. GET answers HEAD, too. Unless it
    ``is_public``, the request must come from an origin and a host that may connect, with a token if
    one is needed. With ``streams_body``, it takes the body as it comes, however long it is.

    ``answer`` of a plugin on the loop is called with the request, the exchange, and who sent it,
    None for a stranger. That of others is called with an :class:`plugins.http.HttpCall`, and
    returns a :class:`Response`, or its body.
    """

    method: str
    path: str
    answer: Callable[..., Any]
    is_public: bool = False
    streams_body: bool = False
    is_fallback: bool = False


class Plugin(Hooks):
    """Something that clients can ask for, or that takes part in what others do.

    Use one and its decorators, or derive from it and override what is needed. Functions are called
    on a thread for plugins, those that are ``async def`` on the loop of asyncio; neither may be
    relied on to be the only one that runs. :attr:`server` is what they can ask of the server, see
    :class:`plugins.host.Host`, and ``options`` what the configuration says of the plugin.
    """

    # Whether everything is called on the thread of the sockets instead, and never blocks it.
    on_loop: ClassVar[bool] = False
    # Whether ``prepare_cursor`` and ``around_query`` leave results as they are, as what takes times
    # or tries again does. While another plugin has one of them, results are neither kept nor
    # shared, since they may depend on who asks.
    is_transparent: bool = False

    name: str = ""
    server: Any = None
    options: Mapping[str, Any] = {}

    def __init__(self, name: str = "") -> None:
        self.name = name or self.name or type(self).__name__

    # What clients can ask for.

    @property
    def handlers(self) -> Mapping[Any, Callable[..., Any]]:
        """What to do with messages, by their type; on the loop, by their class."""
        return {**_marked(self, "on"), **self._registered("on")}

    @property
    def routes(self) -> Sequence[Route]:
        """The HTTP requests that it answers."""
        found = {**_marked(self, "route"), **self._registered("route")}
        return [
            Route(method, path, answer, is_public, streams_body)
            for (method, path, is_public, streams_body), answer in found.items()
        ]

    @property
    def streams(self) -> Mapping[Stream, Callable[..., Any]]:
        """What handles its streams of batches. Raises ``ValueError``."""
        found = {**_marked(self, "stream"), **self._registered("stream")}
        for stream, handler in found.items():
            check_handler(stream, handler)
        return found

    def on(self, kind: str) -> Callable[[_F], _F]:
        """Decorate what answers messages of the type ``kind``; see :class:`plugins.calls.Call`."""
        return self._registering("on", _kind(kind))

    def route(
        self, method: str, path: str, *, is_public: bool = False, streams_body: bool = False
    ) -> Callable[[_F], _F]:
        """Decorate what answers HTTP requests; see :class:`Route`."""
        return self._registering("route", _route_key(method, path, is_public, streams_body))

    def stream(
        self, kind: str, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> Callable[[_F], _F]:
        """Decorate what handles streams of the type ``kind``: a class, whose objects each handle
        one, or an async function. See :class:`plugins.stream_calls.StreamCall`."""
        return self._registering("stream", stream_of(kind, inputs, outputs))

    def hook(self, function: _F) -> _F:
        """Decorate a function that has the name of a hook, see :mod:`plugin.hooks`, or of a phase
        or event of this class."""
        name = function.__name__
        if name not in (*HOOKS, *_EVENTS):
            known = ", ".join((*HOOKS, *_EVENTS))
            raise ValueError(f"Plugin {self.name!r}: there is no hook {name!r}; known are {known}.")
        setattr(self, name, function)
        return function

    # Objects that clients use.

    # Types that the plugin brings, see :class:`ObjectType`: made ones, or classes.
    object_types: Sequence[Any] = ()

    def object_type(self, given: _F) -> _F:
        """Decorate a class of :class:`ObjectType`, or register one that is made."""
        self.object_types = [*self.object_types, as_type(given)]
        return given

    # The phases of its life, in this order.

    def starting(self) -> Any:
        """The server is being started; the database is not open yet."""

    def started(self) -> Any:
        """The database is open, and no message has been handled yet."""

    def reload(self) -> Any:
        """The server was told to read its files again (SIGHUP)."""

    def stopping(self) -> Any:
        """Nobody can connect any more; what is under way ends now. The database is still open."""

    def stopped(self) -> Any:
        """Nobody is connected any more. The database is closed next."""

    # Clients. On the loop they are peers.

    def opened(self, client: Any) -> Any:
        """Somebody came, and may come. Before any message of that one."""

    def closed(self, client: Any) -> Any:
        """Somebody who had come left. After everything else about that one."""

    def _registered(self, what: str) -> dict[Any, Callable[..., Any]]:
        # Not in __init__, which not every plugin calls.
        registered: dict[Any, Callable[..., Any]] = vars(self).setdefault(f"_{what}", {})
        return registered

    def _registering(self, what: str, key: Any) -> Callable[[_F], _F]:
        def register(function: _F) -> _F:
            registered = self._registered(what)
            if key in registered:
                raise ValueError(f"Plugin {self.name!r} has two functions for {key!r}.")
            registered[key] = function
            return function

        return register


_EVENTS = ("starting", "started", "reload", "stopping", "stopped", "opened", "closed")


def on(kind: str) -> Callable[[_F], _F]:
    """Decorate a method of a plugin as :meth:`Plugin.on` does a function."""
    return _marking("on", _kind(kind))


def route(
    method: str, path: str, *, is_public: bool = False, streams_body: bool = False
) -> Callable[[_F], _F]:
    """Decorate a method of a plugin as :meth:`Plugin.route` does a function."""
    return _marking("route", _route_key(method, path, is_public, streams_body))


def stream(
    kind: str, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> Callable[[_F], _F]:
    """Decorate a class in a plugin, or a method of it, as :meth:`Plugin.stream` does others."""
    return _marking("stream", stream_of(kind, inputs, outputs))


def _kind(kind: Any) -> str:
    if not isinstance(kind, str) or not kind:
        raise ValueError('The type of a message is missing: write @plugin.on("type").')
    return kind


def _route_key(
    method: str, path: str, is_public: bool, streams_body: bool
) -> tuple[str, str, bool, bool]:
    if not method.isalpha() or not path.startswith("/"):
        raise ValueError(
            f'A route is a method and a path that begins with /, as in route("GET", "/hello"), not '
            f"{method!r} and {path!r}."
        )
    return method.upper(), path, is_public, streams_body


def _marking(what: str, key: Any) -> Callable[[_F], _F]:
    def mark(function: _F) -> _F:
        marks = [*getattr(function, _MARK, ()), (what, key)]
        setattr(function, _MARK, marks)
        return function

    return mark


def _marked(plugin: Plugin, what: str) -> dict[Any, Callable[..., Any]]:
    """The methods of ``plugin`` that were decorated."""
    found: dict[Any, Callable[..., Any]] = {}
    for name in dir(type(plugin)):
        for kind, key in getattr(getattr(type(plugin), name, None), _MARK, ()):
            if kind == what:
                if key in found:
                    raise ValueError(f"Plugin {plugin.name!r} has two functions for {key!r}.")
                found[key] = getattr(plugin, name)
    return found
