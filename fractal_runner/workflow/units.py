"""From a task and its images to units of work, and to the specs that workers are given.

A task has one or two stages: the non-parallel command runs once, the parallel one once per image or per
element of a list. A stage makes its units one after the other as they are asked for: a task over a
million images never holds a million of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from fractal_runner.config import UnitLayer
from fractal_runner.worker.function import FunctionRef
from fractal_runner.worker.spec import UnitSpec, WarmStart
from fractal_runner.workflow.identity import unit_digest
from fractal_runner.workflow.meta import Resources, read_layers
from fractal_runner.workflow.models import Image, WorkflowTask
from fractal_runner.workflow.outputs import ComputeItem

_PREFIX = re.compile(r"(non_par|par)(?:-\d+-(\d+))?(?:-try(\d+))?")

# From the metas of a task and of its workflow task to all that is said of what units need.
UnitLayers = Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[UnitLayer]]
BATCH_SIZE = 1000  # units of one subfolder: directories of a million files are slow everywhere


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a stage.

    Attributes:
        index: its place among the stage's units.
        zarr_url: its image's, or its element's; None for a unit of all images.
        args: what it is called with.
        digest: of its command and arguments: what was recorded of a unit is of this one if it is the same.
        attempt: which attempt at it this is, from 1, over all of the run's coordinators.
        retry: how many attempts have failed under this coordinator.
        avoid: nodes that this attempt is to be kept off.
    """

    index: int
    zarr_url: str | None
    args: Mapping[str, Any]
    digest: str
    attempt: int = 1
    retry: int = 0
    avoid: tuple[str, ...] = ()


class Stage:
    """One command (or function) of a workflow task, and how its units are made.

    Args:
        task: the workflow task.
        parallel: whether it is the parallel command or the non-parallel one.
        layers: from the metas of a task and its workflow task to all that is said of what units need.

    Raises:
        ValueError: if the task's meta is wrong, naming task, key and value.
    """

    def __init__(self, task: WorkflowTask, *, parallel: bool, layers: UnitLayers) -> None:
        self.task = task
        self.parallel = parallel
        self.name = "par" if parallel else "non_par"
        self.folder = folder_name(task)
        half = "parallel" if parallel else "non_parallel"
        self.args: Mapping[str, Any] = getattr(task, f"args_{half}")
        command: str | None = getattr(task.task, f"command_{half}")
        self.command = None if command is None else tuple(shlex.split(command))
        function = getattr(task.task, f"function_{half}")
        self.function = None if function is None else FunctionRef(function, cloudpickle.dumps)
        self._digest = unit_digest(task)
        try:
            metas = getattr(task.task, f"meta_{half}"), getattr(task, f"meta_{half}")
            self.resources: Resources = read_layers(layers(*metas))
        except ValueError as error:
            raise ValueError(f"{title(task)}: meta_{half}.{error}") from None

    def all_images_unit(self, zarr_dir: str, images: Sequence[Image]) -> Unit:
        """The one unit of a non-parallel command; a converter's is given no images."""
        args: dict[str, Any] = {"zarr_dir": zarr_dir}
        if not self.task.task.is_converter:
            args["zarr_urls"] = [image.zarr_url for image in images]
        return self._unit(0, None, {**args, **self.args})

    def image_units(self, images: Iterable[Image]) -> Iterator[Unit]:
        """One unit per image."""
        for index, image in enumerate(images):
            yield self._unit(index, image.zarr_url, {"zarr_url": image.zarr_url, **self.args})

    def compute_units(self, items: Iterable[ComputeItem]) -> Iterator[Unit]:
        """One unit per element of the parallelization list."""
        for index, item in enumerate(items):
            args = {"zarr_url": item.zarr_url, "init_args": item.init_args, **self.args}
            yield self._unit(index, item.zarr_url, args)

    def _unit(self, index: int, zarr_url: str | None, args: Mapping[str, Any]) -> Unit:
        return Unit(index, zarr_url, args, self._digest(args))


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of a stage's units are, for the coordinator and for the workers.

    Attributes:
        stage: the stage.
        count: how many units it has.
        run_id: the run.
        local: the run's directory as the coordinator sees it.
        remote: as the workers see it.
        env: variables for every unit's environment.
        coordinator: host and pid of this process.
        epoch: which of the run's coordinators this is.
        grace_s: seconds between TERM and KILL.
        warm: how its units may be started warm; None for a cold start.
        are_folders_new: whether this coordinator has made its folders, all of them.
    """

    stage: Stage
    count: int
    run_id: str
    local: Path
    remote: str
    env: tuple[tuple[str, str], ...]
    coordinator: tuple[str, int]
    epoch: int
    grace_s: float
    warm: WarmStart | None = None
    are_folders_new: bool = False

    def folders(self) -> Iterator[Path]:
        """The directories that must be there, parents first."""
        top = self.local / self.stage.folder
        yield top
        if self.stage.parallel and self.count > BATCH_SIZE:
            for batch in range(-(-self.count // BATCH_SIZE)):
                yield top / f"{batch:06d}"

    def spec(self, unit: Unit) -> UnitSpec:
        """What a worker is given of this attempt at the unit."""
        stage = self.stage
        prefix = self._prefix(unit)
        return UnitSpec(
            key=f"{self.keys}{prefix}",
            command=stage.command,
            function=stage.function,
            args=unit.args,
            run_id=self.run_id,
            run_dir=self.remote,
            folder=f"{self.remote}/{self._folder(unit)}",
            prefix=prefix,
            env=self.env,
            timeout_s=stage.resources.timeout_s,
            grace_s=self.grace_s,
            coordinator=self.coordinator,
            epoch=self.epoch,
            digest=unit.digest,
            warm=self.warm,
            is_folder_new=self.are_folders_new,
        )

    @property
    def keys(self) -> str:
        """What the keys of all units of the task begin with."""
        return keys_of(self.run_id, order_of(self.stage.task))

    def key(self, unit: Unit) -> str:
        """The durable name of this attempt at the unit."""
        return f"{self.keys}{self._prefix(unit)}"

    def call_name(self, unit: Unit) -> str:
        """What the unit's call is called in displays and in the list of processes."""
        name = self.stage.task.task.name
        return f"{name} {unit.index}" if self.stage.parallel else name

    def log_file(self, unit: Unit) -> str:
        """The path of the unit's log as the caller sees it."""
        return str(self.local / self.log_name(unit))

    def log_name(self, unit: Unit) -> str:
        """The path of the unit's log in the run's directory."""
        return f"{self._folder(unit)}/{self._prefix(unit)}-log.txt"

    def args_file(self, unit: Unit) -> str:
        """The path of the unit's arguments as the caller sees it."""
        return str(self.local / self._folder(unit) / f"{self._prefix(unit)}-args.json")

    def _folder(self, unit: Unit) -> str:
        name = self.stage.folder
        if self.stage.parallel and self.count > BATCH_SIZE:
            return f"{name}/{unit.index // BATCH_SIZE:06d}"
        return name

    def _prefix(self, unit: Unit) -> str:
        return file_prefix(self.stage.name, unit.index, unit.attempt)


def file_prefix(stage: str, index: int, attempt: int) -> str:
    """What the names of an attempt's files begin with, and its key ends with."""
    again = f"-try{attempt}" if attempt > 1 else ""
    return (
        f"{stage}{again}" if stage == "non_par" else f"{stage}-{index // BATCH_SIZE:06d}-{index:07d}{again}"
    )


def keys_of(run_id: str, order: int) -> str:
    """What the keys of all units of a task begin with."""
    return f"{run_id}/{order}/"


def unit_of_key(key: str) -> tuple[str, int, int]:
    """Stage, index and attempt of the unit that has this key."""
    found = _PREFIX.fullmatch(key.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{key!r} is not the key of a unit")
    stage, index, attempt = found.groups()
    return stage, int(index or 0), int(attempt or 1)


def stages_of(task: WorkflowTask, layers: UnitLayers) -> list[Stage]:
    """The stages of a task, in the order in which they run.

    Args:
        task: the workflow task.
        layers: see `Stage`.

    Raises:
        ValueError: if the task's meta is wrong, naming task, key and value.
    """
    kind = task.task.type
    if kind == "parallel":
        return [Stage(task, parallel=True, layers=layers)]
    first = Stage(task, parallel=False, layers=layers)
    return [first, Stage(task, parallel=True, layers=layers)] if task.task.is_compound else [first]


def folder_name(task: WorkflowTask) -> str:
    """The folder of a task's files: no name of a task can lead out of the run's directory."""
    slug = re.sub(r"[^a-z0-9]", "_", task.task.name.lower())
    return f"{task.order}_{slug[:120]}"  # file names end at 255 bytes


def order_of(task: WorkflowTask) -> int:
    """A workflow task's order; a Workflow numbers those that have none."""
    return -1 if task.order is None else task.order


def title(task: WorkflowTask) -> str:
    """How a message calls a task."""
    return f"Task {task.order} ({task.task.name!r})"
