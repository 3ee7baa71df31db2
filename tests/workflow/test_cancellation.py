"""Cancelling a run: everything it started is gone, and what the caller made is still the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    ForkExecutor,
    Image,
    JobExecutionError,
    ProcessExecutor,
    SpawnExecutor,
    Task,
    TaskFinished,
    TaskStarted,
    ThreadExecutor,
    WorkflowTask,
)
from fractal_runner.workflow import stage as stage_module

GRACE_S = 0.5
STUBBORN = """
import signal
def stay(name):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(f"{args['notes']}/.{name}{number}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{args['notes']}/.{name}{number}", f"{args['notes']}/{name}{number}")
    while True:
        time.sleep(100)
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        stay("grandchild")
    stay("child")
stay("unit")
"""


def process_pool(method: str) -> Callable[[], Executor]:
    return lambda: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method))


POOLS = [
    pytest.param(lambda: ThreadPoolExecutor(2), id="thread pool"),
    pytest.param(process_pool("spawn"), id="spawn pool"),
    pytest.param(process_pool("forkserver"), id="forkserver pool"),
    pytest.param(lambda: ThreadExecutor(2), id="thread"),
    pytest.param(lambda: ProcessExecutor(2), id="process"),
    pytest.param(lambda: ForkExecutor(2), id="fork"),
    pytest.param(lambda: SpawnExecutor(2), id="spawn"),
]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where units leave their process ids."""
    place = tmp_path / "notes"
    place.mkdir()
    return place


@pytest.fixture
def stubborn(parallel: Any, script: Any, notes: Path) -> Any:
    """A task that ignores SIGTERM, and so do its child and its grandchild in another session."""
    return parallel(script(STUBBORN), args_parallel={"notes": str(notes)})


def left(notes: Path) -> list[str]:
    return [path.name for path in notes.iterdir() if is_running(int(path.read_text()))]


@pytest.mark.parametrize("make", POOLS)
async def test_processes_are_gone_down_to_grandchildren_and_the_callers_pool_still_works(
    *, run: Any, stubborn: Any, images: Any, notes: Path, tmp_path: Path, until: Any, make: Any
) -> None:
    with make() as pool:
        call = asyncio.ensure_future(run(stubborn, dataset=images(20), executor=pool, grace_s=GRACE_S))
        await until(lambda: len(list(notes.glob("[ucg]*"))) == 6)  # two units of three processes

        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert left(notes) == []
        assert len(list(notes.glob("[ucg]*"))) == 6  # nothing has been started meanwhile
        assert pool.submit(os.getpid).result(60)
    assert (tmp_path / "run" / "shutdown").exists()


@pytest.mark.parametrize("name", ["thread", "process"])
async def test_a_timeout_around_the_await_ends_everything_as_well(
    *, run: Any, stubborn: Any, images: Any, notes: Path, until: Any, name: str
) -> None:
    started = asyncio.Event()

    async def guarded() -> None:
        async with asyncio.timeout(None) as limit:
            call = asyncio.ensure_future(
                run(stubborn, dataset=images(4), executor=(name, {"max_workers": 2}), grace_s=GRACE_S)
            )
            await until(lambda: len(list(notes.glob("[ucg]*"))) == 6)
            started.set()
            limit.reschedule(asyncio.get_running_loop().time())
            await call

    with pytest.raises(TimeoutError):
        await guarded()

    assert started.is_set()
    assert left(notes) == []


async def test_wait_for_ends_a_run_that_takes_too_long(run: Any, parallel: Any, script: Any) -> None:
    began = time.monotonic()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run(parallel(script("time.sleep(1000)")), grace_s=GRACE_S), 0.5)

    assert time.monotonic() - began < 20


async def test_a_run_that_is_cancelled_before_its_first_step_starts_nothing(
    run: Any, parallel: Any, tmp_path: Path
) -> None:
    call = asyncio.ensure_future(run(parallel()))
    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call

    assert not (tmp_path / "run" / "0_t").exists()


async def test_cancelling_twice_is_cancelling_once(run: Any, stubborn: Any, notes: Path, until: Any) -> None:
    call = asyncio.ensure_future(run(stubborn, grace_s=GRACE_S))
    await until(lambda: len(list(notes.glob("[ucg]*"))) == 3)

    call.cancel()
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert left(notes) == []


async def test_later_tasks_do_not_start_after_a_cancellation(
    run: Any, parallel: Any, script: Any, tmp_path: Path, until: Any
) -> None:
    first = script(f"open({str(tmp_path)!r} + '/first', 'w'); time.sleep(1000)")
    second = script(f"open({str(tmp_path)!r} + '/second', 'w')")
    call = asyncio.ensure_future(run(parallel(first), parallel(second), grace_s=GRACE_S))
    await until((tmp_path / "first").exists)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("catches", [False, True])
async def test_a_function_in_a_process_is_ended_whether_it_wants_or_not(
    run: Any, notes: Path, until: Any, catches: bool
) -> None:
    def stay(*, zarr_url: str, notes: str, catches: bool) -> None:
        Path(notes, ".f").write_text(str(os.getpid()))
        Path(notes, ".f").rename(Path(notes, "function"))
        while True:
            with contextlib.suppress(BaseException if catches else ()):
                while True:
                    time.sleep(0.01)

    task = WorkflowTask(
        task=Task(name="F", function_parallel=stay), args_parallel={"notes": str(notes), "catches": catches}
    )
    call = asyncio.ensure_future(run(task, executor="process", grace_s=GRACE_S))
    await until((notes / "function").exists)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await until(lambda: left(notes) == [])


async def test_a_function_in_a_thread_is_reported_as_left_running(
    run: Any, images: Any, caplog: pytest.LogCaptureFixture
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def stay(*, zarr_url: str) -> None:
        began.set()
        may_end.wait(60)

    with ThreadPoolExecutor(1) as pool:
        try:
            call = asyncio.ensure_future(
                run(Task(name="F", function_parallel=stay), dataset=images(3), executor=pool, grace_s=0.2)
            )
            await asyncio.to_thread(began.wait, 30)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        finally:
            may_end.set()
        assert pool.submit(len, "abc").result(30) == 3

    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["Task 0 ('F'): unit 0 is left running"]


async def test_a_shutdown_file_from_outside_ends_the_run_with_a_job_error(
    *, run: Any, stubborn: Any, parallel: Any, images: Any, notes: Path, tmp_path: Path, until: Any
) -> None:
    call = asyncio.ensure_future(
        run(
            parallel(output_types={"t": True}),
            stubborn,
            dataset=images(10),
            executor=("thread", {"max_workers": 1}),
            grace_s=GRACE_S,
        )
    )
    await until(lambda: len(list(notes.glob("[ucg]*"))) == 3)

    (tmp_path / "run" / "shutdown").touch()

    with pytest.raises(JobExecutionError) as caught:
        await call
    assert caught.value.reason == "CANCELLED"
    assert caught.value.task_name == "T"
    assert caught.value.workflow_task_id == 1
    assert caught.value.dataset.images[0] == Image(zarr_url="/z/0", types={"t": True})
    assert left(notes) == []


async def test_a_compound_task_that_is_stopped_in_its_init_has_changed_nothing(
    run: Any, images: Any, tmp_path: Path, until: Any
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def init(*, zarr_dir: str, zarr_urls: list[str]) -> None:
        began.set()
        may_end.wait(60)

    def compute(*, zarr_url: str, init_args: dict[str, Any]) -> None: ...

    task = Task(name="C", function_non_parallel=init, function_parallel=compute, output_types={"t": True})
    looked = 0

    def on_event(event: object) -> None:
        nonlocal looked
        looked += (tmp_path / "run" / "shutdown").exists()
        if looked > 5:  # the run has seen the file by now, and the init unit ends well all the same
            may_end.set()

    call = asyncio.ensure_future(run(task, dataset=images(2), on_event=on_event, grace_s=30))
    await asyncio.to_thread(began.wait, 30)
    (tmp_path / "run" / "shutdown").touch()
    with pytest.raises(JobExecutionError) as caught:
        await call

    assert caught.value.reason == "CANCELLED"
    assert caught.value.dataset == images(2)


async def test_a_unit_that_somebody_else_cancels_is_a_job_error(run: Any, parallel: Any, images: Any) -> None:
    class Forgetful(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(JobExecutionError, match="cancelled before it started, and not by this run") as caught:
        await run(parallel(), dataset=images(2), executor=Forgetful())

    assert caught.value.reason == "CANCELLED"
    assert isinstance(caught.value.__cause__, CancelledError)
    assert len(caught.value.failures) == 2


async def test_an_executor_that_never_answers_is_given_up(
    run: Any, parallel: Any, until: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mute(Executor):
        taken = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()
            self.taken += 1
            return future

    monkeypatch.setattr(stage_module, "END_MARGIN_S", 0.1)
    mute = Mute()
    call = asyncio.ensure_future(run(parallel(), executor=mute, grace_s=0.1))
    await until(lambda: mute.taken == 1)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert "unit 0 is left running" in caplog.text


async def test_a_task_is_announced_before_the_run_looks_whether_it_was_cancelled(
    run: Any, parallel: Any, tmp_path: Path
) -> None:
    orders: list[int] = []
    calls: list[asyncio.Future[Any]] = []

    def on_event(event: object) -> None:
        if isinstance(event, TaskStarted):
            orders.append(event.order)
        if isinstance(event, TaskFinished):
            calls[0].cancel()

    calls.append(
        asyncio.ensure_future(run(parallel(output_types={"a": True}), *[parallel()] * 50, on_event=on_event))
    )
    with pytest.raises(asyncio.CancelledError):
        await calls[0]

    state = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert orders[-1] >= 1  # task 0 is done, and what it did is in the dataset: it is not to run again
    assert state["images"][0]["types"] == {"a": True}
