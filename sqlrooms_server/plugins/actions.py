"""What plugins are asked about: what somebody wants to do, for each message and request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

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
from sqlrooms_server.plugin import Action
from sqlrooms_server.transport import HttpRequest

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
