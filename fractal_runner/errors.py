"""The exceptions, one per thing a caller would do differently.

Apart because every other module, workers included, may raise them: this one imports nothing of ours.
All of them keep every attribute through pickle: their one positional argument is the message, the
rest lives in the instance's dictionary, and that is what the default reduction carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class InputFileError(ValueError):
    """A file that a user wrote is not what it should be.

    Attributes:
        file: the file's path as it was given.
        problems: one sentence per mistake, each with its place in the file.
    """

    def __init__(self, message: str = "", *, file: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.file = file
        self.problems = tuple(problems)


class _UnitError(RuntimeError):
    """What the errors of a workflow's units have in common.

    Attributes:
        workflow_task_id: id of the WorkflowTask (not of its Task).
        workflow_task_order: its place in the workflow.
        task_name: name of its Task.
        returncode: the unit's exit code as subprocess reports it, negative for a signal; None if there
            was none.
        log_file: path of the unit's log, as the caller sees it.
        unit_index: index of the unit among its task's; None for what befell the task as a whole.
        zarr_url: the unit's image, for units that have one.
        failures: every failed unit's own error, by index (on the raised error only).
        dataset: the dataset with what succeeded merged into it (on the raised error only).
        type_filters: the type filters in force before the failed task; with `dataset`, what a new run
            that goes on from here needs.
    """

    def __init__(
        self,
        message: str = "",
        *,
        workflow_task_id: int | str | None = None,
        workflow_task_order: int | None = None,
        task_name: str | None = None,
        returncode: int | None = None,
        log_file: str | None = None,
        unit_index: int | None = None,
        zarr_url: str | None = None,
        failures: Sequence[_UnitError] = (),
        dataset: Any = None,
        type_filters: Mapping[str, bool] | None = None,
    ) -> None:
        super().__init__(message)
        self.workflow_task_id = workflow_task_id
        self.workflow_task_order = workflow_task_order
        self.task_name = task_name
        self.returncode = returncode
        self.log_file = log_file
        self.unit_index = unit_index
        self.zarr_url = zarr_url
        self.failures = tuple(failures)
        self.dataset = dataset
        self.type_filters = None if type_filters is None else dict(type_filters)

    def __reduce__(self) -> tuple[Any, ...]:
        # As by default, but said: for exceptions that do not say it, tblib, which Dask installs for all of
        # them, makes arguments of their attributes. A raised error is among its own failures.
        return type(self), self.args, self.__dict__

    def __str__(self) -> str:
        return super().__str__() or self._summary()

    def _summary(self) -> str:
        """A sentence made of the attributes, for an error that was raised without a message."""
        task = "A task" if self.task_name is None else f"Task {self.task_name!r}"
        order = "" if self.workflow_task_order is None else f" (order {self.workflow_task_order})"
        code = "" if self.returncode is None else f" with exit code {self.returncode}"
        log = "" if self.log_file is None else f"; its log is {self.log_file}"
        return f"{task}{order} failed{code}{log}."


class TaskExecutionError(_UnitError):
    """A task's own failure: a unit's exit code is positive, or its Python function raised."""


class JobExecutionError(_UnitError):
    """What happened to a unit or a call from outside: a signal, a dead worker, a limit, a lost job.

    Attributes (beyond those of every unit's error):
        reason: a scheduler's or our own word for it (`"OUT_OF_MEMORY"`, `"TIMEOUT"`, `"CANCELLED"`).
        info: further explanation, such as the scheduler's raw answer.
        cmd_file: what was run, where it was written to a file.
        stdout_file: where its standard output went.
        stderr_file: where its standard error went.
        job_id: a scheduler's id of the job.
        node: the node that it ran on.
    """

    def __init__(
        self,
        message: str = "",
        *,
        reason: str | None = None,
        info: str | None = None,
        job_id: str | None = None,
        node: str | None = None,
        cmd_file: str | None = None,
        stdout_file: str | None = None,
        stderr_file: str | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(message, **attributes)
        self.reason = reason
        self.info = info
        self.job_id = job_id
        self.node = node
        self.cmd_file = cmd_file
        self.stdout_file = stdout_file
        self.stderr_file = stderr_file

    def _summary(self) -> str:
        sentence = super()._summary() if self.task_name is not None else "A job failed."
        reason = f" Reason: {self.reason}." if self.reason else ""
        return sentence + reason + (f" {self.info}" if self.info else "")

    def assemble_error(self) -> str:
        """The message and the contents of the files it points to, for a log or a web page."""
        parts = [str(self)]
        for title, name in (
            ("COMMAND", self.cmd_file),
            ("STDOUT", self.stdout_file),
            ("STDERR", self.stderr_file if self.stderr_file != self.stdout_file else None),
        ):
            if name is not None:
                parts.append(f"{title} ({name}):\n{_content(name)}")
        if self.info:
            parts.append(f"ADDITIONAL INFO:\n{self.info}")
        return "\n\n".join(parts)


class HistoryError(RuntimeError):
    """A run's history cannot be opened, read or written; the message says why, and which one it is."""


class RunBusyError(RuntimeError):
    """Another coordinator is at work on a run directory.

    Attributes:
        host: the node it runs on.
        pid: its process id there.
    """

    def __init__(self, message: str = "", *, host: str = "", pid: int = 0) -> None:
        super().__init__(message)
        self.host = host
        self.pid = pid


class ExecutorError(RuntimeError):
    """What a call was given, returned or raised could not be carried between processes.

    Attributes:
        type_name: qualified name of the type in question, "" if unknown.
        remote_traceback: where the call raised, as text; "" if it did not raise.
    """

    def __init__(self, message: str = "", *, type_name: str = "", remote_traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        self.remote_traceback = remote_traceback


class TaskOutputValidationError(TaskExecutionError, ValueError):
    """What a task wrote, or what its units wrote together, is not valid output."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all there are."""
    import difflib

    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(map(repr, names))}" if names else "there are none"


def _content(name: str) -> str:
    try:
        return Path(name).read_text(errors="replace").strip() or "(empty)"
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
