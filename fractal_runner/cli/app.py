"""The commands and their options. What they do stands in the modules beside this one."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fractal_runner import __version__
from fractal_runner.cli import options as given
from fractal_runner.cli.configuration import app as config_app
from fractal_runner.cli.parameters import (
    AttributeFilter,
    DatasetFile,
    ExecutorName,
    ExecutorOpt,
    First,
    HistoryUrl,
    Last,
    MaxServers,
    MaxWorkers,
    NewHistoryUrl,
    Output,
    RunDirectory,
    TaskEnv,
    TypeFilter,
    Verbose,
    WarmStart,
    WarmStartTimeout,
    WorkflowFile,
    ZarrDir,
)
from fractal_runner.errors import HistoryError, InputFileError, RunBusyError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(config_app, name="config")

_WIDE = 1000


@app.command()
def run(
    workflow: WorkflowFile,
    dataset: DatasetFile,
    workflow_dir: Annotated[
        Path | None,
        typer.Option("--workflow-dir", metavar="DIR", help="The run's directory; a new one if not given."),
    ] = None,
    executor: ExecutorName = None,
    executor_opt: ExecutorOpt = None,
    max_workers: MaxWorkers = None,
    first: First = None,
    last: Last = None,
    type_filter: TypeFilter = None,
    attribute_filter: AttributeFilter = None,
    zarr_dir: ZarrDir = None,
    task_env: TaskEnv = None,
    output: Output = None,
    warm_start: WarmStart = None,
    warm_start_timeout: WarmStartTimeout = None,
    max_servers: MaxServers = None,
    db: NewHistoryUrl = None,
    verbose: Verbose = False,
) -> None:
    """Run a workflow over a dataset.

    Exit codes: 0 done, 1 a task failed, 2 wrong usage or input, 3 a job failed, 130 Ctrl-C.
    """
    from rich.console import Console

    from fractal_runner.cli.run import RunRequest, execute, unused
    from fractal_runner.workflow.files import load_dataset, load_workflow

    console = Console(stderr=True)
    _log_if(verbose)
    _expect_directory_of(output)
    config = given.configuration(workflow, executor, executor_opt, max_workers)
    warm = given.read_warm_start(warm_start, warm_start_timeout, max_servers)
    repeated: list[str] = []
    for word in executor_opt or ():
        repeated += ["--executor-opt", word]
    for name, value in (
        ("--executor", executor),
        ("--max-workers", max_workers),
        ("--task-env", task_env),
        ("--output", output),
        ("--warm-start", warm_start),
        ("--warm-start-timeout", warm_start_timeout),
        ("--max-servers", max_servers),
    ):
        if value is not None:
            repeated += [name, str(value)]
    request = RunRequest(
        workflow_file=workflow,
        workflow=load_workflow(workflow, task_env=task_env),
        dataset=load_dataset(dataset, zarr_dir=_absolute(zarr_dir)),
        directory=workflow_dir or unused(Path("fractal_runs") / time.strftime("%Y%m%d-%H%M%S")),
        config=config,
        first=first,
        last=last,
        type_filters=given.read_type_filters(type_filter or ()),
        attribute_filters=given.read_attribute_filters(attribute_filter or ()),
        output=output,
        repeated=repeated,
        history=db,
        warm=warm,
    )
    raise typer.Exit(execute(request, console))


@app.command()
def resume(
    directory: RunDirectory,
    workflow: Annotated[
        Path | None,
        typer.Option(
            "--workflow",
            metavar="WORKFLOW.json",
            help="A workflow whose tasks that are not done have changed.",
        ),
    ] = None,
    executor: Annotated[
        str | None, typer.Option("--executor", help="Where units run, if not where they did before.")
    ] = None,
    executor_opt: ExecutorOpt = None,
    max_workers: MaxWorkers = None,
    last: Last = None,
    task_env: TaskEnv = None,
    output: Output = None,
    rerun_unknown: Annotated[
        bool,
        typer.Option("--rerun-unknown", help="Run units again even if nobody knows how far they got."),
    ] = False,
    warm_start: WarmStart = None,
    warm_start_timeout: WarmStartTimeout = None,
    max_servers: MaxServers = None,
    db: HistoryUrl = None,
    verbose: Verbose = False,
) -> None:
    """Go on with a run where it stopped, failed, or was killed. What is done is not done again.

    Exit codes: as those of run; 3 also if another process is at work on it.
    """
    from rich.console import Console

    from fractal_runner.cli.locate import open_run
    from fractal_runner.cli.resume import Changes, request_of
    from fractal_runner.cli.run import execute
    from fractal_runner.workflow.files import load_workflow

    _log_if(verbose)
    _expect_directory_of(output)
    changes = Changes(
        workflow=None if workflow is None else load_workflow(workflow, task_env=task_env),
        workflow_file=workflow,
        executor=executor,
        options=given.executor_words(executor_opt, max_workers),
        last=last,
        warm=given.read_warm_start(warm_start, warm_start_timeout, max_servers),
    )
    with open_run(directory, db) as found, given.told_mistakes():
        request = request_of(found, changes, history=db, output=output, rerun_unknown=rerun_unknown)
    raise typer.Exit(execute(request, Console(stderr=True)))


@app.command()
def check(
    workflow: WorkflowFile,
    dataset: DatasetFile,
    executor: ExecutorName = None,
    executor_opt: ExecutorOpt = None,
    max_workers: MaxWorkers = None,
    first: First = None,
    last: Last = None,
    type_filter: TypeFilter = None,
    attribute_filter: AttributeFilter = None,
    zarr_dir: ZarrDir = None,
    task_env: TaskEnv = None,
    db: NewHistoryUrl = None,
) -> None:
    """Say what would run, without running it, and every mistake that can be found.

    Exit codes: 0 nothing is wrong, 2 there are mistakes.
    """
    from fractal_runner.cli.check import check_run
    from fractal_runner.executors import sections
    from fractal_runner.workflow.files import load_dataset, load_workflow

    findings = check_run(
        lambda: load_workflow(workflow, task_env=task_env),
        lambda: load_dataset(dataset, zarr_dir=_absolute(zarr_dir)),
        first=first,
        last=last,
        type_filters=given.read_type_filters(type_filter or ()),
        attribute_filters=given.read_attribute_filters(attribute_filter or ()),
        config=lambda: sections.load(
            start=workflow, executor=executor, options=given.executor_words(executor_opt, max_workers)
        ),
        has_history=db is not None,
    )
    for line in findings.lines:
        typer.echo(line)
    for warning in findings.warnings:
        _note("warning", warning)
    for mistake in findings.mistakes:
        _note("mistake", mistake)
    if findings.mistakes:
        raise typer.Exit(2)
    typer.echo("No mistakes found.")


@app.command()
def tasks(task_env: TaskEnv = None) -> None:
    """List the task packages found, and their tasks."""
    from rich.console import Console
    from rich.table import Table

    from fractal_runner.workflow.manifest import TaskLookupError, find_packages

    try:
        packages = find_packages(task_env)
    except TaskLookupError as error:
        _stop("error", str(error))
    if not packages:
        _stop(
            "error", f"no task packages in the environment of {task_env or sys.executable} (see --task-env)"
        )
    for package in packages:
        table = Table("task", "type", "needs", "makes", title=f"{package.name} {package.version}")
        table.title_justify = "left"
        for task in package.tasks.values():
            table.add_row(task.name, task.type, _types(task.input_types), _types(task.output_types))
        Console().print(table)
        if package.problem is not None:
            _note("warning", f"the manifest of {package.name} is not valid: {package.problem}")


@app.command()
def executors() -> None:
    """List the executors: who offers them, what they can do, and whether they can be used here.

    Exit codes: 0 listed, 2 the configuration is wrong (they are listed all the same).
    """
    from fractal_runner.cli.executors import entries, table_of
    from fractal_runner.executors import sections

    config, problem = None, ""
    try:
        config = sections.load()
    except InputFileError as error:
        problem = str(error)
    _output().print(table_of(list(entries(config)), "" if config is None else config.executor))
    if problem:
        _stop("error", problem)


@app.command()
def status(
    directory: RunDirectory,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every second, until the end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    db: HistoryUrl = None,
) -> None:
    """Show how a run is: its failures, its tasks, and what runs now.

    Exit codes: 0 whatever the run's state, 2 there is no such run.
    """
    from fractal_runner.cli.locate import open_run

    if watch and as_json:
        raise typer.BadParameter("it is for people, and --json is not", param_hint="--watch")
    with open_run(directory, db) as found:
        if as_json:
            import json

            from fractal_runner.cli.status import as_json as in_json
            from fractal_runner.cli.status import status_of

            typer.echo(json.dumps(in_json(status_of(found)), indent=2))
            return
        from fractal_runner.cli import status_view
        from fractal_runner.cli.status import status_of

        if watch:
            status_view.watch(found, _output())
        else:
            _output().print(status_view.view(status_of(found)))


@app.command()
def logs(
    directory: RunDirectory,
    task: Annotated[
        int | None, typer.Option("--task", metavar="N", min=0, help="Position of a task; the last begun.")
    ] = None,
    unit: Annotated[
        int | None, typer.Option("--unit", metavar="I", min=0, help="Only this unit of the task.")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only units that failed: of the task, or of all tasks.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is added, until the end.")
    ] = False,
    db: HistoryUrl = None,
) -> None:
    """Print what units have printed.

    Exit codes: 0 printed, or there is nothing to print, 2 there is no such run, task or unit.
    """
    from fractal_runner.cli.locate import open_run
    from fractal_runner.cli.logfiles import Printer
    from fractal_runner.cli.logs import Choice, follow_logs, print_logs

    if unit is not None and failed:
        raise typer.BadParameter("one unit, or those that failed: not both", param_hint="--unit")
    choice = Choice(task, unit, failed)
    printer = Printer(sys.stdout, is_terminal=sys.stdout.isatty(), directory=directory)
    with open_run(directory, db) as found:
        if follow:
            follow_logs(found, choice, printer)
        elif remark := print_logs(found, choice, printer):
            typer.echo(remark, err=True)


@app.command("list")
def list_runs(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Runs, or directories that hold runs; ./fractal_runs."),
    ] = None,
    db: HistoryUrl = None,
) -> None:
    """List runs, a line each. With --db alone: all runs of the database.

    Exit codes: 0 there are some, 2 there are none.
    """
    from fractal_runner.cli import listing

    if directories or db is None:
        asked = directories or [listing.DEFAULT_PARENT]
        for directory in asked:
            if not listing.directories_of_runs(directory):
                _note("error", f"there is no run in {directory}, nor right below it")
        found = listing.runs_of_directories(asked, db)
    else:
        found = listing.runs_of_database(db)
        if not found:
            _note("error", "there is no run in the database")
    if not found:
        raise typer.Exit(2)
    _output().print(listing.table_of(found))


@app.command()
def clean(
    directory: RunDirectory,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    db: HistoryUrl = None,
) -> None:
    """Remove arguments, output and logs of the units that succeeded. Their results stay in the history.

    Exit codes: 0 done, 2 there is no such run, or not all could be removed, 3 the run is going on.
    """
    from fractal_runner.cli.clean import clean_run
    from fractal_runner.cli.locate import open_run
    from fractal_runner.quantities import format_size

    with open_run(directory, db) as found:
        freed = clean_run(found, dry_run=dry_run)
    verb = "would be removed" if dry_run else "removed"
    typer.echo(f"{freed.files} file(s) {verb}, {format_size(freed.bytes)}")
    if freed.problems:
        _stop("error", f"{len(freed.problems)} file(s) could not be removed; the first: {freed.problems[0]}")


@app.command()
def cancel(
    directory: RunDirectory,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="How long to wait for the end.")
    ] = 60.0,
    db: HistoryUrl = None,
) -> None:
    """End a run that is going on elsewhere, and wait for its end.

    Exit codes: 0 it has ended, 2 there is no such run, or nobody is at work on it, 3 it goes on.
    """
    from fractal_runner.cli.cancel import cancel_run
    from fractal_runner.cli.locate import open_run

    with open_run(directory, db) as found:
        code = cancel_run(found, timeout_s=timeout, say=lambda text: typer.echo(text, err=True))
    raise typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fractal-runner {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Run Fractal image-analysis workflows on this machine or a cluster."""


def run_app() -> NoReturn:
    """Run the command line. Mistakes in files become messages; the process ends with the exit code."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what is shown may be in any script
    try:
        app()
    except (InputFileError, HistoryError) as error:
        _note("error", str(error))
        _leave(2)
    except RunBusyError as error:
        _note("error", str(error))
        _leave(3)
    except KeyboardInterrupt:
        _leave(130)
    except SystemExit as leaving:
        _leave(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End the process, even if a function that cannot be ended still runs in one of its threads."""
    stuck = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    if any(thread.is_alive() for thread in stuck):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _log_if(verbose: bool) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")


def _expect_directory_of(output: Path | None) -> None:
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: its directory does not exist", param_hint="--output")


def _output() -> Console:
    """Where tables go: as wide as the terminal, or where there is none, as they need to be."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(highlight=False, width=width, soft_wrap=True)


def _absolute(directory: Path | None) -> str | None:
    return None if directory is None else os.path.abspath(directory)  # noqa: PTH100 - links are kept


def _types(types: dict[str, bool]) -> str:
    return ", ".join(f"{name}={str(value).lower()}" for name, value in types.items())


def _note(kind: str, message: str) -> None:
    typer.echo(f"{kind}: {message}", err=True)


def _stop(kind: str, message: str) -> NoReturn:
    _note(kind, message)
    raise typer.Exit(2)


def _show_warning(message: Warning | str, *_details: Any, **_more: Any) -> None:
    _note("warning", str(message))
