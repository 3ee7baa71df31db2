"""What `fractal-runner status` tells of a run: its tasks, its failures, and what runs now.

Apart from how that looks (`status_view`), as programs ask, too. It counts, and reads a few units: a run of
100,000 of them is answered as quickly as one of ten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from fractal_runner.cli.locate import INTERRUPTED, Condition, LocatedRun
from fractal_runner.cli.wording import first_line
from fractal_runner.history.reading import STARTS
from fractal_runner.history.schema import State

FAILURES_SHOWN = 10
RUNNING_SHOWN = 20
WAITING = "waiting"  # of a task that has not begun, and of units that have not been submitted


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """How far a task is.

    Attributes:
        position: its place in the workflow.
        name: its name.
        state: as it is recorded; WAITING before it begins, INTERRUPTED if it was.
        units: how many there are as far as is known; None before it begins.
        counts: how many of them are in each state.
        starts: how many of their commands were started warm, and cold.
        started, ended: when, in seconds since the epoch.
        error: why it is not done.
    """

    position: int
    name: str
    state: str
    units: int | None
    counts: Mapping[State, int]
    starts: Mapping[str, int] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    error: str | None = None

    @property
    def waiting(self) -> int | None:
        """How many units have not been submitted yet."""
        return None if self.units is None else max(0, self.units - sum(self.counts.values()))


@dataclass(frozen=True, slots=True)
class Status:
    """A run as it is now.

    Attributes:
        directory: as it was given.
        condition: of the run.
        tasks: all of its range, in order, and those that have begun behind it.
        failures: the first failed units.
        running: the first units that run.
    """

    directory: Path
    condition: Condition
    tasks: Sequence[TaskStatus]
    failures: Sequence[Row[Any]]
    running: Sequence[Row[Any]]

    def count(self, state: State) -> int:
        """How many units of the run are in this state."""
        return sum(task.counts.get(state, 0) for task in self.tasks)

    def name_of(self, position: int) -> str:
        """The name of a task."""
        return next(task.name for task in self.tasks if task.position == position)


def status_of(found: LocatedRun) -> Status:
    """How the run is now.

    Raises:
        HistoryError: if its history cannot be read.
    """
    reader, run_id = found.reader, found.run_id
    condition = found.condition()
    run = condition.run
    begun = {row.position: row for row in reader.tasks(run_id)}
    # A resume may have another last task: what has begun behind it is shown all the same.
    positions = sorted({*range(run.first_task, run.last_task + 1), *begun})
    counts: dict[int, dict[State, int]] = {position: {} for position in positions}
    for (position, _), states in reader.counts(run_id).items():
        of_task = counts.get(position, {})
        for state, count in states.items():
            of_task[state] = of_task.get(state, 0) + count

    def first(state: State, limit: int) -> list[Row[Any]]:
        holding = [position for position in positions if counts[position].get(state)]

        def units() -> Iterator[Row[Any]]:
            for position in holding:
                yield from reader.units(run_id, position=position, states=[state], limit=limit)

        return list(islice(units(), limit))

    starts = reader.starts(run_id)
    names = [item["task"]["name"] for item in json.loads(run.workflow)["task_list"]]
    tasks = [
        _begun(begun[position], condition, counts[position], starts.get(position, {}))
        if position in begun
        else TaskStatus(position, names[position], WAITING, None, counts[position])
        for position in positions
    ]
    failures, running = first(State.FAILED, FAILURES_SHOWN), first(State.RUNNING, RUNNING_SHOWN)
    return Status(found.directory, condition, tasks, failures, running)


def _begun(
    row: Row[Any], condition: Condition, counts: Mapping[State, int], starts: Mapping[str, int]
) -> TaskStatus:
    was_left = row.state == State.RUNNING and not condition.is_running
    state = INTERRUPTED if was_left else row.state
    times = row.started, row.ended
    return TaskStatus(row.position, row.name, state, row.units, counts, starts, *times, row.error)


def as_json(status: Status) -> dict[str, Any]:
    """The status for programs: times are seconds since the epoch, logs are relative to the directory."""
    condition, run = status.condition, status.condition.run
    who = condition.coordinator
    return {
        "run": {
            "id": run.id,
            "directory": str(status.directory),
            "state": condition.state,
            "workflow": run.workflow_name,
            "dataset": run.dataset_name,
            "first_task": run.first_task,
            "last_task": run.last_task,
            "started": run.started,
            "ended": run.ended,
            "seconds": condition.seconds,
            "resumed": run.resumed,
            "error": run.error or None,
            "job_id": run.job_id,
            "user_id": run.user_id,
            "coordinator": None if who is None else {"host": who.host, "pid": who.pid},
        },
        "tasks": [
            {
                "position": task.position,
                "name": task.name,
                "state": task.state,
                "started": task.started,
                "ended": task.ended,
                "error": task.error,
                "units": task.units,
                **{state.value: task.counts.get(state, 0) for state in State},
                WAITING: task.waiting,
                "starts": {start: task.starts.get(start, 0) for start in STARTS},
            }
            for task in status.tasks
        ],
        "failures": [
            {
                **_unit(status, unit),
                "message": reason_of(unit),
                "returncode": unit.returncode,
                "signal": unit.signal,
                "reason": unit.reason,
                "start": unit.start,
                "ended": unit.ended,
            }
            for unit in status.failures
        ],
        "running": [_unit(status, unit) for unit in status.running],
    }


def reason_of(unit: Row[Any]) -> str:
    """Why a unit has failed, in one line."""
    if message := first_line(unit.message):
        return message
    if unit.signal:
        return f"killed by {unit.signal}"
    if unit.returncode is not None:
        return f"exit code {unit.returncode}"
    return first_line(unit.reason) or "no reason is recorded"


def _unit(status: Status, unit: Row[Any]) -> dict[str, Any]:
    return {
        "task": unit.position,
        "task_name": status.name_of(unit.position),
        "stage": unit.stage,
        "unit": unit.number,
        "attempt": unit.attempt,
        "zarr_url": unit.zarr_url,
        "host": unit.host,
        "pid": unit.pid,
        "job_id": unit.job_id,
        "started": unit.started,
        "log": unit.log,
    }
