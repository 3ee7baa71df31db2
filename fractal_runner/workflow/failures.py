"""From what happened to a unit to the error that says so.

One place turns results of workers and exceptions of executors into the errors of the workflow layer, with
a message that tells which task, which unit, what happened, and the last lines of the log.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from typing import Any

from fractal_runner.errors import JobExecutionError, TaskExecutionError, TaskOutputValidationError
from fractal_runner.worker.command import LOG_TAIL_CHARS
from fractal_runner.worker.processes import signal_name
from fractal_runner.worker.spec import CANCELLED, LAUNCH_FAILED, TIMEOUT, UnitResult
from fractal_runner.workflow.dispatch import Ended
from fractal_runner.workflow.models import Dataset, WorkflowTask
from fractal_runner.workflow.units import Place, Unit, title

UnitError = TaskExecutionError | JobExecutionError

# What an executor's own exception means: a reason, and what to say where it says little itself.
_EXECUTOR_ERRORS: tuple[tuple[type[BaseException], str, str], ...] = (
    (CancelledError, CANCELLED, "it was cancelled before it started, and not by this run"),
    (TimeoutError, TIMEOUT, "the executor's time limit for it had passed"),
    (BrokenExecutor, "BROKEN_EXECUTOR", "the worker that ran it, or one beside it, died"),
)
_TAIL_BUDGET = 10_000_000
_SHORT_TAIL = 500


class Explain:
    """Makes the errors of one stage's failed units.

    A thousand failures with a log of 20,000 characters each would fill the memory: beyond a budget, which
    the first failures use up, later ones show little more than the log's last lines.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._budget = _TAIL_BUDGET

    def failed(self, ended: Ended) -> UnitError | None:
        """The error of a unit that has ended, None if it succeeded."""
        if ended.result is None:
            assert ended.error is not None
            return self._around(ended.unit, ended.error)
        if ended.result.succeeded:
            return None
        return self._within(ended.unit, ended.result)

    def invalid_output(self, unit: Unit, why: str, tail: str = "") -> TaskOutputValidationError:
        """The error of a unit that ended well and left something that is not valid output."""
        message = f"{self._who(unit)} left output that is not valid: {why}."
        return TaskOutputValidationError(message + self._log(unit, tail), **self._about(unit, 0))

    def _within(self, unit: Unit, result: UnitResult) -> UnitError:
        code = result.returncode
        who = self._who(unit)
        note = f" {result.message}" if result.message else ""
        if result.reason is None and code == 0:
            return self.invalid_output(unit, str(result.output_error), result.log_tail)
        if result.reason is None and code is not None and code > 0:
            what = "raised an exception" if self._place.stage.function and code == 1 else f"exit code {code}"
            if code > 128 and self._place.stage.command:
                what += f" (128+N is how a shell reports signal N: {signal_name(code - 128)}?)"
            text = f"{who} failed: {what}.{note}{self._log(unit, result.log_tail)}"
            return TaskExecutionError(text, **self._about(unit, code))
        if result.reason == LAUNCH_FAILED:
            what = "could not be started"
        elif result.reason is not None:
            what = f"was ended ({result.reason})"
        else:
            what = f"was killed by {result.signal}" if result.signal else "ended without an exit code"
        log = self._place.log_file(unit)
        return JobExecutionError(
            f"{who} {what}.{note}{self._log(unit, result.log_tail)}",
            reason=result.reason or result.signal,
            info=result.message,
            cmd_file=self._place.args_file(unit) if self._place.stage.command else None,
            stdout_file=log,
            stderr_file=log,
            **self._about(unit, code),
        )

    def _around(self, unit: Unit, error: BaseException) -> JobExecutionError:
        """What an executor raised instead of a result."""
        job: dict[str, Any] = {}
        if isinstance(error, JobExecutionError):
            code, reason, info = error.returncode, error.reason, str(error)
            job = {name: getattr(error, name) for name in ("job_id", "node", "stdout_file", "stderr_file")}
        else:
            words = str(error) or type(error).__name__
            code, reason, info = None, type(error).__name__, f"{type(error).__name__}: {words}"
            for kind, word, meaning in _EXECUTOR_ERRORS:
                if isinstance(error, kind):
                    reason = word
                    info = f"{meaning} ({info})" if str(error) else meaning
                    break
        failure = JobExecutionError(
            f"{self._who(unit)} did not end by itself: {info.rstrip('.')}.",
            reason=reason,
            info=info,
            **job,
            **self._about(unit, code),
        )
        failure.__cause__ = error
        return failure

    def _who(self, unit: Unit) -> str:
        if not self._place.stage.parallel:
            which = "its init unit" if self._place.stage.task.task.is_compound else "its one unit"
        else:
            which = f"unit {unit.index} ({unit.zarr_url})"
        return f"{title(self._place.stage.task)}: {which}"

    def _log(self, unit: Unit, tail: str) -> str:
        if not tail:
            return ""
        limit = LOG_TAIL_CHARS if self._budget >= len(tail) else _SHORT_TAIL
        tail = tail[-limit:]
        self._budget -= len(tail)
        return f"\nThe end of its log ({self._place.log_file(unit)}):\n{tail}"

    def _about(self, unit: Unit, returncode: int | None) -> dict[str, Any]:
        task = self._place.stage.task
        return {
            "workflow_task_id": task.id,
            "workflow_task_order": task.order,
            "task_name": task.task.name,
            "returncode": returncode,
            "log_file": self._place.log_file(unit),
            "unit_index": unit.index,
            "zarr_url": unit.zarr_url,
        }


def about_task(task: WorkflowTask, error: UnitError) -> UnitError:
    """`error`, which befell the task as a whole, with its attributes."""
    error.workflow_task_id = task.id
    error.workflow_task_order = task.order
    error.task_name = task.task.name
    return error


def error_of_task(
    task: WorkflowTask,
    error: UnitError,
    dataset: Dataset,
    types: Mapping[str, bool],
    failures: Sequence[UnitError] = (),
) -> UnitError:
    """A copy of `error` as the task's, with what a new run needs to go on from there."""
    # It lists the failures, itself among them, and should not hold itself.
    raised = about_task(task, copy.copy(error))
    raised.failures = tuple(failures)
    raised.dataset = dataset
    raised.type_filters = dict(types)
    return raised
