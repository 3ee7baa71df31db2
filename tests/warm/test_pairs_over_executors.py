"""The same units, cold and warm, as a workflow's, over one executor after the other.

`make chaos` has them over clusters as well: FRACTAL_RUNNER_PAIRS_OVER="slurm lsf ibm".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.warm import scripts
from tests.warm.cases import CASES
from tests.warm.pairs import Pair

pytestmark = pytest.mark.timeout(900)  # one of these tests waits for all units

BIG = {"script": "a script", "module": "a module of a package (-m)"}
SMALL = ["shadowed", "relative", "package", "unguarded", "lazy", "console", "changing", "light", "heavy"]
MB = 1 << 20


@pytest.mark.parametrize("unit", CASES)
@pytest.mark.parametrize("task", BIG, ids=BIG.values())
def test_a_unit_comes_to_the_same(pair: Pair, task: str, unit: str) -> None:
    cold, warm = pair.compared("cold", task, unit), pair.compared("warm", task, unit)

    assert warm == cold
    if (code := CASES[unit].code) is not None:
        assert cold["returncode"] == code


@pytest.mark.parametrize("task", SMALL)
def test_units_of_a_script_come_to_the_same(pair: Pair, task: str) -> None:
    for number in range(len(pair.units("cold", task))):
        assert pair.compared("warm", task, str(number)) == pair.compared("cold", task, str(number))


def test_units_end_as_they_are_meant_to(pair: Pair) -> None:
    """What is compared is what was to happen: here is what does, in words of its own."""
    seen = {unit: pair.compared("warm", "script", unit) for unit in CASES}

    for name in ("SIGKILL", "SIGSEGV", "SIGUSR1", "SIGALRM", "SIGHUP"):
        one = seen[f"signal-{name}"]
        assert (one["state"], one["signal"], one["text"]) == ("failed", name, "before\n")
        assert one["returncode"] == -signal.Signals[name]
    assert "ZeroDivisionError: division by zero" in seen["ends-exception"]["message"]
    assert seen["ends-exit-text"]["text"] == "it is ü\n"
    assert seen["last-an-open-file"]["left"] == {"left": "kept"}
    assert seen["does-output"]["output"] is not None
    assert "is not valid JSON" in seen["does-output-that-is-no-JSON"]["message"]
    assert "ended 1 process(es)" in seen["does-a-process-left-behind"]["text"]
    assert seen["does-working-directory"]["text"].startswith("PLACE/scripts ")
    assert all(one["text"] for name, one in seen.items() if name.startswith("sees-"))


def test_a_changed_script_is_seen_by_the_next_unit(pair: Pair) -> None:
    texts = [pair.compared("warm", "changing", str(number))["text"] for number in range(scripts.CHANGES)]

    assert texts == [
        "script 0 module 0\n",
        "script 10 module 0\n",
        "script 10 module 10\n",
        "script 110 module 10\n",
        "script 110 module 110\n",
    ]


def test_units_start_as_they_were_told_to(pair: Pair) -> None:
    for mode in ("cold", "warm"):
        for task in pair.tasks:
            starts = {unit["start"] for unit in pair.units(mode, task)}
            assert starts == {mode}, pair.messages(mode, task)


def test_random_numbers_differ_between_units(pair: Pair) -> None:
    _expect_different_draws(pair, "draws")


def test_random_numbers_of_numpy_differ_between_units(pair: Pair) -> None:
    if "draws-of-numpy" not in pair.tasks:
        pytest.skip("no task environment: `make .venv-tasks/.ready` sets it up")
    _expect_different_draws(pair, "draws-of-numpy")


@pytest.mark.parametrize("mode", ["cold", "warm"])
def test_a_unit_is_charged_for_what_it_does(pair: Pair, mode: str) -> None:
    units = dict(zip(scripts.COSTS, pair.units(mode, "light"), strict=False))

    assert scripts.BURN_S <= units["burn"]["cpu_s"] < scripts.BURN_S + 0.5
    assert scripts.FILL_MB * MB <= units["fill"]["peak_bytes"] < (scripts.FILL_MB + 60) * MB
    assert units["nothing"]["cpu_s"] < scripts.BURN_S
    # The kernel keeps no figure of a small process that is not its parent's, and a short one is never seen.
    assert (units["nothing"]["peak_bytes"] or 0) < 60 * MB


def test_a_warm_unit_is_not_charged_for_the_imports(pair: Pair) -> None:
    """But for the memory that they keep: it has that, though it shares it, as a cold one has it alone."""
    cold, warm = (
        dict(zip(scripts.COSTS, pair.units(mode, "heavy"), strict=False)) for mode in ("cold", "warm")
    )

    assert cold["nothing"]["cpu_s"] >= scripts.IMPORT_CPU_S
    assert warm["nothing"]["cpu_s"] < scripts.IMPORT_CPU_S / 2
    assert scripts.BURN_S <= warm["burn"]["cpu_s"] < scripts.IMPORT_CPU_S
    assert cold["nothing"]["peak_bytes"] >= scripts.PASSING_MB * MB
    assert warm["nothing"]["peak_bytes"] < (scripts.BALLAST_MB + 60) * MB
    most = scripts.BALLAST_MB + scripts.FILL_MB
    assert most * MB <= warm["fill"]["peak_bytes"] < (most + 60) * MB


def test_nothing_is_left_of_the_servers(pair: Pair) -> None:
    left = [
        path
        for top in {"/tmp", tempfile.gettempdir()}
        for path in Path(top).glob(f"fractal-runner-{os.getuid()}-*-{pair.pid}-*")
    ]

    assert not left
    assert not pair.errors


def test_two_runs_of_one_process_do_not_end_each_other_s_servers(tmp_path: Path) -> None:
    program = tmp_path / "two.py"
    program.write_text(_TWO_RUNS)

    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]


# The units of the one run last until the other run has ended.
_TWO_RUNS = '''
import asyncio
import sys
from pathlib import Path

from fractal_runner import Dataset, Image, Task, Workflow, WorkflowTask, process_workflow

place = Path(sys.argv[1])
(place / "long.py").write_text(f"""
import os, time
open({str(place / "begun")!r}, "w").close()
deadline = time.monotonic() + 60
while not os.path.exists({str(place / "ended")!r}):
    assert time.monotonic() < deadline
    time.sleep(0.02)
""")
(place / "short.py").write_text("")


async def run(name):
    task = Task(name=name, type="parallel", command_parallel=f"{sys.executable} {place}/{name}.py")
    await process_workflow(
        workflow=Workflow(name=name, task_list=[WorkflowTask(task=task)]),
        dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=f"/z/{n}") for n in range(2)]),
        workflow_dir_local=place / "runs" / name,
        executor="thread",
        warm_start="always",
    )


async def both():
    longer = asyncio.create_task(run("long"))
    while not (place / "begun").exists():
        assert not longer.done(), longer.exception()
        await asyncio.sleep(0.02)
    await run("short")
    (place / "ended").touch()
    await longer


asyncio.run(both())
'''


def _expect_different_draws(pair: Pair, task: str) -> None:
    drawn = [unit["text"].split() for mode in ("cold", "warm") for unit in pair.units(mode, task)]
    assert len(drawn) == 2 * scripts.UNITS
    assert all(len(set(numbers)) == len(drawn) for numbers in zip(*drawn, strict=True)), drawn
