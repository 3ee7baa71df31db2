"""Which tasks of a workflow run, and what becomes of the dataset that was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Workflow, process_workflow

TASKS = 3


@pytest.fixture
def marked(flow: Any, parallel: Any) -> Workflow:
    """Three tasks, each of which leaves its own type on its images."""
    return flow(*(parallel(output_types={f"t{number}": True}) for number in range(TASKS)))


@pytest.mark.parametrize(
    ("first", "last", "ran"),
    [
        (None, None, [0, 1, 2]),
        (0, 2, [0, 1, 2]),
        (1, None, [1, 2]),
        (None, 0, [0]),
        (1, 1, [1]),
        (2, 2, [2]),
    ],
)
async def test_none_means_the_first_and_the_last_and_both_ends_are_included(
    run: Any, marked: Workflow, first: int | None, last: int | None, ran: list[int]
) -> None:
    after = await run(marked, first_task_index=first, last_task_index=last)

    assert after.images[0].types == {f"t{number}": True for number in ran}


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (-1, None, "first_task_index=-1 is out of range: the workflow 'w' has 3 tasks, 0 to 2"),
        (3, None, "first_task_index=3 is out of range: the workflow 'w' has 3 tasks, 0 to 2"),
        (None, -1, "last_task_index=-1 is out of range: the workflow 'w' has 3 tasks, 0 to 2"),
        (None, 3, "last_task_index=3 is out of range: the workflow 'w' has 3 tasks, 0 to 2"),
        (2, 1, "first_task_index=2 is greater than last_task_index=1"),
        (True, None, "first_task_index=True is not a whole number"),
        (None, 1.0, "last_task_index=1.0 is not a whole number"),
    ],
)
async def test_a_range_that_is_not_the_workflows_is_a_value_error_with_its_values(
    run: Any, marked: Workflow, first: Any, last: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        await run(marked, first_task_index=first, last_task_index=last)

    assert str(caught.value) == message


async def test_a_workflow_without_tasks_is_a_value_error(run: Any, flow: Any) -> None:
    with pytest.raises(ValueError, match="the workflow 'w' has no tasks"):
        await run(flow())


async def test_the_dataset_returned_is_a_new_one_and_the_one_given_is_unchanged(
    run: Any, marked: Workflow, images: Any
) -> None:
    given = images(2)

    after = await run(marked, dataset=given)

    assert after is not given
    assert given == images(2)
    assert after.images != given.images


async def test_calling_it_makes_a_coroutine_that_has_done_nothing_yet(
    tmp_path: Path, marked: Workflow, images: Any
) -> None:
    coroutine = process_workflow(workflow=marked, dataset=images(1), workflow_dir_local=tmp_path / "run")

    assert not (tmp_path / "run").exists()
    coroutine.close()


@pytest.mark.parametrize(
    ("wrong", "right"), [("first_task", "first_task_index"), ("job_idd", "job_id"), ("datasets", "dataset")]
)
async def test_an_unknown_keyword_is_a_type_error_with_the_nearest(run: Any, wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"no argument '{wrong}': did you mean '{right}'"):
        await run(Workflow(name="w", task_list=[]), **{wrong: 1})


async def test_what_is_no_workflow_or_dataset_is_a_type_error(run: Any, marked: Workflow) -> None:
    with pytest.raises(TypeError, match="dataset is dict, not Dataset"):
        await run(marked, dataset={"name": "d"})
    with pytest.raises(TypeError, match="workflow is dict, not Workflow"):
        await process_workflow(workflow={}, dataset={}, workflow_dir_local="x")  # type: ignore[arg-type]


async def test_only_the_tasks_of_the_range_are_checked(run: Any, parallel: Any) -> None:
    await run(parallel(), parallel("no-such-program"), last_task_index=0)
