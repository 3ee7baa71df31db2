"""What goes into the next array, and what the scheduler is asked for it: arithmetic, without side effects.

Apart from `submitting`, which does it with calls, because a preview does the same with their number alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fractal_runner.executors.batch.packing import Packing, job_time
from fractal_runner.executors.batch.payload import Terms
from fractal_runner.executors.batch.scheduler import ArrayRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds an executor.

    Attributes:
        max_workers: calls that run at a time, over all jobs.
        max_jobs: jobs that wait or run at a time.
        max_array: jobs in an array; None for as many as the scheduler takes.
        max_time: seconds that no job asks for more than; None for no bound.
        poll_interval: seconds between two questions to the scheduler, when nothing changes.
        pending_timeout: seconds for which a job may wait for what will not come; None for ever.
        grace: seconds after a job's end within which its last words have to be seen; None to choose.
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


@dataclass(frozen=True, slots=True)
class Share:
    """Of the calls that wait, those that go into the next array.

    Attributes:
        calls: how many.
        jobs: how many jobs that makes. They are dealt out: no job has more than one call more than another.
        parallel: how many of its calls a job runs at a time.
    """

    calls: int
    jobs: int
    parallel: int

    @property
    def calls_per_job(self) -> int:
        """How many calls a job has: the first one, which has no fewer than any other."""
        return math.ceil(self.calls / self.jobs)


def next_share(
    waiting: int, terms: Terms, *, packing: Packing, limits: Limits, jobs: int, places: int, max_array: int
) -> Share | None:
    """What of calls that need the same goes into an array now.

    Args:
        waiting: how many wait, at least one.
        terms: what each of them needs.
        packing, limits: the executor's.
        jobs: how many jobs wait or run already.
        places: how many calls these run at a time, together.
        max_array: how many jobs an array may have.

    Returns:
        The share; None if there is no room for a single one.

    Raises:
        ValueError: if a call does not fit into a job.
    """
    free = limits.max_workers - places
    room = min(limits.max_jobs - jobs, free)
    if room < 1:
        return None
    extra = terms.extra or {}
    needs: dict[str, Any] = {"cpus": terms.cpus, "memory": terms.memory, "gpus": terms.gpus}
    packing = packing.replaced(extra.get("tasks_per_job"), extra.get("parallel_tasks_per_job"))
    packed = packing.pack(waiting, **needs)
    parallel = min(packed.parallel_calls_per_job, free)
    if parallel < packed.parallel_calls_per_job:
        packed = packing.replaced(None, parallel).pack(waiting, **needs)
    # As many jobs as there would be if there were room for all of them: a few do not get everything.
    at_most = max(1, min(limits.max_jobs, limits.max_workers // parallel))
    per_job = max(packed.calls_per_job, math.ceil(waiting / at_most))
    calls = min(waiting, min(room, max(1, free // parallel), max_array) * per_job)
    count = math.ceil(calls / per_job)
    return Share(calls, count, min(parallel, math.ceil(calls / count)))


def request_of(
    name: str,
    terms: Terms,
    *,
    jobs: int,
    calls_per_job: int,
    parallel: int,
    folder: Path,
    seen_as: Callable[[str], str],
    max_time: float | None,
) -> tuple[ArrayRequest, Terms]:
    """What the scheduler is asked for an array of these calls.

    Args:
        name: the array's own.
        terms: what each of its calls needs.
        jobs: how many jobs it has.
        calls_per_job: how many calls the fullest of them has.
        parallel: how many of its calls a job runs at a time.
        folder: where arrays have their directories.
        seen_as: a path, as the nodes see it.
        max_time: seconds that no job asks for more than; None for no bound.

    Returns:
        It, and the terms with what holds for its jobs.
    """
    needs: dict[str, Any] = {
        "cpus": terms.cpus * parallel,
        "memory": None if terms.memory is None else terms.memory * parallel,
        "gpus": terms.gpus * parallel,
        "time": job_time(terms.time, calls_per_job, parallel, max_time),
    }
    directory = folder / name
    request = ArrayRequest(
        name=name,
        directory=directory,
        seen_as=seen_as(str(directory)),
        count=jobs,
        queue=terms.queue,
        account=terms.account,
        extra=terms.extra or {},
        **needs,
    )
    return request, replace(terms, parallel=parallel, job=needs)
