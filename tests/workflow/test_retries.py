"""Units that are tried again: which, how often, with what, and what is left of each attempt."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    CallOptions,
    Executor,
    JobExecutionError,
    Task,
    TaskExecutionError,
    TaskInfo,
    TaskOutputValidationError,
    ThreadExecutor,
    UnitFinished,
    UnitRetried,
    UnitRunning,
    WorkflowTask,
)
from fractal_runner.executors.calls import Call
from fractal_runner.worker.processes import host_name, is_running

TRY = """
attempt = out.rpartition("try")[2].partition("-")[0] if "try" in out else "1"
print("attempt", attempt)
sys.stdout.flush()
"""
# Is killed unless it is the third attempt.
DIES_TWICE = TRY + "os.kill(os.getpid(), 9) if attempt != '3' else None\n"
FAILS_ONCE = TRY + "sys.exit(attempt == '1')\n"


class Noting(ThreadExecutor):
    """Notes what each call asks for, by its key's end."""

    def __init__(self) -> None:
        super().__init__(1)
        self.asked: list[tuple[str, CallOptions]] = []

    def _start(self, call: Call) -> None:
        self.asked.append((str(call.key).rpartition("/")[2], call.options))
        super()._start(call)


class Unlucky(Executor):
    """Runs each call where it is submitted, but fails those that it is told to."""

    asynchronous = True

    def __init__(self, fails: Callable[[Call], BaseException | None]) -> None:
        super().__init__(max_workers=1)
        self._fails = fails

    def _start(self, call: Call) -> None:
        if (error := self._fails(call)) is None:
            call.run()
        elif call.begin():
            call.fail(error)


def retrying(task: WorkflowTask, **meta: Any) -> WorkflowTask:
    return task.model_copy(update={"meta_parallel": meta})


async def test_a_unit_that_is_killed_is_not_tried_again_by_default(
    run: Any, parallel: Any, script: Any, query: Any
) -> None:
    with pytest.raises(JobExecutionError):
        await run(parallel(script(DIES_TWICE)))

    assert query("SELECT attempt FROM {units}") == [1]


async def test_a_unit_that_succeeds_in_the_end_leaves_no_failure(
    run: Any, parallel: Any, script: Any, images: Any, query: Any
) -> None:
    task = parallel(script(DIES_TWICE), meta_parallel={"retries": 2}, output_types={"t": True})

    after = await run(task, dataset=images(2))

    assert [image.types for image in after.images] == [{"t": True}] * 2
    assert query("SELECT state, error FROM {tasks}") == [("done", None)]
    assert query("SELECT status FROM {image_statuses}") == ["done"] * 2


async def test_the_history_holds_every_attempt_and_its_reason(
    run: Any, parallel: Any, script: Any, query: Any
) -> None:
    await run(parallel(script(DIES_TWICE), meta_parallel={"retries": 5}))

    columns = "attempt, is_last, state, returncode, signal, reason, log"
    rows = query(f"SELECT {columns} FROM {{units}} ORDER BY attempt")
    log = "0_t/par-000000-0000000"
    assert rows == [
        (1, 0, "failed", -9, "SIGKILL", "SIGKILL", f"{log}-log.txt"),
        (2, 0, "failed", -9, "SIGKILL", "SIGKILL", f"{log}-try2-log.txt"),
        (3, 1, "done", 0, None, None, f"{log}-try3-log.txt"),
    ]
    messages = query("SELECT message FROM {units} ORDER BY attempt")
    assert all("was killed by SIGKILL" in message for message in messages[:2])
    assert messages[2] is None


async def test_each_attempt_has_files_of_its_own(
    run: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    await run(parallel(script(DIES_TWICE), meta_parallel={"retries": 2}))

    folder = tmp_path / "run" / "0_t"
    for number, again in (1, ""), (2, "-try2"), (3, "-try3"):
        log = folder / f"par-000000-0000000{again}-log.txt"
        assert log.read_text() == f"attempt {number}\n"
        assert (folder / f"par-000000-0000000{again}-args.json").exists()


async def test_an_init_unit_is_tried_again_as_well(run: Any, script: Any, images: Any, query: Any) -> None:
    init = FAILS_ONCE + "write({'parallelization_list': [{'zarr_url': u} for u in args['zarr_urls']]})"
    task = Task(
        name="C",
        type="compound",
        command_non_parallel=script(init.replace("sys.exit", "attempt == '1' and sys.exit")),
        command_parallel="true",
    )
    meta = {"retries": 1, "retry_on": "any"}

    await run(WorkflowTask(task=task, meta_non_parallel=meta), dataset=images(2))

    rows = query("SELECT stage, number, attempt, state FROM {units} ORDER BY stage, number, attempt")
    assert rows == [
        ("non_par", 0, 1, "failed"),
        ("non_par", 0, 2, "done"),
        ("par", 0, 1, "done"),
        ("par", 1, 1, "done"),
    ]


async def test_when_all_attempts_have_failed_the_last_ones_error_is_raised(
    run: Any, parallel: Any, script: Any, tmp_path: Path, query: Any
) -> None:
    body = TRY + "os.kill(os.getpid(), 9) if attempt == '1' else sys.exit(int(attempt))"
    task = parallel(script(body), meta_parallel={"retries": 2, "retry_on": "any"})

    with pytest.raises(TaskExecutionError, match="exit code 3") as caught:
        await run(task)

    assert caught.value.returncode == 3
    assert caught.value.log_file == str(tmp_path / "run" / "0_t" / "par-000000-0000000-try3-log.txt")
    assert len(caught.value.failures) == 1
    assert query("SELECT attempt, is_last, state FROM {units} ORDER BY attempt") == [
        (1, 0, "failed"),
        (2, 0, "failed"),
        (3, 1, "failed"),
    ]


async def test_what_a_task_does_wrong_itself_is_not_tried_again_unless_it_is_to_be(
    run: Any, parallel: Any, script: Any, query: Any, tmp_path: Path
) -> None:
    task = parallel(script(FAILS_ONCE))
    with pytest.raises(TaskExecutionError):
        await run(retrying(task, retries=3))
    assert query("SELECT attempt FROM {units}") == [1]

    with pytest.raises(TaskExecutionError):
        await run(retrying(task, retries=3, retry_on="job"), workflow_dir_local=tmp_path / "job")
    await run(retrying(task, retries=3, retry_on="any"), workflow_dir_local=tmp_path / "any")

    asked = "SELECT attempt, state FROM {units} ORDER BY attempt"
    assert query(asked, path=tmp_path / "any" / "history.sqlite") == [(1, "failed"), (2, "done")]


@pytest.mark.parametrize("retry_on, attempts", [("job", 1), ("any", 2)])
async def test_output_that_is_not_valid_is_a_mistake_of_the_task(
    *, run: Any, parallel: Any, script: Any, query: Any, retry_on: str, attempts: int
) -> None:
    task = parallel(script("write({'wrong': 1})"), meta_parallel={"retries": 1, "retry_on": retry_on})

    with pytest.raises(TaskOutputValidationError):
        await run(task)

    assert query("SELECT count(*) FROM {units}") == [attempts]


async def test_a_timeout_is_from_outside(run: Any, parallel: Any, script: Any, query: Any) -> None:
    body = TRY + "time.sleep(1000) if attempt == '1' else None"
    task = parallel(script(body), meta_parallel={"retries": 1, "timeout": "1s"})

    await run(task, grace_s=0.2)

    assert query("SELECT attempt, state, reason FROM {units}") == [
        (1, "failed", "TIMEOUT"),
        (2, "done", None),
    ]


async def test_a_worker_that_dies_is_from_outside(run: Any, images: Any, query: Any, tmp_path: Path) -> None:
    def die_once(*, zarr_url: str, place: str) -> None:
        import os

        mark = Path(place) / zarr_url[-1]
        if not mark.exists():
            mark.touch()
            os._exit(1)

    task = WorkflowTask(
        task=Task(name="F", function_parallel=die_once),
        args_parallel={"place": str(tmp_path)},
        meta_parallel={"retries": 1},
    )

    await run(task, dataset=images(3), executor=("process", {"max_workers": 2}))

    assert query("SELECT attempt, state FROM {units} WHERE is_last") == [(2, "done")] * 3


async def test_what_cannot_even_be_submitted_is_tried_again(run: Any, parallel: Any, query: Any) -> None:
    class Refusing(ThreadExecutor):
        refused = 0

        def _start(self, call: Call) -> None:
            if self.refused < 2:
                self.refused += 1
                raise BrokenExecutor("not now")
            super()._start(call)

    with Refusing(1) as executor:
        await run(parallel(meta_parallel={"retries": 2}), executor=executor)

    assert query("SELECT state, reason FROM {units} ORDER BY attempt") == [
        *[("failed", "BROKEN_EXECUTOR")] * 2,
        ("done", None),
    ]


# What each attempt asks for.


async def test_memory_and_time_may_grow_from_attempt_to_attempt(run: Any, parallel: Any, script: Any) -> None:
    meta = {"retries": 4, "retry_on": "any", "mem": ["1M", "2M", 4], "time": ["1h", "2h"], "cpus_per_task": 1}
    with Noting() as executor, pytest.raises(TaskExecutionError):
        await run(parallel("false", meta_parallel=meta), executor=executor)

    beginning = "par-000000-0000000"
    asked = [(key.removeprefix(beginning), o.memory, o.time) for key, o in executor.asked]
    mega = 10**6
    assert asked == [
        ("", mega, 3600),
        ("-try2", 2 * mega, 7200),
        ("-try3", 4 * mega, 7200),
        ("-try4", 4 * mega, 7200),
        ("-try5", 4 * mega, 7200),
    ]


async def test_one_value_is_for_all_attempts(run: Any, parallel: Any) -> None:
    meta = {"retries": 1, "retry_on": "any", "mem": "1M"}
    with Noting() as executor, pytest.raises(TaskExecutionError):
        await run(parallel("false", meta_parallel=meta), executor=executor)

    assert [options.memory for _, options in executor.asked] == [10**6] * 2


async def test_a_resume_begins_with_the_first_value_again(run: Any, parallel: Any) -> None:
    task = parallel("false", meta_parallel={"retries": 1, "retry_on": "any", "mem": ["1M", "2M"]})
    for resume in (False, True):
        with Noting() as executor, pytest.raises(TaskExecutionError):
            await run(task, executor=executor, resume=resume)

    asked = [(key.rpartition("-")[2], options.memory) for key, options in executor.asked]
    assert asked == [("try3", 10**6), ("try4", 2 * 10**6)]


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_the_next_attempt_may_be_kept_off_the_node_that_failed(
    run: Any, parallel: Any, elsewhere: bool
) -> None:
    meta = {"retries": 2, "retry_on": "any", "retry_elsewhere": elsewhere}
    with Noting() as executor, pytest.raises(TaskExecutionError):
        await run(parallel("false", meta_parallel=meta), executor=executor)

    excluded = [dict(options.extra) for _, options in executor.asked]
    there = {"exclude": host_name()} if elsewhere else {}
    assert excluded == [{}, there, there]


# When nothing is tried again any more.


@pytest.fixture
def dying(parallel: Any, script: Any, notes: Path) -> WorkflowTask:
    """Notes each attempt; dies once it is told to stop, or to die."""
    body = """
open(args["notes"] + f"/{number}-" + os.path.basename(out), "w").close()
while not os.path.exists(args["notes"] + "/die"):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    task: WorkflowTask = parallel(
        script(body), args_parallel={"notes": str(notes)}, meta_parallel={"retries": 50, "retry_on": "any"}
    )
    return task


def attempts(notes: Path) -> int:
    return len(list(notes.glob("*metadiff*")))


async def test_nothing_is_tried_again_once_the_run_is_cancelled(
    run: Any, dying: Any, notes: Path, until: Any, query: Any
) -> None:
    call = asyncio.ensure_future(run(dying, grace_s=0.2))
    await until(lambda: attempts(notes) == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert attempts(notes) == 1
    assert query("SELECT attempt, state FROM {units}") == [(1, "cancelled")]


async def test_nothing_is_tried_again_once_the_run_is_told_to_stop(
    run: Any, dying: Any, notes: Path, until: Any, tmp_path: Path
) -> None:
    call = asyncio.ensure_future(run(dying, grace_s=0.2))
    await until(lambda: attempts(notes) == 1)
    (tmp_path / "run" / "shutdown").touch()
    with pytest.raises(JobExecutionError) as caught:
        await call

    assert caught.value.reason == "CANCELLED"
    assert attempts(notes) == 1


async def test_nothing_is_tried_again_once_the_run_is_drained(
    run: Any, dying: Any, notes: Path, until: Any, query: Any
) -> None:
    drain = threading.Event()
    call = asyncio.ensure_future(run(dying, drain=drain))
    await until(lambda: attempts(notes) == 1)
    drain.set()
    (notes / "die").touch()
    with pytest.raises(JobExecutionError) as caught:
        await call

    assert caught.value.returncode == -9  # the unit's own failure, not that of a unit that never ran
    assert attempts(notes) == 1


async def test_a_unit_that_waits_for_its_next_attempt_when_the_run_is_drained_has_failed(
    run: Any, images: Any, query: Any
) -> None:
    drain = threading.Event()
    first_failed = threading.Event()

    def fails(call: Call) -> BaseException | None:
        if str(call.key).endswith("0000000"):
            first_failed.set()
            return BrokenExecutor("the node went away")
        return None

    def work(*, zarr_url: str) -> None: ...

    def on_event(event: Any) -> None:
        if isinstance(event, UnitRetried):
            told.append(event.index)
        if isinstance(event, UnitFinished):
            told.append((event.index, event.succeeded))

    class Draining(Unlucky):
        def _start(self, call: Call) -> None:
            if str(call.key).endswith("-try2"):
                drain.set()
                return  # it waits, and is never begun
            super()._start(call)

    told: list[Any] = []
    task = WorkflowTask(task=Task(name="F", function_parallel=work), meta_parallel={"retries": 1})
    with pytest.raises(JobExecutionError) as caught:
        await run(task, dataset=images(2), executor=Draining(fails), drain=drain, on_event=on_event)

    assert caught.value.reason == "BROKEN_EXECUTOR"
    assert [failure.unit_index for failure in caught.value.failures] == [0, None][
        : len(caught.value.failures)
    ]
    assert 0 in told
    assert (0, False) in told
    rows = query("SELECT attempt, state, reason FROM {units} WHERE number = 0 ORDER BY attempt")
    assert rows == [(1, "failed", "BROKEN_EXECUTOR"), (2, "cancelled", "NEVER_STARTED")]
    assert query("SELECT status FROM {image_statuses} ORDER BY zarr_url") == ["failed", "done"]


async def test_stopping_at_a_failure_waits_for_the_last_attempt(
    run: Any, parallel: Any, script: Any, images: Any, query: Any
) -> None:
    body = TRY + "sys.exit(number == 0 and attempt == '1')"
    task = parallel(script(body), meta_parallel={"retries": 1, "retry_on": "any"})

    await run(task, dataset=images(5), executor=("thread", {"max_workers": 1}), on_failure="stop")

    assert query("SELECT count(*) FROM {units} WHERE state = 'done'") == [5]


async def test_once_a_unit_has_failed_for_good_others_are_not_tried_again_and_have_failed_too(
    run: Any, images: Any, query: Any
) -> None:
    def fails(call: Call) -> BaseException | None:
        return BrokenExecutor("the node went away")

    def work(*, zarr_url: str) -> None: ...

    task = WorkflowTask(task=Task(name="F", function_parallel=work), meta_parallel={"retries": 1})
    told: list[Any] = []
    with pytest.raises(JobExecutionError) as caught:
        await run(
            task,
            dataset=images(3),
            executor=Unlucky(fails),
            on_failure="stop",
            max_in_flight=2,
            on_event=lambda event: told.append(event) if isinstance(event, UnitFinished) else None,
        )

    indices = [failure.unit_index for failure in caught.value.failures]
    failed = query("SELECT DISTINCT number FROM {units} WHERE state = 'failed' ORDER BY number")
    assert indices == failed  # whatever has failed is told
    assert sorted(event.index for event in told) == indices


# The meta.


BAD = [
    ("retries", -1),
    ("retries", "many"),
    ("retries", 1.5),
    ("retries", True),
    ("retry_on", "all"),
    ("retry_on", True),
    ("retry_on", ["any"]),
    ("retry_elsewhere", "yes"),
    ("retry_elsewhere", 1),
    ("rerunnable", 0),
    ("mem", []),
    ("mem", ["1G", "lots"]),
    ("time", [-1]),
    ("time", ["1h", None]),
]


@pytest.mark.parametrize("key, value", BAD, ids=str)
async def test_a_value_that_is_none_is_an_error_that_names_task_key_and_value(
    run: Any, parallel: Any, tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(ValueError) as caught:
        await run(parallel(), parallel(name="Second", meta_parallel={key: value}))

    wrong = value[-1] if isinstance(value, list) and value and key in ("mem", "time") else value
    message = str(caught.value)
    assert f"Task 1 ('Second'): meta_parallel.{key}: " in message
    assert repr(wrong) in message or "empty list" in message
    assert not (tmp_path / "run" / "run.json").exists()


async def test_meta_of_the_workflow_task_comes_before_that_of_the_task(run: Any, query: Any) -> None:
    task = Task(name="T", command_parallel="false", meta_parallel={"retries": 5, "retry_on": "any"})

    with pytest.raises(TaskExecutionError):
        await run(WorkflowTask(task=task, meta_parallel={"retries": 1}))

    assert query("SELECT count(*) FROM {units}") == [2]


async def test_attempts_that_an_executor_still_lists_after_their_end_do_no_harm(
    run: Any, images: Any, query: Any
) -> None:
    """As calls are that were left running in their thread."""
    second_runs = threading.Event()

    class Listing(ThreadExecutor):
        def tasks(self) -> list[TaskInfo]:
            ended = [
                TaskInfo(id=n, name="F", state="left running", submitted=1, started=1, key=k) for n, k in keys
            ]
            return super().tasks() + ended

        def _start(self, call: Call) -> None:
            keys.append((call.id, str(call.key)))
            super()._start(call)

    def work(*, zarr_url: str) -> None:
        if not failed:
            failed.append(1)
            raise ValueError("the first one fails")
        second_runs.wait(30)

    def on_event(event: Any) -> None:
        if isinstance(event, UnitRunning):
            seen.append(event.attempt)
            second_runs.set()

    keys: list[tuple[int, str]] = []
    failed: list[int] = []
    seen: list[int] = []
    meta = {"retries": 1, "retry_on": "any"}
    with Listing(1) as executor:
        await run(
            WorkflowTask(task=Task(name="F", function_parallel=work), meta_parallel=meta),
            executor=executor,
            on_event=on_event,
        )

    assert seen == [2]
    assert query("SELECT attempt, state FROM {units} ORDER BY attempt") == [(1, "failed"), (2, "done")]


async def test_an_attempt_that_still_runs_where_it_cannot_be_ended_is_not_tried_again(
    run: Any, images: Any, query: Any
) -> None:
    may_end = threading.Event()
    calls = []

    def stay(*, zarr_url: str) -> None:
        calls.append(zarr_url)
        may_end.wait(60)

    task = WorkflowTask(
        task=Task(name="F", function_parallel=stay), meta_parallel={"timeout": "0.2s", "retries": 3}
    )
    try:
        with pytest.raises(JobExecutionError, match="left running"):
            await run(task, dataset=images(1), executor="thread")
    finally:
        may_end.set()

    assert calls == ["/z/0"]


async def test_the_command_of_a_worker_that_died_is_ended_before_it_is_tried_again(
    *, run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path, until: Any
) -> None:
    body = f"""
place = {str(tmp_path)!r}
first = not os.path.exists(place + "/first")
with open(place + ("/first" if first else "/second"), "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, file.name + "-noted") if first else None
open(place + "/first", "w").close()
if first:
    with open(place + "/worker", "w") as file:
        file.write(str(os.getppid()))
    os.rename(file.name, place + "/worker-noted")
    time.sleep(600)
"""
    task = parallel(script(body), meta_parallel={"retries": 1})
    call = asyncio.ensure_future(run(task, dataset=images(1), executor="process", grace_s=0.3))
    await until((tmp_path / "worker-noted").exists)
    command = int((tmp_path / "first-noted").read_text())

    os.kill(int((tmp_path / "worker-noted").read_text()), signal.SIGKILL)
    await call

    assert (tmp_path / "second").exists()
    assert not is_running(command)
