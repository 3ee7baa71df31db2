"""`fractal-runner run`: one run, shown while it goes on, and what to do when it fails."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fractal_runner.cli.options import filter_arguments
from fractal_runner.cli.progress import display_for
from fractal_runner.config import Config
from fractal_runner.errors import ExecutorError, JobExecutionError, TaskExecutionError
from fractal_runner.executors import factories
from fractal_runner.quantities import format_time
from fractal_runner.worker.spec import CANCELLED
from fractal_runner.workflow.events import Event, TaskStarted
from fractal_runner.workflow.files import DATASET_FILE, FILTERS_FILE, write_dataset
from fractal_runner.workflow.models import Dataset, Workflow
from fractal_runner.workflow.process import process_workflow

EXIT_TASK_ERROR = 1
EXIT_USAGE = 2
EXIT_JOB_ERROR = 3
EXIT_BY_SIGNAL = 128  # plus the signal's number, as shells have it: 130 for Ctrl-C


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for, read and checked as far as it goes.

    Attributes:
        workflow_file: where the workflow came from; None for a history.
        workflow: the workflow.
        dataset: the dataset.
        directory: the run's directory.
        config: the configuration, which names the executor.
        first, last: positions of the first and last task.
        type_filters, attribute_filters: the filters.
        output: where to write the final dataset as well.
        repeated: words of the command line that a command which goes on from here needs as well.
        history: where the run is recorded; None for its directory.
        resume: go on with the run that the directory holds.
        rerun_unknown: in a resume, run units again even if nobody knows how far they got.
        job_id, user_id: as they are recorded.
        warm: what process_workflow is told of warm starts.
    """

    workflow_file: Path | None
    workflow: Workflow
    dataset: Dataset
    directory: Path
    config: Config
    first: int | None
    last: int | None
    type_filters: Mapping[str, bool]
    attribute_filters: Mapping[str, Sequence[Any]]
    output: Path | None
    repeated: Sequence[str]
    history: str | None = None
    resume: bool = False
    rerun_unknown: bool = False
    job_id: str | None = None
    user_id: str | None = None
    warm: Mapping[str, Any] = field(default_factory=dict)


def execute(request: RunRequest, console: Console) -> int:
    """Run it; the exit code."""
    session = _Session(request, console)
    try:
        return asyncio.run(session.run())
    except KeyboardInterrupt:  # of an executor that works in this thread: it has ended what ran
        return session.interrupted()


class _Session:
    """One run on a console, from its first task to what is said at its end."""

    def __init__(self, request: RunRequest, console: Console) -> None:
        self._request = request
        self._console = console
        self._display = display_for(console)
        self._began: int | None = None  # order of the task that began last
        self._signal: int | None = None
        self._drain = threading.Event()

    async def run(self) -> int:
        request = self._request
        began = time.monotonic()
        task = asyncio.ensure_future(
            process_workflow(
                workflow=request.workflow,
                dataset=request.dataset,
                workflow_dir_local=request.directory,
                first_task_index=request.first,
                last_task_index=request.last,
                job_type_filters=request.type_filters,
                job_attribute_filters=request.attribute_filters,
                executor=request.config.executor,
                config=request.config,
                history=request.history,
                resume=request.resume,
                rerun_unknown=request.rerun_unknown,
                job_id=request.job_id,
                user_id=request.user_id,
                on_event=self._on_event,
                drain=self._drain,
                **request.warm,
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            if self._is_asynchronous():
                loop.add_signal_handler(number, self._on_signal, number, task)
            else:  # the loop stands still while the executor works
                signal.signal(number, self._on_signal_inline)
        self._say(f"{'Going on' if request.resume else 'Running'} in {request.directory}")
        try:
            with self._display:
                dataset = await task
        except asyncio.CancelledError:
            return self.interrupted()
        except (TaskExecutionError, JobExecutionError) as error:
            if self._drain.is_set() and isinstance(error, JobExecutionError) and error.reason == CANCELLED:
                self._say(str(error))
                return self.interrupted("what ran has finished")
            self._say(str(error), style="red")
            if len(error.failures) > 1:
                self._say(f"{len(error.failures)} units failed; this is the first of them.")
            self._say_how_to_go_on()
            return EXIT_JOB_ERROR if isinstance(error, JobExecutionError) else EXIT_TASK_ERROR
        except (ExecutorError, ImportError, NotImplementedError, ValueError) as error:
            self._say(str(error), style="red")
            return EXIT_USAGE
        written = [request.directory / DATASET_FILE]
        if request.output is not None:
            try:
                write_dataset(request.output, dataset)
            except OSError as error:
                self._say(
                    f"{request.output} cannot be written: {error.strerror}; the dataset is in {written[0]}"
                )
                return EXIT_JOB_ERROR
            written.append(request.output)
        self._say(
            f"Done after {format_time(time.monotonic() - began)}: {len(dataset.images)} image(s); "
            f"the dataset is in {' and '.join(map(str, written))}"
        )
        return 0

    def _is_asynchronous(self) -> bool:
        """Whether the loop goes on while the executor works; all do that do not deny it."""
        try:
            factory = factories.factory_of(self._request.config.executor)
        except ValueError:  # of a package that is broken: the run says so
            return True
        return getattr(factory, "asynchronous", True) is not False

    def _on_event(self, event: Event) -> None:
        if isinstance(event, TaskStarted):
            self._began = event.order
        self._display.show(event)

    def interrupted(self, what_became_of_it: str = "what ran has been ended") -> int:
        """Say that a signal has ended the run; the exit code."""
        received = self._signal or int(signal.SIGTERM)
        self._say(f"Stopped by {signal.Signals(received).name}; {what_became_of_it}.")
        self._say_how_to_go_on()
        return EXIT_BY_SIGNAL + received

    def _on_signal(self, number: int, task: asyncio.Task[Dataset]) -> None:
        if not self._only_drains(number):
            task.cancel()

    def _on_signal_inline(self, number: int, frame: object) -> None:
        if not self._only_drains(number):
            raise KeyboardInterrupt

    def _only_drains(self, number: int) -> bool:
        """Take a signal: the first Ctrl-C lets what runs finish; all else ends it, and that is to be done."""
        self._signal = number
        if number == signal.SIGINT and not self._drain.is_set():
            self._drain.set()
            self._say("SIGINT: nothing more is started; what runs may finish. Ctrl-C again ends it.")
            return True
        self._say(
            f"{signal.Signals(number).name}: ending what runs (SIGTERM, and SIGKILL a few seconds later) …"
        )
        return False

    def _say_how_to_go_on(self) -> None:
        if self._began is None:
            self._say("Nothing has run.")
            return
        self._say("To go on from there, once the cause is mended, with all that is done:")
        self._say(f"  {shlex.join([*_program(), 'resume', str(self._request.directory)])}")
        command = self._command_that_goes_on()
        if command is not None:
            self._say("Or in a new directory, with the whole task again:")
            self._say(f"  {shlex.join(command)}")

    def _command_that_goes_on(self) -> list[str] | None:
        """The command that starts with the task that did not end, from what the run wrote before it."""
        request = self._request
        if self._began is None or request.workflow_file is None:
            return None
        first = next(
            position for position, task in enumerate(request.workflow.task_list) if task.order == self._began
        )
        filters = json.loads((request.directory / FILTERS_FILE).read_text(encoding="utf-8"))
        words = [*_program(), "run", str(request.workflow_file)]
        words += ["--dataset", str(request.directory / DATASET_FILE)]
        words += ["--workflow-dir", str(unused(request.directory)), "--first", str(first)]
        if request.last is not None:
            words += ["--last", str(request.last)]
        words += filter_arguments(filters["type_filters"], filters["attribute_filters"])
        return [*words, *request.repeated]

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def unused(directory: Path) -> Path:
    """This directory, or one beside it with a number behind its name: the first that is not there."""
    beside, number = directory, 1
    while beside.exists():
        number += 1
        beside = directory.with_name(f"{directory.name}-{number}")
    return beside


def _program() -> list[str]:
    """The words that start this program again."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return [sys.executable, "-m", "fractal_runner"]
    found = shutil.which(started.name)
    return [started.name] if found and Path(found).absolute() == started.absolute() else [str(started)]
