"""`process_workflow`: run a workflow's tasks, by index range, over a dataset, through an executor.

The coroutine starts a thread and waits for it. That thread is the run's coordinator (`run.Run`): it alone
owns the run's state, so the caller's event loop stays free whatever the executor does. Here is what lies
between the two: arguments, events on the loop, cancellation.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from fractal_runner.config import Config
from fractal_runner.errors import did_you_mean
from fractal_runner.executors import registry
from fractal_runner.quantities import argument, parse_count, parse_time
from fractal_runner.worker.spec import WARM_MODES
from fractal_runner.workflow import plan
from fractal_runner.workflow.events import Event
from fractal_runner.workflow.models import Dataset, Workflow
from fractal_runner.workflow.opening import HistoryChoice, RunPlan
from fractal_runner.workflow.run import Run, RunOptions
from fractal_runner.workflow.stage import END_MARGIN_S
from fractal_runner.workflow.turn import RunCancelledError
from fractal_runner.workflow.warmth import MAX_SERVERS, TIMEOUT_S, WarmMode

USER_CACHE_VARIABLE = "FRACTAL_CACHE_DIR"

_TURN_S = 0.005  # how long events may keep the loop in one of its turns


async def process_workflow(
    *,
    workflow: Workflow,
    dataset: Dataset,
    workflow_dir_local: str | os.PathLike[str],
    job_id: int | str | None = None,
    workflow_dir_remote: str | os.PathLike[str] | None = None,
    first_task_index: int | None = None,
    last_task_index: int | None = None,
    logger_name: str = "fractal_runner",
    job_attribute_filters: Mapping[str, Sequence[Any]] | None = None,
    job_type_filters: Mapping[str, bool] | None = None,
    user_id: int | str | None = None,
    executor: registry.ExecutorChoice = None,
    config: Config | None = None,
    resume: bool = False,
    history: HistoryChoice = None,
    rerun_unknown: bool = False,
    on_event: Callable[[Event], object] | None = None,
    user_cache_dir: str | os.PathLike[str] | None = None,
    on_failure: Literal["continue", "stop"] = "continue",
    max_in_flight: int | None = None,
    grace_s: float = 5.0,
    warm_start: WarmMode = "auto",
    warm_start_timeout: float | str = TIMEOUT_S,
    max_servers: int = MAX_SERVERS,
    drain: threading.Event | None = None,
    **unknown: Any,
) -> Dataset:
    """Run the tasks of a workflow, one after the other, over a dataset.

    Args:
        workflow: the workflow.
        dataset: the dataset; it is not changed.
        workflow_dir_local: the run's directory, as this process sees it; made if need be. It must not
            hold a run, unless it is to be resumed.
        job_id: the caller's name for this run, for logs and the history.
        workflow_dir_remote: the same directory as the workers see it, if they see it elsewhere.
        first_task_index: position of the first task to run; None for 0.
        last_task_index: position of the last one, included; None for the workflow's last.
        logger_name: name of the logger that is told what happens.
        job_attribute_filters: values that an attribute may have, by name: {"well": ["A01", "A02"]}.
        job_type_filters: types that images must have for the first task: {"is_3D": True}.
        user_id: who runs it, for logs and the history.
        executor: an executor, which stays the caller's to shut down; an executor class; a name, or a name
            and options, which count over the configuration's; None for the one that the configuration names.
            One that keeps files keeps them in the run's directory, unless its options say where. In an open
            `session`, its executors are taken, and left open.
        config: the configuration, from `fractal_runner.executors.sections.load`; None for that of the open
            session, or else of the current directory.
        resume: go on with the run that the directory holds, where it stopped or was killed; where there
            is none, begin it. What is done is not done again, and must not have changed.
        history: where the run is recorded: a History, which stays the caller's to close, an SQLAlchemy URL,
            or the path of a SQLite file; None for history.sqlite in the run's directory.
        rerun_unknown: in a resume, run those units again, too, of which nobody knows how far they got,
            although their task says `"rerunnable": false`, or they may still run on a host that cannot be
            reached.
        on_event: called with each event on the event loop, in order. What it raises is logged.
        user_cache_dir: FRACTAL_CACHE_DIR in the tasks' environment.
        on_failure: "continue" runs all units of a failing task, "stop" leaves out those not started.
        max_in_flight: how many units may be submitted and not ended; None for 1,000 (20,000 where they are
            packed into jobs), or a few per worker where those that have not started cannot be taken back
            (stdlib process pools).
        grace_s: seconds that a unit has between TERM and KILL when it is ended.
        warm_start: whether the units of a task share its imports: a server imports them once, and is forked
            for each unit. "auto" does so for tasks of several units whose command is a Python script or
            module, "always" for single units as well, and warns of a task that cannot be started so; "never"
            does not. A task's meta may say `warm_start`, too: "never" holds whoever says it.
        warm_start_timeout: seconds, or text like "90s", that these imports may take; the task starts cold if
            they take longer.
        max_servers: how many such servers there may be at a time, here or in one job of a cluster.
        drain: once it is set, no more units start; when those that run have ended, and more would have had
            to, a JobExecutionError with the reason "CANCELLED" is raised.

    Returns:
        The dataset after the last task.

    Raises:
        ValueError, TypeError: an argument is wrong, or contradicts another, or what the run that is to be
            resumed has done; nothing has run.
        RunBusyError: another coordinator is at work on this directory; nothing has run.
        HistoryError: the history cannot be opened; nothing has run.
        TaskExecutionError: a unit failed by itself. Its `dataset` has what succeeded merged into it.
        JobExecutionError: something else ended a unit, or the run could not go on.
        TaskOutputValidationError: a unit left output that is not valid.
        asyncio.CancelledError: the call was cancelled; what ran has been ended.
    """
    if unknown:
        name = next(iter(unknown))
        known = [*(process_workflow.__kwdefaults__ or {}), "workflow", "dataset", "workflow_dir_local"]
        raise TypeError(f"process_workflow() takes no argument {name!r}: {did_you_mean(name, known)}")
    _check_arguments(workflow, dataset, on_failure, max_in_flight, grace_s)
    if warm_start not in WARM_MODES:
        raise ValueError(f"warm_start={warm_start!r} is none of {', '.join(map(repr, WARM_MODES))}")
    types, attributes = plan.check_filters(
        job_type_filters, job_attribute_filters, has_history=history is not None
    )
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    logger = logging.getLogger(logger_name)
    courier = _Courier(loop, on_event, logger)
    if config is not None and not isinstance(config, Config):
        raise TypeError(
            f"config is {type(config).__name__}, not Config: read one with "
            "fractal_runner.executors.sections.load"
        )
    directory = _absolute(workflow_dir_local)
    executors = registry.Executors(
        executor,
        config=registry.configuration() if config is None else config,
        directory=directory,
        directory_seen_as=workflow_dir_remote,
    )
    options = RunOptions(
        remote=None if workflow_dir_remote is None else os.fspath(workflow_dir_remote),
        env={} if user_cache_dir is None else {USER_CACHE_VARIABLE: os.fspath(user_cache_dir)},
        stop_at_failure=on_failure == "stop",
        window=max_in_flight,
        grace_s=grace_s,
        history=history,
        resume=resume,
        rerun_unknown=rerun_unknown,
        warm_start=warm_start,
        warm_start_timeout_s=argument("warm_start_timeout", parse_time, warm_start_timeout),
        max_servers=argument("max_servers", parse_count, max_servers),
    )
    wanted = RunPlan(
        workflow=workflow,
        dataset=dataset,
        positions=plan.task_range(workflow, first_task_index, last_task_index),
        type_filters=types,
        attribute_filters=attributes,
        directory=directory,
        executor=executors.by_name,
        settings={
            "warm_start": options.warm_start,
            "warm_start_timeout": options.warm_start_timeout_s,
            "max_servers": options.max_servers,
        },
        job_id=job_id,
        user_id=user_id,
    )
    run = Run(
        wanted,
        options,
        executors=executors,
        logger=logger,
        label=("run" if job_id is None else f"job {job_id}")
        + ("" if user_id is None else f", user {user_id}"),
        emit=None if on_event is None else courier.send,
        drain=drain,
        is_cancelled=lambda: task is not None and task.cancelling() > 0,
    )
    if run.is_inline:
        courier.is_inline = True
        try:
            return run.execute()
        except RunCancelledError:
            raise asyncio.CancelledError from None
    ended: asyncio.Future[Dataset] = loop.create_future()
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_coordinate, run, courier, ended), name=run.label)
    thread.start()
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        run.cancel()
        await _until(ended, grace_s + 2 * END_MARGIN_S)
        raise


class _Courier:
    """Brings what the coordinator's thread has to say to the event loop, in order, a turn at a time."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_event: Callable[[Event], object] | None,
        logger: logging.Logger,
    ) -> None:
        self._loop = loop
        self._on_event = on_event
        self._logger = logger
        self._waiting: deque[Event | Callable[[], None]] = deque()
        self.is_inline = False  # the run holds up the loop: events are delivered where they are sent

    def send(self, item: Event | Callable[[], None]) -> None:
        """An event, or something to call on the loop once all earlier events have been delivered."""
        self._waiting.append(item)
        if self.is_inline:
            self._deliver()
        elif len(self._waiting) == 1:
            # A closed loop has nobody left to tell; the run itself ends as it would have.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        until = time.monotonic() + _TURN_S
        while self._waiting:
            # Taken out only when done with: `send` schedules a delivery when it finds none waiting.
            item = self._waiting[0]
            try:
                if callable(item):
                    item()
                elif self._on_event is not None:
                    self._on_event(item)
            except (KeyboardInterrupt, SystemExit):
                self._loop.call_soon(self._deliver)  # these end the loop; what is left may still be wanted
                raise
            except BaseException:  # a CancelledError of the listener's own is no reason to stop here
                self._logger.exception("on_event raised an exception for %r; the run goes on", item)
            finally:
                self._waiting.popleft()
            if time.monotonic() > until and self._waiting:
                self._loop.call_soon(self._deliver)
                return


def _coordinate(run: Run, courier: _Courier, ended: asyncio.Future[Dataset]) -> None:
    """The coordinator's thread: run, and tell the waiting coroutine how it ended."""
    dataset: Dataset | None = None
    problem: BaseException | None = None
    try:
        dataset = run.execute()
    except BaseException as error:
        problem = error

    def finish() -> None:
        if ended.done():
            return
        if dataset is not None:
            ended.set_result(dataset)
        elif problem is None or isinstance(problem, RunCancelledError):
            ended.cancel()
        else:
            ended.set_exception(problem)

    courier.send(finish)


async def _until(ended: asyncio.Future[Dataset], seconds: float) -> None:
    """Wait for the run to end, whoever else wants this task to stop meanwhile; it ends what runs."""
    deadline = time.monotonic() + seconds
    while not ended.done() and (left := deadline - time.monotonic()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.wait({ended}, timeout=left)
    if ended.done() and not ended.cancelled():
        ended.exception()  # it has been looked at: the caller asked for no result any more


def _absolute(directory: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(directory))  # noqa: PTH100 - links are kept


def _check_arguments(
    workflow: object, dataset: object, on_failure: object, max_in_flight: object, grace_s: object
) -> None:
    if not isinstance(workflow, Workflow):
        raise TypeError(
            f"workflow is {type(workflow).__name__}, not Workflow: read a file with load_workflow, "
            "or make one with Workflow.model_validate"
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is {type(dataset).__name__}, not Dataset: read a file with load_dataset, "
            "or make one with Dataset.model_validate"
        )
    if on_failure not in ("continue", "stop"):
        raise ValueError(f"on_failure={on_failure!r} is neither 'continue' nor 'stop'")
    if max_in_flight is not None and (
        isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int) or max_in_flight < 1
    ):
        raise ValueError(f"max_in_flight={max_in_flight!r} is not a whole number of at least 1")
    if isinstance(grace_s, bool) or not isinstance(grace_s, (int, float)) or not 0 <= grace_s < float("inf"):
        raise ValueError(f"grace_s={grace_s!r} is not a number of seconds")
