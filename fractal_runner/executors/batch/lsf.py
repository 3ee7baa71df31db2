"""The executor of an LSF cluster, in LSF's words."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

from fractal_runner.executors.batch.base import BatchExecutor, BatchOptions
from fractal_runner.executors.batch.commands import parse_words
from fractal_runner.executors.batch.lsf_scheduler import LsfScheduler
from fractal_runner.executors.batch.lsf_submission import MemoryPer, MemoryUnit
from fractal_runner.quantities import optional, parse_count, parse_time


class LsfExecutor(BatchExecutor):
    """Runs calls in the jobs of an LSF cluster: IBM Spectrum LSF 10.1, or one of the openlava family.

    Args:
        folder: where calls, results and logs are written: on a file system that the hosts share.
        queue, project: as bsub has them.
        walltime: of a call, "01:30:00", "90m" or seconds; a job's is that of all its calls, one after the
            other.
        cores: CPUs of a call.
        memory: of a call, "4G" (4,000 MB) or a number of MB, whatever LSF counts in.
        memory_unit: what LSF counts memory in here: "KB", "MB", "GB", …; by default what `lsf.conf` says,
            else what the family's LSF does.
        memory_per: whether it takes what a job reserves as of a "job", of each "host" of it, or of each
            "task".
        gpus: GPUs of a call.
        resource_requirements: `"select[type==any] rusage[scratch=10]"`, or several such texts.
        bsub_extra: further words for bsub, `["-app", "chem"]`.
        setup, teardown: lines of shell that each job begins and ends with.
        env: variables for each job.
        rerunnable: whether LSF may start a job again whose host was lost.
        python: the interpreter on the hosts; this one's path by default.
        command_prefix: words in front of each of LSF's commands, `["ssh", "login1"]`.
        bsub_cmd, bjobs_cmd, bkill_cmd: these commands, by name or path.
        command_timeout: seconds after which such a command is ended.
        max_array: how many jobs an array may have, 1,000 by default: not more than the site's
            MAX_JOB_ARRAY_SIZE.
        options: what all batch executors take: how many calls run at a time (`max_workers`), how they go
            into jobs (`calls_per_job`, `parallel_calls_per_job`, `target_jobs`, `max_jobs`, …), when the
            scheduler is asked (`poll_interval`, `pending_timeout`, …), `path_map`, `context`, `name`: see
            `BatchExecutor`.

    A call's `CallOptions` come before what is said here (its `account` is the project); `extra` takes
    `resource_requirements`, `bsub_extra`, `setup`, `teardown`, `env`, and Fractal's names (`exclude`,
    `nodelist`, `needs_gpu`, `pre_submission_commands`, `user_local_exports`, `tasks_per_job`,
    `parallel_tasks_per_job`).

    Raises:
        TypeError, ValueError: if an argument is not what it should be.
    """

    other_words: ClassVar[Mapping[str, str]] = {
        "account": "project",
        "cpus": "cores",
        "cpus_per_task": "cores",
        "exclude": 'resource_requirements="select[hname!=…]"',
        "extra_lines": "bsub_extra",
        "mem": "memory",
        "partition": "queue",
        "requeue": "rerunnable",
        "time": "walltime",
    }

    @classmethod
    def _programs(cls, options: Mapping[str, Any]) -> Sequence[str]:
        commands = [
            (name, options.get(name) or name.removesuffix("_cmd"))
            for name in ("bsub_cmd", "bjobs_cmd", "bkill_cmd")
        ]
        return [parse_words(name, said, least=1)[0] for name, said in commands]

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        queue: str | None = None,
        project: str | int | None = None,
        walltime: int | float | str | None = None,
        cores: int | None = None,
        memory: int | float | str | None = None,
        memory_unit: MemoryUnit | None = None,
        memory_per: MemoryPer = "host",
        gpus: int | None = None,
        resource_requirements: str | Sequence[str] = (),
        bsub_extra: Sequence[str] = (),
        setup: Sequence[str] = (),
        teardown: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        rerunnable: bool = False,
        python: str | None = None,
        command_prefix: str | Sequence[str] = (),
        bsub_cmd: str | Sequence[str] = "bsub",
        bjobs_cmd: str | Sequence[str] = "bjobs",
        bkill_cmd: str | Sequence[str] = "bkill",
        command_timeout: int | float | str = 60.0,
        max_array: int | None = None,
        **options: Unpack[BatchOptions],
    ) -> None:
        self._check_words(options)
        if isinstance(walltime, str) and re.fullmatch(r"\d+:\d+", walltime.strip()):
            hours, minutes = walltime.strip().split(":")
            raise ValueError(
                f"walltime: {walltime!r} is hours and minutes to LSF, and minutes and seconds elsewhere: "
                f'write "{hours}:{minutes}:00" for the first, "00:{hours}:{minutes}" for the second'
            )
        scheduler = LsfScheduler(
            resource_requirements=resource_requirements,
            bsub_extra=bsub_extra,
            setup=setup,
            teardown=teardown,
            env=env,
            memory_unit=memory_unit,
            memory_per=memory_per,
            rerunnable=rerunnable,
            python=python,
            command_prefix=command_prefix,
            bsub_cmd=bsub_cmd,
            bjobs_cmd=bjobs_cmd,
            bkill_cmd=bkill_cmd,
            command_timeout=command_timeout,
            max_array=max_array,
        )
        super().__init__(
            scheduler,
            folder,
            cpus=optional("cores", parse_count, cores),
            memory=memory,
            gpus=gpus,
            time=optional("walltime", parse_time, walltime),
            queue=queue,
            account=None if project is None else str(project),  # some are numbers
            **options,
        )
