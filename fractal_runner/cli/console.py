"""What the commands share: where their words go, and small checks of what was typed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 1000


def note(kind: str, message: str) -> None:
    """Say something of this kind ("warning", "mistake", "error") on stderr."""
    typer.echo(f"{kind}: {message}", err=True)


def stop(kind: str, message: str) -> NoReturn:
    """Say it, and end the command with exit code 2."""
    note(kind, message)
    raise typer.Exit(2)


def output() -> Console:
    """Where tables go: as wide as the terminal, or where there is none, as they need to be."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(highlight=False, width=width, soft_wrap=True)


def log_if(verbose: bool) -> None:
    """Let what happens be logged on stderr, if that is wanted."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")


def expect_directory_of(file: Path | None) -> None:
    """Whether a file of this name can be made for `--output`.

    Raises:
        typer.BadParameter: if not.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{file}: its directory does not exist", param_hint="--output")


def absolute(directory: Path | None) -> str | None:
    """A directory's path from the root on, with whatever links are in it."""
    return None if directory is None else os.path.abspath(directory)  # noqa: PTH100 - links are kept
