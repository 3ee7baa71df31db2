"""What may be said of a pool, typed: what a caller writes, and what a configuration's section is checked by.

Apart from `terms`, which is what becomes of it: a worker's host process reads that, and has no use for this.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypedDict

from fractal_runner.config.keys import Keyed, Section
from fractal_runner.executors.adapters.daskpool.terms import PARSERS

# What a job is has been said: it has one worker, and that has what the pool says.
SAID_OF_JOBS = frozenset(
    {
        *("calls_per_job", "parallel_calls_per_job", "target_jobs", "max_jobs", "max_workers"),
        *("target_cpus_per_job", "max_cpus_per_job", "target_memory_per_job", "max_memory_per_job"),
        *("cpus", "cpus_per_task", "cores", "mem", "memory", "gpus"),
        *("context", "requeue", "rerunnable"),
    }
)
NOT_OF_JOBS = (
    "is not to be said of a pool's jobs: each has one worker, and what it has, the pool's cpus, memory and "
    "gpus say"
)


def jobs_section(name: str) -> Section:
    """What may be said of the jobs that are a pool's workers: what their cluster's executor takes.

    Args:
        name: the cluster's.
    """
    from fractal_runner.executors.sections import ExecutorSections  # which knows all executors, and so us

    whole = ExecutorSections().section(name)
    return Section(
        {key: takes for key, takes in whole.keys.items() if key not in SAID_OF_JOBS},
        whole.other_words,
        python_only=whole.python_only,
        refused=dict.fromkeys(SAID_OF_JOBS, f"it {NOT_OF_JOBS}"),
    )


class PoolOptions(TypedDict, total=False):
    """What may be said of a pool; see `PoolTerms`. Sizes and times are as people write them.

    Attributes:
        workers: what its workers are.
        min_workers, max_workers: how many there are at least, and at most.
        idle_timeout: after which a worker without work ends.
        launch_batch_size: how many are started at most per `launch_interval`.
        launch_interval: that interval.
        start_timeout: within which a worker that runs must have come.
        cpus, memory, gpus: what each of them has.
        host, interface: where the scheduler listens.
        slurm, lsf: arguments of the executor whose jobs the workers are.
    """

    workers: Annotated[Literal["local", "slurm", "lsf"], PARSERS["workers"]]
    min_workers: Annotated[int, PARSERS["min_workers"]]
    max_workers: Annotated[int, PARSERS["max_workers"]]
    idle_timeout: Annotated[int | float | str, PARSERS["idle_timeout"]]
    launch_batch_size: Annotated[int, PARSERS["launch_batch_size"]]
    launch_interval: Annotated[int | float | str, PARSERS["launch_interval"]]
    start_timeout: Annotated[int | float | str, PARSERS["start_timeout"]]
    cpus: Annotated[int, PARSERS["cpus"]]
    memory: Annotated[int | float | str, PARSERS["memory"]]
    gpus: Annotated[int, PARSERS["gpus"]]
    host: Annotated[str, PARSERS["host"]]
    interface: Annotated[str, PARSERS["interface"]]
    slurm: Annotated[Mapping[str, Any], Keyed(partial(jobs_section, "slurm"))]
    lsf: Annotated[Mapping[str, Any], Keyed(partial(jobs_section, "lsf"))]
