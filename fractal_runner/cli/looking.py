"""The commands that show what there is: tasks, executors, and runs with what they have left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fractal_runner.cli.console import note, output, stop
from fractal_runner.cli.parameters import HistoryUrl, RunDirectory, TaskEnv
from fractal_runner.errors import InputFileError


def tasks(task_env: TaskEnv = None) -> None:
    """List the task packages found, and their tasks."""
    from rich.console import Console
    from rich.table import Table

    from fractal_runner.workflow.manifest import TaskLookupError, find_packages

    try:
        packages = find_packages(task_env)
    except TaskLookupError as error:
        stop("error", str(error))
    if not packages:
        stop("error", f"no task packages in the environment of {task_env or sys.executable} (see --task-env)")
    for package in packages:
        table = Table("task", "type", "needs", "makes", title=f"{package.name} {package.version}")
        table.title_justify = "left"
        for task in package.tasks.values():
            table.add_row(task.name, task.type, _types(task.input_types), _types(task.output_types))
        Console().print(table)
        if package.problem is not None:
            note("warning", f"the manifest of {package.name} is not valid: {package.problem}")


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
    output().print(table_of(list(entries(config)), "" if config is None else config.executor))
    if problem:
        stop("error", problem)


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
            status_view.watch(found, output())
        else:
            output().print(status_view.view(status_of(found)))


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
                note("error", f"there is no run in {directory}, nor right below it")
        found = listing.runs_of_directories(asked, db)
    else:
        found = listing.runs_of_database(db)
        if not found:
            note("error", "there is no run in the database")
    if not found:
        raise typer.Exit(2)
    output().print(listing.table_of(found))


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
        stop("error", f"{len(freed.problems)} file(s) could not be removed; the first: {freed.problems[0]}")


def _types(types: dict[str, bool]) -> str:
    return ", ".join(f"{name}={str(value).lower()}" for name, value in types.items())
