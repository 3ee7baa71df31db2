"""One stage of a task on its way through an executor: submitted, taken in, recorded, tried again.

Everything here happens in the coordinator's thread. A unit's end is first judged, then recorded, then
used: only what is in the history counts towards the outcome, and only then listeners are told.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from fractal_runner.errors import HistoryError, JobExecutionError, TaskExecutionError
from fractal_runner.history.writing import OwnershipLostError
from fractal_runner.worker import processes
from fractal_runner.worker.command import run_unit
from fractal_runner.worker.processes import host_name
from fractal_runner.worker.spec import CANCELLED, UNKILLABLE, UnitResult
from fractal_runner.worker.stop import ask_to_stop
from fractal_runner.workflow import plan
from fractal_runner.workflow.conditions import Conditions
from fractal_runner.workflow.dispatch import DEFAULT_WINDOW, LOCAL_WINDOW, PACKING_WINDOW, Dispatch, Ended
from fractal_runner.workflow.failures import Explain
from fractal_runner.workflow.journal import NEVER_STARTED, UNKNOWN_OUTCOME
from fractal_runner.workflow.outcome import Outcome, Validated
from fractal_runner.workflow.outputs import collector_paused
from fractal_runner.workflow.recovery import Adopted, Judged, Recovery
from fractal_runner.workflow.units import Place, Stage, Unit, title
from fractal_runner.workflow.watching import Watch

if TYPE_CHECKING:
    from fractal_runner.executors.registry import Executors, Submitter

END_MARGIN_S = 12.0  # beyond the grace time: for KILL to work, and for results to travel

_LOOK_S = 0.2


class StageRun:
    """Runs the units of one command, through its executor.

    Args:
        stage: the stage.
        urls: the zarr_url of each of its units, by index.
        conditions: of the run.

    Attributes:
        outcome: what its units have come to.
        left_running: whether units were given up that could not be ended.

    Raises:
        TaskExecutionError: if its command cannot be executed.
        JobExecutionError: if its files cannot be made, or its executor refuses it.
    """

    def __init__(self, stage: Stage, urls: Sequence[str | None], conditions: Conditions) -> None:
        self.outcome = Outcome(stage, urls)
        self.left_running = False
        self._stage = stage
        self._run = conditions
        self._journal = conditions.journal
        self._executor_name = stage.resources.executor
        first = self._first_submitter()
        if self._executor_name is not None:
            check_program(stage, conditions.executors)
        if first.reduced:
            reasons = "; ".join(first.reduced)
            conditions.logger.warning("%s: %s: its units get what there is", title(stage.task), reasons)
        self._submitters: dict[tuple[int, tuple[str, ...]], Submitter] = {(0, ()): first}
        place = Place(
            stage=stage,
            count=len(urls),
            run_id=conditions.run_id,
            local=conditions.local,
            remote=conditions.remote,
            env=(*first.environment.items(), *conditions.env),
            coordinator=(host_name(), os.getpid()),
            epoch=conditions.epoch,
            grace_s=conditions.grace_s,
            warm=conditions.warm.terms(
                stage,
                len(urls),
                conditions.remote,
                is_local=conditions.executors.is_local(self._executor_name),
                keeps_workers=conditions.executors.keeps_workers(self._executor_name),
            ),
        )
        self._place = replace(place, are_folders_new=make_folders(place))
        self._explain = Explain(self._place)
        self._watch = Watch(self._place, conditions)
        self._dispatch: Dispatch | None = None
        self._judged: list[Judged] = []  # recorded with the next flush, and used then
        self._adopted: dict[int, int] = {}  # the attempts that were taken on, by their units
        self._retried: dict[int, Judged] = {}  # the last failures of units that are tried again
        self._no_more = False  # nothing starts any more
        self._told: set[str] = set()  # why units start cold
        self._problem: HistoryError | None = None

    def wake(self) -> None:
        """Look at once whether the run was cancelled. The one method for other threads."""
        if (dispatch := self._dispatch) is not None:
            dispatch.wake()

    def run(self, units: Iterator[Unit], recovery: Recovery | None = None) -> Outcome:
        """Run the units, or what an earlier coordinator has left of them, to their end.

        Raises:
            JobExecutionError: if the history cannot be written any more, or a resume would have to guess.
        """
        executors, name = self._run.executors, self._executor_name
        adopted: list[Adopted] = []
        if recovery is not None:
            rest, adopted, ended = recovery.recover(
                units,
                place=self._place,
                outcome=self.outcome,
                journal=self._journal,
                judge=self._judge,
                attach=lambda key: executors.attach(key, name),
                discard=lambda future: executors.discard(future, name),
            )
            units = iter(rest)
            self._watch.recorded(ended)
        dispatch = Dispatch(
            self._submit,
            units,
            self._run.window or self._default_window(),
            takes_back=executors.takes_back(name),
        )
        for one in adopted:
            self._adopted[one.unit.index] = one.unit.attempt
            dispatch.adopt(one.unit, one.future)
        self._dispatch = dispatch
        try:
            self._drive(dispatch)
        except BaseException:  # whatever it is, a Ctrl-C included: nothing is left under way
            self._abandon(dispatch)
            raise
        finally:
            self._dispatch = None
            self._run.warm.end_servers(self._stage)
        if self._problem is not None:
            raise JobExecutionError(f"The run cannot go on: {self._problem}") from self._problem
        return self.outcome

    def _submit(self, unit: Unit) -> Future[UnitResult]:
        spec = self._place.spec(unit)
        self._journal.submitted(self._place, unit)
        self._watch.submitted(unit)
        if self._run.is_inline:
            self._flush()  # it is going to run now, in this thread
        submit = self._submitter_for(unit).submit
        return submit(self._place.call_name(unit), spec.key, run_unit, spec)

    def _submitter_for(self, unit: Unit) -> Submitter:
        wanted = unit.retry, unit.avoid
        if wanted not in self._submitters:
            self._submitters[wanted] = self._submitter(*wanted)
        return self._submitters[wanted]

    def _submitter(self, retry: int, avoid: tuple[str, ...]) -> Submitter:
        """How to submit an attempt: what it asks for may grow from one to the next."""
        return _submitter(self._stage, self._run.executors, retry, avoid)

    def _first_submitter(self) -> Submitter:
        """The one of first attempts. An executor that the task names may be made only now."""
        try:
            return self._submitter(0, ())
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            name = self._executor_name or self._run.executors.default
            raise JobExecutionError(f"The executor {name!r} refuses the task: {error}") from error

    def _default_window(self) -> int:
        """How many units may be in flight: few, where those that have not started cannot be taken back."""
        executors, name = self._run.executors, self._executor_name
        workers = executors.worker_count(name)
        if not executors.is_asynchronous(name):
            return 1
        if executors.packs(name):
            return PACKING_WINDOW
        if workers is None or not executors.is_local(name):
            return DEFAULT_WINDOW
        if not executors.takes_back(name):
            return 2 * workers + 2
        return max(LOCAL_WINDOW, 8 * workers)

    def _drive(self, dispatch: Dispatch) -> None:
        """Take in the units' ends until all have ended, or have been given up."""
        run = self._run
        give_up_at = float("inf")
        next_look = 0.0
        draining = taken_back = False
        for batch in dispatch.batches(self._journal.due_in):
            with collector_paused():  # once for all of them: what they bring is there to stay
                for ended in batch:
                    self._take_in(ended, dispatch)
            if self._no_more and not taken_back:
                taken_back = True
                self._take_back(dispatch)
            if self._journal.due_in() <= 0 or run.is_inline:
                self._flush()
            if run.drain.is_set() and not self.outcome.stopped and not draining:
                draining = True
                self._take_back(dispatch)
            if run.is_inline and run.is_cancelled_outside():
                run.cancelled.set()  # nobody else could say so meanwhile
            now = time.monotonic()
            if now < next_look and not run.cancelled.is_set() and self._problem is None:
                continue
            next_look = now + _LOOK_S
            running = dispatch.running()
            self._watch.look(running)
            self._watch.show(self.outcome, len(running))
            if not self.outcome.stopped and self._must_stop():
                self.outcome.stopped = True
                self._ask_to_stop()
                self._take_back(dispatch)
                give_up_at = now + self._patience()
            if now >= give_up_at:
                for unit in dispatch.abandon():
                    self.left_running = True
                    run.logger.warning("%s: unit %d is left running", title(self._stage.task), unit.index)
        self._flush()
        self._watch.show(self.outcome, 0)

    def _abandon(self, dispatch: Dispatch) -> None:
        """Something went wrong here: end what is under way, and take note of nothing any more."""
        self._ask_to_stop()
        dispatch.submit_no_more()
        give_up_at = time.monotonic() + self._patience()
        for _ in dispatch.batches():
            if time.monotonic() >= give_up_at and dispatch.abandon():
                self.left_running = True

    def _patience(self) -> float:
        """Seconds for which units that were told to stop are waited for."""
        # A Python function in one of our own threads cannot be ended; all else can, given some time.
        shared = self._run.executors.shares_process(self._executor_name)
        return self._run.grace_s + (0.0 if shared and self._stage.function is not None else END_MARGIN_S)

    def _must_stop(self) -> bool:
        return self._run.cancelled.is_set() or self._run.stop.asked() or self._problem is not None

    def _take_in(self, ended: Ended, dispatch: Dispatch) -> None:
        """Judge and note one unit's end. Whatever a run learns of its units comes through here."""
        if self._is_of_other_work(ended, dispatch):
            return
        judged = self._judge(ended)
        unit, failure = judged.unit, judged.failure
        self._retried.pop(unit.index, None)
        if failure is None:
            assert judged.result is not None
            self._journal.done(self._place, unit, judged.result)
            self._judged.append(judged)
            return
        again = None if self._may_still_run(judged) else self._next_attempt(judged)
        self._journal.failed(self._place, unit, failure, judged.result)
        if again is None:
            self._judged.append(judged)
            self._no_more |= self._run.stop_at_failure
            return
        self._retried[unit.index] = judged
        dispatch.again(again)
        self._run.logger.warning("%s (attempt %d; trying again)", _first_line(str(failure)), unit.attempt)
        self._watch.retried(unit, str(failure))

    def _is_of_other_work(self, ended: Ended, dispatch: Dispatch) -> bool:
        """Whether a call that was taken on has done something else: then it counts for nothing."""
        unit, result = ended.unit, ended.result
        if result is None or result.digest in ("", unit.digest):
            return False
        message = "The call that an earlier coordinator had submitted did something else."
        self._journal.given_up(self._place, unit, UNKNOWN_OUTCOME, message)
        if not (self._no_more or self._must_stop()):
            dispatch.again(replace(unit, attempt=unit.attempt + 1))
        return True

    def _may_still_run(self, judged: Judged) -> bool:
        """Whether something of a unit that has failed may go on: what a dead worker left is ended first."""
        if (result := judged.result) is not None:
            return result.left_running or result.reason == UNKILLABLE
        if self._stage.command is None or not self._run.executors.is_local(self._executor_name):
            return False
        mark = processes.mark_of(self._place.spec(judged.unit).key)
        return bool(processes.end_found(lambda: processes.bearers(mark), self._run.grace_s))

    def _judge(self, ended: Ended) -> Judged:
        failure = self._explain.failed(ended)
        output: Validated = None
        if failure is None and ended.result is not None:
            try:
                output = self.outcome.validated(ended.result.output)
            except ValueError as error:
                failure = self._explain.invalid_output(ended.unit, str(error))
        return Judged(ended.unit, ended.result, output, failure)

    def _next_attempt(self, judged: Judged) -> Unit | None:
        """The unit as it is to be tried again; None if it has failed for good."""
        wanted, unit = self._stage.resources, judged.unit
        from_outside = isinstance(judged.failure, JobExecutionError)
        if self._was_stopped_before(judged) and not (self._no_more or self._must_stop()):
            return replace(unit, attempt=unit.attempt + 1)
        if unit.retry >= wanted.retries or not (from_outside or wanted.retry_any):
            return None
        if self._no_more or self._run.drain.is_set() or self._must_stop():
            return None
        avoid = unit.avoid
        host = judged.result.host if judged.result is not None else getattr(judged.failure, "node", None)
        if wanted.retry_elsewhere and host:
            avoid = tuple(sorted({*avoid, host}))
        return replace(unit, attempt=unit.attempt + 1, retry=unit.retry + 1, avoid=avoid)

    def _was_stopped_before(self, judged: Judged) -> bool:
        """Whether a call that was taken on had been told to stop while nobody was there: it is run again."""
        adopted = self._adopted.get(judged.unit.index) == judged.unit.attempt
        return (
            adopted
            and isinstance(failure := judged.failure, JobExecutionError)
            and failure.reason == CANCELLED
        )

    def _take_back(self, dispatch: Dispatch) -> None:
        """Let nothing start any more."""
        self._no_more = True
        for unit in dispatch.submit_no_more():
            self._journal.given_up(self._place, unit, NEVER_STARTED, "The run ended before it started.")
        # Those whose next attempt still runs are told of by that.
        under_way = {unit.index for unit in dispatch.in_flight()}
        for index in self._retried.keys() - under_way:
            self._judged.append(self._retried.pop(index))

    def _flush(self) -> None:
        """Record what has been noted; only then it counts."""
        if self._problem is not None:
            return
        try:
            self._journal.flush()
        except HistoryError as error:
            self._problem = error
            self._run.logger.error("%s", error)
            return
        with collector_paused():
            for judged in self._judged:
                if judged.failure is None:
                    self.outcome.succeed(judged.unit, judged.output)
                else:
                    self.outcome.fail(judged.unit, judged.failure)
        self._watch.recorded(self._judged)
        results = [judged.result for judged in self._judged if judged.result is not None]
        self._run.warm.note(self._stage, results, self._told)
        self._judged.clear()

    def _ask_to_stop(self) -> None:
        if isinstance(self._problem, OwnershipLostError) or self._run.stop.fenced():
            return  # the file would stop the new owner's units; ours have met its fence
        try:
            ask_to_stop(self._run.run_id, str(self._run.local))
        except OSError as error:
            self._run.logger.error(
                "units in other processes cannot be told to stop: %s cannot be written: %s",
                *(error.filename, error.strerror),
            )


def check_resources(stage: Stage, executors: Executors) -> None:
    """Whether the executor takes what each attempt at the stage's units asks for.

    Raises:
        ValueError: if not, naming the task, and what is wrong in the executor's words.
    """
    wanted = stage.resources
    for retry in range(wanted.variants):
        try:
            _submitter(stage, executors, retry)
        except (TypeError, ValueError) as error:
            half = "parallel" if stage.parallel else "non_parallel"
            raise ValueError(f"{title(stage.task)}: meta_{half}: {error}") from None


def check_program(stage: Stage, executors: Executors) -> None:
    """Whether the stage's command can be executed, where that can be told from here.

    Raises:
        TaskExecutionError: if it cannot.
    """
    if not executors.is_local(stage.resources.executor):
        return
    if (problem := plan.missing_program(stage)) is not None:
        raise TaskExecutionError(problem)


def make_folders(place: Place) -> bool:
    """Make the folders of a stage's files.

    Returns:
        Whether none of them was there.

    Raises:
        JobExecutionError: if one cannot be made.
    """
    are_new = True
    try:
        for folder in place.folders():
            try:
                folder.mkdir()
            except FileExistsError:
                if not folder.is_dir():
                    raise
                are_new = False
    except OSError as error:
        raise JobExecutionError(
            f"The run cannot go on: the folder {error.filename} cannot be made: {error.strerror}."
        ) from error
    return are_new


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


def _submitter(stage: Stage, executors: Executors, retry: int, avoid: tuple[str, ...] = ()) -> Submitter:
    wanted = stage.resources
    return executors.submitter(wanted.executor, avoid=avoid, **wanted.asked(retry))
