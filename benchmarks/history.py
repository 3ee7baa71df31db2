"""The record of 100,000 units: how large it is, how soon the state of the run is told from it.

The status is asked for as people do, by the command line in a process of its own, and as a program does that
has everything loaded. What the process costs anyway is measured beside it: a command that only prints the
version.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._report import Report, alternate, mb, medians, seconds
from benchmarks._scratch import Scratch
from benchmarks.overhead import dataset_of, nothing, workflow_of
from fractal_runner import process_workflow
from fractal_runner.cli.locate import open_run
from fractal_runner.cli.status import status_of
from fractal_runner.history.schema import State

UNITS = 100_000
REPETITIONS = 7

_PROGRAM = [sys.executable, "-m", "fractal_runner"]


def run(report: Report, scratch: Scratch) -> None:
    """Make a run, and ask for its status."""
    place = scratch.memory or scratch.disk
    kind = report.uses(place)
    directory = scratch.new(place)
    asyncio.run(
        process_workflow(
            workflow=workflow_of(function_parallel=nothing),
            dataset=dataset_of(UNITS),
            workflow_dir_local=directory,
            executor=("thread", {"max_workers": 2}),
        )
    )
    size = sum(path.stat().st_size for path in directory.glob("history.sqlite*"))
    taken = alternate(
        REPETITIONS,
        {
            "status of the run, in a process that runs": lambda: _ask(directory),
            "fractal-runner status": lambda: _call("status", str(directory)),
            "fractal-runner --version": lambda: _call("--version"),
        },
        f"history: status of {UNITS:,} units",
    )
    report.figures["history"] = {"file_system": kind, "units": UNITS, "bytes": size, **taken}
    report.table(
        f"The status of a run of {UNITS:,} units, whose history has {mb(size)}, {kind}",
        ["", "median"],
        [[name, seconds(medians(figures, "seconds"))] for name, figures in taken.items()],
    )
    report.at_most(f"history of {UNITS:,} units", 100, size / 1e6, "MB")
    asked = medians(taken["status of the run, in a process that runs"], "seconds")
    report.at_most(f"status of {UNITS:,} units", 0.5, asked, "s")


def _ask(directory: Path) -> dict[str, Any]:
    began = time.perf_counter()
    with open_run(directory) as found:
        status = status_of(found)
    taken = time.perf_counter() - began
    assert sum(task.counts[State.DONE] for task in status.tasks) == UNITS
    return {"seconds": taken}


def _call(*words: str) -> dict[str, Any]:
    began = time.perf_counter()
    subprocess.run([*_PROGRAM, *words], check=True, capture_output=True, timeout=60)
    return {"seconds": time.perf_counter() - began}
