"""Jobs: work that blocks, done by worker threads, stoppable in every state.

The states of a job and its allowed steps::

    queued  -> running   a worker took it
    queued  -> done      stopped before it began
    running -> parked    its reader is slow, or others wait and its turn is over
    running -> stopping  stopped: it is interrupted every 20 ms until it gives up
    running -> done      finished or failed
    parked  -> running   there is room again, or its turn has come, and a worker took it
    parked  -> stopping  stopped: a worker closes what it holds
    parked  -> done      stopped while it waited and held nothing
    stopping -> done     gave up, or finished anyway

A job reaches done, and its callback runs, exactly once.
"""

from __future__ import annotations

import enum
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator

from sqlrooms_server.errors import Busy, ServerError, ShuttingDown
from sqlrooms_server.timers import Timers

log = logging.getLogger(__name__)

# One interrupt is forgotten when it comes before the statement starts, so it is repeated.
INTERRUPT_INTERVAL = 0.02

# A job that could go on gives its worker up after this time when others wait.
TURN = 0.05

# A job that takes longer does not count against the cores any more.
_SHORT = 0.02

# Jobs of one lane at one time. Single messages leave a connection one after the other, so more
# would only hold more memory: each open result keeps DuckDB's streaming buffer and ready chunks.
MAX_OPEN_PER_LANE = 8


class State(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    PARKED = "parked"
    STOPPING = "stopping"
    DONE = "done"


class Pause(enum.Enum):
    """What the work of a job yields."""

    TURN = "turn"
    """It could go on; others may come first."""
    FULL = "full"
    """It cannot go on before :meth:`Job.resume`."""
    WAIT = "wait"
    """As FULL, and it holds nothing: to stop it takes no worker, of which none may be free before
    what it waits for has ended."""


Work = Generator[Pause, None, None]


def _nothing(*_: object) -> None:
    """In place of the callbacks of a job that is done."""


class Lane:
    """Whoever must not be able to starve the others, that is a connection or a session.

    Lanes take turns, and within one the oldest job goes first. At most ``max_open`` of its jobs
    have begun and not ended; with one, they run strictly one after the other.
    """

    __slots__ = ("_has_turn", "_max_open", "_open", "_waiting")

    def __init__(self, max_open: int = MAX_OPEN_PER_LANE) -> None:
        self._max_open = max_open
        self._open = 0
        self._waiting: deque[Job] = deque()
        self._has_turn = False


class Job:
    """One piece of work and its state. Made by :meth:`Scheduler.submit`.

    ``submitted`` and ``began`` are times of ``time.monotonic``, ``worked`` the seconds that
    workers have spent on it in turns that are over.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lane: Lane,
        work: Work,
        interrupt: Callable[[], None],
        done: Callable[[BaseException | None], None],
    ) -> None:
        self.state = State.QUEUED
        self.stopped: ServerError | None = None
        self.submitted = time.monotonic()
        self.began: float | None = None
        self.worked = 0.0
        self._scheduler = scheduler
        self._lane = lane
        self._work = work
        self._interrupt = interrupt
        self._done = done
        # There is room again, though the work has not yet said that there is none.
        self._room = False
        # In the queue of jobs that go on.
        self._is_ready = False
        # Whether it holds nothing while it is parked.
        self._waits = False

    def resume(self) -> None:
        """There is room again for what the work produces. From any thread."""
        self._scheduler._resume(self)

    @property
    def others_wait(self) -> bool:
        """Whether another job could run if this one paused."""
        return self._scheduler._has_work()

    def position(self) -> int:
        """About how many jobs come before this one while it is queued."""
        return self._scheduler._position(self)

    def stop(self, reason: ServerError) -> bool:
        """Ask the job to give up with ``reason``; False when it is done already.

        From any thread, never blocks. Work that finishes anyway is reported as finished.
        """
        return self._scheduler._stop(self, reason)


class Scheduler:
    """A bounded queue, fair between lanes, before a fixed number of worker threads."""

    def __init__(
        self, workers: int, max_queue: int, timers: Timers, *, name: str = "worker"
    ) -> None:
        self._max_queue = max_queue
        self._timers = timers
        self._lock = threading.Lock()
        self._queued = 0
        self._jobs: set[Job] = set()
        self._turns: deque[Lane] = deque()
        self._ready: deque[Job] = deque()
        self._prefer_ready = False
        self._closed = False
        self._ended = False
        self._all_done = threading.Condition(self._lock)
        # Locks on which idle workers sleep. The last one to fall asleep is woken first, because
        # its memory is still in the caches: a tenth of the time of a small query.
        self._asleep: list[threading.Lock] = []
        # When each of the others began its job.
        self._began: dict[threading.Lock, float] = {}
        # More than one worker for each core only makes short jobs slower, while long ones must
        # not block the rest. So one more stands by, and joins when those at work take long.
        self._standby: threading.Lock | None = None
        self._cores = os.cpu_count() or 1
        self._threads = [
            threading.Thread(target=self._run_worker, name=f"{name}-{number}")
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        lane: Lane,
        work: Work,
        interrupt: Callable[[], None],
        done: Callable[[BaseException | None], None],
        *,
        even_if_full: bool = False,
    ) -> Job:
        """Queue ``work``, a generator that workers advance and that may pause.

        ``interrupt`` cuts short, from another thread, what the generator is doing. ``done`` is
        called once, from any thread, with the error or None. Raises ``Busy``, not with
        ``even_if_full``, or ``ShuttingDown``; then ``done`` is not called.
        """
        job = Job(self, lane, work, interrupt, done)
        with self._lock:
            if self._closed:
                raise ShuttingDown("The server is shutting down.")
            if self._queued >= self._max_queue and not even_if_full:
                raise Busy(
                    f"{self._queued} queries are waiting, which is the limit (--max-queue); "
                    "try again later."
                )
            self._queued += 1
            self._jobs.add(job)
            lane._waiting.append(job)
            self._give_turn(lane)
        return job

    def running(self) -> list[Job]:
        """The jobs that workers are at work on."""
        with self._lock:
            return [job for job in self._jobs if job.state in (State.RUNNING, State.STOPPING)]

    def close(self, deadline: float) -> bool:
        """Stop every job with ``ShuttingDown``, then the workers; True when all ended in time.

        ``deadline`` is on the clock of ``time.monotonic``. A worker that outlives it is left
        behind.
        """
        with self._lock:
            self._closed = True
            # Those that wait first: ending one that runs would let a worker start one of them.
            jobs = sorted(self._jobs, key=lambda job: job.state is not State.QUEUED)
        for job in jobs:
            job.stop(ShuttingDown("The server is shutting down."))
        with self._all_done:
            timeout = max(0.0, deadline - time.monotonic())
            self._all_done.wait_for(lambda: not self._jobs, timeout)
            self._ended = True
            while self._asleep:
                self._asleep.pop().release()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run_worker(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        while True:
            pause = -1.0
            with self._lock:
                self._began.pop(wake, None)
                if not self._has_work():
                    if self._ended:
                        return
                    job = None
                    self._fall_asleep(wake)
                elif self._is_crowded():
                    job = None
                    if self._standby in (None, wake):
                        self._standby = wake
                        pause = _SHORT
                    else:
                        self._fall_asleep(wake)
                else:
                    self._began[wake] = time.monotonic()
                    job = self._take()
                    if self._standby is wake:
                        self._standby = None
                    if self._has_work():
                        self._wake_one()
            if job is not None:
                self._advance(job)
            else:
                wake.acquire(timeout=pause)

    def _has_work(self) -> bool:
        return bool(self._ready or self._turns)

    def _is_crowded(self) -> bool:
        """Whether as many workers as there are cores have just begun, and will end soon."""
        recent = time.monotonic() - _SHORT
        return sum(began > recent for began in self._began.values()) >= self._cores

    def _fall_asleep(self, wake: threading.Lock) -> None:
        if self._standby is wake:
            self._standby = None
        self._asleep.append(wake)

    def _wake_one(self) -> None:
        """There is more to do. When nobody sleeps, the next one to finish finds it.

        A worker that takes a job wakes the next one while there is work.
        """
        if not self._asleep:
            return
        if self._is_crowded():
            if self._standby is not None:
                return
            self._standby = self._asleep[-1]
        self._asleep.pop().release()

    def _take(self) -> Job:
        # New jobs and those under way take turns, so that neither starves the other.
        self._prefer_ready = not self._prefer_ready
        if self._ready and (self._prefer_ready or not self._turns):
            job = self._ready.popleft()
            job._is_ready = False
            if job.state is State.PARKED:
                job.state = State.RUNNING
            return job
        lane = self._turns.popleft()
        lane._has_turn = False
        job = lane._waiting.popleft()
        lane._open += 1
        self._queued -= 1
        self._give_turn(lane)
        job.state = State.RUNNING
        job.began = time.monotonic()
        return job

    def _give_turn(self, lane: Lane) -> None:
        """Let the next job of ``lane`` begin when its turn comes, if there is one that may."""
        if lane._waiting and not lane._has_turn and lane._open < lane._max_open:
            lane._has_turn = True
            self._turns.append(lane)
            self._wake_one()

    def _add_ready(self, job: Job) -> None:
        if not job._is_ready:
            job._is_ready = True
            self._ready.append(job)
            self._wake_one()

    def _advance(self, job: Job) -> None:
        """Run the work until it ends or pauses for good."""
        began = time.monotonic()
        outcome: BaseException | None = None
        try:
            while True:
                if job.stopped is not None:
                    job._work.throw(job.stopped)
                pause = next(job._work)
                if job.stopped is None and self._may_park(job, pause, began):
                    return
        except StopIteration:
            pass
        except BaseException as error:  # worker-top guard: the error goes to the job's owner
            # Without the traceback, which would keep what the work held until a collection.
            outcome = job.stopped.with_traceback(None) if job.stopped else error
        job.worked += time.monotonic() - began
        self._finish(job, outcome)
        # Its traceback knows this frame.
        del outcome

    def _may_park(self, job: Job, pause: Pause, began: float) -> bool:
        """Park ``job``, whose turn began at ``began``, if there is a reason to."""
        with self._lock:
            if job.stopped is not None:
                return False
            now = time.monotonic()
            if pause is not Pause.TURN:
                if job._room:
                    job._room = False
                    return False
                job.state = State.PARKED
                job._waits = pause is Pause.WAIT
            elif (self._turns or self._ready) and now > began + TURN:
                job.state = State.PARKED
                job._waits = False
                self._add_ready(job)
            else:
                return False
            job.worked += now - began
            return True

    def _resume(self, job: Job) -> None:
        with self._lock:
            if job.state is not State.PARKED:
                # It has not got as far as parking; it will find the room when it does.
                job._room = job.state is State.RUNNING
            else:
                self._add_ready(job)

    def _position(self, job: Job) -> int:
        with self._lock:
            if job.state is not State.QUEUED:
                return 0
            rounds = ahead = job._lane._waiting.index(job)
            # Lanes before this one in the circle have one turn more before the job than it has.
            turns = rounds + 1
            for lane in self._turns:
                if lane is job._lane:
                    turns = rounds
                else:
                    ahead += min(len(lane._waiting), turns)
            return ahead

    def _stop(self, job: Job, reason: ServerError) -> bool:
        with self._lock:
            if job.state is State.DONE or job.stopped is not None:
                return job.state is not State.DONE
            job.stopped = reason
            state = job.state
            is_idle = True
            if state is State.QUEUED:
                self._forget_queued(job)
            elif state is State.PARKED and job._waits and not job._is_ready:
                self._forget_waiting(job)
            else:
                is_idle = False
                job.state = State.STOPPING
                if state is State.PARKED:
                    self._add_ready(job)
        if is_idle:
            job._work.close()
            self._call_done(job, reason)
        elif state is State.RUNNING:
            self._interrupt(job)
        return True

    def _interrupt(self, job: Job) -> None:
        """Interrupt ``job`` again and again until it is done."""
        if job.state is not State.DONE:
            self._timers.after(INTERRUPT_INTERVAL, lambda: self._interrupt(job))
            job._interrupt()

    def _forget_queued(self, job: Job) -> None:
        job.state = State.DONE
        self._queued -= 1
        self._jobs.discard(job)
        lane = job._lane
        lane._waiting.remove(job)
        if not lane._waiting and lane._has_turn:
            lane._has_turn = False
            self._turns.remove(lane)
        self._all_done.notify_all()

    def _forget_waiting(self, job: Job) -> None:
        job.state = State.DONE
        self._jobs.discard(job)
        job._lane._open -= 1
        self._give_turn(job._lane)
        self._all_done.notify_all()

    def _finish(self, job: Job, error: BaseException | None) -> None:
        lane = job._lane
        with self._lock:
            job.state = State.DONE
            lane._open -= 1
            self._give_turn(lane)
        self._call_done(job, error)
        with self._lock:
            self._jobs.discard(job)
            if not self._jobs:
                self._all_done.notify_all()

    @staticmethod
    def _call_done(job: Job, error: BaseException | None) -> None:
        try:
            job._done(error)
        except BaseException:  # worker-top guard: a defect in a callback must not end the worker
            log.exception("The callback of a job failed.")
        # Their owner knows the job: a circle that would keep all of it until a collection.
        job._done = job._interrupt = _nothing
