"""What units under way look like from outside: to listeners, and to the history while they run.

Apart from `stage`, which decides about units: here nothing is decided. What a listener is told of a unit
waits until it is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fractal_runner.workflow.conditions import Conditions
from fractal_runner.workflow.events import (
    Event,
    RunningUnit,
    TaskProgress,
    UnitFinished,
    UnitRetried,
    UnitRunning,
    UnitSubmitted,
)
from fractal_runner.workflow.outcome import Outcome
from fractal_runner.workflow.recovery import Judged
from fractal_runner.workflow.units import Place, Unit, order_of

_LOOK_S = 1.0
_SHOWN = 20


class Watch:
    """Follows the units of one stage. Everything happens in the coordinator's thread.

    Args:
        place: of the stage's units.
        conditions: of the run.
    """

    def __init__(self, place: Place, conditions: Conditions) -> None:
        self._place = place
        self._run = conditions
        self._emit = conditions.emit
        self._order = order_of(place.stage.task)
        self._stage = place.stage.name
        self._executor_name = place.stage.resources.executor
        self._news: list[Event] = []  # told once it is recorded
        self._seen_running: set[tuple[int, int]] = set()  # index, attempt
        self._looked_at: tuple[float, tuple[RunningUnit, ...]] = time.time(), ()

    def submitted(self, unit: Unit) -> None:
        """A unit is given to its executor."""
        if self._emit is not None:
            where = self._order, self._stage, unit.index, unit.zarr_url
            self._news.append(UnitSubmitted(*where, unit.attempt))

    def retried(self, unit: Unit, message: str) -> None:
        """An attempt at a unit has failed, and another one is made."""
        if self._emit is not None:
            where = self._order, self._stage, unit.index, unit.zarr_url
            self._news.append(UnitRetried(*where, unit.attempt, message))

    def recorded(self, ended: Sequence[Judged]) -> None:
        """What was noted is in the history by now, and so is the end of these units."""
        if self._emit is not None:
            for event in self._news:
                self._emit(event)
            for judged in ended:
                self._emit(self._end_of(judged))
        self._news.clear()

    def show(self, outcome: Outcome, running: int) -> None:
        """Tell how far the stage is."""
        if self._emit is None:
            return
        limit = self._run.executors.worker_count(self._executor_name)
        self._emit(
            TaskProgress(
                order=self._order,
                task_name=self._place.stage.task.task.name,
                stage=self._stage,
                units=outcome.count,
                done=outcome.done,
                failed=len(outcome.failures),
                running=running if limit is None else min(running, limit),
                units_running=self._looked_at[1] if running else (),
            )
        )

    def look(self, running: Sequence[Unit]) -> None:
        """Look, about once a second, at what runs: for the history, and for people."""
        now = time.time()
        if not running or now - self._looked_at[0] < _LOOK_S:
            return
        # By key: an executor may list more, such as calls that it has left running.
        attempts = {self._place.key(unit): unit for unit in running}
        tasks = self._run.executors.tasks(self._executor_name)
        infos = [info for info in tasks if info.started is not None and info.key in attempts]
        for info in infos:
            known = {"started": info.started, "host": info.host, "pid": info.pid, "job_id": info.job_id}
            self._runs(attempts[info.key or ""], known)
        if not infos:  # an executor that tells no more than a future does
            for unit in running:
                self._runs(unit, {"started": now})
        infos.sort(key=lambda info: info.started or now)
        shown = tuple(
            RunningUnit(info.name, now - (info.started or now), info.host, info.pid, info.cpu, info.rss)
            for info in infos[:_SHOWN]
        )
        self._looked_at = now, shown

    def _runs(self, unit: Unit, known: Mapping[str, Any]) -> None:
        if (unit.index, unit.attempt) in self._seen_running:
            return
        self._seen_running.add((unit.index, unit.attempt))
        self._run.journal.running(self._place, unit, known)
        if self._emit is not None:
            where = self._order, self._stage, unit.index, unit.zarr_url
            self._news.append(UnitRunning(*where, unit.attempt, known.get("host"), known.get("pid")))

    def _end_of(self, judged: Judged) -> UnitFinished:
        unit, result = judged.unit, judged.result
        seconds = None
        if result is not None and result.started and result.ended:
            seconds = result.ended - result.started
        message = "" if judged.failure is None else str(judged.failure)
        where = self._order, self._stage, unit.index, unit.zarr_url
        return UnitFinished(*where, not message, message, seconds, unit.attempt)
