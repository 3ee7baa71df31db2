"""The coordinator of a run is killed: what it has left is found, believed or ended, and the run goes on."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    Image,
    JobExecutionError,
    Task,
    TaskExecutionError,
    UnitFinished,
    WorkflowTask,
)
from fractal_runner.worker import evidence
from fractal_runner.workflow import recovery
from tests.workflow.outliving import Outliving

NOTE = """
def note(word):
    line = f"{number} {os.getpid()} {word} {time.monotonic_ns()}\\n".encode()
    fd = os.open(args["notes"] + "/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, line)
    os.close(fd)
def stay():
    while not os.path.exists(args["notes"] + "/may"):
        time.sleep(0.01)
"""
# Notes when it starts and ends; number 1 stays until it may end.
WAITING = f"""{NOTE}
note("start")
if number == 1:
    stay()
write({{"image_list_updates": [{{"zarr_url": url, "attributes": {{"n": number}}}}]}})
note("end")
"""
# Number 1 does not end when it is asked to, nor does it in less than a minute.
STUBBORN = f"""{NOTE}
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("start")
if number == 1 and not os.path.exists(args["notes"] + "/may"):
    for _ in range(6000):
        time.sleep(0.01)
        note("alive")
note("end")
"""


@pytest.fixture
def noting(parallel: Any, script: Any, notes: Path) -> Any:
    """A parallel task of such a script."""

    def make(body: str = WAITING, **more: Any) -> WorkflowTask:
        task: WorkflowTask = parallel(script(body), args_parallel={"notes": str(notes)}, **more)
        return task

    return make


def lines(notes: Path, word: str = "") -> list[tuple[int, int, str, int]]:
    """What the units have noted: number, pid, word, time."""
    log = notes / "log"
    found = [line.split() for line in (log.read_text().splitlines() if log.exists() else ())]
    return [(int(n), int(pid), said, int(at)) for n, pid, said, at in found if word in said]


def numbers(notes: Path, word: str) -> list[int]:
    return sorted(line[0] for line in lines(notes, word))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def killed(coordinator: Any, notes: Path, until: Any, query: Any) -> Any:
    """Starts a run in another process, and kills it once these units have noted that they started."""

    async def call(*tasks: Any, started: list[int], ended: list[int] = [], **more: Any) -> None:  # noqa: B006
        process = coordinator(*tasks, **more)
        await until(lambda: numbers(notes, "start") == started and numbers(notes, "end") == ended)
        # The history lags behind by up to 50 ms.
        recorded = "SELECT state IN ('done', 'failed') FROM {units} WHERE position = ?"
        position = len(tasks) - 1

        def has_caught_up() -> bool:
            states = query(recorded, position)
            return len(states) >= len(started) and sum(states) == len(ended)

        await until(has_caught_up)
        process.kill()

    return call


async def test_a_unit_that_was_in_flight_runs_again_and_those_that_had_ended_do_not(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path, query: Any
) -> None:
    task = noting()
    await killed(task, dataset=images(3), started=[0, 1, 2], ended=[0, 2])
    assert query("SELECT state FROM {runs}") == ["running"]
    (notes / "may").touch()

    after = await run(task, dataset=images(3), resume=True, grace_s=0.2)

    assert numbers(notes, "start") == [0, 1, 1, 2]
    assert [image.attributes for image in after.images] == [{"n": 0}, {"n": 1}, {"n": 2}]
    attempts = query("SELECT number, attempt, state, reason, is_last FROM {units} ORDER BY number, attempt")
    assert attempts == [
        (0, 1, "done", None, 1),
        (1, 1, "cancelled", "UNKNOWN_OUTCOME", 0),
        (1, 2, "done", None, 1),
        (2, 1, "done", None, 1),
    ]
    assert query("SELECT state, resumed FROM {runs}") == [("done", 1)]


async def test_what_is_left_of_a_unit_is_ended_before_it_runs_again(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path
) -> None:
    task = noting(STUBBORN)
    await killed(task, dataset=images(2), started=[0, 1], ended=[0])
    (pid,) = {line[1] for line in lines(notes, "start") if line[0] == 1}
    assert is_running(pid)  # it has survived its coordinator
    (notes / "may").touch()

    await run(task, dataset=images(2), resume=True, grace_s=0.2)

    assert not is_running(pid)
    of_first = [at for _, which, _, at in lines(notes) if which == pid]
    of_second = [at for number, which, _, at in lines(notes) if number == 1 and which != pid]
    assert max(of_first) < min(of_second)
    assert numbers(notes, "start") == [0, 1, 1]


async def test_what_is_left_of_a_task_that_was_left_out_is_ended_as_well(
    *, run: Any, killed: Any, noting: Any, parallel: Any, images: Any, notes: Path, query: Any
) -> None:
    first, second = parallel(output_types={"t": True}), noting(STUBBORN)
    await killed(first, second, dataset=images(2), started=[0, 1], ended=[0])
    pids = {line[1] for line in lines(notes, "start") if line[0] == 1}

    after = await run(first, second, dataset=images(2), last_task_index=0, resume=True, grace_s=0.2)

    assert [image.types for image in after.images] == [{"t": True}] * 2
    assert not any(map(is_running, pids))
    assert query("SELECT state FROM {tasks} ORDER BY position") == ["done", "cancelled"]
    assert query("SELECT state FROM {units} WHERE is_last AND position = 1") == []
    assert query("SELECT DISTINCT state FROM {units}") in (["done", "cancelled"], ["cancelled", "done"])


async def test_what_is_left_of_units_that_are_no_more_is_ended_as_well(
    *, run: Any, killed: Any, noting: Any, notes: Path, query: Any
) -> None:
    items = [Image(zarr_url="/z/0"), Image(zarr_url="/z/1", types={"gone": True})]
    dataset = Dataset(name="d", zarr_dir="/z", images=items)
    task = noting(STUBBORN)
    await killed(task, dataset=dataset, started=[0, 1], ended=[0])
    pids = {line[1] for line in lines(notes, "start") if line[0] == 1}
    fewer = task.model_copy(update={"type_filters": {"gone": False}})

    await run(fewer, dataset=dataset, resume=True, grace_s=0.2)

    assert not any(map(is_running, pids))
    assert numbers(notes, "start") == [0, 1]
    assert query("SELECT number, state, is_last FROM {units} ORDER BY number") == [
        (0, "done", 1),
        (1, "cancelled", 0),
    ]


@pytest.mark.parametrize("executor", ["process", "fork"])
async def test_a_function_whose_worker_outlives_its_coordinator_does_not_overlap_with_its_next_run(
    *, run: Any, killed: Any, images: Any, notes: Path, executor: str
) -> None:
    def work(*, zarr_url: str, notes: str) -> None:
        def note(word: str) -> None:
            with open(f"{notes}/log", "a") as file:  # noqa: PTH123 - it runs elsewhere
                file.write(f"{zarr_url[-1]} {os.getpid()} {word} {time.monotonic_ns()}\n")

        note("start")
        while zarr_url.endswith("1") and not os.path.exists(f"{notes}/may"):  # noqa: PTH110
            time.sleep(0.01)
            note("alive")
        note("end")

    task = WorkflowTask(task=Task(name="F", function_parallel=work), args_parallel={"notes": str(notes)})
    given = {"dataset": images(2), "executor": (executor, {"max_workers": 2})}
    await killed(task, started=[0, 1], ended=[0], **given)
    pid = next(line[1] for line in lines(notes, "start") if line[0] == 1)
    (notes / "may").touch()

    await run(task, **given, resume=True, grace_s=0.2)

    spans = [
        [at for n, which, _, at in lines(notes) if n == 1 and (which == pid) is own] for own in (True, False)
    ]
    assert not spans[1] or max(spans[0]) < min(spans[1])
    assert numbers(notes, "end").count(0) == 1


async def test_units_that_were_submitted_and_never_started_are_not_of_unknown_outcome(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path, query: Any
) -> None:
    task = noting(WAITING.replace("number == 1", "number <= 1"), meta_parallel={"rerunnable": False})
    await killed(
        task, dataset=images(4), started=[0, 1], executor=("thread", {"max_workers": 2}), max_in_flight=4
    )
    assert query("SELECT number FROM {units} ORDER BY number") == [0, 1, 2, 3]
    (notes / "may").touch()

    with pytest.raises(JobExecutionError) as caught:
        await run(task, dataset=images(4), resume=True, grace_s=0.2)

    assert "of 2 unit(s) that had started nobody knows" in str(caught.value)
    assert re.findall(r"par-\d+-(\d+)", str(caught.value)) == ["0000000", "0000001"]
    await run(task, dataset=images(4), resume=True, rerun_unknown=True)
    reasons = query("SELECT number, reason FROM {units} WHERE attempt = 1 ORDER BY number")
    unknown, never = "UNKNOWN_OUTCOME", "NEVER_STARTED"
    assert reasons == [(0, unknown), (1, unknown), (2, never), (3, never)]


async def test_a_task_that_must_not_be_repeated_blindly_stops_the_resume_until_somebody_says_so(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path, query: Any, tmp_path: Path
) -> None:
    task = noting(meta_parallel={"rerunnable": False})
    await killed(task, dataset=images(3), started=[0, 1, 2], ended=[0, 2])
    (notes / "may").touch()

    for _ in range(2):  # it does not forget
        with pytest.raises(
            JobExecutionError, match=r"rerunnable: false.*par-000000-0000001.*rerun_unknown"
        ) as e:
            await run(task, dataset=images(3), resume=True, grace_s=0.2)
        assert e.value.reason == "UNKNOWN_OUTCOME"
        assert e.value.workflow_task_order == 0
        assert query("SELECT state FROM {runs}") == ["failed"]
        assert numbers(notes, "start") == [0, 1, 2]
    statuses = query("SELECT zarr_url, status FROM {image_statuses} ORDER BY zarr_url")
    assert statuses == [("/z/0", "done"), ("/z/1", "failed"), ("/z/2", "done")]

    await run(task, dataset=images(3), resume=True, rerun_unknown=True)

    assert numbers(notes, "start") == [0, 1, 1, 2]


async def test_a_task_with_another_order_is_known_by_what_it_was(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path
) -> None:
    task = noting(meta_parallel={"rerunnable": False})
    await killed(task, dataset=images(2), started=[0, 1], ended=[0])
    (notes / "may").touch()
    moved = task.model_copy(update={"order": 7})

    with pytest.raises(JobExecutionError, match="nobody knows how far they got: par-000000-0000001"):
        await run(moved, dataset=images(2), resume=True, grace_s=0.2)


# Evidence beside the history.


def forget(query: Any, where: str = "1") -> None:
    """As if the coordinator had been killed before it wrote these rows."""
    query(f"DELETE FROM {{units}} WHERE {where}")


async def test_what_workers_have_recorded_is_believed_where_the_history_has_nothing(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path, query: Any
) -> None:
    task = noting()
    await killed(task, dataset=images(3), started=[0, 1, 2], ended=[0, 2])
    forget(query)
    (notes / "may").touch()
    events: list[Any] = []

    after = await run(task, dataset=images(3), resume=True, grace_s=0.2, on_event=events.append)

    assert numbers(notes, "start") == [0, 1, 1, 2]
    assert [image.attributes for image in after.images] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert query("SELECT number, attempt, state FROM {units} WHERE is_last ORDER BY number") == [
        (0, 1, "done"),
        (1, 2, "done"),
        (2, 1, "done"),
    ]
    pids = query("SELECT pid FROM {units} WHERE is_last ORDER BY number")
    assert all(pids)
    told = [event.index for event in events if isinstance(event, UnitFinished)]
    assert sorted(told) == [0, 1, 2]  # the history did not know: it is news


async def test_what_workers_have_recorded_is_believed_where_the_history_lags_behind(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path, query: Any
) -> None:
    task = noting(meta_parallel={"rerunnable": False})
    await killed(task, dataset=images(3), started=[0, 1, 2], ended=[0, 2])
    query("UPDATE {units} SET state = 'submitted', output = NULL, ended = NULL WHERE number = 0")
    query("UPDATE {units} SET state = 'running', output = NULL, ended = NULL WHERE number = 2")
    (notes / "may").touch()

    after = await run(task, dataset=images(3), resume=True, grace_s=0.2, rerun_unknown=True)

    assert numbers(notes, "start") == [0, 1, 1, 2]
    assert [image.attributes for image in after.images] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_a_unit_that_ended_after_its_coordinator_is_not_run_again(
    *, run: Any, coordinator: Any, images: Any, notes: Path, until: Any
) -> None:
    """Its worker, a process apart, has done it to the end and recorded it."""

    def work(*, zarr_url: str, notes: str) -> dict[str, Any]:
        (Path(notes) / f"pid{os.getpid()}").touch()
        while not (Path(notes) / "may").exists():
            time.sleep(0.01)
        return {"image_list_updates": [{"zarr_url": zarr_url, "attributes": {"by": os.getpid()}}]}

    task = WorkflowTask(task=Task(name="F", function_parallel=work), args_parallel={"notes": str(notes)})
    place = notes.parent / "calls"
    process = coordinator(task, executor=Outliving(place))
    await until(lambda: list(notes.glob("pid*")))
    process.kill()
    (notes / "may").touch()
    await until(lambda: list(place.glob("*/result")))
    (name,) = (path.name for path in notes.glob("pid*"))

    after = await run(task, resume=True)  # over an executor that knows nothing of it

    assert after.images[0].attributes == {"by": int(name[3:])}
    assert len(list(notes.glob("pid*"))) == 1


async def test_invalid_output_in_evidence_is_a_failure_and_runs_again(
    *, run: Any, killed: Any, noting: Any, images: Any, notes: Path, query: Any, tmp_path: Path
) -> None:
    body = f"""{NOTE}
note("start")
if number == 1:
    stay()
write({{"wrong": 1}} if not os.path.exists(args["notes"] + "/may") else {{}})
note("end")
"""
    task = noting(body)
    await killed(task, dataset=images(2), started=[0, 1], ended=[0])
    forget(query)
    (notes / "may").touch()

    await run(task, dataset=images(2), resume=True, grace_s=0.2)

    assert numbers(notes, "start") == [0, 0, 1, 1]
    rows = query("SELECT attempt, state, message FROM {units} WHERE number = 0 ORDER BY attempt")
    assert [row[:2] for row in rows] == [(1, "failed"), (2, "done")]
    assert "left output that is not valid" in rows[0][2]


# Units on another host.


@pytest.fixture
def elsewhere(*, run: Any, noting: Any, images: Any, notes: Path, tmp_path: Path, query: Any) -> Any:
    """A run that was interrupted while its unit 1 ran on a host that is not this one; its task."""

    async def make(*records: dict[str, Any], **more: Any) -> WorkflowTask:
        def fail(*, zarr_url: str) -> None:
            if zarr_url.endswith("1") and not (notes / "may").exists():
                raise ValueError("it fails")

        task = WorkflowTask(task=Task(name="F", function_parallel=fail), **more)
        with pytest.raises(TaskExecutionError):
            await run(task, dataset=images(2))
        (run_id,) = query("SELECT id FROM {runs}")
        place = tmp_path / "run" / "evidence"
        for ledger in place.glob("*.log"):
            ledger.unlink()
        query("UPDATE {units} SET state = 'running', ended = NULL WHERE number = 1")
        key = f"{run_id}/0/par-000000-0000001"
        digest = query("SELECT digest FROM {units} WHERE number = 1")[0]
        worker = {"host": "elsewhere", "boot_id": "b" * 36, "pid": 4321, "start_ticks": 1}
        written = [
            {"kind": "worker", **worker, "coordinator": ["elsewhere", 4000, 1]},
            {"kind": "start", "key": key, "time": time.time(), "digest": digest},
            *({**record, "key": key} for record in records),
        ]
        frames = b"".join(
            evidence.frame(json.dumps(record, separators=(",", ":")).encode()) for record in written
        )
        (place / "elsewhere-bbbbbbbb-4321-1-4321.log").write_bytes(frames)
        (notes / "may").touch()
        return task

    return make


async def test_units_on_a_host_that_cannot_be_reached_stop_the_resume(
    run: Any, images: Any, elsewhere: Any, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_PATIENCE_S", 0.2)
    task = await elsewhere()

    for _ in range(2):
        with pytest.raises(JobExecutionError) as caught:
            await run(task, dataset=images(2), resume=True, grace_s=0.1)
        assert "1 unit(s) may still be running where they cannot be ended from here: " in str(caught.value)
        assert "par-000000-0000001 on elsewhere (pid 4321). End them there, or resume" in str(caught.value)
        assert caught.value.reason == "UNKNOWN_OUTCOME"

    await run(task, dataset=images(2), resume=True, grace_s=0.1, rerun_unknown=True)
    assert query("SELECT number, attempt, state FROM {units} WHERE is_last ORDER BY number") == [
        (0, 1, "done"),
        (1, 2, "done"),
    ]


async def test_units_that_have_ended_on_another_host_stop_nothing(
    run: Any, images: Any, elsewhere: Any
) -> None:
    output = {"json": json.dumps({"image_list_updates": [{"zarr_url": "/z/1", "attributes": {"n": 5}}]})}
    result = {
        "returncode": 0,
        "host": "elsewhere",
        "pid": 4321,
        "started": 1.0,
        "ended": 2.0,
        "output": output,
    }
    task = await elsewhere({"kind": "end", "result": result})

    after = await run(task, dataset=images(2), resume=True)

    assert [image.attributes for image in after.images] == [{}, {"n": 5}]


# Compound tasks.

INIT = f"""{NOTE}
number = 100
note("start")
items = [{{"zarr_url": url, "init_args": {{"n": n}}}} for url in args["zarr_urls"] for n in (0, 1)]
write({{"parallelization_list": items}})
note("end")
"""
COMPUTE = f"""{NOTE}
number = args["init_args"]["n"]
note("start")
if number == 1:
    stay()
note("end")
"""


@pytest.fixture
def compound(script: Any, notes: Path) -> WorkflowTask:
    """Its init unit notes 100, its two compute units 0 and 1; 1 stays until it may end."""
    task = Task(
        name="C", type="compound", command_non_parallel=script(INIT), command_parallel=script(COMPUTE)
    )
    return WorkflowTask(
        task=task, args_non_parallel={"notes": str(notes)}, args_parallel={"notes": str(notes)}
    )


async def test_killed_in_the_middle_of_compute_neither_init_nor_what_is_done_runs_again(
    *, run: Any, killed: Any, compound: Any, images: Any, notes: Path, query: Any
) -> None:
    await killed(compound, dataset=images(1), started=[0, 1, 100], ended=[0, 100])
    (notes / "may").touch()

    await run(compound, dataset=images(1), resume=True, grace_s=0.2)

    assert numbers(notes, "start") == [0, 1, 1, 100]
    assert query("SELECT units, state FROM {tasks}") == [(3, "done")]


async def test_killed_between_init_and_compute_the_init_unit_does_not_run_again(
    *, run: Any, killed: Any, compound: Any, images: Any, notes: Path, query: Any
) -> None:
    await killed(compound, dataset=images(1), started=[0, 1, 100], ended=[0, 100])
    # As it was before compute units were submitted; but those that have started have left their records.
    forget(query, "stage = 'par'")
    for ledger in (notes.parent / "run" / "evidence").glob("*.log"):
        ledger.unlink()
    (notes / "log").unlink()
    (notes / "may").touch()

    await run(compound, dataset=images(1), resume=True, grace_s=0.2)

    assert numbers(notes, "start") == [0, 1]


async def test_an_init_unit_whose_end_only_its_worker_recorded_does_not_run_again(
    *, run: Any, killed: Any, compound: Any, images: Any, notes: Path, query: Any
) -> None:
    await killed(compound, dataset=images(1), started=[0, 1, 100], ended=[0, 100])
    forget(query)
    (notes / "may").touch()

    await run(compound, dataset=images(1), resume=True, grace_s=0.2)

    assert numbers(notes, "start") == [0, 1, 1, 100]


# What a kill leaves, and arguments that go to and fro.


async def test_a_success_with_other_arguments_since_counts_no_more(run: Any, images: Any, query: Any) -> None:
    ran: list[int] = []
    fails = {1}

    def work(*, zarr_url: str, x: int) -> None:
        ran.append(x)
        if zarr_url.endswith("1") and fails:
            raise ValueError("it fails")

    def task(x: int) -> WorkflowTask:
        return WorkflowTask(task=Task(name="F", function_parallel=work), args_parallel={"x": x})

    for x in (1, 2):
        with pytest.raises(TaskExecutionError):
            await run(task(x), dataset=images(2), resume=True)
    fails.clear()
    ran.clear()

    await run(task(1), dataset=images(2), resume=True)

    assert ran == [1, 1]  # what is there was made with 2


async def test_a_history_that_was_begun_and_a_directory_that_does_not_say_so_yet_belong_together(
    run: Any, parallel: Any, tmp_path: Path, query: Any
) -> None:
    """Killed after the run was recorded, and before its directory said which run it holds."""
    await run(parallel(), last_task_index=0)
    (run_id,) = query("SELECT id FROM {runs}")
    query("DELETE FROM {tasks}")
    query("DELETE FROM {units}")
    query("UPDATE {runs} SET state = 'running'")
    for name in ("run.json", "dataset.json", "filters.json"):
        (tmp_path / "run" / name).unlink()

    with pytest.raises(ValueError, match="already holds a run"):
        await run(parallel())
    await run(parallel(), resume=True)

    assert query("SELECT id, state FROM {runs}") == [(run_id, "done")]
