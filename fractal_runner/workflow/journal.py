"""What the history is told of a run: workflow tasks and units, in the history's own words.

Between `Run`, which knows tasks and results, and `RunWriter`, which knows rows. It decides what is
recorded of what, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fractal_runner.history.schema import State
from fractal_runner.history.writing import RunWriter, UnitKey
from fractal_runner.worker.spec import CANCELLED, UnitResult
from fractal_runner.workflow.failures import UnitError
from fractal_runner.workflow.identity import json_in_steps
from fractal_runner.workflow.units import Place, Unit

# Why an attempt of an earlier coordinator counts for nothing.
NEVER_STARTED = "NEVER_STARTED"
UNKNOWN_OUTCOME = "UNKNOWN_OUTCOME"


class Journal:
    """Tells the history about one run's tasks, one after the other.

    Args:
        writer: writes of this run.
        dataset_key: which dataset it is of.
    """

    def __init__(self, writer: RunWriter, dataset_key: str) -> None:
        self.writer = writer
        self.due_in = writer.due_in
        self.flush = writer.flush
        self._dataset_key = dataset_key
        self._position = 0
        self._task_key = ""

    def begin_task(self, row: Mapping[str, Any], images: Iterable[str]) -> None:
        """A task begins, or begins again, with these images; all else is about it, until the next one."""
        self._position = row["position"]
        self._task_key = row["task_key"]
        self.writer.begin_task(row, images, self._dataset_key)

    def units_known(self, count: int) -> None:
        """The init unit has told how many units there are in all."""
        self.writer.change_task(self._position, units=count)

    def left_out(self, stage: str, first: int) -> None:
        """Units of an earlier coordinator, from this one of a stage on, are the task's no more."""
        self.writer.left_out(self._position, stage, first)

    def task_left_out(self, position: int) -> None:
        """A task that an earlier coordinator began is the run's no more."""
        for stage in ("non_par", "par"):
            self.writer.left_out(position, stage, 0)
        why = "The run was resumed without this task."
        self.writer.change_task(position, state=State.CANCELLED, error=why)

    def submitted(self, place: Place, unit: Unit, *, when: float | None = None) -> None:
        """An attempt at a unit is given to an executor, or was, by an earlier coordinator."""
        self.writer.submitted(
            self._key(place, unit),
            zarr_url=unit.zarr_url,
            digest=unit.digest,
            log=place.log_name(unit),
            when=when,
        )

    def running(self, place: Place, unit: Unit, known: Mapping[str, Any]) -> None:
        """An attempt at a unit has started: started, host, pid, job_id, as far as they are known."""
        self.writer.running(self._key(place, unit), known)

    def done(self, place: Place, unit: Unit, result: UnitResult) -> None:
        """An attempt at a unit has succeeded, and its output is valid."""
        output = json_in_steps(result.output) if result.output else None
        self._ended(place, unit, State.DONE, result, output=output)

    def failed(self, place: Place, unit: Unit, error: UnitError, result: UnitResult | None) -> None:
        """An attempt at a unit has failed; `result` is what its worker tells, if it does."""
        reason = getattr(error, "reason", None)
        state = State.CANCELLED if reason == CANCELLED else State.FAILED
        self._ended(place, unit, state, result, error=error, reason=reason)

    def given_up(self, place: Place, unit: Unit, reason: str, message: str) -> None:
        """An attempt at a unit has come to nothing that counts."""
        known = {"reason": reason, "message": message}
        self.writer.ended(self._key(place, unit), State.CANCELLED, known)

    def end_task(
        self,
        state: State,
        *,
        images: Mapping[str, bool],
        dataset: bytes | None = None,
        error: str | None = None,
    ) -> None:
        """A task has ended: whether each of its images is done, and the dataset after it, if it is done."""
        self.writer.end_task(
            self._position,
            state,
            images=images,
            keys=(self._dataset_key, self._task_key),
            dataset=dataset,
            error=error,
        )

    def _ended(
        self,
        place: Place,
        unit: Unit,
        state: State,
        result: UnitResult | None,
        *,
        error: UnitError | None = None,
        reason: str | None = None,
        output: str | None = None,
    ) -> None:
        known: dict[str, Any] = {}
        if result is not None:
            known = {
                "started": result.started,
                "ended": result.ended,
                "returncode": result.returncode,
                "signal": result.signal,
                "host": result.host,
                "pid": result.pid,
                "cpu_s": result.cpu_s,
                "peak_bytes": result.peak_bytes,
                "start": result.start,
            }
        elif error is not None:
            known = {"returncode": error.returncode}
        if error is not None:
            known |= {"message": str(error), "reason": reason}
        if output is not None:
            known["output"] = output
        self.writer.ended(self._key(place, unit), state, known)

    def _key(self, place: Place, unit: Unit) -> UnitKey:
        return UnitKey(self._position, place.stage.name, unit.index, unit.attempt)
