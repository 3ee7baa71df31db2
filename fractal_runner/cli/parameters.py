"""The arguments and options that commands share: their names, and what is said of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fractal_runner.executors import factories


def _warn_of_password(url: str | None) -> str | None:
    """Say so if a password was typed where everybody on this machine can read it."""
    if url is not None and "@" in url and any(url in word for word in sys.argv):
        _, _, rest = url.partition("://")
        if ":" in rest.rpartition("@")[0]:
            typer.echo(
                "warning: a password on the command line is seen by everybody on this machine (ps): put the "
                "URL into FRACTAL_RUNNER_DB, or the password into ~/.pgpass",
                err=True,
            )
    return url


def _database(what: str) -> Any:
    """The option that names a history's database."""
    return typer.Option(
        "--db", metavar="URL", envvar="FRACTAL_RUNNER_DB", callback=_warn_of_password, help=what
    )


WorkflowFile = Annotated[Path, typer.Argument(metavar="WORKFLOW.json", help="The workflow.")]
DatasetFile = Annotated[Path, typer.Option("--dataset", metavar="DATASET.json", help="The dataset.")]
ExecutorName = Annotated[
    str | None,
    typer.Option(
        "--executor",
        help=f"Where units run, if not where the configuration says: {', '.join(factories.built_in())}, "
        "or another one that `executors` lists.",
    ),
]
ExecutorOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--executor-opt",
        metavar="KEY=VALUE",
        help="An option of the executor (or a key of the configuration).",
    ),
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
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The run's directory.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="DATASET_OUT.json", help="Write the final dataset here as well."),
]
HistoryUrl = Annotated[
    str | None, _database("Where the history is, if not where the directory says (which keeps no password).")
]
NewHistoryUrl = Annotated[
    str | None,
    _database(
        "The database of the run's history (postgresql+psycopg://user@host/name); "
        "a file in the run's directory if not given."
    ),
]
WarmStart = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        metavar="auto|always|never",
        help="Whether the units of a task share its imports (auto).",
    ),
]
WarmStartTimeout = Annotated[
    str | None,
    typer.Option(
        "--warm-start-timeout", metavar="TIME", help="A task whose imports take longer starts cold (60s)."
    ),
]
MaxServers = Annotated[
    int | None,
    typer.Option("--max-servers", min=1, help="How many processes with imports there may be at a time (4)."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only say what would run and what would be handed over: scripts, jobs, and what they ask for.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")]
