"""`process_workflow` from outside: what a caller gets back, or is told, whatever its units do."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    Image,
    JobExecutionError,
    Task,
    TaskExecutionError,
    TaskOutputValidationError,
    UnitFinished,
    Workflow,
    WorkflowTask,
    process_workflow,
)

MIXED = """
import json, os, sys
args = json.load(open(sys.argv[2]))
def write(text):
    open(sys.argv[4], "w").write(text)
match int(args["zarr_url"].rsplit("/", 1)[1]):
    case 0:
        update = {"zarr_url": args["zarr_url"], "attributes": {"x": 1}}
        write(json.dumps({"image_list_updates": [update]}))
    case 1: print("three"); sys.exit(3)
    case 2: os.kill(os.getpid(), 9)
    case 4: write("{bad")
    case 5: write('{"image_list_update": []}')
    case 6: write("null")
    case 7: write("{}")
"""
AWKWARD = "/z/a b'\"; $(touch /tmp/never) `x` *\n\\é"


def parallel(command: str, **more: Any) -> WorkflowTask:
    return WorkflowTask(task=Task(name="T", type="parallel", command_parallel=command, **more))


def sh(script: str) -> str:
    return shlex.join(["sh", "-c", script, "sh"])


def flow(*tasks: WorkflowTask) -> Workflow:
    return Workflow(name="w", task_list=list(tasks))


def images(count: int) -> Dataset:
    return Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=f"/z/{n}") for n in range(count)])


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def nothing(*, zarr_url: str) -> None:
    """A task that does nothing."""


def break_some(*, zarr_url: str) -> dict[str, Any] | None:
    if zarr_url == "/z/1":
        raise LookupError("no such well")
    return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"pid": os.getpid()}}]}


def die(*, zarr_url: str) -> None:
    os.kill(os.getpid(), 9)


def sleep(*, zarr_url: str, started: str) -> None:
    Path(started, zarr_url.rsplit("/", 1)[1]).write_text(str(os.getpid()))
    time.sleep(60)


def processes(count: int = 2) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


class Inline(Executor):
    """The least that an executor can be."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        future.set_result(fn(*args, **kwargs))
        return future


class Refusing(Executor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise RuntimeError("closed for today")


@pytest.mark.parametrize("executor", ["thread", "process", Inline])
async def test_eight_units_that_end_in_eight_ways(tmp_path: Path, executor: Any) -> None:
    script = tmp_path / "mixed.py"
    script.write_text(MIXED)
    task = parallel(shlex.join([sys.executable, "-IS", str(script)]), output_types={"t": True})
    before = images(8)

    with pytest.raises(TaskExecutionError) as caught:
        await process_workflow(
            workflow=flow(task), dataset=before, workflow_dir_local=tmp_path / "run", executor=executor
        )

    error = caught.value
    assert type(error) is TaskExecutionError
    assert (error.returncode, error.unit_index, error.workflow_task_id, error.task_name) == (3, 1, 0, "T")
    assert [failure.unit_index for failure in error.failures] == [1, 2, 4, 5]
    assert [type(failure) for failure in error.failures] == [
        TaskExecutionError,
        JobExecutionError,
        TaskOutputValidationError,
        TaskOutputValidationError,
    ]
    assert "unit 1 (/z/1) failed: exit code 3" in str(error)
    assert str(error).endswith("three")
    assert "SIGKILL" in str(error.failures[1])
    assert "did you mean 'image_list_updates'?" in str(error.failures[3])
    assert [image.types for image in error.dataset.images] == [
        {"t": True} if n in (0, 3, 6, 7) else {} for n in range(8)
    ]
    assert error.dataset.images[0].attributes == {"x": 1}
    assert before == images(8)
    assert json.loads((tmp_path / "run" / "dataset.json").read_text())["images"][0]["attributes"] == {"x": 1}
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert copy.dataset == error.dataset
    assert [str(failure) for failure in copy.failures] == [str(failure) for failure in error.failures]


async def test_a_task_that_failed_is_the_first_of_a_run_that_goes_on_from_it(tmp_path: Path) -> None:
    flag = tmp_path / "mended"
    tasks = flow(
        parallel("true", output_types={"first": True}),
        parallel(sh(f"test -e {flag}"), input_types={"first": True}, output_types={"second": True}),
    )

    with pytest.raises(TaskExecutionError) as caught:
        await process_workflow(workflow=tasks, dataset=images(3), workflow_dir_local=tmp_path / "1")
    flag.touch()
    after = await process_workflow(
        workflow=tasks,
        dataset=caught.value.dataset,
        workflow_dir_local=tmp_path / "2",
        first_task_index=1,
        job_type_filters=caught.value.type_filters,
    )

    assert caught.value.type_filters == {"first": True}
    assert [image.types for image in after.images] == [{"first": True, "second": True}] * 3
    assert json.loads((tmp_path / "2" / "filters.json").read_text()) == {
        "type_filters": {"first": True, "second": True},
        "attribute_filters": {},
    }


@pytest.mark.parametrize("executor", ["thread", "process"])
async def test_on_failure_stop_leaves_out_what_has_not_started(tmp_path: Path, executor: str) -> None:
    with pytest.raises(TaskExecutionError) as caught:
        await process_workflow(
            workflow=flow(parallel("false")),
            dataset=images(500),
            workflow_dir_local=tmp_path / "run",
            executor=(executor, {"max_workers": 1}),
            on_failure="stop",
        )

    assert len(caught.value.failures) < 100


async def test_arguments_reach_the_task_unchanged_and_nothing_is_run_by_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "echo me.py"
    script.write_text("import shutil, sys; shutil.copy(sys.argv[2], sys.argv[4] + '.seen')")
    task = WorkflowTask(
        task=Task(
            name="../../etc/x",
            command_parallel=shlex.join([sys.executable, "-IS", str(script)]),
            type="parallel",
        ),
        args_parallel={"text": "$(id) ; 'q' \" \n ü"},
    )
    dataset = Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url=AWKWARD)])

    await process_workflow(workflow=flow(task), dataset=dataset, workflow_dir_local=tmp_path / "a run")

    [seen] = (tmp_path / "a run").rglob("*.seen")
    assert json.loads(seen.read_text()) == {"zarr_url": AWKWARD, "text": "$(id) ; 'q' \" \n ü"}
    assert seen.parent == tmp_path / "a run" / "0_______etc_x"
    assert not Path("/tmp/never").exists()


async def test_compound_tasks_hand_their_list_to_the_compute_units(tmp_path: Path) -> None:
    def init(*, zarr_dir: str, zarr_urls: list[str]) -> dict[str, Any]:
        items = [{"zarr_url": f"{url}_new", "init_args": {"origin": url}} for url in zarr_urls]
        return {"parallelization_list": items + items}

    def compute(*, zarr_url: str, init_args: dict[str, Any], n: int) -> dict[str, Any]:
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"n": n}, **init_args}]}

    task = Task(
        name="C",
        type="compound",
        function_non_parallel=init,
        function_parallel=compute,
        output_types={"is_3D": False},
    )
    dataset = Dataset(
        name="d",
        zarr_dir="/z",
        images=[Image(zarr_url="/z/a", attributes={"well": "A"}, types={"is_3D": True})],
    )
    workflow = flow(WorkflowTask(task=task, args_parallel={"n": 5}))

    after = await process_workflow(workflow=workflow, dataset=dataset, workflow_dir_local=tmp_path / "run")

    assert after.images[1] == Image(
        zarr_url="/z/a_new", origin="/z/a", attributes={"well": "A", "n": 5}, types={"is_3D": False}
    )
    assert len(after.images) == 2


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(2), processes], ids=["thread", "process"])
async def test_a_function_that_raises_is_a_task_error_with_its_traceback(
    tmp_path: Path, make: Callable[[], Executor]
) -> None:
    task = WorkflowTask(task=Task(name="F", function_parallel=break_some))

    with make() as executor:
        with pytest.raises(TaskExecutionError, match="LookupError: no such well") as caught:
            await process_workflow(
                workflow=flow(task), dataset=images(3), workflow_dir_local=tmp_path / "1", executor=executor
            )
        assert executor.submit(len, "ab").result(30) == 2  # the caller's executor is still the caller's

    assert "in break_some" in str(caught.value)
    own = caught.value.dataset.images[0].attributes["pid"] == os.getpid()
    assert own == isinstance(executor, ThreadPoolExecutor)


async def test_a_dead_worker_is_a_job_error(tmp_path: Path) -> None:
    task = WorkflowTask(task=Task(name="F", function_parallel=die))

    with processes(1) as executor, pytest.raises(JobExecutionError) as caught:
        await process_workflow(
            workflow=flow(task), dataset=images(1), workflow_dir_local=tmp_path / "1", executor=executor
        )

    assert caught.value.reason == "BROKEN_EXECUTOR"


async def test_an_executor_that_refuses_is_a_job_error(tmp_path: Path) -> None:
    with pytest.raises(JobExecutionError, match="closed for today") as caught:
        await process_workflow(
            workflow=flow(parallel("true")),
            dataset=images(3),
            workflow_dir_local=tmp_path / "1",
            executor=Refusing(),
        )

    assert len(caught.value.failures) == 3


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(2), processes], ids=["thread", "process"])
async def test_cancelling_ends_every_process_down_to_daemons_that_ignore_sigterm(
    tmp_path: Path, make: Callable[[], Executor]
) -> None:
    note = f"{tmp_path}/pid"
    script = f"trap '' TERM; echo $$ > {note}.$$; setsid sh -c 'echo $$ > {note}.$$; sleep 1000' & sleep 1000"
    with make() as executor:
        call = asyncio.ensure_future(
            process_workflow(
                workflow=flow(parallel(sh(script))),
                dataset=images(6),
                workflow_dir_local=tmp_path / "run",
                executor=executor,
                grace_s=0.3,
            )
        )
        await asyncio.to_thread(
            wait_for, lambda: len([p for p in tmp_path.glob("pid.*") if p.read_text().strip()]) == 4
        )
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert not [p for p in tmp_path.glob("pid.*") if runs(int(p.read_text()))]
        assert executor.submit(len, "ab").result(30) == 2
    assert (tmp_path / "run" / "shutdown").exists()


async def test_cancelling_ends_a_function_in_a_process(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    task = WorkflowTask(
        task=Task(name="F", function_parallel=sleep), args_parallel={"started": str(tmp_path / "s")}
    )
    call = asyncio.ensure_future(
        process_workflow(
            workflow=flow(task),
            dataset=images(4),
            workflow_dir_local=tmp_path / "run",
            executor=("process", {"max_workers": 2}),
            grace_s=0.3,
        )
    )
    await asyncio.to_thread(
        wait_for, lambda: len([p for p in (tmp_path / "s").iterdir() if p.read_text()]) == 2
    )

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    pids = [int(path.read_text()) for path in (tmp_path / "s").iterdir()]
    await asyncio.to_thread(wait_for, lambda: not any(map(runs, pids)), 10)


async def test_a_function_in_a_thread_is_reported_as_left_running(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def hang(*, zarr_url: str) -> None:
        began.set()
        may_end.wait(60)

    call = asyncio.ensure_future(
        process_workflow(
            workflow=flow(WorkflowTask(task=Task(name="F", function_parallel=hang))),
            dataset=images(1),
            workflow_dir_local=tmp_path / "run",
            grace_s=0.2,
        )
    )
    await asyncio.to_thread(began.wait, 30)
    call.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await call
        assert "unit 0 is left running" in caplog.text
    finally:
        may_end.set()


async def test_a_shutdown_file_stops_the_run(tmp_path: Path) -> None:
    call = asyncio.ensure_future(
        process_workflow(
            workflow=flow(parallel(sh(f"touch {tmp_path}/began; sleep 1000"))),
            dataset=images(3),
            workflow_dir_local=tmp_path / "run",
        )
    )
    await asyncio.to_thread(wait_for, (tmp_path / "began").exists)

    (tmp_path / "run" / "shutdown").touch()

    with pytest.raises(JobExecutionError) as caught:
        await call
    assert caught.value.reason == "CANCELLED"


async def test_a_timeout_in_the_meta_ends_the_unit(tmp_path: Path) -> None:
    task = parallel(sh("sleep 1000"), meta_parallel={"timeout": "1s"})

    with pytest.raises(JobExecutionError, match="longer than its timeout of 1 s") as caught:
        await process_workflow(workflow=flow(task), dataset=images(1), workflow_dir_local=tmp_path / "run")

    assert caught.value.reason == "TIMEOUT"


async def test_ten_thousand_units_in_flight_leave_the_loop_free(tmp_path: Path) -> None:
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            late.append(time.perf_counter() - due)

    ticker = asyncio.ensure_future(tick())
    seen: list[int] = []
    after = await process_workflow(
        workflow=flow(WorkflowTask(task=Task(name="F", function_parallel=nothing, output_types={"t": True}))),
        dataset=images(10_000),
        workflow_dir_local=tmp_path / "run",
        max_in_flight=10_000,
        on_event=lambda event: seen.append(event.index) if isinstance(event, UnitFinished) else None,
    )
    ticker.cancel()

    assert all(image.types == {"t": True} for image in after.images)
    assert sorted(seen) == list(range(10_000))
    assert sorted(late)[int(len(late) * 0.99)] < 1.0  # the real figure is a benchmark's
    assert len(list((tmp_path / "run" / "0_f").iterdir())) == 10  # a subfolder per thousand units


async def test_what_on_event_raises_is_logged_and_harmless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = threading.get_ident()
    threads = set()

    def on_event(event: object) -> None:
        threads.add(threading.get_ident())
        raise ValueError("a bad listener")

    await process_workflow(
        workflow=flow(parallel("true")),
        dataset=images(2),
        workflow_dir_local=tmp_path / "run",
        on_event=on_event,
    )

    assert "a bad listener" in caplog.text
    assert threads == {here}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"first_task_index": -1},
            "first_task_index=-1 is out of range: the workflow 'w' has 1 task, 0 to 0",
        ),
        ({"last_task_index": 1}, "last_task_index=1 is out of range"),
        ({"executor": "slurrm"}, "unknown executor 'slurrm'"),
        (
            {"executor": ("thread", {"max_workers": 0})},
            "max_workers must be greater than 0 and a whole number, not 0",
        ),
        ({"job_type_filters": {"is_3D": 1}}, "job_type_filters"),
        ({"job_attribute_filters": {"well": "A01"}}, "job_attribute_filters"),
        ({"job_attribute_filters": {"__wftask_dataset_image_status__": ["done"]}}, "history"),
        ({"on_failure": "retry"}, "on_failure='retry' is neither 'continue' nor 'stop'"),
        ({"max_in_flight": 0}, "max_in_flight=0"),
        ({"grace_s": -1}, "grace_s=-1"),
    ],
)
async def test_a_wrong_argument_is_a_value_error(tmp_path: Path, arguments: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        await process_workflow(
            workflow=flow(parallel("true")), dataset=images(1), workflow_dir_local=tmp_path / "r", **arguments
        )

    assert expected in str(caught.value)
    assert not (tmp_path / "r" / "0_t").exists()


async def test_an_unknown_argument_is_a_type_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'exectuor': did you mean 'executor'"):
        await process_workflow(
            workflow=flow(parallel("true")), dataset=images(1), workflow_dir_local=tmp_path, exectuor=1
        )


async def test_conflicting_filters_are_found_before_anything_runs(tmp_path: Path) -> None:
    last = WorkflowTask(
        task=Task(name="L", command_parallel="true", input_types={"a": True}), type_filters={"a": False}
    )

    with pytest.raises(ValueError, match="type_filters ask for a=False"):
        await process_workflow(
            workflow=flow(parallel("true"), last), dataset=images(1), workflow_dir_local=tmp_path / "run"
        )

    assert not (tmp_path / "run").exists()


async def test_a_program_that_is_not_there_is_named_before_any_unit_starts(tmp_path: Path) -> None:
    with pytest.raises(TaskExecutionError, match="'no-such-program' of command_parallel cannot be executed"):
        await process_workflow(
            workflow=flow(parallel(sh(f"touch {tmp_path}/ran")), parallel("no-such-program -x")),
            dataset=images(1),
            workflow_dir_local=tmp_path / "run",
        )

    assert not (tmp_path / "ran").exists()


async def test_an_empty_selection_is_a_job_error_with_the_filters(tmp_path: Path) -> None:
    with pytest.raises(JobExecutionError, match=r"Cannot run task 'T' for an empty image list .*is_3D"):
        await process_workflow(
            workflow=flow(parallel("true", input_types={"is_3D": True})),
            dataset=images(2),
            workflow_dir_local=tmp_path / "run",
        )


async def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"workflow": flow(parallel("true")), "dataset": images(1)}
    await process_workflow(**arguments, workflow_dir_local=tmp_path / "run")
    before = (tmp_path / "run" / "dataset.json").read_bytes()

    with pytest.raises(ValueError, match="already holds a run"):
        await process_workflow(**arguments, workflow_dir_local=tmp_path / "run")

    assert (tmp_path / "run" / "dataset.json").read_bytes() == before


async def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(JobExecutionError, match=f"Cannot use {directory} as the working directory"):
            await process_workflow(
                workflow=flow(parallel("true")), dataset=images(1), workflow_dir_local=directory
            )


@contextmanager
def tmpfs(where: Path, options: str) -> Iterator[Path]:
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True, timeout=30)


async def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "ro", "ro") as place,
        pytest.raises(JobExecutionError, match="Read-only file system"),
    ):
        await process_workflow(
            workflow=flow(parallel("true")), dataset=images(1), workflow_dir_local=place / "run"
        )


async def test_a_disk_that_fills_up_fails_the_units_it_could_not_hold(tmp_path: Path) -> None:
    task = WorkflowTask(task=Task(name="T", command_parallel="true"), args_parallel={"text": "x" * 20_000})
    with (
        tmpfs(tmp_path / "small", "size=128k") as place,
        pytest.raises(JobExecutionError, match="No space left on device") as caught,
    ):
        await process_workflow(
            workflow=flow(task),
            dataset=images(20),
            workflow_dir_local=place / "run",
            history=tmp_path / "elsewhere.sqlite",
        )

    assert "args.json" in " ".join(map(str, caught.value.failures)) or "dataset.json" in str(caught.value)


async def test_a_directory_that_was_removed_serves_another_run_of_the_same_workers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        for _ in range(2):
            await process_workflow(
                workflow=flow(parallel("true")),
                dataset=images(1),
                workflow_dir_local=tmp_path / "run",
                executor=executor,
            )
            assert len(list((tmp_path / "run" / "evidence").iterdir())) == 1
            shutil.rmtree(tmp_path / "run")
