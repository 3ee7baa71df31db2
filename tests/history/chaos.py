"""A run that is killed again and again, in processes of its own; and what must hold of it afterwards.

`python chaos.py PLACE` starts or resumes the run in PLACE/run, over the executor that PLACE/plan.json names.
`python chaos.py PLACE at-each-write` does that for each write that the run makes: in a fresh directory a
child dies before it, another one resumes. Units append a line to PLACE/notes when they start and when they
end, so that overlaps and repetitions show.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractal_runner import Dataset, Task, Workflow, WorkflowTask, process_workflow

UNITS = 20  # of each of the compound and the two parallel tasks
FEW_UNITS = 3
WORKERS = 2
# A unit: notes its start, ignores SIGTERM if it is told to, works for a moment, notes its end.
_UNIT = """
import json, os, random, signal, sys, time
args = json.load(open(sys.argv[sys.argv.index("--args-json") + 1]))
out = sys.argv[sys.argv.index("--out-json") + 1]
task = sys.argv[1]
which = args.get("zarr_url") or "all"
if args.get("init_args", {}).get("part", 0) % 3 == 1 or which.endswith("7"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def note(word):
    line = f"{task} {which} {os.getpid()} {word} {time.monotonic_ns()}\\n".encode()
    fd = os.open(args["notes"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, line)
    os.close(fd)
note("start")
time.sleep(random.uniform(0, 0.04))
urls = [f"/z/{number}" for number in range(args.get("units", 0))]
value = None
if task == "convert":
    value = {"image_list_updates": [{"zarr_url": url, "attributes": {"n": n}} for n, url in enumerate(urls)]}
elif task == "init":
    value = {"parallelization_list": [
        {"zarr_url": url, "init_args": {"part": n}} for n, url in enumerate(args["zarr_urls"])
    ]}
elif task == "compute":
    update = {"zarr_url": which, "attributes": {"part": args["init_args"]["part"]}}
    value = {"image_list_updates": [update]}
elif task == "first":
    value = {"image_list_updates": [{"zarr_url": which, "types": {"first": True}}]}
if value is not None:
    with open(out, "w") as file:
        json.dump(value, file)
note("end")
"""


def workflow_in(place: Path, units: int) -> Workflow:
    """A converter, a compound task and two parallel ones."""
    script = place / "unit.py"
    if not script.exists():
        script.write_text(_UNIT)
    notes = {"notes": str(place / "notes")}

    def command(name: str) -> str:
        return shlex.join([sys.executable, "-I", "-S", str(script), name])

    return Workflow(
        name="chaos",
        task_list=[
            WorkflowTask(
                task=Task(
                    name="Convert", type="converter_non_parallel", command_non_parallel=command("convert")
                ),
                args_non_parallel={**notes, "units": units},
            ),
            WorkflowTask(
                task=Task(
                    name="Compound",
                    type="compound",
                    command_non_parallel=command("init"),
                    command_parallel=command("compute"),
                    output_types={"compound": True},
                ),
                args_non_parallel=notes,
                args_parallel=notes,
            ),
            WorkflowTask(task=Task(name="First", command_parallel=command("first")), args_parallel=notes),
            WorkflowTask(
                task=Task(name="Second", command_parallel=command("second"), output_types={"second": True}),
                args_parallel=notes,
            ),
        ],
    )


async def go_on(place: Path, **more: Any) -> Dataset:
    """Start the run, or resume it."""
    plan = json.loads((place / "plan.json").read_text())
    return await process_workflow(
        workflow=workflow_in(place, plan["units"]),
        dataset=Dataset(name="d", zarr_dir="/z"),
        workflow_dir_local=place / "run",
        executor=(plan["executor"], {"max_workers": WORKERS, **plan["options"]}),
        resume=True,
        grace_s=0.2,
        **more,
    )


class KilledRun:
    """Starts and kills a run, in processes of its own, until it has ended.

    Args:
        place: an empty directory.
        executor: the executor's name.
        seed: decides when it is killed.
        units: how many units each of its tasks has.
        options: the executor's, beside how many units run at a time.
        outlives: whether units that run go on without their coordinator, and are taken on by the next one.
        life_s: how long a coordinator lives at most before it is killed.
    """

    def __init__(
        self,
        place: Path,
        executor: str,
        seed: int = 0,
        *,
        units: int = UNITS,
        options: Mapping[str, Any] | None = None,
        outlives: bool = False,
        life_s: float = 0.8,
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        plan = {"executor": executor, "units": units, "options": dict(options or {})}
        (place / "plan.json").write_text(json.dumps(plan))
        self.place = place
        self.kills = 0
        self._outlives = outlives
        self._life_s = life_s
        self._units = units
        self._random = random.Random(seed)

    def run(self, most: int = 12) -> None:
        """Kill it up to `most` times, at random moments; then let it end."""
        while self.kills < most:
            process = self.start()
            if self._random.random() < 0.8:  # else it may not even have begun
                self._wait_until_it_works(process)
            try:
                process.wait(self._random.uniform(0, self._life_s))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                self.kills += 1
        else:
            process = self.start()
            process.wait(300)
        assert process.returncode == 0, (self.place / "errors").read_text()

    def _wait_until_it_works(self, process: subprocess.Popen[bytes]) -> None:
        lock = self.place / "run" / "run.lock"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if lock.exists() and f'"pid": {process.pid},' in lock.read_text():
                return
            time.sleep(0.005)

    def start(self) -> subprocess.Popen[bytes]:
        with (self.place / "errors").open("ab") as errors:
            return subprocess.Popen([sys.executable, __file__, str(self.place)], stderr=errors)

    def check(self) -> None:
        """Everything that must hold of a run that has ended, however often it was killed."""
        expected = [
            {
                "zarr_url": f"/z/{n}",
                "origin": None,
                "attributes": {"n": n, "part": n},
                "types": {"compound": True, "first": True, "second": True},
            }
            for n in range(self._units)
        ]
        dataset = json.loads((self.place / "run" / "dataset.json").read_text())
        assert dataset["images"] == expected
        executions = self.executions()
        assert len(executions) == 2 + 3 * self._units
        for unit, spans in executions.items():
            for (_, end), (start, _) in itertools.pairwise(spans):
                assert end <= start, f"two executions of {unit} overlap: {spans}"
        twice = sum(len(spans) - 1 for spans in executions.values())
        most = 0 if self._outlives else WORKERS * self.kills
        assert twice <= most, f"{twice} repetitions after {self.kills} kill(s)"
        with sqlite3.connect(self.place / "run" / "history.sqlite") as database:
            done = database.execute(
                "SELECT position, stage, number, count(*) FROM fractal_runner_units WHERE state = 'done' "
                "GROUP BY position, stage, number"
            ).fetchall()
            states = {row[0] for row in database.execute("SELECT state FROM fractal_runner_tasks")}
            open_units = database.execute(
                "SELECT count(*) FROM fractal_runner_units WHERE state IN ('submitted', 'running')"
            ).fetchone()
        assert {row[3] for row in done} == {1}, "a unit that was recorded as done was done again"
        assert len(done) == 2 + 3 * self._units
        assert states == {"done"}
        assert open_units == (0,)

    def executions(self) -> dict[tuple[str, str], list[tuple[int, int]]]:
        """When each unit started and ended; one that was killed, by its end at the latest."""
        started: dict[str, tuple[tuple[str, str], int]] = {}
        spans: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for line in (self.place / "notes").read_text().splitlines():
            task, which, pid, word, at = line.split()
            if word == "start":
                started[pid] = (task, which), int(at)
            else:
                unit, start = started.pop(pid)
                spans[unit].append((start, int(at)))
        for unit, start in started.values():
            spans[unit].append((start, start))  # it was killed: nothing shows that it went on
        return {unit: sorted(found) for unit, found in spans.items()}


def at_each_write(place: Path) -> int:
    """Die before each write of a run in turn, and resume; how many writes that were.

    The processes that die are forks of this one, which has imported everything and has no threads.
    """
    number = 0
    while True:
        run = KilledRun(place / f"{number:04d}", "thread", units=FEW_UNITS)
        died = _in_a_fork(run.place, number)
        if died == -signal.SIGKILL:
            run.kills = 1
            assert _in_a_fork(run.place) == 0, f"write {number}: the resume failed"
        else:
            assert died == 0, f"write {number}: {died}"
        try:
            run.check()
        except AssertionError as error:
            error.add_note(f"killed before write {number}, in {run.place}")
            raise
        if not run.kills:
            return number
        number += 1


def _in_a_fork(place: Path, dies_at: int | None = None) -> int:
    """Start or resume the run in a child; its exit code, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if dies_at is not None:
                _die_at(dies_at)
            asyncio.run(go_on(place))
            code = 0
        except BaseException:  # a fork of ours must not return into what forked it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    place = Path(sys.argv[1])
    if sys.argv[2:] == ["at-each-write"]:
        print(at_each_write(place))
    else:
        asyncio.run(go_on(place))


def _die_at(number: int) -> None:
    """Have this process killed between its writes number `number` and the next, whatever they write to."""
    from sqlalchemy import Engine, event

    from fractal_runner.worker.evidence import Ledger

    writes = 0
    coordinator = os.getpid()  # its workers may be forks of it

    def wrote(*_: object) -> None:
        nonlocal writes
        if os.getpid() != coordinator:
            return
        if writes == number:
            os.kill(coordinator, signal.SIGKILL)
            time.sleep(60)  # until the signal arrives: nothing may be written meanwhile
        writes += 1

    event.listen(Engine, "commit", wrote)
    write, replace = Ledger.write, Path.replace

    def write_or_die(self: Ledger, text: str) -> None:
        wrote()
        write(self, text)

    def replace_or_die(self: Path, target: Any) -> Path:
        wrote()
        return replace(self, target)

    Ledger.write = write_or_die  # type: ignore[method-assign]
    Path.replace = replace_or_die  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main()
