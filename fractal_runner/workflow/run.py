"""One run of a workflow, as its coordinator's thread sees it: task after task, from dataset to dataset."""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fractal_runner.errors import HistoryError, JobExecutionError, TaskExecutionError
from fractal_runner.history.schema import State
from fractal_runner.history.writing import OwnershipLostError
from fractal_runner.worker.spec import CANCELLED
from fractal_runner.worker.stop import SHUTDOWN_FILE, StopRequest, stoppable
from fractal_runner.workflow import plan
from fractal_runner.workflow.events import Event, RunFinished, RunStarted, TaskFinished, TaskStarted
from fractal_runner.workflow.failures import UnitError
from fractal_runner.workflow.files import (
    DATASET_FILE,
    FILTERS_FILE,
    dataset_text,
    write_file,
    write_json,
)
from fractal_runner.workflow.identity import (
    dataset_key,
    first_difference,
    packed,
    task_content,
    task_key,
    unpacked,
    unpacked_text,
    work_of,
)
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.journal import Journal
from fractal_runner.workflow.models import Dataset, Image, WorkflowTask
from fractal_runner.workflow.opening import HistoryChoice, OpenRun, RunPlan
from fractal_runner.workflow.outcome import Outcome
from fractal_runner.workflow.outputs import merge
from fractal_runner.workflow.past import TaskPast
from fractal_runner.workflow.recovery import Recovery
from fractal_runner.workflow.stage import Conditions, StageRun, check_program
from fractal_runner.workflow.units import Stage, keys_of, order_of, stages_of, title

if TYPE_CHECKING:
    from fractal_runner.executors.registry import Executors


class RunCancelledError(Exception):
    """The run was cancelled, and what ran has been ended."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run goes about what it does.

    Attributes:
        remote: its directory as the workers see it; None if they see it as we do.
        env: variables for every unit's environment.
        stop_at_failure: leave out what has not started once a unit has failed.
        window: how many units may be in flight; None to choose.
        grace_s: seconds between TERM and KILL.
        history: where it is recorded.
        resume: go on with what its directory holds.
        rerun_unknown: run units again even if nobody knows how far they got, and they should not be.
    """

    remote: str | None
    env: Mapping[str, str]
    stop_at_failure: bool
    window: int | None
    grace_s: float
    history: HistoryChoice
    resume: bool
    rerun_unknown: bool


@dataclass(frozen=True, slots=True)
class _Turn:
    """A task whose turn it is: its index in the range, what it begins with, and when it began."""

    index: int
    task: WorkflowTask
    stages: list[Stage]
    images: ImageList
    types: Mapping[str, bool]
    urls: list[str]  # of the images that it gets
    began: float


class Run:
    """One run, owned by the thread that calls `execute`. Other threads only call `cancel`.

    Args:
        wanted: what is to be run.
        options: how.
        executors: where.
        logger: is told what people should know.
        label: what it is called in logs.
        emit: brings events to the listener; None if there is none.
        drain: set to start nothing more; None if nobody will.
        is_cancelled: whether the caller of an inline run wants it to end.
    """

    def __init__(
        self,
        wanted: RunPlan,
        options: RunOptions,
        *,
        executors: Executors,
        logger: logging.Logger,
        label: str,
        emit: Callable[[Event], None] | None,
        drain: threading.Event | None,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.label = label
        self._wanted = wanted
        self._options = options
        self._tasks = [wanted.workflow.task_list[position] for position in wanted.positions]
        self._dataset = wanted.dataset
        self._local = wanted.directory
        self._filters = dict(wanted.attribute_filters)
        self._statuses = self._filters.pop(plan.STATUS_FILTER, None)  # for the first task
        self._executors = executors
        self._logger = logger
        self._emit = emit
        self._drain = drain or threading.Event()
        self._is_cancelled_outside = is_cancelled
        self._cancelled = threading.Event()
        self._stage: StageRun | None = None
        self._outcome: Outcome | None = None  # of the stage that ran last, of this task
        self._left_running = False
        # From `_open` on:
        self._opened: OpenRun
        self._journal: Journal
        self._conditions: Conditions

    @property
    def is_inline(self) -> bool:
        """Whether it is to be executed in the caller's thread, where its executor works."""
        return not self._executors.is_asynchronous()

    def cancel(self) -> None:
        """End the run: what has not started does not, what runs is ended."""
        self._cancelled.set()
        if (stage := self._stage) is not None:
            stage.wake()

    def execute(self) -> Dataset:
        """Run all tasks that are not done; the dataset after the last one.

        Raises:
            RunCancelledError: after `cancel`.
            TaskExecutionError, JobExecutionError, ValueError, RunBusyError, HistoryError: as
                process_workflow says.
        """
        try:
            stages = [stages_of(task) for task in self._tasks]  # finds what is wrong with anyone's meta
            self._check(stages)
            wanted, options = self._wanted, self._options
            self._opened = OpenRun(
                wanted, history=options.history, resume=options.resume, give_up=self._cancelled.is_set
            )
            with self._opened, stoppable(self._opened.run_id):
                return self._execute_recorded(stages)
        finally:
            self._executors.close(wait=not self._left_running)

    def _execute_recorded(self, stages: list[list[Stage]]) -> Dataset:
        """Run, and record how the run ends, whichever way it does."""
        began = time.monotonic()
        opened = self._opened
        self._prepare()
        self._tell(RunStarted(opened.run_id, str(self._local), opened.progress is not None))
        state, message = State.FAILED, ""
        try:
            dataset = self._execute(stages)
            state = State.DONE
            self._record(lambda: opened.writer.end_run(state), self._dataset)
            return dataset
        except RunCancelledError:
            state, message = State.CANCELLED, "The run was cancelled."
            raise
        except BaseException as error:
            message = str(error) or type(error).__name__
            state = self._state_after(error)
            raise
        finally:
            if state is not State.DONE:
                self._record_quietly(state, message)
            self._tell(RunFinished(opened.run_id, state.value, message, time.monotonic() - began))

    def _prepare(self) -> None:
        opened, options = self._opened, self._options
        self._journal = Journal(opened.writer, dataset_key(self._dataset))
        self._conditions = Conditions(
            run_id=opened.run_id,
            epoch=opened.writer.epoch,
            local=self._local,
            remote=options.remote or str(self._local),
            env=tuple(options.env.items()),
            executors=self._executors,
            journal=self._journal,
            logger=self._logger,
            emit=self._emit,
            stop=StopRequest(opened.run_id, str(self._local), epoch=opened.writer.epoch),
            cancelled=self._cancelled,
            drain=self._drain,
            is_cancelled_outside=self._is_cancelled_outside,
            is_inline=self.is_inline,
            stop_at_failure=options.stop_at_failure,
            window=options.window,
            grace_s=options.grace_s,
        )

    def _execute(self, stages: list[list[Stage]]) -> Dataset:
        images = ImageList(self._dataset.images)
        types = self._wanted.type_filters
        first = 0
        recovery: Recovery | None = None
        if (progress := self._opened.progress) is not None:
            first, images, types = progress.done, progress.images, progress.type_filters
            recovery = self._recovery(first)
        self._write_state(images, types, first, self._opened.dataset)
        self._logger.info(
            "%s: workflow %r, %d task(s), over dataset %r (%d image(s)), in %s",
            *(self.label, self._wanted.workflow.name, len(self._tasks) - first),
            *(self._dataset.name, len(images), self._local),
        )
        for index in range(first, len(self._tasks)):
            task = self._tasks[index]
            images, text = self._run_task(index, stages[index], images, types, recovery)
            types = plan.filters_after(task, plan.filters_for(task, types))
            if recovery is not None:
                recovery.finish()
                recovery = None
            self._write_state(images, types, index + 1, text)
        if recovery is not None:
            recovery.finish()
            self._leave_out_interrupted()
        return self._dataset.with_images(images)

    def _recovery(self, index: int) -> Recovery:
        """What is known of the units of the task that was interrupted, if one was."""
        opened = self._opened
        row = None if opened.progress is None else opened.progress.interrupted
        rows = (
            [] if row is None else opened.reader.units(opened.run_id, position=row.position, last_only=False)
        )
        same = True
        if row is not None and index < len(self._tasks):
            task = self._tasks[index]
            recorded, given = json.loads(row.content), json.loads(json.dumps(task_content(task)))
            if found := first_difference(recorded, given):
                self._logger.info("%s: its %s", title(task), found)
            same = first_difference(work_of(recorded), work_of(given)) is None
        return Recovery(
            TaskPast(rows),
            same_work=same,
            rerun_unknown=self._options.rerun_unknown,
            run_id=opened.run_id,
            keys=keys_of(opened.run_id, index if row is None else row.task_order),
            epoch=opened.writer.epoch,
            run_dir=str(self._local),
            grace_s=self._options.grace_s,
            logger=self._logger,
        )

    def _leave_out_interrupted(self) -> None:
        """Record that a task which had begun is out of the range by now, if one is."""
        progress = self._opened.progress
        if progress is not None and (row := progress.interrupted) is not None:
            self._record(lambda: self._journal.task_left_out(row.position), self._dataset)

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
                    check_program(stage, self._executors)
                except TaskExecutionError as error:
                    images = ImageList(self._dataset.images)
                    raise self._error_of(stage.task, error, images, self._wanted.type_filters) from None

    def _write_state(
        self, images: ImageList, types: Mapping[str, bool], done: int, text: bytes | None = None
    ) -> None:
        """Write where the run is: enough to go on from here in another directory.

        Args:
            images: of the dataset.
            types: the type filters in force.
            done: how many tasks are.
            text: the dataset as it was recorded, if it was.
        """
        dataset = self._dataset.with_images(images)
        attributes = dict(self._wanted.attribute_filters if done == 0 else self._filters)
        try:
            parts = dataset_text(dataset) if text is None else unpacked_text(text)
            write_file(self._local / DATASET_FILE, parts)
            filters = {"type_filters": dict(types), "attribute_filters": attributes}
            write_json(self._local / FILTERS_FILE, filters)
        except OSError as error:
            raise JobExecutionError(
                f"The run cannot go on: {error.filename} cannot be written: {error.strerror}.",
                dataset=dataset,
                type_filters=types,
            ) from error

    def _run_task(
        self,
        index: int,
        stages: list[Stage],
        images: ImageList,
        types: Mapping[str, bool],
        recovery: Recovery | None,
    ) -> tuple[ImageList, bytes]:
        """Run one task to its end; the images after it, and the dataset as it was recorded.

        Raises:
            TaskExecutionError, JobExecutionError: if a unit failed, or the outputs cannot be merged.
        """
        task = self._tasks[index]
        in_force = plan.filters_for(task, types)
        selected, named = self._select(index, images, in_force)
        count = None if task.task.is_converter else len(selected)
        turn = _Turn(
            index, task, stages, images, types, [image.zarr_url for image in selected], time.monotonic()
        )
        # Whatever ends the run from here on, it is this task that a new run has to begin with.
        self._tell(TaskStarted(order_of(task), task.task.name, count))
        self._raise_if_cancelled()
        if self._drain.is_set():
            self._fail(turn, self._ended_early(task, "nothing of it has run"))
        if count == 0:
            attributes = self._wanted.attribute_filters if index == 0 else self._filters
            self._fail(turn, JobExecutionError(plan.no_images(task, in_force, attributes)))
        self._logger.info("%s begins%s", title(task), "" if count is None else f" with {count} image(s)")
        self._outcome = None
        try:
            self._begin_task(turn, count, named)
            outcome = self._run_stages(stages, selected, recovery)
        except HistoryError as error:
            problem = JobExecutionError(f"The run cannot go on: {error}")
            problem.__cause__ = error
            self._fail(turn, problem)
        except (TaskExecutionError, JobExecutionError) as error:
            self._end_task(State.FAILED, self._states_so_far(turn), error=str(error))
            self._fail(turn, error)
        if self._cancelled.is_set():
            self._end_task(State.CANCELLED, outcome.image_states(turn.urls))
        self._raise_if_cancelled()
        return self._conclude(turn, outcome)

    def _conclude(self, turn: _Turn, outcome: Outcome) -> tuple[ImageList, bytes]:
        """Merge and record what a task has come to; the images after it, and the dataset as recorded.

        Raises:
            TaskExecutionError, JobExecutionError: if it is not done.
        """
        task = turn.task
        failures = [outcome.failures[index] for index in sorted(outcome.failures)]
        merged, states = turn.images, outcome.image_states(turn.urls)
        try:
            merged = self._merged(turn, outcome)
        except (TaskExecutionError, JobExecutionError) as error:
            error.args = (f"{title(task)}: {error}",)
            failures.append(_about(task, error))
            states = dict.fromkeys(turn.urls, False)  # what their units did is not in the dataset
        whole = outcome.stage is turn.stages[-1] and outcome.done + len(outcome.failures) == outcome.count
        if not failures and (outcome.stopped or (self._drain.is_set() and not whole)):
            failures.append(self._ended_early(task, f"{outcome.done} of {outcome.count} units are done"))
        if failures:
            self._end_task(self._state_after(failures[0]), states, error=str(failures[0]))
        else:
            recorded = self._record_done(turn, states, merged)
        seconds = time.monotonic() - turn.began
        self._logger.info(
            "%s %s after %.1f s; the dataset has %d image(s)",
            *(title(task), "failed" if failures else "is done", seconds, len(merged)),
        )
        self._tell(TaskFinished(order_of(task), task.task.name, not failures, len(merged), seconds))
        if failures:
            try:
                self._write_state(merged, turn.types, turn.index)
            except JobExecutionError as error:  # it comes on top of what failed, not in its place
                self._logger.error("%s", error)
                failures.append(_about(task, error))
            self._fail(turn, failures[0], failures, merged)
        return merged, recorded

    def _states_so_far(self, turn: _Turn) -> dict[str, bool]:
        """Whether each image of a task that could not go on is done."""
        if self._outcome is None:
            return dict.fromkeys(turn.urls, False)
        return self._outcome.image_states(turn.urls)

    def _merged(self, turn: _Turn, outcome: Outcome) -> ImageList:
        """The images with what the task's units returned."""
        if outcome.stage is not turn.stages[-1]:  # the init unit was all that ran, and it makes no images
            return turn.images
        return merge(
            turn.images,
            outcome.units(),
            task_type=turn.task.task.type,
            output_types=turn.task.task.output_types,
            zarr_dir=self._dataset.zarr_dir,
            selected=turn.urls,
        )

    def _record_done(self, turn: _Turn, states: Mapping[str, bool], merged: ImageList) -> bytes:
        """Record that the task is done, together with the dataset after it, which is returned.

        Raises:
            JobExecutionError: if that cannot be recorded: then it does not count.
        """
        dataset = packed(dataset_text(self._dataset.with_images(merged)))
        try:
            self._journal.end_task(State.DONE, images=states, dataset=dataset)
        except HistoryError as error:
            problem = JobExecutionError(f"The run cannot go on: {error}")
            problem.__cause__ = error
            self._fail(turn, problem)
        return dataset

    def _select(
        self, index: int, images: ImageList, types: Mapping[str, bool]
    ) -> tuple[list[Image], list[str] | None]:
        """The images of a task, and their names where they depend on more than dataset and filters."""
        task = self._tasks[index]
        selected = plan.select(task, images, types, self._filters)
        if index > 0 or self._statuses is None or task.task.is_converter:
            return selected, None
        opened = self._opened
        recorded: bytes | None = None
        if opened.progress is not None and opened.progress.interrupted is not None:
            _, recorded = opened.reader.task_data(opened.run_id, self._wanted.positions[index])
        if recorded is not None:  # this run has itself changed the statuses since
            chosen = set(unpacked(recorded))
        else:
            known = opened.reader.image_statuses(dataset_key(self._dataset), task_key(task))
            chosen = {
                image.zarr_url for image in selected if known.get(image.zarr_url, "unset") in self._statuses
            }
            if not known:
                self._logger.warning(
                    "%s: its history knows of no image that it was given before", title(task)
                )
        return [image for image in selected if image.zarr_url in chosen], sorted(chosen)

    def _begin_task(self, turn: _Turn, count: int | None, named: list[str] | None) -> None:
        task = turn.task
        row = {
            "position": self._wanted.positions[turn.index],
            "task_order": order_of(task),
            "name": task.task.name,
            "type": task.task.type,
            "task_key": task_key(task),
            "content": json.dumps(task_content(task)),
            "type_filters": json.dumps(dict(turn.types)),
            "images": count,
            "units": len(turn.urls) if task.task.type == "parallel" else 1,
            "selected": None if named is None else packed([json.dumps(named)]),
        }
        self._journal.begin_task(row, turn.urls)

    def _end_task(self, state: State, images: Mapping[str, bool], error: str | None = None) -> None:
        """Record that the task has not come to its end; what made it so is the error to be raised."""
        try:
            self._journal.end_task(state, images=images, error=error)
        except HistoryError as problem:
            self._logger.error("%s", problem)

    def _run_stages(self, stages: list[Stage], selected: list[Image], recovery: Recovery | None) -> Outcome:
        """Run a task's commands: what its last one came to, or the first one that did not succeed."""
        first = stages[0]
        if first.parallel:
            urls = [image.zarr_url for image in selected]
            return self._run_stage(
                StageRun(first, urls, self._conditions), first.image_units(selected), recovery
            )
        unit = first.all_images_unit(self._dataset.zarr_dir, selected)
        outcome = self._run_stage(StageRun(first, [None], self._conditions), iter([unit]), recovery)
        if len(stages) == 1 or outcome.failures or outcome.stopped:
            return outcome
        if self._cancelled.is_set() or self._drain.is_set():
            return outcome
        items = outcome.items
        self._journal.units_known(1 + len(items))
        compute = StageRun(stages[1], [item.zarr_url for item in items], self._conditions)
        return self._run_stage(compute, stages[1].compute_units(items), recovery)

    def _run_stage(self, stage: StageRun, units: Any, recovery: Recovery | None) -> Outcome:
        self._stage, self._outcome = stage, stage.outcome
        try:
            return stage.run(units, recovery)
        finally:
            self._stage = None
            self._left_running |= stage.left_running

    def _state_after(self, error: BaseException) -> State:
        """What becomes of a run, or a task, that ends in this error: whether the run was ended or failed."""
        stop = self._cancelled.is_set() or self._drain.is_set() or self._conditions.stop.asked()
        is_cancelled = stop and getattr(error, "reason", None) == CANCELLED
        return State.CANCELLED if is_cancelled else State.FAILED

    def _ended_early(self, task: WorkflowTask, how_far: str) -> JobExecutionError:
        """The error of a run that was asked to start no more, or to end."""
        if self._drain.is_set():
            why = "the run was asked to start no more units"
        elif self._conditions.stop.fenced():
            why = "another coordinator has taken over the run"
        else:
            why = f"the run was stopped by the file {self._local / SHUTDOWN_FILE}"
        return JobExecutionError(f"{title(task)}: {why}; {how_far}.", reason=CANCELLED)

    def _record(self, write: Callable[[], None], dataset: Dataset) -> None:
        """Write to the history what must be there before it is used.

        Raises:
            JobExecutionError: if it cannot be written.
        """
        try:
            write()
        except HistoryError as error:
            raise JobExecutionError(f"The run cannot go on: {error}", dataset=dataset) from error

    def _record_quietly(self, state: State, message: str) -> None:
        """Record how the run has ended, if it still can be: there is something else to be raised."""
        try:
            self._opened.writer.end_run(state, message)
        except OwnershipLostError:
            self._logger.debug("%s: its new owner records how it ends", self.label)
        except HistoryError as error:
            self._logger.error("%s", error)

    def _tell(self, event: Event) -> None:
        if self._emit is not None:
            self._emit(event)

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise RunCancelledError

    def _fail(
        self,
        turn: _Turn,
        error: UnitError,
        failures: Sequence[UnitError] = (),
        images: ImageList | None = None,
    ) -> NoReturn:
        """Raise `error` as the task's; `images` are those with what succeeded merged into them."""
        found = turn.images if images is None else images
        raise self._error_of(turn.task, error, found, turn.types, failures) from error.__cause__

    def _error_of(
        self,
        task: WorkflowTask,
        error: UnitError,
        images: ImageList,
        types: Mapping[str, bool],
        failures: Sequence[UnitError] = (),
    ) -> UnitError:
        """`error` as the task's, with what a new run needs to go on from there."""
        # It lists the failures, itself among them, and should not hold itself.
        raised = _about(task, copy.copy(error))
        raised.failures = tuple(failures)
        raised.dataset = self._dataset.with_images(images)
        raised.type_filters = dict(types)
        return raised


def _about(task: WorkflowTask, error: UnitError) -> UnitError:
    """`error`, which befell the task as a whole, with its attributes."""
    error.workflow_task_id = task.id
    error.workflow_task_order = task.order
    error.task_name = task.task.name
    return error
