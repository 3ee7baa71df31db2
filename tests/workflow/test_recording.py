"""What a run leaves in its history: everything, with the right values, and before anybody is told."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sqlite3
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

import fractal_runner
from fractal_runner import (
    Dataset,
    Event,
    History,
    JobExecutionError,
    RunFinished,
    RunStarted,
    Task,
    TaskExecutionError,
    TaskFinished,
    ThreadExecutor,
    UnitFinished,
    UnitRunning,
    UnitSubmitted,
    WorkflowTask,
)
from fractal_runner.worker.processes import host_name

# Uses half a second of CPU time and 60 MB; number 1 fails, 2 is killed, 3 waits for its end.
WORKING = """
import signal
if number == 0:
    block = b"x" * 60_000_000
    while time.process_time() < 0.3:
        pass
    write({"image_list_updates": [{"zarr_url": url, "attributes": {"n": 1, "gone": None}}]})
    open(args["notes"] + "/0", "w").write(str(os.getpid()))
elif number == 1:
    print("it goes wrong")
    open(args["notes"] + "/1", "w").close()
    sys.exit(3)
elif number == 2:
    open(args["notes"] + "/2", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
else:
    open(args["notes"] + "/3", "w").close()
    time.sleep(1000)
"""


def unpacked(data: bytes) -> Any:
    return json.loads(zlib.decompress(data))


def record(query: Any, table: str, columns: str, where: str = "1") -> dict[str, Any]:
    """One row, by column."""
    (row,) = query(f"SELECT {columns} FROM {{{table}}} WHERE {where}")
    return dict(zip(columns.split(", "), row, strict=True))


@pytest.fixture
async def stopped(
    *, run: Any, parallel: Any, script: Any, images: Any, notes: Path, until: Any, tmp_path: Path, query: Any
) -> Any:
    """A run of a unit that succeeds, one that fails, one that is killed, and one that is cancelled."""
    task = parallel(script(WORKING), name="Work on it", args_parallel={"notes": str(notes)})
    before = time.time()
    call = asyncio.ensure_future(
        run(
            task,
            dataset=images(4),
            job_id="job 5",
            user_id=17,
            executor=("thread", {"max_workers": 4}),
            job_type_filters={"x": False},
            job_attribute_filters={},
            grace_s=0.2,
        )
    )
    await until(lambda: len(list(notes.glob("?"))) == 4)
    ended = "SELECT count(*) FROM {units} WHERE state IN ('done', 'failed')"
    await until(lambda: query(ended) == [3])
    (tmp_path / "run" / "shutdown").touch()
    with pytest.raises((JobExecutionError, TaskExecutionError)):
        await call
    return before, time.time()


async def test_of_a_run_everything_is_recorded_as_it_was_given(
    run: Any, stopped: Any, query: Any, images: Any, tmp_path: Path
) -> None:
    before, after = stopped
    names = "state, directory, host, started, ended, resumed, workflow_name, dataset_name, dataset_key"
    row = record(query, "runs", names)
    assert row.pop("started") == pytest.approx(before, abs=after - before)
    assert before < row.pop("ended") <= after
    assert row == {
        "state": "failed",  # units had failed before it was stopped
        "directory": str(tmp_path / "run"),
        "host": host_name(),
        "resumed": 0,
        "workflow_name": "w",
        "dataset_name": "d",
        "dataset_key": "zarr_dir:/z",
    }
    names = "first_task, last_task, job_id, user_id, type_filters, attribute_filters, executor"
    row = record(query, "runs", names)
    assert (row["first_task"], row["last_task"]) == (0, 0)
    assert (row["job_id"], row["user_id"]) == ("job 5", "17")
    assert json.loads(row["type_filters"]) == {"x": False}
    assert json.loads(row["attribute_filters"]) == {}
    assert json.loads(row["executor"]) == ["thread", {"max_workers": 4}]
    row = record(query, "runs", "workflow, dataset, versions, error")
    assert json.loads(row["workflow"])["task_list"][0]["task"]["name"] == "Work on it"
    assert Dataset.model_validate(unpacked(row["dataset"])) == images(4)
    versions = json.loads(row["versions"])
    assert versions["fractal-runner"] == fractal_runner.__version__
    assert versions["python"] == platform.python_version()
    assert "Task 0 ('Work on it')" in row["error"]


async def test_of_a_task_everything_is_recorded(stopped: Any, query: Any) -> None:
    before, after = stopped
    names = "position, task_order, name, type, task_key, state, images, units, dataset"
    names += ", type_filters, started, ended"
    row = record(query, "tasks", names)
    assert before <= row.pop("started") <= row.pop("ended") <= after
    assert json.loads(row.pop("type_filters")) == {"x": False}
    assert row == {
        "position": 0,
        "task_order": 0,
        "name": "Work on it",
        "type": "parallel",
        "task_key": 'task:[0, null, "Work on it"]',
        "state": "failed",
        "images": 4,
        "units": 4,
        "dataset": None,
    }
    statuses = query("SELECT zarr_url, status FROM {image_statuses} ORDER BY zarr_url")
    assert statuses == [("/z/0", "done"), ("/z/1", "failed"), ("/z/2", "failed"), ("/z/3", "failed")]


async def test_of_each_unit_everything_is_recorded(stopped: Any, query: Any, notes: Path) -> None:
    before, after = stopped
    names = "number, stage, attempt, is_last, state, zarr_url, returncode, signal, reason, host, job_id, log"
    found = [record(query, "units", names, f"number = {number}") for number in range(4)]

    common = {"stage": "par", "attempt": 1, "is_last": 1, "host": host_name(), "job_id": None}
    ends = [("done", 0, None, None), ("failed", 3, None, None), ("failed", -9, "SIGKILL", "SIGKILL")]
    ends.append(("cancelled", -15, "SIGTERM", "CANCELLED"))
    for number, (state, code, signal, reason) in enumerate(ends):
        assert found[number] == {
            **common,
            "number": number,
            "state": state,
            "zarr_url": f"/z/{number}",
            "returncode": code,
            "signal": signal,
            "reason": reason,
            "log": f"0_work_on_it/par-000000-000000{number}-log.txt",
        }
    for submitted, started, ended in query("SELECT submitted, started, ended FROM {units}"):
        assert before <= submitted <= started <= ended <= after
    digests = query("SELECT digest FROM {units}")
    assert len(set(digests)) == 4
    assert {len(digest) for digest in digests} == {32}
    done = record(query, "units", "pid, cpu_s, peak_bytes, message, output", "number = 0")
    assert done["pid"] == int((notes / "0").read_text())
    assert 0.3 <= done["cpu_s"] < 10
    assert 60_000_000 <= done["peak_bytes"] < 500_000_000
    assert done["message"] is None
    assert json.loads(done["output"]) == {
        "image_list_updates": [{"zarr_url": "/z/0", "attributes": {"n": 1, "gone": None}}]
    }
    failed = record(query, "units", "pid, cpu_s, message, output", "number = 1")
    assert "exit code 3" in failed["message"]
    assert "it goes wrong" in failed["message"]
    assert failed["output"] is None
    assert failed["cpu_s"] > 0
    assert "was killed by SIGKILL" in query("SELECT message FROM {units} WHERE number = 2")[0]


async def test_units_of_one_task_over_one_image_have_digests_by_what_they_do(
    run: Any, query: Any, tmp_path: Path
) -> None:
    def work(*, zarr_url: str, x: int) -> None: ...

    def task(x: int, name: str) -> WorkflowTask:
        return WorkflowTask(task=Task(name=name, function_parallel=work), args_parallel={"x": x})

    await run(task(1, "A"), task(2, "A"), task(1, "B"))

    first, second, third = query("SELECT digest FROM {units} ORDER BY position")
    assert first == third != second


async def test_an_executor_that_was_not_given_by_name_is_not_named(
    run: Any, parallel: Any, query: Any
) -> None:
    with ThreadExecutor(1) as executor:
        await run(parallel(), executor=executor)

    assert query("SELECT executor FROM {runs}") == [None]


async def test_a_function_in_a_process_is_recorded_with_what_it_used(run: Any, query: Any) -> None:
    def work(*, zarr_url: str) -> dict[str, Any]:
        began = time.thread_time()
        while time.thread_time() < began + 0.1:
            pass
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"pid": os.getpid()}}]}

    after = await run(Task(name="F", function_parallel=work), executor=("process", {"max_workers": 1}))

    ((pid, cpu_s, host),) = query("SELECT pid, cpu_s, host FROM {units}")
    assert pid == after.images[0].attributes["pid"]
    assert cpu_s >= 0.05
    assert host == host_name()


async def test_a_dataset_after_a_task_is_recorded_with_the_tasks_end_and_never_without(
    run: Any, images: Any, tmp_path: Path
) -> None:
    path = tmp_path / "history.sqlite"
    seen: list[list[tuple[str, bool, int]]] = []

    def look(when: str) -> None:
        if when == "after":
            with sqlite3.connect(path, timeout=30) as database:
                rows = database.execute(
                    "SELECT state, dataset FROM fractal_runner_tasks ORDER BY position"
                ).fetchall()
                units = database.execute(
                    "SELECT count(*) FROM fractal_runner_units WHERE state = 'done'"
                ).fetchone()
            database.close()
            seen.append(
                [(s, d is not None and unpacked(d)["images"][0]["types"] != {}, units[0]) for s, d in rows]
            )

    def work(*, zarr_url: str) -> None: ...

    tasks = [Task(name=name, function_parallel=work, output_types={name: True}) for name in "ab"]
    with History(path) as history:
        history.close()
    with History(path, at_commit=look) as history:
        await run(*tasks, dataset=images(3), history=history)

    states = {tuple((state, has) for state, has, _ in rows) for rows in seen}
    assert states <= {
        (),
        (("running", False),),
        (("done", True),),
        (("done", True), ("running", False)),
        (("done", True), ("done", True)),
    }
    assert (("done", True), ("running", False)) in states
    # Its units are recorded by then, too.
    assert all(rows[0][2] >= 3 for rows in seen if rows and rows[0][0] == "done")
    assert seen[-1][1][:2] == ("done", True)


@pytest.mark.parametrize("executor", ["thread", "serial"])
async def test_a_unit_is_told_of_only_once_its_row_says_the_same(
    *, run: Any, parallel: Any, script: Any, images: Any, query: Any, executor: str
) -> None:
    body = "sys.exit(number == 1 and 'try2' not in out)"
    task = parallel(script(body), meta_parallel={"retries": 1, "retry_on": "any"})
    told: list[tuple[str, Any]] = []

    def on_event(event: Event) -> None:
        if isinstance(event, (UnitSubmitted, UnitFinished)):
            where = "SELECT state FROM {units} WHERE number = ? AND attempt = ?"
            told.append((type(event).__name__, query(where, event.index, event.attempt)))
        if isinstance(event, RunStarted):
            told.append(("RunStarted", query("SELECT state FROM {runs} WHERE id = ?", event.run_id)))
        if isinstance(event, TaskFinished):
            told.append(("TaskFinished", query("SELECT state FROM {tasks}")))
        if isinstance(event, RunFinished):
            told.append(("RunFinished", query("SELECT state FROM {runs}")))

    await run(task, dataset=images(3), on_event=on_event, executor=executor)

    assert [row for what, row in told if what == "UnitFinished"] == [["done"]] * 3
    assert all(row for what, row in told if what == "UnitSubmitted")
    assert told[0] == ("RunStarted", ["running"])
    assert told[-2:] == [("TaskFinished", ["done"]), ("RunFinished", ["done"])]


async def test_a_unit_that_is_told_to_run_is_recorded_as_running(run: Any, images: Any, query: Any) -> None:
    may_end = threading.Event()
    told: list[Any] = []

    def work(*, zarr_url: str) -> None:
        may_end.wait(30)

    def on_event(event: Event) -> None:
        if isinstance(event, UnitRunning):
            told.append(query("SELECT state, host, pid FROM {units} WHERE number = ?", event.index)[0])
            told.append(("running", event.host, event.pid))
            may_end.set()

    await run(Task(name="F", function_parallel=work), dataset=images(1), on_event=on_event)

    assert told == [("running", host_name(), os.getpid())] * 2


# How runs end.


def states(query: Any) -> tuple[list[str], list[str]]:
    return query("SELECT state FROM {runs}"), query("SELECT state FROM {tasks} ORDER BY position")


async def test_a_run_that_succeeds_is_done(run: Any, parallel: Any, query: Any) -> None:
    await run(parallel(), parallel())

    assert states(query) == (["done"], ["done", "done"])
    assert query("SELECT error FROM {runs}") in ([None], [""])


async def test_a_run_of_which_a_unit_fails_has_failed(run: Any, parallel: Any, query: Any) -> None:
    with pytest.raises(TaskExecutionError) as caught:
        await run(parallel(), parallel("false"), parallel())

    assert states(query) == (["failed"], ["done", "failed"])
    assert query("SELECT error FROM {runs}") == [str(caught.value)]


async def test_a_run_whose_outputs_cannot_be_merged_has_failed(
    run: Any, parallel: Any, script: Any, query: Any
) -> None:
    with pytest.raises(JobExecutionError):
        await run(parallel(script("write({'image_list_removals': ['/z/9']})")))

    assert states(query) == (["failed"], ["failed"])
    assert query("SELECT state FROM {units}") == ["done"]
    assert query("SELECT status FROM {image_statuses}") == ["failed"]


async def test_a_run_without_images_for_a_task_has_failed(run: Any, parallel: Any, query: Any) -> None:
    with pytest.raises(JobExecutionError, match="empty image list"):
        await run(parallel(), parallel(input_types={"x": True}))

    assert states(query) == (["failed"], ["done"])


async def test_a_run_that_is_cancelled_is_cancelled(
    *, run: Any, parallel: Any, notes: Path, script: Any, until: Any, query: Any
) -> None:
    body = "open(args['notes'] + '/began', 'w').close(); time.sleep(1000)"
    call = asyncio.ensure_future(
        run(parallel(script(body), args_parallel={"notes": str(notes)}), grace_s=0.2)
    )
    await until((notes / "began").exists)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert states(query) == (["cancelled"], ["cancelled"])
    assert query("SELECT state, reason FROM {units}") == [("cancelled", "CANCELLED")]


async def test_a_run_that_its_file_stops_is_cancelled(
    *, run: Any, parallel: Any, notes: Path, script: Any, until: Any, query: Any, tmp_path: Path
) -> None:
    body = "open(args['notes'] + '/began', 'w').close(); time.sleep(1000)"
    call = asyncio.ensure_future(
        run(parallel(script(body), args_parallel={"notes": str(notes)}), grace_s=0.2)
    )
    await until((notes / "began").exists)
    (tmp_path / "run" / "shutdown").touch()
    with pytest.raises(JobExecutionError):
        await call

    assert states(query) == (["cancelled"], ["cancelled"])


async def test_a_run_in_which_a_unit_failed_before_it_was_stopped_has_failed(
    stopped: Any, query: Any
) -> None:
    assert states(query) == (["failed"], ["failed"])


async def test_a_drained_run_is_cancelled_and_what_had_not_started_never_did(
    run: Any, images: Any, query: Any
) -> None:
    drain = threading.Event()

    def work(*, zarr_url: str) -> None:
        drain.set()

    with pytest.raises(JobExecutionError) as caught:
        await run(
            Task(name="F", function_parallel=work),
            dataset=images(100),
            executor=("thread", {"max_workers": 1}),
            drain=drain,
        )

    assert caught.value.reason == "CANCELLED"
    assert states(query) == (["cancelled"], ["cancelled"])
    found = query("SELECT state, reason, count(*) FROM {units} GROUP BY state, reason ORDER BY state")
    assert [(state, reason) for state, reason, _ in found] == [("cancelled", "NEVER_STARTED"), ("done", None)]


async def test_a_resumed_run_that_succeeds_has_no_error_any_more(
    run: Any, parallel: Any, script: Any, query: Any, tmp_path: Path
) -> None:
    task = parallel(script(f"sys.exit(not os.path.exists({str(tmp_path)!r} + '/may'))"))
    with pytest.raises(TaskExecutionError):
        await run(task, job_id=1)
    (tmp_path / "may").touch()

    await run(task, job_id=1, resume=True)

    assert query("SELECT state, resumed, ifnull(error, '') FROM {runs}") == [("done", 1, "")]
    assert query("SELECT state, error FROM {tasks}") == [("done", None)]


async def test_what_is_wrong_before_anything_runs_leaves_no_run(
    run: Any, parallel: Any, tmp_path: Path
) -> None:
    with pytest.raises(TaskExecutionError):
        await run(parallel("/no/such/program"))

    assert not (tmp_path / "run" / "history.sqlite").exists()


async def test_an_error_that_no_database_takes_as_it_is_can_be_recorded_and_resumed(
    run: Any, images: Any, query: Any
) -> None:
    bad = True

    def name_a_file(*, zarr_url: str) -> None:
        if bad and zarr_url == "/z/1":
            raise ValueError(os.fsdecode(b"no such file: a\xff") + " and a \0")

    task = Task(name="F", function_parallel=name_a_file, output_types={"t": True})
    with pytest.raises(TaskExecutionError, match="no such file"):
        await run(task, dataset=images(2))
    bad = False
    after = await run(task, dataset=images(2), resume=True)

    assert [image.types for image in after.images] == [{"t": True}] * 2
