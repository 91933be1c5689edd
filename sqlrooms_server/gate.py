"""The gate: who gets in, and what becomes of those who do not."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sqlrooms_server.access import EVERYBODY, Access, Identity
from sqlrooms_server.access.cors import shared_with
from sqlrooms_server.access.credentials import UNAUTHORIZED, Credentials
from sqlrooms_server.access.roles import Role
from sqlrooms_server.access.strangers import Strangers
from sqlrooms_server.access.token_file import TokenFile
from sqlrooms_server.errors import Busy, ServerError, StartupError, Unauthorized
from sqlrooms_server.messages import (
    OF_OPEN_OBJECTS,
    Ack,
    Auth,
    Cancel,
    Message,
    PluginMessage,
    RoomPresence,
    RoomUpdate,
    StreamAck,
    StreamData,
    UploadChunk,
)
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import Limits, decode, encode
from sqlrooms_server.rates import Rates
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timer, Timers
from sqlrooms_server.transport import HttpRequest, Refusal

log = logging.getLogger(__name__)

# An auth message; anything longer from a stranger is not worth decoding.
_MAX_AUTH_BYTES = 16 << 10

# A message waits in memory until it is complete, and may be of any size that others may send. How
# often it is looked who sends more than an auth message, and how much that is, with its frame and
# what the TLS library reads ahead.
_WATCH_SECONDS = 0.25
_MAX_STRANGER_BYTES = 64 << 10

# While plugins are asked who somebody is, who does not know that and begins to ask. Somebody else
# can make that last as long, with as much: so many times --max-strangers.
_MAX_WAITING_BYTES = 1 << 20

# What a message that waits costs besides its bytes.
_ENTRY_BYTES = 200

_AUTH_ACK = encode({"type": "authAck"})

_CLOSE_SECONDS = 2.0

# How often it is looked whether a token has expired, besides when it should have.
_LOOK_SECONDS = 60.0

# RFC 6455, section 7.4, and its registry: "Policy Violation", and "Service Restart", after which
# clients come back.
_POLICY = 1008
_RESTART = 1012

# What belongs to a request that was counted, or has a limit of its own.
_NO_REQUESTS = (Ack, Cancel, UploadChunk, RoomUpdate, RoomPresence, StreamAck, StreamData)


class Question(Protocol):
    """What plugins are asked. ``asked`` is the one whose answer is awaited."""

    asked: str

    def forget(self) -> None:
        """Nobody waits for the answer any more."""


class Plugins(Protocol):
    """Those that know who somebody is; false when there are none."""

    def __bool__(self) -> bool: ...

    def ask(
        self,
        request: HttpRequest,
        token: str | None,
        then: Callable[[Identity | ServerError | None], None],
    ) -> Question:
        """Tell ``then``, soon, who presents that; None when nobody knows."""


@dataclass(eq=False)
class _Asked:
    """Somebody about whom plugins are asked, and the messages that wait for the answer."""

    token: str | None
    is_message: bool
    question: Question | None = None
    waiting: list[tuple[bytes, bool]] = field(default_factory=list)
    size: int = 0


class Gate:
    """Stands before every kind of frame and every request.

    For the loop thread, but for :meth:`reload`.
    """

    def __init__(
        self,
        settings: Settings,
        access: Access,
        limits: Limits,
        timers: Timers,
        post: Callable[..., None],
        admitted: Callable[[Peer], None],
        plugins: Plugins,
        heard: Callable[[Peer, bytes, bool], None],
    ) -> None:
        """``admitted`` is told of each client that may come, once; ``heard`` gets messages that
        waited until somebody was known.
        """
        self._settings = settings
        self._access = access
        self._limits = limits
        self._timers = timers
        self._post = post
        self._admitted = admitted
        self._plugins = plugins
        self._heard = heard
        self._asked: dict[Peer, _Asked] = {}
        max_failures, others_know = settings.max_auth_failures, bool(plugins)
        self._credentials = Credentials(access, max_failures, others_know=others_know)
        # Pages can send requests with wrong tokens, and browsers do not tell the origin of images.
        # That must not keep a visitor of such a page from connecting.
        self._over_http = Credentials(access, max_failures, others_know=others_know)
        # Those that are connected and have not said who they are.
        self._strangers: Strangers[Peer] = Strangers(settings.max_strangers)
        # What had come on their sockets before.
        self._received: dict[Peer, int] = {}
        self._is_watching = False
        # Those that are known.
        self._known: set[Peer] = set()
        # By how much is allowed. Over HTTP, where connections do not last, it is a user who may.
        self._rates: dict[int, Rates[Peer | str]] = {}
        # When a stranger has waited too long, and when an identity expires.
        self._deadlines: dict[Peer, Timer] = {}

    @property
    def needs_token(self) -> bool:
        return self._access.needs_token or bool(self._plugins)

    def reload(self) -> None:
        """Read the file of tokens again. Who is no longer in it is disconnected.

        When it is not right, what was read before holds. From any thread but the loop's.
        """
        try:
            file = self._access.read_again()
        except StartupError as error:
            log.error("The tokens stay as they were. %s", error)
            return
        except Exception:  # top guard of a signal: the thread that called stops the server, too
            log.exception("The tokens stay as they were.")
            return
        self._post(self._use, file)

    def _use(self, file: TokenFile | None) -> None:
        self._access.use(file)
        self._credentials.forget_known()
        self._over_http.forget_known()
        closed = 0
        for peer in list(self._known):
            assert peer.identity is not None
            identity = self._access.renewed(peer.identity)
            if identity is None:
                self._disconnect(peer, "the token is no longer valid")
            elif identity.role == peer.role:
                self._admit(peer, identity)
                continue
            else:
                # It may hear or hold what it is no longer allowed; it can come back as what it is.
                self._close(peer, _RESTART, "the role of this token has changed; connect again")
            closed += 1
        log.info("Read the tokens again; closed %d connections.", closed)

    def upgrade(self, request: HttpRequest) -> Peer | Refusal:
        """The client that a WebSocket will belong to, or why it may not come."""
        refusal = self.refusal(request)
        if refusal is not None:
            return refusal
        peer = Peer(request)
        if not self.needs_token:
            peer.identify(EVERYBODY)
            return peer
        found = self._credentials.of(request)
        if isinstance(found, Refusal):
            if found.status != 401:
                return found
            # It is told over the WebSocket, where clients look for it.
            peer.is_refused = True
        elif found is not None:
            peer.identify(found)
        elif not self._strangers.has_room():
            other = self._strangers.in_the_way_of(request.remote_address)
            if other is None:
                return Refusal(
                    503,
                    f"{len(self._strangers)} connections have not presented a token yet, which is "
                    "the limit (--max-strangers). Present it with the upgrade.\n",
                )
            self._disconnect(other, "others want to come, too (--max-strangers)")
        return peer

    def opened(self, peer: Peer) -> None:
        """Its connection is open."""
        if peer.is_refused:
            self._disconnect(peer)
        elif peer.identity is not None:
            self._admit(peer, peer.identity)
        else:
            self._strangers.add(peer, peer.remote_address)
            self._received[peer] = peer.received_bytes
            self._watch_strangers()
            self._after(self._settings.auth_timeout, peer, self._give_up)
            if self._plugins and peer.request is not None:
                token = self._access.token_of(peer.request)
                # Without a token it may still present one.
                if token is not None or self._may_be_asked(peer.request) is None:
                    self._ask(peer, _Asked(token, is_message=False))

    def closed(self, peer: Peer) -> None:
        """Its connection is gone."""
        asked = self._asked.pop(peer, None)
        if asked is not None and asked.question is not None:
            asked.question.forget()
        self._no_stranger(peer)
        self._known.discard(peer)
        self._stop_timer(peer)
        for rates in self._rates.values():
            rates.forget(peer)

    def message(self, peer: Peer, data: bytes, is_text: bool) -> None:
        """A message of somebody without identity: only the right token gives one."""
        if peer.is_refused:
            return
        asked = self._asked.get(peer)
        if asked is not None:
            self._let_wait(peer, asked, data, is_text)
            return
        message: Message | None = None
        if is_text and len(data) <= _MAX_AUTH_BYTES:
            with contextlib.suppress(ServerError):
                message = decode(data, is_text=True, limits=self._limits)
        if isinstance(message, Auth):
            self.authenticate(peer, message)
        else:
            self._disconnect(peer)

    def authenticate(self, peer: Peer, message: Auth) -> None:
        """Answer ``message``. Somebody who is known may present another token of the same user
        and role, such as one that expires later.
        """
        if not self.needs_token:
            peer.send(_AUTH_ACK)
            return
        if peer in self._asked:
            peer.send_error(Busy("Who presented the last token is not known yet."))
            return
        found = self._credentials.identify(message.token, peer.remote_address)
        if found is None:
            self._ask(peer, _Asked(message.token, is_message=True))
        else:
            self._use_found(peer, found)

    def _use_found(self, peer: Peer, found: Identity | Refusal) -> None:
        if isinstance(found, Refusal):
            self._disconnect(peer, found.text.strip() if found.status == 429 else "")
        elif peer.identity is not None and (found.user, found.role) != (
            peer.identity.user,
            peer.role,
        ):
            self._disconnect(peer, "this token is of another user or role; connect again with it")
        else:
            self._admit(peer, found)
            peer.send(_AUTH_ACK)

    def _let_wait(self, peer: Peer, asked: _Asked, data: bytes, is_text: bool) -> None:
        asked.size += len(data) + _ENTRY_BYTES
        if asked.size > _MAX_WAITING_BYTES:
            size = _MAX_WAITING_BYTES
            self._disconnect(peer, f"over {size} bytes came before it was known from whom")
            peer.abort()
        else:
            asked.waiting.append((data, is_text))

    def _may_be_asked(self, request: HttpRequest) -> Refusal | None:
        """Why plugins are not asked about ``request``; None when they are."""
        return self._credentials.wait(request.remote_address, _presented(request, None))

    def _ask(self, peer: Peer, asked: _Asked) -> None:
        """Ask plugins about ``peer``."""
        assert peer.request is not None
        self._asked[peer] = asked

        def then(found: Identity | ServerError | None) -> None:
            self._told(peer, asked, found)

        asked.question = self._plugins.ask(peer.request, asked.token, then)

    def _told(self, peer: Peer, asked: _Asked, found: Identity | ServerError | None) -> None:
        if self._asked.get(peer) is not asked:
            return
        del self._asked[peer]
        assert peer.request is not None
        address = peer.remote_address
        if isinstance(found, Identity):
            self._credentials.right(address, _presented(peer.request, asked.token))
            if asked.is_message:
                self._use_found(peer, found)
            else:
                self._admit(peer, found)
        elif isinstance(found, ServerError):
            if isinstance(found, Unauthorized):
                self._credentials.wrong(address)
            self._disconnect(peer, str(found))
        elif asked.token is not None:
            self._use_found(peer, self._credentials.wrong(address))
        for data, is_text in asked.waiting:
            self._heard(peer, data, is_text)

    def check_rate(self, peer: Peer, message: Message) -> None:
        """Raise ``Busy`` when ``peer`` asks more often than its role may."""
        role = peer.role
        if isinstance(message, PluginMessage) and message.kind in OF_OPEN_OBJECTS:
            return
        if not isinstance(message, _NO_REQUESTS) and not self._may_ask(role, peer):
            text = (
                f"This connection sends more than {role.request_rate} requests a second, which is "
                f"the limit of role {role.name!r}."
            )
            raise Busy(text, getattr(message, "query_id", None))

    def _may_ask(self, role: Role, key: Peer | str) -> bool:
        rate = role.request_rate
        return not rate or self._rates.setdefault(rate, Rates(rate)).allows(key)

    def identify(self, request: HttpRequest, then: Callable[[Identity | Refusal], None]) -> None:
        """Tell ``then`` who sent ``request``, or why it is not answered. Later, if plugins are
        asked."""
        found: Identity | Refusal | None = self.refusal(request)
        if found is None and not self.needs_token:
            then(EVERYBODY)
            return
        found = found or self._over_http.of(request)
        if found is None and self._plugins:
            token = self._access.token_of(request)
            presented = _presented(request, token)
            found = self._over_http.wait(request.remote_address, presented)
            if found is None:
                self._plugins.ask(
                    request, token, lambda found: then(self._told_over_http(request, token, found))
                )
                return
        then(self._in_rate(found or Refusal(401, UNAUTHORIZED)))

    def _told_over_http(
        self, request: HttpRequest, token: str | None, found: Identity | ServerError | None
    ) -> Identity | Refusal:
        address = request.remote_address
        if isinstance(found, Identity):
            self._over_http.right(address, _presented(request, token))
            return self._in_rate(found)
        if found is None and token is None:
            return Refusal(401, UNAUTHORIZED)
        if found is None or isinstance(found, Unauthorized):
            self._over_http.wrong(address)
            return Refusal(401, UNAUTHORIZED if found is None else f"{UNAUTHORIZED}: {found}")
        log.warning("Could not tell who sent a request from %s: %s", address, found)
        return Refusal(503, f"{found}\n")

    def _in_rate(self, found: Identity | Refusal) -> Identity | Refusal:
        if isinstance(found, Refusal) or self._may_ask(found.role, found.user):
            return found
        role = found.role
        text = f"More than {role.request_rate} requests a second, the limit of role {role.name!r}."
        return Refusal(429, text)

    def known(self, request: HttpRequest) -> Identity | None:
        """Who sent ``request``, which is answered in any case, and at once; None for a stranger,
        and for somebody whom only plugins know."""
        if self._access.origins.refuses(request) is not None:
            return None
        if not self.needs_token:
            return EVERYBODY
        found = self._over_http.of(request)
        return None if isinstance(found, Refusal) else found

    def shared_with(self, request: HttpRequest) -> dict[str, str]:
        """The headers that let the page which sent ``request`` read the answer, if it may."""
        if "origin" not in request.headers:
            return {}
        may_come = self._access.origins.refuses(request) is None
        return shared_with(request, may_come=may_come)

    def refusal(self, request: HttpRequest) -> Refusal | None:
        """Why a page of that origin, or under that host name, may not come."""
        reason = self._access.origins.refuses(request)
        if reason is None:
            return None
        log.warning("Refused a request from %s: %s.", request.remote_address, reason)
        return Refusal(403, f"{reason}\n")

    def _admit(self, peer: Peer, identity: Identity) -> None:
        peer.identify(identity)
        self._no_stranger(peer)
        self._stop_timer(peer)
        if peer not in self._known:
            self._known.add(peer)
            self._admitted(peer)
        if identity.expires_at is not None:
            # The clock may be set, or the machine sleep, which timers do not notice.
            seconds = min(identity.expires_at - time.time(), _LOOK_SECONDS)
            self._after(seconds, peer, self._expire)

    def _no_stranger(self, peer: Peer) -> None:
        self._strangers.discard(peer)
        self._received.pop(peer, None)

    def _watch_strangers(self) -> None:
        if not self._is_watching and self._received:
            self._is_watching = True
            self._timers.after(_WATCH_SECONDS, lambda: self._post(self._look_at_strangers))

    def _look_at_strangers(self) -> None:
        """Disconnect those who send what only others may."""
        self._is_watching = False
        for peer, before in list(self._received.items()):
            most = _MAX_WAITING_BYTES if peer in self._asked else _MAX_STRANGER_BYTES
            if peer.received_bytes - before > most:
                self._disconnect(peer, "no token came first")
                # It may go on sending for as long as it is open.
                peer.abort()
        self._watch_strangers()

    def _give_up(self, peer: Peer) -> None:
        if peer in self._strangers:
            within = f"within {self._settings.auth_timeout} s (--auth-timeout)"
            asked = self._asked.get(peer)
            if asked is None or asked.question is None:
                self._disconnect(peer, f"no token came {within}")
            else:
                self._disconnect(
                    peer, f"plugin {asked.question.asked!r} did not tell who this is {within}"
                )

    def _expire(self, peer: Peer) -> None:
        identity = peer.identity
        if identity is None or identity.expires_at is None or peer not in self._known:
            return
        if identity.expires_at > time.time():
            self._admit(peer, identity)
        else:
            self._disconnect(peer, "the token has expired")

    def _disconnect(self, peer: Peer, reason: str = "") -> None:
        """Tell ``peer`` that it is not, or no longer, authorised, and close it."""
        text = f"{UNAUTHORIZED}: {reason}" if reason else UNAUTHORIZED
        peer.send_error(Unauthorized(text))
        self._close(peer, _POLICY, text)

    def _close(self, peer: Peer, code: int, reason: str) -> None:
        """Hear ``peer`` no more, and close it."""
        peer.is_refused = True
        peer.identify(None)
        self.closed(peer)
        log.warning("Closed a connection from %s: %s.", peer.remote_address, reason)
        peer.close(code, reason)
        # What it is being sent goes first, but not for long.
        self._timers.after(_CLOSE_SECONDS, lambda: self._post(peer.abort))

    def _after(self, seconds: float, peer: Peer, then: Callable[[Peer], None]) -> None:
        self._deadlines[peer] = self._timers.after(seconds, lambda: self._post(then, peer))

    def _stop_timer(self, peer: Peer) -> None:
        timer = self._deadlines.pop(peer, None)
        if timer is not None:
            timer.cancel()


def _presented(request: HttpRequest, token: str | None) -> str:
    """What somebody is known by: what plugins look at if there is no token."""
    return token or request.headers.get("cookie", "")
