"""What is submitted to Slurm: a script, and what the job that it starts does. By submitit, with our seams.

submitit writes the script that sbatch gets, and runs what was pickled for it on the node. It has one
submission per array here, an `Element`, which only says where its job's work is: results and states never go
through submitit.

What a script is made of is quoted, except the lines of `setup`, `teardown` and `pre_submission_commands`,
which are shell by nature. On a node it takes its pickle by the job's own id (submitit looks for one file per
element): so nothing is left to be done once sbatch has been called, and nothing is amiss if whoever called
it dies at that moment.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils as submitit_utils
from submitit.helpers import Checkpointable
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from fractal_runner.executors.batch.commands import Commands, cleaned
from fractal_runner.executors.batch.options import one_line
from fractal_runner.executors.batch.packing import lead_s
from fractal_runner.executors.batch.scheduler import ArrayRequest, JobPlace
from fractal_runner.executors.batch.slurm_commands import sbatch
from fractal_runner.executors.preview import Handover

_PICKLE, _STDERR = "element.pkl", "sbatch.err"
_SCRIPT = "submission_file.sh"  # submitit puts a number into its name
_LEAD_WITHOUT_LIMIT_S = 30  # a partition may have a limit of its own
_FOREVER_MIN = 366 * 24 * 60
_MIB = 2**20

# Until the worker has a handler for it, the signal that time is nearly up would end the shell, or the worker.
_DEAF = "trap '' USR2"
# Slurm signals the shell alone, both before the time is up and when the job is cancelled. While the worker is
# in the background the shell can pass that on, and wait for it, and so reach its own end.
_WITH_TEARDOWN = """\
{command} &
worker=$!
trap 'signalled=1; kill -USR2 "$worker"' USR2
trap 'signalled=1; kill -TERM "$worker"' TERM
while signalled=; wait "$worker"; code=$?; [ -n "$signalled" ]; do :; done"""


def prepare(
    request: ArrayRequest, options: Mapping[str, Any], *, commands: Commands, python: str, requeue: bool
) -> Submitter:
    """What submits an array. Nothing is written yet: `Submitter.write` does that.

    Args:
        request: the array.
        options: its own and the scheduler's, parsed.
        commands: how sbatch is run.
        python: the interpreter on the nodes.
        requeue: whether Slurm may start a job again.

    Raises:
        ValueError: if Slurm or submitit could not keep to its name or directory.
    """
    if not re.fullmatch(r"[\w.+-]+", request.name, re.ASCII):
        raise ValueError(f"{request.name!r} is not a name for an array: squeue would not find it by that")
    one_line(request.seen_as)
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
    teardown = list(options.get("teardown", ()))
    executor = Submitter(
        folder,
        seen_as=seen_as,
        command=sbatch(commands, {name for name in parameters if parameters[name] is not None}),
        waits=bool(teardown),
        directory=request.seen_as,
        python=shlex.quote(python),
        named_by_nodes=bool(commands.prefix),
    )
    executor.update_parameters(
        **parameters,
        setup=_setup(options, seen_as),
        teardown=[*teardown, 'exit "$code"'] if teardown else None,
        additional_parameters={
            "array": f"0-{request.count - 1}",
            "output": request.seen_as.rstrip("/").replace("%", "%%") + "/job-%a.log",
            "signal": f"B:USR2@{_lead(minutes)}",
            ("requeue" if requeue else "no-requeue"): True,
        },
    )
    return executor


class Element(Checkpointable):
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
            node=os.environ["SLURMD_NODENAME"],
        )
        run_job(self.directory, number, place)


class _NoWatcher(SlurmInfoWatcher):
    """In the place of submitit's own, which would ask sacct."""

    def register_job(self, job_id: str) -> None:
        pass

    def _make_command(self) -> None:
        return None


class _Job(SlurmJob[None]):
    watcher = _NoWatcher()


class Submitter(submitit.SlurmExecutor):
    """submitit's executor, for one array.

    The array is one submission to submitit: for several it would go through an executor of its own. That
    there are several elements only its parameters say.

    Args:
        folder: where submitit has its files.
        seen_as: the same, as the nodes see it.
        directory: the array's, as the nodes see it.
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
        directory: str,
        command: Callable[[str], list[str]],
        waits: bool,
        python: str,
        named_by_nodes: bool,
    ) -> None:
        super().__init__(folder, max_num_timeout=3, python=python)
        self._seen_as = seen_as
        self._directory = directory
        self._command = command
        self._waits = waits
        self._named_by_nodes = named_by_nodes

    def write(self) -> None:
        """Write what each element takes on its node: named before anything is submitted.

        Raises:
            OSError: if the array's directory cannot be written to.
        """
        folder = Path(self.folder)
        folder.mkdir(exist_ok=True)
        element = submitit_utils.DelayedSubmission(Element(self._directory))
        element.set_timeout(self.parameters["time"] or _FOREVER_MIN, self.max_num_timeout)
        element.dump(folder / _PICKLE)

    def hand_over(self) -> str:
        """Submit it; the id that Slurm has given the array.

        Raises:
            OSError, FailedSubmissionError: what submitit makes of it if Slurm does not answer.
            FailedJobError: if sbatch has failed.
        """
        with self.batch():
            job = self.submit(Element(self._directory))
        return str(job.job_id)

    def preview(self) -> Handover:
        """What would be handed over: submitit's own text, made as when it submits."""
        text = self._make_submission_file_text(self._submitit_command_str, "")
        return Handover(text, tuple(self._command(f"{self._seen_as}/{_SCRIPT}")))

    def stderr(self) -> str:
        """What sbatch had to say."""
        try:
            return cleaned((Path(self.folder) / _STDERR).read_text(errors="replace"))
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


def _lead(minutes: int | None) -> int:
    """How many seconds before its end a job is told of it. Slurm itself has a grain of a minute there."""
    return _LEAD_WITHOUT_LIMIT_S if minutes is None else int(lead_s(minutes * 60))


def _cpus(request: ArrayRequest, options: Mapping[str, Any]) -> dict[str, int]:
    """The job's CPUs, divided among the tasks that it says it has."""
    nodes, tasks = options.get("nodes", 1), options.get("ntasks_per_node", 1)
    return {
        "nodes": nodes,
        **({"ntasks_per_node": tasks} if tasks > 1 else {}),  # submitit cannot do with None
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
    own = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_submitted.pkl"'
    pickle = f"{folder}/{_PICKLE} {folder}/{own}"
    variables = {**options.get("env", {}), **options.get("user_local_exports", {})}
    return [
        *options.get("extra_lines", ()),  # before any command, or sbatch would not read them
        _DEAF,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *options.get("setup", ()),
        *options.get("pre_submission_commands", ()),
        f"ln -f {pickle} 2>/dev/null || cp -f {pickle}",
    ]
