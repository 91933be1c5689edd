"""The scheduler: fairness, parking, stopping in every state, and ends that come once."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sqlrooms_server.errors import Busy, Cancelled, ServerError, ShuttingDown
from sqlrooms_server.jobs import MAX_OPEN_PER_LANE, Job, Lane, Pause, Scheduler, State, Work
from sqlrooms_server.timers import Timers
from tests.wire import DEADLINE


class NamedLanes(Scheduler):
    """A scheduler whose lanes have names."""

    def __init__(self, workers: int, max_queue: int) -> None:
        self.timers = Timers()
        super().__init__(workers, max_queue, self.timers)
        self.lanes: defaultdict[object, Lane] = defaultdict(Lane)

    def on(self, lane: object, work: Work, *callbacks: Any) -> Job:
        return self.submit(self.lanes[lane], work, *callbacks)

    def close(self, deadline: float) -> bool:
        ended = super().close(deadline)
        self.timers.close()
        return ended


class Recorded:
    """A job with switches: ``go`` lets it advance, ``ended`` tells that it is done."""

    def __init__(self, scheduler: NamedLanes, lane: str, pauses: tuple[Pause, ...] = ()) -> None:
        self.began = threading.Event()
        self.go = threading.Event()
        self.ended = threading.Event()
        self.results: list[BaseException | None] = []
        self.interrupts = 0
        self.closed = False
        self.pauses = pauses
        self.job: Job = scheduler.on(lane, self._work(), self._interrupt, self._done)

    def _work(self) -> Work:
        try:
            self.began.set()
            assert self.go.wait(DEADLINE)
            yield from self.pauses
        finally:
            self.closed = True

    def _interrupt(self) -> None:
        self.interrupts += 1

    def _done(self, error: BaseException | None) -> None:
        self.results.append(error)
        self.ended.set()

    def finish(self) -> BaseException | None:
        self.go.set()
        assert self.ended.wait(DEADLINE)
        assert len(self.results) == 1
        return self.results[0]


@pytest.fixture
def schedule() -> Iterator[Callable[..., NamedLanes]]:
    made: list[NamedLanes] = []

    def make(workers: int = 1, max_queue: int = 100) -> NamedLanes:
        made.append(NamedLanes(workers, max_queue))
        return made[-1]

    yield make
    for scheduler in made:
        assert scheduler.close(time.monotonic() + DEADLINE)


def wait_for_state(job: Job, state: State) -> None:
    deadline = time.monotonic() + DEADLINE
    while job.state is not state:
        assert time.monotonic() < deadline, job.state
        time.sleep(0.001)


def test_a_job_runs_and_ends_once(schedule: Any) -> None:
    job = Recorded(schedule(), "a")
    assert job.began.wait(DEADLINE)
    wait_for_state(job.job, State.RUNNING)
    assert job.finish() is None
    wait_for_state(job.job, State.DONE)
    assert job.closed
    assert not job.job.stop(Cancelled("late"))


def test_an_error_is_handed_over(schedule: Any) -> None:
    errors: list[BaseException | None] = []
    ended = threading.Event()

    def work() -> Work:
        raise ValueError("broken")
        yield

    def done(error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    schedule().on("a", work(), lambda: None, done)
    assert ended.wait(DEADLINE)
    assert str(errors[0]) == "broken"


def test_lanes_take_turns(schedule: Any) -> None:
    scheduler = schedule()
    blocker = Recorded(scheduler, "blocker")
    assert blocker.began.wait(DEADLINE)
    order: list[str] = []
    ended = threading.Semaphore(0)

    def add(lane: str, name: str) -> None:
        def work() -> Work:
            order.append(name)
            return
            yield

        scheduler.on(lane, work(), lambda: None, lambda error: ended.release())

    for number in range(5):
        add("greedy", f"g{number}")
    add("modest", "m0")
    add("other", "o0")
    blocker.finish()
    for _ in range(7):
        assert ended.acquire(timeout=DEADLINE)
    assert order == ["g0", "m0", "o0", "g1", "g2", "g3", "g4"]


def test_a_full_queue_refuses(schedule: Any) -> None:
    scheduler = schedule(max_queue=2)
    running = Recorded(scheduler, "a")
    assert running.began.wait(DEADLINE)
    waiting = [Recorded(scheduler, "a") for _ in range(2)]
    with pytest.raises(Busy, match="--max-queue"):
        Recorded(scheduler, "b")
    running.finish()
    for job in waiting:
        job.finish()
    Recorded(scheduler, "b").finish()


def test_stopped_in_the_queue_never_begins(schedule: Any) -> None:
    scheduler = schedule()
    running = Recorded(scheduler, "a")
    assert running.began.wait(DEADLINE)
    waiting = Recorded(scheduler, "a")
    reason = Cancelled("stopped")
    assert waiting.job.stop(reason)
    assert waiting.ended.wait(DEADLINE)
    assert waiting.results == [reason]
    assert not waiting.began.is_set()
    assert running.finish() is None


def test_stopped_while_running_is_interrupted_again_and_again(schedule: Any) -> None:
    job = Recorded(schedule(), "a", (Pause.TURN,))
    assert job.began.wait(DEADLINE)
    reason = Cancelled("stopped")
    assert job.job.stop(reason)
    assert job.job.state is State.STOPPING
    deadline = time.monotonic() + DEADLINE
    while job.interrupts < 3:
        assert time.monotonic() < deadline
    assert job.finish() is reason


def test_work_that_finishes_anyway_is_no_error(schedule: Any) -> None:
    job = Recorded(schedule(), "a")
    assert job.began.wait(DEADLINE)
    job.job.stop(Cancelled("too late"))
    assert job.finish() is None


def test_a_parked_job_gives_its_worker_up_and_resumes(schedule: Any) -> None:
    scheduler = schedule()
    parked = Recorded(scheduler, "a", (Pause.FULL, Pause.FULL))
    parked.go.set()
    wait_for_state(parked.job, State.PARKED)
    assert Recorded(scheduler, "b").finish() is None
    parked.job.resume()
    wait_for_state(parked.job, State.PARKED)
    assert not parked.ended.is_set()
    deadline = time.monotonic() + DEADLINE
    while not parked.ended.is_set():
        parked.job.resume()
        assert time.monotonic() < deadline
    assert parked.results == [None]


def test_room_that_comes_before_parking_is_not_lost(schedule: Any) -> None:
    job = Recorded(schedule(), "a", (Pause.FULL,))
    assert job.began.wait(DEADLINE)
    job.job.resume()
    assert job.finish() is None


def test_a_parked_job_that_is_stopped_closes_what_it_holds(schedule: Any) -> None:
    scheduler = schedule()
    job = Recorded(scheduler, "a", (Pause.FULL,))
    job.go.set()
    wait_for_state(job.job, State.PARKED)
    reason = Cancelled("stopped")
    job.job.stop(reason)
    assert job.finish() is reason
    assert job.closed


def test_an_endless_job_yields_to_others(schedule: Any) -> None:
    scheduler = schedule()
    stop = threading.Event()
    ended = threading.Event()

    def endless() -> Work:
        while not stop.is_set():
            yield Pause.TURN

    scheduler.on("a", endless(), lambda: None, lambda error: ended.set())
    for _ in range(3):
        assert Recorded(scheduler, "b").finish() is None
    stop.set()
    assert ended.wait(DEADLINE)


def test_one_lane_holds_only_so_many_open_jobs(schedule: Any) -> None:
    scheduler = schedule(workers=2)
    parked = [Recorded(scheduler, "a", (Pause.FULL,)) for _ in range(MAX_OPEN_PER_LANE)]
    for job in parked:
        job.go.set()
    for job in parked:
        wait_for_state(job.job, State.PARKED)
    waiting = [Recorded(scheduler, "a") for _ in range(5)]
    assert Recorded(scheduler, "b").finish() is None
    assert not any(job.began.is_set() for job in waiting)
    for job in waiting:
        job.go.set()
    for job in parked:
        job.job.resume()
        assert job.finish() is None
    for job in waiting:
        assert job.finish() is None


def test_closing_stops_everything(schedule: Any) -> None:
    scheduler = NamedLanes(1, 10)
    running = Recorded(scheduler, "a", (Pause.TURN,))
    assert running.began.wait(DEADLINE)
    waiting = [Recorded(scheduler, "b") for _ in range(3)]
    threading.Timer(0.1, running.go.set).start()
    assert scheduler.close(time.monotonic() + DEADLINE)
    for job in (running, *waiting):
        assert [type(error) for error in job.results] == [ShuttingDown]
    with pytest.raises(ShuttingDown):
        Recorded(scheduler, "c")


def test_closing_leaves_behind_what_cannot_be_stopped() -> None:
    scheduler = NamedLanes(1, 10)
    stuck = Recorded(scheduler, "a", (Pause.TURN,))
    assert stuck.began.wait(DEADLINE)
    assert not scheduler.close(time.monotonic() + 0.2)
    assert isinstance(stuck.finish(), ShuttingDown)


def test_thousands_of_jobs_stopped_at_random_all_end_once(schedule: Any) -> None:
    """No job is lost or reported twice, whichever state its stop meets."""
    scheduler = schedule(workers=4, max_queue=10_000)
    results: list[list[BaseException | None]] = []
    ended = threading.Semaphore(0)

    def add(lane: int) -> Job:
        mine: list[BaseException | None] = []
        results.append(mine)

        def work() -> Work:
            for number in range(5):
                yield Pause.FULL if number % 2 else Pause.TURN

        def done(error: BaseException | None) -> None:
            mine.append(error)
            ended.release()

        return scheduler.on(lane, work(), lambda: None, done)  # type: ignore[no-any-return]

    jobs = [add(number % 7) for number in range(2000)]
    for number, job in enumerate(jobs):
        if number % 3 == 0:
            job.stop(Cancelled("stopped"))
    deadline = time.monotonic() + DEADLINE
    while any(job.state is not State.DONE for job in jobs):
        for job in jobs:
            job.resume()
        assert time.monotonic() < deadline
    for _ in jobs:
        assert ended.acquire(timeout=DEADLINE)
    assert all(len(mine) == 1 for mine in results)
    assert all(mine[0] is None or isinstance(mine[0], ServerError) for mine in results)


def test_a_stop_that_races_with_the_end_reports_it_once(schedule: Any) -> None:
    scheduler = schedule(workers=2)
    for _ in range(500):
        results: list[BaseException | None] = []
        ended = threading.Event()

        def work() -> Work:
            return
            yield

        def done(
            error: BaseException | None,
            results: list[BaseException | None] = results,
            ended: threading.Event = ended,
        ) -> None:
            results.append(error)
            ended.set()

        job = scheduler.on("a", work(), lambda: None, done)
        job.stop(Cancelled("race"))
        assert ended.wait(DEADLINE)
        wait_for_state(job, State.DONE)
        assert len(results) == 1


def test_every_worker_takes_work_that_waits(schedule: Any) -> None:
    """Long jobs that come together each find a worker, however many came before them."""
    scheduler = schedule(workers=8)
    jobs = [Recorded(scheduler, f"lane {number}") for number in range(2)]
    for job in jobs:
        assert job.began.wait(DEADLINE)
    jobs += [Recorded(scheduler, f"later {number}") for number in range(6)]
    for job in jobs:
        assert job.began.wait(DEADLINE)
    for job in jobs:
        assert job.finish() is None


def test_a_lane_for_one_runs_its_jobs_one_after_the_other(schedule: Any) -> None:
    scheduler = schedule(workers=4)
    scheduler.lanes["session"] = Lane(max_open=1)
    jobs = [Recorded(scheduler, "session", (Pause.FULL,)) for _ in range(3)]
    for number, job in enumerate(jobs):
        assert job.began.wait(DEADLINE)
        assert not any(later.began.is_set() for later in jobs[number + 1 :])
        job.go.set()
        wait_for_state(job.job, State.PARKED)
        assert not any(later.began.is_set() for later in jobs[number + 1 :])
        job.job.resume()
        assert job.finish() is None


def test_a_queued_job_knows_how_many_come_first(schedule: Any) -> None:
    scheduler = schedule()
    running = Recorded(scheduler, "a")
    assert running.began.wait(DEADLINE)
    queued = [Recorded(scheduler, "a") for _ in range(3)] + [Recorded(scheduler, "b")]
    assert [job.job.position() for job in (running, *queued)] == [0, 0, 2, 3, 1]
    for job in (running, *queued):
        job.go.set()
    for job in (running, *queued):
        assert job.finish() is None


def test_stops_and_resumes_at_the_same_time(schedule: Any) -> None:
    """Jobs that park again and again, resumed and stopped from the thread of the timers."""
    scheduler = schedule(workers=4, max_queue=1000)
    results: defaultdict[int, list[BaseException | None]] = defaultdict(list)
    closed: list[int] = []
    ended = threading.Semaphore(0)

    def start(number: int) -> Job:
        def work() -> Work:
            try:
                for _ in range(50):
                    scheduler.timers.after(number % 3 / 2000, lambda: job.resume())
                    yield Pause.FULL
            finally:
                closed.append(number)

        def done(error: BaseException | None) -> None:
            results[number].append(error)
            ended.release()

        job: Job = scheduler.on(number % 7, work(), lambda: None, done)
        if number % 2:
            reason = Cancelled("stopped")
            scheduler.timers.after(number % 23 / 1000, lambda: job.stop(reason))
        return job

    jobs = [start(number) for number in range(300)]
    for _ in jobs:
        assert ended.acquire(timeout=DEADLINE)
    assert all(len(result) == 1 for result in results.values())
    assert all(results[number] == [None] for number in range(0, 300, 2))
    assert len(closed) == len(set(closed))
    assert all(job.state is State.DONE for job in jobs)
    assert all(lane._open == 0 and not lane._waiting for lane in scheduler.lanes.values())


def test_to_stop_what_waits_takes_no_worker() -> None:
    scheduler = NamedLanes(1, 10)
    try:
        waits = Recorded(scheduler, "a", (Pause.WAIT,))
        waits.go.set()
        busy = Recorded(scheduler, "b")
        # The only worker has left the first job for the second one.
        assert busy.began.wait(DEADLINE)
        assert waits.job.stop(Cancelled("enough"))
        assert waits.job.state is State.DONE
        assert waits.closed
        assert [str(error) for error in waits.results] == ["enough"]
        waits.job.resume()
        assert not waits.job.stop(Cancelled("again"))
        busy.go.set()
        assert busy.ended.wait(DEADLINE)
        assert len(waits.results) == 1
    finally:
        assert scheduler.close(time.monotonic() + DEADLINE)


def test_what_waited_goes_on() -> None:
    scheduler = NamedLanes(1, 10)
    try:
        waits = Recorded(scheduler, "a", (Pause.WAIT, Pause.WAIT))
        waits.go.set()
        while not waits.ended.wait(0):
            waits.job.resume()
        assert waits.results == [None]
    finally:
        assert scheduler.close(time.monotonic() + DEADLINE)
