"""Telling jobs what to end, and the scheduler which jobs to cancel."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.batch.errands import Errands, Note
from fractal_runner.executors.batch.jobs import Array, Item, Job, Roster
from fractal_runner.executors.batch.records import Kind, RecordLog
from fractal_runner.executors.batch.scheduler import Scheduler

_AGAIN_S = 1.0
_CANCEL_LIMIT_S = 60.0
_GIVE_UP_S = 120.0  # after a job was cancelled, for which its calls are waited for
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
        self._untold: dict[Job, list[int]] = {}  # the same, for jobs that are being submitted
        self._tell_at = 0.0
        self._deaf: weakref.WeakSet[Job] = weakref.WeakSet()  # it has been warned of that they are not told
        self._cancels: dict[str, str] = {}  # ids, each with the name of its array
        self._cancel_at = 0.0
        self._refused_since: float | None = None  # the scheduler does not take them

    @property
    def is_idle(self) -> bool:
        return not self._places and not self._cancels

    def due(self) -> float:
        """When there is something to do."""
        due = [job.stop_by for job in self._roster.jobs if job.stop_by is not None]
        if self._places:
            due.append(self._tell_at)
        if self._cancels and not self._errands.asking:
            due.append(self._cancel_at)
        return min(due, default=math.inf)

    def stop(self, items: Sequence[Item]) -> None:
        """End calls that run."""
        for item in items:
            item.stopping = True
            if (job := item.job) is None:  # between two jobs
                item.fail(stopped_error(item.call))
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
            self._cancels[job.id] = job.array.request.name
            self._write(job)  # the scheduler may refuse, or be too late

    def submitted(self, array: Array) -> None:
        """The ids of jobs are known now, also of those that are not wanted any more."""
        for job in array.jobs:
            if job.cancelled:
                self.cancel(job)
            if (places := self._untold.pop(job, None)) is not None:
                self._places.setdefault(job, []).extend(places)

    def withdraw(self, job: Job) -> None:
        """A job is taken for over. If it is not, or is started again, it is to do nothing more."""
        self._write(job)

    def say(self) -> None:
        """Say all that is to be said."""
        now = self._clock()
        if self._places and now >= self._tell_at:
            said, self._places = self._places, {}
            for job, places in said.items():
                if job in self._roster.jobs:
                    self._tell(job, places, now)
            self._untold = {job: places for job, places in self._untold.items() if job in self._roster.jobs}
        for job in [job for job in self._roster.jobs if job.stop_by is not None and now >= job.stop_by]:
            if job.cancelled:
                self._give_up(job)
            elif not job.is_over:
                self.cancel(job)
                job.stop_by = now + _GIVE_UP_S
            else:
                job.stop_by = None
        if self._cancels and now >= self._cancel_at and not self._errands.asking:
            jobs, self._cancels = self._cancels, {}
            self._errands.ask(lambda: self._cancel(jobs), lambda error: self._not_cancelled(jobs, error))

    def _give_up(self, job: Job) -> None:
        """Neither the job nor the scheduler has ended what was stopped: nobody is to wait for that."""
        job.stop_by = None
        for item in self._roster.drop(job):
            item.fail(stopped_error(item.call, left_running=True))
        self._on_dropped()

    def _tell(self, job: Job, places: list[int], now: float) -> None:
        is_useless = not job.unwatched and all(item.stopping for item in job.items.values())
        if is_useless and job.has_started:
            job.stop_by = job.stop_by or now + _STOP_S
        elif is_useless and not job.cancelled:
            self.cancel(job)
            job.stop_by = now + _GIVE_UP_S
        if job.id is None:
            self._untold.setdefault(job, []).extend(places)  # its files may not be there yet
        elif not job.cancelled and not self._write(job, **({} if is_useless else {"c": places})):
            self._places.setdefault(job, []).extend(places)
            self._tell_at = now + _AGAIN_S
        if job.cancelled and not job.items:
            self._roster.drop(job)
            self._on_dropped()

    def _write(self, job: Job, **fields: Any) -> bool:
        try:
            log = RecordLog(job.array.files.control, sync=self._sync, patience_s=0)
            try:
                log.write(Kind.STOP, n=job.number, **fields)
            finally:
                log.close()
        except FileNotFoundError:
            return True  # its directory was removed: it does nothing any more
        except OSError as error:
            if job not in self._deaf:
                self._deaf.add(job)
                _logger.warning("%s: %s could not be told to stop: %s", self._name, job.says, error)
            return False
        return True

    def _cancel(self, jobs: Mapping[str, str]) -> Note:
        """In the thread that asks."""
        self._scheduler.cancel(jobs)
        return self._have_cancelled

    def _have_cancelled(self) -> None:
        self._refused_since = None

    def _not_cancelled(self, jobs: Mapping[str, str], error: Exception) -> None:
        now = self._clock()
        if self._refused_since is None:
            self._refused_since = now
        if now - self._refused_since > _CANCEL_LIMIT_S:
            _logger.warning("%s: %d job(s) could not be cancelled: %s", self._name, len(jobs), error)
            self._refused_since = None
            return  # they have been told by their own file as well
        self._cancels |= jobs
        self._cancel_at = now + _AGAIN_S
