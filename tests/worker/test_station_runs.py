"""Runs whose units start warm, over executors that know nothing of it: one server each, none left after."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    ForkExecutor,
    Image,
    ProcessExecutor,
    Task,
    TaskExecutionError,
    ThreadExecutor,
    Workflow,
    WorkflowTask,
    process_workflow,
)
from fractal_runner.worker import processes
from tests.worker.pairs import Bench, until
from tests.worker.site import Site

COUNT = 8

MAKE: dict[str, Callable[[], Executor]] = {
    "thread": lambda: ThreadExecutor(4),
    "process": lambda: ProcessExecutor(max_workers=2),
    "fork": lambda: ForkExecutor(max_workers=2),
    "stdlib's threads": lambda: ThreadPoolExecutor(4),
    "stdlib's processes": lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
    "stdlib's forks": lambda: ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")),
}


@pytest.fixture
def site(bench: Bench, spec: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(bench, spec, monkeypatch) as site:
        yield site


def arguments(words: list[str], directory: Path, tasks: int = 1, count: int = COUNT) -> dict[str, Any]:
    """Those of a run of parallel tasks that run this command."""
    task = Task(name="T", type="parallel", command_parallel=" ".join(words))
    images = [Image(zarr_url=f"/z/{number}") for number in range(count)]
    return {
        "workflow": Workflow(name="w", task_list=[WorkflowTask(task=task) for _ in range(tasks)]),
        "dataset": Dataset(name="d", zarr_dir="/z", images=images),
        "workflow_dir_local": directory,
        "grace_s": 1.0,
    }


def parents(directory: Path) -> Counter[str]:
    """Which processes were the parents of how many units, as these say in their logs."""
    return Counter(log.read_text().strip() for log in directory.rglob("*-log.txt"))


TELLING = "import os\nprint(os.getppid())"


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
async def test_a_run_has_one_server_and_none_is_left(
    site: Site, tmp_path: Path, make: Callable[[], Executor]
) -> None:
    words = site.quick(more=TELLING)
    script = Path(words[1])
    script.write_text(script.read_text().replace("print('quick')", ""))
    with make() as executor:
        for number in range(2):
            directory = tmp_path / f"run{number}"
            await process_workflow(**arguments(words, directory), executor=executor)

            [(_, count)] = parents(directory).items()
            assert count == COUNT
            assert site.left() == []
            assert site.files() == []
    assert len(set(site.imports)) == 2


async def test_each_task_has_its_own_which_ends_with_it(site: Site, tmp_path: Path) -> None:
    words = site.quick(more=TELLING)
    script = Path(words[1])
    script.write_text(script.read_text().replace("print('quick')", ""))

    await process_workflow(**arguments(words, tmp_path / "run", tasks=3), executor="thread")

    assert sorted(parents(tmp_path / "run").values()) == [COUNT] * 3
    assert (site.left(), site.files()) == ([], [])


async def test_a_run_that_ends_leaves_those_of_another_one_alone(site: Site, tmp_path: Path) -> None:
    slow, quick = site.waiting(), site.quick()
    first = asyncio.ensure_future(process_workflow(**arguments(slow, tmp_path / "first"), executor="thread"))
    await asyncio.to_thread(until, lambda: list(site.bench.folder.glob("up-*")))

    await process_workflow(**arguments(quick, tmp_path / "second", tasks=2), executor="thread")

    site.go()
    await first
    assert (site.left(), site.files()) == ([], [])
    assert len(site.imports) == 3


async def test_a_run_that_fails_leaves_none(site: Site, tmp_path: Path) -> None:
    words = site.quick(more="import sys\nif __name__ == '__main__':\n    sys.exit(3)")

    with pytest.raises(TaskExecutionError):
        await process_workflow(**arguments(words, tmp_path / "run"), executor="process")

    assert (site.left(), site.files()) == ([], [])


@pytest.mark.parametrize("executor", ["thread", "process", "fork"])
@pytest.mark.parametrize("when", ["while units run", "while a server is started"])
async def test_a_run_that_is_cancelled_leaves_none(
    site: Site, tmp_path: Path, executor: str, when: str
) -> None:
    words = site.waiting()
    if when == "while a server is started":
        site.slow(600)
    call = asyncio.ensure_future(
        process_workflow(**arguments(words, tmp_path / "run"), executor=executor, warm_start_timeout=900)
    )
    begun = "imports" if when == "while a server is started" else "up-*"
    await asyncio.to_thread(until, lambda: list(site.bench.folder.glob(begun)))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    until(lambda: site.left() == [])
    assert site.files() == []


_COORDINATOR = """
import asyncio, pickle, sys
from fractal_runner import process_workflow
if __name__ == "__main__":
    asyncio.run(process_workflow(**pickle.load(open(sys.argv[1], "rb"))))
"""


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_a_coordinator_that_is_killed_leaves_no_server(site: Site, tmp_path: Path, executor: str) -> None:
    words = site.waiting()
    given = {**arguments(words, tmp_path / "run"), "executor": executor}
    (tmp_path / "given").write_bytes(pickle.dumps(given))
    (tmp_path / "coordinator.py").write_text(_COORDINATOR)
    with subprocess.Popen([sys.executable, tmp_path / "coordinator.py", tmp_path / "given"]) as process:
        until(lambda: len(list(site.bench.folder.glob("up-*"))) >= 2)
        [server] = site.imports
        units = set(processes.descendants(server))
        process.kill()
    until(lambda: not processes.is_running(server))
    assert set(site.left()) <= units
    for unit in units:  # ended by whoever resumes the run
        if processes.is_running(unit):
            os.killpg(unit, signal.SIGKILL)
    until(lambda: site.left() == [])

    site.go()
    asyncio.run(process_workflow(**given, resume=True))

    assert (site.left(), site.files()) == ([], [])
