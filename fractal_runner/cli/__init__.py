"""The `fractal-runner` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line, and leave the process with its exit code."""
    from fractal_runner.cli.app import run_app  # typer and rich are loaded only when they are used

    run_app()
