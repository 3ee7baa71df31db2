"""The commands and their options. What they do stands in the modules beside this one."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fractal_runner import __version__
from fractal_runner.cli import options as given
from fractal_runner.errors import InputFileError
from fractal_runner.executors import registry

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

WorkflowFile = Annotated[Path, typer.Argument(metavar="WORKFLOW.json", help="The workflow.")]
DatasetFile = Annotated[Path, typer.Option("--dataset", metavar="DATASET.json", help="The dataset.")]
ExecutorName = Annotated[
    str, typer.Option("--executor", help=f"Where units run: {', '.join(registry.names())}.")
]
ExecutorOpt = Annotated[
    list[str] | None, typer.Option("--executor-opt", metavar="KEY=VALUE", help="An option of the executor.")
]
MaxWorkers = Annotated[int | None, typer.Option("--max-workers", min=1, help="How many units run at a time.")]
First = Annotated[int | None, typer.Option("--first", metavar="I", help="Position of the first task to run.")]
Last = Annotated[int | None, typer.Option("--last", metavar="J", help="Position of the last task to run.")]
TypeFilter = Annotated[
    list[str] | None,
    typer.Option("--type-filter", metavar="NAME=BOOL", help="Only images of this type: is_3D=true."),
]
AttributeFilter = Annotated[
    list[str] | None,
    typer.Option("--attribute-filter", metavar="NAME=VALUES", help="Only these images: well=A01,A02."),
]
ZarrDir = Annotated[
    Path | None, typer.Option("--zarr-dir", metavar="DIR", help="Replaces the dataset's zarr_dir.")
]
TaskEnv = Annotated[
    str | None,
    typer.Option("--task-env", metavar="PYTHON", help="The Python that has the task packages installed."),
]


@app.command()
def run(
    workflow: WorkflowFile,
    dataset: DatasetFile,
    workflow_dir: Annotated[
        Path | None,
        typer.Option("--workflow-dir", metavar="DIR", help="The run's directory; a new one if not given."),
    ] = None,
    executor: ExecutorName = registry.DEFAULT,
    executor_opt: ExecutorOpt = None,
    max_workers: MaxWorkers = None,
    first: First = None,
    last: Last = None,
    type_filter: TypeFilter = None,
    attribute_filter: AttributeFilter = None,
    zarr_dir: ZarrDir = None,
    task_env: TaskEnv = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DATASET_OUT.json", help="Write the final dataset here as well."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Run a workflow over a dataset.

    Exit codes: 0 done, 1 a task failed, 2 wrong usage or input, 3 a job failed, 130 Ctrl-C.
    """
    from fractal_runner.cli.run import RunRequest, execute, unused
    from fractal_runner.workflow.files import load_dataset, load_workflow

    console = Console(stderr=True)
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"{output}: its directory does not exist", param_hint="--output")
    options = given.read_executor_options(executor_opt or (), max_workers)
    try:
        registry.check(executor, options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--executor") from None
    repeated = ["--executor", executor]
    for word in executor_opt or ():
        repeated += ["--executor-opt", word]
    for name, value in (("--max-workers", max_workers), ("--task-env", task_env), ("--output", output)):
        if value is not None:
            repeated += [name, str(value)]
    request = RunRequest(
        workflow_file=workflow,
        workflow=load_workflow(workflow, task_env=task_env),
        dataset=load_dataset(dataset, zarr_dir=_absolute(zarr_dir)),
        directory=workflow_dir or unused(Path("fractal_runs") / time.strftime("%Y%m%d-%H%M%S")),
        executor=executor,
        options=options,
        first=first,
        last=last,
        type_filters=given.read_type_filters(type_filter or ()),
        attribute_filters=given.read_attribute_filters(attribute_filter or ()),
        output=output,
        repeated=repeated,
    )
    raise typer.Exit(execute(request, console))


@app.command()
def check(
    workflow: WorkflowFile,
    dataset: DatasetFile,
    executor: ExecutorName = registry.DEFAULT,
    executor_opt: ExecutorOpt = None,
    max_workers: MaxWorkers = None,
    first: First = None,
    last: Last = None,
    type_filter: TypeFilter = None,
    attribute_filter: AttributeFilter = None,
    zarr_dir: ZarrDir = None,
    task_env: TaskEnv = None,
) -> None:
    """Say what would run, without running it, and every mistake that can be found.

    Exit codes: 0 nothing is wrong, 2 there are mistakes.
    """
    from fractal_runner.cli.check import check_run
    from fractal_runner.workflow.files import load_dataset, load_workflow

    findings = check_run(
        lambda: load_workflow(workflow, task_env=task_env),
        lambda: load_dataset(dataset, zarr_dir=_absolute(zarr_dir)),
        first=first,
        last=last,
        type_filters=given.read_type_filters(type_filter or ()),
        attribute_filters=given.read_attribute_filters(attribute_filter or ()),
        executor=executor,
        options=given.read_executor_options(executor_opt or (), max_workers),
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
    try:
        app()
    except InputFileError as error:
        _note("error", str(error))
        _leave(2)
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
