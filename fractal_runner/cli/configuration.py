"""`fractal-runner config`: what it says, where each value is from, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Show the configuration, or look for mistakes in it.")

_Start = Annotated[
    Path | None,
    typer.Option(
        "--workflow",
        metavar="WORKFLOW.json",
        help="As a run of this workflow finds it; else as it is from the current directory.",
    ),
]


@app.command()
def show(
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", help="Only this key and what is below it: slurm.partition.")
    ] = "",
    origin: Annotated[
        bool, typer.Option("--origin", help="Say of each value in which layer, file and line it is.")
    ] = False,
    workflow: _Start = None,
) -> None:
    """Print what all layers of the configuration say together, as YAML.

    Exit codes: 0 printed, 2 there are mistakes, or nothing is said of the key.
    """
    from fractal_runner.executors import sections

    try:
        config = sections.load(start=workflow)
        lines = config.lines(key, origins=origin)
    except ValueError as error:  # an InputFileError is one, too
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if origin and not key:
        width = max(len(file.layer) for file in config.files)
        for file in config.files:
            there = "" if file.path.exists() else " (there is none)"
            typer.echo(f"# {file.layer:<{width}}  {file.path}{there}")
    for line in lines:
        typer.echo(line)


@app.command()
def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Files to be looked at, each by itself."),
    ] = None,
    workflow: _Start = None,
) -> None:
    """Name every mistake of these files; of all layers of the configuration together, if none is named.

    Exit codes: 0 nothing is wrong, 2 there are mistakes.
    """
    from fractal_runner import config
    from fractal_runner.executors.sections import ExecutorSections

    mistakes = config.check(ExecutorSections(), *(files or ()), start=workflow)
    for mistake in mistakes:
        typer.echo(f"mistake: {mistake}", err=True)
    if mistakes:
        raise typer.Exit(2)
    typer.echo("No mistakes found.")
