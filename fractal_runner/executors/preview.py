"""What an executor would hand over for some calls, as data: nothing of it has been written or submitted.

Apart from the executors, which fill it in, as only those who show it need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Handover:
    """What a scheduler is handed for an array.

    Attributes:
        script: the text that each of its jobs runs.
        command: the words that hand it over.
        stdin: what that command reads; "" for nothing.
    """

    script: str
    command: tuple[str, ...]
    stdin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPreview:
    """One array of jobs.

    Attributes:
        jobs: how many jobs it has.
        calls: how many calls are in them.
        calls_per_job: how many of these each job is given; some, one less.
        calls_at_a_time: how many of its calls a job runs at a time.
        cpus: CPUs of each job.
        memory: its bytes; None for the scheduler's default.
        gpus: its GPUs.
        time: its seconds; None for the scheduler's default.
        handover: what the scheduler is handed; None if it does not tell.
    """

    jobs: int
    calls: int
    calls_per_job: int
    calls_at_a_time: int
    cpus: int
    memory: int | None
    gpus: int
    time: float | None
    handover: Handover | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What an executor would make of calls that ask for the same.

    Attributes:
        calls: how many there are.
        slots: how many run at a time, whatever the scheduler has free.
        cpus: CPUs of each call, as the executor grants it.
        memory: its bytes, likewise; None if it does not say.
        gpus: its GPUs.
        arrays: the arrays that they go into at once; none where there are no jobs.
        waiting: how many calls wait until those have made room.
        workers_of: what the arrays' jobs are, if not the calls themselves: the workers of this pool, which
            take the calls; "" otherwise.
        reduced: a sentence for each need that is more than the executor has, or means nothing to it.
    """

    calls: int
    slots: int
    cpus: int
    memory: int | None = None
    gpus: int = 0
    arrays: tuple[ArrayPreview, ...] = ()
    waiting: int = 0
    workers_of: str = ""
    reduced: tuple[str, ...] = ()


# From a number of calls, and the options that each of them asks for, to what is made of them. A ValueError or
# a TypeError says what the executor would refuse, a SchedulerError that its scheduler does not answer.
Previewer = Callable[[int, Mapping[str, Any]], Preview]
