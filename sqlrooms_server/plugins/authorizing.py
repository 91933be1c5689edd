"""Asking plugins whether somebody may do something, before it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from sqlrooms_server.access import Identity
from sqlrooms_server.errors import Busy, Cancelled, QueryId, ServerError
from sqlrooms_server.messages import (
    OF_OPEN_OBJECTS,
    Ack,
    Auth,
    CacheStats,
    Cancel,
    CloseSession,
    Hello,
    Live,
    Message,
    Notify,
    PluginMessage,
    Presence,
    Query,
    RoomJoin,
    RoomLeave,
    RoomPresence,
    RoomSnapshot,
    RoomUpdate,
    StreamAck,
    StreamData,
    Subscribe,
    Unsubscribe,
    Unwatch,
    Upload,
    UploadChunk,
    Watch,
)
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Action, Client
from sqlrooms_server.plugin.chain import Hook
from sqlrooms_server.plugins.runner import Runner, Running
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import HttpRequest

# What a message waits in memory costs besides its bytes.
_ENTRY_BYTES = 200

_CHANNELS = "/channels/"

# Every class of messages stands in one of these three, as a test knows.

# What plugins are asked: the kind and the resource of each.
ASKED: Mapping[type, Callable[[Any], tuple[str, str]]] = {
    Query: lambda message: (message.kind, message.sql),
    Live: lambda message: ("live", message.sql),
    CloseSession: lambda message: ("closeSession", message.session),
    Watch: lambda message: ("watch", _tables(message)),
    Unwatch: lambda message: ("unwatch", ""),
    CacheStats: lambda message: ("cacheStats", ""),
    Subscribe: lambda message: ("subscribe", message.channel),
    Unsubscribe: lambda message: ("unsubscribe", message.channel),
    Notify: lambda message: ("notify", message.channel),
    Presence: lambda message: ("presence", message.channel),
    Upload: lambda message: ("uploadArrow", ".".join(message.table)),
    # The first one; the others follow it, or go to what it has begun.
    UploadChunk: lambda message: ("uploadArrow", ".".join(message.table)),
    RoomJoin: lambda message: ("crdt-join", message.room),
    RoomLeave: lambda message: ("crdt-leave", message.room),
    RoomSnapshot: lambda message: ("crdt-snapshot", message.room),
    PluginMessage: lambda message: (message.kind, _object(message)),
}

# Handled in their turn without a question: what says nothing but a name, and what only members of
# a room can say, whose join was allowed.
IN_TURN = (Hello, RoomUpdate, RoomPresence)

# Handled at once: they are about what was allowed before, and must not wait behind it.
AT_ONCE = (Auth, Cancel, Ack, StreamAck, StreamData)

_CANCELLABLE = (Query, Live, Upload, UploadChunk, PluginMessage)


def action_of(message: Message) -> Action | None:
    """What the sender of ``message`` wants to do; None for what nobody is asked about."""
    if isinstance(message, PluginMessage) and message.kind in OF_OPEN_OBJECTS:
        return None
    question = ASKED.get(type(message))
    return None if question is None else Action(*question(message), message)


def http_action(request: HttpRequest) -> Action:
    """What whoever sent ``request`` wants to do: to publish is the same over HTTP."""
    if request.method == "POST" and request.path.startswith(_CHANNELS):
        return Action("notify", unquote(request.path.removeprefix(_CHANNELS)))
    # HEAD is a GET of which the body is not sent.
    method = "GET" if request.method == "HEAD" else request.method
    # As routes read it: %6e is the letter n to them.
    return Action("http", f"{method} {unquote(request.path)}")


# Where messages of what is built in say what they are about.
_NAMES = {"named": "name", "object": "object", "files": "path"}


def _object(message: PluginMessage) -> str:
    """The name of the object or query, or the path of the file, that a message is about; of a
    reference, nothing."""
    field = _NAMES.get(message.kind.partition("-")[0])
    name = None if field is None else message.fields.get(field)
    return name if isinstance(name, str) else ""


def _tables(watch: Watch) -> str:
    return "*" if watch.tables is None else ", ".join(".".join(table) for table in watch.tables)


@dataclass(eq=False)
class _Entry:
    """A message that waits, and the chunks of an upload that it begins."""

    message: Message
    size: int
    chunks: list[UploadChunk] = field(default_factory=list)


@dataclass(eq=False)
class _Line:
    """The messages of one client that wait. Plugins are asked about the first."""

    entries: deque[_Entry] = field(default_factory=deque)
    size: int = 0
    asking: _Asking | None = None


class Authorizer:
    """The plugins that have the hook. For the loop thread.

    ``handle`` handles a message, ``refuse`` answers it with an error; with True, more of what it
    begins will come.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        runner: Runner,
        settings: Settings,
        handle: Callable[[Peer, Message], None],
        refuse: Callable[[Peer, Message, ServerError, bool], None],
    ) -> None:
        self._hooks = hooks
        self._runner = runner
        self._max_entries = settings.max_in_flight
        self._max_size = 2 * settings.max_message_size
        self._handle = handle
        self._refuse = refuse
        self._lines: dict[Peer, _Line] = {}

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def take(self, peer: Peer, message: Message, size: int) -> None:
        """Handle ``message`` of ``size`` bytes, or refuse it, when plugins have answered."""
        line = self._lines.get(peer)
        if isinstance(message, UploadChunk) and message.table is None:
            begun = None if line is None else _first(line, message.query_id, UploadChunk)
            if line is None or begun is None:
                self._handle(peer, message)
            else:
                self._add_chunk(peer, line, begun, message, size)
            return
        is_asked = type(message) in ASKED
        if isinstance(message, AT_ONCE) or (line is None and not is_asked):
            self._handle(peer, message)
            return
        if line is None:
            line = self._lines[peer] = _Line()
        error = self._excess(line, size)
        if error is not None:
            self._refuse(peer, message, error, _goes_on(message))
            return
        line.entries.append(_Entry(message, size + _ENTRY_BYTES))
        line.size += size + _ENTRY_BYTES
        if len(line.entries) == 1:
            self._go_on(peer, line)

    def cancel(self, peer: Peer, query_id: QueryId) -> bool:
        """End a message that waits; False when there is none."""
        line = self._lines.get(peer)
        entry = None if line is None else _first(line, query_id, _CANCELLABLE)
        if line is None or entry is None:
            return False
        self._drop(peer, line, entry, Cancelled("The query was cancelled."))
        return True

    def closed(self, peer: Peer) -> None:
        """``peer`` left."""
        self._end(peer, Cancelled("The connection was closed."))

    def abandon(self, reason: ServerError) -> None:
        """Refuse everything that waits."""
        for peer in list(self._lines):
            self._end(peer, reason)

    def http(
        self,
        request: HttpRequest,
        identity: Identity,
        then: Callable[[ServerError | None], None],
    ) -> None:
        """Tell ``then`` why whoever sent ``request`` may not; None when it may."""
        peer = Peer(request)
        peer.identify(identity)
        _Asking(self._hooks, self._runner, peer, http_action(request), then).next()

    def _excess(self, line: _Line, size: int) -> ServerError | None:
        if len(line.entries) >= self._max_entries:
            return Busy(
                f"{len(line.entries)} messages of this connection wait to be allowed, which is "
                "the limit (--max-in-flight)."
            )
        if line.entries and line.size + size > self._max_size:
            return Busy(
                f"The messages of this connection that wait to be allowed hold {line.size} bytes; "
                f"with this one they would pass {self._max_size}, twice --max-message-size."
            )
        return None

    def _add_chunk(
        self, peer: Peer, line: _Line, begun: _Entry, chunk: UploadChunk, size: int
    ) -> None:
        if line.size + size > self._max_size:
            error = Busy(
                f"The upload has {line.size} bytes that wait to be allowed; {self._max_size} may, "
                "twice --max-message-size."
            )
            begun.chunks.append(chunk)
            self._drop(peer, line, begun, error)
            return
        begun.chunks.append(chunk)
        begun.size += size + _ENTRY_BYTES
        line.size += size + _ENTRY_BYTES

    def _go_on(self, peer: Peer, line: _Line) -> None:
        """Handle what nobody is asked about, and ask about what follows."""
        while line.entries and self._lines.get(peer) is line:
            entry = line.entries[0]
            action = action_of(entry.message)
            if action is not None:

                def then(error: ServerError | None, entry: _Entry = entry) -> None:
                    self._told(peer, line, entry, error)

                line.asking = _Asking(self._hooks, self._runner, peer, action, then)
                line.asking.next()
                return
            self._leave(line, entry)
            self._handle(peer, entry.message)
        if not line.entries and self._lines.get(peer) is line:
            del self._lines[peer]

    def _told(self, peer: Peer, line: _Line, entry: _Entry, error: ServerError | None) -> None:
        if peer.identity is None:
            # Its token has expired or was taken back meanwhile, and it may do nothing any more.
            self.closed(peer)
            return
        if error is not None:
            self._drop(peer, line, entry, error)
            return
        line.asking = None
        self._leave(line, entry)
        self._handle(peer, entry.message)
        for chunk in entry.chunks:
            self._handle(peer, chunk)
        self._go_on(peer, line)

    def _drop(self, peer: Peer, line: _Line, entry: _Entry, error: ServerError) -> None:
        """Refuse ``entry``, and go on if it was the one that was asked about."""
        is_first = line.entries[0] is entry
        self._leave(line, entry)
        self._refuse(peer, entry.message, error, _goes_on(*entry.chunks or (entry.message,)))
        if is_first:
            if line.asking is not None:
                line.asking.forget()
                line.asking = None
            self._go_on(peer, line)

    def _end(self, peer: Peer, error: ServerError) -> None:
        line = self._lines.pop(peer, None)
        if line is None:
            return
        if line.asking is not None:
            line.asking.forget()
        for entry in line.entries:
            self._refuse(peer, entry.message, type(error)(str(error)), False)

    @staticmethod
    def _leave(line: _Line, entry: _Entry) -> None:
        line.entries.remove(entry)
        line.size -= entry.size


class _Asking:
    """A question under way, that plugins are asked one after the other."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        runner: Runner,
        peer: Peer,
        action: Action,
        then: Callable[[ServerError | None], None],
    ) -> None:
        self._hooks = iter(hooks)
        self._runner = runner
        self._client = Client(peer, runner.post)
        self._action = action
        self._then: Callable[[ServerError | None], None] | None = then
        self._running: Running | None = None

    def next(self) -> None:
        """Ask the next plugin."""
        found = next(self._hooks, None)
        if found is None:
            self._tell(None)
            return
        plugin, hook = found
        self._running = self._runner.begin(
            plugin, "authorize", hook, self._client, self._action, then=self._answered
        )

    def forget(self) -> None:
        """Nobody waits for the answer any more."""
        self._then = None
        if self._running is not None:
            self._running.stop(Cancelled("Nobody waits for the answer any more."))

    def _answered(self, _: Any, error: ServerError | None) -> None:
        if self._then is None:
            return
        if error is None:
            self.next()
        else:
            # Not from within begin(): each of many messages would be refused within the last one.
            self._runner.post(self._tell, error)

    def _tell(self, error: ServerError | None) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(error)


def _first(line: _Line, query_id: QueryId, kinds: Any) -> _Entry | None:
    """The first of ``kinds`` that has the id."""
    for entry in line.entries:
        message: Any = entry.message
        if isinstance(message, kinds) and message.query_id == query_id:
            return entry
    return None


def _goes_on(*messages: Message) -> bool:
    """Whether more chunks of an upload follow ``messages``."""
    return isinstance(messages[-1], UploadChunk) and not messages[-1].last
