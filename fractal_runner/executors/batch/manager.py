"""The thread that sees a batch executor's calls through: gathered, packed, submitted, followed, ended.

It owns all that changes. Other threads leave notes for it and ring its bell. What takes its time at a
scheduler is done in two threads beside it, one that submits and one that asks and cancels, which leave
their answers as notes as well: a scheduler that hangs keeps no result from arriving.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.batch import verdicts
from fractal_runner.executors.batch.files import ArrayFiles, make_folder, put
from fractal_runner.executors.batch.jobs import Array, Bell, Item, Job
from fractal_runner.executors.batch.packing import Packing
from fractal_runner.executors.batch.payload import PackedCall, Terms, write_payload
from fractal_runner.executors.batch.records import Kind, Record, RecordLog
from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    JobState,
    JobStatus,
    Scheduler,
    SchedulerError,
    SubmissionRefusedError,
)
from fractal_runner.executors.local import child
from fractal_runner.executors.local.reports import handle_record
from fractal_runner.filesystems import is_shared

_GATHER_S, _GATHER_LIMIT_S, _GATHER_BUSY_S = 0.1, 1.0, 5.0
_TAIL_S, _TAIL_LIMIT_S = 0.02, 0.5
_TAIL_SHARE = 5.0  # looking takes no more than a fifth of the time
_LOOKS = 200  # files opened at a time
_POLL_S, _POLL_GROWTH = 1.0, 1.5
_LOST_S = 15.0
_FIND_S, _FIND_LIMIT_S = 2.0, 60.0
_TRIES = 3
_CANCEL_LIMIT_S = 60.0
_STOP_S = 10.0  # within which a job that has nothing left to do has to end by itself
_logger = logging.getLogger("fractal_runner")


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a manager.

    Attributes:
        max_workers: calls that run at a time, over all jobs.
        max_jobs: jobs that wait or run at a time.
        max_array: jobs in an array; None for as many as the scheduler takes.
        max_time: seconds that no job asks for more than; None for no bound.
        poll_interval: seconds between two questions to the scheduler, when nothing changes.
        pending_timeout: seconds for which a job may wait for what will not come; None for ever.
        grace: seconds after a job's end within which its last words have to be seen.
        submission_timeout: seconds within which a submission has to succeed.
    """

    max_workers: int
    max_jobs: int
    max_array: int | None
    max_time: float | None
    poll_interval: float
    pending_timeout: float | None
    grace: float | None
    submission_timeout: float


class Manager:
    """See the module.

    Args:
        scheduler: the batch system.
        folder: where arrays have their directories.
        seen_as: a path, as the nodes see it.
        packing: how calls go into jobs.
        limits: see there.
        name: the executor's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        folder: Path,
        *,
        seen_as: Callable[[str], str],
        packing: Packing,
        limits: Limits,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._folder = folder
        self._seen_as = seen_as
        self._packing = packing
        self._limits = limits
        self._name = name
        self._clock = clock
        self._sync = is_shared(folder / "any")
        self._grace = limits.grace if limits.grace is not None else (10.0 if self._sync else 1.0)
        self._bell = Bell()
        self._incoming: deque[Item] = deque()  # left by whoever submits
        self._notes: deque[Callable[[], None]] = deque()  # left by anybody
        self._lock = threading.Lock()  # guards the thread's beginning and end
        self._thread: threading.Thread | None = None
        self._closed = False
        # What follows belongs to the thread.
        self._waiting: dict[str, deque[Item]] = {}
        self._first_at = self._newest_at = 0.0
        self._jobs: dict[Job, None] = {}
        self._places = 0  # calls that those jobs run at a time
        self._lost: list[Array] = []
        self._names: set[str] = set()
        self._submitting = 0
        self._asking = False
        self._cancels: list[str] = []
        self._cancel_at = 0.0
        self._cancel_since: float | None = None  # the scheduler has not taken them
        self._stops: dict[Job, list[int]] = {}
        self._turn = 0
        self._tail_s, self._tail_at = _TAIL_S, 0.0
        self._poll_s, self._poll_at = _POLL_S, 0.0
        self._find_at = 0.0
        self._settle_at = math.inf
        self._silent_since: float | None = None
        self._submitter: ThreadPoolExecutor | None = None
        self._asker: ThreadPoolExecutor | None = None
        self.polls = 0
        self.running: dict[int, Item] = {}  # by the id of the call; for whoever looks, too

    # What other threads call

    def put(self, item: Item) -> None:
        """Take a call."""
        item.future.add_done_callback(_Cancelled(self, item))
        self._incoming.append(item)
        if not self._first_at:
            self._bell.ring()
        if self._thread is None:
            self._begin()

    def note(self, note: Callable[[], None]) -> None:
        """Have something done by the thread."""
        self._notes.append(note)
        self._begin()
        self._bell.ring()

    def stop(self, items: Sequence[Item]) -> None:
        """End calls that run."""
        self.note(lambda: self._stop_all(items))

    def close(self, wait: bool) -> bool:
        """End the thread once there is nothing left to do; whether there was one to wait for."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._bell.ring()
        if thread is None or thread is threading.current_thread():
            return False
        while wait and thread.is_alive():
            thread.join(0.5)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        return True

    def is_own(self, name: str) -> bool:
        """Whether an array is of this manager's making."""
        return name in self._names

    def take_on(self, item: Item, job: Job) -> None:
        """Follow a call of a job that an earlier process has submitted. In the thread, by a note."""
        item.future.add_done_callback(_Cancelled(self, item))
        if job not in self._jobs:
            self._jobs[job] = None
            self._places += job.places
        if item.place not in job.items:
            job.unwatched -= 1
        job.items[item.place] = item
        item.job = job
        job.rewind()
        self._hasten()

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"{self._name}-manager", daemon=True)
                self._thread.start()

    # The thread

    def _run(self) -> None:
        try:
            while True:
                while self._notes:
                    self._safely(self._notes.popleft())
                for step in (self._gather, self._follow, self._settle, self._look_for, self._say, self._poll):
                    self._safely(step)
                with self._lock:
                    if self._is_idle() and self._closed:
                        self._thread = None
                        break
                self._bell.wait(self._sleep_s())
        finally:
            for pool in (self._submitter, self._asker):
                if pool is not None:
                    pool.shutdown(wait=True)

    def _safely(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:
            # A defect of ours must not keep all the other calls from ending.
            _logger.exception("%s: %s failed", self._name, getattr(step, "__name__", step))
            time.sleep(0.1)  # whatever it is, it may be so again at once

    def _is_idle(self) -> bool:
        """Whether nothing is left to be done, but for jobs that end by themselves."""
        if self._notes or self._incoming or self._waiting or self._lost or self._cancels:
            return False
        if self._submitting or self._asking:
            return False
        return not any(job.items or job.stop_by is not None for job in self._jobs)

    def _sleep_s(self) -> float | None:
        """How long there is nothing to do."""
        now = self._clock()
        due = [math.inf]
        if self._first_at:
            due.append(self._gathered_at())
        if self._jobs:
            due += [self._tail_at, self._settle_at]
            if not self._asking:
                due.append(self._poll_at)
        if self._lost and not self._asking:
            due.append(self._find_at)
        if self._notes:
            return 0.0
        if self._cancels and not self._asking:
            due.append(self._cancel_at)
        earliest = min(due)
        return None if earliest == math.inf else max(0.0, earliest - now)

    def _hasten(self) -> None:
        """Something has changed: more of it may follow soon."""
        now = self._clock()
        self._tail_s, self._poll_s = _TAIL_S, min(_POLL_S, self._limits.poll_interval)
        self._tail_at = min(self._tail_at, now + self._tail_s)
        self._poll_at = min(self._poll_at, now + self._poll_s)

    # Gathering, packing, submitting

    def _gather(self) -> None:
        now = self._clock()
        while self._incoming:
            item = self._incoming.popleft()
            self._newest_at = now
            if not self._first_at:
                self._first_at = now
            if not item.future.done():
                self._waiting.setdefault(item.group, deque()).append(item)
        if self._first_at and now >= self._gathered_at():
            self._first_at = 0.0
            self._submit_waiting()
            if self._incoming:
                self._bell.ring()  # what came meanwhile did not ring

    def _gathered_at(self) -> float:
        """Until when further calls are waited for."""
        if self._has_queued_work():
            return self._first_at + _GATHER_BUSY_S
        return min(self._newest_at + _GATHER_S, self._first_at + _GATHER_LIMIT_S)

    def _has_queued_work(self) -> bool:
        """Whether jobs have so much to do that there is no hurry to submit more."""
        return any(len(job.items) > 2 * job.places for job in self._jobs)

    def _submit_waiting(self) -> None:
        for group in list(self._waiting):
            items = deque(item for item in self._waiting.pop(group) if not item.future.done())
            while items:
                taken = self._pack(items)
                if not taken:
                    self._waiting[group] = items
                    break

    def _pack(self, items: deque[Item]) -> bool:
        """Put some of these calls, which need the same, into an array; False if there is no room for one."""
        limits, terms = self._limits, items[0].terms
        room = min(limits.max_jobs - len(self._jobs), limits.max_workers - self._places)
        if room < 1:
            return False
        extra = terms.extra or {}
        try:
            packing = self._packing.replaced(extra.get("tasks_per_job"), extra.get("parallel_tasks_per_job"))
            packing = replace(packing, max_jobs=min(packing.max_jobs or limits.max_jobs, limits.max_jobs))
            needs: dict[str, Any] = {"cpus": terms.cpus, "memory": terms.memory, "gpus": terms.gpus}
            packed = packing.pack(len(items), **needs)
            parallel = min(packed.parallel_calls_per_job, limits.max_workers - self._places)
            if parallel < packed.parallel_calls_per_job:
                packed = packing.replaced(None, parallel).pack(len(items), **needs)
        except ValueError as error:
            for item in items:
                item.call.fail(error)
            items.clear()
            return True
        at_most = max(1, min(limits.max_jobs, limits.max_workers // parallel))
        jobs = min(room, max(1, (limits.max_workers - self._places) // parallel))
        jobs = min(jobs, packed.jobs, limits.max_array or self._scheduler.max_array)
        per_job = max(packed.calls_per_job, math.ceil(len(items) / at_most))
        chosen = [items.popleft() for _ in range(min(len(items), jobs * per_job))]
        self._submit(_shared_out(chosen, math.ceil(len(chosen) / per_job)), terms, parallel)
        return True

    def _submit(self, slices: list[list[Item]], terms: Terms, parallel: int) -> None:
        limits = self._limits
        rounds = math.ceil(len(slices[0]) / parallel)
        time_s = None if terms.time is None else terms.time * rounds
        if time_s is not None and limits.max_time is not None:
            time_s = min(time_s, limits.max_time)
        needs: dict[str, Any] = {
            "cpus": terms.cpus * parallel,
            "memory": None if terms.memory is None else terms.memory * parallel,
            "gpus": terms.gpus * parallel,
            "time": time_s,
        }
        files = ArrayFiles(self._folder / f"fr-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}")
        self._names.add(files.name)
        request = ArrayRequest(
            name=files.name,
            directory=Path(files.directory),
            seen_as=self._seen_as(files.directory),
            count=len(slices),
            queue=terms.queue,
            account=terms.account,
            extra=terms.extra or {},
            **needs,
        )
        array = Array(files, request, replace(terms, parallel=parallel, job=needs))
        for number, items in enumerate(slices):
            job = Job(array, number, dict(enumerate(items)), len(items), parallel)
            for place, item in enumerate(items):
                item.job, item.place, item.starts, item.pid = job, place, 0, None
            array.jobs.append(job)
            self._jobs[job] = None
            self._places += parallel
        packed = [
            [
                item.packed if item.tries == item.packed.tries else replace(item.packed, tries=item.tries)
                for item in items
            ]
            for items in slices
        ]
        for items in slices:
            for item in items:
                if item.future.cancelled():  # while it was given its place
                    self.cancelled(item)
        self._submitting += 1
        if self._submitter is None:
            self._submitter = ThreadPoolExecutor(1, thread_name_prefix=f"{self._name}-submits")
        self._submitter.submit(self._make_and_submit, array, packed)

    def _make_and_submit(self, array: Array, slices: list[list[PackedCall]]) -> None:
        """Write what the jobs are to do, and submit them. In a thread of its own."""
        note: Callable[[], None]
        try:
            make_folder(self._folder)
            array.files.make(array.request.count)
            write_payload(array.files.payload, slices, array.terms, levels=child.levels_in_force())
            ids = self._scheduler.submit(array.request)
        except SubmissionRefusedError as error:
            refusal = error
            note = lambda: self._refused(array, refusal, verdicts.REFUSED)  # noqa: E731
        except SchedulerError as error:
            lost = error
            note = lambda: self._is_lost(array, lost)  # noqa: E731
        except Exception as error:  # a full disk, a defect: whatever it is, the calls end with it
            failure = error
            note = lambda: self._refused(array, failure, verdicts.NOT_SUBMITTED)  # noqa: E731
        else:
            note = lambda: self._submitted(array, ids)  # noqa: E731
        self.note(lambda: self._after_submission(note))

    def _after_submission(self, note: Callable[[], None]) -> None:
        self._submitting -= 1
        note()

    def _submitted(self, array: Array, ids: Sequence[str]) -> None:
        array.lost_since = None
        for job, id in zip(array.jobs, ids, strict=True):
            job.id = id
            if job.cancelled:
                self._cancels.append(id)
        try:
            put(array.files.jobs, json.dumps(list(ids)).encode())
        except OSError as error:  # it can be found by its name, too
            _logger.warning(
                "%s: the ids of %s could not be written down: %s", self._name, array.files.name, error
            )
        self._hasten()

    def _refused(self, array: Array, error: Exception, reason: str) -> None:
        for job in array.jobs:
            for item in list(job.items.values()):
                item.call.fail(verdicts.unsubmitted(item, array, error, reason=reason))
            self._drop(job)

    def _is_lost(self, array: Array, error: Exception) -> None:
        _logger.warning(
            "%s: it is not known whether %s was submitted: %s", self._name, array.files.name, error
        )
        array.why_lost = str(error)
        array.lost_since = array.lost_since or self._clock()
        self._lost.append(array)
        self._find_at = self._clock() + min(_FIND_S * 2**array.tries, _FIND_LIMIT_S)

    def _look_for(self) -> None:
        """Find out about submissions whose answers were lost."""
        now = self._clock()
        if not self._lost or now < self._find_at or self._asking:
            return
        array = self._lost.pop(0)
        self._ask(lambda: self._found(array), lambda error: self._not_found(array, error))

    def _found(self, array: Array) -> Callable[[], None]:
        """In the thread that asks. Claiming what nobody has keeps a late job from doing anything."""
        found = self._scheduler.find(array.request)
        if found:
            first, *others = found
            if spare := [id for ids in others for id in ids]:
                self._scheduler.cancel(spare)
            return lambda: self._submitted(array, first)
        claimed = [job.number for job in array.jobs if not array.files.claim_for(job.number, None, void=True)]
        if claimed:
            # A job is there, whatever the scheduler says; its own claim has its id.
            ids = [(array.files.claimed_by(job.number) or {}).get("job") for job in array.jobs]
            return lambda: self._claimed(array, ids)
        shutil.rmtree(array.files.directory, ignore_errors=True)  # a late job finds nothing to do
        return lambda: self._submit_again(array)

    def _claimed(self, array: Array, ids: Sequence[str | None]) -> None:
        if all(ids):
            self._submitted(array, [str(id) for id in ids])
            return
        # Some have begun; the others are void now, and their calls go elsewhere.
        for job, id in zip(array.jobs, ids, strict=True):
            job.id = id
            if id is None:
                self._give_back(job)

    def _not_found(self, array: Array, error: Exception) -> None:
        self._lost.append(array)
        array.tries += 1
        self._find_at = self._clock() + min(_FIND_S * 2**array.tries, _FIND_LIMIT_S)
        since = array.lost_since
        if since is not None and self._clock() - since > self._limits.submission_timeout:
            self._lost.remove(array)
            self._refused(array, error, verdicts.NOT_SUBMITTED)

    def _submit_again(self, array: Array) -> None:
        since = array.lost_since or self._clock()
        if self._clock() - since > self._limits.submission_timeout:
            self._refused(array, SchedulerError(array.why_lost), verdicts.NOT_SUBMITTED)
            return
        slices = [items for job in array.jobs if (items := list(job.items.values()))]
        for job in array.jobs:
            self._drop(job)
        if slices:
            again = array.tries + 1
            before = set(self._jobs)
            self._submit(slices, replace(array.terms, job=None), array.terms.parallel)
            for job in self._jobs.keys() - before:
                job.array.tries, job.array.lost_since = again, since

    # Following

    def _follow(self) -> None:
        """Hear what jobs have to say."""
        now = self._clock()
        if not self._jobs or now < self._tail_at:
            return
        began = time.monotonic()
        jobs = list(self._jobs)
        self._turn %= len(jobs)
        chosen = (jobs[self._turn :] + jobs[: self._turn])[:_LOOKS]
        self._turn += _LOOKS
        heard = False
        for job in chosen:
            heard |= self._hear(job)
        took = time.monotonic() - began
        if heard:
            self._hasten()
            self._tail_s = _TAIL_S
        else:
            self._tail_s = min(self._tail_s * 1.5, _TAIL_LIMIT_S)
        self._tail_at = self._clock() + max(self._tail_s, took * _TAIL_SHARE)

    def _hear(self, job: Job) -> bool:
        """Take in what a job has written; whether it was anything."""
        heard = False
        try:
            for start, record in job.news():
                heard = True
                self._take(job, start, record)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            _logger.warning("%s: the records of %s cannot be read: %s", self._name, job.says, error)
            if job.tails[0].damage == "":
                job.tails[0].damage = str(error)
        if heard and (job.closed is not None or job.refused is not None):
            self._close_job(job)
        return heard

    def _take(self, job: Job, start: int, record: Record) -> None:
        fields = record.fields
        match record.kind:
            case Kind.START:
                item = job.items.get(fields["c"])
                if item is not None:
                    item.starts, item.pid = start, fields["pid"]
                    self._begun(item, fields["t"])
            case Kind.END | Kind.FAIL:
                item = job.items.pop(fields["c"], None)
                if item is not None:
                    self._begun(item, fields["t"])
                    self.running.pop(item.call.id, None)
                    (verdicts.end if record.kind == Kind.END else verdicts.fail)(item, record)
                    item.job = None
            case Kind.LOG:
                handle_record(record.data)
            case Kind.JOB:
                job.node = fields["node"]
                if job.id is None:
                    job.id = fields["id"]
            case Kind.CLOSE:
                job.closed = fields["why"]
            case Kind.REFUSE:
                job.refused = fields["why"]

    def _begun(self, item: Item, when: float) -> None:
        call = item.call
        if call.started is None and not item.future.done() and call.begin():
            call.started = min(max(when, call.submitted), time.time())  # their clock may differ
            self.running[call.id] = item

    def _close_job(self, job: Job) -> None:
        """A job starts nothing more: its calls that have not started go elsewhere, or end."""
        if job.refused is not None:
            for item in list(job.items.values()):
                item.call.fail(verdicts.refused(item, job))
            self._drop(job)
        elif any(item.starts for item in job.items.values()):
            # Something of what it has written is missing: the scheduler is asked how it has ended.
            job.settle_at = self._clock() + self._grace
            self._settle_at = min(self._settle_at, job.settle_at)
        else:
            self._give_back(job)

    def _give_back(self, job: Job) -> None:
        """Calls that a job has not started are put into another one, some times."""
        items = list(job.items.values())
        self._drop(job)
        for item in items:
            item.job = None
            if item.future.done():
                continue
            item.tries += 1
            if item.stopping:
                item.call.fail(stopped_error(item.call))
            elif item.tries >= _TRIES:
                item.call.fail(verdicts.never_started(item, job, item.tries))
            else:
                self._waiting.setdefault(item.group, deque()).append(item)
                self._first_at = self._first_at or self._clock()
                self._newest_at = self._clock()

    def _drop(self, job: Job) -> None:
        """Follow a job no more."""
        if job in self._jobs:
            del self._jobs[job]
            self._places -= job.places
        self._stops.pop(job, None)
        for item in job.items.values():
            self.running.pop(item.call.id, None)
        job.items.clear()
        if self._waiting and not self._first_at:
            self._first_at = self._newest_at = self._clock() - _GATHER_S  # there is room now
            self._bell.ring()

    # Asking the scheduler

    def _ask(self, question: Callable[[], Callable[[], None]], failed: Callable[[Exception], None]) -> None:
        """Have something asked in the thread for that; what it returns is done by this one."""
        self._asking = True

        def ask() -> None:
            answer: Callable[[], None]
            try:
                answer = question()
            except Exception as error:  # a defect, too: nobody else sees it
                failure = error
                answer = lambda: failed(failure)  # noqa: E731
            self.note(lambda: self._answered(answer))

        if self._asker is None:
            self._asker = ThreadPoolExecutor(1, thread_name_prefix=f"{self._name}-asks")
        self._asker.submit(ask)

    def _answered(self, answer: Callable[[], None]) -> None:
        self._asking = False
        answer()

    def _poll(self) -> None:
        """Ask about all jobs at once, and say which ones are to be cancelled."""
        if self._asking:
            return
        if self._cancels and self._clock() >= self._cancel_at:
            ids, self._cancels = self._cancels, []
            self._ask(lambda: self._cancel(ids), lambda error: self._not_cancelled(ids, error))
            return
        now = self._clock()
        jobs = [job for job in self._jobs if job.id is not None and not job.is_over]
        if not jobs or now < self._poll_at:
            return
        self._poll_s = min(self._poll_s * _POLL_GROWTH, self._limits.poll_interval)
        self._poll_at = now + self._poll_s
        self.polls += 1
        self._ask(lambda: self._states(jobs), self._no_answer)

    def _states(self, jobs: Sequence[Job]) -> Callable[[], None]:
        answers = self._scheduler.states([str(job.id) for job in jobs])
        return lambda: self._learn(jobs, answers)

    def _cancel(self, ids: Sequence[str]) -> Callable[[], None]:
        self._scheduler.cancel(ids)
        return self._have_cancelled

    def _have_cancelled(self) -> None:
        self._cancel_since = None
        self._hasten()

    def _not_cancelled(self, ids: Sequence[str], error: Exception) -> None:
        now = self._clock()
        self._cancel_since = self._cancel_since or now
        if now - self._cancel_since > _CANCEL_LIMIT_S:
            _logger.warning("%s: %d job(s) could not be cancelled: %s", self._name, len(ids), error)
            self._cancel_since = None
            return  # they have been told by their own file as well
        self._cancels += ids
        self._cancel_at = now + _POLL_S

    def _no_answer(self, error: Exception) -> None:
        """That there was no answer says nothing about the jobs."""
        now = self._clock()
        if self._silent_since is None:
            self._silent_since = now
            _logger.warning("%s: the scheduler does not answer, and is asked again: %s", self._name, error)
        self._poll_at = now + self._poll_s

    def _learn(self, jobs: Sequence[Job], answers: Mapping[str, JobStatus]) -> None:
        now = self._clock()
        if self._silent_since is not None:
            _logger.warning("%s: the scheduler answers again", self._name)
            self._silent_since = None
        for array in {id(job.array): job.array for job in jobs if job in self._jobs}.values():
            self._find_starts(array)
        changed = False
        for job in jobs:
            if job not in self._jobs or job.is_over:
                continue
            status = answers.get(str(job.id), JobStatus(JobState.LOST))
            changed |= job.status is None or job.status.state != status.state
            if status.state is not JobState.LOST or job.status is None:
                job.status = status
            self._judge(job, status, now)
        if changed:
            self._hasten()

    def _judge(self, job: Job, status: JobStatus, now: float) -> None:
        if status.state is JobState.LOST:
            job.lost_since = job.lost_since or now
            if now - job.lost_since >= _LOST_S:
                self._is_over(job, now)
        elif status.state is JobState.ENDED:
            self._is_over(job, now)
        else:
            job.lost_since = None
        if status.state is JobState.QUEUED and not status.can_start:
            job.waiting_since = job.waiting_since or now
            limit = self._limits.pending_timeout
            if limit is not None and now - job.waiting_since >= limit and not job.has_started:
                for item in list(job.items.values()):
                    item.call.fail(verdicts.waits_for_ever(item, job, status))
                self._cancels.append(str(job.id))
                self._drop(job)
        else:
            job.waiting_since = None

    def _is_over(self, job: Job, now: float) -> None:
        # A little later, over the network: its last words may be on their way.
        job.settle_at = now + self._grace
        self._settle_at = min(self._settle_at, job.settle_at)

    def _find_starts(self, array: Array) -> None:
        try:
            starts = array.files.starts()
        except OSError:  # it was removed: so there are no more
            return
        for job in array.jobs:
            job.add_starts(starts.get(job.number, 1))

    def _settle(self) -> None:
        """Decide about the calls of jobs that are over."""
        now = self._clock()
        if now < self._settle_at:
            return
        self._settle_at = math.inf
        for job in [job for job in self._jobs if job.settle_at is not None]:
            assert job.settle_at is not None
            if job.settle_at > now:
                self._settle_at = min(self._settle_at, job.settle_at)
                continue
            self._find_starts(job.array)
            self._hear(job)
            if job in self._jobs:
                self._settle_job(job)

    def _settle_job(self, job: Job) -> None:
        reason = verdicts.reason_of(job)
        last = len(job.tails)
        ended_well = reason == verdicts.NO_EVIDENCE and not job.closed
        for item in list(job.items.values()):
            if item.stopping or job.cancelled:
                item.call.fail(stopped_error(item.call))
            elif job.damage:
                item.call.fail(verdicts.damaged(item, job))
            elif item.starts == last or (item.starts and job.closed is not None):
                what = "had started and not ended"
                item.call.fail(verdicts.of_job(job, item, what, reason=reason, status=job.status))
            elif reason == "CANCELLED" or (ended_well and job.has_started):
                what = "had not started"
                item.call.fail(verdicts.of_job(job, item, what, reason=reason, status=job.status))
        for place in [place for place, item in job.items.items() if item.future.done()]:
            self.running.pop(job.items[place].call.id, None)
            del job.items[place]
        if job.items and not job.has_started and not job.array.files.claim_for(job.number, None, void=True):
            job.settle_at = None  # it has begun in this very moment, whatever the scheduler says
            return
        self._give_back(job)

    # Stopping

    def _stop_all(self, items: Sequence[Item]) -> None:
        for item in items:
            job = item.job
            if job is None or job not in self._jobs:
                continue
            item.stopping = True
            self._stops.setdefault(job, []).append(item.place)

    def cancelled(self, item: Item) -> None:
        """A call was cancelled, and has not started as far as anybody knows. In the thread, by a note."""
        job = item.job
        if job is not None and job.items.pop(item.place, None) is not None:
            item.job = None
            if job in self._jobs:
                self._stops.setdefault(job, []).append(item.place)

    def _say(self) -> None:
        """Tell jobs what to end; cancel those that have nothing left to do."""
        now = self._clock()
        stops, self._stops = self._stops, {}
        for job, chosen in stops.items():
            places: list[int] | None = chosen
            everything = not job.unwatched and all(item.stopping for item in job.items.values())
            if everything:
                places = None
                if job.has_started:
                    job.stop_by = job.stop_by or now + _STOP_S
                elif not job.cancelled:
                    job.cancelled = True
                    if job.id is not None:
                        self._cancels.append(job.id)
            try:
                log = RecordLog(job.array.files.control, sync=self._sync, patience_s=0)
                try:
                    fields = {} if places is None else {"c": places}
                    log.write(Kind.STOP, n=job.number, **fields)
                finally:
                    log.close()
            except OSError as error:
                _logger.warning("%s: %s could not be told to stop: %s", self._name, job.says, error)
            if job.cancelled and not job.items:
                self._drop(job)
        for job in [job for job in self._jobs if job.stop_by is not None and now >= job.stop_by]:
            job.stop_by = None
            if job.id is not None and not job.is_over:
                job.cancelled = True
                self._cancels.append(job.id)


class _Cancelled:
    """Tells the manager that a call was cancelled."""

    __slots__ = ("_item", "_manager")

    def __init__(self, manager: Manager, item: Item) -> None:
        self._manager = manager
        self._item = item

    def __call__(self, future: Any) -> None:
        if future.cancelled() and self._item.job is not None:
            self._manager.note(lambda: self._manager.cancelled(self._item))


def _shared_out(items: Sequence[Item], jobs: int) -> list[list[Item]]:
    """Items in so many lists, which differ in length by one at most; what came first is done first."""
    return [list(items[number::jobs]) for number in range(jobs)]
