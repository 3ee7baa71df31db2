"""One coordinator at a time: a second one is kept out, and one that was replaced stops itself."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import JobExecutionError, RunBusyError, Task, WorkflowTask
from fractal_runner.history import writing
from fractal_runner.history.directory import LOCK_FILE
from fractal_runner.history.store import History
from fractal_runner.worker.processes import host_name
from fractal_runner.worker.stop import raise_fence

WAITS = """
open(args["notes"] + f"/pid{os.getpid()}", "w").close()
while not os.path.exists(args["notes"] + "/may"):
    time.sleep(0.01)
"""


@pytest.fixture
def waiting(parallel: Any, script: Any, notes: Path) -> WorkflowTask:
    """A task whose units say that they run, and wait until they may end."""
    task: WorkflowTask = parallel(script(WAITS), args_parallel={"notes": str(notes)})
    return task


def pids(notes: Path) -> list[int]:
    return [int(path.name[3:]) for path in notes.glob("pid*")]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


async def test_a_second_coordinator_is_refused_naming_the_first_ones_process_and_host(
    *, run: Any, coordinator: Any, waiting: Any, notes: Path, until: Any, tmp_path: Path
) -> None:
    first = coordinator(waiting)
    await until(lambda: pids(notes))

    with pytest.raises(RunBusyError, match=f"process {first.pid} on {host_name()} is at work") as caught:
        await run(waiting, resume=True)

    assert (caught.value.pid, caught.value.host) == (first.pid, host_name())
    assert (
        json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == first.pid
    )  # its name still stands there
    (notes / "may").touch()
    assert first.end() == ""
    assert len(pids(notes)) == 1


async def test_a_second_coordinator_in_the_same_process_is_refused_as_well(
    run: Any, waiting: Any, notes: Path, until: Any
) -> None:
    first = asyncio.ensure_future(run(waiting))
    await until(lambda: pids(notes))

    with pytest.raises(RunBusyError, match=f"process {os.getpid()} on {host_name()} is at work"):
        await run(waiting, resume=True)

    (notes / "may").touch()
    await first
    assert len(pids(notes)) == 1


async def test_a_refused_coordinator_leaves_the_first_one_the_lock(
    run: Any, waiting: Any, notes: Path, until: Any
) -> None:
    first = asyncio.ensure_future(run(waiting))
    await until(lambda: pids(notes))
    for _ in range(3):
        with pytest.raises(RunBusyError):
            await run(waiting, resume=True)
    (notes / "may").touch()
    await first


async def test_the_lock_ends_with_the_process_that_holds_it(
    run: Any, coordinator: Any, waiting: Any, notes: Path, until: Any
) -> None:
    first = coordinator(waiting)
    await until(lambda: pids(notes))
    (unit,) = pids(notes)
    first.kill()
    assert is_running(unit)  # what it started goes on, and does not hold the lock
    (notes / "may").touch()

    await run(waiting, resume=True, grace_s=0.2)

    assert not is_running(unit)


async def test_a_forked_call_that_goes_on_does_not_hold_the_lock_of_its_dead_coordinator(
    *, run: Any, coordinator: Any, notes: Path, until: Any, tmp_path: Path
) -> None:
    def work(*, zarr_url: str, notes: str) -> None:
        (Path(notes) / f"pid{os.getpid()}").touch()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (Path(notes) / "may").exists():
            time.sleep(0.01)

    task = WorkflowTask(task=Task(name="F", function_parallel=work), args_parallel={"notes": str(notes)})
    first = coordinator(task, executor=("fork", {"max_workers": 1}))
    await until(lambda: pids(notes))
    first.kill()
    (child,) = pids(notes)
    files = Path(f"/proc/{child}/fd").glob("*") if is_running(child) else ()
    locks = [link for link in files if link.is_symlink() and link.readlink().name == "run.lock"]
    (notes / "may").touch()

    await run(task, resume=True, grace_s=0.2)

    assert locks == []


async def test_the_directory_is_free_once_a_run_has_ended_however_it_has(
    run: Any, parallel: Any, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError):
        await run(parallel("false"))
    assert (
        json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    )  # the last one, as far as anybody knows

    await run(parallel("true"), resume=True)


# A coordinator that was taken for dead.


def take_over(directory: Path) -> None:
    """As a coordinator on another host does, to which this one had been silent for too long."""
    with sqlite3.connect(directory / "history.sqlite", timeout=30) as database:
        database.execute(
            "UPDATE fractal_runner_owners SET epoch = epoch + 1, host = 'elsewhere', pid = 77, writes = 0"
        )
    database.close()
    raise_fence(str(directory), 2, [])


def rows(query: Any) -> list[Any]:
    return [query(f"SELECT * FROM {{{table}}}") for table in ("runs", "tasks", "units", "image_statuses")]


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_an_owner_that_was_taken_for_dead_stops_at_its_next_write_and_writes_no_more(
    *, run: Any, waiting: Any, images: Any, notes: Path, until: Any, tmp_path: Path, query: Any, executor: str
) -> None:
    first = asyncio.ensure_future(
        run(waiting, dataset=images(6), executor=(executor, {"max_workers": 2}), grace_s=0.2)
    )
    await until(lambda: len(pids(notes)) == 2)
    await until(lambda: query("SELECT count(*) FROM {units} WHERE state = 'running'") == [2])
    state = {name: (tmp_path / "run" / name).read_bytes() for name in ("dataset.json", "filters.json")}
    take_over(tmp_path / "run")
    before = rows(query)

    with pytest.raises(JobExecutionError, match=r"Process 77 on elsewhere has taken over .*; it stops here"):
        await first

    assert rows(query) == before
    assert query("SELECT epoch, host, pid, writes FROM {owners}") == [(2, "elsewhere", 77, 0)]
    assert not (tmp_path / "run" / "shutdown").exists()  # the new owner's units are not to be stopped
    assert not any(map(is_running, pids(notes)))  # its own have met the fence
    assert {name: (tmp_path / "run" / name).read_bytes() for name in state} == state
    assert len(pids(notes)) == 2  # nothing has started meanwhile


async def test_an_owner_that_was_taken_for_dead_between_two_tasks_does_not_begin_the_next(
    *, run: Any, parallel: Any, images: Any, tmp_path: Path, query: Any
) -> None:
    begun: list[str] = []

    def first(*, zarr_url: str) -> None:
        take_over(tmp_path / "run")

    def second(*, zarr_url: str) -> None:
        begun.append(zarr_url)

    tasks = Task(name="A", function_parallel=first), Task(name="B", function_parallel=second)
    with pytest.raises(JobExecutionError, match="has taken over the run") as caught:
        await run(*tasks)

    assert begun == []
    assert caught.value.task_name == "A"
    assert query("SELECT state FROM {runs}") == ["running"]
    assert query("SELECT state FROM {tasks}") == ["running"]


async def test_a_run_that_was_removed_from_its_history_stops(run: Any, tmp_path: Path, query: Any) -> None:
    def work(*, zarr_url: str) -> None:
        for table in ("units", "tasks", "owners", "runs"):
            query(f"DELETE FROM {{{table}}}")

    with pytest.raises(JobExecutionError, match="somebody has removed it"):
        await run(Task(name="A", function_parallel=work))


async def test_an_owner_on_another_host_that_shows_signs_of_life_is_not_replaced(
    run: Any, parallel: Any, query: Any
) -> None:
    with pytest.raises(RuntimeError):
        await run(parallel("false"))
    query("UPDATE {runs} SET state = 'running'")
    query("UPDATE {owners} SET host = 'elsewhere', pid = 77, heartbeat = ?", time.time())

    with pytest.raises(RunBusyError, match="belongs to process 77 on elsewhere") as caught:
        await run(parallel("true"), resume=True)
    assert (caught.value.host, caught.value.pid) == ("elsewhere", 77)

    query("UPDATE {owners} SET heartbeat = ?", time.time() - 1000)
    await run(parallel("true"), resume=True)
    assert query("SELECT epoch, host FROM {owners}") == [(2, host_name())]


@pytest.mark.parametrize("executor", ["serial", "thread"])
async def test_signs_of_life_are_given_while_a_unit_holds_the_coordinator_up(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    monkeypatch.setattr(writing, "HEARTBEAT_S", 0.02)
    seen: list[float] = []

    def work(*, zarr_url: str) -> None:
        deadline = time.monotonic() + 30
        with History(tmp_path / "run" / "history.sqlite", read_only=True) as history:
            (found,) = history.read.runs()
            while len(set(seen)) < 5 and time.monotonic() < deadline:
                owner = history.read.owner(found.id)
                assert owner is not None
                seen.append(owner.heartbeat)

    await run(Task(name="F", function_parallel=work), executor=executor)

    assert len(set(seen)) == 5
    assert seen == sorted(seen)


async def test_signs_of_life_end_with_the_run(
    run: Any, parallel: Any, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "HEARTBEAT_S", 0.02)

    await run(parallel())

    assert not [thread for thread in threading.enumerate() if "heartbeat" in thread.name]


async def test_the_lock_says_who_has_it(run: Any, tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []

    def look(*, zarr_url: str) -> None:
        said.append(json.loads((tmp_path / "run" / "run.lock").read_text()))

    await run(Task(name="F", function_parallel=look))

    assert (said[0]["pid"], said[0]["host"]) == (os.getpid(), host_name())
