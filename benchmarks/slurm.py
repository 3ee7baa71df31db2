"""Calls on a real Slurm cluster, on this machine: ours beside submitit's map_array and executorlib.

The calls do nothing, so that all of the time is what it takes to bring them to the nodes and back. All of
them share one cluster (`tests.clusters.slurm`), which is idle before each measurement, and each measurement
has a fresh interpreter, whose imports are not counted. In front of Slurm's commands stand scripts that note
each call of them.

submitit makes a job of each call, in one array. executorlib submits them one by one, or starts so many
workers once, which are given the calls over the network and have to reach the process that submits.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._child import TOP, call
from benchmarks._report import Report, alternate, median, say, seconds
from benchmarks._scratch import Scratch
from tests.clusters.slurm import SlurmCluster

CALLS = 1_000
FEW_CALLS = 50  # of whoever takes seconds for each
SINGLE_CALLS = 10
POLL_S = 1.0  # what there is at least between two of our questions

OURS, TUNED, SUBMITIT = "SlurmExecutor", "SlurmExecutor, 4 jobs", "submitit map_array"
EXECUTORLIB, EXECUTORLIB_BLOCK = "executorlib, a job per call", "executorlib, 16 workers"

_COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun")
_LOG = "FR_BENCHMARK_COMMANDS"
_WRAPPER = """\
#!/bin/bash
printf '%s %s\\n' "$EPOCHREALTIME" {name} >>"${log}"
exec {path} "$@"
"""

# How many calls each is given.
_CONTENDERS = {
    OURS: CALLS,
    TUNED: CALLS,
    SUBMITIT: CALLS,
    EXECUTORLIB: FEW_CALLS,
    EXECUTORLIB_BLOCK: CALLS,
}


def run(report: Report, scratch: Scratch) -> None:
    """Measure many calls of each, and single calls of ours and of submitit."""
    contenders = dict(_CONTENDERS)
    measured_versions = ["submitit", "executorlib", "pysqa"]
    if find_spec("executorlib") is None:
        del contenders[EXECUTORLIB], contenders[EXECUTORLIB_BLOCK], measured_versions[1:]
        report.note(
            "executorlib is not installed: pip install 'executorlib[cluster]>=1.11,<2', in a copy of the "
            "environment. It brings numpy, which each of submitit's jobs, and so of ours, imports if it can."
        )
    report.figures["versions"] = {name: version(name) for name in measured_versions}
    report.uses(scratch.disk)
    with SlurmCluster(accounting=True) as cluster, _commands_noted(cluster, scratch.new(scratch.disk)) as log:
        report.figures["versions"]["slurm"] = cluster.run("sinfo", "--version").stdout.split()[-1]

        def measured(function: str, **arguments: Any) -> dict[str, Any]:
            cluster.wait_until_idle(timeout=300)
            log.unlink(missing_ok=True)
            taken = call(f"benchmarks.slurm:{function}", folder=str(scratch.new(scratch.disk)), **arguments)
            return {**taken, "commands": _commands(log)}

        many = {}
        for name, count in contenders.items():
            many[name] = measured("measure_many", name=name, count=count)
            say(f"slurm: {count:,} calls, {name}: {seconds(many[name]['seconds'])}")
        single = alternate(
            SINGLE_CALLS,
            {
                name: functools.partial(measured, "measure_many", name=name, count=1)
                for name in (OURS, SUBMITIT)
            },
            "slurm: a single call",
        )
    report.figures.update(many=many, single=single)
    _tell_many(report, many)
    _tell_single(report, single)


def _tell_many(report: Report, many: Mapping[str, dict[str, Any]]) -> None:
    nodes = "on four nodes of four CPUs, all of them on this machine"
    per_call = {name: taken["seconds"] / taken["calls"] for name, taken in many.items()}
    report.table(
        f"{CALLS:,} calls that do nothing, {nodes}",
        ["", "calls", "in all", "a call", f"{SUBMITIT} takes", "jobs", "files", *_COMMANDS[:4]],
        [
            [
                name,
                f"{taken['calls']:,}",
                seconds(taken["seconds"]),
                seconds(per_call[name]),
                "1" if name == SUBMITIT else f"{per_call[SUBMITIT] / per_call[name]:.2f} ×",
                f"{taken['jobs']:,}" if taken["jobs"] else "",
                f"{taken['files']:,}",
                *(f"{len(taken['commands'][command]):,}" for command in _COMMANDS[:4]),
            ]
            for name, taken in many.items()
        ],
    )
    if any(taken["calls"] < CALLS for taken in many.values()):
        few = [name for name, taken in many.items() if taken["calls"] < CALLS]
        report.note(
            f"{', '.join(few)}: only {FEW_CALLS} calls were measured; {CALLS:,} would take "
            + ", ".join(seconds(per_call[name] * CALLS) for name in few)
            + " if each took as long (extrapolated)."
        )
    for name in (OURS, TUNED):
        taken = many[name]
        commands = taken["commands"]
        asked = commands["squeue"]
        report.at_least(
            f"{name}: {SUBMITIT} takes as many times as long", 10, per_call[SUBMITIT] / per_call[name]
        )
        report.at_most(f"{name}: sbatch for {taken['calls']:,} calls", 3, len(commands["sbatch"]))
        report.at_most(
            f"{name}: squeue for each interval of {POLL_S:g} s",
            1,
            len(asked) / (taken["seconds"] / POLL_S + 1),
        )
        report.at_most(f"{name}: files for {taken['jobs']} jobs", 20 + 8 * taken["jobs"], taken["files"])


def _tell_single(report: Report, single: Mapping[str, list[dict[str, Any]]]) -> None:
    medians = {name: median([each["seconds"] for each in taken]) for name, taken in single.items()}
    ratio = medians[OURS] / medians[SUBMITIT]
    report.table(
        f"A single call, from submission to result, median of {SINGLE_CALLS}",
        ["", "median", "least", "most", "ratio"],
        [
            [
                name,
                seconds(medians[name]),
                seconds(min(each["seconds"] for each in taken)),
                seconds(max(each["seconds"] for each in taken)),
                f"{medians[name] / medians[SUBMITIT]:.2f}",
            ]
            for name, taken in single.items()
        ],
    )
    report.at_most(f"a single call, ratio to {SUBMITIT}", 1.2, ratio)


def nothing(number: int) -> int:
    """The function of a call."""
    return number


def measure_many(name: str, count: int, folder: str) -> dict[str, Any]:
    """In a fresh process: so many calls, from the first submission to the last result."""
    place = Path(folder)
    place.mkdir()
    took = (_with_submitit if name == SUBMITIT else _with_executor)(name, count, place)
    files = [path for path in place.rglob("*") if path.is_file()]
    return {
        "calls": count,
        "seconds": took,
        "files": len(files),
        "jobs": sum(path.name.startswith("claim-") for path in files),  # of ours
    }


def _with_executor(name: str, count: int, folder: Path) -> float:
    with _EXECUTORS[name](folder) as executor:
        began = time.perf_counter()
        futures = [executor.submit(nothing, index) for index in range(count)]
        assert [future.result() for future in futures] == list(range(count))
        return time.perf_counter() - began


def _with_submitit(name: str, count: int, folder: Path) -> float:
    import submitit

    executor = submitit.SlurmExecutor(folder)
    began = time.perf_counter()
    jobs = [executor.submit(nothing, 0)] if count == 1 else executor.map_array(nothing, range(count))
    assert [job.result() for job in jobs] == list(range(count))
    return time.perf_counter() - began


def _ours(folder: Path, **options: Any) -> Executor:
    from fractal_runner import SlurmExecutor

    return SlurmExecutor(folder, **options)


def _executorlib(folder: Path, **options: Any) -> Executor:
    import warnings

    from executorlib import SlurmClusterExecutor

    warnings.filterwarnings("ignore", "The following keys are not recognized")  # the partition is one
    # Its template for sbatch cannot do without the name of a partition.
    executor: Executor = SlurmClusterExecutor(
        resource_dict={"partition": "main", **options.pop("resources", {})}, **options
    )
    return executor


# 16 CPUs: four jobs that fill a node each, or 16 workers. Without a cache of results the latter is faster.
_EXECUTORS: dict[str, Callable[[Path], Executor]] = {
    OURS: _ours,
    TUNED: functools.partial(_ours, calls_per_job=CALLS // 4, parallel_calls_per_job=4),
    EXECUTORLIB: lambda folder: _executorlib(folder, cache_directory=str(folder)),
    EXECUTORLIB_BLOCK: lambda folder: _executorlib(
        folder, max_workers=16, block_allocation=True, resources={"cwd": str(folder)}
    ),
}


@contextmanager
def _commands_noted(cluster: SlurmCluster, directory: Path) -> Iterator[Path]:
    """Slurm's commands are noted in the file that this gives, and find the cluster, as does what they run."""
    directory.mkdir(parents=True)
    for name in _COMMANDS:
        path = shutil.which(name)
        wrapper = directory / name
        wrapper.write_text(_WRAPPER.format(name=name, path=path, log=_LOG))
        wrapper.chmod(0o755)
    log = directory / "log"
    before = dict(os.environ)
    os.environ.update(cluster.env)
    os.environ[_LOG] = str(log)
    os.environ["PATH"] = f"{directory}:{os.environ.get('PATH', os.defpath)}"
    os.environ["PYTHONPATH"] = str(TOP)  # where this module is, for the nodes
    try:
        yield log
    finally:
        os.environ.clear()
        os.environ.update(before)


def _commands(log: Path) -> dict[str, list[float]]:
    """When each command was called."""
    found: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    if log.exists():
        for line in log.read_text().splitlines():
            at, name = line.split()
            found[name].append(float(at))
    return found
