"""One task of a run, from its images to what its units have made of them.

A task is begun in the history, its commands are run one after the other, and what they came to is merged
and recorded: all of it counts, or nothing. Whatever keeps it from that is raised as the task's error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fractal_runner.errors import HistoryError, JobExecutionError, TaskExecutionError
from fractal_runner.history.reading import UNSET
from fractal_runner.history.schema import State
from fractal_runner.worker.spec import CANCELLED
from fractal_runner.worker.stop import SHUTDOWN_FILE
from fractal_runner.workflow import plan
from fractal_runner.workflow.conditions import Conditions
from fractal_runner.workflow.events import Event, TaskFinished, TaskStarted
from fractal_runner.workflow.failures import UnitError, about_task, error_of_task
from fractal_runner.workflow.files import dataset_text, write_state
from fractal_runner.workflow.identity import dataset_key, packed, task_content, task_key, unpacked
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import Image, WorkflowTask
from fractal_runner.workflow.opening import OpenRun, RunPlan
from fractal_runner.workflow.outcome import Outcome
from fractal_runner.workflow.outputs import merge
from fractal_runner.workflow.recovery import Recovery
from fractal_runner.workflow.stage import StageRun
from fractal_runner.workflow.units import Stage, Unit, order_of, title


class RunCancelledError(Exception):
    """The run was cancelled, and what ran has been ended."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a task begins with.

    Attributes:
        index: its place among those of the run.
        task: the task.
        stages: its commands.
        images: the dataset's, before it.
        types: the type filters in force before it.
    """

    index: int
    task: WorkflowTask
    stages: list[Stage]
    images: ImageList
    types: Mapping[str, bool]


class Turn:
    """A task's turn in a run. Everything happens in the coordinator's thread, but for `wake`.

    Args:
        begins: what it begins with.
        wanted: what the run is to do.
        opened: the run.
        conditions: of the run.

    Attributes:
        left_running: whether units were given up that could not be ended.
    """

    def __init__(self, begins: Beginning, wanted: RunPlan, opened: OpenRun, conditions: Conditions) -> None:
        self.left_running = False
        self._begins = begins
        self._task = begins.task
        self._wanted = wanted
        self._dataset = wanted.dataset
        self._opened = opened
        self._run = conditions
        self._journal = conditions.journal
        self._logger = conditions.logger
        self._urls: list[str] = []  # of the images that it gets
        self._stage: StageRun | None = None
        self._outcome: Outcome | None = None  # of the stage that ran last

    def wake(self) -> None:
        """Look at once whether the run was cancelled. The one method for other threads."""
        if (stage := self._stage) is not None:
            stage.wake()

    def run(self, recovery: Recovery | None) -> tuple[ImageList, bytes]:
        """Run the task to its end.

        Args:
            recovery: what an earlier coordinator has left of it, in a resume.

        Returns:
            The images after it, and the dataset as it was recorded.

        Raises:
            TaskExecutionError, JobExecutionError: if a unit failed, or the outputs cannot be merged.
            RunCancelledError: if the run was cancelled.
        """
        began = time.monotonic()
        task = self._task
        in_force = plan.filters_for(task, self._begins.types)
        try:
            selected, named = self._select(in_force)
        except HistoryError as error:
            self._fail(_cannot_go_on(error))
        count = None if task.task.is_converter else len(selected)
        self._urls = [image.zarr_url for image in selected]
        # Whatever ends the run from here on, it is this task that a new run has to begin with.
        self._tell(TaskStarted(order_of(task), task.task.name, count))
        self._raise_if_cancelled()
        if self._run.drain.is_set():
            self._fail(self._ended_early("nothing of it has run"))
        if count == 0:
            attributes = self._wanted.filters_at(self._begins.index)
            self._fail(JobExecutionError(plan.no_images(task, in_force, attributes)))
        self._logger.info("%s begins%s", title(task), "" if count is None else f" with {count} image(s)")
        try:
            self._record_beginning(count, named)
            outcome = self._run_stages(selected, recovery)
        except HistoryError as error:
            self._fail(_cannot_go_on(error))
        except (TaskExecutionError, JobExecutionError) as error:
            self._record_end(State.FAILED, self._states_so_far(), error=str(error))
            self._fail(error)
        except KeyboardInterrupt:  # of a run in its caller's thread
            self._record_end(State.CANCELLED, self._states_so_far(), error="KeyboardInterrupt")
            raise
        if self._run.cancelled.is_set():
            self._record_end(State.CANCELLED, outcome.image_states(self._urls))
        self._raise_if_cancelled()
        return self._conclude(outcome, began)

    def _conclude(self, outcome: Outcome, began: float) -> tuple[ImageList, bytes]:
        """Merge and record what the task has come to; the images after it, and the dataset as recorded.

        Raises:
            TaskExecutionError, JobExecutionError: if it is not done.
        """
        task = self._task
        failures = [outcome.failures[index] for index in sorted(outcome.failures)]
        merged, states = self._begins.images, outcome.image_states(self._urls)
        try:
            merged = self._merged(outcome)
        except (TaskExecutionError, JobExecutionError) as error:
            error.args = (f"{title(task)}: {error}",)
            failures.append(about_task(task, error))
            states = dict.fromkeys(self._urls, False)  # what their units did is not in the dataset
        whole = (
            outcome.stage is self._begins.stages[-1] and outcome.done + len(outcome.failures) == outcome.count
        )
        if not failures and (outcome.stopped or (self._run.drain.is_set() and not whole)):
            failures.append(self._ended_early(f"{outcome.done} of {outcome.count} units are done"))
        if failures:
            self._record_end(state_after(failures[0], self._run), states, error=str(failures[0]))
        else:
            recorded = self._record_done(states, merged)
        seconds = time.monotonic() - began
        self._logger.info(
            "%s %s after %.1f s; the dataset has %d image(s)",
            *(title(task), "failed" if failures else "is done", seconds, len(merged)),
        )
        self._tell(TaskFinished(order_of(task), task.task.name, not failures, len(merged), seconds))
        if failures:
            try:
                write_state(
                    self._wanted.directory,
                    self._dataset.with_images(merged),
                    self._begins.types,
                    self._wanted.filters_at(self._begins.index),
                )
            except JobExecutionError as error:  # it comes on top of what failed, not in its place
                self._logger.error("%s", error)
                failures.append(about_task(task, error))
            self._fail(failures[0], failures, merged)
        return merged, recorded

    def _states_so_far(self) -> dict[str, bool]:
        """Whether each image of a task that could not go on is done."""
        if self._outcome is None:
            return dict.fromkeys(self._urls, False)
        return self._outcome.image_states(self._urls)

    def _merged(self, outcome: Outcome) -> ImageList:
        """The images with what the task's units returned."""
        if (
            outcome.stage is not self._begins.stages[-1]
        ):  # the init unit was all that ran, and it makes no images
            return self._begins.images
        return merge(
            self._begins.images,
            outcome.units(),
            task_type=self._task.task.type,
            output_types=self._task.task.output_types,
            zarr_dir=self._dataset.zarr_dir,
            selected=self._urls,
        )

    def _record_done(self, states: Mapping[str, bool], merged: ImageList) -> bytes:
        """Record that the task is done, together with the dataset after it, which is returned.

        Raises:
            JobExecutionError: if that cannot be recorded: then it does not count.
        """
        dataset = packed(dataset_text(self._dataset.with_images(merged)))
        try:
            self._journal.end_task(State.DONE, images=states, dataset=dataset)
        except HistoryError as error:
            self._fail(_cannot_go_on(error))
        return dataset

    def _select(self, types: Mapping[str, bool]) -> tuple[list[Image], list[str] | None]:
        """The images of the task, and their names where they depend on more than dataset and filters."""
        task, index = self._task, self._begins.index
        attributes = dict(self._wanted.filters_at(index))
        statuses = attributes.pop(plan.STATUS_FILTER, None)
        selected = plan.select(task, self._begins.images, types, attributes)
        if statuses is None or task.task.is_converter:
            return selected, None
        opened = self._opened
        recorded: bytes | None = None
        if opened.progress is not None and opened.progress.interrupted is not None:
            _, recorded = opened.reader.task_data(opened.run_id, self._wanted.positions[index])
        if recorded is not None:  # this run has itself changed the statuses since
            chosen = set(unpacked(recorded))
        else:
            known = opened.reader.image_statuses(dataset_key(self._dataset), task_key(task))
            chosen = {image.zarr_url for image in selected if known.get(image.zarr_url, UNSET) in statuses}
            if not known:
                self._logger.warning(
                    "%s: its history knows of no image that it was given before", title(task)
                )
        return [image for image in selected if image.zarr_url in chosen], sorted(chosen)

    def _record_beginning(self, count: int | None, named: list[str] | None) -> None:
        task = self._task
        row = {
            "position": self._wanted.positions[self._begins.index],
            "task_order": order_of(task),
            "name": task.task.name,
            "type": task.task.type,
            "task_key": task_key(task),
            "content": json.dumps(task_content(task)),
            "type_filters": json.dumps(dict(self._begins.types)),
            "images": count,
            "units": len(self._urls) if task.task.type == "parallel" else 1,
            "selected": None if named is None else packed([json.dumps(named)]),
        }
        self._journal.begin_task(row, self._urls)

    def _record_end(self, state: State, images: Mapping[str, bool], error: str | None = None) -> None:
        """Record that the task has not come to its end; what made it so is the error to be raised."""
        try:
            self._journal.end_task(state, images=images, error=error)
        except HistoryError as problem:
            self._logger.error("%s", problem)

    def _run_stages(self, selected: list[Image], recovery: Recovery | None) -> Outcome:
        """Run the task's commands: what its last one came to, or the first one that did not succeed."""
        stages = self._begins.stages
        first = stages[0]
        if first.parallel:
            return self._run_stage(
                StageRun(first, self._urls, self._run), first.image_units(selected), recovery
            )
        unit = first.all_images_unit(self._dataset.zarr_dir, selected)
        outcome = self._run_stage(StageRun(first, [None], self._run), iter([unit]), recovery)
        if len(stages) == 1 or outcome.failures or outcome.stopped:
            return outcome
        if self._run.cancelled.is_set() or self._run.drain.is_set():
            return outcome
        items = outcome.items
        self._journal.units_known(1 + len(items))
        compute = StageRun(stages[1], [item.zarr_url for item in items], self._run)
        return self._run_stage(compute, stages[1].compute_units(items), recovery)

    def _run_stage(self, stage: StageRun, units: Iterator[Unit], recovery: Recovery | None) -> Outcome:
        self._stage, self._outcome = stage, stage.outcome
        try:
            return stage.run(units, recovery)
        finally:
            self._stage = None
            self.left_running |= stage.left_running

    def _ended_early(self, how_far: str) -> JobExecutionError:
        """The error of a run that was asked to start no more, or to end."""
        if self._run.drain.is_set():
            why = "the run was asked to start no more units"
        elif self._run.stop.fenced():
            why = "another coordinator has taken over the run"
        else:
            why = f"the run was stopped by the file {self._run.local / SHUTDOWN_FILE}"
        return JobExecutionError(f"{title(self._task)}: {why}; {how_far}.", reason=CANCELLED)

    def _tell(self, event: Event) -> None:
        if self._run.emit is not None:
            self._run.emit(event)

    def _raise_if_cancelled(self) -> None:
        if self._run.cancelled.is_set():
            raise RunCancelledError

    def _fail(
        self, error: UnitError, failures: Sequence[UnitError] = (), images: ImageList | None = None
    ) -> NoReturn:
        """Raise `error` as the task's; `images` are those with what succeeded merged into them."""
        dataset = self._dataset.with_images(self._begins.images if images is None else images)
        raise error_of_task(self._task, error, dataset, self._begins.types, failures) from error.__cause__


def state_after(error: BaseException, run: Conditions) -> State:
    """What becomes of a run, or a task, that ends in this error: whether the run was ended or failed."""
    stop = run.cancelled.is_set() or run.drain.is_set() or run.stop.asked()
    is_cancelled = stop and getattr(error, "reason", None) == CANCELLED
    return State.CANCELLED if is_cancelled or isinstance(error, KeyboardInterrupt) else State.FAILED


def _cannot_go_on(error: Exception) -> JobExecutionError:
    problem = JobExecutionError(f"The run cannot go on: {error}")
    problem.__cause__ = error
    return problem
