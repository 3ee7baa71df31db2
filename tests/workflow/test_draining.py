"""A run that is asked to start no more: what runs finishes, and nothing that finished is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from fractal_runner import JobExecutionError, SerialExecutor, Task, TaskProgress, UnitFinished
from fractal_runner.executors import registry


@pytest.mark.parametrize("executor", ["thread", "process", "fork"])
async def test_units_that_run_finish_and_no_more_start(run: Any, images: Any, executor: str) -> None:
    def work(*, zarr_url: str) -> dict[str, Any]:
        time.sleep(0.01)
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"worked": True}}]}

    drain = threading.Event()
    with pytest.raises(JobExecutionError, match="was asked to start no more units") as caught:
        await run(
            Task(name="F", function_parallel=work),
            dataset=images(200),
            executor=(executor, {"max_workers": 1}),
            max_in_flight=10,
            drain=drain,
            on_event=lambda event: isinstance(event, UnitFinished) and event.index == 20 and drain.set(),
        )

    assert caught.value.reason == "CANCELLED"
    worked = [image for image in caught.value.dataset.images if image.attributes.get("worked")]
    assert 21 <= len(worked) < 200
    assert caught.value.failures[0].reason == "CANCELLED"


async def test_what_was_the_last_unit_anyway_makes_no_error(run: Any, images: Any) -> None:
    drain = threading.Event()

    def work(*, zarr_url: str) -> None:
        drain.set()

    after = await run(Task(name="F", function_parallel=work), dataset=images(1), drain=drain)

    assert len(after.images) == 1


async def test_the_next_task_does_not_start(run: Any, images: Any) -> None:
    drain, later = threading.Event(), []

    def first(*, zarr_url: str) -> None:
        drain.set()

    def second(*, zarr_url: str) -> None:
        later.append(zarr_url)

    tasks = Task(name="A", function_parallel=first), Task(name="B", function_parallel=second)
    with pytest.raises(JobExecutionError, match=r"Task 1 .*nothing of it has run"):
        await run(*tasks, dataset=images(1), drain=drain)

    assert later == []


async def test_compute_units_do_not_start_after_init(run: Any, images: Any) -> None:
    drain, computed = threading.Event(), []

    def init(*, zarr_dir: str, zarr_urls: list[str]) -> dict[str, Any]:
        drain.set()
        return {"parallelization_list": [{"zarr_url": url} for url in zarr_urls]}

    def compute(*, zarr_url: str, init_args: dict[str, Any]) -> None:
        computed.append(zarr_url)

    task = Task(name="C", type="compound", function_non_parallel=init, function_parallel=compute)
    with pytest.raises(JobExecutionError, match="was asked to start no more units"):
        await run(task, dataset=images(3), drain=drain)

    assert computed == []


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_progress_lists_the_units_that_run(run: Any, images: Any, executor: str) -> None:
    seen: list[TaskProgress] = []
    task = Task(name="Nap", type="parallel", command_parallel="sh -c 'sleep 2.5'")

    await run(
        task,
        dataset=images(2),
        executor=(executor, {"max_workers": 2}),
        on_event=lambda event: isinstance(event, TaskProgress) and seen.append(event),
    )

    listed = max((event.units_running for event in seen), key=len)
    assert {unit.name for unit in listed} == {"Nap 0", "Nap 1"}
    for unit in listed:
        assert unit.host and unit.pid and unit.memory and unit.cpu is not None
        assert 0 <= unit.seconds < 60


def test_only_executors_that_say_so_work_in_the_callers_thread() -> None:
    assert not registry.Executors("serial").is_asynchronous()
    assert not registry.Executors(SerialExecutor().options(cpus=1)).is_asynchronous()
    assert registry.Executors("thread").is_asynchronous()


async def test_a_run_over_serial_blocks_its_own_loop_only(run: Any, images: Any) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticker = asyncio.ensure_future(tick())
    await asyncio.sleep(0.01)
    before = ticks
    await run(Task(name="F", type="parallel", command_parallel="true"), dataset=images(3), executor="serial")

    assert ticks == before
    ticker.cancel()
