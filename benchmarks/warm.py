"""Warm start beside cold start: the demo's tasks on 96 wells, and scripts that import nothing.

Each measurement has a fresh interpreter, the run's coordinator, and a copy of its own of a plate on which
all that comes before has been done; the time is that of `process_workflow`, start and end of the fork servers
included. What both modes leave is compared: figures of runs that come to different results mean nothing,
so that a difference ends the benchmark with an error, as does a run that was warm and should not be, or
the other way round, and whatever is left of a run. The seed of Python's hashes is the same for all: Measure
Features writes text whose order depends on it, and would differ between two cold runs.

Memory is that of all processes together, each page counted once (PSS), in runs of their own: to read it
takes time from those that it is read of.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._child import Child, call
from benchmarks._processes import ROLES, Watch, marked
from benchmarks._report import Report, alternate, mb, median, medians, say, seconds, spread
from benchmarks._report import ratio as ratio_of
from benchmarks._scratch import Scratch
from benchmarks._warm_runs import COLD, WARM, WORKERS, Prepared, WarmStartError, compare, prepare

WELLS = 96
EXECUTORS = ("process", "thread")
PLATE_ROUNDS = 1
MEMORY_WELLS = 24
SCRIPT_ROUNDS = {10: 15, 100: 9, 1_000: 3}  # by the number of units
LEAK_UNITS = 10_000
LEAK_AFTER = 100  # units after which a server is as it should stay
LEAK_WINDOW = 500  # units over which what it holds is looked at

_WATCH_S = 0.5
_MEMORY_S = 0.1
_LEFT_S = 10.0  # what helpers of an ended process may take to see it
_MARK = "FRACTAL_RUNNER_BENCHMARK"
_RUNS = "benchmarks._warm_runs"

_NOTHING = "def main():\n    return None\n\n\nmain()\n"
_SMALL = """\
import json
import sys

with open(sys.argv[sys.argv.index("--args-json") + 1]) as file:
    arguments = json.load(file)
with open(sys.argv[sys.argv.index("--out-json") + 1], "w") as file:
    json.dump({"image_list_updates": [{"zarr_url": arguments["zarr_url"]}]}, file)
"""


def run(report: Report, scratch: Scratch) -> None:
    """Measure the demo's tasks, their memory, scripts, and what 10,000 units leave behind.

    Raises:
        WarmStartError: if warm and cold are not as they should be; the tables have been printed by then.
    """
    mark = f"{_MARK}={uuid.uuid4().hex}"
    before = dict(os.environ)
    os.environ[_MARK] = mark.partition("=")[2]
    os.environ["PYTHONHASHSEED"] = "0"
    bench = _Bench(report, scratch, mark)
    try:
        bench.plate()
        bench.scripts()
        bench.leaks()
    finally:
        os.environ.clear()
        os.environ.update(before)
    if bench.problems:
        report.print()
        raise WarmStartError("; ".join(bench.problems))


class _Bench:
    """The measurements, and what was found wrong with them.

    Attributes:
        problems: why the figures mean nothing; none, if all is well.
    """

    def __init__(self, report: Report, scratch: Scratch, mark: str) -> None:
        self.problems: list[str] = []
        self._report = report
        self._scratch = scratch
        self._mark = mark
        self._directories: set[Path] = set()  # of fork servers that were seen
        report.uses(scratch.memory or scratch.disk)

    def plate(self) -> None:
        """The demo's tasks: first their memory, which fills the caches of files as well, then their time."""
        self._memory(self._prepared(MEMORY_WELLS))
        prepared = self._prepared(WELLS)
        rows, cpu_rows = [], []
        for executor in EXECUTORS:
            copies: dict[str, list[Prepared]] = {WARM: [], COLD: []}
            taken = alternate(
                PLATE_ROUNDS,
                {
                    mode: functools.partial(self._tasks, prepared, executor, mode, copies[mode])
                    for mode in copies
                },
                f"warm: {WELLS} wells, {executor}",
            )
            self._report.figures[f"plate_{executor}"] = taken
            self._compare(executor, copies, taken)
            rows += _plate_rows(executor, taken)
            cpu_rows += _cpu_rows(executor, taken)
            self._report.at_least(
                f"{WELLS} wells, {executor}: both tasks, cold takes as many times as long",
                8,
                ratio_of(taken[COLD], taken[WARM]),
            )
        names = [task["name"] for task in taken[WARM][0]["tasks"]]
        self._report.table(
            f"{WELLS} wells over {WORKERS} workers, the run as a whole and each task; "
            f"ratio: how many times as long cold takes; medians of {PLATE_ROUNDS}",
            ["", "both tasks", "ratio", "from … to", *(word for name in names for word in (name, "ratio"))],
            rows,
        )
        self._report.table(
            "CPU of a unit",
            ["", *(word for name in names for word in (f"{name}, median", "most")), "started warm"],
            cpu_rows,
        )

    def scripts(self) -> None:
        """A script that imports nothing: what a warm start must not make slower."""
        script = self._script("nothing.py", _NOTHING)
        rows = []
        for units, rounds in SCRIPT_ROUNDS.items():
            taken = alternate(
                rounds,
                {
                    mode: functools.partial(self._run_script, script, units, mode)
                    for mode in ("always", WARM, COLD)
                },
                f"warm: {units:,} units of a script",
            )
            self._report.figures[f"script_{units}"] = taken
            for mode, figures in taken.items():
                alone = [_of_task(figure, 0) for figure in figures]
                ratios = [ratio_of(taken[COLD], figures), ratio_of(_tasks_of(taken[COLD], 0), alone)]
                rows.append(
                    [
                        f"{units:,} units, {mode}",
                        seconds(medians(figures, "seconds")),
                        f"{ratios[0]:.2f}",
                        spread(taken[COLD], figures),
                        seconds(medians(alone, "seconds")),
                        f"{ratios[1]:.2f}",
                        seconds(median([value for each in alone for value in each["cpu_s"]])),
                    ]
                )
                if mode != COLD:
                    what = f"{units:,} units without imports, {mode}: cold takes as many times as long"
                    self._report.at_least(what, 1, ratios[0])
        self._report.table(
            f"A script that imports nothing, over {WORKERS} threads; ratio: how many times as long cold "
            f"takes; medians of {' and '.join(map(str, SCRIPT_ROUNDS.values()))} rounds",
            ["", "run", "ratio", "from … to", "its task", "ratio", "CPU of a unit"],
            rows,
        )
        self._nothing_left("the runs of a script")

    def leaks(self) -> None:
        """Many units of one server: what it holds does not grow, and nothing is left of it."""
        script = self._script("small.py", _SMALL)
        say(f"warm: {LEAK_UNITS:,} units of a small script")
        figures, watch = self._watched(
            "run_script_watched",
            script=script,
            units=LEAK_UNITS,
            run_directory=str(self._scratch.fast()),
            executor="thread",
            warm_start="always",
        )
        self._report.figures["leaks"] = figures
        self._expect_mode(figures, f"{LEAK_UNITS:,} units", "always")
        looks = [look for look in figures["looks"] if look["servers"]]
        began = [look for look in looks if LEAK_AFTER <= look["done"] < LEAK_AFTER + LEAK_WINDOW]
        ended = [look for look in looks if look["done"] >= LEAK_UNITS - LEAK_WINDOW]
        if not began or not ended:
            self.problems.append(f"no fork server was seen at the start or the end of {LEAK_UNITS:,} units")
            return
        if (count := len(set(watch.servers.values()) - {None})) != 1:
            self.problems.append(f"{count} fork servers instead of one for {LEAK_UNITS:,} units")
        rows = []
        for who, of in (("server", _server_of), ("coordinator", lambda look: look["coordinator"])):
            for when, seen in ((f"after {LEAK_AFTER:,}", began), (f"after {LEAK_UNITS:,}", ended)):
                rows.append([f"{who}, {when}", *_held(list(map(of, seen)))])
        self._report.table(
            f"{LEAK_UNITS:,} units of a small script over {WORKERS} threads, "
            f"{LEAK_UNITS / figures['seconds']:,.0f} units/s; medians over {LEAK_WINDOW:,} units",
            ["", "looks", "child processes", "descriptors", "memory (RSS)", "memory (PSS)"],
            rows,
        )
        self._leak_targets(list(map(_server_of, began)), list(map(_server_of, ended)))
        left = self._nothing_left(f"{LEAK_UNITS:,} units of a script")
        self._report.at_most("processes and directories left of the server", 0, left)

    def _leak_targets(self, began: list[dict[str, int]], ended: list[dict[str, int]]) -> None:
        def grown(key: str) -> float:
            return median([look[key] for look in ended]) - median([look[key] for look in began])

        self._report.at_most("the server's child processes, more at the end", 0, grown("children"))
        # What one running unit more or less makes: a connection and the process's descriptor.
        self._report.at_most("the server's descriptors, more at the end", 2, grown("descriptors"))
        self._report.at_most("the server's memory (RSS), more at the end", 1, grown("rss") / 1e6, "MB")

    def _memory(self, prepared: Prepared) -> None:
        rows = []
        for executor in EXECUTORS:
            peaks = {}
            for mode in (WARM, COLD):
                say(f"warm: memory of {MEMORY_WELLS} wells, {executor}, {mode}")
                copy = prepared.copy(self._scratch.fast())
                figures, watch = self._watched(
                    "run_tasks",
                    memory=True,
                    folder=str(copy.folder),
                    types=copy.types,
                    run_directory=str(self._scratch.fast()),
                    executor=executor,
                    warm_start=mode,
                )
                peaks[mode] = watch.peak
                self._report.figures[f"memory_{executor}_{mode}"] = {
                    "peak_bytes": watch.peak,
                    "at_peak": watch.at_peak,
                    "most_of": dict(watch.most_of),
                    "looks": watch.looks,
                }
                self._expect_mode(figures, executor, mode)
                self._expect_servers(watch, executor, mode)
                at_peak = [mb(watch.at_peak.get(role, 0)) for role in ROLES]
                rows.append([f"{executor}, {_shown(mode)}", mb(watch.peak), *at_peak, f"{watch.looks:,}"])
            rows[-1].append(f"{peaks[COLD] / peaks[WARM]:.2f}")
            rows[-2].append("1")
        self._report.table(
            f"Peak memory (PSS) of {MEMORY_WELLS} wells over {WORKERS} workers, "
            f"read every {_MEMORY_S * 1000:.0f} ms in runs that are not timed",
            ["", "all processes", *(f"{role} then" for role in ROLES), "looks", "ratio"],
            rows,
        )
        self._nothing_left(f"{MEMORY_WELLS} wells")

    def _prepared(self, wells: int) -> Prepared:
        say(f"warm: preparing {wells} wells")
        return prepare(self._scratch.fast(), self._scratch.fast(), wells)

    def _tasks(self, prepared: Prepared, executor: str, mode: str, copies: list[Prepared]) -> dict[str, Any]:
        copy = prepared.copy(self._scratch.fast())
        copies.append(copy)
        figures, watch = self._watched(
            "run_tasks",
            folder=str(copy.folder),
            types=copy.types,
            run_directory=str(self._scratch.fast()),
            executor=executor,
            warm_start=mode,
        )
        self._expect_mode(figures, executor, mode)
        self._expect_servers(watch, executor, mode)
        return figures

    def _compare(
        self, executor: str, copies: dict[str, list[Prepared]], taken: dict[str, list[dict[str, Any]]]
    ) -> None:
        say(f"warm: comparing what {executor} left, warm and cold")
        for warm, cold, ours, theirs in zip(
            copies[WARM], copies[COLD], taken[WARM], taken[COLD], strict=True
        ):
            found = compare(warm, cold)
            different = found["differences"]
            if ours["dataset"] != theirs["dataset"]:
                different.append("The datasets are not the same.")
            if different:
                more = f" and {len(different) - 5} more" if len(different) > 5 else ""
                self.problems.append(f"{executor}: warm and cold differ: {' '.join(different[:5])}{more}")
        self._report.figures[f"compared_{executor}"] = found
        self._report.note(
            f"{executor}: {found['images']} label images with {found['labels']:,} labels, and tables of "
            f"{found['rows']:,} rows and {found['features']} features, compared warm and cold to the bit, "
            f"{len(copies[WARM])} times."
        )
        self._nothing_left(f"{WELLS} wells, {executor}")

    def _run_script(self, script: str, units: int, mode: str) -> dict[str, Any]:
        figures = call(
            f"{_RUNS}:run_script",
            script=script,
            units=units,
            run_directory=str(self._scratch.fast()),
            executor="thread",
            warm_start=mode,
        )
        self._expect_mode(figures, "a script", mode)
        return figures

    def _script(self, name: str, text: str) -> str:
        folder = self._scratch.fast()
        folder.mkdir()
        (folder / name).write_text(text)
        return str(folder / name)

    def _watched(self, function: str, *, memory: bool = False, **arguments: Any) -> tuple[Any, Watch]:
        """What a function of a run returns, and what was seen of its processes."""
        child = Child(f"{_RUNS}:{function}", **arguments)
        try:
            line = child.wait_for_line()
            if not line.strip().isdigit():
                raise RuntimeError(f"{function} ended before it began: {line or child.result()!r}")
            with Watch(int(line), _MEMORY_S if memory else _WATCH_S, memory) as watch:
                figures = child.result()
        except BaseException:  # a Ctrl-C, too, must leave no run behind
            child.kill()
            raise
        found = [path for path in watch.servers.values() if path is not None]
        # That of a server, and the one that the servers of a run have in common.
        self._directories.update(*({path, path.parent} - {Path(tempfile.gettempdir())} for path in found))
        return figures, watch

    def _expect_mode(self, figures: dict[str, Any], what: str, mode: str) -> None:
        """That all units started as they were to, by what the run says of them."""
        for task in figures["tasks"]:
            wanted = 0 if mode == COLD else task["units"]
            if task["warm"] != wanted or not task["units"]:
                self.problems.append(
                    f"{what}, {mode}: {task['warm']} of {task['units']} units of {task['name']} started warm"
                )

    def _expect_servers(self, watch: Watch, what: str, mode: str) -> None:
        """The same, by the processes that were seen."""
        if (mode == COLD) == bool(watch.servers):
            seen = f"{len(watch.servers)} fork server(s)" if watch.servers else "no fork server"
            self.problems.append(f"{what}, {mode}: {seen} in {watch.looks} looks at it")

    def _nothing_left(self, what: str) -> int:
        """How many processes and servers' directories are left, once they had time to go."""
        deadline = time.monotonic() + _LEFT_S
        while True:
            left = [f"{pid} {words}" for pid, words in marked(self._mark).items()]
            left += [str(path) for path in self._directories if path.exists()]
            if not left or time.monotonic() >= deadline:
                break
            time.sleep(0.1)  # between two looks, up to the deadline
        if left:
            self.problems.append(f"left of {what}: {', '.join(left)}")
        return len(left)


def _plate_rows(executor: str, taken: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for mode, figures in taken.items():
        row = [f"{executor}, {_shown(mode)}", seconds(medians(figures, "seconds"))]
        row += _ratio_words(taken, mode, lambda each: each, with_spread=True)
        for place in range(len(figures[0]["tasks"])):
            row.append(seconds(medians(_tasks_of(figures, place), "seconds")))
            row += _ratio_words(taken, mode, functools.partial(_tasks_of, place=place))
        rows.append(row)
    return rows


def _ratio_words(
    taken: dict[str, list[dict[str, Any]]],
    mode: str,
    part: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    *,
    with_spread: bool = False,
) -> list[str]:
    """How many times as long cold takes, in the row of cold."""
    if mode != COLD:
        return ["1", ""] if with_spread else ["1"]
    cold, warm = part(taken[COLD]), part(taken[WARM])
    return [f"{ratio_of(cold, warm):.2f}", *([spread(cold, warm)] if with_spread else [])]


def _cpu_rows(executor: str, taken: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for mode, figures in taken.items():
        row = [f"{executor}, {_shown(mode)}"]
        for place in range(len(figures[0]["tasks"])):
            cpu = [value for task in _tasks_of(figures, place) for value in task["cpu_s"]]
            row += [seconds(median(cpu)), seconds(max(cpu))]
        rows.append([*row, _started_warm(figures)])
    return rows


def _started_warm(figures: Sequence[dict[str, Any]]) -> str:
    tasks = [task for figure in figures for task in figure["tasks"]]
    return f"{sum(task['warm'] for task in tasks):,} of {sum(task['units'] for task in tasks):,}"


def _tasks_of(figures: Sequence[dict[str, Any]], place: int) -> list[dict[str, Any]]:
    return [_of_task(figure, place) for figure in figures]


def _of_task(figure: dict[str, Any], place: int) -> dict[str, Any]:
    task: dict[str, Any] = figure["tasks"][place]
    return task


def _server_of(look: dict[str, Any]) -> dict[str, int]:
    held: dict[str, int] = next(iter(look["servers"].values()))
    return held


def _held(seen: list[dict[str, int]]) -> list[str]:
    return [
        f"{len(seen)}",
        f"{median([look['children'] for look in seen]):g}",
        f"{median([look['descriptors'] for look in seen]):g}",
        f"{median([look['rss'] for look in seen]) / 1e6:.2f} MB",
        f"{median([look['pss'] for look in seen]) / 1e6:.2f} MB",
    ]


def _shown(mode: str) -> str:
    return "cold" if mode == COLD else "warm"
