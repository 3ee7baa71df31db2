"""Slurm, by its commands: arrays are submitted through submitit, asked about and cancelled by us.

submitit writes the script that sbatch gets, and runs what was pickled for it on the node. It has one
submission per array here, a `_Element`, which only says where its job's work is: results and states never go
through submitit. What its commands say is read in `slurm_words`.

What a script is made of is quoted, except the lines of `setup`, `teardown` and `pre_submission_commands`, which
are shell by nature. On a node it takes its pickle by the job's own id (submitit looks for one file per
element): so nothing is left to be done once sbatch has been called, and nothing is amiss if whoever called it
dies at that moment.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import submitit
from submitit.core import utils as submitit_utils
from submitit.core.core import InfoWatcher
from submitit.helpers import Checkpointable
from submitit.slurm.slurm import SlurmJob

from fractal_runner.errors import did_you_mean
from fractal_runner.executors.batch import slurm_words as words
from fractal_runner.executors.batch.scheduler import (
    ArrayRequest,
    JobPlace,
    JobState,
    JobStatus,
    Scheduler,
    SchedulerError,
    SubmissionRefusedError,
)
from fractal_runner.quantities import parse_count

Run = Callable[..., "subprocess.CompletedProcess[str]"]

_MAX_ARRAY = 1000  # where Slurm does not say: below its own default, 1001
_IDS_PER_COMMAND = 500
_ARRAYS_PER_COMMAND = 100
_LONGEST_LEAD_S = 90
_LEAD_WITHOUT_LIMIT_S = 30  # a partition may have a limit of its own
_FOREVER_MIN = 366 * 24 * 60
_MIB = 2**20

# Slurm's variables change what its commands do: within a job they are that job's limits, and a user may have
# set some to have nicer listings. None is kept but those that say where the cluster is and who we are, and
# what a user wants of all jobs, unless the array says something else: sbatch puts them above its script.
_VARIABLES = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
_KEPT_VARIABLES = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
_DEFAULT_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "",
    "SBATCH_WCKEY": "",
}
# No list of array elements is cut short (squeue(1)); no message is in another language.
_SETTINGS = {"SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}

# Options that extra lines may not have, as the array could not be found or followed any more.
_OURS = {
    "array": "a",
    "clusters": "M",
    "help": "h",
    "job-name": "J",
    "output": "o",
    "parsable": "",
    "signal": "",
    "test-only": "",
    "usage": "",
    "version": "V",
    "wait": "W",
    "wrap": "",
}

# While the worker is in the background the shell can pass on the signal that its time is up, and does not die
# of the one that ends the job: so the teardown is reached.
_WITH_TEARDOWN = """\
{command} &
worker=$!
trap 'signalled=1; kill -USR2 "$worker"' USR2
trap 'signalled=1' TERM
while signalled=; wait "$worker"; code=$?; [ -n "$signalled" ]; do :; done"""


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
            Otherwise its words stay what they are. Scripts are then named as the nodes see them.
        command_timeout: seconds after which a command is ended.
        max_array: how many jobs an array may have; by default what `scontrol show config` says.
        run: what runs commands, as `subprocess.run` does; submitit runs sbatch by itself.

    Memory is rounded up to whole MiB, Slurm's "M"; time to whole minutes. Both are thus never less than asked
    for. Jobs that Slurm forgot (`MinJobAge`, 300 s, after their end) are known as long as there is accounting.
    One that is cancelled by its own number before it started is forgotten at once, by accounting as well.

    Raises:
        TypeError, ValueError: as `check` does.
    """

    name = "SLURM"

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
        command_timeout: float = 60,
        max_array: int | None = None,
        run: Run = subprocess.run,
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
        self._python = sys.executable if python is None else python
        self._commands = _Commands(
            tuple(shlex.split(command_prefix) if isinstance(command_prefix, str) else command_prefix),
            command_timeout,
            run,
        )
        self._max_array = max_array
        self._asking = threading.Lock()
        # How many jobs an array of ours has, by its id: all of them can be cancelled by one word. Set and
        # read in single steps.
        self._counts: dict[str, int] = {}
        self._has_accounting = True  # until sacct has said that there is none

    @property
    def max_array(self) -> int:  # type: ignore[override]  # asked for when it is needed
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
        parsed = {}
        for name, value in extra.items():
            parse = _OPTIONS.get(name)
            if parse is None:
                if name in _SAID_ELSEWHERE:
                    hint = f"a call says it by `{_SAID_ELSEWHERE[name]}`"
                else:
                    hint = did_you_mean(name, _OPTIONS)
                raise TypeError(f"SLURM's executor has no option {name!r}: {hint}")
            if value is None:
                continue
            try:
                known = parse(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if known:
                parsed[name] = known
        return MappingProxyType(parsed)

    def submit(self, request: ArrayRequest) -> Sequence[str]:
        try:
            executor = self._prepare(request)
        except OSError as error:
            raise SchedulerError(f"{request.directory} cannot be written to: {error}") from error
        try:
            with executor.batch():
                job = executor.submit(_Element(request.seen_as))
        except submitit_utils.FailedJobError as error:
            cause = error.__cause__
            returncode = cause.returncode if isinstance(cause, subprocess.CalledProcessError) else None
            raise _not_submitted(request, executor.stderr(), returncode) from None
        except (submitit_utils.FailedSubmissionError, OSError) as error:
            said = "\n".join(filter(None, (str(error), executor.stderr())))
            raise SchedulerError(f"It is not known whether SLURM has array {request.name}: {said}") from error
        return self._ids(str(job.job_id), request.count)

    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        fields = f"--Format={words.SQUEUE_FIELDS}"
        answer = self._commands(
            "squeue", "--noheader", "--me", "--states=all", f"--name={request.name}", fields
        )
        answer.expect_success()
        arrays = words.read_array_ids(answer.stdout)
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
        return {job: _told_by_both(status, account.of(job)) for job, status in found.items()}

    def cancel(self, jobs: Collection[str]) -> None:
        wanted = [
            word
            for array, numbers in _by_array(jobs).items()
            for word in self._cancel_words(array, sorted(numbers))
        ]
        for start in range(0, len(wanted), _IDS_PER_COMMAND):
            answer = self._commands("scancel", *wanted[start : start + _IDS_PER_COMMAND])
            told = words.cleaned(answer.stderr).splitlines()
            if answer.returncode and not (told and all(map(words.NOTHING_TO_CANCEL.search, told))):
                answer.expect_success()

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

    def _account(self, *options: str) -> _Answer | None:
        """What sacct says; None if there is no accounting, now or ever."""
        answer = self._commands(
            "sacct", "--noheader", "--parsable2", f"--format={words.SACCT_FIELDS}", *options
        )
        if answer.is_missing or words.NO_ACCOUNTING.search(answer.stderr + answer.stdout):
            self._has_accounting = False
            return None
        return answer

    def _prepare(self, request: ArrayRequest) -> _Submitter:
        """What submits the array, with all that it needs on disk."""
        if not re.fullmatch(r"[\w.+-]+", request.name, re.ASCII):
            raise ValueError(f"{request.name!r} is not a name for an array: squeue would not find it by that")
        _one_line(request.seen_as)
        options = self._merged(request.extra)
        minutes = None if request.time is None else math.ceil(request.time / 60)
        parameters: dict[str, Any] = {
            "job_name": request.name,
            "partition": request.queue,
            "account": request.account,
            "time": minutes,
            "mem": None if request.memory is None else f"{math.ceil(request.memory / _MIB)}M",
            "gres": _gres(request, options),
            **_cpus(request, options),
            **{name: options.get(name) for name in ("qos", "constraint", "nodelist", "exclude")},
            "wckey": None,  # submitit has one of its own, which a site may refuse
            "use_srun": False,
            "stderr_to_stdout": True,
        }
        folder = request.directory / "submitit"
        seen_as = f"{request.seen_as.rstrip('/')}/submitit"
        for path in (str(folder.absolute()), seen_as):
            if tag := re.search("%[jtAa]", path):
                raise ValueError(f"{path}: submitit would replace {tag[0]!r} in it; choose another folder")
        folder.mkdir(exist_ok=True)
        teardown = list(options.get("teardown", ()))
        executor = _Submitter(
            folder,
            seen_as=seen_as,
            command=self._commands.sbatch({name for name in parameters if parameters[name] is not None}),
            waits=bool(teardown),
            python=shlex.quote(self._python),
            named_by_nodes=bool(self._commands.prefix),
        )
        executor.update_parameters(
            **parameters,
            setup=_setup(options, seen_as),
            teardown=[*teardown, 'exit "$code"'] if teardown else None,
            additional_parameters={
                "array": f"0-{request.count - 1}",
                "output": request.seen_as.rstrip("/").replace("%", "%%") + "/job-%a.log",
                "signal": f"B:USR2@{_lead(minutes)}",
                ("requeue" if self._requeue else "no-requeue"): True,
            },
        )
        # Named before anything is submitted, for each element to take on its node.
        element = submitit_utils.DelayedSubmission(_Element(request.seen_as))
        element.set_timeout(minutes or _FOREVER_MIN, executor.max_num_timeout)
        element.dump(folder / _PICKLE)
        return executor

    def _merged(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """The defaults and what a call says, as `check` has parsed both."""
        merged = dict(self._defaults)
        for name, value in extra.items():
            merge = _MERGES.get(name)
            merged[name] = merge(merged[name], value) if merge and name in merged else value
        return merged


class _Element(Checkpointable):
    """What each job of an array runs: all further is in the array's directory.

    It is pickled by reference, and submitit has it requeued as it is, should that ever come to it.

    Args:
        directory: the array's, as the nodes see it.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self) -> None:
        from fractal_runner.executors.batch.job import run_job

        array, number = os.environ["SLURM_ARRAY_JOB_ID"], int(os.environ["SLURM_ARRAY_TASK_ID"])
        place = JobPlace(
            id=f"{array}_{number}",
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            node=os.environ["SLURMD_NODENAME"],
        )
        run_job(self.directory, number, place)


class _NoWatcher(InfoWatcher):
    """In the place of submitit's own, which would ask sacct."""

    def register_job(self, job_id: str) -> None:
        pass

    def _make_command(self) -> None:
        return None


class _Job(SlurmJob[None]):
    watcher = _NoWatcher()


class _Submitter(submitit.SlurmExecutor):
    """submitit's executor, for one array.

    The array is one submission to submitit: for several it would go through an executor of its own. That
    there are several elements only its parameters say.

    Args:
        folder: where submitit has its files.
        seen_as: the same, as the nodes see it.
        command: the words that submit the script of this name.
        waits: whether the shell waits for the worker, as it has something to do afterwards.
        python: the interpreter on the nodes, quoted.
        named_by_nodes: whether the script is where the nodes see it to whoever submits it.
    """

    job_class = _Job

    def __init__(
        self,
        folder: Path,
        *,
        seen_as: str,
        command: Callable[[str], list[str]],
        waits: bool,
        python: str,
        named_by_nodes: bool,
    ) -> None:
        super().__init__(folder, max_num_timeout=3, python=python)
        self._seen_as = seen_as
        self._command = command
        self._waits = waits
        self._named_by_nodes = named_by_nodes

    def stderr(self) -> str:
        """What sbatch had to say."""
        try:
            return words.cleaned((Path(self.folder) / _STDERR).read_text(errors="replace"))
        except OSError:
            return ""

    @classmethod
    def affinity(cls) -> int:
        return 1  # there need not be an srun here

    @property
    def _submitit_command_str(self) -> str:
        command = f"{self.python} -u -m submitit.core._submit {shlex.quote(self._seen_as)}"
        # In the place of the shell, as Slurm signals that alone that time is nearly up.
        return _WITH_TEARDOWN.format(command=command) if self._waits else f"exec {command}"

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        script = str(submission_file_path)
        if self._named_by_nodes:
            script = f"{self._seen_as}/{submission_file_path.name}"
        # submitit would print what sbatch writes on stderr on ours, and give it our stdin.
        own = 'exec "$@" 2>"$0" </dev/null'
        return ["/bin/sh", "-c", own, str(Path(self.folder) / _STDERR), *self._command(script)]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a command has answered."""

    program: str
    returncode: int
    stdout: str
    stderr: str

    @property
    def is_missing(self) -> bool:
        return self.returncode == _NOT_FOUND

    def expect_success(self) -> None:
        """Raise SchedulerError unless it has succeeded."""
        if self.is_missing:
            raise SchedulerError(_missing(self.program))
        if self.returncode:
            said = words.cleaned(self.stderr) or words.cleaned(self.stdout) or "It says nothing."
            raise SchedulerError(f"{self.program} failed with exit code {self.returncode}: {said}")


@dataclass(frozen=True, slots=True)
class _Commands:
    """How Slurm's commands are run: a list of words, never by a shell of ours, and not for ever."""

    prefix: tuple[str, ...]
    timeout: float
    run: Run

    def __call__(self, *command: str) -> _Answer:
        """Run a command.

        Raises:
            SchedulerError: if it does not end in time.
        """
        settings = ["env", *(f"{name}={value}" for name, value in _SETTINGS.items())] if self.prefix else []
        try:
            answer = self.run(
                self._behind_prefix([*settings, *command]),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self.timeout,
                env={**_without_slurm(os.environ), **_SETTINGS},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SchedulerError(f"{command[0]} did not answer within {self.timeout:g} s") from None
        except FileNotFoundError:
            return _Answer((self.prefix or command)[0], _NOT_FOUND, "", "")
        except OSError as error:
            raise SchedulerError(f"{command[0]} could not be run: {error}") from error
        return _Answer(command[0], answer.returncode, answer.stdout, answer.stderr)

    def sbatch(self, said: Collection[str]) -> Callable[[str], list[str]]:
        """What makes the words that submit a script; `said` are the parameters that it sets itself."""
        kept = {name for name, parameter in _DEFAULT_VARIABLES.items() if parameter not in said}
        unset = sorted(os.environ.keys() - _without_slurm(os.environ, kept).keys())
        without = ["env", *(word for name in unset for word in ("-u", name))]
        # submitit gives a command all the time that it takes.
        limit = ["timeout", "-k", "5", f"{self.timeout:g}"]
        return lambda script: [*limit, *without, *self._behind_prefix(["sbatch", script])]

    def _behind_prefix(self, command: list[str]) -> list[str]:
        # ssh joins its words, and the shell at the other end takes them apart again.
        if any(PurePosixPath(word).name == "ssh" for word in self.prefix):
            command = [shlex.join(command)]
        return [*self.prefix, *command]


def _without_slurm(variables: Mapping[str, str], kept: Collection[str] = ()) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if not name.startswith(_VARIABLES) or name in _KEPT_VARIABLES or name in kept
    }


def _missing(program: str) -> str:
    return (
        f"{program} was not found: is this a SLURM login node? Load its module there, or say by "
        "`command_prefix` how to reach one."
    )


def _not_submitted(request: ArrayRequest, stderr: str, returncode: int | None) -> SchedulerError:
    """The error of a failed sbatch."""
    if returncode in _TIMED_OUT:
        return SchedulerError(f"sbatch did not answer in time for array {request.name}. {stderr}".rstrip())
    if returncode == _NOT_FOUND:
        return SchedulerError(f"{_missing('sbatch')} {stderr}".rstrip())
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


def _lead(minutes: int | None) -> int:
    """How many seconds before its end a job is told of it. Slurm itself has a grain of a minute there."""
    return _LEAD_WITHOUT_LIMIT_S if minutes is None else min(_LONGEST_LEAD_S, minutes * 60 // 10)


def _cpus(request: ArrayRequest, options: Mapping[str, Any]) -> dict[str, int]:
    """The job's CPUs, divided among the tasks that it says it has."""
    nodes, tasks = options.get("nodes", 1), options.get("ntasks_per_node", 1)
    return {
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": math.ceil(request.cpus / (nodes * tasks)),
    }


def _gres(request: ArrayRequest, options: Mapping[str, Any]) -> str | None:
    gres: str | None = options.get("gres")
    if gres is not None and re.search(r"(?:^|[,/:])gpu\b", gres):
        return gres
    gpus = request.gpus or int(options.get("needs_gpu", False))
    return ",".join(filter(None, (gres, f"gpu:{gpus}" if gpus else None))) or None


def _setup(options: Mapping[str, Any], seen_as: str) -> list[str]:
    """The lines between sbatch's options and the command."""
    folder = shlex.quote(seen_as)
    pickle = f'{folder}/{_PICKLE} {folder}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"'
    variables = {**options.get("env", {}), **options.get("user_local_exports", {})}
    return [
        *options.get("extra_lines", ()),  # before any command, or sbatch would not read them
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *options.get("setup", ()),
        *options.get("pre_submission_commands", ()),
        f"ln -f {pickle} 2>/dev/null || cp -f {pickle}",
    ]


# What a call may say by `extra`.


def _one_line(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a line of text")
    return value.strip()


def _lines(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is not a list of lines")
    return tuple(_one_line(line.replace("\t", "    ") if isinstance(line, str) else line) for line in value)


def _names(value: Any) -> str:
    """Nodes: "n1,n[3-5]", or a list of such."""
    return ",".join(
        map(_one_line, [value] if isinstance(value, str) or not isinstance(value, Sequence) else value)
    )


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither True nor False")
    return value


def _exports(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping of variables to values")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"{name!r} is not the name of a variable")
    return {name: _one_line(str(content)) for name, content in value.items()}


def _sbatch_lines(value: Any) -> tuple[str, ...]:
    """Lines for sbatch, each with its "#SBATCH" in front."""
    return tuple(f"#SBATCH {_sbatch_options(line)}" for line in _lines(value))


def _sbatch_options(line: str) -> str:
    found = re.fullmatch(r"(?:#SBATCH\s+)?(-.*)", line)
    if found is None:
        raise ValueError(
            f'{line!r} is no line for sbatch: write "#SBATCH --option=value", or "--option=value"'
        )
    try:
        parts = shlex.split(found[1])
    except ValueError as error:
        raise ValueError(f"{line!r}: {error}") from None
    for part in parts:
        if ours := _is_ours(part):
            raise ValueError(f"{line!r}: --{ours} is the executor's own to say")
    return found[1]


def _is_ours(word: str) -> str | None:
    """The option of `_OURS` that this word of a line is, if it is: long, cut short as sbatch allows, or a letter."""
    if word.startswith("--"):
        name = word[2:].partition("=")[0]
        return next((ours for ours in _OURS if name and ours.startswith(name) and name not in _FREE), None)
    letter = word[1:2] if word.startswith("-") else ""
    return next((ours for ours, short in _OURS.items() if letter and short == letter), None)


_PICKLE, _STDERR = "element.pkl", "sbatch.err"
_NOT_FOUND, _TIMED_OUT = 127, (124, 137)  # timeout(1), env(1)
_FREE = {"wait-all-nodes"}

_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "constraint": _one_line,
    "env": _exports,
    "exclude": _names,
    "extra_lines": _sbatch_lines,
    "gres": _one_line,
    "needs_gpu": _flag,
    "nodelist": _names,
    "nodes": parse_count,
    "ntasks_per_node": parse_count,
    "pre_submission_commands": _lines,
    "qos": _one_line,
    "setup": _lines,
    "teardown": _lines,
    "user_local_exports": _exports,
}
_SAID_ELSEWHERE = {
    "account": "account",
    "cpus_per_task": "cpus",
    "gpus": "gpus",
    "mem": "memory",
    "memory": "memory",
    "partition": "queue",
    "time": "time",
}
# How a call's own goes with the default; for all others, in its place.
_MERGES: dict[str, Callable[[Any, Any], Any]] = {
    "env": lambda default, own: {**default, **own},
    "exclude": lambda default, own: f"{default},{own}",
    "extra_lines": lambda default, own: (*default, *own),
    "setup": lambda default, own: (*default, *own),
    "teardown": lambda default, own: (*own, *default),
}
