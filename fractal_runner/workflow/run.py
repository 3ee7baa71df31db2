"""One run of a workflow, as its coordinator's thread sees it: task after task, from dataset to dataset."""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fractal_runner.errors import JobExecutionError, TaskExecutionError
from fractal_runner.worker.command import EVIDENCE_DIR, run_unit
from fractal_runner.worker.processes import host_name
from fractal_runner.worker.spec import CANCELLED, UnitResult
from fractal_runner.worker.stop import SHUTDOWN_FILE, StopRequest, ask_to_stop, stoppable
from fractal_runner.workflow import plan
from fractal_runner.workflow.dispatch import DEFAULT_WINDOW, Dispatch, Ended
from fractal_runner.workflow.events import (
    Event,
    RunningUnit,
    TaskFinished,
    TaskProgress,
    TaskStarted,
    UnitFinished,
)
from fractal_runner.workflow.failures import Explain, UnitError
from fractal_runner.workflow.files import write_dataset, write_json
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import Dataset, Image, Workflow, WorkflowTask
from fractal_runner.workflow.outcome import Outcome
from fractal_runner.workflow.outputs import collector_paused, merge
from fractal_runner.workflow.units import Place, Stage, Unit, stages_of, title

if TYPE_CHECKING:
    from fractal_runner.executors.registry import Executors

DATASET_FILE = "dataset.json"
FILTERS_FILE = "filters.json"
END_MARGIN_S = 12.0  # beyond the grace time: for KILL to work, and for results to travel

_LOOK_S = 0.2
_LOOK_CLOSER_S = 1.0
_SHOWN = 20


class RunCancelledError(Exception):
    """The run was cancelled, and what ran has been ended."""


class Run:
    """One run, owned by the thread that calls `execute`. Other threads only call `cancel`."""

    def __init__(
        self,
        *,
        workflow: Workflow,
        dataset: Dataset,
        local: Path,
        remote: str | None,
        positions: Sequence[int],
        filters: tuple[dict[str, bool], dict[str, list[Any]]],
        executors: Executors,
        logger: logging.Logger,
        label: str,
        emit: Callable[[Event], None] | None,
        env: Mapping[str, str],
        stop_at_failure: bool,
        window: int | None,
        grace_s: float,
        drain: threading.Event | None,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.label = label
        self._workflow = workflow
        self._tasks = [workflow.task_list[position] for position in positions]
        self._dataset = dataset
        self._local = local.absolute()
        self._remote = remote or str(self._local)
        self._type_filters, self._attribute_filters = filters
        self._executors = executors
        self._logger = logger
        self._emit = emit
        self._env = tuple(env.items())
        self._stop_at_failure = stop_at_failure
        self._window = window
        self._grace_s = grace_s
        self._drain = drain or threading.Event()
        self._id = uuid.uuid4().hex
        self._stop = StopRequest(self._id, str(self._local))
        self._cancelled = threading.Event()
        self._is_cancelled_outside = is_cancelled
        self._dispatch: Dispatch | None = None
        self._left_running = False
        self._looked_at: tuple[float, tuple[RunningUnit, ...]] = 0.0, ()

    @property
    def is_inline(self) -> bool:
        """Whether it is to be executed in the caller's thread, where its executor works."""
        return not self._executors.is_asynchronous()

    def cancel(self) -> None:
        """End the run: what has not started does not, what runs is ended."""
        self._cancelled.set()
        if (dispatch := self._dispatch) is not None:
            dispatch.wake()

    def execute(self) -> Dataset:
        """Run all tasks; the dataset after the last one.

        Raises:
            RunCancelledError: after `cancel`.
            TaskExecutionError, JobExecutionError, ValueError: as process_workflow says.
        """
        with stoppable(self._id):
            try:
                return self._execute()
            finally:
                self._executors.close(wait=not self._left_running)

    def _execute(self) -> Dataset:
        stages = [stages_of(task) for task in self._tasks]  # finds what is wrong with anyone's meta
        self._check(stages)
        images = ImageList(self._dataset.images)
        types: Mapping[str, bool] = self._type_filters
        self._prepare_directory()
        self._write_state(images, types)
        self._logger.info(
            "%s: workflow %r, %d task(s), over dataset %r (%d image(s)), in %s",
            *(
                self.label,
                self._workflow.name,
                len(self._tasks),
                self._dataset.name,
                len(images),
                self._local,
            ),
        )
        for task, stages_of_task in zip(self._tasks, stages, strict=True):
            images = self._run_task(task, stages_of_task, images, types)
            types = plan.filters_after(task, plan.filters_for(task, types))
            self._write_state(images, types)
        return self._dataset.with_images(images)

    def _check(self, stages: list[list[Stage]]) -> None:
        """Everything about the tasks of the whole range that can be wrong before one of them runs."""
        for task in self._tasks:
            plan.own_type_filters(task)
        for stage in (stage for pair in stages for stage in pair):
            if stage.resources.unknown:
                keys = ", ".join(stage.resources.unknown)
                self._logger.warning(
                    "%s: meta keys unknown here are passed over: %s", title(stage.task), keys
                )
            self._executors.check(stage.resources.executor)
            if stage.resources.executor is None:  # others are started when they are needed
                try:
                    self._check_program(stage)
                except TaskExecutionError as error:
                    self._fail(stage.task, error, ImageList(self._dataset.images), self._type_filters)

    def _check_program(self, stage: Stage) -> None:
        """Whether the stage's command can be executed, where that can be told from here."""
        if not self._executors.is_local(stage.resources.executor):
            return
        if (problem := plan.missing_program(stage)) is not None:
            raise TaskExecutionError(problem)

    def _prepare_directory(self) -> None:
        try:
            self._local.mkdir(parents=True, exist_ok=True)
            if (self._local / DATASET_FILE).exists():
                raise FileExistsError
            (self._local / EVIDENCE_DIR).mkdir()  # of two runs that start at once, one makes it
        except FileExistsError:
            if not self._local.is_dir():
                raise JobExecutionError(
                    f"Cannot use {self._local} as the working directory: it is a file."
                ) from None
            raise ValueError(
                f"{self._local} already holds a run: take another directory (to go on from where that run "
                f"ended, start from its {DATASET_FILE} and {FILTERS_FILE})"
            ) from None
        except OSError as error:
            raise JobExecutionError(
                f"Cannot use {self._local} as the working directory: {error.strerror} ({error.filename})."
            ) from error

    def _write_state(self, images: ImageList, types: Mapping[str, bool]) -> None:
        """Write where the run is: enough to go on from here in another directory."""
        dataset = self._dataset.with_images(images)
        try:
            write_dataset(self._local / DATASET_FILE, dataset)
            filters = {"type_filters": dict(types), "attribute_filters": self._attribute_filters}
            write_json(self._local / FILTERS_FILE, filters)
        except OSError as error:
            raise JobExecutionError(
                f"The run cannot go on: {error.filename} cannot be written: {error.strerror}.",
                dataset=dataset,
                type_filters=types,
            ) from error

    def _run_task(
        self, task: WorkflowTask, stages: list[Stage], images: ImageList, types: Mapping[str, bool]
    ) -> ImageList:
        """Run one task to its end; the images after it.

        Raises:
            TaskExecutionError, JobExecutionError: if a unit failed, or the outputs cannot be merged.
        """
        began = time.monotonic()
        in_force = plan.filters_for(task, types)
        selected = plan.select(task, images, in_force, self._attribute_filters)
        count = None if task.task.is_converter else len(selected)
        # Whatever ends the run from here on, it is this task that a new run has to begin with.
        self._tell(TaskStarted(_order(task), task.task.name, count))
        self._raise_if_cancelled()
        if self._drain.is_set():
            self._fail(task, self._ended_early(task, "nothing of it has run"), images, types)
        if count == 0:
            error = JobExecutionError(plan.no_images(task, in_force, self._attribute_filters))
            self._fail(task, error, images, types)
        self._logger.info("%s begins%s", title(task), "" if count is None else f" with {count} image(s)")
        try:
            outcome = self._run_stages(stages, selected)
        except (TaskExecutionError, JobExecutionError) as error:
            self._fail(task, error, images, types)
        self._raise_if_cancelled()
        failures = [outcome.failures[index] for index in sorted(outcome.failures)]
        merged = images
        try:
            if outcome.stage is stages[-1]:  # else the init unit was all that ran, and it makes no images
                merged = merge(
                    images,
                    outcome.units(),
                    task_type=task.task.type,
                    output_types=task.task.output_types,
                    zarr_dir=self._dataset.zarr_dir,
                    selected=[image.zarr_url for image in selected],
                )
        except (TaskExecutionError, JobExecutionError) as error:
            error.args = (f"{title(task)}: {error}",)
            failures.append(_about(task, error))
        whole = outcome.stage is stages[-1] and outcome.done + len(outcome.failures) == outcome.count
        if not failures and (outcome.stopped or (self._drain.is_set() and not whole)):
            failures.append(self._ended_early(task, f"{outcome.done} of {outcome.count} units are done"))
        seconds = time.monotonic() - began
        self._logger.info(
            "%s %s after %.1f s; the dataset has %d image(s)",
            *(title(task), "failed" if failures else "is done", seconds, len(merged)),
        )
        self._tell(TaskFinished(_order(task), task.task.name, not failures, len(merged), seconds))
        if failures:
            try:
                self._write_state(merged, types)
            except JobExecutionError as error:  # it comes on top of what failed, not in its place
                self._logger.error("%s", error)
                failures.append(_about(task, error))
            self._fail(task, failures[0], merged, types, failures)
        return merged

    def _run_stages(self, stages: list[Stage], selected: list[Image]) -> Outcome:
        """Run a task's commands: what its last one came to, or the first one that did not succeed."""
        first = stages[0]
        if first.parallel:
            return self._run_stage(first, [image.zarr_url for image in selected], first.image_units(selected))
        unit = first.all_images_unit(self._dataset.zarr_dir, selected)
        outcome = self._run_stage(first, [None], iter([unit]))
        if len(stages) == 1 or outcome.failures or outcome.stopped:
            return outcome
        if self._cancelled.is_set() or self._drain.is_set():
            return outcome
        items = outcome.items
        return self._run_stage(stages[1], [item.zarr_url for item in items], stages[1].compute_units(items))

    def _run_stage(self, stage: Stage, urls: Sequence[str | None], units: Iterator[Unit]) -> Outcome:
        """Run the units of one command, through its executor."""
        place = Place(
            stage=stage,
            count=len(urls),
            run_id=self._id,
            local=self._local,
            remote=self._remote,
            env=self._env,
            coordinator=(host_name(), os.getpid()),
            grace_s=self._grace_s,
        )
        name = stage.resources.executor
        if name is not None:
            self._check_program(stage)
        wanted = stage.resources
        submitter = self._executors.submitter(
            name, cpus=wanted.cpus, memory=wanted.memory, gpus=wanted.gpus, time=wanted.time_s
        )
        if submitter.reduced:
            reasons = "; ".join(submitter.reduced)
            self._logger.warning("%s: %s: its units get what there is", title(stage.task), reasons)
        place = replace(place, env=(*submitter.environment.items(), *self._env))
        self._make_folders(place)

        def submit(unit: Unit) -> Future[UnitResult]:
            spec = place.spec(unit)
            return submitter.submit(place.call_name(unit), spec.key, run_unit, spec)

        dispatch = Dispatch(
            submit,
            units,
            self._window or self._default_window(name),
            takes_back=self._executors.takes_back(name),
        )
        outcome = Outcome(stage, urls)
        # A Python function in one of our own threads cannot be ended; all else can, given some time.
        in_thread = stage.function is not None and self._executors.shares_process(name)
        patience = self._grace_s + (0.0 if in_thread else END_MARGIN_S)
        self._dispatch = dispatch
        try:
            self._drive(dispatch, outcome, Explain(place), patience)
        finally:
            self._dispatch = None
        return outcome

    def _default_window(self, name: str | None) -> int:
        """How many units may be in flight: few, where those that have not started cannot be taken back."""
        workers = self._executors.worker_count(name)
        if not self._executors.is_asynchronous(name):
            return 1
        if workers is None or self._executors.takes_back(name):
            return DEFAULT_WINDOW
        return 2 * workers + 2

    def _drive(self, dispatch: Dispatch, outcome: Outcome, explain: Explain, patience: float) -> None:
        """Take in the units' ends until all have ended, or have been given up."""
        give_up_at = float("inf")
        next_look = 0.0
        draining = False
        for batch in dispatch.batches():
            with collector_paused():  # once for all of them: what they bring is there to stay
                for ended in batch:
                    self._record(ended, outcome, explain)
            if outcome.failures and self._stop_at_failure:
                dispatch.submit_no_more()
            if self._drain.is_set() and not outcome.stopped and not draining:
                draining = True
                dispatch.submit_no_more()
            if self.is_inline and self._is_cancelled_outside():
                self._cancelled.set()  # nobody else could say so meanwhile
            now = time.monotonic()
            if now < next_look and not self._cancelled.is_set():
                continue
            next_look = now + _LOOK_S
            if self._emit is not None:
                self._show(outcome, dispatch.running())
            if not outcome.stopped and (self._cancelled.is_set() or self._stop.asked()):
                outcome.stopped = True
                self._ask_to_stop()
                dispatch.submit_no_more()
                give_up_at = now + patience
            if now >= give_up_at:
                for unit in dispatch.abandon():
                    self._left_running = True
                    self._logger.warning("%s: unit %d is left running", title(outcome.stage.task), unit.index)
        self._show(outcome, 0)

    def _record(self, ended: Ended, outcome: Outcome, explain: Explain) -> None:
        """Take in one unit's end. Whatever a run learns of its units comes through here."""
        unit = ended.unit
        failure: UnitError | None = explain.failed(ended)
        if failure is None and ended.result is not None:
            try:
                outcome.succeed(unit, ended.result.output)
            except ValueError as error:
                failure = explain.invalid_output(unit, str(error))
        if failure is not None:
            outcome.fail(unit, failure)
        if self._emit is not None:
            seconds = None
            if ended.result is not None and ended.result.started and ended.result.ended:
                seconds = ended.result.ended - ended.result.started
            task = outcome.stage.task
            message = "" if failure is None else str(failure)
            self._emit(
                UnitFinished(
                    _order(task), outcome.stage.name, unit.index, unit.zarr_url, not message, message, seconds
                )
            )

    def _show(self, outcome: Outcome, running: int) -> None:
        if self._emit is not None:
            stage, task = outcome.stage, outcome.stage.task
            limit = self._executors.worker_count(stage.resources.executor)
            self._emit(
                TaskProgress(
                    order=_order(task),
                    task_name=task.task.name,
                    stage=stage.name,
                    units=outcome.count,
                    done=outcome.done,
                    failed=len(outcome.failures),
                    running=running if limit is None else min(running, limit),
                    units_running=self._units_running(stage) if running else (),
                )
            )

    def _units_running(self, stage: Stage) -> tuple[RunningUnit, ...]:
        """Some of what runs now, as of a second ago at most: to look costs more than to count."""
        then, units = self._looked_at
        now = time.time()
        if now - then >= _LOOK_CLOSER_S:
            infos = [
                info
                for info in self._executors.tasks(stage.resources.executor)
                if info.started is not None and (info.key or "").startswith(self._id)
            ]
            infos.sort(key=lambda info: info.started or now)
            units = tuple(
                RunningUnit(info.name, now - (info.started or now), info.host, info.pid, info.cpu, info.rss)
                for info in infos[:_SHOWN]
            )
            self._looked_at = now, units
        return units

    def _ended_early(self, task: WorkflowTask, how_far: str) -> JobExecutionError:
        """The error of a run that was asked to start no more, or to end."""
        if self._drain.is_set():
            why = "the run was asked to start no more units"
        else:
            why = f"the run was stopped by the file {self._local / SHUTDOWN_FILE}"
        return JobExecutionError(f"{title(task)}: {why}; {how_far}.", reason=CANCELLED)

    def _ask_to_stop(self) -> None:
        try:
            ask_to_stop(self._id, str(self._local))
        except OSError as error:
            self._logger.error(
                "units in other processes cannot be told to stop: %s cannot be written: %s",
                *(error.filename, error.strerror),
            )

    def _make_folders(self, place: Place) -> None:
        try:
            for folder in place.folders():
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise JobExecutionError(
                f"The run cannot go on: the folder {error.filename} cannot be made: {error.strerror}."
            ) from error

    def _tell(self, event: Event) -> None:
        if self._emit is not None:
            self._emit(event)

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise RunCancelledError

    def _fail(
        self,
        task: WorkflowTask,
        error: UnitError,
        images: ImageList,
        types: Mapping[str, bool],
        failures: Sequence[UnitError] = (),
    ) -> NoReturn:
        """Raise `error` as the task's, with what a new run needs to go on from there."""
        # It lists the failures, itself among them, and should not hold itself.
        raised = _about(task, copy.copy(error))
        raised.failures = tuple(failures)
        raised.dataset = self._dataset.with_images(images)
        raised.type_filters = dict(types)
        raise raised from error.__cause__


def _about(task: WorkflowTask, error: UnitError) -> UnitError:
    """`error`, which befell the task as a whole, with its attributes."""
    error.workflow_task_id = task.id
    error.workflow_task_order = task.order
    error.task_name = task.task.name
    return error


def _order(task: WorkflowTask) -> int:
    """A workflow task's order; a Workflow numbers those that have none."""
    return -1 if task.order is None else task.order
