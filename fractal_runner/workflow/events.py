"""What a run reports while it goes on: frozen events, delivered on the event loop, in order.

What an event tells of is in the run's history by then. Of units that an earlier coordinator of the run
has finished, nothing is told again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins, or goes on: it is in the history.

    Attributes:
        run_id: the run's id there.
        directory: its directory.
        resumed: whether it goes on where an earlier coordinator stopped.
    """

    run_id: str
    directory: str
    resumed: bool


@dataclass(frozen=True, slots=True)
class RunFinished:
    """A run has ended.

    Attributes:
        run_id: the run's id in its history.
        state: "done", "failed" or "cancelled".
        message: why it is not done; "" if it is.
        seconds: how long it took, this time.
    """

    run_id: str
    state: str
    message: str
    seconds: float


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """A workflow task begins.

    Attributes:
        order: its place in the workflow.
        task_name: its Task's name.
        images: how many images its filters selected; None for converters, which get none.
    """

    order: int
    task_name: str
    images: int | None


@dataclass(frozen=True, slots=True)
class RunningUnit:
    """A unit that runs at this moment.

    Attributes:
        name: its task's name, and its index where the task has one unit per image.
        seconds: how long it has been running.
        host: the node that it runs on.
        pid: the process that does its work.
        cpu: CPU that it and its child processes use, in percent of one CPU; None if it is not known.
        memory: bytes that they use; None if it is not known.
    """

    name: str
    seconds: float
    host: str | None
    pid: int | None
    cpu: float | None
    memory: int | None


@dataclass(frozen=True, slots=True)
class TaskProgress:
    """Where a stage of a task is; comes several times a second while units run.

    Attributes:
        order: the workflow task's place.
        task_name: its Task's name.
        stage: "non_par" or "par".
        units: how many units the stage has.
        done: units that succeeded.
        failed: units that failed.
        running: units that have started and not ended, as far as the executor tells.
        units_running: what is known of some of them, those that have run longest first; looked at about
            once a second.
    """

    order: int
    task_name: str
    stage: str
    units: int
    done: int
    failed: int
    running: int
    units_running: tuple[RunningUnit, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitSubmitted:
    """A unit has been given to its executor.

    Attributes:
        order: the workflow task's place.
        stage: "non_par" or "par".
        index: the unit's index.
        zarr_url: its image, if it has one.
        attempt: which attempt at it this is, from 1.
    """

    order: int
    stage: str
    index: int
    zarr_url: str | None
    attempt: int


@dataclass(frozen=True, slots=True)
class UnitRunning:
    """A unit runs; not told of units that are over too soon to be seen running.

    Attributes:
        order, stage, index, zarr_url, attempt: as of UnitSubmitted.
        host: the node that it runs on, if that is known.
        pid: the process that does its work, if that is known.
    """

    order: int
    stage: str
    index: int
    zarr_url: str | None
    attempt: int
    host: str | None
    pid: int | None


@dataclass(frozen=True, slots=True)
class UnitRetried:
    """An attempt at a unit has failed, and another one is made.

    Attributes:
        order, stage, index, zarr_url: as of UnitSubmitted.
        attempt: which attempt has failed.
        message: why.
    """

    order: int
    stage: str
    index: int
    zarr_url: str | None
    attempt: int
    message: str


@dataclass(frozen=True, slots=True)
class UnitFinished:
    """A unit has ended for good.

    Attributes:
        order, stage, index, zarr_url: as of UnitSubmitted.
        succeeded: whether it ended well.
        message: why it failed; "" if it did not.
        seconds: how long it took; None if it never started.
        attempt: which attempt decided it.
    """

    order: int
    stage: str
    index: int
    zarr_url: str | None
    succeeded: bool
    message: str
    seconds: float | None
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """A workflow task has ended, and its outputs are in the dataset.

    Attributes:
        order: its place in the workflow.
        task_name: its Task's name.
        succeeded: whether all of it did.
        images: how many images the dataset now has.
        seconds: how long it took.
    """

    order: int
    task_name: str
    succeeded: bool
    images: int
    seconds: float


Event = (
    RunStarted
    | TaskStarted
    | UnitSubmitted
    | UnitRunning
    | UnitRetried
    | UnitFinished
    | TaskProgress
    | TaskFinished
    | RunFinished
)
