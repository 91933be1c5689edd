"""The feature through which plugins of others are reached."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, field
from typing import Any

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.errors import ServerError, StartupError
from sqlrooms_server.features import Feature, MessageHandler, Route
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.jobs import Lane
from sqlrooms_server.messages import PluginMessage, StreamAck, StreamData
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Client, Plugin, Stream
from sqlrooms_server.plugins.calls import Calls
from sqlrooms_server.plugins.host import Host
from sqlrooms_server.plugins.http import HttpCalls
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.plugins.streams import Streams
from sqlrooms_server.protocol.decode import BINARY_KINDS, TEXT_DECODERS
from sqlrooms_server.settings import Settings

log = logging.getLogger(__name__)

# For each plugin, when the server stops.
_STOP_SECONDS = 0.5
# For each, when it reads its files again; nobody waits for that but the next signal.
_RELOAD_SECONDS = 60.0


@dataclass
class _Guest:
    """A client, as far as plugins have been told of it."""

    # Of what they are told, so that it is in order.
    lane: Lane = field(default_factory=lambda: Lane(1))
    # Plugins that are being told that it came, and messages that wait for that.
    untold: int = 0
    waiting: list[PluginMessage | StreamData | StreamAck] = field(default_factory=list)


class Plugins(Feature):
    """A feature. ``all`` are the plugins, ``kinds`` the types of messages that they have.

    Raises ``StartupError``.
    """

    def __init__(
        self,
        plugins: Sequence[Plugin],
        host: Host,
        runner: Runner,
        prepare: Callable[[Cursor, Client], None],
    ) -> None:
        self.all = plugins
        self._host = host
        self._runner = runner
        self._prepare = prepare
        self._calls: Calls | None = None
        self._streams: Streams | None = None
        self._is_open = False
        self._guests: dict[Peer, _Guest] = {}
        self._of_kind: dict[str, tuple[Plugin, Callable[..., Any]]] = {}
        self._stream_of_kind: dict[str, Stream] = {}
        self._routes: list[Route] = []
        self._of_route: dict[tuple[str, str], Plugin] = {}
        self._begun: list[Plugin] = []
        http = HttpCalls(runner)
        for plugin in plugins:
            plugin.server = host
            for kind, function in plugin.handlers.items():
                self._add(kind, plugin, function)
            for stream, handler in _streams_of(plugin).items():
                self._add(stream.kind, plugin, handler)
                self._stream_of_kind[stream.kind] = stream
            for route in plugin.routes:
                self._add_route(plugin, route)
                self._routes.append(route if plugin.on_loop else http.route(plugin, route))
        self._openers = [plugin for plugin in plugins if _has(plugin, "opened")]
        self._closers = [plugin for plugin in plugins if _has(plugin, "closed")]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self._of_kind)

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {
            PluginMessage: self._message,
            StreamData: self._message,
            StreamAck: self._message,
        }

    @property
    def routes(self) -> Sequence[Route]:
        return self._routes

    def _add(self, kind: str, plugin: Plugin, function: Callable[..., Any]) -> None:
        if kind in TEXT_DECODERS or kind in BINARY_KINDS:
            raise StartupError(
                f"Plugin {plugin.name!r} has messages of type {kind!r}, which are those of the "
                "server itself; choose another name."
            )
        if kind in self._of_kind:
            other = self._of_kind[kind][0].name
            raise StartupError(
                f"The plugins {other!r} and {plugin.name!r} both have messages of type {kind!r}."
            )
        self._of_kind[kind] = plugin, function

    def _add_route(self, plugin: Plugin, route: Route) -> None:
        other = self._of_route.setdefault((route.method, route.path), plugin)
        if other is not plugin:
            raise StartupError(
                f"The plugins {other.name!r} and {plugin.name!r} both answer {route.method} "
                f"{route.path}."
            )

    def keep_from(self, routes: Iterable[Route]) -> None:
        """Raises ``StartupError`` for a plugin that has one of ``routes``, of the server itself."""
        for route in routes:
            plugin = self._of_route.get((route.method, route.path))
            if plugin is not None:
                raise StartupError(
                    f"Plugin {plugin.name!r} answers {route.method} {route.path}, which the server "
                    "itself does; choose another path."
                )

    def begin(self) -> None:
        """Before the database is open. Raises ``StartupError``."""
        for plugin in self.all:
            self._begun.append(plugin)
            self._phase(plugin, "starting")

    def open(self, engine: Engine, requests: Requests, settings: Settings) -> None:
        """The database is open. Raises ``StartupError``."""
        self._host.start(engine)
        for plugin in self.all:
            self._phase(plugin, "started")
        self._calls = Calls(
            *(engine, requests, self._runner, settings, self._prepare, self._host.resuming)
        )
        self._streams = Streams(engine, requests, self._runner, settings, self._prepare)

    def reload(self) -> None:
        """Tell those that have begun to read their files again."""
        for plugin in self._begun:
            try:
                self._runner.phase(plugin, "reload", _RELOAD_SECONDS)
            except BaseException:  # guard: the thread that called stops the server, too
                log.exception("Plugin %r failed on reload.", plugin.name)

    def end(self, phase: str) -> None:
        """Tell those that have begun that the server stops, or has stopped: the last one first."""
        for plugin in reversed(self._begun):
            try:
                self._runner.phase(plugin, phase, _STOP_SECONDS)
            except OutOfTime:
                log.warning(
                    "Plugin %r took longer than %g s on %s.", plugin.name, _STOP_SECONDS, phase
                )
            except BaseException:  # guard: a plugin must not keep the server from stopping
                log.exception("Plugin %r failed on %s.", plugin.name, phase)

    def _phase(self, plugin: Plugin, name: str) -> None:
        try:
            self._runner.phase(plugin, name)
        except StartupError:
            raise
        except Exception as error:  # guard: one line tells what failed, the log the rest
            log.debug("Plugin %r failed on %s.", plugin.name, name, exc_info=True)
            raise StartupError(
                f"Plugin {plugin.name!r} failed on {name}: {type(error).__name__}: {error}"
            ) from error

    def opened(self, peer: Peer) -> None:
        guest = self._guests[peer] = _Guest()
        if self._is_open:
            self._tell(self._openers, "opened", peer, guest)

    def admit(self) -> None:
        """Tell plugins, which have started now, of those who came before. For the loop thread."""
        self._is_open = True
        for peer, guest in list(self._guests.items()):
            self._tell(self._openers, "opened", peer, guest)

    def closed(self, peer: Peer) -> None:
        guest = self._guests.pop(peer, None)
        if guest is not None:
            guest.waiting.clear()
            self._tell(self._closers, "closed", peer, guest)
        if self._calls is not None:
            self._calls.closed(peer)
        if self._streams is not None:
            self._streams.closed(peer)

    def _tell(self, plugins: Sequence[Plugin], event: str, peer: Peer, guest: _Guest) -> None:
        client = Client(peer, self._runner.post)
        for plugin in plugins:
            function = getattr(plugin, event)
            if plugin.on_loop:
                function(peer)
                continue
            guest.untold += 1

            def told(_: Any, error: ServerError | None) -> None:
                self._told(event, peer, guest, error)

            self._runner.begin(plugin, event, function, client, then=told, lane=guest.lane)

    def _told(self, event: str, peer: Peer, guest: _Guest, error: ServerError | None) -> None:
        if error is not None:
            log.warning("Of a client that was %s: %s", event, error)
        guest.untold -= 1
        if not guest.untold:
            waiting, guest.waiting = guest.waiting, []
            for message in waiting:
                try:
                    self._message(peer, message)
                except ServerError as refused:
                    peer.send_error(refused)

    def _message(self, peer: Peer, message: PluginMessage | StreamData | StreamAck) -> None:
        guest = self._guests.get(peer)
        if guest is None:
            return
        if guest.untold:
            guest.waiting.append(message)
            return
        assert self._calls is not None and self._streams is not None
        if isinstance(message, StreamData):
            self._streams.data(peer, message)
            return
        if isinstance(message, StreamAck):
            self._streams.acknowledge(peer, message)
            return
        plugin, function = self._of_kind[message.kind]
        stream = self._stream_of_kind.get(message.kind)
        if stream is not None:
            self._streams.begin(plugin, stream, function, peer, message)
        elif plugin.on_loop:
            function(peer, message)
        else:
            self._calls.begin(plugin, function, peer, message)


def _streams_of(plugin: Plugin) -> Mapping[Stream, Callable[..., Any]]:
    try:
        return plugin.streams
    except ValueError as error:
        raise StartupError(f"Plugin {plugin.name!r}: {error}") from error


def _has(plugin: Plugin, event: str) -> bool:
    """Whether ``plugin`` wants to be told of ``event``."""
    function = getattr(plugin, event)
    return inspect.unwrap(getattr(function, "__func__", function)) not in (
        getattr(Plugin, event),
        getattr(Feature, event),
    )
