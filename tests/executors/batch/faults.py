"""A batch system that loses replies, is away for a while, forgets jobs: each as it is told."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    JobState,
    JobStatus,
    SchedulerError,
    SubmissionRefusedError,
)
from tests.executors.batch.processes import ProcessScheduler


class FaultyScheduler(ProcessScheduler):
    """As the one that it derives from, but for what it is told to do wrong.

    Attributes:
        refuses: queues whose arrays are refused.
        loses: how many replies to submissions are lost, the jobs being there.
        drops: how many submissions are lost together with their replies.
        doubles: how many submissions are done twice, the reply being lost.
        hides: whether `find` finds nothing.
        is_away: whether questions are not answered.
        cancels_nothing: whether jobs cannot be cancelled.
        statuses: what it says of jobs, by id, instead of the truth.
        gate: is waited for within each submission.
        late: requests whose submissions were lost.
        cancelled: the ids that were to be cancelled.
        most_jobs: how many jobs there were at a time, waiting or running, at the most.
    """

    def __init__(self, places: int = 4) -> None:
        super().__init__(places)
        self.refuses: set[str] = set()
        self.loses = self.drops = self.doubles = 0
        self.hides = self.is_away = self.cancels_nothing = False
        self.statuses: dict[str, JobStatus] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.late: list[ArrayRequest] = []
        self.cancelled: list[str] = []
        self.most_jobs = 0

    def submit(self, request: ArrayRequest) -> Sequence[str]:
        self.asked.append("submission")
        assert self.gate.wait(60)
        if request.queue in self.refuses:
            raise SubmissionRefusedError(f"invalid queue: {request.queue}")
        if self.drops:
            self.drops -= 1
            self.late.append(request)
            raise SchedulerError("the connection timed out")
        ids = super().submit(request)
        with self._lock:
            self.most_jobs = max(self.most_jobs, len(self._queue) + len(self._running))
        if self.doubles:
            self.doubles -= 1
            super().submit(request)
            raise SchedulerError("the connection timed out")
        if self.loses:
            self.loses -= 1
            raise SchedulerError("the connection timed out")
        return ids

    def come_late(self) -> None:
        """What was lost on its way arrives, all the same."""
        for request in self.late:
            super().submit(request)

    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        if self.is_away:
            raise SchedulerError("the controller is away")
        self.asked.append("find")
        if self.hides:
            return []
        with self._lock:
            ids = [id for id, (known, _) in self._jobs.items() if known.name == request.name]
        return [ids[start : start + request.count] for start in range(0, len(ids), request.count)]

    def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        if self.is_away:
            self.asked.append("states")
            raise SchedulerError("the controller is away")
        return {**super().states(jobs), **{id: self.statuses[id] for id in jobs if id in self.statuses}}

    def cancel(self, jobs: Mapping[str, str]) -> None:
        self.cancelled += jobs
        if self.cancels_nothing:
            raise SchedulerError("the controller is away")
        super().cancel(jobs)

    def hold(self) -> None:
        """Start no more jobs."""
        with self._lock:
            self._places = 0

    def release(self, places: int = 4) -> None:
        with self._lock:
            self._places = places
            self._start_some()

    def forget(self, *jobs: str) -> None:
        for id in jobs:
            self.statuses[id] = JobStatus(JobState.LOST)

    def ids(self) -> list[str]:
        """Of all jobs that there ever were."""
        with self._lock:
            return list(self._jobs)

    def await_job(self, id: str) -> None:
        """Until the job has ended."""
        from fractal_runner.testing import wait_until

        wait_until(lambda: id in self._ended, f"job {id} has ended")


def executor_over(scheduler: ProcessScheduler, folder: Any, **options: Any) -> BatchExecutor:
    """Quick in all that it waits for."""
    return BatchExecutor(scheduler, folder, **{"poll_interval": 1.0, "grace": 0.2, **options})
