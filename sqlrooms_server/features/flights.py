"""Runs that several requests share: equal queries in flight run once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlrooms_server.cache import Entry, Key, Overflow
from sqlrooms_server.db.cursor import Cursor
from sqlrooms_server.db.versions import Token
from sqlrooms_server.errors import Cancelled, ServerError
from sqlrooms_server.features.requests import Request, as_server_error
from sqlrooms_server.jobs import Job, Lane, Scheduler, Work


class Flight:
    """One run and the requests that wait for it, each for itself.

    ``cursor`` and ``job`` are what computes. After :attr:`is_over`, ``entry`` is the result;
    without one ``failure`` says why, or the result is too large to share.
    """

    def __init__(self, token: Token) -> None:
        self.token = token
        self.cursor: Cursor | None = None
        self.job: Job | None = None
        self.is_over = False
        self.entry: Entry | None = None
        self.failure: ServerError | None = None
        self._waiting: dict[Request, Callable[[], None]] = {}

    def interrupt(self) -> None:
        """Cut short what the run does. From any thread."""
        if self.cursor is not None:
            self.cursor.interrupt()


class Flights:
    """The runs under way, by what they compute. Called by workers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._flights: dict[Key, Flight] = {}

    def join(
        self, key: Key, token: Token, request: Request, on_over: Callable[[], None]
    ) -> tuple[Flight, bool]:
        """The run that computes ``key`` as of ``token``, and whether it is a new one.

        ``request`` is one that waits for it, until :meth:`leave`; ``on_over`` is called when it is
        over. A new one must be begun.
        """
        with self._lock:
            flight = self._flights.get(key)
            is_new = flight is None or flight.token != token
            if flight is None or is_new:
                # One of an older state goes on for those who asked before the change.
                flight = self._flights[key] = Flight(token)
            flight._waiting[request] = on_over
            return flight, is_new

    def begin(
        self, key: Key, flight: Flight, lane: Lane, work: Work, on_entry: Callable[[], None]
    ) -> None:
        """Run ``work``, which sets ``flight.entry`` or raises ``Overflow``.

        ``lane`` is one for the runs of whoever began it, who waits in another one. ``on_entry`` is
        called before anybody who waits. Raises ``ShuttingDown``.
        """

        def done(error: BaseException | None) -> None:
            if error is None:
                on_entry()
            elif not isinstance(error, Overflow):
                flight.failure = as_server_error(error)
            self._over(key, flight)

        try:
            flight.job = self._scheduler.submit(
                lane, work, flight.interrupt, done, even_if_full=True
            )
        except ServerError as error:
            flight.failure = error
            self._over(key, flight)

    def leave(self, key: Key, flight: Flight, request: Request) -> None:
        """``request`` waits no more. A run that nobody waits for is cancelled."""
        with self._lock:
            flight._waiting.pop(request, None)
            if flight.is_over or flight._waiting:
                return
            if self._flights.get(key) is flight:
                del self._flights[key]
        if flight.job is not None:
            flight.job.stop(Cancelled("Nobody waits for the result any more."))

    def _over(self, key: Key, flight: Flight) -> None:
        with self._lock:
            flight.is_over = True
            if self._flights.get(key) is flight:
                del self._flights[key]
            waiting = list(flight._waiting.values())
        for on_over in waiting:
            on_over()
