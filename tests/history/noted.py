"""A small run whose units note each time they are executed, so that what was done twice shows.

`python noted.py PLACE` starts or resumes the run in PLACE/run in a process of its own, to be killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from fractal_runner import Dataset, History, Image, Task, Workflow, WorkflowTask, process_workflow
from fractal_runner.history.schema import State
from fractal_runner.worker.aftermath import read_traces
from fractal_runner.worker.command import EVIDENCE_DIR
from fractal_runner.worker.processes import MARK_VARIABLE
from fractal_runner.workflow.units import unit_of_key

DEADLINE_S = 60.0
TASKS = ("first", "second")
# A unit: notes that it is executed, waits while it is held, and adds its task's name to its image's types.
# A shell starts ten times as fast as an interpreter.
_UNIT = r"""
set -eu
task=$1 place=$2 args=$4 out=$6
read -r line <"$args" || true
url=${line#*\"zarr_url\":}; url=${url#*\"}; url=${url%%\"*}
unit="$task ${url##*/}"
echo "$unit" >>"$place/started"
turns=0
while [ -e "$place/hold $unit" ] && [ $turns -lt 3000 ]; do sleep 0.02; turns=$((turns + 1)); done
echo "{\"image_list_updates\": [{\"zarr_url\": \"$url\", \"types\": {\"$task\": true}}]}" >"$out"
echo "$unit" >>"$place/ended"
"""


class NotedRun:
    """Two parallel tasks over some images, in `place`/run.

    Args:
        place: a directory for it and its notes.
        units: how many units each task has.
        directory: the run's directory, if it is to be elsewhere.
    """

    def __init__(self, place: Path, units: int = 12, directory: Path | None = None) -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / "unit.sh").write_text(_UNIT)
        (place / "units").write_text(str(units))
        self.place = place
        self.units = units
        self.directory = directory or place / "run"
        self.events: list[Any] = []

    @property
    def workflow(self) -> Workflow:
        """Its tasks, the first of which gives its images the type "first", and so on."""
        return Workflow(
            name="noted",
            task_list=[
                WorkflowTask(
                    task=Task(
                        name=name,
                        command_parallel=shlex.join(
                            ["/bin/sh", str(self.place / "unit.sh"), name, str(self.place)]
                        ),
                        output_types={name: True},
                    )
                )
                for name in TASKS
            ],
        )

    async def go(self, *, on_event: Callable[[Any], None] | None = None, **more: Any) -> Dataset:
        """Start the run, or resume it."""

        def listen(event: Any) -> None:
            self.events.append(event)
            if on_event is not None:
                on_event(event)

        more.setdefault("executor", ("thread", {"max_workers": 2}))
        return await process_workflow(
            workflow=self.workflow,
            dataset=Dataset(
                name="d", zarr_dir="/z", images=[Image(zarr_url=f"/z/{n}") for n in range(self.units)]
            ),
            workflow_dir_local=self.directory,
            on_event=listen,
            grace_s=0.2,
            **more,
        )

    def hold(self, task: str, number: int) -> Path:
        """Have a unit wait until the file that is returned is removed."""
        path = self.place / f"hold {task} {number}"
        path.touch()
        return path

    def started(self) -> Counter[tuple[str, int]]:
        """How many times each unit was executed: by task and number."""
        return self._noted("started")

    def ended(self) -> Counter[tuple[str, int]]:
        """How many times each unit came to its end."""
        return self._noted("ended")

    def _noted(self, name: str) -> Counter[tuple[str, int]]:
        path = self.place / name
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter((task, int(number)) for task, number in map(str.split, lines))

    @property
    def run_id(self) -> str:
        return json.loads((self.directory / "run.json").read_text())["run_id"]

    def evidenced(self) -> set[tuple[str, int]]:
        """The units that their workers, in their own records, say have succeeded."""
        prefix = f"{self.run_id}/"
        return {
            (TASKS[int(key.split("/")[1])], unit_of_key(key)[1])
            for key, trace in read_traces(str(self.directory / EVIDENCE_DIR), prefix).items()
            if trace.result is not None and trace.result.succeeded
        }

    def recorded(self, history: str | os.PathLike[str] | None = None) -> set[tuple[str, int]]:
        """The units that the history says are done."""
        with History(history or self.directory / "history.sqlite", read_only=True) as opened:
            rows = list(opened.read.units(self.run_id, states=[State.DONE], last_only=False))
        found = [(TASKS[row.position], row.number) for row in rows]
        assert len(found) == len(set(found)), "a unit is recorded as done twice"
        return set(found)

    async def finish(
        self, known: set[tuple[str, int]], history: str | os.PathLike[str] | None = None, **more: Any
    ) -> None:
        """Resume it; it ends as an undisturbed run does, and no unit of `known` is executed again."""
        before = self.started()
        self.check(await self.go(resume=True, history=history, **more), history)
        again = {unit for unit in known if self.started()[unit] != before[unit]}
        assert not again, f"these had succeeded, and were executed again: {sorted(again)}"

    def check(self, dataset: Dataset, history: str | os.PathLike[str] | None = None) -> None:
        """That the run has ended as it should."""
        types = dict.fromkeys(TASKS, True)
        assert dataset.images == [Image(zarr_url=f"/z/{n}", types=types) for n in range(self.units)]
        every = {(task, n) for task in TASKS for n in range(self.units)}
        assert set(self.ended()) == every
        assert self.recorded(history) == every
        with History(history or self.directory / "history.sqlite", read_only=True) as opened:
            assert opened.read.outline(self.run_id).state == State.DONE
            assert [task.state for task in opened.read.tasks(self.run_id)] == [State.DONE, State.DONE]
            counts = opened.read.counts(self.run_id)
        assert counts == {(0, "par"): {State.DONE: self.units}, (1, "par"): {State.DONE: self.units}}
        self.expect_nothing_left()

    def expect_nothing_left(self) -> None:
        """That neither units nor threads of the run are there any more."""
        left = [process.pid for process in psutil.process_iter() if self._is_unit(process)]
        assert not left, f"units still run: {left}"
        for thread in threading.enumerate():
            if thread.name.startswith("run"):
                thread.join(10)  # the last thing that it does is to say that it has ended
                assert not thread.is_alive(), f"a thread of the run is left: {thread.name}"

    def _is_unit(self, process: psutil.Process) -> bool:
        try:
            command = process.cmdline()
            return str(self.place / "unit.sh") in command and MARK_VARIABLE in process.environ()
        except psutil.Error:
            return False

    def start_and_kill(self, task: str, number: int) -> None:
        """Start it in a process of its own, and kill that while this unit is held; it is let go then."""
        held = self.hold(task, number)
        with (self.place / "errors").open("ab") as errors:
            process = subprocess.Popen([sys.executable, __file__, str(self.place)], stderr=errors)
        deadline = time.monotonic() + DEADLINE_S
        while (task, number) not in self.started() or len(self.recorded_so_far()) < number:
            assert process.poll() is None, (self.place / "errors").read_text()
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
        held.unlink()

    def recorded_so_far(self) -> set[tuple[str, int]]:
        """What is recorded of a run that may just have begun."""
        return self.recorded() if (self.directory / "run.json").exists() else set()


def sql(path: str | os.PathLike[str], text: str, *values: Any) -> list[Any]:
    """Do this in a SQLite file, past all that knows better."""
    with closing(sqlite3.connect(path)) as database, database:
        return database.execute(text, values).fetchall()


async def until(condition: Callable[[], bool], seconds: float = DEADLINE_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    asyncio.run(NotedRun(place, int((place / "units").read_text())).go(resume=True))
