"""Executors by name, class and instance: who is made, what runs on it, and who is shut down."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    ForkExecutor,
    Image,
    JobExecutionError,
    SerialExecutor,
    Task,
    TaskExecutionError,
    ThreadExecutor,
    UnitFinished,
    Workflow,
    WorkflowTask,
    process_workflow,
)
from fractal_runner.executors import factories, registry
from fractal_runner.executors.cpus import THREAD_VARIABLES, usable_cpus
from fractal_runner.worker.evidence import read_ledger
from tests.executors.batch import standin
from tests.executors.batch.standin import StandIn

URLS = [f"/z/{number}" for number in range(3)]


class OneThread(Executor):
    """A whole executor in a few lines: a thread per call."""

    def __init__(self) -> None:
        self.calls = 0
        self.shut_down = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls += 1
        threading.Thread(target=lambda: future.set_result(fn(*args, **kwargs))).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.shut_down = True


class Refusing(OneThread):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise RuntimeError("cannot schedule new futures: the queue is closed")


class Failing(OneThread):
    """The executor's own trouble comes back in the future."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(self.trouble)
        return future

    trouble: Exception = OSError("the connection to the cluster is lost")


def mark(*, zarr_url: str) -> dict[str, Any]:
    attributes = {"pid": os.getpid(), "thread": threading.current_thread().name}
    return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": attributes}]}


def trip(*, zarr_url: str) -> None:
    raise LookupError(f"nothing at {zarr_url}")


def die(*, zarr_url: str) -> None:
    if zarr_url == URLS[1]:
        os.kill(os.getpid(), 9)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs one parallel task per function over three images."""

    async def call(*functions: Callable[..., Any] | str | WorkflowTask, executor: Any) -> Dataset:
        tasks = [
            one if isinstance(one, WorkflowTask) else WorkflowTask(task=Task(name="F", function_parallel=one))
            for one in functions
        ]
        return await process_workflow(
            workflow=Workflow(name="w", task_list=tasks),
            dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=url) for url in URLS]),
            workflow_dir_local=tmp_path / "run",
            executor=executor,
        )

    return call


def pids(dataset: Dataset) -> set[Any]:
    return {image.attributes["pid"] for image in dataset.images}


# What may be given


@pytest.mark.parametrize(
    ("choice", "here"),
    [
        (None, True),
        ("thread", True),
        (("thread", {"max_workers": 2}), True),
        (ThreadPoolExecutor, True),
        (OneThread, True),
        ("process", False),
        (("process", {"max_workers": 1}), False),
        ("serial", True),
        (("fork", {"max_workers": 1, "max_memory": "4GB"}), False),
        (("spawn", {"max_workers": 2}), False),
        (SerialExecutor, True),
        (ForkExecutor, False),
    ],
)
async def test_an_executor_is_a_name_with_options_or_a_class(run: Any, choice: Any, here: bool) -> None:
    after = await run(mark, executor=choice)

    assert (os.getpid() in pids(after)) == here


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("proces", "unknown executor 'proces': did you mean 'process'?"),
        ("zzz", "unknown executor 'zzz': known are 'dask', 'fork', 'lsf', 'process', 'ray', 'serial'"),
        (
            ("thread", {"max_worker": 2}),
            "unknown option 'max_worker' of executor 'thread': did you mean 'max",
        ),
        (("process", {"max_workers": "2"}), "max_workers must be greater than 0 and a whole number, not '2'"),
    ],
)
async def test_a_wrong_name_or_option_is_a_value_error_with_the_nearest(
    run: Any, tmp_path: Path, choice: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        await run(mark, executor=choice)

    assert message in str(caught.value)
    assert not (tmp_path / "run" / "0_f").exists()


@pytest.mark.parametrize("choice", [3, object(), int, ["thread"]])
async def test_what_is_no_executor_is_a_type_error(run: Any, choice: Any) -> None:
    with pytest.raises(TypeError, match="is neither an executor, an executor class, nor a name"):
        await run(mark, executor=choice)


def test_checking_makes_nothing() -> None:
    factories.check("process", {"max_workers": 1})

    assert not multiprocessing.active_children()


def test_workers_default_to_the_cpus_that_may_be_used() -> None:
    with factories.make("thread") as pool:
        assert isinstance(pool, ThreadExecutor)
        assert pool.max_workers == pool.max_cpus == usable_cpus() >= 1


# Who shuts it down


async def test_an_instance_stays_the_callers(run: Any) -> None:
    executor = OneThread()

    await run(mark, executor=executor)

    assert executor.calls == 3
    assert not executor.shut_down


@pytest.mark.parametrize("function", [mark, trip])
async def test_what_was_made_here_is_shut_down_here_whatever_happened(run: Any, function: Any) -> None:
    made: list[OneThread] = []

    class Noted(OneThread):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    if function is mark:
        await run(function, executor=Noted)
    else:
        with pytest.raises(TaskExecutionError):
            await run(function, executor=Noted)

    assert [executor.shut_down for executor in made] == [True]


async def test_no_process_of_a_named_pool_is_left(run: Any) -> None:
    after = await run(mark, executor=("process", {"max_workers": 1}))

    [pid] = pids(after)
    assert not Path(f"/proc/{pid}").exists()


async def test_one_executor_serves_all_tasks_of_a_run(run: Any) -> None:
    seen: list[Any] = []

    class Noted(ThreadPoolExecutor):
        def __init__(self) -> None:
            super().__init__(1)
            seen.append(self)

    await run(mark, mark, mark, executor=Noted)

    assert len(seen) == 1


async def test_a_task_may_name_an_executor_of_its_own(run: Any) -> None:
    def other(*, zarr_url: str) -> dict[str, Any]:
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"other": os.getpid()}}]}

    own = WorkflowTask(task=Task(name="F", function_parallel=other), meta_parallel={"executor": "process"})
    executor = OneThread()

    after = await run(mark, own, executor=executor)

    assert pids(after) == {os.getpid()}
    assert os.getpid() not in {image.attributes["other"] for image in after.images}
    assert executor.calls == 3
    assert not executor.shut_down


# Where it keeps its files


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The stand-ins that are made; their class bears the name "batch"."""
    monkeypatch.setitem(factories._PLACES, "batch", standin.PLACE)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


def named(name: str) -> WorkflowTask:
    return WorkflowTask(task=Task(name="F", function_parallel=mark), meta_parallel={"executor": name})


@pytest.mark.parametrize("choice", ["batch", ("batch", {"max_workers": 1}), StandIn])
async def test_what_is_made_for_a_run_has_a_folder_in_its_directory(
    run: Any, tmp_path: Path, stand_in: list[StandIn], choice: Any
) -> None:
    await run(mark, named("batch"), executor=choice)

    [executor] = stand_in
    assert executor.folder == str(tmp_path / "run" / "jobs" / "batch")
    assert executor.path_map is None


async def test_so_has_one_that_a_task_names(run: Any, tmp_path: Path, stand_in: list[StandIn]) -> None:
    await run(mark, named("batch"), executor="thread")

    [executor] = stand_in
    assert executor.folder == str(tmp_path / "run" / "jobs" / "batch")


async def test_a_task_that_names_the_callers_own_executor_gets_that_one(
    run: Any, tmp_path: Path, stand_in: list[StandIn]
) -> None:
    with StandIn(tmp_path / "jobs") as executor:
        await run(named("batch"), executor=executor)

    assert stand_in == [executor]
    assert len(executor.seen) == len(URLS)


async def test_a_class_without_a_registered_name_has_a_folder_of_its_own_name(
    run: Any, tmp_path: Path
) -> None:
    made: list[StandIn] = []

    class Other(StandIn):
        def __init__(self, folder: str, path_map: Any = None) -> None:
            super().__init__(folder)
            made.append(self)

    await run(mark, executor=Other)

    assert [executor.folder for executor in made] == [str(tmp_path / "run" / "jobs" / "Other")]


async def test_a_folder_that_is_given_is_taken(run: Any, tmp_path: Path, stand_in: list[StandIn]) -> None:
    await run(mark, executor=("batch", {"folder": tmp_path / "mine", "partition": "main"}))

    [executor] = stand_in
    assert (executor.folder, executor.partition) == (str(tmp_path / "mine"), "main")


@pytest.mark.parametrize("given", [{}, {"path_map": {"/a": "/b"}}], ids=str)
async def test_an_executor_is_told_where_the_nodes_see_the_runs_directory(
    tmp_path: Path, stand_in: list[StandIn], given: Any
) -> None:
    directory, seen_as = tmp_path / "run", tmp_path / "nodes"
    seen_as.symlink_to(directory)
    await process_workflow(
        workflow=Workflow(name="w", task_list=[WorkflowTask(task=Task(name="F", function_parallel=mark))]),
        dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=URLS[0])]),
        workflow_dir_local=directory,
        workflow_dir_remote=seen_as,
        executor=("batch", given),
    )

    [executor] = stand_in
    assert executor.path_map == given.get("path_map", {str(directory): str(seen_as)})


def test_for_no_run_there_is_no_folder() -> None:
    executors = registry.Executors(StandIn)

    with pytest.raises(TypeError, match="folder"):
        executors.get()


# What runs on it


@pytest.mark.parametrize("executor", ["thread", "process", OneThread])
async def test_what_a_function_raises_is_a_task_error_with_the_workers_traceback(
    run: Any, executor: Any
) -> None:
    with pytest.raises(TaskExecutionError) as caught:
        await run(trip, executor=executor)

    text = str(caught.value)
    assert "unit 0 (/z/0) failed: raised an exception" in text
    assert "Traceback (most recent call last):" in text
    assert text.endswith("LookupError: nothing at /z/0")
    assert "in trip" in text
    assert "worker/function.py" not in text
    assert caught.value.returncode == 1
    assert len(caught.value.failures) == 3
    assert Path(str(caught.value.log_file)).read_text().strip().endswith("LookupError: nothing at /z/0")


@pytest.mark.parametrize("executor", ["process", "fork", "spawn"])
async def test_a_worker_that_dies_fails_its_own_unit_alone(run: Any, executor: str) -> None:
    with pytest.raises(JobExecutionError) as caught:
        await run(die, executor=(executor, {"max_workers": 1}))

    [failure] = caught.value.failures
    assert (failure.zarr_url, failure.returncode) == (URLS[1], -9)
    assert "SIGKILL" in str(failure)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_a_worker_that_is_killed_is_a_job_error(run: Any, method: str) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool,
        pytest.raises(JobExecutionError) as caught,
    ):
        await run(die, executor=pool)

    assert caught.value.reason == "BROKEN_EXECUTOR"
    assert "the worker that ran it, or one beside it, died" in str(caught.value)
    assert isinstance(caught.value.__cause__, BrokenProcessPool)
    assert URLS[1] in [failure.zarr_url for failure in caught.value.failures]


async def test_an_executor_that_refuses_calls_fails_each_unit(run: Any) -> None:
    with pytest.raises(JobExecutionError, match="the queue is closed") as caught:
        await run(mark, executor=Refusing())

    assert [failure.unit_index for failure in caught.value.failures] == [0, 1, 2]


async def test_a_pool_that_was_shut_down_is_a_job_error(run: Any) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()

    with pytest.raises(JobExecutionError, match="cannot schedule new futures after shutdown"):
        await run(mark, executor=pool)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (OSError("the connection to the cluster is lost"), "OSError"),
        (TimeoutError(), "TIMEOUT"),
        (JobExecutionError("the job was killed", reason="OUT_OF_MEMORY", returncode=-9), "OUT_OF_MEMORY"),
    ],
)
async def test_an_executors_own_exception_is_a_job_error_with_its_words(
    run: Any, trouble: Exception, reason: str
) -> None:
    executor = Failing()
    executor.trouble = trouble

    with pytest.raises(JobExecutionError) as caught:
        await run(mark, executor=executor)

    assert caught.value.reason == reason
    assert str(trouble) in str(caught.value)
    assert (caught.value.task_name, caught.value.zarr_url) == ("F", "/z/0")


async def test_a_future_without_a_result_is_a_job_error(run: Any) -> None:
    class Forgetful(OneThread):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            return super().submit(fn.__name__.startswith, "nothing")

    with pytest.raises(JobExecutionError, match="returned False instead of the unit's result"):
        await run(mark, executor=Forgetful())


async def test_a_function_that_cannot_be_pickled_is_named_before_anything_is_sent(run: Any) -> None:
    lock = threading.Lock()

    def locked(*, zarr_url: str) -> None:
        with lock:
            pass

    with pytest.raises((JobExecutionError, TaskExecutionError), match="cannot pickle"):
        await run(locked, executor=("process", {"max_workers": 1}))


# What units ask for


@pytest.mark.parametrize("executor", ["thread", "process", "serial"])
@pytest.mark.parametrize("cpus", [None, 2])
async def test_a_command_is_told_how_many_threads_it_may_start(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, cpus: int | None
) -> None:
    for variable in THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    meta = {} if cpus is None else {"cpus_per_task": cpus}
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $OMP_NUM_THREADS $MKL_NUM_THREADS > {tmp_path}/seen\n")
    program.chmod(0o755)
    task = WorkflowTask(task=Task(name="C", command_parallel=str(program)), meta_parallel=meta)
    options = {} if executor == "serial" else {"max_workers": 1, "max_cpus": 2}

    await run(task, executor=(executor, options))

    assert (tmp_path / "seen").read_text() == f"{cpus or 1} 7\n"


async def test_what_a_unit_asks_for_beyond_the_executor_is_reduced_with_one_warning(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    meta = {"cpus_per_task": 64, "mem": "2TB"}
    task = WorkflowTask(task=Task(name="F", function_parallel=mark), meta_parallel=meta)

    await run(task, executor=("thread", {"max_workers": 2, "max_cpus": 3, "max_memory": "1GB"}))

    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "64 CPUs are more than the 3 of" in warning
    assert "2 TB of memory are more than the 1 GB of" in warning
    assert "get what there is" in warning


async def test_a_fresh_process_for_each_unit_does_not_mean_a_file_for_each(run: Any, tmp_path: Path) -> None:
    for executor in ("fork", "spawn"):
        await run(mark, executor=(executor, {"max_workers": 1}))
        [ledger] = (tmp_path / "run" / "evidence").iterdir()
        kinds = [record["kind"] for record in read_ledger(ledger)]
        assert kinds == ["worker", "start", "end"] * len(URLS)
        (tmp_path / "run").rename(tmp_path / executor)


# Serial: in the caller's thread


async def test_serial_runs_units_in_the_callers_own_thread(run: Any) -> None:
    seen: list[Any] = []

    def note(*, zarr_url: str) -> None:
        seen.append((threading.get_ident(), zarr_url))

    await run(note, executor="serial")

    assert seen == [(threading.get_ident(), url) for url in URLS]


async def test_over_serial_events_come_as_things_happen(tmp_path: Path) -> None:
    events: list[str] = []

    def note(*, zarr_url: str) -> None:
        events.append(zarr_url)

    await process_workflow(
        workflow=Workflow(name="w", task_list=[WorkflowTask(task=Task(name="F", function_parallel=note))]),
        dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=url) for url in URLS]),
        workflow_dir_local=tmp_path / "run",
        executor="serial",
        on_event=lambda event: isinstance(event, UnitFinished) and events.append(f"end {event.index}"),
    )

    assert events == ["/z/0", "end 0", "/z/1", "end 1", "/z/2", "end 2"]


async def test_ctrl_c_in_a_serial_unit_is_the_callers(run: Any) -> None:
    seen: list[str] = []

    def interrupt(*, zarr_url: str) -> None:
        seen.append(zarr_url)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await run(interrupt, executor="serial")
    assert seen == URLS[:1]


async def test_a_serial_run_that_is_cancelled_starts_no_more(run: Any) -> None:
    seen: list[str] = []

    def cancel(*, zarr_url: str) -> None:
        seen.append(zarr_url)
        running.cancel()

    running = asyncio.ensure_future(run(cancel, executor="serial"))
    with pytest.raises(asyncio.CancelledError):
        await running
    assert seen == URLS[:1]
