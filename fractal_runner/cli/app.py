"""The command line as a whole: its commands, in the order in which its help shows them, and its end.

The commands and their options stand in `running` and `looking`; what they do, in the modules beside these.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from typing import Annotated, Any, NoReturn

import typer

from fractal_runner import __version__
from fractal_runner.cli import looking, running
from fractal_runner.cli.configuration import app as config_app
from fractal_runner.cli.console import note
from fractal_runner.cli.doctor import doctor
from fractal_runner.cli.pools import app as pool_app
from fractal_runner.errors import HistoryError, InputFileError, RunBusyError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command()(running.run)
app.command()(running.resume)
app.command()(running.check)
app.command()(looking.tasks)
app.command()(looking.executors)
app.command()(looking.status)
app.command()(looking.logs)
app.command("list")(looking.list_runs)
app.command()(looking.clean)
app.command()(running.cancel)
app.add_typer(config_app, name="config")
app.command()(doctor)
app.add_typer(pool_app, name="pool")


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
        note("error", str(error))
        _leave(2)
    except RunBusyError as error:
        note("error", str(error))
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


def _show_warning(message: Warning | str, *_details: Any, **_more: Any) -> None:
    note("warning", str(message))
