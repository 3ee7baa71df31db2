"""Calls in jobs: what the jobs say of them, what the scheduler says of the jobs, and how that ends them.

A job's own records decide. The scheduler is asked about all jobs together, now and then, and is believed
only in that a job is over; then whatever the job has not written down did not happen, or nobody knows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.batch import verdicts
from fractal_runner.executors.batch.errands import Errands, Note
from fractal_runner.executors.batch.jobs import Array, Item, Job, Roster
from fractal_runner.executors.batch.records import Kind, Record
from fractal_runner.executors.batch.scheduler import (
    Cause,
    JobState,
    JobStatus,
    PartlyExplainedError,
    Scheduler,
)
from fractal_runner.executors.local.reports import handle_record

_LOOK_S, _LOOK_LIMIT_S, _LOOK_GROWTH = 0.02, 0.5, 1.1
_LOOK_SHARE = 5.0  # looking takes no more than a fifth of the time
_LOOKS = 200  # files opened at a time
_POLL_S, _POLL_GROWTH = 1.0, 1.5
_LOST_S = 15.0  # for which a scheduler must not know a job, before it is given up
_UNDECIDED_S = 60.0  # for which files that cannot be written are tried again
_TRIES = 3
_TAKEN_OUT = JobStatus(
    JobState.ENDED,
    "CANCELLED",
    detail="it waited, and is not there any more, while others of its array are: somebody has cancelled it",
    cause=Cause.CANCELLED,
)
_logger = logging.getLogger("fractal_runner")


class Following:
    """The jobs that there are. The manager's thread owns it.

    Args:
        scheduler: the batch system.
        roster: the jobs that are followed.
        errands: the threads beside the manager's.
        again: puts a call into another job.
        cancel: has the scheduler end a job.
        withdraw: has a job do nothing more, should it be there all the same.
        on_dropped: is told when a job is followed no more.
        poll_interval, pending_timeout: see `Limits`.
        grace: seconds after a job's end within which its last words have to be seen.
        name: the executor's.
        clock: seconds, which never go back.

    Attributes:
        polls: how often the scheduler was asked.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        roster: Roster,
        errands: Errands,
        again: Callable[[Item], None],
        cancel: Callable[[Job], None],
        withdraw: Callable[[Job], None],
        on_dropped: Callable[[], None],
        poll_interval: float,
        pending_timeout: float | None,
        grace: float,
        name: str,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._roster = roster
        self._errands = errands
        self._again = again
        self._cancel = cancel
        self._withdraw = withdraw
        self._on_dropped = on_dropped
        self._poll_interval = poll_interval
        self._pending_timeout = pending_timeout
        self._grace = grace
        self._name = name
        self._clock = clock
        self._turn = 0  # which job is looked at next
        self._look_s, self._look_at = _LOOK_S, 0.0
        self._poll_s, self._poll_at = _POLL_S, 0.0
        self._settle_at = math.inf
        self._wants_why = False  # something is to be asked at length, once nothing is being asked
        self._is_silent = False
        self.polls = 0

    def due(self) -> float:
        """When there is something to do."""
        if not self._roster.jobs:
            return math.inf
        due = min(self._look_at, self._settle_at)
        if self._errands.asking:
            return due
        return self._clock() if self._wants_why else min(due, self._poll_at)

    def hasten(self) -> None:
        """Something has changed: more of it may follow soon."""
        now = self._clock()
        self._look_s, self._poll_s = _LOOK_S, min(_POLL_S, self._poll_interval)
        self._look_at = min(self._look_at, now + self._look_s)
        self._poll_at = min(self._poll_at, now + self._poll_s)

    def take_on(self, item: Item, job: Job) -> None:
        """Follow a call of a job that an earlier process has submitted."""
        self._roster.add(job)
        if item.place not in job.items:
            job.unwatched -= 1
        job.items[item.place] = item
        item.job = job
        job.follow_on()  # what was decided was decided about others
        job.rewind()
        self.hasten()

    # What jobs say

    def listen(self) -> None:
        """Hear what jobs have to say, some of them at a time."""
        now = self._clock()
        if not self._roster.jobs or now < self._look_at:
            return
        began = time.monotonic()
        jobs = list(self._roster.jobs)
        self._turn %= len(jobs)
        heard = False
        for job in (jobs[self._turn :] + jobs[: self._turn])[:_LOOKS]:
            heard |= self._hear(job)
        self._turn += _LOOKS
        if heard:
            self._look_s = _LOOK_S  # not the scheduler's turn: a job that tells by itself needs no asking
        else:
            self._look_s = min(self._look_s * _LOOK_GROWTH, _LOOK_LIMIT_S)
        took = time.monotonic() - began
        self._look_at = self._clock() + max(self._look_s, took * _LOOK_SHARE)

    def _hear(self, job: Job, *, final: bool = False) -> bool:
        """Take in what a job has written; whether it was anything. `final`: it writes nothing more."""
        heard = False
        try:
            for start, record in job.news(final):
                heard = True
                self._take(job, start, record)
            job.unreadable = ""
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if not job.unreadable:
                _logger.warning("%s: the records of %s cannot be read: %s", self._name, job.says, error)
            job.unreadable = str(error)
        if heard:
            job.lost_since = None  # it is there, whatever the scheduler says
        if heard and (job.closed is not None or job.refused is not None):
            self._close(job)
        return heard

    def _take(self, job: Job, start: int, record: Record) -> None:
        fields = record.fields
        match record.kind:
            case Kind.START:
                item = job.items.get(fields["c"])
                if item is not None:
                    item.starts, item.pid = start, fields["pid"]
                    self._begin(item, fields["t"])
            case Kind.END | Kind.FAIL:
                job.progressed = True
                item = job.items.pop(fields["c"], None)
                if item is not None:
                    self._begin(item, fields["t"])
                    with item.ending():
                        (verdicts.end if record.kind == Kind.END else verdicts.fail)(item, record)
                    item.job = None
            case Kind.LOG:
                item = job.items.get(fields["c"])
                if item is not None and item.logged < (start, record.end):  # else it is heard once more
                    item.logged = start, record.end
                    handle_record(record.data)
            case Kind.JOB:
                job.node = fields["node"]
            case Kind.CLOSE:
                job.closed = fields["why"]
            case Kind.REFUSE:
                job.refused = fields["why"]

    def _begin(self, item: Item, when: float) -> None:
        call = item.call
        if item.future.done():
            return
        self._roster.running[call.id] = item
        if call.started is not None:
            return  # by an earlier job, which was started again
        if call.begin():
            call.started = min(max(when, call.submitted), time.time())  # the node's clock may differ
        else:
            self._roster.running.pop(call.id, None)  # cancelled in this very moment

    def _close(self, job: Job) -> None:
        """A job starts nothing more: its calls that have not started go elsewhere, or end."""
        if job.refused is not None:
            for item in self._roster.drop(job):
                item.fail(verdicts.refused(item, job))
            self._on_dropped()
        elif any(item.starts == len(job.tails) for item in job.items.values()):
            self._is_over(job)  # something is missing of what it has written
        else:
            self.give_back(job)

    def give_back(self, job: Job) -> None:
        """Put the calls that a job has not started into another one.

        Some times, if it has not done any of its calls: one that has is as good as it can be, though it
        had no time left, or one call took all others with it.
        """
        for item in self._roster.drop(job):
            item.tries += not job.progressed
            if item.stopping:
                item.fail(stopped_error(item.call))
            elif item.tries >= _TRIES:
                item.fail(verdicts.never_started(item, job, item.tries))
            else:
                self._again(item)
        self._on_dropped()

    # What the scheduler says

    def poll(self) -> None:
        """Ask about all jobs at once."""
        now = self._clock()
        if now < self._poll_at or self._errands.asking or self._wants_why:
            return
        jobs = [job for job in self._roster.jobs if job.id is not None and not job.is_over]
        self._poll_s = min(self._poll_s * _POLL_GROWTH, self._poll_interval)
        self._poll_at = now + self._poll_s
        if jobs:
            self.polls += 1
            self._errands.ask(lambda: self._states(jobs), self._no_answer, matters=False)

    def _states(self, jobs: Sequence[Job]) -> Note:
        """In the thread that asks."""
        answers = self._scheduler.states(_named(jobs))
        return lambda: self._learn(jobs, answers)

    def _no_answer(self, error: Exception) -> None:
        """That there was no answer says nothing about the jobs."""
        if not self._is_silent:
            self._is_silent = True
            _logger.warning("%s: the scheduler does not answer, and is asked again: %s", self._name, error)

    def _learn(self, jobs: Sequence[Job], answers: Mapping[str, JobStatus]) -> None:
        if self._is_silent:
            self._is_silent = False
            _logger.warning("%s: the scheduler answers again", self._name)
        for array in {id(job.array): job.array for job in jobs if job in self._roster.jobs}.values():
            _find_starts(array)
        told = [(job, answers[str(job.id)]) for job in jobs if str(job.id) in answers]
        known = {job.array for job, status in told if status.state is not JobState.LOST}
        changed = False
        for job, said in told:
            if job in self._roster.jobs and not job.is_over:
                is_taken_out = said.state is JobState.LOST and job.array in known and job.was_waiting
                status = _TAKEN_OUT if is_taken_out and self._scheduler.keeps_waiting else said
                changed |= job.status is None or job.status.state != status.state
                if status.state is not JobState.LOST or job.status is None:
                    job.status = status
                self._judge(job, status)
        if changed:
            self.hasten()

    def _judge(self, job: Job, status: JobStatus) -> None:
        now = self._clock()
        if status.state is JobState.LOST:
            job.lost_since = job.lost_since or now
            if now - job.lost_since >= _LOST_S:
                self._is_over(job)
            return
        job.lost_since = None
        if status.state is JobState.ENDED:
            self._is_over(job)
        if status.state is not JobState.QUEUED or status.can_start:
            job.waiting_since = None
            return
        job.waiting_since = job.waiting_since or now
        limit = self._pending_timeout
        if limit is not None and now - job.waiting_since >= limit and not job.has_started:
            self._cancel(job)
            for item in self._roster.drop(job):
                item.fail(verdicts.waits_for_ever(item, job, status))
            self._on_dropped()

    def _is_over(self, job: Job) -> None:
        # A little later: over the network, its last words may be on their way.
        job.settle_at = self._clock() + self._grace
        self._settle_at = min(self._settle_at, job.settle_at)

    # What follows from both

    def settle(self) -> None:
        """Decide about the calls of jobs that are over."""
        now = self._clock()
        if now < self._settle_at and not (self._wants_why and not self._errands.asking):
            return
        self._settle_at, self._wants_why = math.inf, False
        unexplained = []
        for job in [job for job in self._roster.jobs if job.settle_at is not None]:
            assert job.settle_at is not None
            if job.settle_at > now:
                self._settle_at = min(self._settle_at, job.settle_at)
                continue
            _find_starts(job.array)
            self._hear(job, final=True)
            if job not in self._roster.jobs:
                continue
            if job.items and job.id is not None and not job.is_explained:
                unexplained.append(job)
                continue
            try:
                self._decide(job)
            except (OSError, RuntimeError, ValueError) as error:  # a full disk; it is tried again
                self._decide_later(job, error)
        if unexplained:
            self._ask_why(unexplained)

    def _ask_why(self, jobs: Sequence[Job]) -> None:
        """Have the scheduler say what it knows of jobs that have left calls without an end."""
        if self._errands.asking:
            self._wants_why = True  # before it is asked about all others again
            return
        for job in jobs:
            job.unexplained_since = job.unexplained_since or self._clock()
        # Nobody waits for it but calls that have not ended.
        self._errands.ask(
            lambda: self._reasons(jobs), lambda error: self._no_reasons(jobs, error), matters=False
        )

    def _reasons(self, jobs: Sequence[Job]) -> Note:
        """In the thread that asks."""
        answers = self._scheduler.explain(_named(jobs))
        return lambda: self._learn_why(jobs, answers)

    def _learn_why(self, jobs: Sequence[Job], answers: Mapping[str, JobStatus]) -> None:
        self._settle_at = self._clock()
        for job in self._still_unexplained(jobs):
            answer = answers.get(str(job.id))
            if answer is not None and answer.state in (JobState.QUEUED, JobState.RUNNING):
                job.follow_on()  # it was only for a moment that it was not known
            else:
                job.is_explained = True
            job.status = answer or job.status

    def _no_reasons(self, jobs: Sequence[Job], error: Exception) -> None:
        """It is asked for a while, as the answer may change what becomes of the calls."""
        now = self._clock()
        self._settle_at = min(self._settle_at, now + _POLL_S)
        answers = error.answers if isinstance(error, PartlyExplainedError) else {}
        for job in self._still_unexplained(jobs):
            job.status = answers.get(str(job.id), job.status)
            if job.unexplained_since is not None and now - job.unexplained_since > _UNDECIDED_S:
                _logger.warning("%s: how %s has ended is not known: %s", self._name, job.says, error)
                job.is_explained = True

    def _still_unexplained(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Those that nobody has taken on, or ended, since they were asked about."""
        for job in jobs:
            if job in self._roster.jobs and job.is_over and job.unexplained_since is not None:
                yield job

    def _decide_later(self, job: Job, error: Exception) -> None:
        """Its files cannot be written or read: a full disk, or one that is away."""
        now = self._clock()
        if job.undecided_since is None:
            job.undecided_since = now
            _logger.warning("%s: what became of %s is not known yet: %s", self._name, job.says, error)
        if now - job.undecided_since < _UNDECIDED_S:
            self._is_over(job)
            return
        job.unreadable = str(error)
        for item in self._roster.drop(job):
            item.fail(verdicts.damaged(item, job))
        self._on_dropped()

    def _decide(self, job: Job) -> None:
        reason = verdicts.reason_of(job)
        is_final = job.status is not None and job.status.cause in (Cause.CANCELLED, Cause.REFUSED)
        is_final |= reason == verdicts.NO_EVIDENCE and job.has_started and self._scheduler.done_is_proof
        last = len(job.tails)
        for item in list(job.items.values()):
            if item.stopping or job.cancelled:
                error = stopped_error(item.call)
            elif job.damage:
                error = verdicts.damaged(item, job)
            elif item.starts == last:
                what = "had started and not ended"
                error = verdicts.of_job(job, item, what, reason=reason, status=job.status)
            elif is_final:
                what = "had not started"
                error = verdicts.of_job(job, item, what, reason=reason, status=job.status)
            else:
                continue
            del job.items[item.place]
            item.fail(error)
            job.progressed = True
        if job.has_started or job.is_claimed:
            self._withdraw(job)
        elif job.items and not _is_void(job):
            # It has begun in this very moment, whatever is said; or it has died there and then: in that case
            # it is as silent the next time.
            job.is_claimed = True
            job.follow_on()
            return
        self.give_back(job)


def _find_starts(array: Array) -> None:
    """Find the files of jobs that were started again."""
    try:
        starts = array.files.starts()
    except OSError:  # it was removed: so there are no more
        return
    for job in array.jobs:
        job.add_starts(starts.get(job.number, 1))


def _named(jobs: Sequence[Job]) -> dict[str, str]:
    return {str(job.id): job.array.request.name for job in jobs}


def _is_void(job: Job) -> bool:
    """Whether the job can never begin: its work is claimed for nobody, or not there any more."""
    try:
        return job.array.files.claim_for(job.number, None, void=True)
    except FileNotFoundError:
        return True
