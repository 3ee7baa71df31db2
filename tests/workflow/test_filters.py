"""Which images a task gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import Dataset, Image, JobExecutionError, Task, TaskStarted
from fractal_runner.workflow.images import ImageList


def chosen(images: list[Image], types: Any = (), attributes: Any = ()) -> list[str]:
    return [image.zarr_url for image in ImageList(images).select(dict(types), dict(attributes))]


TYPED = [
    Image(zarr_url="/z/yes", types={"is_3D": True}),
    Image(zarr_url="/z/no", types={"is_3D": False}),
    Image(zarr_url="/z/absent"),
]
WELLS = [
    Image(zarr_url="/z/a", attributes={"well": "A01", "n": 1}),
    Image(zarr_url="/z/b", attributes={"well": "B01", "n": True}),
    Image(zarr_url="/z/c", attributes={"well": "", "n": 0}),
    Image(zarr_url="/z/d"),
]


def test_an_absent_type_is_false() -> None:
    assert chosen(TYPED, {"is_3D": True}) == ["/z/yes"]
    assert chosen(TYPED, {"is_3D": False}) == ["/z/no", "/z/absent"]


def test_an_absent_attribute_never_matches() -> None:
    assert chosen(WELLS, (), {"well": ["A01", "B01", ""]}) == ["/z/a", "/z/b", "/z/c"]
    assert chosen(WELLS, (), {"other": [""]}) == []


def test_an_attribute_matches_any_of_the_listed_values_and_all_filters_at_once() -> None:
    assert chosen(WELLS, (), {"well": ["A01", "B01"], "n": [1]}) == ["/z/a"]
    assert chosen(WELLS, (), {"well": []}) == []
    assert chosen(WELLS) == ["/z/a", "/z/b", "/z/c", "/z/d"]


def test_true_is_not_1_and_false_is_not_0() -> None:
    assert chosen(WELLS, (), {"n": [1]}) == ["/z/a"]
    assert chosen(WELLS, (), {"n": [True]}) == ["/z/b"]
    assert chosen(WELLS, (), {"n": [False]}) == []
    assert chosen(WELLS, (), {"n": [0]}) == ["/z/c"]


@pytest.fixture
def seen(tmp_path: Path, script: Any) -> Any:
    """A command that notes its image under a word, and what has been noted under it."""

    def command(word: str) -> str:
        return script(f"open({str(tmp_path)!r} + f'/{word}-{{number}}', 'w').close()")

    def noted(word: str) -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.glob(f"{word}-*"))

    return command, noted


async def test_input_types_and_the_workflow_tasks_filters_both_apply(
    run: Any, parallel: Any, seen: Any
) -> None:
    command, noted = seen
    dataset = Dataset(
        name="d",
        zarr_dir="/z",
        images=[
            Image(zarr_url="/z/0", types={"a": True, "b": True}),
            Image(zarr_url="/z/1", types={"a": True}),
            Image(zarr_url="/z/2", types={"b": True}),
        ],
    )

    await run(parallel(command("both"), input_types={"a": True}, type_filters={"b": True}), dataset=dataset)

    assert noted("both") == [0]


async def test_output_types_become_filters_of_the_tasks_behind(
    run: Any, parallel: Any, seen: Any, tmp_path: Path
) -> None:
    command, noted = seen
    dataset = Dataset(
        name="d",
        zarr_dir="/z",
        images=[Image(zarr_url="/z/0", attributes={"w": 1}), Image(zarr_url="/z/1", attributes={"w": 2})],
    )

    after = await run(
        parallel(command("first"), output_types={"done": True}),
        parallel(command("second")),
        dataset=dataset,
        job_attribute_filters={"w": [2]},
    )

    assert noted("first") == noted("second") == [1]
    assert [image.types for image in after.images] == [{}, {"done": True}]
    assert json.loads((tmp_path / "run" / "filters.json").read_text()) == {
        "type_filters": {"done": True},
        "attribute_filters": {"w": [2]},
    }


async def test_a_task_overrides_the_filters_in_force_and_its_own_stay_in_force(
    run: Any, parallel: Any, seen: Any
) -> None:
    command, noted = seen
    dataset = Dataset(
        name="d",
        zarr_dir="/z",
        images=[Image(zarr_url="/z/0", types={"a": True}), Image(zarr_url="/z/1", types={"a": False})],
    )

    await run(
        parallel(command("first")),
        parallel(command("second"), type_filters={"a": False}),
        parallel(command("third")),
        dataset=dataset,
        job_type_filters={"a": True},
    )

    assert [noted(word) for word in ("first", "second", "third")] == [[0], [1], [1]]


async def test_a_converter_gets_no_images_and_its_output_types_become_filters(
    run: Any, parallel: Any
) -> None:
    def convert(*, zarr_dir: str) -> dict[str, Any]:
        return {"image_list_updates": [{"zarr_url": f"{zarr_dir}/new"}]}

    events: list[TaskStarted] = []

    after = await run(
        Task(
            name="C", type="converter_non_parallel", function_non_parallel=convert, output_types={"o": True}
        ),
        parallel(output_types={"p": True}),
        on_event=lambda event: events.append(event) if isinstance(event, TaskStarted) else None,
    )

    assert [event.images for event in events] == [None, 1]
    assert after.images == [
        Image(zarr_url="/z/0"),
        Image(zarr_url="/z/new", types={"o": True, "p": True}),
    ]


async def test_a_converter_runs_over_an_empty_dataset(run: Any) -> None:
    task = Task(name="C", type="converter_non_parallel", command_non_parallel="true")

    after = await run(task, dataset=Dataset(name="d", zarr_dir="/z"))

    assert after.images == []


@pytest.mark.parametrize("kind", ["parallel", "non_parallel", "compound"])
async def test_an_empty_selection_is_a_job_error_with_the_filters_in_force(run: Any, kind: str) -> None:
    commands = {
        "parallel": {"command_parallel": "true"},
        "non_parallel": {"command_non_parallel": "true"},
        "compound": {"command_parallel": "true", "command_non_parallel": "true"},
    }[kind]

    with pytest.raises(JobExecutionError) as caught:
        await run(
            Task(name="T", input_types={"is_3D": True}, **commands), job_attribute_filters={"well": ["A"]}
        )

    assert "Cannot run task 'T' for an empty image list" in str(caught.value)
    assert "{'is_3D': True}" in str(caught.value)
    assert "{'well': ['A']}" in str(caught.value)


async def test_a_conflict_anywhere_in_the_range_is_found_before_anything_runs(
    run: Any, parallel: Any, seen: Any
) -> None:
    command, noted = seen
    conflict = parallel(name="Last", input_types={"a": True}, type_filters={"a": False})
    tasks = [parallel(command("first")), parallel(), conflict]

    with pytest.raises(ValueError, match=r"Task 2 \('Last'\).*a=False.*a=True"):
        await run(*tasks)
    assert noted("first") == []

    await run(*tasks, last_task_index=1)  # outside the range it is nobody's business
    assert noted("first") == [0]


async def test_filters_that_agree_are_no_conflict(run: Any, parallel: Any, images: Any) -> None:
    task = parallel(input_types={"a": True}, type_filters={"a": True})

    await run(task, dataset=images(1, types={"a": True}))
