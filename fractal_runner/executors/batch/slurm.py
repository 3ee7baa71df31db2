"""The executor of a SLURM cluster, in SLURM's words."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from fractal_runner.executors.batch.base import BatchExecutor, BatchOptions
from fractal_runner.executors.batch.slurm_scheduler import SlurmScheduler
from fractal_runner.quantities import optional, parse_count


class SlurmExecutor(BatchExecutor):
    """Runs calls in the jobs of a SLURM cluster.

    Args:
        folder: where calls, results and logs are written: on a file system that the nodes share.
        partition, account, qos, constraint, nodelist, exclude, nodes, gres: as sbatch has them.
        time: of a call, "01:30:00" or seconds; a job's is that of all its calls, one after the other.
        cpus_per_task: CPUs of a call.
        mem: memory of a call, "4G" (4,000 MB) or a number of MB.
        gpus: GPUs of a call.
        extra_lines: further lines for sbatch, "#SBATCH --reservation=course".
        setup, teardown: lines of shell that each job begins and ends with.
        env: variables for each job.
        requeue: whether SLURM may start a job again that had to make room for another, or whose node failed.
        python: the interpreter on the nodes; this one's path by default.
        command_prefix: words in front of each of SLURM's commands, `["ssh", "login1"]`.
        command_timeout: seconds after which such a command is ended.
        max_array: how many jobs an array may have; by default what SLURM says.
        options: what all batch executors take: how many calls run at a time (`max_workers`), how they go
            into jobs (`calls_per_job`, `parallel_calls_per_job`, `target_jobs`, `max_jobs`, …), when the
            scheduler is asked (`poll_interval`, `pending_timeout`, …), `path_map`, `context`, `name`: see
            `BatchExecutor`.

    A call's `CallOptions` come before what is said here; `extra` takes the names of sbatch's options above,
    and Fractal's (`needs_gpu`, `pre_submission_commands`, `user_local_exports`, `tasks_per_job`,
    `parallel_tasks_per_job`).

    Raises:
        TypeError, ValueError: if an argument is not what it should be.
    """

    other_words: ClassVar[Mapping[str, str]] = {
        "cores": "cpus_per_task",
        "cpus": "cpus_per_task",
        "memory": "mem",
        "project": "account",
        "queue": "partition",
        "rerunnable": "requeue",
        "walltime": "time",
    }

    @classmethod
    def _programs(cls, options: Mapping[str, Any]) -> Sequence[str]:
        return ("sbatch", "squeue", "scancel")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        partition: str | None = None,
        account: str | int | None = None,
        time: int | float | str | None = None,
        cpus_per_task: int | None = None,
        mem: int | float | str | None = None,
        gpus: int | None = None,
        qos: str | None = None,
        gres: str | None = None,
        constraint: str | None = None,
        nodelist: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        nodes: int | None = None,
        extra_lines: Sequence[str] = (),
        setup: Sequence[str] = (),
        teardown: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        requeue: bool = True,
        python: str | None = None,
        command_prefix: str | Sequence[str] = (),
        command_timeout: int | float | str = 60.0,
        max_array: int | None = None,
        **options: Unpack[BatchOptions],
    ) -> None:
        self._check_words(options)
        scheduler = SlurmScheduler(
            qos=qos,
            gres=gres,
            constraint=constraint,
            nodelist=nodelist,
            exclude=exclude,
            nodes=nodes,
            extra_lines=extra_lines,
            setup=setup,
            teardown=teardown,
            env=env,
            requeue=requeue,
            python=python,
            command_prefix=command_prefix,
            command_timeout=command_timeout,
            max_array=max_array,
        )
        super().__init__(
            scheduler,
            folder,
            cpus=optional("cpus_per_task", parse_count, cpus_per_task),
            memory=mem,
            gpus=gpus,
            time=time,
            queue=partition,
            account=None if account is None else str(account),  # many accounts are numbers
            max_array=max_array,
            **options,
        )
