"""The gate of WebSockets: who gets in, until when, and what becomes of those who do not."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from sqlrooms_server.access import EVERYBODY, Access, Identity
from sqlrooms_server.access.credentials import UNAUTHORIZED, Credentials
from sqlrooms_server.access.strangers import Strangers
from sqlrooms_server.access.token_file import TokenFile
from sqlrooms_server.errors import Busy, ServerError, StartupError, Unauthorized
from sqlrooms_server.gate.floods import Floods
from sqlrooms_server.gate.http import HttpGate
from sqlrooms_server.gate.questions import MAX_WAITING_BYTES, Asked, Plugins, Questions, presented
from sqlrooms_server.gate.request_rates import RequestRates
from sqlrooms_server.messages import Auth, Message
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import Limits, decode, encode
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timer, Timers
from sqlrooms_server.transport import HttpRequest, Refusal

log = logging.getLogger(__name__)

# An auth message; anything longer from a stranger is not worth decoding.
_MAX_AUTH_BYTES = 16 << 10

# What a stranger may send in all: an auth message with its frame, and what the TLS library reads
# ahead.
_MAX_STRANGER_BYTES = 64 << 10

_AUTH_ACK = encode({"type": "authAck"})

_CLOSE_SECONDS = 2.0

# How often it is looked whether a token has expired, besides when it should have.
_LOOK_SECONDS = 60.0

# RFC 6455, section 7.4, and its registry: "Policy Violation", and "Service Restart", after which
# clients come back.
_POLICY = 1008
_RESTART = 1012


class Gate:
    """Stands before every kind of frame; ``http`` stands before every request, and ``rates``
    knows who asks too often.

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
        self._questions = Questions(plugins, self._told)
        self.rates = RequestRates()
        max_failures, others_know = settings.max_auth_failures, bool(plugins)
        self._credentials = Credentials(access, max_failures, others_know=others_know)
        # Pages can send requests with wrong tokens, and browsers do not tell the origin of images.
        # That must not keep a visitor of such a page from connecting.
        self._over_http = Credentials(access, max_failures, others_know=others_know)
        self.http = HttpGate(access, self._over_http, plugins, self.rates)
        # Those that are connected and have not said who they are.
        self._strangers: Strangers[Peer] = Strangers(settings.max_strangers)
        self._floods = Floods(timers, post, self._most_bytes, self._flooded)
        # Those that are known.
        self._known: set[Peer] = set()
        # When a stranger has waited too long, and when an identity expires.
        self._deadlines: dict[Peer, Timer] = {}

    @property
    def needs_token(self) -> bool:
        return self._credentials.needs_token

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
        refusal = self.http.refusal(request)
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
            self._floods.add(peer)
            self._after(self._settings.auth_timeout, peer, self._give_up)
            if self._plugins and peer.request is not None:
                token = self._access.token_of(peer.request)
                # Without a token it may still present one.
                if token is not None or self._may_be_asked(peer.request) is None:
                    self._questions.ask(peer, token, is_message=False)

    def closed(self, peer: Peer) -> None:
        """Its connection is gone."""
        self._questions.forget(peer)
        self._no_stranger(peer)
        self._known.discard(peer)
        self._stop_timer(peer)
        self.rates.forget(peer)

    def message(self, peer: Peer, data: bytes, is_text: bool) -> None:
        """A message of somebody without identity: only the right token gives one."""
        if peer.is_refused:
            return
        if peer in self._questions:
            self._let_wait(peer, data, is_text)
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
        if peer in self._questions:
            peer.send_error(Busy("Who presented the last token is not known yet."))
            return
        found = self._credentials.identify(message.token, peer.remote_address)
        if found is None:
            self._questions.ask(peer, message.token, is_message=True)
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

    def _let_wait(self, peer: Peer, data: bytes, is_text: bool) -> None:
        if not self._questions.keep(peer, data, is_text):
            most = MAX_WAITING_BYTES
            self._disconnect(peer, f"over {most} bytes came before it was known from whom")
            peer.abort()

    def _may_be_asked(self, request: HttpRequest) -> Refusal | None:
        """Why plugins are not asked about ``request``; None when they are."""
        return self._credentials.wait(request.remote_address, presented(request, None))

    def _told(self, peer: Peer, asked: Asked, found: Identity | ServerError | None) -> None:
        assert peer.request is not None
        address = peer.remote_address
        if isinstance(found, Identity):
            self._credentials.right(address, presented(peer.request, asked.token))
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
        self._floods.discard(peer)

    def _most_bytes(self, peer: Peer) -> int:
        return MAX_WAITING_BYTES if peer in self._questions else _MAX_STRANGER_BYTES

    def _flooded(self, peer: Peer) -> None:
        self._disconnect(peer, "no token came first")
        # It may go on sending for as long as it is open.
        peer.abort()

    def _give_up(self, peer: Peer) -> None:
        if peer in self._strangers:
            within = f"within {self._settings.auth_timeout} s (--auth-timeout)"
            plugin = self._questions.awaited(peer)
            if plugin is None:
                self._disconnect(peer, f"no token came {within}")
            else:
                self._disconnect(peer, f"plugin {plugin!r} did not tell who this is {within}")

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
        log.warning("Closed a connection from %s: %s.", peer.remote_address, reason.rstrip("."))
        peer.close(code, reason)
        # What it is being sent goes first, but not for long.
        self._timers.after(_CLOSE_SECONDS, lambda: self._post(peer.abort))

    def _after(self, seconds: float, peer: Peer, then: Callable[[Peer], None]) -> None:
        self._deadlines[peer] = self._timers.after(seconds, lambda: self._post(then, peer))

    def _stop_timer(self, peer: Peer) -> None:
        timer = self._deadlines.pop(peer, None)
        if timer is not None:
            timer.cancel()
