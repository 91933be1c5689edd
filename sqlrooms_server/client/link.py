"""One connection without its socket: what was asked, and where the answers go."""

from __future__ import annotations

from collections.abc import Callable

from sqlrooms_server.client.channels import Channels, Hearing
from sqlrooms_server.client.exchanges import (
    Exchange,
    FeedExchange,
    Inbox,
    ObjectExchange,
    StreamExchange,
)
from sqlrooms_server.client.messages import (
    CACHE_STATS,
    CHANGES,
    MEMBERS,
    NO_ID,
    NOTIFY,
    OBJECTS,
    SUBSCRIBE,
    WATCH,
    Id,
    Key,
    decode,
    encode,
)
from sqlrooms_server.client.plugin_replies import (
    Event,
    InputAck,
    ObjectAck,
    ObjectData,
    ObjectList,
    Opened,
    OutputData,
    StreamBegun,
)
from sqlrooms_server.client.replies import (
    CancelAck,
    Chunk,
    Consumed,
    Done,
    Failed,
    Joined,
    Left,
    Lost,
    Message,
    Progress,
    Reply,
    Resumable,
    Watching,
)

# Some servers answer these without their id. Each reply is then for the last that waits: any is
# good for all of them, and one that Ctrl+C kept from being sent must not take that of another.
_MAYBE_WITHOUT_ID = (CACHE_STATS, WATCH)
# An error says which id it is about, and not which kind.
_KINDS = (*_MAYBE_WITHOUT_ID, SUBSCRIBE, NOTIFY, MEMBERS)

# What is not the last reply to a request.
_NOT_FINAL = (
    *(Progress, Resumable, Consumed, Event),
    *(Opened, ObjectData, ObjectAck),
    *(StreamBegun, OutputData, InputAck),
)


class Link:
    """The requests of one connection.

    ``send`` hands a message over and never blocks, so that finalizers may call it. There is no
    lock here, which a finalizer could meet while its own thread holds it: an exchange is entered
    before ``lost`` is looked at, and ``lost`` is set before the exchanges are.
    """

    def __init__(self, send: Callable[[str | bytes], None], inbox: Callable[[], Inbox]) -> None:
        self.send = send
        self.lost: Lost | None = None
        self.channels = Channels(send)
        self.upload_window = 0
        self.connection_id: str | None = None
        self._new_inbox = inbox
        # None: abandoned, and its id not free before its last reply.
        self._exchanges: dict[Key, Exchange | None] = {}
        self._refusal: Failed | None = None

    def open(self, key: Key, is_feed: bool = False) -> Exchange:
        """Begin to wait for replies to ``key``. Raises ``ValueError`` when it is in use."""
        kind = FeedExchange if is_feed else Exchange
        return self._enter(kind(key, self._new_inbox()))

    def hear(self, query_id: Id, channel: str, since: str | None, presence: bool) -> Hearing:
        """Begin to wait for what is said in ``channel``; ``channels`` sends the request."""
        hearing = Hearing(
            (SUBSCRIBE, query_id),
            self._new_inbox(),
            channel=channel,
            since=since,
            presence=presence,
        )
        self.channels.add(hearing)
        self._enter(hearing)
        return hearing

    def open_object(self, query_id: Id) -> ObjectExchange:
        """Begin to wait for messages of an object."""
        key = ("query", query_id)
        exchange = ObjectExchange(key, self._new_inbox(), acks=Exchange(key, self._new_inbox()))
        self._enter(exchange)
        return exchange

    def open_stream(self, query_id: Id) -> StreamExchange:
        """Begin to wait for what a stream of batches brings."""
        key = ("query", query_id)
        exchange = StreamExchange(key, self._new_inbox(), new_inbox=self._new_inbox)
        self._enter(exchange)
        return exchange

    def _enter(self, exchange: Exchange) -> Exchange:
        key = exchange.key
        if key in self._exchanges:
            raise ValueError(f"The {key[0]} id {key[1]!r} is in use.")
        self._exchanges[key] = exchange
        if self.lost is not None:
            self._exchanges.pop(key, None)
            exchange.finish(self.lost)
        return exchange

    def abandon(self, exchange: Exchange) -> None:
        """Wait no longer, and cancel the request on the server if it still runs there."""
        kind, query_id = exchange.key
        if kind == WATCH and self.lost is None:
            self.send(encode(type="unwatch"))
        if isinstance(exchange, Hearing):
            self.channels.discard(exchange, is_open=self.lost is None)
        if self._exchanges.get(OBJECTS) is exchange:
            self._exchanges.pop(OBJECTS, None)
            if self.lost is None:
                self.send(encode(type="object-list", watch=False))
        if self._exchanges.get(CHANGES) is exchange:
            self._exchanges.pop(CHANGES, None)
        if self._exchanges.get(exchange.key) is not exchange:
            return
        if kind == "query" and self.lost is None:
            self._exchanges[exchange.key] = None
            self.send(cancelling(query_id))
        else:
            self._exchanges.pop(exchange.key, None)

    def receive(self, message: str | bytes) -> None:
        """Hand a message to whom it answers. Raises what ``decode`` does."""
        decoded = decode(message)
        if decoded is None:
            return
        key, reply = decoded
        if key is None:
            self._refuse(reply)
            return
        if isinstance(reply, Message | Joined | Left):
            self.channels.hear(str(key[1]), reply, len(message))
            return
        key = self._addressee(key, reply)
        exchange = self._exchanges.get(key)
        is_final = not isinstance(reply, _NOT_FINAL)
        if isinstance(reply, Chunk):
            is_final = reply.is_last
        if exchange is not None and exchange.is_feed:
            is_final = isinstance(reply, Failed | Done | Watching)
        if is_final:
            self._exchanges.pop(key, None)
        if isinstance(reply, Watching) and exchange is not None:
            self._exchanges[CHANGES] = exchange
        if isinstance(reply, ObjectList) and exchange is not None and exchange.is_feed:
            self._exchanges[OBJECTS] = exchange
        if isinstance(reply, CancelAck) and not reply.cancelled:
            # The last reply was there before the cancel.
            self._free(("query", key[1]))
        if exchange is None:
            return
        if isinstance(reply, Progress) and not exchange.inbox.empty():
            # Nobody looks; progress must not pile up beside a result that waits.
            return
        exchange.deliver(reply)

    def _addressee(self, key: Key, reply: Reply) -> Key:
        kind, query_id = key
        if query_id == NO_ID and kind in _MAYBE_WITHOUT_ID:
            waiting = [waits for waits in list(self._exchanges) if waits[0] == kind]
            return waiting[-1] if waiting else key
        if isinstance(reply, Failed) and key not in self._exchanges:
            others = [(kind, query_id) for kind in _KINDS]
            return next((other for other in others if other in self._exchanges), key)
        return key

    def _free(self, key: Key) -> None:
        if self._exchanges.get(key, ...) is None:
            self._exchanges.pop(key, None)

    def _refuse(self, reply: Reply) -> None:
        # The server does not know which request it means; none may wait for ever.
        assert isinstance(reply, Failed)
        self._refusal = reply if reply.code == "unauthorized" else None
        for exchange in list(self._exchanges.values()):
            # A feed that was answered before is not what the server means.
            if exchange is not None and not exchange.is_answered:
                self.abandon(exchange)
                exchange.finish(reply)

    def fail(self, text: str) -> None:
        """The connection is gone: everybody who waits is told, with the server's reason if any."""
        if self.lost is None:
            refusal = self._refusal
            self.lost = Lost(refusal.text, refusal.code) if refusal is not None else Lost(text)
        while self._exchanges:
            _, exchange = self._exchanges.popitem()
            if exchange is not None:
                exchange.finish(self.lost)


def cancelling(query_id: Id) -> str:
    return encode(type="cancel", queryId=query_id)
