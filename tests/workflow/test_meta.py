"""What a task's meta says to a scheduler: each key reaches the calls, and means nothing on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import JobExecutionError, Task, TaskExecutionError, ThreadExecutor, WorkflowTask
from fractal_runner.executors import factories
from fractal_runner.executors.calls import CallOptions
from fractal_runner.workflow.identity import task_content, unit_digest
from fractal_runner.workflow.meta import read_meta
from tests.executors.batch.standin import StandIn

AS_THEY_ARE = {
    "constraint": "gpu&ssd",
    "extra_lines": ["#SBATCH --reservation=night"],
    "gres": "gpu:v100:1",
    "needs_gpu": True,
    "nodelist": "node[1-3]",
    "nodes": 1,
    "ntasks_per_node": 2,
    "parallel_tasks_per_job": 2,
    "pre_submission_commands": ["module load cuda"],
    "tasks_per_job": 10,
    "user_local_exports": {"CELLPOSE_LOCAL_MODELS_PATH": "models"},
}


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(tmp_path / "jobs") as executor:
        yield executor


@pytest.mark.parametrize(("key", "value"), AS_THEY_ARE.items(), ids=AS_THEY_ARE)
async def test_what_only_a_scheduler_understands_reaches_the_calls_as_it_is(
    run: Any, parallel: Any, stand_in: StandIn, key: str, value: Any
) -> None:
    await run(parallel(meta_parallel={key: value}), executor=stand_in)

    assert stand_in.seen == [{"queue": None, "account": None, "gpus": 0, "extra": {key: value}}]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"partition": "main"}, {"queue": "main"}),
        ({"account": "lab"}, {"account": "lab"}),
        ({"gpus": 2}, {"gpus": 2}),
        ({"gpus": "2"}, {"gpus": 2}),
        ({"exclude": "node[1-3],node7"}, {"extra": {"exclude": "node[1-3],node7"}}),
        ({"exclude": ["node1", "node2"]}, {"extra": {"exclude": ["node1", "node2"]}}),
        ({"constraint": None, "partition": None}, {}),
    ],
    ids=str,
)
async def test_what_every_batch_system_has_is_an_option_of_its_own(
    run: Any, parallel: Any, stand_in: StandIn, meta: Any, expected: Any
) -> None:
    await run(parallel(meta_parallel=meta), executor=stand_in)

    assert stand_in.seen == [{"queue": None, "account": None, "gpus": 0, "extra": {}, **expected}]


async def test_each_command_of_a_task_has_its_own_and_the_workflow_task_comes_first(
    run: Any, script: Any, stand_in: StandIn
) -> None:
    init = script('write({"parallelization_list": [{"zarr_url": "/z/0", "init_args": {}}]})')
    task = Task(
        name="C",
        command_non_parallel=init,
        command_parallel="true",
        meta_non_parallel={"partition": "short"},
        meta_parallel={"partition": "long", "gres": "gpu:1", "nodes": 1},
    )

    await run(WorkflowTask(task=task, meta_parallel={"gres": "gpu:2"}), executor=stand_in)

    assert [(seen["queue"], seen["extra"]) for seen in stand_in.seen] == [
        ("short", {}),
        ("long", {"gres": "gpu:2", "nodes": 1}),
    ]


async def test_what_the_executor_was_given_counts_where_the_task_says_nothing(
    run: Any, parallel: Any, stand_in: StandIn
) -> None:
    view = stand_in.options(queue="main", account="lab", extra={"qos": "high", "gres": "gpu:1"})

    await run(parallel(meta_parallel={"partition": "gpu", "gres": "gpu:4"}), executor=view)

    [seen] = stand_in.seen
    assert (seen["queue"], seen["account"]) == ("gpu", "lab")
    assert seen["extra"] == {"qos": "high", "gres": "gpu:4"}


@pytest.mark.parametrize(
    ("exclude", "before"), [(None, ""), ("node1,node2", "node1,node2,"), (["node1", "node2"], "node1,node2,")]
)
async def test_a_node_where_an_attempt_failed_is_excluded_beside_those_of_the_meta(
    run: Any, parallel: Any, stand_in: StandIn, exclude: Any, before: str
) -> None:
    meta = {"exclude": exclude, "gres": "gpu:1", "retries": 2, "retry_on": "any", "retry_elsewhere": True}

    with pytest.raises(TaskExecutionError):
        await run(parallel("false", meta_parallel=meta), executor=stand_in)

    first, *again = [seen["extra"] for seen in stand_in.seen]
    assert first == {"gres": "gpu:1"} | ({} if exclude is None else {"exclude": exclude})
    assert again == [{"gres": "gpu:1", "exclude": before + os.uname().nodename}] * 2


@pytest.mark.parametrize("executor", ["thread", "process", "fork", "spawn", "serial", ThreadExecutor])
async def test_on_this_machine_it_means_nothing_and_is_no_mistake(
    run: Any, parallel: Any, caplog: pytest.LogCaptureFixture, executor: Any
) -> None:
    meta = {**AS_THEY_ARE, "exclude": "node1", "partition": "main", "account": "lab", "gpus": 1}

    await run(parallel(meta_parallel=meta), executor=executor)

    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("partition", "", "'' is not the name of a partition"),
        ("partition", "a\nrm -r .", r"'a\\nrm -r .' is not the name of a partition"),
        ("account", "a\nrm -r .", r"'a\\nrm -r .' is not the name of an account"),
        ("partition", ["a"], r"\['a'\] is not the name of a partition"),
        ("account", 7, "7 is not the name of an account"),
        ("tasks_per_job", 0, "0 is not a whole number of at least 1"),
        ("parallel_tasks_per_job", "2", "'2' is not a whole number of at least 1"),
        ("exclude", 3, "3 names no nodes"),
        ("exclude", ["node1", 2], r"\['node1', 2\] names no nodes"),
        ("gpus", -1, "-1 is not a whole number of at least 0"),
        ("gpus", "v100:1", "'v100:1' is not a number of GPUs"),
    ],
)
async def test_a_wrong_value_is_found_before_anything_runs(
    *, run: Any, parallel: Any, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"Task 1 \('T'\): meta_parallel.{key}: {message}"):
        await run(parallel(), parallel(meta_parallel={key: value}))

    assert not (tmp_path / "run" / "run.json").exists()


def test_keys_that_nobody_knows_are_told() -> None:
    meta = {**AS_THEY_ARE, "partition": "main", "colour": "red", "Partition": "x"}

    assert read_meta(meta).unknown == ("Partition", "colour")


def test_resources_are_told_in_words() -> None:
    meta = {"cpus_per_task": 2, "partition": "gpu", "account": "lab", "gres": "gpu:1", "extra_lines": ["#x"]}

    assert str(read_meta(meta)) == '2 CPUs, partition gpu, account lab, extra_lines ["#x"], gres gpu:1'


def test_where_a_unit_runs_does_not_change_what_it_does(parallel: Any) -> None:
    plain = parallel()
    rich = parallel(meta_parallel={**AS_THEY_ARE, "partition": "main", "exclude": "node1"})

    assert task_content(plain) == task_content(rich)
    assert unit_digest(plain)({"zarr_url": "/z/0"}) == unit_digest(rich)({"zarr_url": "/z/0"})


class Strict(StandIn):
    """What the meta cannot tell is right, the executor tells."""

    def _check_options(self, options: CallOptions) -> None:
        if "nodes" in options.extra:
            raise TypeError("there is no option 'nodes'")
        if (options.memory or 0) > 10**9:
            raise ValueError("memory=2 GB of a call exceeds max_memory_per_job=1 GB")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"nodes": 1}, "there is no option 'nodes'"),
        ({"mem": ["1G", "2G"], "retries": 1}, "memory=2 GB of a call exceeds max_memory_per_job=1 GB"),
    ],
    ids=str,
)
async def test_what_the_executor_refuses_is_found_before_anything_runs(
    *, run: Any, parallel: Any, tmp_path: Path, meta: Any, message: str
) -> None:
    with Strict(tmp_path / "jobs") as executor, pytest.raises(ValueError) as caught:
        await run(parallel(), parallel(meta_parallel=meta), executor=executor)

    assert str(caught.value) == f"Task 1 ('T'): meta_parallel: {message}"
    assert not (tmp_path / "run" / "run.json").exists()


class Absent(StandIn):
    def __init__(self, folder: Path) -> None:
        raise RuntimeError("there is no sbatch here")


@pytest.mark.parametrize(
    ("kind", "message"), [("Strict", "there is no option 'nodes'"), ("Absent", "there is no sbatch here")]
)
async def test_what_an_executor_of_one_task_refuses_fails_that_task(
    *, run: Any, parallel: Any, query: Any, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.setitem(factories._PLACES, "other", f"{__name__}:{kind}")
    meta = {"executor": "other", "nodes": 1}

    with pytest.raises(JobExecutionError, match=f"The executor 'other' refuses the task: {message}"):
        await run(parallel(), parallel(meta_parallel=meta))

    assert query("SELECT state FROM {tasks} ORDER BY position") == ["done", "failed"]


@pytest.mark.parametrize("option", ["queue", "account"])
def test_what_becomes_a_line_of_a_script_is_one_line(option: str) -> None:
    with pytest.raises(ValueError, match=r"'a\\nrm -r \.' is not a line of text"):
        CallOptions().replaced(**{option: "a\nrm -r ."})
