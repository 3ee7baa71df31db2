"""What a batch executor would submit, without calls: the same arithmetic, and the schedulers' own scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fractal_runner.executors.batch.adoption import PREFIX
from fractal_runner.executors.batch.packing import Packing
from fractal_runner.executors.batch.payload import Terms
from fractal_runner.executors.batch.scheduler import Scheduler
from fractal_runner.executors.batch.shares import Limits, next_share, request_of
from fractal_runner.executors.preview import ArrayPreview

ARRAY = f"{PREFIX}ARRAY"  # stands for the name of one that there is not


def previews(
    count: int,
    terms: Terms,
    *,
    scheduler: Scheduler,
    folder: Path,
    seen_as: Callable[[str], str],
    packing: Packing,
    limits: Limits,
) -> list[ArrayPreview]:
    """The arrays that calls would go into at once, if they came together and no job waited or ran.

    The scheduler may be asked for its bounds. An array has its name, and so its directory, only when it is
    submitted: here that is `ARRAY`.

    Args:
        count: how many calls.
        terms: what each of them needs.
        scheduler, folder, seen_as, packing, limits: the executor's.

    Returns:
        The arrays. For calls that are in none of them there would be no room yet.

    Raises:
        TypeError, ValueError, SchedulerError: if they could not be submitted.
    """
    max_array = limits.max_array or scheduler.max_array
    arrays: list[ArrayPreview] = []
    left, jobs, places = count, 0, 0
    while left:
        share = next_share(
            left, terms, packing=packing, limits=limits, jobs=jobs, places=places, max_array=max_array
        )
        if share is None:
            break
        left, jobs, places = left - share.calls, jobs + share.jobs, places + share.jobs * share.parallel
        request, _ = request_of(
            ARRAY,
            terms,
            jobs=share.jobs,
            calls_per_job=share.calls_per_job,
            parallel=share.parallel,
            folder=folder,
            seen_as=seen_as,
            max_time=limits.max_time,
        )
        array = ArrayPreview(
            jobs=share.jobs,
            calls=share.calls,
            calls_per_job=share.calls_per_job,
            calls_at_a_time=share.parallel,
            cpus=request.cpus,
            memory=request.memory,
            gpus=request.gpus,
            time=request.time,
            handover=scheduler.preview(request),
        )
        arrays.append(array)
    return arrays
