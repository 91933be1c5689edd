"""Objects of Python that clients use: ``publish``, and what clients ask of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from sqlrooms_server.db import values
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.errors import BadRequest, Busy, Gone, NotFound, ServerError
from sqlrooms_server.features import Feature
from sqlrooms_server.features.requests import Requests
from sqlrooms_server.messages import Params, PluginMessage
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugin import Client, Plugin
from sqlrooms_server.plugins.object_fetches import Fetches
from sqlrooms_server.plugins.object_handles import Handle
from sqlrooms_server.plugins.object_lanes import Lanes
from sqlrooms_server.plugins.object_streams import OpenObject
from sqlrooms_server.plugins.object_types import BUILT_IN, Target, Types
from sqlrooms_server.plugins.object_watches import ObjectWatches, listed
from sqlrooms_server.plugins.outgoing import Outgoing, Unsent
from sqlrooms_server.plugins.published import Entry, Published
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.plugins.tickets import Tickets
from sqlrooms_server.protocol import encode_reply
from sqlrooms_server.protocol.fields import flag, whole_number
from sqlrooms_server.settings import Settings

# Tickets in one message.
_MAX_TICKETS = 1000


@dataclass(eq=False)
class _Holder:
    """What one connection has of objects."""

    tickets: Tickets
    unsent: Unsent
    streams: set[OpenObject] = field(default_factory=set)
    lanes: Lanes = field(default_factory=Lanes)


class Objects(Feature):
    """A feature, and the objects of one app. Raises ``StartupError``.

    ``publish``, ``unpublish`` and ``relation`` are for any thread, the rest for the loop.
    """

    name = "objects"
    object_types = BUILT_IN

    def __init__(self, settings: Settings, runner: Runner, plugins: Sequence[Plugin]) -> None:
        self._settings = settings
        self._runner = runner
        self._types = Types(plugins, self)
        self._published = Published()
        self._watches = ObjectWatches(self._published, runner.timers, runner.post)
        self._holders: dict[Peer, _Holder] = {}
        # Those too that have ended, as long as something of them runs.
        self._streams: WeakSet[OpenObject] = WeakSet()
        self._engine: Engine | None = None

    def open(self, engine: Engine, requests: Requests) -> None:
        """For the server: the database is open."""
        self._engine = engine
        self._requests = requests
        self._fetches = Fetches(engine, requests, self._runner, self._settings, self._types)

    def publish(
        self,
        name: str,
        obj: Any,
        *,
        users: Iterable[str] | None = None,
        roles: Iterable[str] | None = None,
    ) -> None:
        """Let clients use ``obj`` under ``name``, in the place of what had that name.

        ``users`` and ``roles`` say for whom it is: clients that are one of the users, or have one
        of the roles. Without either it is for those whose role may read every table. Raises
        ``TypeError`` for what no object type knows, ``ValueError`` for what is no name.
        """
        target = self._types.resolve(obj)
        before = self._published.add(name, target, users, roles)
        self._watches.has_changed()
        if before is not None:
            self._runner.post(self._withdraw, before, obj)

    def unpublish(self, name: str) -> bool:
        """Take back what was published as ``name``, and end its streams; False if nothing was."""
        before = self._published.remove(name)
        if before is None:
            return False
        self._watches.has_changed()
        self._runner.post(self._withdraw, before, None)
        return True

    def relation(self, sql: str, params: Params | None = None) -> values.Relation:
        """What ``sql``, one SELECT, returns: run anew for each client that asks, as the server.

        Raises ``ValueError`` for another statement, ``QueryError`` for one that cannot run.
        """
        self._runner.must_not_block("server.relation")
        if self._engine is None:
            raise RuntimeError("The database is not open yet; wait for started().")
        return values.Relation.of(self._engine, sql, params)

    @property
    def handlers(self) -> Mapping[Any, Callable[..., Any]]:
        return {
            "object-list": self._answering(self._list),
            "object-fetch": self._answering(self._fetch),
            "object-open": self._answering(self._open),
            "object-release": self._answering(self._release),
            "object-data": self._of_stream(self._data),
            "object-ack": self._of_stream(self._ack),
            "object-close": self._of_stream(lambda stream, message: stream.close_by_client()),
        }

    def stopping(self) -> None:
        self._runner.post(self._hurry)

    def _hurry(self) -> None:
        for stream in list(self._streams):
            stream.hurry()

    def closed(self, peer: Peer) -> None:
        self._watches.discard(peer)
        holder = self._holders.pop(peer, None)
        if holder is not None:
            holder.tickets.close()

    def _answering(
        self, function: Callable[[Peer, PluginMessage], None]
    ) -> Callable[[Peer, PluginMessage], None]:
        def answer(peer: Peer, message: PluginMessage) -> None:
            try:
                function(peer, message)
            except ServerError as error:
                peer.send_error(type(error)(str(error), message.query_id))

        return answer

    def _of_stream(
        self, function: Callable[[OpenObject, PluginMessage], None]
    ) -> Callable[[Peer, PluginMessage], None]:
        def answer(peer: Peer, message: PluginMessage) -> None:
            stream = self._requests.find(peer, message.query_id)
            if not isinstance(stream, OpenObject):
                # It has ended, and its messages were under way.
                return
            try:
                function(stream, message)
            except ServerError as error:
                stream.stop(error)

        return answer

    def _list(self, peer: Peer, message: PluginMessage) -> None:
        visible = self._published.visible_to(peer.identity)
        objects = [listed(entry) for entry in visible.values()]
        watches = message.fields.get("watch") is not None
        if watches and flag(message.fields, "watch"):
            self._watches.add(peer, visible)
        elif watches:
            self._watches.discard(peer)
        peer.send(encode_reply("object-list", message.query_id, objects=objects))

    def _fetch(self, peer: Peer, message: PluginMessage) -> None:
        name, target = self._wanted(peer, message)
        holder = self._holder(peer)
        self._fetches.begin(peer, message, name, target, holder.lanes, holder.tickets)

    def _open(self, peer: Peer, message: PluginMessage) -> None:
        name, target = self._wanted(peer, message)
        window = whole_number(message.fields, "clientWindow", 1, 1 << 53)
        if not target.type.can_open:
            raise BadRequest(f"{name} is a {target.type.name}, which can only be fetched.")
        holder, most = self._holder(peer), self._settings.max_object_streams
        if len(holder.streams) >= most:
            raise Busy(
                f"This connection has {most} objects open, which is the limit "
                "(--max-object-streams)."
            )
        runner = self._runner
        outgoing = Outgoing(
            peer, holder.unsent, window, runner.post, lambda error: stream.stop(error)
        )
        stream = OpenObject(
            *(self._requests, peer, message.query_id),
            name=name,
            target=target,
            runner=runner,
            lanes=holder.lanes,
            tickets=holder.tickets,
            outgoing=outgoing,
            on_end=holder.streams.discard,
        )
        if self._requests.register(stream):
            holder.streams.add(stream)
            self._streams.add(stream)
            client = Client(peer, runner.post)
            resolve = self._types.resolve
            stream.open(Handle(client, stream, outgoing, holder.tickets, resolve, runner.post))

    def _release(self, peer: Peer, message: PluginMessage) -> None:
        tickets = _tickets_in(message, "tickets")
        released = self._holder(peer).tickets.release(tickets)
        peer.send(encode_reply("object-released", message.query_id, released=released))

    def _data(self, stream: OpenObject, message: PluginMessage) -> None:
        if message.body is None:
            raise BadRequest("object-data is the header of a binary message.")
        holder = self._holder(stream.peer)
        tickets = _tickets_in(message, "references")
        references = [holder.tickets.get(ticket).obj for ticket in tickets]
        stream.receive(bytes(message.body), references, message.size)

    def _ack(self, stream: OpenObject, message: PluginMessage) -> None:
        size = whole_number(message.fields, "bytes", 0, 1 << 62)
        if size is None:
            raise BadRequest("object-ack needs a field bytes, the total taken so far.")
        stream.acknowledge(size)

    def _holder(self, peer: Peer) -> _Holder:
        holder = self._holders.get(peer)
        if holder is None:
            settings = self._settings
            holder = self._holders[peer] = _Holder(
                Tickets(settings.max_object_references), Unsent(settings.max_queued_bytes)
            )
        return holder

    def _wanted(self, peer: Peer, message: PluginMessage) -> tuple[str, Target]:
        """The object that ``message`` is about, and what errors call it."""
        name, ticket = message.fields.get("object"), message.fields.get("ticket")
        if (name is None) == (ticket is None):
            raise BadRequest(
                f"{message.kind} needs either object, a name, or ticket, of a reference."
            )
        if ticket is not None:
            if not isinstance(ticket, str):
                raise BadRequest("ticket must be a string.")
            return "reference", self._holder(peer).tickets.get(ticket)
        if not isinstance(name, str):
            raise BadRequest("object must be a string.")
        entry = self._published.find(name)
        # Whoever may not use it need not know that it is there.
        if entry is None or not entry.is_for(peer.identity):
            raise NotFound(f"There is no object {name!r}.")
        return name, entry.target

    def _withdraw(self, before: Entry, now: Any) -> None:
        """End the streams of what was published, unless it is again."""
        if before.target.obj is now:
            return
        what = "is published no more" if now is None else "was replaced; open it again"
        for holder in list(self._holders.values()):
            for stream in [one for one in holder.streams if one.target is before.target]:
                stream.stop(Gone(f"The object {before.name!r} {what}."))


def _tickets_in(message: PluginMessage, name: str) -> list[str]:
    tickets = message.fields.get(name)
    if tickets is None and name == "references":
        return []
    if (
        not isinstance(tickets, list)
        or len(tickets) > _MAX_TICKETS
        or not all(isinstance(ticket, str) for ticket in tickets)
    ):
        raise BadRequest(f"{name} must be an array of at most {_MAX_TICKETS} tickets.")
    return tickets
