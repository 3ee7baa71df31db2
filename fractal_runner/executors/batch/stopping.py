"""Telling jobs what to end, and the scheduler which jobs to cancel."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.batch.errands import Errands, Note
from fractal_runner.executors.batch.jobs import Array, Item, Job, Roster
from fractal_runner.executors.batch.records import Kind, RecordLog
from fractal_runner.executors.batch.scheduler import Scheduler

_AGAIN_S = 1.0
_CANCEL_LIMIT_S = 60.0
_STOP_S = 10.0  # within which a job that has nothing left to do has to end by itself
_logger = logging.getLogger("fractal_runner")


class Stopping:
    """What is still to be said. The manager's thread owns it.

    Args:
        scheduler: the batch system.
        roster: the jobs that are followed.
        errands: the threads beside the manager's.
        on_dropped: is told when a job is followed no more.
        sync: whether what is said has to be written through to a file system over the network.
        name: the executor's.
        clock: seconds, which never go back.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        roster: Roster,
        errands: Errands,
        on_dropped: Callable[[], None],
        sync: bool,
        name: str,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._roster = roster
        self._errands = errands
        self._on_dropped = on_dropped
        self._sync = sync
        self._name = name
        self._clock = clock
        self._places: dict[Job, list[int]] = {}  # calls to end, by their places
        self._cancels: list[str] = []
        self._cancel_at = 0.0
        self._refused_since: float | None = None  # the scheduler does not take them

    @property
    def is_idle(self) -> bool:
        return not self._places and not self._cancels

    def due(self) -> float:
        """When there is something to do."""
        if self._places:
            return 0.0
        due = self._cancel_at if self._cancels and not self._errands.asking else math.inf
        return min((job.stop_by for job in self._roster.jobs if job.stop_by is not None), default=due)

    def stop(self, items: Sequence[Item]) -> None:
        """End calls that run."""
        for item in items:
            item.stopping = True
            if (job := item.job) is None:  # between two jobs
                item.call.fail(stopped_error(item.call))
            elif job in self._roster.jobs:
                self._places.setdefault(job, []).append(item.place)

    def cancelled(self, item: Item) -> None:
        """A call was cancelled that has not started, as far as anybody knows."""
        job = item.job
        if job is not None and job.items.pop(item.place, None) is not None:
            item.job = None
            if job in self._roster.jobs:
                self._places.setdefault(job, []).append(item.place)

    def cancel(self, job: Job) -> None:
        """Have the scheduler end a job."""
        job.cancelled = True
        if job.id is not None:
            self._cancels.append(job.id)

    def submitted(self, array: Array) -> None:
        """The ids of jobs are known now, also of those that are not wanted any more."""
        self._cancels += [job.id for job in array.jobs if job.cancelled and job.id is not None]

    def say(self) -> None:
        """Say all that is to be said."""
        now = self._clock()
        said, self._places = self._places, {}
        for job, places in said.items():
            if job in self._roster.jobs:
                self._tell(job, places, now)
        for job in [job for job in self._roster.jobs if job.stop_by is not None and now >= job.stop_by]:
            job.stop_by = None
            if not job.is_over:
                self.cancel(job)
        if self._cancels and now >= self._cancel_at and not self._errands.asking:
            ids, self._cancels = self._cancels, []
            self._errands.ask(lambda: self._cancel(ids), lambda error: self._not_cancelled(ids, error))

    def _tell(self, job: Job, places: list[int], now: float) -> None:
        is_useless = not job.unwatched and all(item.stopping for item in job.items.values())
        if is_useless and job.has_started:
            job.stop_by = job.stop_by or now + _STOP_S
        elif is_useless and not job.cancelled:
            self.cancel(job)
        fields = {} if is_useless else {"c": places}
        try:
            log = RecordLog(job.array.files.control, sync=self._sync, patience_s=0)
            try:
                log.write(Kind.STOP, n=job.number, **fields)
            finally:
                log.close()
        except OSError as error:
            _logger.warning("%s: %s could not be told to stop: %s", self._name, job.says, error)
        if job.cancelled and not job.items:
            self._roster.drop(job)
            self._on_dropped()

    def _cancel(self, ids: Sequence[str]) -> Note:
        """In the thread that asks."""
        self._scheduler.cancel(ids)
        return self._have_cancelled

    def _have_cancelled(self) -> None:
        self._refused_since = None

    def _not_cancelled(self, ids: Sequence[str], error: Exception) -> None:
        now = self._clock()
        if self._refused_since is None:
            self._refused_since = now
        if now - self._refused_since > _CANCEL_LIMIT_S:
            _logger.warning("%s: %d job(s) could not be cancelled: %s", self._name, len(ids), error)
            self._refused_since = None
            return  # they have been told by their own file as well
        self._cancels += ids
        self._cancel_at = now + _AGAIN_S
