"""Calls on an emulated LSF, on this machine: ours beside a bsub for each of them.

There is no LSF here: what stands for it (`tests.clusters.lsf`) runs jobs at once, and its commands take as
long as a small Python program does. So the figures say how often LSF is called and how often Python starts,
and not how long LSF takes.

The other side does what a script of a few lines does: one bsub per call, whose job starts Python, takes its
function and its argument from a pickle, and leaves its result in a file; bjobs is asked once in a second,
until all jobs have ended. Both have the same cluster, which is idle before each measurement, and each
measurement has a fresh interpreter, whose imports are not counted.
"""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._calls import nothing
from benchmarks._child import TOP, call
from benchmarks._report import Report, alternate, median, say, seconds, spread
from benchmarks._report import ratio as ratio_of
from benchmarks._scratch import Scratch
from tests.clusters.lsf import LsfCluster

CALLS = 1_000
REPETITIONS = 3
POLL_S = 1.0  # what there is at least between two questions, of both

OURS, PLAIN = "LsfExecutor", "a bsub per call"
_COMMANDS = ("bsub", "bjobs", "bkill", "lsid", "bhist")
_JOB = """\
import pickle, sys
with open(sys.argv[1], "rb") as file:
    function, argument = pickle.load(file)
with open(sys.argv[2], "wb") as file:
    pickle.dump(function(argument), file)
"""


def run(report: Report, scratch: Scratch) -> None:
    """Measure many calls of both, in both dialects of LSF."""
    report.uses(scratch.disk)
    report.note("There is no LSF here: these are calls on an emulation of it.")
    for dialect in ("openlava", "ibm"):
        with LsfCluster(dialect=dialect) as cluster, _found(cluster):

            def measured(
                function: str, cluster: LsfCluster = cluster, dialect: str = dialect
            ) -> dict[str, Any]:
                cluster.reset()
                folder = scratch.new(scratch.disk)
                taken = call(f"benchmarks.lsf:{function}", folder=str(folder), count=CALLS)
                commands = {name: len(cluster.calls(name)) for name in _COMMANDS}
                return {**taken, "dialect": dialect, "jobs": len(cluster.jobs()), "commands": commands}

            taken = alternate(
                REPETITIONS,
                {
                    OURS: functools.partial(measured, "measure_ours"),
                    PLAIN: functools.partial(measured, "measure_plain"),
                },
                f"lsf, {dialect}: {CALLS:,} calls",
            )
        report.figures[dialect] = taken
        _tell(report, dialect, taken)
    say("lsf: measured")


def _tell(report: Report, dialect: str, taken: Mapping[str, list[dict[str, Any]]]) -> None:
    report.table(
        f"{CALLS:,} calls that do nothing, on four hosts of four slots, {dialect}: medians of {REPETITIONS}",
        ["", "in all", "a call", "jobs", *_COMMANDS],
        [
            [
                name,
                seconds(median([each["seconds"] for each in figures])),
                seconds(median([each["seconds"] for each in figures]) / CALLS),
                f"{max(each['jobs'] for each in figures):,}",
                *(f"{max(each['commands'][command] for each in figures):,}" for command in _COMMANDS),
            ]
            for name, figures in taken.items()
        ],
    )
    ours = taken[OURS]
    report.note(f"Ratios of neighbouring repetitions: {spread(taken[PLAIN], ours)}.")
    report.at_least(f"{dialect}: {PLAIN} takes as many times as long", 10, ratio_of(taken[PLAIN], ours))
    report.at_most(f"{dialect}: bsub for {CALLS:,} calls", 3, max(each["commands"]["bsub"] for each in ours))
    report.at_most(
        f"{dialect}: bjobs for each interval of {POLL_S:g} s",
        1,
        max(each["commands"]["bjobs"] / (each["seconds"] / POLL_S + 1) for each in ours),
    )


def measure_ours(folder: str, count: int) -> dict[str, Any]:
    """In a fresh process: so many calls, from the first submission to the last result."""
    from fractal_runner import LsfExecutor

    with LsfExecutor(folder) as executor:
        began = time.perf_counter()
        futures = [executor.submit(nothing, index) for index in range(count)]
        assert [future.result() for future in futures] == list(range(count))
        return {"calls": count, "seconds": time.perf_counter() - began}


def measure_plain(folder: str, count: int) -> dict[str, Any]:
    """In a fresh process: the same, by a bsub for each call."""
    place = Path(folder)
    place.mkdir()
    (place / "job.py").write_text(_JOB)
    began = time.perf_counter()
    ids = [_submit(place, index) for index in range(count)]
    while not _have_ended(ids):
        time.sleep(POLL_S)  # between two questions
    assert [pickle.loads((place / f"{index}.out").read_bytes()) for index in range(count)] == list(
        range(count)
    )
    return {"calls": count, "seconds": time.perf_counter() - began}


def _submit(place: Path, index: int) -> str:
    (place / f"{index}.in").write_bytes(pickle.dumps((nothing, index)))
    script = f"exec {sys.executable} {place}/job.py {place}/{index}.in {place}/{index}.out\n"
    said = subprocess.run(
        ["bsub", "-o", "/dev/null"], input=script, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return said.partition("<")[2].partition(">")[0]


def _have_ended(ids: list[str]) -> bool:
    rows = subprocess.run(
        ["bjobs", "-w", *ids], capture_output=True, text=True, timeout=60, check=False
    ).stdout.splitlines()[1:]
    states = [row.split()[2] for row in rows if row.strip()]
    return len(states) == len(ids) and all(state in ("DONE", "EXIT") for state in states)


@contextmanager
def _found(cluster: LsfCluster) -> Iterator[None]:
    """LSF's commands find the cluster, and its jobs this module."""
    before = dict(os.environ)
    os.environ.update(cluster.env)
    os.environ["PYTHONPATH"] = str(TOP)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
