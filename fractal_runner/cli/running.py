"""The commands that make a run go on, or say what it would do: run, resume, check, cancel."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fractal_runner.cli import options as given
from fractal_runner.cli.console import absolute, expect_directory_of, log_if, note
from fractal_runner.cli.parameters import (
    AttributeFilter,
    DatasetFile,
    DryRun,
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
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Run a workflow over a dataset.

    Exit codes: 0 done, 1 a task failed, 2 wrong usage or input, 3 a job failed, 130 Ctrl-C; with --dry-run as
    those of check.
    """
    from rich.console import Console

    from fractal_runner.cli.run import RunRequest, execute, unused
    from fractal_runner.workflow.files import load_dataset, load_workflow

    console = Console(stderr=True)
    log_if(verbose)
    expect_directory_of(output)
    directory = workflow_dir or unused(Path("fractal_runs") / time.strftime("%Y%m%d-%H%M%S"))
    warm = given.read_warm_start(warm_start, warm_start_timeout, max_servers)
    if dry_run:
        _tell(
            workflow,
            dataset,
            dry_run_in=absolute(directory),
            executor=executor,
            options=given.executor_words(executor_opt, max_workers),
            first=first,
            last=last,
            type_filter=type_filter,
            attribute_filter=attribute_filter,
            zarr_dir=zarr_dir,
            task_env=task_env,
            has_history=db is not None,
        )
        return
    config = given.configuration(workflow, executor, executor_opt, max_workers)
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
        dataset=load_dataset(dataset, zarr_dir=absolute(zarr_dir)),
        directory=directory,
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

    log_if(verbose)
    expect_directory_of(output)
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
    _tell(
        workflow,
        dataset,
        dry_run_in=None,
        executor=executor,
        options=given.executor_words(executor_opt, max_workers),
        first=first,
        last=last,
        type_filter=type_filter,
        attribute_filter=attribute_filter,
        zarr_dir=zarr_dir,
        task_env=task_env,
        has_history=db is not None,
    )


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


def _tell(
    workflow: Path,
    dataset: Path,
    *,
    dry_run_in: str | None,
    executor: str | None,
    options: list[str],
    first: int | None,
    last: int | None,
    type_filter: list[str] | None,
    attribute_filter: list[str] | None,
    zarr_dir: Path | None,
    task_env: str | None,
    has_history: bool,
) -> None:
    """Say what would run, and what is wrong; if a directory is given, also what a run there would hand over.

    Raises:
        typer.Exit: with code 2, if there are mistakes.
    """
    from fractal_runner.cli.check import check_run
    from fractal_runner.cli.dry_run import DryRun as Teller
    from fractal_runner.executors import sections
    from fractal_runner.workflow.files import load_dataset, load_workflow

    findings = check_run(
        lambda: load_workflow(workflow, task_env=task_env),
        lambda: load_dataset(dataset, zarr_dir=absolute(zarr_dir)),
        first=first,
        last=last,
        type_filters=given.read_type_filters(type_filter or ()),
        attribute_filters=given.read_attribute_filters(attribute_filter or ()),
        config=lambda: sections.load(start=workflow, executor=executor, options=options),
        has_history=has_history,
        dry_run=None if dry_run_in is None else Teller(Path(dry_run_in)),
    )
    for line in findings.lines:
        typer.echo(line)
    for warning in findings.warnings:
        note("warning", warning)
    for mistake in findings.mistakes:
        note("mistake", mistake)
    if findings.mistakes:
        raise typer.Exit(2)
    typer.echo("No mistakes found." if dry_run_in is None else "No mistakes found; nothing was submitted.")
