"""Calls that outlive their coordinator, as those of batch systems do, are taken on by the next one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Task, UnitFinished, WorkflowTask
from tests.workflow.outliving import Outliving

COUNT = 4


def work(*, zarr_url: str, notes: str, x: int = 0) -> dict[str, Any]:
    """Notes its start; waits until it may end."""
    with Path(notes, "log").open("a") as log:
        log.write(f"{zarr_url[-1]}:{x}\n")
    while not Path(notes, "may").exists() and not Path(notes, f"may{zarr_url[-1]}").exists():
        time.sleep(0.01)
    return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"by": os.getpid(), "x": x}}]}


def started(notes: Path) -> list[str]:
    log = notes / "log"
    return sorted(log.read_text().split()) if log.exists() else []


@pytest.fixture
def task(notes: Path) -> Any:
    def make(**more: Any) -> WorkflowTask:
        args = {"notes": str(notes), **more.pop("args_parallel", {})}
        return WorkflowTask(task=Task(name="F", function_parallel=work), args_parallel=args, **more)

    return make


@pytest.fixture
def outliving(tmp_path: Path, notes: Path) -> Iterator[Any]:
    """Makes executors over one place, as different processes would."""
    made: list[Outliving] = []

    def make() -> Outliving:
        made.append(Outliving(tmp_path / "calls"))
        return made[-1]

    yield make
    (notes / "may").touch()
    for executor in made:
        executor.shutdown()


@pytest.fixture
def killed(
    *, coordinator: Any, task: Any, outliving: Any, images: Any, notes: Path, until: Any, query: Any
) -> Any:
    """Kills a coordinator that had four units out: number 0 has ended, 1 and 2 run, 3 waits."""

    async def call(**more: Any) -> None:
        (notes / "may0").touch()
        process = coordinator(task(**more), dataset=images(COUNT), executor=outliving(), max_in_flight=COUNT)
        await until(lambda: len(started(notes)) == 3)
        states = "SELECT state FROM {units} ORDER BY number"
        await until(lambda: len(query(states)) == COUNT and query(states)[0] == "done")
        process.kill()
        assert started(notes) == ["0:0", "1:0", "2:0"]

    return call


async def test_calls_that_run_and_calls_that_wait_are_taken_on_and_not_made_again(
    *, run: Any, killed: Any, task: Any, outliving: Any, images: Any, notes: Path, query: Any, tmp_path: Path
) -> None:
    await killed()
    (notes / "may").touch()
    executor, events = outliving(), []

    after = await run(task(), dataset=images(COUNT), executor=executor, resume=True, on_event=events.append)

    assert started(notes) == [f"{number}:0" for number in range(COUNT)]
    by = [image.attributes["by"] for image in after.images]
    assert len(set(by)) == COUNT  # each in its own process, none of them fenced off
    assert query("SELECT attempt, state, pid FROM {units} ORDER BY number") == [
        (1, "done", pid) for pid in by
    ]
    assert [asked for asked in executor.asked if asked[0] == "submit"] == []
    assert sorted(event.index for event in events if isinstance(event, UnitFinished)) == [1, 2, 3]
    assert len(list((tmp_path / "calls").glob("*/result"))) == COUNT


async def test_a_call_that_ended_while_nobody_was_there_is_used(
    *, run: Any, killed: Any, task: Any, outliving: Any, images: Any, notes: Path, tmp_path: Path, until: Any
) -> None:
    await killed()
    (notes / "may").touch()
    await until(lambda: len(list((tmp_path / "calls").glob("*/result"))) == COUNT)
    executor = outliving()

    after = await run(task(), dataset=images(COUNT), executor=executor, resume=True)

    assert all(image.attributes["by"] for image in after.images)
    assert started(notes) == [f"{number}:0" for number in range(COUNT)]


async def test_every_unit_that_is_not_done_is_asked_for_before_anything_is_submitted(
    *, run: Any, killed: Any, task: Any, outliving: Any, images: Any, notes: Path, query: Any
) -> None:
    await killed()
    # As if the coordinator had died before it submitted the last two; and one was lost by the executor.
    executor = outliving()
    (run_id,) = query("SELECT id FROM {runs}")
    keys = [f"{run_id}/0/par-000000-000000{number}" for number in range(COUNT)]
    for number in (2, 3):
        folder = executor._folder(keys[number])
        executor._end(folder)
        (folder / "pid").unlink()
        folder.rename(folder.with_name(f"lost{number}"))
    query("DELETE FROM {units} WHERE number = 3")
    (notes / "may").touch()

    await run(task(), dataset=images(COUNT), executor=executor, resume=True)

    asked = [key for what, key in executor.asked if what == "attach"]
    # Not for number 0, which is done; of the others also for an attempt that nobody has recorded.
    assert [key for key in asked if not key.endswith("-try2")] == keys[1:]
    assert [key for key in asked if key.endswith("-try2")] == [f"{key}-try2" for key in keys[1:3]]
    submitted = [key for what, key in executor.asked if what == "submit"]
    assert submitted == [f"{keys[2]}-try2", keys[3]]
    assert {what for what, _ in executor.asked[: len(asked)]} == {"attach"}
    assert started(notes) == ["0:0", "1:0", "2:0", "2:0", "3:0"]


async def test_what_the_history_does_not_know_of_is_asked_for_as_well(
    *, run: Any, killed: Any, task: Any, outliving: Any, images: Any, notes: Path, query: Any
) -> None:
    await killed()
    query("DELETE FROM {units} WHERE number > 0")
    (notes / "may").touch()

    await run(task(), dataset=images(COUNT), executor=outliving(), resume=True)

    assert started(notes) == [f"{number}:0" for number in range(COUNT)]
    assert query("SELECT attempt, state FROM {units} ORDER BY number") == [(1, "done")] * COUNT


async def test_calls_of_a_task_that_has_changed_are_ended_and_all_units_run_again(
    *, run: Any, killed: Any, task: Any, outliving: Any, images: Any, notes: Path, query: Any, until: Any
) -> None:
    await killed()
    (notes / "may0").unlink()
    executor = outliving()

    call = asyncio.ensure_future(
        run(task(args_parallel={"x": 1}), dataset=images(COUNT), executor=executor, resume=True, grace_s=0.2)
    )
    await until(lambda: call.done() or any(what == "submit" for what, _ in executor.asked))
    (notes / "may").touch()
    after = await call

    assert [image.attributes["x"] for image in after.images] == [1] * COUNT
    lines = (notes / "log").read_text().split()
    first_new = next(index for index, line in enumerate(lines) if line.endswith(":1"))
    assert all(line.endswith(":1") for line in lines[first_new:])  # nothing of the old task goes on
    assert sorted(lines[first_new:]) == [f"{number}:1" for number in range(COUNT)]
    assert query("SELECT number, attempt, state FROM {units} WHERE is_last ORDER BY number") == [
        (number, 2, "done") for number in range(COUNT)
    ]


async def test_a_unit_that_was_taken_on_and_fails_is_tried_again_under_its_next_number(
    *, run: Any, coordinator: Any, outliving: Any, notes: Path, until: Any, query: Any
) -> None:
    def fail_once(*, zarr_url: str, notes: str) -> None:
        first = not Path(notes, "ran").exists()
        Path(notes, "ran").touch()
        while not Path(notes, "may").exists():
            time.sleep(0.01)
        if first:
            raise ValueError("it fails once")

    task = WorkflowTask(
        task=Task(name="F", function_parallel=fail_once),
        args_parallel={"notes": str(notes)},
        meta_parallel={"retries": 1, "retry_on": "any"},
    )
    process = coordinator(task, executor=outliving())
    await until((notes / "ran").exists)
    await until(lambda: query("SELECT count(*) FROM {units}") == [1])
    process.kill()
    (notes / "may").touch()

    await run(task, executor=outliving(), resume=True)

    assert query("SELECT attempt, state FROM {units} ORDER BY attempt") == [(1, "failed"), (2, "done")]


async def test_of_a_unit_that_was_tried_again_the_last_attempt_is_taken_on(
    *, run: Any, coordinator: Any, outliving: Any, notes: Path, until: Any, query: Any
) -> None:
    """Even if the history knows neither that the first one has ended, nor of the second one."""

    def fail_first(*, zarr_url: str, notes: str) -> None:
        with Path(notes, "log").open("a") as log:
            log.write("ran\n")
        if started(Path(notes)) == ["ran"]:
            raise ValueError("the first one fails")
        while not Path(notes, "may").exists():
            time.sleep(0.01)

    task = WorkflowTask(
        task=Task(name="F", function_parallel=fail_first),
        args_parallel={"notes": str(notes)},
        meta_parallel={"retries": 1, "retry_on": "any"},
    )
    process = coordinator(task, executor=outliving())
    await until(lambda: len(started(notes)) == 2)
    await until(lambda: query("SELECT count(*) FROM {units}") == [2])
    process.kill()
    query("DELETE FROM {units} WHERE attempt = 2")
    query("UPDATE {units} SET state = 'running', is_last = 1, ended = NULL")
    (notes / "may").touch()

    await run(task, executor=outliving(), resume=True)

    assert len(started(notes)) == 2
    rows = query("SELECT attempt, is_last, state FROM {units} ORDER BY attempt")
    assert rows == [(1, 0, "failed"), (2, 1, "done")]


async def test_calls_that_go_on_are_no_unknown_outcome(
    *, run: Any, killed: Any, task: Any, outliving: Any, images: Any, notes: Path
) -> None:
    await killed(meta_parallel={"rerunnable": False})
    (notes / "may").touch()

    await run(
        task(meta_parallel={"rerunnable": False}), dataset=images(COUNT), executor=outliving(), resume=True
    )

    assert started(notes) == [f"{number}:0" for number in range(COUNT)]


async def test_another_executor_that_knows_nothing_of_them_ends_them_first(
    *, run: Any, killed: Any, task: Any, images: Any, notes: Path, query: Any
) -> None:
    await killed()

    def may(event: Any) -> None:
        (notes / "may").touch()

    await run(task(), dataset=images(COUNT), resume=True, grace_s=0.2, on_event=may)

    states = query("SELECT number, attempt, state FROM {units} WHERE is_last ORDER BY number")
    assert [row[2] for row in states] == ["done"] * COUNT
