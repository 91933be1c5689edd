"""``subscribe``, ``unsubscribe``, ``notify`` and ``presence``: the hub on the wire."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from sqlrooms_server.access import Identity
from sqlrooms_server.access.roles import NOBODY, Role
from sqlrooms_server.errors import BadRequest, Busy, Forbidden, NotFound, ServerError, TooLarge
from sqlrooms_server.features import Feature, MessageHandler, Route
from sqlrooms_server.features.backlog import Backlog
from sqlrooms_server.hub import Channel, Hearing, Hub, Said
from sqlrooms_server.messages import Notify, Presence, Subscribe, Target, Unsubscribe
from sqlrooms_server.peer import Audience, Peer
from sqlrooms_server.protocol import (
    as_target,
    channel_name,
    decode_json,
    encode,
    encode_reply,
    encode_said,
    with_offset,
)
from sqlrooms_server.rates import Rates
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers
from sqlrooms_server.transport import Exchange, HttpRequest

# Who comes and goes is told in channels of up to this many members: n of them that come make n * n
# messages.
_MAX_TOLD_MEMBERS = 1000

# Messages of other threads that wait for the loop, and their bytes. It takes them in one turn,
# in which nobody can read: more would be too many for the queues of those who read well.
_MAX_PUBLISHED = 10_000
_MAX_PUBLISHED_BYTES = 16 << 20

_STATUS = {"bad_request": 400, "forbidden": 403, "too_large": 413, "busy": 429}


@dataclass(slots=True)
class _Saying:
    """A message on its way to those who hear its channel, and who is answered after it."""

    channel: Channel[Peer]
    said: Said
    sender: Peer | None
    ack: bytes


class _Audiences:
    """The members of one channel, by what they hear."""

    def __init__(self, new_audience: Callable[[], Audience]) -> None:
        self.plain = new_audience()
        self.numbered = new_audience()

    def add(self, peer: Peer, *, recover: bool) -> None:
        self.discard(peer)
        (self.numbered if recover else self.plain).add(peer)

    def discard(self, peer: Peer) -> None:
        self.plain.discard(peer)
        self.numbered.discard(peer)


class Channels(Feature):
    """A feature, and what programs publish with: :meth:`publish` may be called by any thread.

    Messages that arrive in one turn of the loop leave together, so that a burst costs each
    subscriber one call of the kernel.
    """

    def __init__(
        self,
        settings: Settings,
        timers: Timers,
        post: Callable[..., None],
        new_audience: Callable[[], Audience],
    ) -> None:
        self._settings = settings
        self._new_audience = new_audience
        self._timers = timers
        self._post = post
        self._hub: Hub[Peer] = Hub(
            history=settings.channel_history,
            ttl=settings.channel_history_ttl,
            clock=time.monotonic,
        )
        # Of the channels that have members.
        self._audiences: dict[Channel[Peer], _Audiences] = {}
        self._rates: Rates[Peer | str] = Rates(settings.notify_rate)
        self._sayings: list[_Saying] = []
        self._forgets = False
        self._published = Backlog(_MAX_PUBLISHED, _MAX_PUBLISHED_BYTES)

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {
            Subscribe: self._subscribe,
            Unsubscribe: self._unsubscribe,
            Notify: self._notify,
            Presence: self._presence,
        }

    @property
    def routes(self) -> Sequence[Route]:
        return (Route("POST", "/channels/", self._http),)

    def closed(self, peer: Peer) -> None:
        self._flush()
        self._rates.forget(peer)
        for name in self._hub.channels_of(peer):
            self._leave(name, peer)

    def channels_of(self, peer: Peer) -> list[str]:
        """The names of the channels that ``peer`` hears. For the loop thread."""
        return self._hub.channels_of(peer)

    def publish(self, channel: str, payload: Any, to: Mapping[str, str] | None = None) -> None:
        """Say ``payload``, a JSON value, to those who hear ``channel``.

        Only to some of them with ``to``: ``{"user": name}`` or ``{"connection": id}``. From any
        thread but the loop's; waits while 10,000 messages or 16 MiB wait for that. Nobody hears
        what is said after the server stopped. Raises ``BadRequest`` or ``TooLarge``.
        """
        name = channel_name(channel)
        target = None if to is None else as_target(dict(to))
        plain = encode_said(name, payload)
        self._check_size(len(plain), name)
        if self._published.add(len(plain)):
            self._post(self._publish, name, plain, target)

    def stop(self) -> None:
        """The loop has ended, or will: whoever publishes must not wait for it."""
        self._published.end()

    def _publish(self, name: str, plain: bytes, to: Target | None) -> None:
        self._published.remove(len(plain))
        self._say(name, plain, to, None, b"")

    def _subscribe(self, peer: Peer, message: Subscribe) -> None:
        self._flush()
        name = message.channel
        if name not in peer.role.read_channels:
            text = f"The role {peer.role.name!r} may not hear channel {name!r} (read_channels)."
            raise _refused(Forbidden, text, message)
        mine = self._hub.channels_of(peer)
        if name not in mine:
            if len(mine) >= self._settings.max_channels_per_connection:
                raise _refused(
                    Busy,
                    f"This connection hears {len(mine)} channels, which is the limit "
                    "(--max-channels-per-connection).",
                    message,
                )
            self._check_room(name, message)
        hearing = Hearing(recover=message.recover, presence=message.presence)
        channel, is_new = self._hub.join(name, peer, hearing)
        audiences = self._audiences.get(channel)
        if audiences is None:
            audiences = self._audiences[channel] = _Audiences(self._new_audience)
        audiences.add(peer, recover=message.recover)
        fields: dict[str, Any] = {"channel": name}
        if message.recover:
            recovered = True
            if message.since is not None:
                missed, recovered = self._hub.missed(channel, message.since)
                peer.send_all([said.numbered for said in missed])
            fields.update(offset=channel.offset, recovered=recovered)
        peer.send(encode_reply("subscribed", message.query_id, **fields))
        if is_new:
            self._tell(channel, "joined", peer)

    def _unsubscribe(self, peer: Peer, message: Unsubscribe) -> None:
        self._flush()
        self._leave(message.channel, peer)
        peer.send(encode_reply("unsubscribed", message.query_id, channel=message.channel))

    def _leave(self, name: str, peer: Peer) -> None:
        channel = self._hub.leave(name, peer)
        if channel is None:
            return
        self._audiences[channel].discard(peer)
        if not channel.members:
            del self._audiences[channel]
        self._tell(channel, "left", peer)

    def _tell(self, channel: Channel[Peer], event: str, peer: Peer) -> None:
        """Tell those who want to know that ``peer`` joined or left."""
        if not channel.attentive or len(channel.members) > _MAX_TOLD_MEMBERS:
            return
        fields = {"type": "presence", "channel": channel.name, event: _member(peer)}
        message = encode(fields)
        for member in channel.attentive:
            if member is not peer:
                member.send(message)

    def _presence(self, peer: Peer, message: Presence) -> None:
        channel = self._hub.get(message.channel)
        if channel is None or peer not in channel.members:
            raise _refused(NotFound, "Only those who hear a channel are told who does.", message)
        members = [_member(member) for member in channel.members]
        peer.send(
            encode_reply(
                "presence",
                message.query_id,
                channel=channel.name,
                members=members[:_MAX_TOLD_MEMBERS],
                count=len(members),
            )
        )

    def _notify(self, peer: Peer, message: Notify) -> None:
        _check_role(peer.role, message.channel, message)
        self._check_size(message.size, message.channel, message)
        if not self._rates.allows(peer):
            raise _refused(
                Busy,
                f"This connection sends more than {self._settings.notify_rate} messages a second "
                "(--notify-rate).",
                message,
            )
        if self._settings.channel_history and message.to is None:
            self._check_room(message.channel, message)
        try:
            plain = encode_said(message.channel, message.payload)
        except BadRequest as error:
            raise _refused(BadRequest, str(error), message) from error
        ack: dict[str, Any] = {"channel": message.channel}
        if message.to is not None:
            ack["delivered"] = self._say_to(message.channel, plain, message.to)
            peer.send(encode_reply("notifyAck", message.query_id, **ack))
            return
        ack_message = encode_reply("notifyAck", message.query_id, **ack)
        self._say(message.channel, plain, None, peer, ack_message)

    def _say(
        self,
        name: str,
        plain: bytes,
        to: Target | None,
        sender: Peer | None,
        ack: bytes,
    ) -> int:
        """Say something before this turn of the loop ends; how many hear it."""
        if to is not None:
            return self._say_to(name, plain, to)
        channel, said = self._hub.say(name, lambda offset: (plain, with_offset(plain, offset)))
        if not self._sayings:
            self._post(self._flush)
        self._sayings.append(_Saying(channel, said, sender, ack))
        if channel.history and not self._forgets:
            self._forget_later(self._settings.channel_history_ttl)
        return len(channel.members)

    def _say_to(self, name: str, plain: bytes, to: Target) -> int:
        self._flush()
        channel = self._hub.get(name)
        members = [] if channel is None else list(channel.members)
        reached = [
            member
            for member in members
            if (member.user == to.user if to.user is not None else member.id == to.connection)
        ]
        for member in reached:
            member.send(plain)
        return len(reached)

    def _flush(self) -> None:
        """Send what was said since the last time, channel by channel as it was said."""
        sayings, self._sayings = self._sayings, []
        start = 0
        while start < len(sayings):
            end = start + 1
            while end < len(sayings) and sayings[end].channel is sayings[start].channel:
                end += 1
            self._deliver(sayings[start].channel, sayings[start:end])
            start = end

    def _deliver(self, channel: Channel[Peer], sayings: list[_Saying]) -> None:
        audiences = self._audiences.get(channel)
        if audiences is not None:
            audiences.plain.send([saying.said.plain for saying in sayings])
            audiences.numbered.send([saying.said.numbered for saying in sayings])
        answers: dict[Peer, list[bytes]] = {}
        for saying in sayings:
            sender = saying.sender
            if sender is not None:
                copy = [] if sender in channel.members else [saying.said.plain]
                answers.setdefault(sender, []).extend([*copy, saying.ack])
        for sender, messages in answers.items():
            sender.send_all(messages)

    def _forget_later(self, seconds: float) -> None:
        self._forgets = True
        self._timers.after(seconds, lambda: self._post(self._forget))

    def _forget(self) -> None:
        self._forgets = False
        wait = self._hub.forget_old()
        if wait is not None:
            self._forget_later(wait)

    def _check_size(self, size: int, name: str, message: Notify | None = None) -> None:
        limit = self._settings.max_notify_size
        if size > limit:
            text = f"The message to channel {name!r} has {size} bytes; at most {limit} are allowed "
            raise _refused(TooLarge, text + "(--max-notify-size).", message)

    def _check_room(self, name: str, message: Subscribe | Notify | None) -> None:
        limit = self._settings.max_channels
        if self._hub.get(name) is None and len(self._hub) >= limit:
            text = f"There are {limit} channels, which is the limit (--max-channels)."
            raise _refused(Busy, text, message)

    def _http(self, request: HttpRequest, exchange: Exchange, sender: Identity | None) -> None:
        try:
            answer = self._publish_over_http(request, sender)
        except ServerError as error:
            body = encode({"error": str(error), "code": error.code})
            exchange.respond_json(_STATUS[error.code], body)
        else:
            exchange.respond_json(200, encode(answer))

    def _publish_over_http(self, request: HttpRequest, sender: Identity | None) -> dict[str, Any]:
        # Pages of other origins may send forms and plain text without asking, JSON not.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest("The body must be JSON, with Content-Type: application/json.")
        try:
            name = channel_name(unquote(request.path.removeprefix("/channels/"), errors="strict"))
        except UnicodeDecodeError as error:
            raise BadRequest("The name of the channel is not UTF-8.") from error
        _check_role(NOBODY if sender is None else sender.role, name, None)
        if not self._rates.allows(request.remote_address):
            rate = self._settings.notify_rate
            raise Busy(f"This address sends more than {rate} messages a second (--notify-rate).")
        payload = decode_json(request.body, "The body")
        plain = encode_said(name, payload)
        self._check_size(len(plain), name)
        wanted = {key: values[0] for key, values in parse_qs(request.query).items()}
        wanted.pop("token", None)
        to = as_target(wanted) if wanted else None
        if to is None and self._settings.channel_history:
            self._check_room(name, None)
        return {"channel": name, "delivered": self._say(name, plain, to, None, b"")}


def _check_role(role: Role, channel: str, message: Notify | None) -> None:
    if channel not in role.write_channels:
        text = f"The role {role.name!r} may not send to channel {channel!r} (write_channels)."
        raise _refused(Forbidden, text, message)


def _refused(
    kind: type[ServerError], text: str, message: Subscribe | Notify | Presence | None
) -> ServerError:
    """An error that says which channel it is about."""
    error = kind(text, None if message is None else message.query_id)
    if message is not None:
        error.channel = message.channel
    return error


def _member(peer: Peer) -> dict[str, str]:
    known = {"connectionId": peer.id}
    return known if peer.user is None else {**known, "user": peer.user}
