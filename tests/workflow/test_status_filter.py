"""Images selected by what earlier runs have come to, as a history that they share tells."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    Dataset,
    History,
    JobExecutionError,
    Task,
    TaskExecutionError,
    WorkflowTask,
)

STATUS = "__wftask_dataset_image_status__"

Select = Callable[..., Awaitable[list[str]]]


class Work:
    """What was called, by name and number of the image, and what is to fail."""

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []
        self.failing: set[str] = set()

    def task(self, name: str = "A", **more: Any) -> WorkflowTask:
        known = {key: more.pop(key) for key in list(more) if key in WorkflowTask.model_fields}

        def work(*, zarr_url: str, **more: Any) -> None:
            self.called.append((name, zarr_url[-1]))
            if zarr_url[-1] in self.failing:
                raise ValueError("it fails")

        return WorkflowTask(task=Task(name=name, function_parallel=work, **more), **known)

    def compound(self) -> WorkflowTask:
        """Two compute units for each image; "2b" is the second one of image 2."""

        def init(*, zarr_dir: str, zarr_urls: list[str]) -> dict[str, Any]:
            if "init" in self.failing:
                raise ValueError("it fails")
            return {
                "parallelization_list": [
                    {"zarr_url": url, "init_args": {"which": which}} for url in zarr_urls for which in "ab"
                ]
            }

        def compute(*, zarr_url: str, init_args: dict[str, Any]) -> None:
            self.called.append(("C", zarr_url[-1] + init_args["which"]))
            if zarr_url[-1] + init_args["which"] in self.failing:
                raise ValueError("it fails")

        task = Task(name="C", type="compound", function_non_parallel=init, function_parallel=compute)
        return WorkflowTask(task=task)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A history of several runs."""
    return tmp_path / "shared.sqlite"


@pytest.fixture
def again(run: Any, shared: Path, images: Any, tmp_path: Path) -> Callable[..., Awaitable[Dataset]]:
    """Runs tasks over the images of some statuses, of four, in a directory of its own."""

    async def call(*tasks: Any, statuses: list[str] | None = None, **more: Any) -> Dataset:
        filters = {} if statuses is None else {STATUS: statuses}
        more.setdefault("workflow_dir_local", tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
        more.setdefault("dataset", images(4))
        more.setdefault("history", shared)
        return await run(*tasks, job_attribute_filters=filters, **more)

    return call


async def test_what_failed_is_run_again_and_nothing_else(work: Work, again: Any) -> None:
    work.failing = {"1", "2"}
    with pytest.raises(TaskExecutionError):
        await again(work.task())
    work.failing = set()
    work.called.clear()

    await again(work.task(), statuses=["failed"])

    assert sorted(work.called) == [("A", "1"), ("A", "2")]


async def test_each_status_over_several_runs(work: Work, again: Any, shared: Path) -> None:
    async def of(*statuses: str) -> str:
        work.called.clear()
        with pytest.raises((TaskExecutionError, JobExecutionError)):
            # It fails for all, and in the end everything is as it was.
            await again(work.task(), work.task("B", input_types={"none": True}), statuses=list(statuses))
        return "".join(sorted(number for _, number in work.called))

    assert await of("done") == ""
    assert await of("unset") == "0123"  # now all are done
    assert await of("unset") == ""
    assert await of("done") == "0123"
    work.failing = {"3"}
    assert await of("done") == "0123"
    assert await of("failed") == "3"
    work.failing = {"0"}
    assert await of("failed", "done") == "0123"
    assert await of("submitted") == ""
    work.failing = set()
    assert await of("failed", "unset") == "0"


async def test_an_image_that_a_task_was_never_given_is_unset(work: Work, again: Any, images: Any) -> None:
    await again(work.task(), dataset=images(2))
    work.called.clear()

    await again(work.task(), dataset=images(4), statuses=["unset"])

    assert sorted(work.called) == [("A", "2"), ("A", "3")]


async def test_the_filter_is_for_the_first_task_of_the_range_only(work: Work, again: Any) -> None:
    work.failing = {"1"}
    with pytest.raises(TaskExecutionError):
        await again(work.task("A"), work.task("B"))
    work.failing = set()
    work.called.clear()

    await again(work.task("A"), work.task("B"), statuses=["failed"])

    assert sorted(work.called) == [("A", "1"), *[("B", number) for number in "0123"]]


async def test_other_attribute_filters_hold_as_well(
    work: Work, run: Any, shared: Path, tmp_path: Path
) -> None:
    items = [{"zarr_url": f"/z/{n}", "attributes": {"well": "AB"[n % 2]}} for n in range(4)]
    dataset = Dataset.model_validate({"name": "d", "zarr_dir": "/z", "images": items})

    await run(
        work.task("A"),
        work.task("B"),
        dataset=dataset,
        history=shared,
        job_attribute_filters={STATUS: ["unset"], "well": ["B"]},
    )

    assert sorted(work.called) == [("A", "1"), ("A", "3"), ("B", "1"), ("B", "3")]


async def test_an_empty_selection_names_the_filter(work: Work, again: Any) -> None:
    with pytest.raises(
        JobExecutionError, match=r"empty image list .*wftask_dataset_image_status__.*'failed'"
    ):
        await again(work.task(), statuses=["failed"])


@pytest.mark.parametrize("kind", ["path", "url", "object"])
async def test_the_history_may_be_given_in_any_way(work: Work, again: Any, shared: Path, kind: str) -> None:
    await again(work.task(), history=shared)
    work.called.clear()
    with History(shared) as history:
        given = {"path": str(shared), "url": f"sqlite:///{shared}", "object": history}[kind]
        with pytest.raises(JobExecutionError, match="empty image list"):
            await again(work.task(), statuses=["unset"], history=given)
    assert work.called == []


# Refused.


async def test_without_a_history_of_earlier_runs_the_filter_is_refused(work: Work, again: Any) -> None:
    with pytest.raises(ValueError, match=r"by what earlier runs have come to: give the history= that holds"):
        await again(work.task(), statuses=["failed"], history=None)

    assert work.called == []


@pytest.mark.parametrize("value, nearest", [("fail", "failed"), ("Done", "done"), ("submited", "submitted")])
async def test_a_status_that_there_is_not_is_refused_with_the_nearest(
    work: Work, again: Any, value: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"knows no status '{value}': did you mean '{nearest}'") as caught:
        await again(work.task(), statuses=["unset", value])

    assert STATUS in str(caught.value)


# Compound tasks.


async def test_an_image_of_a_compound_task_is_done_only_if_every_unit_that_had_it_is(
    work: Work, again: Any
) -> None:
    work.failing = {"2b"}
    with pytest.raises(TaskExecutionError):
        await again(work.compound())
    work.failing = set()
    work.called.clear()

    await again(work.compound(), statuses=["failed"])

    assert sorted(work.called) == [("C", "2a"), ("C", "2b")]
    with pytest.raises(JobExecutionError, match="empty image list"):
        await again(work.compound(), statuses=["failed", "unset", "submitted"])


async def test_no_image_of_a_compound_task_is_done_if_its_init_is_not(work: Work, again: Any) -> None:
    work.failing = {"init"}
    with pytest.raises(TaskExecutionError):
        await again(work.compound())
    work.failing = set()

    await again(work.compound(), statuses=["failed"])

    assert len(work.called) == 8


# Which task, which dataset.


async def test_a_workflow_task_is_known_by_its_id(work: Work, again: Any, tmp_path: Path) -> None:
    first = work.task("A", id=7)
    await again(first)
    work.called.clear()

    # Renamed, at another place, it is the same one still; another one of its name is not.
    with pytest.raises(JobExecutionError, match="empty image list"):
        await again(
            work.task("X", output_types={"x": True}),
            work.task("Renamed", id=7),
            first_task_index=1,
            statuses=["unset"],
        )
    await again(work.task("A", id=8), statuses=["unset"])

    assert sorted(set(work.called)) == [("A", number) for number in "0123"]


async def test_ids_of_different_types_are_different(work: Work, again: Any) -> None:
    await again(work.task("A", id=7))
    work.called.clear()

    await again(work.task("A", id="7"), statuses=["unset"])

    assert len(work.called) == 4


@pytest.mark.parametrize("changed", [{"order": 1}, {"name": "Other"}, {"pkg_name": "other"}])
async def test_a_workflow_task_without_an_id_is_known_by_order_package_and_name(
    work: Work, again: Any, changed: dict[str, Any]
) -> None:
    await again(work.task(name="A"))
    with pytest.raises(JobExecutionError, match="empty image list"):
        await again(work.task(name="A", args_parallel={"other": 1}), statuses=["unset"])
    work.called.clear()

    await again(work.task(**{"name": "A", **changed}), statuses=["unset"])

    assert len(work.called) == 4


async def test_a_dataset_is_known_by_its_id_else_by_its_zarr_dir(work: Work, again: Any, images: Any) -> None:
    await again(work.task(), dataset=images(4))
    await again(work.task(), dataset=images(4).model_copy(update={"id": 5}))
    work.called.clear()

    with pytest.raises(JobExecutionError, match="empty image list"):
        await again(work.task(), statuses=["unset"], dataset=images(4).model_copy(update={"name": "other"}))
    with pytest.raises(JobExecutionError, match="empty image list"):
        await again(
            work.task(),
            statuses=["unset"],
            dataset=images(4).model_copy(update={"id": 5, "zarr_dir": "/elsewhere"}),
        )
    assert work.called == []

    await again(work.task(), statuses=["unset"], dataset=images(4).model_copy(update={"id": 6}))
    await again(work.task(), statuses=["unset"], dataset=images(4).model_copy(update={"zarr_dir": "/z2"}))
    assert len(work.called) == 8


# Runs that stopped.


async def test_what_a_killed_run_had_finished_counts_as_done(
    *,
    coordinator: Any,
    again: Any,
    parallel: Any,
    script: Any,
    images: Any,
    notes: Path,
    shared: Path,
    tmp_path: Path,
    until: Any,
    query: Any,
) -> None:
    place = str(notes)
    body = f"""
open({place!r} + f"/ran{{number}}-{{os.getpid()}}", "w").close()
while number > 1 and not os.path.exists({place!r} + "/may"):
    time.sleep(0.01)
sys.exit(number == 1 and not os.path.exists({place!r} + "/may"))
"""
    task = parallel(script(body))
    process = coordinator(
        task, dataset=images(4), history=shared, executor=("thread", {"max_workers": 3}), max_in_flight=3
    )
    ended = "SELECT count(*) FROM {units} WHERE state IN ('done', 'failed')"
    await until(lambda: shared.exists() and len(list(notes.glob("ran*"))) == 4)
    await until(lambda: query(ended, path=shared) == [2])
    process.kill()
    (notes / "may").touch()

    def ran() -> list[str]:
        found = sorted(path.name[3] for path in notes.glob("ran*"))
        for path in notes.glob("ran*"):
            path.unlink()
        return found

    ran()
    with pytest.raises(JobExecutionError, match="empty image list"):
        await again(task, statuses=["unset"])
    await again(task, statuses=["failed"])
    assert ran() == ["1"]
    await again(task, statuses=["submitted"])
    assert ran() == ["2", "3"]
    await again(task, statuses=["done"])
    assert ran() == ["0", "1", "2", "3"]


async def test_a_resume_selects_the_same_images_as_at_first(work: Work, again: Any, tmp_path: Path) -> None:
    work.failing = {"1", "2", "3"}
    with pytest.raises(TaskExecutionError):
        await again(work.task())
    work.failing = {"2"}
    place = tmp_path / "the_run"
    with pytest.raises(TaskExecutionError):
        await again(work.task(), statuses=["failed"], workflow_dir_local=place)
    work.failing = set()
    work.called.clear()

    await again(work.task(), statuses=["failed"], workflow_dir_local=place, resume=True)

    assert work.called == [("A", "2")]  # 1 and 3 were selected, too, and are done


async def test_a_resume_after_the_first_task_does_not_ask_for_statuses(
    work: Work, again: Any, tmp_path: Path
) -> None:
    place = tmp_path / "the_run"
    tasks = work.task("A"), work.task("B")
    await again(*tasks, statuses=["unset"], last_task_index=0, workflow_dir_local=place)
    work.called.clear()

    await again(*tasks, statuses=["unset"], workflow_dir_local=place, resume=True)

    assert sorted(work.called) == [("B", number) for number in "0123"]


async def test_images_of_a_cancelled_run_that_were_not_done_are_not_done(
    *, work: Work, again: Any, parallel: Any, script: Any, notes: Path, until: Any
) -> None:
    place = str(notes)
    body = f"""
open({place!r} + f"/ran{{number}}", "a").write("x")
while number == 3 and not os.path.exists({place!r} + "/may"):
    time.sleep(0.01)
"""
    task = parallel(script(body))
    call = asyncio.ensure_future(again(task, grace_s=0.2))
    await until(lambda: len(list(notes.glob("ran*"))) == 4)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    (notes / "may").touch()

    await again(task, statuses=["failed"])

    assert (notes / "ran3").read_text() == "xx"
