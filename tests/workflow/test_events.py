"""The caller's event loop during a run: free, and told what happens, in order, on its own thread."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Event,
    JobExecutionError,
    RunFinished,
    RunStarted,
    Task,
    TaskExecutionError,
    TaskFinished,
    TaskProgress,
    TaskStarted,
    UnitFinished,
    UnitRetried,
    UnitRunning,
    UnitSubmitted,
    WorkflowTask,
    process_workflow,
)


async def test_a_ticker_stays_on_time_with_ten_thousand_units_in_flight(run: Any, images: Any) -> None:
    def nothing(*, zarr_url: str) -> None: ...

    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.perf_counter() - due)

    ticker = asyncio.ensure_future(tick())
    after = await run(
        Task(name="F", function_parallel=nothing, output_types={"t": True}),
        dataset=images(10_000),
        max_in_flight=10_000,
        executor=("thread", {"max_workers": 4}),
    )
    ticker.cancel()

    assert sum(image.types == {"t": True} for image in after.images) == 10_000
    assert sorted(late)[int(len(late) * 0.99)] < 0.5  # the real figure is a benchmark's


async def test_a_slow_listener_does_not_hold_the_loop_in_one_turn(run: Any, images: Any) -> None:
    def nothing(*, zarr_url: str) -> None: ...

    turns = 0
    ended = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    def on_event(event: Event) -> None:
        nonlocal ended
        ended += isinstance(event, UnitFinished)
        time.sleep(0.002)

    ticker = asyncio.ensure_future(tick())
    await run(Task(name="F", function_parallel=nothing), dataset=images(300), on_event=on_event)
    ticker.cancel()

    assert ended == 300  # all of them before the call returns
    assert turns > 50


async def test_events_come_in_order_on_the_loops_thread(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    events: list[Event] = []
    threads = set()

    def on_event(event: Event) -> None:
        events.append(event)
        threads.add(threading.get_ident())

    with pytest.raises(TaskExecutionError):
        await run(
            parallel(name="First"),
            parallel(script("sys.exit(number)"), name="Second"),
            dataset=images(2),
            on_event=on_event,
        )

    assert threads == {threading.get_ident()}
    told = [event for event in events if not isinstance(event, (TaskProgress, UnitRunning))]
    assert [(type(event), getattr(event, "order", None)) for event in told] == [
        (RunStarted, None),
        (TaskStarted, 0),
        *[(UnitSubmitted, 0)] * 2,
        *[(UnitFinished, 0)] * 2,
        (TaskFinished, 0),
        (TaskStarted, 1),
        *[(UnitSubmitted, 1)] * 2,
        *[(UnitFinished, 1)] * 2,
        (TaskFinished, 1),
        (RunFinished, None),
    ]
    assert told[1] == TaskStarted(order=0, task_name="First", images=2)
    assert [event.succeeded for event in told if isinstance(event, TaskFinished)] == [True, False]
    failed = [event for event in told if isinstance(event, UnitFinished) and not event.succeeded]
    assert [(event.stage, event.index, event.zarr_url) for event in failed] == [("par", 1, "/z/1")]
    assert "exit code 1" in failed[0].message
    assert failed[0].seconds is not None
    last = [event for event in events if isinstance(event, TaskProgress) and event.order == 1][-1]
    assert (last.units, last.done, last.failed, last.running) == (2, 1, 1, 0)


async def test_a_task_that_gets_no_images_has_been_announced_all_the_same(run: Any, parallel: Any) -> None:
    started: list[Event] = []

    with pytest.raises(JobExecutionError, match="empty image list"):
        await run(
            parallel(),
            parallel(name="Second", input_types={"x": True}),
            on_event=lambda event: started.append(event) if isinstance(event, TaskStarted) else None,
        )

    # A new run begins with the last one that was announced.
    assert started[-1] == TaskStarted(order=1, task_name="Second", images=0)


@pytest.mark.parametrize("exception", [ValueError, asyncio.CancelledError, GeneratorExit])
async def test_what_a_listener_raises_is_logged_and_harmless(
    run: Any, parallel: Any, caplog: pytest.LogCaptureFixture, exception: type[BaseException]
) -> None:
    seen: list[Event] = []

    def on_event(event: Event) -> None:
        seen.append(event)
        raise exception("a bad listener")

    after = await asyncio.wait_for(
        run(parallel(output_types={"t": True}), on_event=on_event, logger_name="mine"), 60
    )

    assert after.images[0].types == {"t": True}
    assert isinstance(seen[-1], RunFinished)
    records = [record for record in caplog.records if "on_event raised" in record.getMessage()]
    assert len(records) == len(seen)
    assert {record.name for record in records} == {"mine"}


async def test_runs_go_on_side_by_side_on_one_loop_and_one_pool(
    run: Any, parallel: Any, images: Any, tmp_path: Any
) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = await asyncio.gather(
            *(
                run(
                    parallel(output_types={f"t{number}": True}),
                    dataset=images(3),
                    workflow_dir_local=tmp_path / f"run{number}",
                    executor=pool,
                )
                for number in range(4)
            )
        )

    assert [result.images[0].types for result in results] == [{f"t{number}": True} for number in range(4)]


def test_a_run_works_in_a_loop_of_a_thread_that_is_not_the_main_one(
    flow: Any, parallel: Any, images: Any, tmp_path: Any
) -> None:
    results = []

    def work() -> None:
        coroutine = process_workflow(
            workflow=flow(parallel()), dataset=images(1), workflow_dir_local=tmp_path / "run"
        )
        results.append(asyncio.run(coroutine))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)

    assert results == [images(1)]


async def test_no_thread_of_a_run_is_left_behind(run: Any, parallel: Any) -> None:
    before = set(threading.enumerate())

    await run(parallel())

    started = set(threading.enumerate()) - before
    for thread in started:
        await asyncio.to_thread(thread.join, 10) if thread.name == "run" else None
    assert not [thread for thread in started if thread.is_alive() and not thread.name.startswith("asyncio")]


def told(events: list[Event]) -> list[tuple[Any, ...]]:
    """Events in short, without those that depend on how fast things go."""
    short: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, UnitFinished):
            short.append(("finished", event.stage, event.index, event.attempt, event.succeeded))
        elif isinstance(event, UnitRetried):
            short.append(("retried", event.stage, event.index, event.attempt))
        elif isinstance(event, UnitSubmitted):
            short.append(("submitted", event.stage, event.index, event.attempt))
        elif isinstance(event, (TaskStarted, TaskFinished)):
            short.append((type(event).__name__, event.order))
        elif isinstance(event, (RunStarted, RunFinished)):
            short.append((type(event).__name__,))
    return short


async def test_the_events_of_a_compound_task_and_of_a_unit_that_is_tried_again(
    run: Any, script: Any, images: Any
) -> None:
    init = script("write({'parallelization_list': [{'zarr_url': url} for url in args['zarr_urls']]})")
    compute = script("sys.exit(number == 1 and 'try2' not in out)")
    task = WorkflowTask(
        task=Task(name="C", type="compound", command_non_parallel=init, command_parallel=compute),
        meta_parallel={"retries": 1, "retry_on": "any"},
    )
    events: list[Event] = []

    await run(task, dataset=images(2), executor="serial", on_event=events.append)

    assert told(events) == [
        ("RunStarted",),
        ("TaskStarted", 0),
        ("submitted", "non_par", 0, 1),
        ("finished", "non_par", 0, 1, True),
        ("submitted", "par", 0, 1),
        ("finished", "par", 0, 1, True),
        ("submitted", "par", 1, 1),
        ("retried", "par", 1, 1),
        ("submitted", "par", 1, 2),
        ("finished", "par", 1, 2, True),
        ("TaskFinished", 0),
        ("RunFinished",),
    ]
    retried = next(event for event in events if isinstance(event, UnitRetried))
    assert (retried.order, retried.zarr_url) == (0, "/z/1")
    assert "exit code 1" in retried.message
    progress = [event for event in events if isinstance(event, TaskProgress)]
    assert {event.stage for event in progress} == {"non_par", "par"}
    assert (progress[-1].units, progress[-1].done, progress[-1].failed) == (2, 2, 0)


async def test_a_resumed_run_tells_only_what_is_new(run: Any, images: Any, tmp_path: Path) -> None:
    def fail_at_first(*, zarr_url: str) -> None:
        if zarr_url == "/z/1" and not (tmp_path / "may").exists():
            raise ValueError("it fails")

    tasks = [Task(name=name, function_parallel=fail_at_first) for name in "AB"]
    first: list[Event] = []
    second: list[Event] = []
    with pytest.raises(TaskExecutionError):
        await run(*tasks, dataset=images(3), executor="serial", on_event=first.append)
    (tmp_path / "may").touch()

    await run(*tasks, dataset=images(3), executor="serial", on_event=second.append, resume=True)

    assert told(second) == [
        ("RunStarted",),
        ("TaskStarted", 0),
        ("submitted", "par", 1, 2),
        ("finished", "par", 1, 2, True),
        ("TaskFinished", 0),
        ("TaskStarted", 1),
        *[
            (what, "par", n, 1, *ok)
            for n in range(3)
            for what, ok in (("submitted", ()), ("finished", (True,)))
        ],
        ("TaskFinished", 1),
        ("RunFinished",),
    ]
    begins = [event for event in (*first, *second) if isinstance(event, RunStarted)]
    assert [event.resumed for event in begins] == [False, True]
    assert len({event.run_id for event in begins}) == 1
    assert begins[0].directory == str(tmp_path / "run")
    ends = [event for event in (*first, *second) if isinstance(event, RunFinished)]
    assert [event.state for event in ends] == ["failed", "done"]
    assert "Task 0 ('A')" in ends[0].message
    assert ends[1].message == ""


async def test_the_last_event_of_a_cancelled_run_says_so(
    run: Any, parallel: Any, script: Any, until: Any
) -> None:
    events: list[Event] = []
    call = asyncio.ensure_future(
        run(parallel(script("time.sleep(1000)")), on_event=events.append, grace_s=0.2)
    )
    await until(lambda: any(isinstance(event, UnitSubmitted) for event in events))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await until(lambda: any(isinstance(event, RunFinished) for event in events))
    assert isinstance(events[-1], RunFinished)
    assert events[-1].state == "cancelled"


async def test_events_are_frozen_and_equal_by_what_they_say() -> None:
    event = UnitSubmitted(order=0, stage="par", index=1, zarr_url="/z/1", attempt=1)

    assert event == UnitSubmitted(0, "par", 1, "/z/1", 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.index = 2  # type: ignore[misc]
