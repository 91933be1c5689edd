"""Streams that can be resumed: who may, until when, and what all of them hold."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

from sqlrooms_server.errors import Cancelled, Gone, QueryId
from sqlrooms_server.features.resumable import ResumableRequest, owner_of
from sqlrooms_server.messages import Ack
from sqlrooms_server.peer import Peer
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timer, Timers

log = logging.getLogger(__name__)


class Resuming:
    """The resumable streams of an app, whose methods belong to the loop thread.

    ``window`` is what is kept of each in bytes, ``timeout`` the seconds for which one waits for
    its client. ``held`` is what all of them keep.
    """

    def __init__(self, settings: Settings, timers: Timers, post: Callable[..., None]) -> None:
        self.window = settings.resume_window
        self.timeout = settings.resume_timeout
        self.held = 0
        self._max_held = settings.resume_memory
        self._max_waiting = settings.max_waiting_streams
        self._max_waiting_per_user = settings.max_waiting_streams_per_user
        self._timers = timers
        self._post = post
        self._streams: dict[str, ResumableRequest] = {}
        # Those whose connection is lost, and those whose answer is complete: the oldest first.
        self._waiting: dict[ResumableRequest, None] = {}
        self._kept: dict[ResumableRequest, None] = {}
        # The latter again, for as long as their connection lasts.
        self._answered: dict[Peer, dict[QueryId, ResumableRequest]] = {}
        # On the clock of time.monotonic. All wait equally long, so that they are in order.
        self._deadlines: dict[ResumableRequest, float] = {}
        self._timer: Timer | None = None

    def add(self, stream: ResumableRequest) -> str:
        """The token that ``stream`` can be resumed with."""
        token = secrets.token_urlsafe(16)
        self._streams[token] = stream
        return token

    def resume(
        self, peer: Peer, query_id: QueryId, token: str, seq: int, acked: int | None
    ) -> None:
        """Let the stream of ``token`` go on for ``peer``. Raises ``ServerError``."""
        stream = self._streams.get(token)
        # Whoever is somebody else is not told that there is one.
        if stream is None or stream.owner != owner_of(peer):
            raise Gone(
                "There is no such stream to resume: it was acknowledged to its end, or nobody came "
                f"for {self.timeout} s (--resume-timeout), or it never was one of this identity.",
                query_id,
            )
        stream.go_on(peer, query_id, seq, acked)

    def acknowledge(self, peer: Peer, ack: Ack) -> None:
        """``ack`` is for something that was answered."""
        stream = self._answered.get(peer, {}).get(ack.query_id)
        if stream is not None:
            stream.acknowledge(ack.size, has_last=ack.last)

    def closed(self, peer: Peer) -> None:
        """Its connection is gone. Streams that are under way are told by themselves."""
        for stream in self._answered.pop(peer, {}).values():
            self._expect(stream)

    def wait_for(self, stream: ResumableRequest) -> None:
        """``stream`` has lost its connection. When too many have, the oldest is given up."""
        of_user = [other for other in self._waiting if other.whose == stream.whose]
        if len(of_user) >= self._max_waiting_per_user:
            self.give_up(of_user[0])
        elif len(self._waiting) >= self._max_waiting:
            self.give_up(next(iter(self._waiting)))
        self._waiting[stream] = None
        self._expect(stream)

    def keep(self, stream: ResumableRequest) -> None:
        """The answer of ``stream`` is complete, and may not have arrived."""
        self._waiting.pop(stream, None)
        self._kept[stream] = None
        if stream.peer.is_open and stream.is_complete:
            answered = self._answered.setdefault(stream.peer, {})
            answered[stream.query_id] = stream
            if stream.acknowledges:
                return
        self._expect(stream)

    def came_back(self, stream: ResumableRequest, peer: Peer, query_id: QueryId) -> None:
        """``stream`` is being sent again, and was last sent to ``peer``."""
        self._forget_places(stream, peer, query_id)

    def discard(self, stream: ResumableRequest) -> None:
        """``stream`` can be resumed no more."""
        self._streams.pop(stream.token, None)
        self._forget_places(stream, stream.peer, stream.query_id)
        stream.forget_all()

    def give_up(self, stream: ResumableRequest) -> None:
        """The same, and what still computes it is cancelled."""
        self.discard(stream)
        stream.stop(Cancelled("Nobody resumed the stream."))

    def has_room(self) -> bool:
        """Whether no more is kept than may be, if need be without the oldest that is complete."""
        while self.held > self._max_held and self._kept:
            self.discard(next(iter(self._kept)))
        return self.held <= self._max_held

    def close(self) -> None:
        """The server stops, which ends what is under way. From any thread."""
        self._post(self._discard_all)

    def _discard_all(self) -> None:
        for stream in list(self._streams.values()):
            self.discard(stream)

    def _forget_places(self, stream: ResumableRequest, peer: Peer, query_id: QueryId) -> None:
        self._waiting.pop(stream, None)
        self._kept.pop(stream, None)
        self._deadlines.pop(stream, None)
        answered = self._answered.get(peer, {})
        if answered.get(query_id) is stream:
            del answered[query_id]
            if not answered:
                del self._answered[peer]

    def _expect(self, stream: ResumableRequest) -> None:
        """Give ``stream`` up if nobody comes from now on, or as it was said before."""
        self._deadlines.setdefault(stream, time.monotonic() + self.timeout)
        if self._timer is None:
            self._look_at(time.monotonic() + self.timeout)

    def _look_at(self, deadline: float) -> None:
        seconds = max(0.0, deadline - time.monotonic())
        self._timer = self._timers.after(seconds, lambda: self._post(self._look))

    def _look(self) -> None:
        self._timer = None
        for stream, deadline in list(self._deadlines.items()):
            if deadline > time.monotonic():
                self._look_at(deadline)
                return
            if stream in self._waiting:
                log.info("Gave up a stream of %s that nobody resumed.", stream.whose)
            self.give_up(stream)
