"""Calls on their way to the scheduler: gathered, packed, submitted; looked for if the answer was lost."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fractal_runner.executors.batch import verdicts
from fractal_runner.executors.batch.adoption import PREFIX, one_of_each
from fractal_runner.executors.batch.errands import Errands, Note
from fractal_runner.executors.batch.files import ArrayFiles, make_folder, put
from fractal_runner.executors.batch.jobs import Array, Item, Job, Roster
from fractal_runner.executors.batch.packing import Packing
from fractal_runner.executors.batch.payload import PackedCall, Terms, write_payload
from fractal_runner.executors.batch.scheduler import Scheduler, SchedulerError, SubmissionRefusedError
from fractal_runner.executors.batch.shares import Limits, next_share, request_of
from fractal_runner.executors.local import child

_GATHER_S, _GATHER_LIMIT_S, _GATHER_BUSY_S = 0.05, 1.0, 5.0
_MAX_ARRAY = 1000  # where the scheduler does not say
_FIND_S, _FIND_LIMIT_S = 2.0, 60.0
_logger = logging.getLogger("fractal_runner")


class Submitting:
    """Calls that are in no job yet, and arrays whose submission is not sure. The manager's thread owns it.

    Args:
        scheduler: the batch system.
        folder: where arrays have their directories.
        seen_as: a path, as the nodes see it.
        packing, limits: see there.
        roster: the jobs that are followed.
        errands: the threads beside the manager's.
        on_submitted: is told of arrays that the scheduler has taken.
        on_void: is told of jobs that will never do anything.
        name: the executor's.
        clock: seconds, which never go back.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        folder: Path,
        *,
        seen_as: Callable[[str], str],
        packing: Packing,
        limits: Limits,
        roster: Roster,
        errands: Errands,
        on_submitted: Callable[[Array], None],
        on_void: Callable[[Job], None],
        name: str,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._folder = folder
        self._seen_as = seen_as
        self._packing = packing
        self._limits = limits
        self._roster = roster
        self._errands = errands
        self._on_submitted = on_submitted
        self._on_void = on_void
        self._name = name
        self._clock = clock
        self.incoming: deque[Item] = deque()  # left by whoever submits, from any thread
        self._waiting: dict[str, deque[Item]] = {}  # by what they need
        self._first_at = self._newest_at = 0.0  # when the first and the newest of those being gathered came
        self._max_array = limits.max_array or 0  # 0 as long as the scheduler has not said it
        self._is_asking_for_it = False
        self._lost: deque[Array] = deque()
        self._find_at = 0.0

    @property
    def is_gathering(self) -> bool:
        """Whether it looks for further calls by itself, soon."""
        return self._first_at > 0

    @property
    def is_idle(self) -> bool:
        return not (self.incoming or self._waiting or self._lost)

    def due(self) -> float:
        """When there is something to do."""
        due = self._gathered_at() if self._first_at else math.inf
        return min(due, self._find_at) if self._lost and not self._errands.asking else due

    def again(self, item: Item) -> None:
        """Put a call into another job."""
        self._waiting.setdefault(item.group, deque()).append(item)
        self._newest_at = self._clock()
        self._first_at = self._first_at or self._newest_at

    def there_is_room(self) -> None:
        """A job is followed no more: what had to wait for that does not, any longer."""
        if self._waiting and not self._first_at:
            self._newest_at = self._clock()
            self._first_at = self._newest_at - _GATHER_LIMIT_S

    def gather(self) -> None:
        """Take in calls, and submit them once no more have come for a moment."""
        now = self._clock()
        while self.incoming:
            item = self.incoming.popleft()
            self._newest_at = now
            self._first_at = self._first_at or now
            if not item.future.done():
                self._waiting.setdefault(item.group, deque()).append(item)
        if not self._first_at or now < self._gathered_at():
            return
        self._first_at = 0.0
        if self._max_array:
            for group in list(self._waiting):
                items = deque(item for item in self._waiting.pop(group) if not item.future.done())
                self._pack_all(group, items)
        elif not self._is_asking_for_it:
            self._is_asking_for_it = True
            self._errands.submit(self._ask_max_array, lambda _: self._learn_max_array(_MAX_ARRAY))

    def _ask_max_array(self) -> Note:
        """In the thread that submits."""
        answer = self._scheduler.max_array
        return lambda: self._learn_max_array(answer)

    def _learn_max_array(self, count: int) -> None:
        self._max_array = count
        self.there_is_room()

    def look_for(self) -> None:
        """Find out about submissions whose answers were lost."""
        if self._lost and self._clock() >= self._find_at and not self._errands.asking:
            array = self._lost.popleft()
            self._errands.ask(lambda: self._found(array), lambda error: self._not_found(array, error))

    def _gathered_at(self) -> float:
        """Until when further calls are waited for."""
        if self._roster.has_queued_work:
            return self._first_at + _GATHER_BUSY_S
        return min(self._newest_at + _GATHER_S, self._first_at + _GATHER_LIMIT_S)

    def _pack_all(self, group: str, items: deque[Item]) -> None:
        """Put calls that need the same into jobs, as far as there is room."""
        everyone = list(items)
        try:
            while items:
                if not self._pack(items):
                    self._waiting[group] = items
                    break
        except Exception as error:  # a defect, or needs that do not fit: nobody else would ever end these
            for item in everyone:
                if item.job is None:
                    item.fail(error)

    def _pack(self, items: deque[Item]) -> bool:
        """Put some of these calls, which need the same, into an array; False if there is no room for one."""
        share = next_share(
            len(items),
            items[0].terms,
            packing=self._packing,
            limits=self._limits,
            jobs=len(self._roster.jobs),
            places=self._roster.places,
            max_array=self._max_array,
        )
        if share is None:
            return False
        terms = items[0].terms
        chosen = [items.popleft() for _ in range(share.calls)]
        # What came first is started first, whichever job it is in.
        self._submit([chosen[number :: share.jobs] for number in range(share.jobs)], terms, share.parallel)
        return True

    def _submit(self, slices: list[list[Item]], terms: Terms, parallel: int) -> Array:
        name = f"{PREFIX}{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}"
        request, terms = request_of(
            name,
            terms,
            jobs=len(slices),
            calls_per_job=len(slices[0]),
            parallel=parallel,
            folder=self._folder,
            seen_as=self._seen_as,
            max_time=self._limits.max_time,
        )
        files = ArrayFiles(request.directory)
        array = Array(files, request, terms)
        self._roster.names.add(name)
        packed = []
        for number, items in enumerate(slices):
            job = Job(array, number, dict(enumerate(items)), len(items), parallel)
            for place, item in enumerate(items):
                item.job, item.place, item.starts, item.pid = job, place, 0, None
            array.jobs.append(job)
            self._roster.add(job)
            packed.append([item.travelling() for item in items])
        self._errands.submit(
            lambda: self._make_and_submit(array, packed), lambda error: self._is_lost(array, error)
        )
        return array

    def _make_and_submit(self, array: Array, slices: list[list[PackedCall]]) -> Note:
        """Write what the jobs are to do, and submit them. In the thread that submits."""
        try:
            make_folder(self._folder)
            array.files.make(array.request.count)
            write_payload(array.files.payload, slices, array.terms, levels=child.levels_in_force())
        except Exception as error:  # a full disk, a folder that is not ours: there is nothing to look for
            failure = error
            return lambda: self._refused(array, failure, verdicts.NOT_SUBMITTED)
        try:
            ids = self._scheduler.submit(array.request)
        except (SubmissionRefusedError, TypeError, ValueError) as error:
            refusal: Exception = error
            return lambda: self._refused(array, refusal, verdicts.REFUSED)
        if len(ids) != array.request.count:
            raise SchedulerError(f"it gave {len(ids)} ids for {array.request.count} jobs")
        return lambda: self._submitted(array, ids)

    def _submitted(self, array: Array, ids: Sequence[str | None]) -> None:
        array.lost_since = None
        for job, id in zip(array.jobs, ids, strict=True):
            job.id = id
        try:
            put(array.files.jobs, json.dumps(list(ids)).encode())
        except OSError as error:  # they can be found by the array's name, too
            _logger.warning("%s: the ids of %s are not written down: %s", self._name, array.files.name, error)
        self._on_submitted(array)

    def _refused(self, array: Array, error: Exception, reason: str) -> None:
        for job in array.jobs:
            for item in self._roster.drop(job):
                item.fail(verdicts.unsubmitted(item, array, error, reason=reason))
        self.there_is_room()

    def _is_lost(self, array: Array, error: Exception) -> None:
        _logger.warning("%s: was %s submitted? %s", self._name, array.files.name, error)
        array.why_lost = str(error)
        array.lost_since = array.lost_since or self._clock()
        self._look_later(array)

    def _look_later(self, array: Array) -> None:
        self._find_at = self._clock() + min(_FIND_S * 2**array.tries, _FIND_LIMIT_S)
        array.tries += 1
        self._lost.append(array)

    def _found(self, array: Array) -> Note:
        """In the thread that asks. Claiming what nobody has keeps a late job from doing anything."""
        found = self._scheduler.find(array.request)
        if found:
            chosen, spare = one_of_each(array.files, found)
            if spare:
                self._scheduler.cancel(dict.fromkeys(spare, array.request.name))
            return lambda: self._submitted(array, chosen)
        return self._void(array, lambda: self._submit_again(array))

    def _void(self, array: Array, then: Note) -> Note:
        """Claim for nobody what no job has claimed; `then`, if that is all of it. In the thread that asks."""
        files = array.files
        void = [files.claim_for(job.number, None, void=True) for job in array.jobs]
        if all(void):
            os.unlink(files.payload)  # first of all: a late job may come while the claims are removed
            shutil.rmtree(files.directory, ignore_errors=True)
            return then
        # Jobs are there, whatever the scheduler says, and their claims have their ids.
        ids = [(files.claimed_by(job.number) or {}).get("job") for job in array.jobs]
        return lambda: self._partly_there(array, ids)

    def _partly_there(self, array: Array, ids: Sequence[str | None]) -> None:
        self._submitted(array, ids)
        for job in array.jobs:
            if job.id is None:
                self._on_void(job)

    def _not_found(self, array: Array, error: Exception) -> None:
        if not self._is_too_late(array):
            self._look_later(array)
            return
        # It may have been submitted: who is told that it was not shall not find it running later.
        failed = partial(self._refused, array, reason=verdicts.NOT_SUBMITTED)
        self._errands.ask(lambda: self._void(array, lambda: failed(error)), failed)

    def _submit_again(self, array: Array) -> None:
        if self._is_too_late(array):
            self._refused(array, SchedulerError(array.why_lost), verdicts.NOT_SUBMITTED)
            return
        slices = [items for job in array.jobs if (items := self._roster.drop(job))]
        if slices:
            again = self._submit(slices, replace(array.terms, job=None), array.terms.parallel)
            again.tries, again.lost_since = array.tries, array.lost_since

    def _is_too_late(self, array: Array) -> bool:
        since = self._clock() if array.lost_since is None else array.lost_since
        return self._clock() - since > self._limits.submission_timeout
