"""Slurm, by its commands: arrays are submitted through submitit, asked about and cancelled by us.

What its commands say is read in `slurm_words`, what it is given to run is made in `slurm_submission`.
"""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from fractal_runner.executors.batch import slurm_words as words
from fractal_runner.executors.batch.commands import NOT_FOUND, CommandAnswer, Run, cleaned, parse_python
from fractal_runner.executors.batch.limits import SiteLimits
from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    JobState,
    JobStatus,
    Scheduler,
    SchedulerError,
    SubmissionRefusedError,
)
from fractal_runner.executors.batch.slurm_commands import HINT, TIMED_OUT, slurm_commands
from fractal_runner.executors.batch.slurm_limits import ask_limits
from fractal_runner.executors.batch.slurm_options import OPTIONS
from fractal_runner.executors.batch.slurm_submission import Submitter, prepare
from fractal_runner.executors.preview import Handover

_ACCOUNT_S = 5.0  # how far sacct may be behind squeue
_MAX_ARRAY = 1000  # where Slurm does not say: below its own default, 1001
_IDS_PER_COMMAND = 500
_ARRAYS_PER_COMMAND = 100


class SlurmScheduler(Scheduler):
    """A cluster that is run by Slurm.

    Args, the first ones being defaults of what a call may say for itself in `extra`:
        qos: quality of service.
        gres: generic resources of each node, "gpu:a100:1". Where it names no GPU, a call's `gpus` are added.
        constraint: features that a node must have.
        nodelist: nodes that a job must have.
        exclude: nodes that it may not have. A call's own are added.
        nodes: how many nodes a job has. Its work is done on the first one.
        extra_lines: further lines for sbatch, "#SBATCH --reservation=course", or just what stands after
            "#SBATCH". A call's own come after them, and the last one counts.
        setup: lines of shell that each job begins with.
        teardown: lines of shell that it ends with, whatever becomes of its work. Slurm gives it `KillWait`
            (30 s) for them if it is cancelled or out of time.
        env: variables for each job.

    Args that no call says:
        requeue: whether Slurm may start a job again whose node failed, or that had to make room for another.
        python: the interpreter on the nodes; this one's path by default.
        command_prefix: words in front of each of Slurm's commands, `["sudo", "-u", "someone"]`, or one text
            with them. Where one of them is ssh, the command becomes one word, quoted for the remote shell;
            otherwise its words stay what they are. Scripts are then named as the nodes see them.
        command_timeout: seconds after which a command is ended.
        max_array: how many jobs an array may have; by default what `scontrol show config` says.
        run: what runs commands, as `subprocess.run` does; submitit runs sbatch by itself.
        clock: seconds, which never go back.

    Memory is rounded up to whole MiB, Slurm's "M"; time to whole minutes. Both are thus never less than asked
    for. Of a job that ended more than `MinJobAge` ago, 300 s, only accounting knows. One that is cancelled
    by its own number before it started is forgotten at once, by accounting as well.

    Raises:
        TypeError, ValueError: as `check` does.
    """

    name = "SLURM"
    ignores = frozenset({"bsub_extra", "resource_requirements"})
    keeps_waiting = True  # squeue(1): a job is there until it has ended, and MinJobAge after that

    def __init__(
        self,
        *,
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
        run: Run = subprocess.run,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults = self.check(
            {
                "qos": qos,
                "gres": gres,
                "constraint": constraint,
                "nodelist": nodelist,
                "exclude": exclude,
                "nodes": nodes,
                "extra_lines": extra_lines,
                "setup": setup,
                "teardown": teardown,
                "env": env,
            }
        )
        self._requeue = requeue
        self._python = parse_python(python)
        self._commands = slurm_commands(command_prefix, command_timeout, run)
        self._max_array = max_array
        self._asking = threading.Lock()
        # How many jobs an array of ours has, by its id: all of them can be cancelled by one word. Set and
        # read in single steps.
        self._counts: dict[str, int] = {}
        self._unexplained: dict[str, float] = {}  # jobs that have ended, and since when sacct is waited for
        self._clock = clock
        self._has_accounting = True  # until sacct has said that there is none

    @property
    def max_array(self) -> int:
        """How many jobs an array may have, asked for once."""
        with self._asking:
            if self._max_array is None:
                try:
                    said = words.read_max_array(self._commands("scontrol", "show", "config").stdout)
                except SchedulerError:
                    said = None
                self._max_array = said or _MAX_ARRAY
            return self._max_array

    def check(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        return OPTIONS.parse(extra)

    def submit(self, request: ArrayRequest) -> Sequence[str]:
        made = self._make(request)
        try:
            made.write()
        except OSError as error:
            raise SchedulerError(f"{request.directory} cannot be written to: {error}") from error
        try:
            array = made.hand_over()
        except FailedJobError as error:
            cause = error.__cause__
            returncode = cause.returncode if isinstance(cause, subprocess.CalledProcessError) else None
            raise _not_submitted(request, made.stderr(), returncode) from None
        except (FailedSubmissionError, OSError) as error:
            said = "\n".join(filter(None, (str(error), made.stderr())))
            raise SchedulerError(f"It is not known whether SLURM has array {request.name}: {said}") from error
        return self._ids(array, request.count)

    def preview(self, request: ArrayRequest) -> Handover:
        return self._make(request).preview()

    def _make(self, request: ArrayRequest) -> Submitter:
        options = OPTIONS.merge(self._defaults, request.extra)
        return prepare(request, options, commands=self._commands, python=self._python, requeue=self._requeue)

    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        fields = f"--Format={words.SQUEUE_FIELDS}"
        answer = self._commands(
            "squeue", "--noheader", "--me", "--states=all", f"--name={request.name}", fields
        )
        answer.expect_success()
        arrays = words.read_array_ids(answer.stdout) - words.read_refused_arrays(answer.stdout)
        if self._has_accounting:
            account = self._account("--allocations", "--starttime=now-30days", f"--name={request.name}")
            if account is not None:
                if not arrays:
                    account.expect_success()
                arrays |= words.read_array_ids(account.stdout)
        return [self._ids(array, request.count) for array in sorted(arrays, key=int)]

    def states(self, jobs: Collection[str]) -> Mapping[str, JobStatus]:
        if not jobs:
            return {}
        said = self._ask_squeue(_arrays_of(jobs))
        found = {job: said.of(job) for job in jobs}
        # Of these sacct may know more: who cancelled them, or that memory was short in a step of theirs.
        unclear = [job for job, status in found.items() if status is None or _may_be_explained(status)]
        account = words.Answer()
        if unclear and self._has_accounting:
            answer = self._account(f"--jobs={','.join(_arrays_of(unclear))}")
            if answer is not None:
                if any(found[job] is None for job in unclear):
                    answer.expect_success()
                account = words.read_sacct(answer.stdout)
        return {
            job: self._in_its_time(job, status, account.of(job))
            if status is None or _may_be_explained(status)
            else status
            for job, status in found.items()
        }

    def _in_its_time(self, job: str, queue: JobStatus | None, account: JobStatus | None) -> JobStatus:
        """What both say; where sacct may be about to say more, it is waited for, for a moment."""
        is_behind = self._has_accounting and (account is None or account.state is not JobState.ENDED)
        if queue is not None and is_behind:
            since = self._unexplained.setdefault(job, self._clock())
            if self._clock() - since < _ACCOUNT_S:
                return JobStatus(JobState.RUNNING, node=queue.node, detail=queue.detail)
        self._unexplained.pop(job, None)
        return _told_by_both(queue, account)

    def cancel(self, jobs: Collection[str]) -> None:
        wanted = [
            word
            for array, numbers in _by_array(jobs).items()
            for word in self._cancel_words(array, sorted(numbers))
        ]
        for start in range(0, len(wanted), _IDS_PER_COMMAND):
            answer = self._commands("scancel", *wanted[start : start + _IDS_PER_COMMAND])
            told = cleaned(answer.stderr).splitlines()
            if answer.returncode and not (told and all(map(words.NOTHING_TO_CANCEL.search, told))):
                answer.expect_success()

    def limits(self, *, queue: str | None = None, account: str | None = None) -> SiteLimits:
        found = ask_limits(self._commands, partition=queue, account=account, qos=self._defaults.get("qos"))
        with self._asking:
            if self._max_array is None and found.max_array is not None:
                self._max_array = found.max_array.value  # so it is not asked for once more
        return found

    def reasons(self, jobs: Mapping[str, str]) -> Mapping[str, str]:
        said = {job: status.reason or "" for job, status in self.states(jobs).items()}
        return {job: words.NEVER_STARTS[why] for job, why in said.items() if why in words.NEVER_STARTS}

    def _ids(self, array: str, count: int) -> list[str]:
        self._counts[array] = count
        return [f"{array}_{number}" for number in range(count)]

    def _cancel_words(self, array: str, numbers: list[int]) -> list[str]:
        if len(numbers) == self._counts.get(array):
            return [array]
        # Consecutive numbers have the same distance from their places.
        groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
        spans = [[number for _, number in group] for _, group in groups]
        return [
            f"{array}_{span[0]}" if len(span) == 1 else f"{array}_[{span[0]}-{span[-1]}]" for span in spans
        ]

    def _ask_squeue(self, arrays: Sequence[str]) -> words.Answer:
        command = ["squeue", "--noheader", "--array", "--states=all", "--me"]
        fields = f"--Format={words.SQUEUE_FIELDS}"
        if len(arrays) <= _ARRAYS_PER_COMMAND:
            answer = self._commands(*command, f"--jobs={','.join(arrays)}", fields)
            if not words.UNKNOWN_JOB.search(answer.stderr):
                answer.expect_success()
                return words.read_squeue(answer.stdout)
            if len(arrays) == 1:  # of one array squeue says that it does not know it; of several, nothing
                return words.Answer()
        answer = self._commands(*command, fields)
        answer.expect_success()
        return words.read_squeue(answer.stdout)

    def _account(self, *options: str) -> CommandAnswer | None:
        """What sacct says; None if there is no accounting, now or ever."""
        answer = self._commands(
            "sacct", "--noheader", "--parsable2", f"--format={words.SACCT_FIELDS}", *options
        )
        if answer.is_missing or words.NO_ACCOUNTING.search(answer.stderr + answer.stdout):
            self._has_accounting = False
            return None
        return answer


def _not_submitted(request: ArrayRequest, stderr: str, returncode: int | None) -> SchedulerError:
    """The error of a failed sbatch."""
    if returncode in TIMED_OUT:
        return SchedulerError(f"sbatch did not answer in time for array {request.name}. {stderr}".rstrip())
    if returncode == NOT_FOUND:  # nothing was asked, and waiting does not bring it
        return SubmissionRefusedError(f"sbatch was not found: {HINT} {stderr}".rstrip())
    if words.is_refusal(stderr):
        return SubmissionRefusedError(f"SLURM has refused array {request.name}: {stderr}")
    said = stderr or "it says nothing"
    return SchedulerError(f"sbatch failed with exit code {returncode} for array {request.name}: {said}")


def _may_be_explained(status: JobStatus) -> bool:
    return status.state is JobState.ENDED and status.reason in ("CANCELLED", "FAILED")


def _told_by_both(queue: JobStatus | None, account: JobStatus | None) -> JobStatus:
    """What squeue and sacct say together: squeue is up to date, sacct remembers."""
    if queue is None:
        if account is None:
            return JobStatus(JobState.LOST, detail="SLURM does not know it")
        if account.state is JobState.ENDED:
            return account
        return JobStatus(
            JobState.LOST, node=account.node, detail=f"squeue does not know it, {account.detail}"
        )
    # sacct may be some seconds behind, or tell of an earlier start: it counts only if it says the same.
    explains = account is not None and (
        account.reason == queue.reason or (queue.reason, account.reason) == ("FAILED", "OUT_OF_MEMORY")
    )
    return account if explains and account is not None and _may_be_explained(queue) else queue


def _arrays_of(jobs: Collection[str]) -> list[str]:
    return list(dict.fromkeys(job.partition("_")[0] for job in jobs))


def _by_array(jobs: Collection[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for job in jobs:
        array, _, number = job.partition("_")
        found.setdefault(array, set()).add(int(number))
    return found
