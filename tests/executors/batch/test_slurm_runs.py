"""Workflows run on a SLURM cluster: their calls outlive the coordinator, and their ends are explained."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    Image,
    JobExecutionError,
    Task,
    Workflow,
    WorkflowTask,
    process_workflow,
)
from tests.clusters.slurm import SlurmCluster
from tests.workflow.coordinator import Coordinator

IMAGES = 20
OPTIONS = {"poll_interval": 1, "mem": 100}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session", autouse=True)
def the_cluster(slurm_cluster: SlurmCluster) -> SlurmCluster:
    """From before what looks for things that a module of tests leaves behind: it stays."""
    return slurm_cluster


@pytest.fixture
def cluster(the_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    the_cluster.reset()
    for name, value in the_cluster.env.items():
        monkeypatch.setenv(name, value)
    yield the_cluster
    the_cluster.reset()


@pytest.fixture
def arguments(cluster: SlurmCluster, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The arguments of a run of these tasks, over so many images."""

    def make(*tasks: WorkflowTask, count: int = 1, **options: Any) -> dict[str, Any]:
        images = [Image(zarr_url=f"/z/{number}") for number in range(count)]
        return {
            "workflow": Workflow(name="w", task_list=list(tasks)),
            "dataset": Dataset(name="d", zarr_dir="/z", images=images),
            "workflow_dir_local": tmp_path / "run",
            "executor": ("slurm", {**OPTIONS, **options}),
            "grace_s": 1,
        }

    return make


def noted(notes: Path) -> list[str]:
    path = notes / "log"
    return sorted(path.read_text().split()) if path.exists() else []


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    place = tmp_path / "notes"
    place.mkdir()
    return place


def tasks_that_note(notes: Path) -> list[WorkflowTask]:
    """A compound task and a parallel one. Each unit notes that it runs; those after the fifth wait."""
    place = str(notes)

    def note(word: str) -> None:
        import os

        fd = os.open(f"{place}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{word}\n".encode())
        os.close(fd)

    def init(*, zarr_urls: list[str], zarr_dir: str) -> dict[str, Any]:
        note("init")
        return {"parallelization_list": [{"zarr_url": url, "init_args": {"n": 1}} for url in zarr_urls]}

    def wait(url: str, name: str) -> None:
        import os
        import time

        number = int(url.rpartition("/")[2])
        note(f"{name}-{number}")
        while number > 5 and not os.path.exists(f"{place}/may-{name}"):  # noqa: PTH110
            time.sleep(0.05)

    def compute(*, zarr_url: str, init_args: dict[str, Any]) -> dict[str, Any]:
        wait(zarr_url, "compute")
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": init_args}]}

    def work(*, zarr_url: str) -> dict[str, Any]:
        wait(zarr_url, "work")
        return {"image_list_updates": [{"zarr_url": zarr_url, "types": {"worked": True}}]}

    return [
        WorkflowTask(
            task=Task(name="Compound", type="compound", function_non_parallel=init, function_parallel=compute)
        ),
        WorkflowTask(task=Task(name="Work", function_parallel=work)),
    ]


async def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Callable[..., Coordinator]]:
    """Starts a run in a process of its own."""
    started: list[Coordinator] = []

    def start(**arguments: Any) -> Coordinator:
        started.append(Coordinator(tmp_path, **arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


async def test_a_run_whose_coordinator_is_killed_in_each_of_its_tasks_repeats_no_unit(
    arguments: Any, coordinator: Any, notes: Path, tmp_path: Path
) -> None:
    given = arguments(*tasks_that_note(notes), count=IMAGES)
    first = coordinator(**given)
    await until(lambda: len(noted(notes)) > 8)  # the init unit, those that do not wait, and some that do
    first.kill()

    second = coordinator(**given, resume=True)
    (notes / "may-compute").touch()
    await until(lambda: sum(word.startswith("work") for word in noted(notes)) > 7)
    second.kill()
    (notes / "may-work").touch()
    after = await process_workflow(**given, resume=True)

    numbers = range(IMAGES)
    assert noted(notes) == sorted(
        ["init", *(f"compute-{number}" for number in numbers), *(f"work-{number}" for number in numbers)]
    )
    assert [image.zarr_url for image in after.images] == [f"/z/{number}" for number in numbers]
    assert all(image.attributes == {"n": 1} and image.types == {"worked": True} for image in after.images)
    assert len(list((tmp_path / "run" / "jobs" / "slurm").glob("fr-*"))) == 3  # nothing submitted twice
    assert attempts(tmp_path / "run") == [(1, "done", 1 + 2 * IMAGES)]


def attempts(run: Path) -> list[Any]:
    with sqlite3.connect(run / "history.sqlite", timeout=30) as database:
        return database.execute(
            "SELECT attempt, state, count(*) FROM fractal_runner_units GROUP BY attempt, state "
            "ORDER BY attempt, state"
        ).fetchall()


async def test_units_that_end_while_there_is_no_coordinator_are_taken_as_they_ended(
    cluster: SlurmCluster, arguments: Any, coordinator: Any, notes: Path, tmp_path: Path
) -> None:
    (notes / "may-compute").touch()
    given = arguments(*tasks_that_note(notes), count=IMAGES)
    first = coordinator(**given)
    await until(lambda: sum(word.startswith("work") for word in noted(notes)) > 7)
    first.kill()
    (notes / "may-work").touch()
    await asyncio.to_thread(cluster.wait_until_idle)
    before = noted(notes)

    await process_workflow(**given, resume=True)

    assert noted(notes) == before
    assert attempts(tmp_path / "run") == [(1, "done", 1 + 2 * IMAGES)]


async def test_a_unit_that_takes_more_memory_than_it_asked_for_is_said_to(
    cluster: SlurmCluster, arguments: Any
) -> None:
    if cluster.limits_memory_with != "cgroup":
        pytest.skip("there are no control groups here that would end it")

    def hungry(*, zarr_url: str) -> None:
        held = bytearray(600_000_000)
        held[::4096] = b"x" * len(held[::4096])

    task = WorkflowTask(task=Task(name="Hungry", function_parallel=hungry), meta_parallel={"mem": 100})

    with pytest.raises(JobExecutionError, match="Hungry") as caught:
        await process_workflow(**arguments(task))

    assert caught.value.reason == "OUT_OF_MEMORY"


async def test_a_unit_whose_time_is_over_is_said_to(
    cluster: SlurmCluster, arguments: Any, notes: Path
) -> None:
    place = str(notes)

    def slow(*, zarr_url: str) -> None:
        import pathlib
        import time

        pathlib.Path(place, "log").write_text("slow")
        time.sleep(300)

    task = WorkflowTask(task=Task(name="Slow", function_parallel=slow), meta_parallel={"time": 60})
    call = asyncio.ensure_future(process_workflow(**arguments(task)))
    await until(lambda: noted(notes))
    (job,) = {int(word) for word in cluster.run("squeue", "-h", "-o", "%A").stdout.split()}
    cluster.set_end_time(job, 1)

    with pytest.raises(JobExecutionError, match="Slow") as caught:
        await call

    assert caught.value.reason == "TIMEOUT"
    assert "Ask for more time" in str(caught.value)


async def test_an_attempt_that_is_to_be_elsewhere_has_another_node(arguments: Any, notes: Path) -> None:
    place = str(notes)

    def picky(*, zarr_url: str) -> None:
        import os
        import pathlib

        with pathlib.Path(place, "log").open("a") as log:
            log.write(f"{os.environ['SLURMD_NODENAME']}\n")
        if len(pathlib.Path(place, "log").read_text().split()) < 3:
            raise ValueError("not here")

    meta = {"retries": 3, "retry_on": "any", "retry_elsewhere": True}
    task = WorkflowTask(task=Task(name="Picky", function_parallel=picky), meta_parallel=meta)

    await process_workflow(**arguments(task))

    nodes = (notes / "log").read_text().split()
    assert len(nodes) == len(set(nodes)) == 3


async def test_a_run_that_is_cancelled_ends_its_jobs(
    cluster: SlurmCluster, arguments: Any, notes: Path, tmp_path: Path
) -> None:
    call = asyncio.ensure_future(process_workflow(**arguments(*tasks_that_note(notes), count=IMAGES)))
    await until(lambda: len(noted(notes)) > 8)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await asyncio.to_thread(cluster.wait_until_idle, 30)
    assert json.loads((tmp_path / "run" / "run.json").read_text())
    assert not any(word.startswith("work") for word in noted(notes))
