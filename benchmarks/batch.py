"""What a call costs on a batch executor whose jobs cost nothing: CPU, memory, questions to the scheduler.

Each measurement has a fresh interpreter; what jobs write is written by another process (`_simulated`). CPU is
counted by thread: the manager's and its two helpers' for what the executor does, the main thread's for what
submitting and asking for results takes whoever uses it. The scheduler's own commands are not in it, as there
are none.

Jobs write as fast as they can, which is the most that there can be to read at a time, or at the pace of real
ones, which take the same time however many calls they have: then the questions must not grow with the calls.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks._child import call, peak_memory
from benchmarks._report import Report, alternate, mb, medians, seconds
from benchmarks._scratch import Scratch
from benchmarks._simulated import SimulatedScheduler
from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.worker.spec import UnitResult, UnitSpec

COUNTS = (1_000, 10_000, 100_000)
REPETITIONS = 3
PACED_S = 30.0
WINDOW = 1_000

Measures = dict[str, dict[str, Any]]  # their names, and arguments of `measure`


def run(report: Report, scratch: Scratch) -> None:
    """Measure calls at once, calls at a pace, and calls of which few are in flight."""
    place = scratch.memory or scratch.disk
    kind = report.uses(place)

    def measured(**arguments: Any) -> dict[str, Any]:
        return call("benchmarks.batch:measure", directory=str(scratch.new(place)), **arguments)

    numbers: Measures = {f"{count:,}, a number": {"count": count} for count in COUNTS}
    units: Measures = {f"{count:,}, a unit's spec": {"count": count, "payload": "unit"} for count in COUNTS}
    most, most_units = list(numbers)[-1], list(units)[-1]
    at_once = numbers | {most_units: units.pop(most_units)}
    settings: list[tuple[str, int, Measures, dict[str, Any]]] = [
        ("Calls submitted at once, jobs as fast as they can write", REPETITIONS, at_once, {}),
        (f"Calls submitted at once, jobs of {PACED_S:.0f} s each", 1, numbers, {"paced": PACED_S}),
        (
            *(f"At most {WINDOW:,} calls in flight, jobs as fast as they can write", 1, units),
            {"window": WINDOW},
        ),
    ]
    tables = {}
    for title, repetitions, chosen, conditions in settings:
        measures = {
            name: functools.partial(measured, **arguments, **conditions) for name, arguments in chosen.items()
        }
        tables[title] = alternate(repetitions, measures, f"batch: {title[0].lower()}{title[1:]}")
        report.table(
            f"{title}, {kind}; CPU per call",
            [
                *("calls, argument", "in all", "manager", "main thread", "peak memory"),
                *("jobs", "submissions", "questions"),
            ],
            [_row(name, taken) for name, taken in tables[title].items()],
        )
    report.figures.update(file_system=kind, **tables)
    report.note(
        "manager: CPU of the manager's thread and of those that submit and ask for it, user and system; main "
        "thread: submitting, and asking for the results."
    )
    first, paced, _ = tables.values()
    for name in (most, most_units):
        report.at_most(f"{name}: manager's CPU a call", 100, _manager_us(first[name]), "µs")
        report.at_most(f"{name}: peak memory", 500, medians(first[name], "peak_bytes") / 1e6, "MB")
    report.at_most(
        f"{most}, jobs of {PACED_S:.0f} s: manager's CPU a call", 100, _manager_us(paced[most]), "µs"
    )
    rates = [medians(taken, "questions") / medians(taken, "seconds") for taken in paced.values()]
    report.at_most(
        f"questions a second about {COUNTS[-1]:,} calls, ratio to those about {COUNTS[0]:,}",
        1.5,
        rates[-1] / rates[0],
    )


def _manager_us(taken: list[dict[str, Any]]) -> float:
    return medians(taken, "manager_s") / medians(taken, "calls") * 1e6


def _row(name: str, taken: list[dict[str, Any]]) -> list[str]:
    count = taken[0]["calls"]
    return [
        name,
        seconds(medians(taken, "seconds")),
        seconds(medians(taken, "manager_s") / count),
        seconds(medians(taken, "main_s") / count),
        mb(medians(taken, "peak_bytes")),
        *(f"{medians(taken, key):,.0f}" for key in ("jobs", "submissions", "questions")),
    ]


def number(value: int) -> int:
    """The function of a call: it is never run."""
    return value


def unit(spec: UnitSpec) -> UnitResult:
    """The same, of a unit: it is never run."""
    return UnitResult(key=spec.key)


def spec_of(index: int) -> UnitSpec:
    """A unit as a workflow submits it."""
    return UnitSpec(
        key=f"0190b0c5/0/unit/{index}/0",
        command=("/opt/tasks/venv/bin/python", "/opt/tasks/cellpose_segmentation.py"),
        function=None,
        args={"zarr_url": f"/data/plate.zarr/B/03/{index}", "channel": {"label": "DAPI"}, "level": 2},
        run_id="0190b0c5",
        run_dir="/data/runs/1",
        folder="/data/runs/1/0_cellpose/000000",
        prefix=f"par-{index:07d}",
        digest="sha256:" + "5" * 64,
    )


def measure(
    count: int, directory: str, payload: str = "number", paced: float = 0.0, window: int | None = None
) -> dict[str, Any]:
    """In a fresh process: so many calls.

    Args:
        count: how many.
        directory: for the executor's files; made.
        payload: "number" or "unit": what they are given, and return.
        paced: seconds that each job takes; 0 for as little as it can.
        window: how many calls are in flight at most; None for all of them.
    """
    place = Path(directory)
    place.mkdir()
    scheduler = SimulatedScheduler(place / "ended", seconds=paced, result=payload)
    executor = BatchExecutor(scheduler, place / "folder", name="batch")

    def submit(index: int) -> Any:
        if payload == "number":
            return executor.submit(number, index)
        spec = spec_of(index)
        return executor.submit_as(f"unit {index}", spec.key, unit, spec)

    began, cpu_began, main_began = time.perf_counter(), time.process_time(), time.thread_time()
    indices = iter(range(count))
    ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    for index in islice(indices, window):
        submit(index).add_done_callback(ended.put)
    submitted = time.perf_counter()
    for _ in range(count):
        ended.get().result()
        for index in islice(indices, 1):
            submit(index).add_done_callback(ended.put)
    process_s, main_s = time.process_time() - cpu_began, time.thread_time() - main_began
    figures = {
        "calls": count,
        "seconds": time.perf_counter() - began,
        "submit_seconds": submitted - began,
        "process_s": process_s,
        "main_s": main_s,
        "manager_s": process_s - main_s,
        "threads_s": _cpu_of_threads(),
        "peak_bytes": peak_memory(),
        "jobs": scheduler.jobs,
        "submissions": scheduler.submissions,
        "questions": scheduler.questions,
    }
    executor.shutdown()
    scheduler.close()
    return figures


def _cpu_of_threads() -> dict[str, float]:
    """CPU seconds of each of this process's threads so far, by its name: where there is a /proc."""
    taken = {}
    for thread in threading.enumerate():
        try:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
        except OSError:
            continue
        taken[thread.name] = int(text.split()[0]) / 1e9
    return taken
