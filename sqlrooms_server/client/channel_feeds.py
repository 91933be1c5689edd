"""Subscriptions to channels, as flows."""

from __future__ import annotations

from collections.abc import Callable

from sqlrooms_server.client.channels import Hearing
from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.feeds import Feed
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.needs import ClientState, Flow, Receive
from sqlrooms_server.client.replies import Done, Heard, Message, Missed, Reply, Subscribed


class Subscription(Feed[Heard]):
    """What is said in one channel, and who comes and goes.

    What it tells about a gap, when it subscribes again or goes on after ``since``:

    | | recovered | not recovered |
    |---|---|---|
    | with ``recover`` | nothing | ``Missed`` |
    | with ``presence`` only | | ``Missed`` |
    | with both | ``Missed(messages=False)`` | ``Missed`` |
    | with neither | | nothing |
    """

    what = "subscription"

    def __init__(
        self,
        client: ClientState,
        new_id: Callable[[], int],
        channel: str,
        *,
        recover: bool,
        since: str | None,
        presence: bool,
    ) -> None:
        super().__init__(client, new_id)
        self.offset = since
        self._channel = channel
        self._recovers = recover or since is not None
        self._presence = presence
        self._hearing: Hearing | None = None
        self._was_subscribed = False

    def _begun(self) -> Flow[Reply | None]:
        reply = yield from self._reply(None)
        if isinstance(reply, Subscribed) and self._gap(reply) is None:
            # Where it begins is known from now on, if it is lost before anything is read.
            self._take(reply)
            return None
        return reply

    def _open(self, link: Link) -> Exchange:
        since = self.offset if self._recovers else None
        self._hearing = link.hear(self._new_id(), self._channel, since, self._presence)
        return self._hearing

    def _send(self, link: Link) -> None:
        if self._hearing is not None:
            link.channels.subscribe(self._hearing)

    def _take(self, reply: Reply) -> Heard | None:
        if isinstance(reply, Subscribed):
            gap = self._gap(reply)
            self._was_subscribed = True
            self.offset = reply.offset or self.offset
            return gap
        if isinstance(reply, Message):
            self.offset = reply.offset or self.offset
        assert isinstance(reply, Heard)
        return reply

    def _gap(self, reply: Subscribed) -> Missed | None:
        if self._recovers and not reply.recovered:
            return Missed()
        if self._presence and self._was_subscribed:
            return Missed(messages=not self._recovers)
        return None

    def _latest(self, deadline: float | None) -> Flow[Reply]:
        if self._ready is not None:
            ready, self._ready = self._ready, None
            return ready
        if self._exchange is None:
            yield from self._subscribe(deadline)
        hearing = self._hearing
        while hearing is not None and not self.is_closed:
            reply = hearing.read()
            if reply is not None:
                return reply
            if (yield Receive(hearing, deadline)) is None:
                raise TimeoutError(f"The {self.what} had nothing to tell in time.")
        return Done(0)

    def _interrupted(self) -> None:
        # What was heard is kept; only a request that may not have been sent is made again.
        if self._hearing is not None and not self._hearing.is_answered:
            self._unsubscribe()
