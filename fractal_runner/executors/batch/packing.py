"""How many calls go into one job of a batch system, and how many of them run there at a time.

Pure arithmetic, apart from the executor that submits the jobs: from what one call needs, and how large
jobs should be and may be, to jobs that are all alike. The ideas are those of fractal-server: parallel calls
first, as far as a job's CPUs and memory go, and only then calls that wait for each other within a job.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from fractal_runner.quantities import argument, format_size, parse_count, parse_size

TARGET_JOBS = 20
MAX_JOBS = 100  # of one call at a time; of so many fewer jobs, if nothing is said, as each runs more
# The size of jobs, if nothing is said.
TARGET_CPUS = 4
TARGET_MEMORY = 16 * 10**9

_LONGEST_LEAD_S = 90.0


@dataclass(frozen=True, slots=True)
class Packed:
    """Calls in jobs.

    Attributes:
        calls_per_job: how many calls each job is given; the last one, what is left.
        parallel_calls_per_job: how many of them run at a time.
        jobs: how many jobs that makes.
        cpus: CPUs of each job: those of the calls that run at a time.
        memory: its bytes, likewise; None if it is not known what a call needs.
        gpus: its GPUs, likewise.
    """

    calls_per_job: int
    parallel_calls_per_job: int
    jobs: int
    cpus: int = 1
    memory: int | None = None
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How large jobs should be, and how large they may be.

    If nothing is said, a job has up to 4 CPUs, and 16 GB for calls that say how much memory they need, and
    so many calls run at a time as that makes; there are as many jobs as make 100 calls at a time.

    With CPUs or memory per job, as many calls run at a time as fit into both; memory counts for calls that
    say what they need. Calls that need a GPU run one at a time. There are as many calls at a time as fill
    the job's targets; if that makes more jobs than `target_jobs`, as many more as are needed, up to the
    job's maxima; if that still makes more than `max_jobs`, calls wait for each other within their job.

    Where a target exceeds its maximum, the maximum holds.

    Attributes:
        calls_per_job: how many calls to give to a job; None to choose. `max_jobs`, if it is given, may make
            them more.
        parallel_calls_per_job: how many of a job's calls run at a time, whatever the targets are; None to
            choose.
        target_jobs: how many jobs there may be before they become larger than their targets.
        max_jobs: how many there may be at all; None for 100, if nothing else is said either for as many as
            run 100 calls at a time, and for as many as `calls_per_job` makes.
        target_cpus_per_job: CPUs that a job should have.
        max_cpus_per_job: CPUs that it may have; None for the target, if a call needs no more.
        target_memory_per_job: bytes that a job should have.
        max_memory_per_job: bytes that it may have; None as for CPUs.

    Raises:
        ValueError: for a value that is not a positive whole number, naming it.
    """

    calls_per_job: int | None = None
    parallel_calls_per_job: int | None = None
    target_jobs: int = TARGET_JOBS
    max_jobs: int | None = None
    target_cpus_per_job: int | None = None
    max_cpus_per_job: int | None = None
    target_memory_per_job: int | None = None
    max_memory_per_job: int | None = None

    def __post_init__(self) -> None:
        for name, value in self._values().items():
            if value is not None or name == "target_jobs":
                argument(name, parse_count, value)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From values as people write them: memory as "64GB", or in MB. Those that are None say nothing.

        Raises:
            TypeError: if there is no such attribute.
            ValueError: for a value that does not fit its attribute, naming it.
        """
        sizes = ("target_memory_per_job", "max_memory_per_job")
        said = {name: value for name, value in given.items() if value is not None}
        parsed = {name: argument(name, parse_size, said[name]) for name in sizes if name in said}
        return cls(**said | parsed)

    def replaced(
        self, calls_per_job: int | None = None, parallel_calls_per_job: int | None = None
    ) -> Packing:
        """The same with other numbers of calls; None leaves what there is."""
        return dataclasses.replace(
            self,
            calls_per_job=self.calls_per_job if calls_per_job is None else calls_per_job,
            parallel_calls_per_job=(
                self.parallel_calls_per_job if parallel_calls_per_job is None else parallel_calls_per_job
            ),
        )

    def check(self, *, cpus: int = 1, memory: int | None = None) -> None:
        """Whether calls that need this fit into a job, as many at a time as are to run.

        Args:
            cpus: CPUs of one call.
            memory: bytes of one call; None if it is not known.

        Raises:
            ValueError: if not, naming both sides.
        """
        at_a_time = self.parallel_calls_per_job or 1
        if self.calls_per_job is not None:
            at_a_time = min(at_a_time, self.calls_per_job)
        times = f" times parallel_calls_per_job={at_a_time}" if at_a_time > 1 else ""
        mend = " ask for less, run fewer at a time," if times else " ask for less,"
        if self.max_cpus_per_job is not None and cpus * at_a_time > self.max_cpus_per_job:
            raise ValueError(
                f"cpus={cpus} of a call{times} exceeds max_cpus_per_job={self.max_cpus_per_job}:{mend} "
                "or raise the maximum"
            )
        most = self.max_memory_per_job
        if most is not None and memory is not None and memory * at_a_time > most:
            raise ValueError(
                f"memory={format_size(memory)} of a call{times} exceeds "
                f"max_memory_per_job={format_size(most)}:{mend} or raise the maximum"
            )

    def pack(
        self,
        total: int,
        *,
        cpus: int = 1,
        memory: int | None = None,
        gpus: int = 0,
        alone: bool = False,
    ) -> Packed:
        """Put calls that need the same into jobs.

        Args:
            total: how many calls, at least one.
            cpus: CPUs of one call.
            memory: bytes of one call; None if it is not known: then no bound of memory counts.
            gpus: GPUs of one call.
            alone: they run one at a time for another reason, as those with GPUs do.

        Raises:
            ValueError: if a call, or as many of them as are to run at a time, do not fit into a job.
        """
        argument("total", parse_count, total)
        self.check(cpus=cpus, memory=memory)
        target, most = self._fit(cpus, memory, alone=alone or gpus > 0)
        max_jobs = self.max_jobs
        if max_jobs is None and self.calls_per_job is None:
            max_jobs = max(1, MAX_JOBS // target) if self._says_nothing else MAX_JOBS
        if self.calls_per_job is not None:
            calls, parallel = self.calls_per_job, min(target, self.calls_per_job)
        else:
            # No more at a time than it takes: a job of fewer CPUs starts sooner.
            wanted = math.ceil(total / min(self.target_jobs, max_jobs or self.target_jobs))
            calls = parallel = min(max(target, wanted), most)
        if max_jobs is not None:
            calls = max(calls, math.ceil(total / max_jobs))
        calls = min(calls, total)
        parallel = min(parallel, calls)
        return Packed(
            calls_per_job=calls,
            parallel_calls_per_job=parallel,
            jobs=math.ceil(total / calls),
            cpus=cpus * parallel,
            memory=None if memory is None else memory * parallel,
            gpus=gpus * parallel,
        )

    @property
    def _says_nothing(self) -> bool:
        """Whether jobs may be as large as is sensible mostly."""
        said = (self.calls_per_job, self.parallel_calls_per_job, self.target_cpus_per_job)
        sizes = (self.target_memory_per_job, self.max_cpus_per_job, self.max_memory_per_job)
        return all(value is None for value in (*said, *sizes))

    def _fit(self, cpus: int, memory: int | None, *, alone: bool) -> tuple[int, int]:
        """How many calls at a time fill a job's targets, and its maxima."""
        if self.parallel_calls_per_job is not None:
            return self.parallel_calls_per_job, self.parallel_calls_per_job
        if alone:
            return 1, 1
        if self._says_nothing:
            fits = (
                TARGET_CPUS // cpus if memory is None else min(TARGET_CPUS // cpus, TARGET_MEMORY // memory)
            )
            return max(fits, 1), max(fits, 1)
        targets, maxima = [], []
        is_aimed_at = False  # maxima alone are what a job may have, not what it should
        for need, target, most in (
            (cpus, self.target_cpus_per_job, self.max_cpus_per_job),
            (memory, self.target_memory_per_job, self.max_memory_per_job),
        ):
            bound = target if most is None else most
            if need is None or bound is None:
                continue
            is_aimed_at |= target is not None
            maxima.append(max(bound // need, 1))
            targets.append(max(min(bound, target or bound) // need, 1))
        most_at_a_time = min(maxima, default=1)
        return min(targets) if is_aimed_at else 1, most_at_a_time

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def job_time(
    call_time_s: float | None, calls_per_job: int, parallel: int, max_time_s: float | None = None
) -> float | None:
    """Seconds for which a job's place is reserved, if calls take as long as they say.

    Args:
        call_time_s: of one call; None if it does not say: then the job does not, either.
        calls_per_job: how many calls the job is given.
        parallel: how many of them run at a time.
        max_time_s: no job asks for more; what has not run by then goes into another job. None for no bound.
    """
    if call_time_s is None:
        return None
    seconds = call_time_s * math.ceil(calls_per_job / parallel)
    return seconds if max_time_s is None else min(seconds, max_time_s)


def lead_s(time_s: float) -> float:
    """How many seconds before its end a job that has so many starts nothing more."""
    return min(_LONGEST_LEAD_S, time_s / 10)
