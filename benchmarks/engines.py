"""What a call costs over an engine: our executors of Dask and Ray beside the engines' own interfaces.

Each measurement has a fresh interpreter and an engine of its own, on this machine, with two slots. The engine
is there, and has done calls in both slots, before time is taken. What our executors add to a call is that it
has a process of its own, which can be ended, and that no call is sent to a worker which has another one.

The second part is a pool that is kept between runs, beside one that is made with its executor.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import _calls
from benchmarks._child import call
from benchmarks._engines import (
    CONTENDERS,
    GET_EXECUTOR,
    OUR_DASK,
    OUR_RAY,
    REMOTE,
    SLOTS,
    SUBMIT,
    DoCalls,
    Function,
)
from benchmarks._report import Report, alternate, medians, ratio, seconds, spread
from benchmarks._scratch import Scratch

REPETITIONS = 5
POOL_CALLS = 200
LIMIT = 1.5
POOL_LIMIT = 0.5

COLD, WARM = "a pool of its own", "join, a warm pool"

_PACKAGES = {"distributed": "dask", "cryptography": "dask", "ray": "ray"}  # and the extra that brings each
_WARM_UP_S = 120.0
_WARM_UP_CALLS = 20
_DEADLINE_S = 300.0  # of a measurement, which takes 30 s at most where all is well
_LOOK_S = 0.1

Figures = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Load:
    """Calls that are measured.

    Attributes:
        what: the same in words.
        function: what is called, with a number.
        count: how often.
    """

    what: str
    function: Function
    count: int


LOADS = {
    "nothing": Load("calls that do nothing", _calls.nothing, 1_000),
    "tenth": Load("calls of 0.1 s", _calls.tenth, 200),
}


def run(report: Report, scratch: Scratch) -> None:
    """Measure both loads on all of them, then warm pools beside cold ones.

    Raises:
        RuntimeError: if Dask or Ray is not installed, with what installs both.
    """
    require_engines()
    report.figures["versions"] = {name: version(name) for name in ("distributed", "ray", "cloudpickle")}
    for key, load in LOADS.items():
        _tell(report, key, load)
    _pools(report, scratch)
    report.note(
        "Dask's own: a LocalCluster of worker processes with one thread each; Ray's own: ray.init with as "
        "many CPUs. Ours: DaskExecutor with a pool of its own, which is encrypted, and RayExecutor with an "
        "instance of its own."
    )


def require_engines() -> None:
    """See that the engines are installed.

    Raises:
        RuntimeError: naming those that are not, with what installs both.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise RuntimeError(
            f"{', '.join(missing)} not installed: pip install 'fractal-runner[dask,ray]' (in a clone: "
            "pip install -e '.[dask,ray]')"
        )


def _tell(report: Report, key: str, load: Load) -> None:
    taken = alternate(
        REPETITIONS,
        {
            name: functools.partial(call, "benchmarks.engines:measure_calls", name=name, load=key)
            for name in CONTENDERS
        },
        f"engines: {load.count:,} {load.what}",
    )
    report.figures[key] = {"calls": load.count, "slots": SLOTS, **taken}
    dask_own = min((GET_EXECUTOR, SUBMIT), key=lambda name: medians(taken[name], "seconds"))
    yardsticks = {OUR_DASK: dask_own, OUR_RAY: REMOTE}
    report.table(
        f"{load.count:,} {load.what}, {SLOTS} slots",
        ["", "in all", "a call", "ratio", "ratios from … to", "to"],
        [
            [
                name,
                seconds(medians(figures, "seconds")),
                seconds(medians(figures, "seconds") / load.count),
                *_compared(taken, name, yardsticks.get(name)),
            ]
            for name, figures in taken.items()
        ],
    )
    for ours, theirs in yardsticks.items():
        report.at_most(
            f"{ours}, {load.count:,} {load.what}, ratio to {theirs}", LIMIT, ratio(taken[ours], taken[theirs])
        )


def _compared(taken: Figures, name: str, yardstick: str | None) -> list[str]:
    if yardstick is None:
        return ["", "", ""]
    ours, theirs = taken[name], taken[yardstick]
    return [f"{ratio(ours, theirs):.2f}", spread(ours, theirs), yardstick]


def measure_calls(name: str, load: str) -> dict[str, Any]:
    """In a fresh process: the calls of a load, once both slots have done some."""
    chosen = LOADS[load]
    with _deadline(), CONTENDERS[name]() as do:
        began = time.perf_counter()
        _warm_up(do, chosen.function)
        ready = time.perf_counter()
        results = do(chosen.function, range(chosen.count))
        took = time.perf_counter() - ready
    _check(results, chosen.count)
    return {"seconds": took, "warm_up_seconds": ready - began}


def _warm_up(do: DoCalls, function: Function) -> None:
    """Do calls until each slot has done some; then some of those that are measured."""
    deadline = time.monotonic() + _WARM_UP_S
    while len(places := set(do(_calls.place, range(2 * SLOTS)))) < SLOTS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {_WARM_UP_S:g} s, {len(places)} of {SLOTS} slots do calls")
    do(function, range(_WARM_UP_CALLS))


def _pools(report: Report, scratch: Scratch) -> None:
    with _warm_pool(scratch) as name:
        taken = alternate(
            REPETITIONS,
            {
                COLD: functools.partial(call, "benchmarks.engines:measure_pool", join=None),
                WARM: functools.partial(call, "benchmarks.engines:measure_pool", join=name),
            },
            f"engines: {POOL_CALLS} calls through a pool",
        )
    report.figures["pools"] = {"calls": POOL_CALLS, "workers": SLOTS, **taken}
    report.table(
        f"{POOL_CALLS} calls that do nothing, from the constructor to the last result, {SLOTS} workers",
        ["", "in all", "constructor", "first result", "ratio", "ratios from … to"],
        [
            [
                name,
                seconds(medians(figures, "seconds")),
                seconds(medians(figures, "constructor_seconds")),
                seconds(medians(figures, "first_result_seconds")),
                *(["1", ""] if name == COLD else _compared(taken, name, COLD)[:2]),
            ]
            for name, figures in taken.items()
        ],
    )
    report.note(
        "Pools: in both cases the constructor imports Dask, which is most of its time. The warm pool has its "
        "workers; for a new client each of them starts a fresh process, in which its calls run."
    )
    report.at_most(
        f"{POOL_CALLS} calls that do nothing through a warm pool, ratio to a cold one",
        POOL_LIMIT,
        ratio(taken[WARM], taken[COLD]),
    )


def measure_pool(join: str | None) -> dict[str, Any]:
    """In a fresh process: calls that do nothing, from the executor's constructor to the last result.

    Args:
        join: the name of the pool; None for one that the constructor makes.
    """
    from fractal_runner.executors.adapters.dask import DaskExecutor

    with _deadline():
        began = time.perf_counter()
        with DaskExecutor(SLOTS, join=join) as executor:
            made = time.perf_counter()
            futures = [executor.submit(_calls.nothing, number) for number in range(POOL_CALLS)]
            results = [futures[0].result()]
            first = time.perf_counter()
            results += [future.result() for future in futures[1:]]
            last = time.perf_counter()
    _check(results, POOL_CALLS)
    return {
        "seconds": last - began,
        "constructor_seconds": made - began,
        "first_result_seconds": first - began,
    }


@contextmanager
def _warm_pool(scratch: Scratch) -> Iterator[str]:
    """A pool that is kept, with all of its workers there, which children of this process can join."""
    from fractal_runner.executors.adapters.daskpool.warm import pool_status, start_pool, stop_pool

    name = f"benchmark-{os.getpid()}"
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(_made(scratch.new(scratch.disk)))  # not among the user's own pools
    try:
        record = start_pool(name, {"min_workers": SLOTS, "max_workers": SLOTS})
        try:
            deadline = time.monotonic() + _WARM_UP_S
            while (present := pool_status(record)["present"]) < SLOTS:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"after {_WARM_UP_S:g} s, the pool has {present} of {SLOTS} workers")
                time.sleep(_LOOK_S)  # another process's workers tell nobody
            yield name
        finally:
            stop_pool(name)
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


@contextmanager
def _deadline() -> Iterator[None]:
    """End this process, with what its threads were doing on stderr, if this takes far too long."""
    faulthandler.dump_traceback_later(_DEADLINE_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _check(results: list[Any], count: int) -> None:
    if results != list(range(count)):
        raise RuntimeError(f"{count} calls have come to {results!r:.200}, and not to their numbers")
