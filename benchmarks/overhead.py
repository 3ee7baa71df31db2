"""What a unit costs: commands and Python functions, beside the same calls in a bare pool of threads.

Commands are /bin/true, whose own cost is that of starting a process, so that what a run adds (arguments,
log, evidence, watching) shows in full. Functions do nothing: what is measured is the run itself. Both are
run with the history and without it, which shows what that costs.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks._child import call, peak_memory
from benchmarks._no_history import without_history
from benchmarks._report import Report, alternate, mb, median, medians, ratio, seconds, spread
from benchmarks._scratch import Scratch
from fractal_runner import Dataset, Task, Workflow, WorkflowTask, process_workflow

COMMANDS = 2_000
FUNCTIONS = 100_000
THREADS = 2
TMPFS_REPETITIONS = 7
DISK_REPETITIONS = 5
FUNCTION_REPETITIONS = 3

_ZARR_DIR = "/data/benchmark"


def run(report: Report, scratch: Scratch) -> None:
    """Measure commands on tmpfs and on a disk, and functions."""
    _commands(report, scratch)
    _functions(report, scratch)


def nothing(zarr_url: str) -> None:
    """The function of a unit."""


def dataset_of(count: int) -> Dataset:
    """A dataset of `count` plain images."""
    images = [
        {"zarr_url": f"{_ZARR_DIR}/plate.zarr/{index // 1000:04d}/{index:07d}"} for index in range(count)
    ]
    return Dataset.model_validate({"name": "benchmark", "zarr_dir": _ZARR_DIR, "images": images})


def workflow_of(**task: Any) -> Workflow:
    """A workflow of one task."""
    return Workflow(name="benchmark", task_list=[WorkflowTask(task=Task(name="unit", **task))])


def true_command() -> str:
    """The path of `true`: /usr/bin/true on macOS."""
    return shutil.which("true", path="/bin:/usr/bin") or "/bin/true"


def _commands(report: Report, scratch: Scratch) -> None:
    rows = []
    places = [(scratch.memory, TMPFS_REPETITIONS, "memory"), (scratch.disk, DISK_REPETITIONS, "disk")]
    dataset = dataset_of(COMMANDS)
    for place, repetitions, key in places:
        if place is None:
            report.note("There is no tmpfs at /dev/shm here: commands were measured on the disk only.")
            continue
        kind = report.uses(place)
        taken = alternate(
            repetitions,
            {
                "fractal_runner": lambda place=place: _run_commands(dataset, scratch.new(place)),
                "no history": lambda place=place: _run_without_history(dataset, scratch.new(place)),
                "bare pool": lambda place=place: _run_commands_bare(scratch.new(place)),
            },
            f"overhead: {COMMANDS:,} commands on {kind}",
        )
        ours, without, bare = taken["fractal_runner"], taken["no history"], taken["bare pool"]
        report.figures[f"commands_{key}"] = {"file_system": kind, "units": COMMANDS, **taken}
        for name, figures in taken.items():
            rows.append(
                [
                    f"{COMMANDS:,} × {true_command()}, {kind}, {name}",
                    seconds(medians(figures, "seconds")),
                    seconds(medians(figures, "seconds") / COMMANDS),
                    "" if name == "bare pool" else f"{ratio(figures, bare):.2f}",
                    "" if name == "bare pool" else spread(figures, bare),
                    f"{ratio(figures, without):.2f}" if name == "fractal_runner" else "",
                ]
            )
        if key == "memory":
            report.at_most(
                "commands on tmpfs, ratio to a bare pool, without history", 1.5, ratio(without, bare)
            )
        report.at_most(f"commands on {kind}, ratio to those without history", 1.15, ratio(ours, without))
    report.table(
        f"Commands over {THREADS} threads",
        ["units", "in all", "a unit", "ratio to bare", "from … to", "ratio to no history"],
        rows,
    )
    report.note("bare pool: subprocess.run of the same words in a ThreadPoolExecutor of as many threads.")
    report.note("no history: the history is told of the run and its tasks, and not of its units.")


def _run_without_history(dataset: Dataset, directory: Path) -> dict[str, Any]:
    with without_history():
        return _run_commands(dataset, directory)


def _run_commands(dataset: Dataset, directory: Path) -> dict[str, Any]:
    workflow = workflow_of(command_parallel=true_command())

    async def measured() -> float:
        began = time.perf_counter()
        await process_workflow(
            workflow=workflow,
            dataset=dataset,
            workflow_dir_local=directory,
            executor=("thread", {"max_workers": THREADS}),
        )
        return time.perf_counter() - began

    return {"seconds": asyncio.run(measured())}


def _run_commands_bare(directory: Path) -> dict[str, Any]:
    directory.mkdir()
    program = true_command()

    def one(index: int) -> None:
        prefix = f"{directory}/0_unit/{index // 1000:06d}/par-{index // 1000:06d}-{index:07d}"
        words = [program, "--args-json", f"{prefix}-args.json", "--out-json", f"{prefix}-metadiff.json"]
        subprocess.run(words, check=True)

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(one, index) for index in range(COMMANDS)]:
            future.result()
    return {"seconds": time.perf_counter() - began}


def _functions(report: Report, scratch: Scratch) -> None:
    place = scratch.memory or scratch.disk
    kind = report.uses(place)
    taken = alternate(
        FUNCTION_REPETITIONS,
        {
            "fractal_runner": lambda: call(
                "benchmarks.overhead:run_functions", count=FUNCTIONS, directory=str(scratch.new(place))
            ),
            "no history": lambda: call(
                "benchmarks.overhead:run_functions_without_history",
                count=FUNCTIONS,
                directory=str(scratch.new(place)),
            ),
            "bare pool": lambda: call("benchmarks.overhead:run_functions_bare", count=FUNCTIONS),
        },
        f"overhead: {FUNCTIONS:,} functions",
    )
    ours, bare = taken["fractal_runner"], taken["bare pool"]
    report.figures["functions"] = {"file_system": kind, "units": FUNCTIONS, **taken}
    rate = median([FUNCTIONS / figure["seconds"] for figure in ours])
    peak = medians(ours, "peak_bytes")
    report.table(
        f"{FUNCTIONS:,} functions that do nothing, over {THREADS} threads, {kind}",
        ["", "in all", "a unit", "units/s", "peak memory"],
        [
            [
                name,
                seconds(medians(figures, "seconds")),
                seconds(medians(figures, "seconds") / FUNCTIONS),
                f"{FUNCTIONS / medians(figures, 'seconds'):,.0f}",
                mb(medians(figures, "peak_bytes")),
            ]
            for name, figures in taken.items()
        ]
        + [["ratio", f"{ratio(ours, bare):.1f}", "", "", f"{ratio(ours, bare, 'peak_bytes'):.1f}"]],
    )
    without = median([FUNCTIONS / figure["seconds"] for figure in taken["no history"]])
    report.at_least("functions a second, without history", 5_000, without)
    report.at_least("functions a second", 4_000, rate)
    report.at_most("peak memory of the run of functions", 400, peak / 1e6, "MB")


def run_functions(count: int, directory: str) -> dict[str, Any]:
    """In a fresh process: a run of functions, its time and the process's peak memory."""
    workflow, dataset = workflow_of(function_parallel=nothing), dataset_of(count)

    async def measured() -> float:
        began = time.perf_counter()
        await process_workflow(
            workflow=workflow,
            dataset=dataset,
            workflow_dir_local=directory,
            executor=("thread", {"max_workers": THREADS}),
        )
        return time.perf_counter() - began

    return {"seconds": asyncio.run(measured()), "peak_bytes": peak_memory()}


def run_functions_without_history(count: int, directory: str) -> dict[str, Any]:
    """In a fresh process: the same without a record of its units."""
    with without_history():
        return run_functions(count, directory)


def run_functions_bare(count: int) -> dict[str, Any]:
    """In a fresh process: the same calls in a bare pool. The dataset stands in memory here, too."""
    dataset = dataset_of(count)
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(nothing, zarr_url=image.zarr_url) for image in dataset.images]:
            future.result()
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory()}
