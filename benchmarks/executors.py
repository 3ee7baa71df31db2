"""What a call costs: our executors beside the standard library's, loky, labtech and daglite.

The calls do nothing, so that all of the time is the executors' own. Each measurement has a fresh
interpreter: what a fork costs, and how fast threads take turns, depends on what else is in a process.
"""

from __future__ import annotations

import functools
import heapq
import importlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import loky

from benchmarks._child import call
from benchmarks._report import Report, alternate, medians, ratio, seconds, spread
from benchmarks._scratch import Scratch
from fractal_runner.executors.local.executors import (
    ForkExecutor,
    ProcessExecutor,
    SerialExecutor,
    SpawnExecutor,
    ThreadExecutor,
)

WORKERS = 2
CALLS = 10_000
LABTECH_CALLS = 2_000
FORKED_CALLS = 500
SPAWNED_CALLS = 40
MAPPED_CALLS = 100_000
CHUNKSIZE = 100
REPETITIONS = 5
LONG_REPETITIONS = 3
DURATIONS = (1.0, 0.1) * 6

Figures = dict[str, list[dict[str, Any]]]

STD_THREADS, STD_FORK_POOL = "stdlib threads", "stdlib fork pool"
STD_SPAWN_PER_CALL = "stdlib, a spawn per call"
LABTECH_FORK, LABTECH_SPAWN = "labtech 'fork' (pool)", "labtech 'spawn' (pool)"
LABTECH_FORK_PER_TASK = "labtech 'fork-per-task'"

POOLS: dict[str, Callable[[], Executor]] = {
    "SerialExecutor": lambda: SerialExecutor(WORKERS),
    "ThreadExecutor": lambda: ThreadExecutor(WORKERS),
    "ProcessExecutor": lambda: ProcessExecutor(WORKERS),
    "ForkExecutor": lambda: ForkExecutor(WORKERS),
    "SpawnExecutor": lambda: SpawnExecutor(WORKERS),
    STD_THREADS: lambda: ThreadPoolExecutor(WORKERS),
    STD_FORK_POOL: lambda: ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")),
    STD_SPAWN_PER_CALL: lambda: ProcessPoolExecutor(
        WORKERS, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ),
    "loky": lambda: loky.ProcessPoolExecutor(WORKERS),
}

# Module and its own word for the backend. They have no pool that could be started beforehand.
FRAMEWORKS = {
    "daglite 'threading'": ("benchmarks._daglite", "threading"),
    "daglite 'processes'": ("benchmarks._daglite", "processes"),
    "labtech 'serial'": ("benchmarks._labtech", "serial"),
    "labtech 'thread'": ("benchmarks._labtech", "thread"),
    LABTECH_FORK: ("benchmarks._labtech", "fork"),
    LABTECH_SPAWN: ("benchmarks._labtech", "spawn"),
    LABTECH_FORK_PER_TASK: ("benchmarks._labtech", "fork-per-task"),
}


def run(report: Report, scratch: Scratch) -> None:
    """Measure single calls, calls in chunks, and calls of different lengths."""
    report.figures["versions"] = {name: version(name) for name in ("daglite", "labtech", "loky")}
    _calls(report)
    _chunks(report)
    _schedule(report)


def nothing(number: int) -> None:
    """The function of a call."""


def _calls(report: Report) -> None:
    in_threads = _taken(
        report,
        "threads",
        CALLS,
        REPETITIONS,
        ["SerialExecutor", "ThreadExecutor", STD_THREADS, "daglite 'threading'"],
    )
    in_processes = _taken(
        report,
        "processes",
        CALLS,
        REPETITIONS,
        ["ProcessExecutor", STD_FORK_POOL, "loky", "daglite 'processes'"],
    )
    beside_labtech = [
        (
            ours,
            _taken(report, f"{ours} and labtech", LABTECH_CALLS, LONG_REPETITIONS, [ours, *theirs]),
        )
        for ours, theirs in [
            ("SerialExecutor", ["labtech 'serial'"]),
            ("ThreadExecutor", ["labtech 'thread'"]),
            ("ProcessExecutor", [LABTECH_FORK, LABTECH_SPAWN]),
        ]
    ]
    forked = _taken(
        report, "a fork per call", FORKED_CALLS, REPETITIONS, ["ForkExecutor", LABTECH_FORK_PER_TASK]
    )
    spawned = _taken(
        report, "a spawn per call", SPAWNED_CALLS, LONG_REPETITIONS, ["SpawnExecutor", STD_SPAWN_PER_CALL]
    )
    columns = ["", "calls", "a call", "ratio", "ratios from … to", "to"]
    report.table(
        f"Calls that do nothing, {WORKERS} workers",
        columns,
        [
            *_rows(in_threads, CALLS, STD_THREADS),
            *_rows(in_processes, CALLS, STD_FORK_POOL),
            *_rows(forked, FORKED_CALLS, LABTECH_FORK_PER_TASK),
            *_rows(spawned, SPAWNED_CALLS, STD_SPAWN_PER_CALL),
        ],
    )
    report.table(
        f"The same beside labtech, {WORKERS} workers",
        columns,
        [row for ours, taken in beside_labtech for row in _rows(taken, LABTECH_CALLS, ours)],
    )
    report.note("Workers were started before the measurement, except those that are started for each call.")
    report.note(
        "labtech and daglite start theirs in each run: the time of a run of as many tasks as there are "
        f"workers is taken off. labtech's time per task grows with their number: {LABTECH_CALLS:,}, which "
        "both sides had, is in its favour."
    )
    ours = "ProcessExecutor"
    report.at_most(
        "ThreadExecutor, a call", 50, medians(in_threads["ThreadExecutor"], "seconds") / CALLS * 1e6, "µs"
    )
    report.at_most(
        f"{ours}, ratio to {STD_FORK_POOL}", 3, ratio(in_processes[ours], in_processes[STD_FORK_POOL])
    )
    _, pools = beside_labtech[-1]
    for pool in (LABTECH_FORK, LABTECH_SPAWN):
        report.at_least(f"{pool}, ratio to {ours}", 5, ratio(pools[pool], pools[ours]))
    report.at_least(
        f"{LABTECH_FORK_PER_TASK}, ratio to ForkExecutor",
        2,
        ratio(forked[LABTECH_FORK_PER_TASK], forked["ForkExecutor"]),
    )


def _taken(report: Report, what: str, count: int, repetitions: int, names: Sequence[str]) -> Figures:
    measures = {
        name: functools.partial(call, "benchmarks.executors:measure_calls", name=name, count=count)
        for name in names
    }
    taken = alternate(repetitions, measures, f"executors: {count:,} calls, {what}")
    report.figures[what.replace(" ", "_")] = {"calls": count, "workers": WORKERS, **taken}
    return taken


def _rows(taken: Figures, count: int, yardstick: str) -> list[list[str]]:
    return [
        [
            name,
            f"{count:,}",
            seconds(medians(taken[name], "seconds") / count),
            "1" if name == yardstick else f"{ratio(taken[name], taken[yardstick]):.2f}",
            "" if name == yardstick else spread(taken[name], taken[yardstick]),
            "" if name == yardstick else yardstick,
        ]
        for name in taken
    ]


def measure_calls(name: str, count: int) -> dict[str, Any]:
    """In a fresh process: so many calls that do nothing."""
    if name in FRAMEWORKS:
        module, backend = FRAMEWORKS[name]
        framework = importlib.import_module(module)
        start = framework.run(backend, WORKERS, WORKERS)
        whole = framework.run(backend, count + WORKERS, WORKERS)
        return {"seconds": whole - start, "start_seconds": start}
    with POOLS[name]() as pool:
        _start(pool)
        began = time.perf_counter()
        for future in [pool.submit(nothing, number) for number in range(count)]:
            future.result()
        return {"seconds": time.perf_counter() - began}


def _start(pool: Executor) -> None:
    """See to it that there are workers: each has something to do until the other has it, too."""
    for future in [pool.submit(time.sleep, 0.3) for _ in range(WORKERS)]:
        future.result()


def _chunks(report: Report) -> None:
    names = ["ProcessExecutor", STD_FORK_POOL]
    taken = alternate(
        REPETITIONS,
        {
            name: functools.partial(call, "benchmarks.executors:measure_map", name=name, count=MAPPED_CALLS)
            for name in names
        },
        f"executors: {MAPPED_CALLS:,} calls by map(chunksize={CHUNKSIZE})",
    )
    report.figures["map"] = {"calls": MAPPED_CALLS, "chunksize": CHUNKSIZE, "workers": WORKERS, **taken}
    report.table(
        f"map(chunksize={CHUNKSIZE}), {WORKERS} workers",
        ["", "calls", "a call", "ratio", "ratios from … to", "to"],
        _rows(taken, MAPPED_CALLS, STD_FORK_POOL),
    )
    report.at_most(
        f"ProcessExecutor.map(chunksize={CHUNKSIZE}), ratio to {STD_FORK_POOL}",
        1.5,
        ratio(taken["ProcessExecutor"], taken[STD_FORK_POOL]),
    )


def measure_map(name: str, count: int) -> dict[str, Any]:
    """In a fresh process: the same by `map`, in chunks."""
    with POOLS[name]() as pool:
        _start(pool)
        began = time.perf_counter()
        for _ in pool.map(nothing, range(count), chunksize=CHUNKSIZE):
            pass
        return {"seconds": time.perf_counter() - began}


def _schedule(report: Report) -> None:
    names = ["ThreadExecutor", "ProcessExecutor", "ForkExecutor"]
    taken = alternate(
        LONG_REPETITIONS,
        {name: functools.partial(call, "benchmarks.executors:measure_schedule", name=name) for name in names},
        f"executors: {len(DURATIONS)} calls of 1 s and 0.1 s in turns",
    )
    ideal = ideal_schedule(DURATIONS, WORKERS)
    report.figures["schedule"] = {"durations": DURATIONS, "workers": WORKERS, "ideal_seconds": ideal, **taken}
    report.table(
        f"{len(DURATIONS)} calls of 1 s and 0.1 s in turns, {WORKERS} workers",
        ["", "in all", "ratio to the ideal"],
        [
            [name, seconds(medians(taken[name], "seconds")), f"{medians(taken[name], 'seconds') / ideal:.3f}"]
            for name in names
        ]
        + [["ideal: each call goes to the worker that is free first", seconds(ideal), "1"]],
    )
    for name in names:
        report.at_most(
            f"{name}, {len(DURATIONS)} calls of 1 s and 0.1 s, ratio to the ideal schedule",
            1.15,
            medians(taken[name], "seconds") / ideal,
        )


def ideal_schedule(durations: Sequence[float], workers: int) -> float:
    """Seconds until all have ended if each goes, in order and at once, to the worker that is free first."""
    free_at = [0.0] * workers
    for duration in durations:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


def measure_schedule(name: str) -> dict[str, Any]:
    """In a fresh process: calls of different lengths."""
    with POOLS[name]() as pool:
        _start(pool)
        began = time.perf_counter()
        for future in [pool.submit(time.sleep, duration) for duration in DURATIONS]:
            future.result()
        return {"seconds": time.perf_counter() - began}
