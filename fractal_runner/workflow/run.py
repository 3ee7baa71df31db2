"""One run of a workflow, as its coordinator's thread sees it: task after task, from dataset to dataset."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fractal_runner.errors import HistoryError, JobExecutionError, TaskExecutionError
from fractal_runner.history.schema import State
from fractal_runner.history.writing import OwnershipLostError
from fractal_runner.worker.stop import StopRequest, stoppable
from fractal_runner.workflow import plan
from fractal_runner.workflow.conditions import Conditions
from fractal_runner.workflow.events import Event, RunFinished, RunStarted
from fractal_runner.workflow.failures import error_of_task
from fractal_runner.workflow.files import write_state
from fractal_runner.workflow.identity import (
    dataset_key,
    first_difference,
    task_content,
    work_of,
)
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.journal import Journal
from fractal_runner.workflow.models import Dataset
from fractal_runner.workflow.opening import HistoryChoice, OpenRun, RunPlan
from fractal_runner.workflow.past import TaskPast
from fractal_runner.workflow.recovery import Recovery
from fractal_runner.workflow.stage import check_program, check_resources
from fractal_runner.workflow.turn import Beginning, RunCancelledError, Turn, state_after
from fractal_runner.workflow.units import Stage, keys_of, order_of, stages_of, title
from fractal_runner.workflow.warmth import WarmMode, WarmStarts

if TYPE_CHECKING:
    from fractal_runner.executors.registry import Executors


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
        warm_start: which tasks start warm.
        warm_start_timeout_s: seconds that their imports may take.
        max_servers: how many fork servers there may be at a time.
    """

    remote: str | None
    env: Mapping[str, str]
    stop_at_failure: bool
    window: int | None
    grace_s: float
    history: HistoryChoice
    resume: bool
    rerun_unknown: bool
    warm_start: WarmMode
    warm_start_timeout_s: float
    max_servers: int


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
        self._executors = executors
        self._logger = logger
        self._emit = emit
        self._drain = drain or threading.Event()
        self._is_cancelled_outside = is_cancelled
        self._cancelled = threading.Event()
        self._warm = WarmStarts(options.warm_start, options.warm_start_timeout_s, options.max_servers, logger)
        self._turn: Turn | None = None
        self._left_running = False
        # From `execute` on:
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
        if (turn := self._turn) is not None:
            turn.wake()

    def execute(self) -> Dataset:
        """Run all tasks that are not done; the dataset after the last one.

        Raises:
            RunCancelledError: after `cancel`.
            TaskExecutionError, JobExecutionError, ValueError, RunBusyError, HistoryError: as
                process_workflow says.
        """
        try:
            # Finds what is wrong with anyone's meta.
            stages = [stages_of(task, self._executors.unit_layers) for task in self._tasks]
            self._check(stages)
            wanted, options = self._wanted, self._options
            self._opened = OpenRun(
                wanted, history=options.history, resume=options.resume, give_up=self._cancelled.is_set
            )
            with self._opened, stoppable(self._opened.run_id):
                return self._execute_recorded(stages)
        finally:
            self._executors.close(wait=not self._left_running)
            self._warm.close()

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
        except BaseException as error:  # whatever it is, the record says so
            message = str(error) or type(error).__name__
            state = state_after(error, self._conditions)
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
            warm=self._warm,
        )

    def _execute(self, stages: list[list[Stage]]) -> Dataset:
        images = ImageList(self._dataset.images)
        types = self._wanted.type_filters
        self._warm.follow(stage for task in stages for stage in task)
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
            begins = Beginning(index, task, stages[index], images, types)
            images, text = self._run_task(begins, recovery)
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
            keys=keys_of(opened.run_id, self._order_at(index) if row is None else row.task_order),
            epoch=opened.writer.epoch,
            run_dir=str(self._local),
            grace_s=self._options.grace_s,
            logger=self._logger,
        )

    def _order_at(self, index: int) -> int:
        return order_of(self._tasks[min(index, len(self._tasks) - 1)])

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
                check_resources(stage, self._executors)
                try:
                    check_program(stage, self._executors)
                except TaskExecutionError as error:
                    types = self._wanted.type_filters
                    raise error_of_task(stage.task, error, self._dataset, types) from None

    def _write_state(self, images: ImageList, types: Mapping[str, bool], done: int, text: bytes) -> None:
        dataset = self._dataset.with_images(images)
        write_state(self._local, dataset, types, self._wanted.filters_at(done), text)

    def _run_task(self, begins: Beginning, recovery: Recovery | None) -> tuple[ImageList, bytes]:
        """Run one task; the images after it, and the dataset as it was recorded."""
        turn = Turn(begins, self._wanted, self._opened, self._conditions)
        self._turn = turn
        try:
            return turn.run(recovery)
        finally:
            self._turn = None
            self._left_running |= turn.left_running

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
