"""How a run begins in its directory, or goes on there: whose it is, what it was, what is done of it.

Nothing is changed before it is clear that this may be done: a directory that holds a run is left alone
unless it is to be resumed, and a resume that would contradict what is done is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter
from sqlalchemy import Row

from fractal_runner.errors import HistoryError, JobExecutionError
from fractal_runner.history.database import sqlite_file
from fractal_runner.history.directory import RUN_FILE, DirectoryLock, RunFile, read_run_file
from fractal_runner.history.schema import State
from fractal_runner.history.store import FILE_NAME, History
from fractal_runner.history.writing import RunWriter
from fractal_runner.worker.command import EVIDENCE_DIR
from fractal_runner.worker.stop import SHUTDOWN_FILE
from fractal_runner.workflow import plan
from fractal_runner.workflow.files import DATASET_FILE, FILTERS_FILE, dataset_text, write_file
from fractal_runner.workflow.identity import dataset_key, first_difference, packed, task_content, unpacked
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import Dataset, Image, Workflow
from fractal_runner.workflow.units import title

HistoryChoice = History | str | os.PathLike[str] | None

_PACKAGES = ("pydantic", "SQLAlchemy", "submitit", "loky")
_IMAGES = TypeAdapter(list[Image])


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What the caller wants to be run.

    Attributes:
        workflow: the workflow.
        dataset: the dataset.
        positions: of the tasks to run, in order.
        type_filters: for the first task.
        attribute_filters: for all of them.
        directory: the run's directory.
        executor: its name and options, if it was given by name.
        settings: how it goes about that, as arguments of process_workflow: what a resume that is told
            nothing else does alike.
        job_id: the caller's name for the run.
        user_id: for whom it is.
    """

    workflow: Workflow
    dataset: Dataset
    positions: Sequence[int]
    type_filters: Mapping[str, bool]
    attribute_filters: Mapping[str, Sequence[Any]]
    directory: Path
    executor: tuple[str, Mapping[str, Any]] | None
    settings: Mapping[str, Any]
    job_id: int | str | None
    user_id: int | str | None

    def filters_at(self, index: int) -> dict[str, Any]:
        """The attribute filters of the range's task at `index`: to select by status is the first one's."""
        return {
            name: values
            for name, values in self.attribute_filters.items()
            if index == 0 or name != plan.STATUS_FILTER
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run that goes on had come to.

    Attributes:
        done: how many of its tasks are.
        images: the dataset's, after the last of these.
        type_filters: in force before the next.
        interrupted: the record of the next task, if it had begun; it may be out of the range by now.
    """

    done: int
    images: ImageList
    type_filters: Mapping[str, bool]
    interrupted: Row[Any] | None


class OpenRun:
    """A run that this process owns, until the end of the context.

    Args:
        wanted: what is to be run.
        history: where it is recorded.
        resume: go on with what the directory holds.
        give_up: asked while a database that has gone away is waited for.

    Attributes:
        run_id: the run.
        writer: writes its record.
        reader: reads the history.
        progress: where it had come to, if it goes on.
        dataset: as it was recorded last.

    Raises:
        ValueError: if the directory holds a run that is not to be resumed, or if what is wanted
            contradicts what is done of it.
        RunBusyError: if another coordinator is at work on it.
        HistoryError: if the history cannot be used.
        JobExecutionError: if the directory cannot be.
    """

    def __init__(
        self, wanted: RunPlan, *, history: HistoryChoice, resume: bool, give_up: Callable[[], bool]
    ) -> None:
        self._wanted = wanted
        self.progress: Progress | None = None
        self.dataset = packed(dataset_text(wanted.dataset))
        with ExitStack() as stack:
            directory = wanted.directory
            _make(directory)
            if not resume:
                expect_no_run(directory)
            stack.callback(_lock(directory).release)
            if not resume:
                expect_no_run(directory)  # again: one that has just ended may have begun meanwhile
            found = read_run_file(directory)
            opened = self._open(history, found, stack)
            self.reader = opened.read
            found = found or self._unfinished_beginning(opened, is_own=history is None)
            if found is not None and not resume:
                raise _holds_a_run(directory)
            self.run_id = uuid.uuid4().hex if found is None else found.run_id
            self.writer: RunWriter = opened.writer(self.run_id, give_up=give_up)
            stack.callback(self.writer.close)
            try:
                if found is None:
                    self.writer.begin(_row_of(wanted, self.dataset))
                else:
                    self._go_on(opened)
                own = opened.name == str(directory / FILE_NAME)
                _write_run_file(directory, RunFile(self.run_id, None if own else opened.url))
            except BaseException as error:  # a Ctrl-C, too, ends what has begun
                if self.writer.epoch:  # it is ours by now, and goes no further
                    with suppress(HistoryError):
                        self.writer.end_run(State.FAILED, str(error) or type(error).__name__)
                raise
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self, choice: HistoryChoice, found: RunFile | None, stack: ExitStack) -> History:
        if isinstance(choice, History):
            return choice
        directory = self._wanted.directory
        if found is not None:
            given, choice = choice, choice or found.history_in(directory)
            file = sqlite_file(choice)
            # Opening one that is not there would make it.
            if file is not None and (not file.exists() or file.stat().st_size == 0):
                if given is not None:
                    raise self._does_not_know(str(file), found.run_id)
                raise HistoryError(
                    f"{directory / RUN_FILE} tells of a run, but its history {file} is "
                    f"{'empty' if file.exists() else 'gone'}: put it back, or go on in a new directory from "
                    f"{DATASET_FILE} and {FILTERS_FILE}."
                )
        history = History(choice or directory / FILE_NAME)
        stack.callback(history.close)
        return history

    def _unfinished_beginning(self, history: History, *, is_own: bool) -> RunFile | None:
        """The run of a directory whose coordinator died before it could say in it which one it is."""
        directory = self._wanted.directory
        runs = self.reader.runs() if is_own else self.reader.runs_in(directory)
        if not runs or (not is_own and self.reader.tasks(runs[0].id)):
            return None  # a run that has come further had said so: its directory has been removed since
        return RunFile(runs[0].id, None if is_own else history.url)

    def _go_on(self, history: History) -> None:
        history.check()
        wanted = self._wanted
        run = self.reader.run(self.run_id)
        if run is None:
            raise self._does_not_know(history.name, self.run_id)
        rows = {row.position: row for row in self.reader.tasks(self.run_id)}
        done = [position for position in sorted(rows) if rows[position].state == State.DONE]
        self._expect_same(run, rows, done)
        self.writer.take_over()
        self.writer.change_run(
            workflow=_workflow_json(wanted.workflow),
            last_task=wanted.positions[-1],
            executor=_executor_json(wanted),
            settings=json.dumps(dict(wanted.settings)),
        )
        try:
            (wanted.directory / SHUTDOWN_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise _unusable(wanted.directory, error) from error
        following = len(done)
        interrupted = next((rows[position] for position in sorted(rows) if position not in done), None)
        if not done:
            self.progress = Progress(0, ImageList(wanted.dataset.images), wanted.type_filters, interrupted)
            return
        last = rows[done[-1]]
        task = wanted.workflow.task_list[last.position]
        types = plan.filters_after(task, plan.filters_for(task, json.loads(last.type_filters)))
        images = ImageList(self._images_after(last.position))
        self.progress = Progress(following, images, types, interrupted)

    def _does_not_know(self, history: str, run_id: str) -> HistoryError:
        return HistoryError(
            f"The history {history} does not know the run {run_id} of {self._wanted.directory}: "
            "give the history that it was begun with."
        )

    def _expect_same(self, run: Row[Any], rows: Mapping[int, Row[Any]], done: Sequence[int]) -> None:
        """Whether what is wanted agrees with what is done.

        Raises:
            ValueError: naming the first difference.
        """
        wanted = self._wanted
        beginning = f"{wanted.directory} cannot be resumed like this: "
        ending = "; give what it was begun with, or take a new directory"
        if wanted.positions[0] != run.first_task:
            raise ValueError(
                f"{beginning}first_task_index was {run.first_task} and is {wanted.positions[0]}{ending}"
            )
        if done and wanted.positions[-1] < done[-1]:
            raise ValueError(
                f"{beginning}last_task_index is {wanted.positions[-1]}, and task {done[-1]} is done already"
            )
        for name, recorded, given in (
            ("job_type_filters", run.type_filters, wanted.type_filters),
            ("job_attribute_filters", run.attribute_filters, wanted.attribute_filters),
        ):
            if found := first_difference(json.loads(recorded), dict(given), name):
                raise ValueError(f"{beginning}{found}{ending}")
        if run.dataset != self.dataset:
            given = json.loads("".join(dataset_text(wanted.dataset)))
            if found := first_difference(unpacked(run.dataset), given, "dataset"):
                raise ValueError(f"{beginning}{found}{ending}")
        for position in done:
            task = wanted.workflow.task_list[position]
            content = json.loads(json.dumps(task_content(task)))
            if found := first_difference(json.loads(rows[position].content), content):
                raise ValueError(f"{beginning}{title(task)} is done, and its {found}{ending}")

    def _images_after(self, position: int) -> list[Image]:
        data, _ = self.reader.task_data(self.run_id, position)
        if data is None:
            raise HistoryError(f"The history of run {self.run_id} lacks the dataset after task {position}.")
        self.dataset = data
        return _IMAGES.validate_python(unpacked(data)["images"])


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / EVIDENCE_DIR).mkdir(exist_ok=True)
    except FileExistsError:
        raise JobExecutionError(f"Cannot use {directory} as the working directory: it is a file.") from None
    except OSError as error:
        raise _unusable(directory, error) from error


def _lock(directory: Path) -> DirectoryLock:
    try:
        return DirectoryLock(directory)
    except OSError as error:
        raise _unusable(directory, error) from error


def _unusable(directory: Path, error: OSError) -> JobExecutionError:
    return JobExecutionError(
        f"Cannot use {directory} as the working directory: {error.strerror} ({error.filename})."
    )


def expect_no_run(directory: Path) -> None:
    """Whether a new run may begin in a directory, which need not be there yet.

    Raises:
        ValueError: if it holds one already.
    """
    if read_run_file(directory) is not None or (directory / DATASET_FILE).exists():
        raise _holds_a_run(directory)


def _holds_a_run(directory: Path) -> ValueError:
    return ValueError(
        f"{directory} already holds a run: go on with it (resume=True, or fractal-runner resume), or take "
        f"another directory (to start from where that run ended, from its {DATASET_FILE} and {FILTERS_FILE})"
    )


def _write_run_file(directory: Path, content: RunFile) -> None:
    try:
        write_file(directory / RUN_FILE, iter([content.text()]))
    except OSError as error:
        raise _unusable(directory, error) from error


def _row_of(wanted: RunPlan, dataset: bytes) -> dict[str, Any]:
    return {
        "directory": str(wanted.directory),
        "workflow": _workflow_json(wanted.workflow),
        "dataset": dataset,
        "workflow_name": wanted.workflow.name,
        "dataset_name": wanted.dataset.name,
        "dataset_key": dataset_key(wanted.dataset),
        "first_task": wanted.positions[0],
        "last_task": wanted.positions[-1],
        "type_filters": json.dumps(dict(wanted.type_filters)),
        "attribute_filters": json.dumps(dict(wanted.attribute_filters)),
        "executor": _executor_json(wanted),
        "settings": json.dumps(dict(wanted.settings)),
        "job_id": None if wanted.job_id is None else str(wanted.job_id),
        "user_id": None if wanted.user_id is None else str(wanted.user_id),
        "versions": json.dumps(_versions()),
    }


def _workflow_json(workflow: Workflow) -> str:
    return workflow.model_dump_json(exclude_unset=True)


def _executor_json(wanted: RunPlan) -> str | None:
    if wanted.executor is None:
        return None
    name, options = wanted.executor
    return json.dumps([name, dict(options)], default=_as_option)


def _as_option(value: object) -> str:
    """An option that JSON does not have: of a path, what makes the same executor in a resume."""
    return os.fsdecode(value) if isinstance(value, os.PathLike) else repr(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("fractal-runner", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
