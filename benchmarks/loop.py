"""How late the caller's event loop is while 10,000 units are in flight.

A ticker wants to run every 10 ms on the loop on which `process_workflow` is awaited. Beside it, in
another process and at the same time, the same ticker runs on an otherwise idle loop: both suffer the
same load of the same machine, and what the run itself adds is the difference.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks._child import Child
from benchmarks._report import Report, median, say, seconds
from benchmarks._scratch import Scratch
from benchmarks.overhead import dataset_of, nothing, true_command, workflow_of
from fractal_runner import Event, process_workflow

PERIOD_S = 0.01
WINDOW = 10_000
THREADS = 2
REPETITIONS = 3
PERCENTILES = {"median": 50.0, "99th": 99.0, "99.9th": 99.9, "max": 100.0}

# name -> (what it is, units, units in flight)
CASES = {
    "waiting": ("functions that wait 1 ms", 30_000, WINDOW),
    "nothing": ("functions that do nothing", 50_000, WINDOW),
    "command": (f"commands, {true_command()}", 2_000, 2_000),
}


def run(report: Report, scratch: Scratch) -> None:
    """Measure each case, and an idle loop on a machine without our load."""
    report.uses(scratch.memory or scratch.disk)
    rows = []
    for case, (what, units, window) in CASES.items():
        pairs = []
        for repetition in range(REPETITIONS):
            pairs.append(_pair(case, units, window, str(scratch.fast())))
            busy, idle = pairs[-1]["busy"]["99.9th"], pairs[-1]["idle"]["99.9th"]
            say(
                f"loop: {units:,} {what}, {repetition + 1}/{REPETITIONS}: 99.9th percentile "
                f"{seconds(busy)}, idle loop {seconds(idle)}"
            )
        report.figures[case] = {"units": units, "window": window, "repetitions": pairs}
        flight = median([pair["in_flight"] for pair in pairs])
        for side, name in (("busy", f"{units:,} {what}"), ("idle", "  idle loop beside it")):
            cells = [seconds(median([pair[side][key] for pair in pairs])) for key in PERCENTILES]
            rows.append([name, f"{flight:,.0f}" if side == "busy" else "", *cells])
        added = median([pair["busy"]["99.9th"] - pair["idle"]["99.9th"] for pair in pairs])
        report.at_most(f"99.9th percentile beyond the idle loop's, {what}", 50, added * 1000, "ms")
    report.table(
        f"Lateness of a {PERIOD_S * 1000:g} ms ticker",
        ["loop", "most in flight", *PERCENTILES],
        rows,
    )
    report.note(
        "Functions that do nothing end as fast as they are submitted: few are ever in flight. They are the "
        "case of the busiest interpreter, not of the longest queue."
    )
    report.note("Each figure is the median over the repetitions of that percentile.")
    report.note(
        "A tick that could not run is late until it has: one stall of 100 ms counts as ten late ticks."
    )


def _pair(case: str, units: int, window: int, directory: str) -> dict[str, Any]:
    """One run with its ticker, and the ticker on an idle loop for just as long."""
    idle = Child("benchmarks.loop:idle_loop")
    busy = None
    try:
        idle.wait_for_line()
        busy = Child("benchmarks.loop:busy_loop", case=case, units=units, window=window, directory=directory)
        ran = busy.result()
        idled = idle.result()
    except BaseException:
        idle.kill()
        if busy is not None:
            busy.kill()
        raise
    # CLOCK_MONOTONIC is one for the whole machine.
    beside = [late for due, late in idled["ticks"] if ran["began"] <= due <= ran["ended"]]
    own = [late for _, late in ran["ticks"]]
    return {
        "seconds": ran["ended"] - ran["began"],
        "in_flight": ran["in_flight"],
        "events": ran["events"],
        "ticks": len(own),
        "idle_ticks": len(beside),
        "busy": _percentiles(own),
        "idle": _percentiles(beside),
        "busy_lateness_s": [round(late, 6) for late in own],
        "idle_lateness_s": [round(late, 6) for late in beside],
    }


def wait_1_ms(zarr_url: str) -> None:
    """The function of a unit that takes a little while without using the processor."""
    time.sleep(0.001)


def busy_loop(case: str, units: int, window: int, directory: str) -> dict[str, Any]:
    """In a fresh process: a run and a ticker on one loop."""
    task = {
        "waiting": {"function_parallel": wait_1_ms},
        "nothing": {"function_parallel": nothing},
        "command": {"command_parallel": true_command()},
    }[case]
    workflow, dataset = workflow_of(**task), dataset_of(units)
    events = 0

    def on_event(event: Event) -> None:
        nonlocal events
        events += 1

    async def measured() -> dict[str, Any]:
        with _CountingPool(THREADS) as pool:
            call = process_workflow(
                workflow=workflow,
                dataset=dataset,
                workflow_dir_local=directory,
                executor=pool,
                max_in_flight=window,
                on_event=on_event,
            )
            began = time.monotonic()
            ticks = await _tick_beside(call)
            return {
                "began": began,
                "ended": time.monotonic(),
                "ticks": ticks,
                "events": events,
                "in_flight": pool.most,
            }

    return asyncio.run(measured())


def idle_loop() -> dict[str, Any]:
    """In a fresh process: the ticker on a loop that has nothing else to do, until stdin ends."""
    print("ready", flush=True)

    async def measured() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(sys.stdin.fileno(), ended.set)
        return {"ticks": await _tick_beside(ended.wait())}

    return asyncio.run(measured())


async def _tick_beside(work: Awaitable[object]) -> list[tuple[float, float]]:
    """Tick until `work` is done: when each tick was due, and how late it was, in seconds."""
    task = asyncio.ensure_future(work)
    ticks = []
    due = time.monotonic()
    while not task.done():
        due += PERIOD_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        ticks.append((due, time.monotonic() - due))
    await task
    return ticks


class _CountingPool(ThreadPoolExecutor):
    """A pool that remembers how many calls waited in its queue at most."""

    most = 0

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        future = super().submit(*args, **kwargs)
        self.most = max(self.most, self._work_queue.qsize())
        return future


def _percentiles(lateness: list[float]) -> dict[str, float]:
    """The nearest-rank percentiles."""
    ranked = sorted(lateness)
    return {
        name: ranked[max(0, -(-len(ranked) * int(percent * 10) // 1000) - 1)]
        for name, percent in PERCENTILES.items()
    }
