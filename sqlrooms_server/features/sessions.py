"""Sessions: queries of one connection that share a cursor and run in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.shared_cursor import SharedCursor
from sqlrooms_server.errors import Busy, Gone, ServerError
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.requests import as_server_error
from sqlrooms_server.jobs import Lane, Scheduler, Work
from sqlrooms_server.messages import CloseSession
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol import encode
from sqlrooms_server.timers import Timer, Timers

log = logging.getLogger(__name__)

# Sessions of one connection that ended by themselves and were not closed since.
_MAX_GONE = 256


class Session:
    """One session. Its jobs run in its lane, one at a time."""

    def __init__(self, engine: Engine) -> None:
        self.lane = Lane(max_open=1)
        self.pending = 0
        self.idle: Timer | None = None
        self._shared = SharedCursor(engine)

    def cursor(self, policy: Policy) -> Cursor:
        """The cursor for one job, which ``policy`` bounds. For the worker."""
        return self._shared.for_job(policy)

    def close(self) -> None:
        """Roll back and free what the session holds. For the worker, or when none is left."""
        self._shared.close()


class Sessions(Feature):
    """The sessions of all connections. A feature: it answers ``closeSession``."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        timers: Timers,
        post: Callable[..., None],
        *,
        idle_timeout: float,
        max_per_connection: int,
        max_sessions: int,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._timers = timers
        self._post = post
        self._idle_timeout = idle_timeout
        self._max_per_connection = max_per_connection
        self._max_sessions = max_sessions
        self._of_peer: dict[Peer, dict[str, Session]] = {}
        self._gone: dict[Peer, set[str]] = {}
        # Those whose cursor is not closed yet, too.
        self._open: set[Session] = set()

    @property
    def handlers(self) -> Mapping[type, MessageHandler]:
        return {CloseSession: self._close}

    def use(self, peer: Peer, name: str) -> Session:
        """The session ``name`` of ``peer``, which begins if it is new.

        Followed by one :meth:`used`. Raises ``Gone`` or ``Busy``.
        """
        sessions = self._of_peer.setdefault(peer, {})
        session = sessions.get(name)
        if session is None:
            session = self._begin(peer, name, sessions)
        session.pending += 1
        if session.idle is not None:
            session.idle.cancel()
            session.idle = None
        return session

    def used(self, peer: Peer, name: str, session: Session) -> None:
        """A query of the session ended; it is idle after the last one."""
        session.pending -= 1
        if not session.pending and self._of_peer.get(peer, {}).get(name) is session:
            session.idle = self._timers.after(
                self._idle_timeout, lambda: self._post(self._expire, peer, name, session)
            )

    def closed(self, peer: Peer) -> None:
        self._gone.pop(peer, None)
        for session in self._of_peer.pop(peer, {}).values():
            self._end(session)

    def close_all(self) -> None:
        """After the last job: free what is left."""
        for session in self._open:
            session.close()
        self._open.clear()

    def _begin(self, peer: Peer, name: str, sessions: dict[str, Session]) -> Session:
        gone = self._gone.get(peer, set())
        if name in gone:
            raise Gone(
                f"Session {name!r} ended after {self._idle_timeout:g} s without use "
                "(--session-idle-timeout) and was rolled back; closeSession frees its name."
            )
        if len(gone) >= _MAX_GONE:
            raise Busy(f"{len(gone)} sessions of this connection ended; use closeSession for them.")
        if len(sessions) >= self._max_per_connection:
            raise Busy(
                f"This connection has {len(sessions)} sessions, which is the limit "
                "(--max-sessions-per-connection); end one with closeSession."
            )
        if len(self._open) >= self._max_sessions:
            raise Busy(
                f"The server has {len(self._open)} sessions, which is the limit (--max-sessions)."
            )
        session = sessions[name] = Session(self._engine)
        self._open.add(session)
        return session

    def _close(self, peer: Peer, message: CloseSession) -> None:
        session = self._of_peer.get(peer, {}).pop(message.session, None)
        answer = {"type": "sessionClosed", "session": message.session}
        if session is None:
            self._gone.get(peer, set()).discard(message.session)
            peer.send(encode({**answer, "closed": False}))
            return

        def told(error: ServerError | None) -> None:
            if error is None:
                peer.send(encode({**answer, "closed": True}))
            else:
                peer.send_error(error)

        self._end(session, told)

    def _expire(self, peer: Peer, name: str, session: Session) -> None:
        sessions = self._of_peer.get(peer, {})
        if session.pending or sessions.get(name) is not session:
            return
        log.info("Session of %s ended after %g s without use.", peer.id, self._idle_timeout)
        del sessions[name]
        self._gone.setdefault(peer, set()).add(name)
        self._end(session)

    def _end(
        self, session: Session, told: Callable[[ServerError | None], None] = lambda error: None
    ) -> None:
        """Close ``session`` after its last query, then call ``told`` on the loop thread.

        When the server stops first, :meth:`close_all` closes it, and ``told`` gets the error.
        """
        if session.idle is not None:
            session.idle.cancel()

        def work() -> Work:
            session.close()
            return
            yield  # a job is a generator, also one that never pauses

        def done(error: BaseException | None) -> None:
            self._post(self._ended, session, told, error)

        try:
            self._scheduler.submit(session.lane, work(), lambda: None, done, even_if_full=True)
        except ServerError as error:
            told(error)

    def _ended(
        self,
        session: Session,
        told: Callable[[ServerError | None], None],
        error: BaseException | None,
    ) -> None:
        if error is None:
            self._open.discard(session)
        told(None if error is None else as_server_error(error))
