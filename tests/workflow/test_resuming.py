"""A run that has stopped goes on: in a new directory from where it was, or in place from its record."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    Image,
    JobExecutionError,
    RunFinished,
    RunStarted,
    Task,
    TaskExecutionError,
    ThreadExecutor,
    UnitFinished,
    Workflow,
    WorkflowTask,
    load_dataset,
)


class Work:
    """Functions for tasks: what was called, and what is to fail."""

    def __init__(self) -> None:
        self.called: list[Any] = []
        self.failing: set[Any] = set()
        self.items: list[dict[str, Any]] = []

    def task(self, name: str, output: Callable[[str], Any] = lambda url: None, **more: Any) -> WorkflowTask:
        """A parallel task whose units note (name, number of their image)."""

        def work(*, zarr_url: str, **more: Any) -> Any:
            self.note((name, int(zarr_url.rpartition("/")[2])))
            return output(zarr_url)

        known = {key: more.pop(key) for key in list(more) if key in WorkflowTask.model_fields}
        return WorkflowTask(task=Task(name=name, function_parallel=work, **more), **known)

    def compound(self, name: str = "C", **more: Any) -> WorkflowTask:
        """A compound task whose init unit lists `items`; compute units note their init_args."""

        def init(*, zarr_dir: str, zarr_urls: list[str], **more: Any) -> dict[str, Any]:
            self.note("init")
            return {"parallelization_list": self.items}

        def compute(*, zarr_url: str, init_args: dict[str, Any], **more: Any) -> None:
            self.note(init_args["n"])

        task = Task(name=name, function_non_parallel=init, function_parallel=compute)
        return WorkflowTask(task=task, **more)

    def note(self, what: Any) -> None:
        self.called.append(what)
        if what in self.failing:
            raise ValueError(f"{what} fails")

    def calls(self) -> list[Any]:
        """What was called since this was last asked, sorted."""
        called, self.called = self.called, []
        return sorted(called, key=str)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def fails(run: Any) -> Any:
    """Runs tasks to the failure that is expected of them; the error."""

    async def call(*tasks: Any, **more: Any) -> TaskExecutionError:
        with pytest.raises(TaskExecutionError) as caught:
            await run(*tasks, **more)
        return caught.value

    return call


def contents(place: Path) -> dict[str, bytes]:
    """All files of a directory, but those of the lock."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != "run.lock" and not path.name.endswith(("-shm", "-wal"))
    }


def everything(query: Any, path: Path | None = None) -> list[Any]:
    where = {} if path is None else {"path": path}
    return [query(f"SELECT * FROM {{{table}}}", **where) for table in ("runs", "owners", "tasks", "units")]


def update(url: str, **attributes: Any) -> dict[str, Any]:
    return {"image_list_updates": [{"zarr_url": url, "attributes": attributes}]}


# By position.


async def test_a_run_goes_on_in_a_new_directory_from_what_its_error_carries(
    work: Work, run: Any, fails: Any, images: Any, tmp_path: Path
) -> None:
    tasks = (
        work.task("A", output_types={"a": True}),
        work.task("B", input_types={"a": True}, type_filters={"b": False}, output_types={"b": True}),
        work.task("C"),
    )
    work.failing = {("B", 1)}
    error = await fails(*tasks, dataset=images(3))
    assert work.calls() == [("A", 0), ("A", 1), ("A", 2), ("B", 0), ("B", 1), ("B", 2)]
    work.failing = set()

    after = await run(
        *tasks,
        dataset=error.dataset,
        job_type_filters=error.type_filters,
        first_task_index=1,
        workflow_dir_local=tmp_path / "new",
    )

    assert work.calls() == [("B", 1), ("C", 0), ("C", 1), ("C", 2)]
    assert [image.types for image in after.images] == [{"a": True, "b": True}] * 3


async def test_filters_are_not_recomputed_from_the_tasks_left_out(
    work: Work, run: Any, images: Any, tmp_path: Path
) -> None:
    tasks = work.task("A", output_types={"a": True}), work.task("B")

    await run(*tasks, dataset=images(2), first_task_index=1)

    assert work.calls() == [("B", 0), ("B", 1)]  # with the filter a=True it would have got no images


async def test_the_filters_of_an_error_are_those_before_the_task_that_failed(
    work: Work, fails: Any, images: Any
) -> None:
    work.failing = {("B", 0)}
    tasks = work.task("A", output_types={"a": True}), work.task("B", type_filters={"b": False})

    error = await fails(*tasks, dataset=images(1), job_type_filters={"x": False})

    assert error.type_filters == {"a": True, "x": False}


async def test_after_every_task_the_directory_says_where_the_run_is(
    work: Work, run: Any, images: Any, tmp_path: Path
) -> None:
    seen = []

    def look(*, zarr_url: str) -> None:
        place = tmp_path / "run"
        seen.append((load_dataset(place / "dataset.json"), json.loads((place / "filters.json").read_text())))

    tasks = work.task("A", output_types={"a": True}), Task(name="Look", function_parallel=look)
    await run(*tasks, dataset=images(1), job_attribute_filters={}, job_type_filters={"x": False})

    dataset, filters = seen[0]
    assert dataset.images == [Image(zarr_url="/z/0", types={"a": True})]
    assert filters == {"type_filters": {"x": False, "a": True}, "attribute_filters": {}}


# In place: what runs again.


async def test_finished_tasks_are_not_run_again_and_in_the_failed_one_only_what_has_not_succeeded(
    work: Work, run: Any, fails: Any, images: Any
) -> None:
    tasks = work.task("A", output_types={"a": True}), work.task("B", output_types={"b": True}), work.task("C")
    work.failing = {("B", 1), ("B", 3)}
    await fails(*tasks, dataset=images(4))
    work.calls()
    work.failing = set()

    after = await run(*tasks, dataset=images(4), resume=True)

    assert work.calls() == [("B", 1), ("B", 3), ("C", 0), ("C", 1), ("C", 2), ("C", 3)]
    assert [image.types for image in after.images] == [{"a": True, "b": True}] * 4


async def test_a_unit_that_fails_again_is_all_that_runs_the_next_time(
    work: Work, run: Any, fails: Any, images: Any, query: Any
) -> None:
    task = work.task("A")
    work.failing = {("A", 0), ("A", 1)}
    await fails(task, dataset=images(3))
    work.calls()
    work.failing = {("A", 1)}
    error = await fails(task, dataset=images(3), resume=True)
    assert work.calls() == [("A", 0), ("A", 1)]
    assert [failure.unit_index for failure in error.failures] == [1]
    work.failing = set()

    await run(task, dataset=images(3), resume=True)

    assert work.calls() == [("A", 1)]
    attempts = query("SELECT number, attempt, state, is_last FROM {units} ORDER BY number, attempt")
    assert attempts == [
        *[(0, 1, "failed", 0), (0, 2, "done", 1)],
        *[(1, 1, "failed", 0), (1, 2, "failed", 0), (1, 3, "done", 1)],
        (2, 1, "done", 1),
    ]


async def test_each_attempt_has_files_of_its_own(
    run: Any, fails: Any, parallel: Any, script: Any, tmp_path: Path
) -> None:
    body = f"print('said'); sys.exit(not os.path.exists({str(tmp_path)!r} + '/may'))"
    task = parallel(script(body))
    await fails(task)
    (tmp_path / "may").touch()

    await run(task, resume=True)

    folder = tmp_path / "run" / "0_t"
    for again in ("", "-try2"):
        assert (folder / f"par-000000-0000000{again}-log.txt").read_text() == "said\n"
        assert (folder / f"par-000000-0000000{again}-args.json").exists()


async def test_an_interrupted_task_is_merged_anew_from_the_dataset_before_it_in_unit_order(
    work: Work, run: Any, fails: Any, tmp_path: Path, images: Any
) -> None:
    def new_image(url: str) -> dict[str, Any]:
        made = {"zarr_url": f"{url}/new", "origin": url, "attributes": {"from": url}}
        return {"image_list_updates": [made]}

    task = work.task("A", new_image, output_types={"new": True})
    work.failing = {("A", 0), ("A", 2)}
    error = await fails(task, dataset=images(4))
    assert [image.zarr_url for image in error.dataset.images[4:]] == ["/z/1/new", "/z/3/new"]
    work.failing = set()

    resumed = await run(task, dataset=images(4), resume=True)

    undisturbed = await run(task, dataset=images(4), workflow_dir_local=tmp_path / "other")
    assert resumed == undisturbed
    assert [image.zarr_url for image in resumed.images[4:]] == [f"/z/{number}/new" for number in range(4)]
    assert load_dataset(tmp_path / "run" / "dataset.json") == resumed


async def test_dataset_and_filters_are_restored_from_the_record(
    work: Work, run: Any, fails: Any, images: Any, tmp_path: Path
) -> None:
    tasks = (
        work.task("A", lambda url: update(url, n=int(url[-1])), output_types={"a": True}),
        work.task("B", type_filters={"gone": False}),
        work.task("C", output_types={"c": True}),
    )
    work.failing = {("C", 1)}
    await fails(*tasks, dataset=images(2, types={"x": True}), job_type_filters={"x": True})
    work.failing = set()
    for name in ("dataset.json", "filters.json"):  # the record is what counts
        (tmp_path / "run" / name).unlink()

    after = await run(*tasks, dataset=images(2, types={"x": True}), job_type_filters={"x": True}, resume=True)

    types = {"x": True, "a": True, "c": True}
    assert after.images == [Image(zarr_url=f"/z/{n}", attributes={"n": n}, types=types) for n in (0, 1)]
    filters = json.loads((tmp_path / "run" / "filters.json").read_text())
    assert filters["type_filters"] == {"x": True, "a": True, "gone": False, "c": True}


async def test_without_resume_a_directory_that_holds_a_run_is_refused_and_not_touched(
    *, work: Work, run: Any, fails: Any, images: Any, tmp_path: Path, query: Any
) -> None:
    work.failing = {("A", 0)}
    await fails(work.task("A"))
    work.calls()
    before, rows = contents(tmp_path / "run"), everything(query)

    with pytest.raises(ValueError, match=r"already holds a run: go on with it \(resume=True"):
        await run(work.task("A"))

    assert work.calls() == []
    assert contents(tmp_path / "run") == before
    assert everything(query) == rows


@pytest.mark.parametrize("file", ["run.json", "dataset.json"])
async def test_without_resume_a_part_of_a_run_is_as_good_as_a_run(
    work: Work, run: Any, tmp_path: Path, file: str
) -> None:
    await run(work.task("A"))
    (tmp_path / "run" / file).unlink()

    with pytest.raises(ValueError, match="already holds a run"):
        await run(work.task("A"))


@pytest.mark.parametrize("is_there", [False, True])
async def test_to_resume_in_an_empty_directory_is_to_begin(
    work: Work, run: Any, images: Any, tmp_path: Path, is_there: bool
) -> None:
    if is_there:
        (tmp_path / "run").mkdir()
    events: list[Any] = []

    await run(work.task("A"), dataset=images(2), resume=True, on_event=events.append)

    assert work.calls() == [("A", 0), ("A", 1)]
    started = next(event for event in events if isinstance(event, RunStarted))
    assert not started.resumed


async def test_to_resume_a_finished_run_is_to_get_its_dataset(
    work: Work, run: Any, images: Any, query: Any
) -> None:
    tasks = work.task("A", lambda url: update(url, n=1)), work.task("B")
    first = await run(*tasks, dataset=images(2))
    work.calls()
    events: list[Any] = []

    again = await run(*tasks, dataset=images(2), resume=True, on_event=events.append)

    assert again == first
    assert work.calls() == []
    assert [type(event) for event in events] == [RunStarted, RunFinished]
    assert events[0].resumed
    assert events[1].state == "done"
    assert query("SELECT state, resumed FROM {runs}") == [("done", 1)]


async def test_a_history_that_is_gone_is_missed(work: Work, run: Any, tmp_path: Path) -> None:
    await run(work.task("A"))
    for path in (tmp_path / "run").glob("history.sqlite*"):
        path.unlink()

    with pytest.raises(RuntimeError, match=r"tells of a run, but its history .* is gone: put it back"):
        await run(work.task("A"), resume=True)

    assert not (tmp_path / "run" / "history.sqlite").exists()


async def test_a_run_in_a_shared_history_is_found_there_by_its_directory(
    work: Work, run: Any, fails: Any, images: Any, tmp_path: Path
) -> None:
    shared = tmp_path / "all.sqlite"
    await run(work.task("A"), workflow_dir_local=tmp_path / "other", history=shared)
    work.failing = {("A", 1)}
    await fails(work.task("A"), dataset=images(2), history=shared)
    work.calls()
    work.failing = set()

    await run(work.task("A"), dataset=images(2), resume=True)  # the directory knows where its history is

    assert work.calls() == [("A", 1)]


async def test_a_directory_that_was_removed_and_made_anew_holds_no_run(
    work: Work, run: Any, images: Any, tmp_path: Path
) -> None:
    shared = tmp_path / "all.sqlite"
    await run(work.task("A"), history=shared)
    shutil.rmtree(tmp_path / "run")
    work.calls()

    await run(work.task("A"), history=shared)

    assert work.calls() == [("A", 0)]


async def test_another_history_than_the_one_it_began_with_is_refused(
    work: Work, run: Any, tmp_path: Path
) -> None:
    await run(work.task("A"))

    with pytest.raises(RuntimeError, match=r"does not know the run .*: give the history that it was"):
        await run(work.task("A"), history=tmp_path / "other.sqlite", resume=True)


# What may change.


@pytest.mark.parametrize("after", [("serial", {}), ("process", {"max_workers": 3}), ThreadExecutor])
async def test_the_executor_and_the_number_of_workers_may_change(
    *, run: Any, fails: Any, parallel: Any, script: Any, images: Any, tmp_path: Path, after: Any
) -> None:
    body = f"sys.exit(number == 1 and not os.path.exists({str(tmp_path)!r} + '/may'))"
    task = parallel(script(body), output_types={"t": True})
    await fails(task, dataset=images(3), executor=("thread", {"max_workers": 2}))
    (tmp_path / "may").touch()

    executor = after(1) if isinstance(after, type) else after
    result = await run(task, dataset=images(3), executor=executor, resume=True)

    assert [image.types for image in result.images] == [{"t": True}] * 3
    logs = [path.name for path in (tmp_path / "run" / "0_t").glob("*-try2-log.txt")]
    assert logs == ["par-000000-0000001-try2-log.txt"]


async def test_tasks_that_have_not_begun_may_change_and_be_added(
    work: Work, run: Any, fails: Any, images: Any, query: Any
) -> None:
    work.failing = {("B", 0)}
    await fails(work.task("A"), work.task("B"), work.task("C", args_parallel={"x": 1}), dataset=images(1))
    work.calls()
    work.failing = set()

    tasks = work.task("A"), work.task("B"), work.task("C2", args_parallel={"x": 2}), work.task("D")
    await run(*tasks, dataset=images(1), resume=True)

    assert work.calls() == [("B", 0), ("C2", 0), ("D", 0)]
    assert query("SELECT name FROM {tasks} ORDER BY position") == ["A", "B", "C2", "D"]
    workflow = json.loads(query("SELECT workflow FROM {runs}")[0])
    assert [task["task"]["name"] for task in workflow["task_list"]] == ["A", "B", "C2", "D"]


async def test_tasks_that_have_not_begun_may_be_left_out(
    work: Work, run: Any, fails: Any, images: Any
) -> None:
    work.failing = {("B", 0)}
    await fails(work.task("A", output_types={"a": True}), work.task("B"), work.task("C"))
    work.calls()

    after = await run(
        work.task("A", output_types={"a": True}), work.task("B"), last_task_index=0, resume=True
    )

    assert work.calls() == []
    assert after.images[0].types == {"a": True}


async def test_appended_tasks_and_a_later_last_task_run_after_a_finished_run(
    work: Work, run: Any, images: Any
) -> None:
    tasks = [work.task(name, lambda url: None) for name in "ABC"]
    await run(*tasks, last_task_index=0)
    await run(*tasks, last_task_index=1, resume=True)
    assert work.calls() == [("A", 0), ("B", 0)]

    await run(*tasks, work.task("D"), resume=True)

    assert work.calls() == [("C", 0), ("D", 0)]


async def test_a_last_task_before_what_is_done_is_refused(work: Work, run: Any) -> None:
    tasks = work.task("A"), work.task("B")
    await run(*tasks)

    with pytest.raises(ValueError, match="last_task_index is 0, and task 1 is done already"):
        await run(*tasks, last_task_index=0, resume=True)


async def test_an_interrupted_task_with_other_arguments_runs_all_its_units_again(
    work: Work, run: Any, fails: Any, images: Any, query: Any
) -> None:
    work.failing = {("A", 1)}
    await fails(work.task("A", args_parallel={"x": 1}), dataset=images(3))
    work.calls()
    work.failing = set()

    await run(work.task("A", args_parallel={"x": 2}), dataset=images(3), resume=True)

    assert work.calls() == [("A", 0), ("A", 1), ("A", 2)]
    assert query("SELECT attempt, state FROM {units} WHERE is_last ORDER BY number") == [(2, "done")] * 3


async def test_an_interrupted_task_with_another_command_runs_all_its_units_again(
    *, run: Any, fails: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    first = script("sys.exit(number == 1)")
    second = script(f"open({str(tmp_path)!r} + f'/again{{number}}', 'w')")
    await fails(parallel(first), dataset=images(3))

    await run(parallel(second), dataset=images(3), resume=True)

    assert len(list(tmp_path.glob("again*"))) == 3


async def test_an_interrupted_task_with_another_meta_is_still_the_same(
    work: Work, run: Any, fails: Any, images: Any
) -> None:
    work.failing = {("A", 1)}
    await fails(work.task("A", meta_parallel={"mem": "1G"}), dataset=images(3))
    work.calls()
    work.failing = set()

    await run(
        work.task("A", meta_parallel={"mem": "2G", "retries": 3, "cpus_per_task": 1}),
        dataset=images(3),
        resume=True,
    )

    assert work.calls() == [("A", 1)]


async def test_an_interrupted_task_that_is_another_one_now_leaves_nothing_of_the_old_one(
    work: Work, run: Any, fails: Any, images: Any
) -> None:
    work.failing = {("A", 2)}
    await fails(work.task("A", lambda url: update(url, old=True)), dataset=images(3))
    work.calls()
    work.items = [{"zarr_url": "/z/0", "init_args": {"n": 0}}]

    after = await run(work.compound("B"), dataset=images(3), resume=True)

    assert work.calls() == [0, "init"]
    assert after == images(3)


async def test_fewer_units_than_before_leave_no_unit_open_or_counted(
    work: Work, run: Any, fails: Any, query: Any
) -> None:
    items = [Image(zarr_url=f"/z/{n}", types={"even": n % 2 == 0}) for n in range(4)]
    dataset = Dataset(name="d", zarr_dir="/z", images=items)
    work.failing = {("A", 3)}
    await fails(work.task("A"), dataset=dataset)

    await run(work.task("A", type_filters={"even": True}), dataset=dataset, resume=True)

    assert query("SELECT number, state FROM {units} WHERE is_last ORDER BY number") == [
        (0, "done"),
        (1, "done"),
    ]


# What may not.


DIFFERENCES = [
    pytest.param(
        lambda given: given["tasks"].__setitem__(0, given["work"].task("A", args_parallel={"x": 2})),
        r"Task 0 \('A'\) is done, and its args_parallel.x was 1 and is 2; give what it was begun with",
        id="arguments of a finished task",
    ),
    pytest.param(
        lambda given: given["tasks"].__setitem__(
            0, given["work"].task("A2", args_parallel={"x": 1}, output_types={"y": True})
        ),
        r"Task 0 \('A2'\) is done, and its name was \"A\" and is \"A2\"",
        id="the first of several differences",
    ),
    pytest.param(
        lambda given: given["tasks"].__setitem__(
            0, given["work"].task("A", args_parallel={"x": 1}, output_types={"y": True})
        ),
        r"Task 0 \('A'\) is done, and its output_types.y was not there and is true",
        id="output types of a finished task",
    ),
    pytest.param(
        lambda given: given.update(dataset=Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="/z/0")])),
        r"dataset.images\[1\] was .*/z/1.* and is not there",
        id="an image less in the dataset",
    ),
    pytest.param(
        lambda given: given.update(dataset=given["dataset"].model_copy(update={"zarr_dir": "/y"})),
        r'dataset.zarr_dir was "/z" and is "/y"',
        id="another zarr_dir",
    ),
    pytest.param(
        lambda given: given.update(job_type_filters={"x": True}),
        "job_type_filters.x was not there and is true",
        id="a type filter more",
    ),
    pytest.param(
        lambda given: given.update(job_attribute_filters={"well": ["A01", "A02"]}),
        r'job_attribute_filters.well was not there and is \["A01", "A02"\]',
        id="an attribute filter more",
    ),
    pytest.param(
        lambda given: given.update(first_task_index=1),
        "first_task_index was 0 and is 1; give what it was begun with, or take a new directory",
        id="another first task",
    ),
]


@pytest.mark.parametrize("change, message", DIFFERENCES)
async def test_a_difference_from_what_is_done_is_refused_by_name_and_nothing_is_changed(
    *, work: Work, run: Any, fails: Any, images: Any, tmp_path: Path, query: Any, change: Any, message: str
) -> None:
    given: dict[str, Any] = {
        "work": work,
        "tasks": [work.task("A", args_parallel={"x": 1}), work.task("B")],
        "dataset": images(2),
    }
    work.failing = {("B", 1)}
    await fails(*given["tasks"], dataset=given["dataset"])
    work.calls()
    before, rows = contents(tmp_path / "run"), everything(query)
    change(given)

    given.pop("work")
    with pytest.raises(ValueError, match=f"{tmp_path / 'run'} cannot be resumed like this: .*{message}"):
        await run(*given.pop("tasks"), **given, resume=True)

    assert work.calls() == []
    assert contents(tmp_path / "run") == before
    assert everything(query) == rows


async def test_after_a_refusal_the_run_can_still_be_resumed_as_it_was(
    work: Work, run: Any, fails: Any, images: Any
) -> None:
    work.failing = {("B", 1)}
    tasks = work.task("A"), work.task("B")
    await fails(*tasks, dataset=images(2))
    with pytest.raises(ValueError, match="cannot be resumed like this"):
        await run(*tasks, dataset=images(1), resume=True)
    work.calls()
    work.failing = set()

    await run(*tasks, dataset=images(2), resume=True)

    assert work.calls() == [("B", 1)]


# Compound tasks.


def items(*numbers: int) -> list[dict[str, Any]]:
    return [{"zarr_url": f"/z/{number % 2}", "init_args": {"n": number}} for number in numbers]


async def test_an_init_unit_whose_list_is_recorded_is_not_run_again(
    work: Work, run: Any, fails: Any, images: Any, query: Any
) -> None:
    work.items = items(0, 1, 2)
    work.failing = {1}
    await fails(work.compound(), dataset=images(2))
    assert work.calls() == [0, 1, 2, "init"]
    work.failing, work.items = set(), items(7, 8)

    await run(work.compound(), dataset=images(2), resume=True)

    assert work.calls() == [1]
    assert query("SELECT units, state FROM {tasks}") == [(4, "done")]


async def test_a_run_that_ended_between_init_and_compute_goes_on_with_compute(
    work: Work, run: Any, images: Any
) -> None:
    work.items = items(0, 1)
    drain = threading.Event()
    with pytest.raises(JobExecutionError, match="asked to start no more"):
        await run(
            work.compound(),
            dataset=images(2),
            drain=drain,
            on_event=lambda event: drain.set() if isinstance(event, UnitFinished) else None,
            executor=("thread", {"max_workers": 1}),
            max_in_flight=1,
        )
    assert "init" in work.calls()

    await run(work.compound(), dataset=images(2), resume=True)

    assert "init" not in work.calls()


async def test_compute_units_are_matched_by_position_and_arguments(
    work: Work, run: Any, fails: Any, images: Any, query: Any
) -> None:
    work.items = items(0, 1, 2)
    work.failing = {2}
    await fails(work.compound(), dataset=images(2))
    work.calls()
    work.failing = set()
    # As if the list had been another one when these units ran.
    query(
        "UPDATE {units} SET output = ? WHERE stage = 'non_par'",
        json.dumps({"parallelization_list": items(0, 5, 1, 2)}),
    )

    await run(work.compound(), dataset=images(2), resume=True)

    assert work.calls() == [1, 2, 5]  # 0 is where it was, with the arguments that it had


async def test_an_init_unit_that_must_run_again_may_list_other_items(
    work: Work, run: Any, fails: Any, images: Any, query: Any
) -> None:
    work.items = items(0, 1, 2)
    work.failing = {0}
    await fails(work.compound(), dataset=images(2))
    work.calls()
    work.failing, work.items = set(), items(0, 4)

    await run(work.compound(args_non_parallel={"other": 1}), dataset=images(2), resume=True)

    assert work.calls() == [0, 4, "init"]
    assert query("SELECT units FROM {tasks}") == [3]
    done = query("SELECT count(*) FROM {units} WHERE is_last AND state = 'done'")
    assert done == [3]


async def test_an_init_unit_that_failed_runs_again_alone(
    work: Work, run: Any, fails: Any, images: Any
) -> None:
    work.items = items(0)
    work.failing = {"init"}
    await fails(work.compound(), dataset=images(2))
    work.calls()
    work.failing = set()

    await run(work.compound(), dataset=images(2), resume=True)

    assert work.calls() == [0, "init"]


# However it stopped.


async def test_a_cancelled_run_goes_on(
    *, work: Work, run: Any, parallel: Any, script: Any, images: Any, tmp_path: Path, until: Any
) -> None:
    place = str(tmp_path)
    body = f"""
if number == 1 and not os.path.exists({place!r} + "/may"):
    open({place!r} + "/stays", "w").close()
    time.sleep(1000)
open({place!r} + f"/ran{{number}}", "a").write("x")
"""
    task = parallel(script(body), output_types={"t": True})
    call = asyncio.ensure_future(run(task, dataset=images(2), grace_s=0.2))
    await until(lambda: (tmp_path / "stays").exists() and (tmp_path / "ran0").exists())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    (tmp_path / "may").touch()

    after = await run(task, dataset=images(2), resume=True)

    assert [image.types for image in after.images] == [{"t": True}] * 2
    assert (tmp_path / "ran0").read_text() == "x"
    assert not (tmp_path / "run" / "shutdown").exists()


async def test_a_drained_run_goes_on_with_what_had_not_started(work: Work, run: Any, images: Any) -> None:
    drain = threading.Event()

    def stop(url: str) -> None:
        drain.set()

    with pytest.raises(JobExecutionError):
        await run(
            work.task("A", stop), dataset=images(300), executor=("thread", {"max_workers": 1}), drain=drain
        )
    first = work.calls()

    await run(work.task("A", stop), dataset=images(300), resume=True)

    second = work.calls()
    assert 0 < len(first) < 300
    assert len(first) + len(second) == 300
    assert not set(first) & set(second)


async def test_a_workflow_that_is_read_anew_from_its_file_is_the_same(
    *, run: Any, fails: Any, parallel: Any, script: Any, images: Any, tmp_path: Path
) -> None:
    body = f"sys.exit(not os.path.exists({str(tmp_path)!r} + '/may'))"
    workflow = Workflow(name="w", task_list=[parallel("true"), parallel(script(body), name="Second")])
    dataset = images(2, attributes={"n": 1, "x": 0.5})
    text, data = workflow.model_dump_json(), dataset.model_dump_json()
    await fails(workflow, dataset=dataset)
    (tmp_path / "may").touch()

    after = await run(
        Workflow.model_validate_json(text), dataset=Dataset.model_validate_json(data), resume=True
    )

    assert after == dataset
