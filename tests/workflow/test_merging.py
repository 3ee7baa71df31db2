"""What outputs make of the image list, rule by rule of "Merging outputs into the dataset"."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fractal_runner import Image, JobExecutionError, TaskOutputValidationError
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import TaskType
from fractal_runner.workflow.outputs import UnitOutput, merge, validate_output

FAILED = object()
A = Image(zarr_url="/z/a", origin="/z/raw", attributes={"well": "A", "n": 1}, types={"x": True})
B = Image(zarr_url="/z/b", attributes={"well": "B"}, types={"x": False, "y": True})


def update(url: str, **more: Any) -> dict[str, Any]:
    return {"image_list_updates": [{"zarr_url": url, **more}]}


def remove(*urls: str) -> dict[str, Any]:
    return {"image_list_removals": list(urls)}


def merged(
    images: list[Image],
    *units: tuple[str | None, Any],
    task_type: TaskType = "parallel",
    output_types: dict[str, bool] | None = None,
    zarr_dir: str = "/z",
) -> list[Image]:
    """The images after a task whose units returned this, each with its own URL; FAILED for a failed one."""
    before = ImageList(images)
    selected = [] if task_type.startswith("converter") else [image.zarr_url for image in images]
    try:
        after = merge(
            before,
            [
                UnitOutput(url, raw is not FAILED, None if raw is FAILED else validate_output(raw))
                for url, raw in units
            ],
            task_type=task_type,
            output_types={"t": True} if output_types is None else output_types,
            zarr_dir=zarr_dir,
            selected=selected,
        )
    finally:
        assert list(before) == images  # whatever happens, the list before stays as it was
    return list(after)


def touched(*images: Image) -> list[Image]:
    """Those of the images that have the output type."""
    return [image for image in images if image.types.get("t")]


# 1. What the units say together


def test_exact_duplicates_are_dropped() -> None:
    same = update("/z/new", attributes={"n": 1, "m": "x"}, types={"q": True})
    reordered = update("/z/new", types={"q": True}, attributes={"m": "x", "n": 1})

    after = merged([A, B], ("/z/a", same), ("/z/b", reordered))

    assert [image.zarr_url for image in after] == ["/z/a", "/z/b", "/z/new"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attributes": {"n": 1}}, {"attributes": {"n": 2}}),
        ({"attributes": {"n": 1}}, {"attributes": {"n": True}}),
        ({"attributes": {"n": None}}, {}),
        ({"types": {"q": False}}, {}),
        ({"origin": "/z/a"}, {"origin": "/z/b"}),
    ],
)
def test_one_url_with_two_contents_is_invalid(one: Any, other: Any) -> None:
    with pytest.raises(TaskOutputValidationError, match="'/z/new'"):
        merged([A, B], ("/z/a", update("/z/new", **one)), ("/z/b", update("/z/new", **other)))


def test_urls_are_compared_in_their_one_form() -> None:
    with pytest.raises(TaskOutputValidationError, match="two different ways: '/z/new'"):
        merged(
            [A, B],
            ("/z/a", update("/z//new/", attributes={"n": 1})),
            ("/z/b", update("/z/new", attributes={"n": 2})),
        )


def test_an_image_both_updated_and_removed_is_invalid() -> None:
    with pytest.raises(TaskOutputValidationError, match="both updates and removes one image: '/z/a'"):
        merged([A, B], ("/z/a", update("/z/a")), ("/z/b", remove("/z/a")))


def test_removals_are_a_set() -> None:
    assert merged([A, B], ("/z/a", remove("/z/a")), ("/z/b", remove("/z/a", "/z/a")), output_types={}) == [B]


def test_what_failed_units_left_is_not_looked_at() -> None:
    after = merged([A, B], ("/z/a", FAILED), ("/z/b", update("/z/b", attributes={"n": 2})))

    assert after[0] == A
    assert after[1].attributes == {"well": "B", "n": 2}


# 2. What empty outputs stand for


@pytest.mark.parametrize("empty", [None, {}, {"image_list_updates": [], "image_list_removals": []}])
def test_in_a_parallel_task_an_empty_output_is_an_update_of_the_units_own_image(empty: Any) -> None:
    assert touched(*merged([A, B], ("/z/a", empty), ("/z/b", FAILED))) == [
        Image(zarr_url="/z/a", origin="/z/raw", attributes=A.attributes, types={"x": True, "t": True})
    ]


def test_empty_outputs_count_beside_updates_of_units_own_images() -> None:
    after = merged([A, B], ("/z/a", update("/z/a", attributes={"n": 5})), ("/z/b", None))

    assert touched(*after) == after


def test_empty_outputs_count_for_nothing_beside_new_images() -> None:
    after = merged([A, B], ("/z/a", update("/z/new")), ("/z/b", None))

    assert touched(*after) == [Image(zarr_url="/z/new", types={"t": True})]


def test_an_image_that_another_unit_updates_or_removes_is_not_updated_for_its_empty_output() -> None:
    assert merged([A, B], ("/z/a", remove("/z/b")), ("/z/b", None)) == [A]
    assert touched(*merged([A, B], ("/z/a", update("/z/b")), ("/z/b", None))) == [
        Image(zarr_url="/z/b", attributes={"well": "B"}, types={"x": False, "y": True, "t": True})
    ]


@pytest.mark.parametrize("task_type", ["non_parallel", "compound"])
def test_in_other_tasks_an_empty_output_counts_for_every_image_if_nothing_failed(task_type: Any) -> None:
    assert len(touched(*merged([A, B], (None, None), task_type=task_type))) == 2


def test_a_compound_task_without_compute_units_counts_for_every_image() -> None:
    assert len(touched(*merged([A, B], task_type="compound"))) == 2


def test_a_failed_unit_takes_its_image_out_whatever_else_succeeded_on_it() -> None:
    after = merged(
        [A, B], ("/z/a", None), ("/z/b", None), ("/z/b", FAILED), ("/z/nowhere", None), task_type="compound"
    )

    assert [image.zarr_url for image in touched(*after)] == ["/z/a"]


def test_with_a_failure_images_that_no_unit_had_are_not_updated() -> None:
    assert touched(*merged([A, B], ("/z/nowhere", FAILED), ("/z/a", None), task_type="compound"))[
        0
    ].zarr_url == ("/z/a")
    assert touched(*merged([A, B], (None, FAILED), task_type="non_parallel")) == []


def test_in_other_tasks_any_output_makes_empty_ones_count_for_nothing() -> None:
    after = merged([A, B], ("/z/a", update("/z/a")), ("/z/b", None), task_type="compound")

    assert [image.zarr_url for image in touched(*after)] == ["/z/a"]
    assert merged([A, B], ("/z/a", remove("/z/b")), ("/z/a", None), task_type="compound") == [A]


def test_a_converter_without_output_changes_nothing() -> None:
    assert merged([A, B], (None, None), task_type="converter_non_parallel") == [A, B]
    assert merged([A, B], ("/z/a", None), task_type="converter_compound") == [A, B]


# 3. What an update is laid over


@pytest.mark.parametrize("origin", [{}, {"origin": None}, {"origin": "/z/a"}])
def test_an_update_without_another_origin_is_merged_into_the_image(origin: Any) -> None:
    [after, _] = merged([A, B], ("/z/a", update("/z/a", **origin, attributes={"m": 2}, types={"w": True})))

    assert after == Image(
        zarr_url="/z/a",
        origin="/z/raw",
        attributes={"well": "A", "n": 1, "m": 2},
        types={"x": True, "w": True, "t": True},
    )


def test_an_update_with_another_origin_is_built_from_that_one() -> None:
    [after, _] = merged([A, B], ("/z/a", update("/z/a", origin="/z/b", attributes={"m": 2})))

    assert after == Image(
        zarr_url="/z/a",
        origin="/z/b",
        attributes={"well": "B", "m": 2},
        types={"x": False, "y": True, "t": True},
    )


def test_an_update_with_an_origin_that_is_no_image_starts_from_nothing() -> None:
    [after, _] = merged([A, B], ("/z/a", update("/z/a", origin="/z/nowhere")))

    assert after == Image(zarr_url="/z/a", origin="/z/nowhere", types={"t": True})


def test_a_new_image_takes_after_its_origin() -> None:
    [*_, after] = merged([A, B], ("/z/a", update("/z/c", origin="/z/a", types={"x": False})))

    assert after == Image(
        zarr_url="/z/c", origin="/z/a", attributes={"well": "A", "n": 1}, types={"x": False, "t": True}
    )


def test_a_new_image_may_come_from_nowhere() -> None:
    assert merged([A], ("/z/a", update("/z/c", origin="/elsewhere/x")))[1] == Image(
        zarr_url="/z/c", origin="/elsewhere/x", types={"t": True}
    )


def test_updates_apply_in_order_so_that_an_origin_may_be_new_itself() -> None:
    chain = {
        "image_list_updates": [
            {"zarr_url": "/z/1", "origin": "/z/b", "attributes": {"n": 1}},
            {"zarr_url": "/z/2", "origin": "/z/1", "types": {"two": True}},
        ]
    }

    *_, after = merged([A, B], ("/z/a", chain), ("/z/b", update("/z/3", origin="/z/2")))

    assert after == Image(
        zarr_url="/z/3",
        origin="/z/2",
        attributes={"well": "B", "n": 1},
        types={"x": False, "y": True, "two": True, "t": True},
    )


def test_an_origin_that_comes_later_is_not_there_yet() -> None:
    after = merged([A, B], ("/z/a", update("/z/2", origin="/z/1")), ("/z/b", update("/z/1", origin="/z/b")))

    assert after[2] == Image(zarr_url="/z/2", origin="/z/1", types={"t": True})


@pytest.mark.parametrize(
    ("url", "zarr_dir"),
    [
        ("/data/plate2", "/data/plate"),
        ("/data/plate2/x", "/data/plate"),
        ("/data/plate", "/data/plate"),
        ("/data", "/data/plate"),
        ("/", "/"),
        ("s3://b/k2", "s3://b/k"),
        ("s3://b/k", "s3://b/k"),
        ("/b/k/x", "s3://b/k"),
    ],
)
def test_a_new_image_outside_the_zarr_dir_is_refused(url: str, zarr_dir: str) -> None:
    with pytest.raises(
        JobExecutionError, match="Cannot create image if zarr_url is not a subfolder of zarr_dir"
    ) as caught:
        merged([A], ("/z/a", update(url)), zarr_dir=zarr_dir)

    assert repr(url) in str(caught.value)
    assert repr(zarr_dir) in str(caught.value)


@pytest.mark.parametrize(
    ("url", "zarr_dir"),
    [("/data/plate/x", "/data/plate"), ("/x", "/"), ("s3://b/k/x", "s3://b/k"), ("s3://b/x", "s3://b")],
)
def test_a_new_image_inside_the_zarr_dir_is_appended(url: str, zarr_dir: str) -> None:
    assert merged([A], ("/z/a", update(url)), zarr_dir=zarr_dir)[1].zarr_url == url


def test_existing_images_outside_the_zarr_dir_are_updated() -> None:
    assert touched(*merged([A], ("/z/a", update("/z/a")), zarr_dir="/elsewhere"))
    assert touched(*merged([A], ("/z/a", None), zarr_dir="/elsewhere"))


# 4. What is laid over it


def test_null_deletes_an_attribute_wherever_it_comes_from() -> None:
    own = merged([A], ("/z/a", update("/z/a", attributes={"n": None, "no": None})))
    origins = merged([A], ("/z/a", update("/z/c", origin="/z/a", attributes={"n": None})))
    new = merged([A], ("/z/a", update("/z/c", attributes={"n": None, "m": 0})))

    assert own[0].attributes == {"well": "A"}
    assert origins[1].attributes == {"well": "A"}
    assert new[1].attributes == {"m": 0}


def test_output_types_are_laid_over_the_updates_types() -> None:
    after = merged([A], ("/z/a", update("/z/a", types={"x": False, "t": True})), output_types={"t": False})

    assert after[0].types == {"x": False, "t": False}


# 5. Removals


def test_removing_an_image_that_is_not_there_is_refused() -> None:
    with pytest.raises(JobExecutionError, match=r"Cannot remove missing image .*'/z/nowhere'"):
        merged([A, B], ("/z/a", remove("/z/a", "/z/nowhere")))


def test_an_image_made_from_a_removed_one_keeps_what_it_got() -> None:
    after = merged([A, B], ("/z/a", {**update("/z/c", origin="/z/a"), **remove("/z/a")}), ("/z/b", None))

    assert [image.zarr_url for image in after] == ["/z/b", "/z/c"]
    assert after[1].attributes == A.attributes


# 6. Order


def test_existing_images_keep_their_place_and_new_ones_come_in_unit_order() -> None:
    after = merged(
        [A, B],
        ("/z/a", {"image_list_updates": [{"zarr_url": "/z/2"}, {"zarr_url": "/z/b"}]}),
        ("/z/b", {"image_list_updates": [{"zarr_url": "/z/1"}, {"zarr_url": "/z/a"}]}),
    )

    assert [image.zarr_url for image in after] == ["/z/a", "/z/b", "/z/2", "/z/1"]


# 8. Time


def test_a_merge_is_linear_in_the_number_of_images() -> None:
    count = 100_000
    images = [Image(zarr_url=f"/z/{number}") for number in range(count)]
    units = [(image.zarr_url, update(f"{image.zarr_url}/new", origin=image.zarr_url)) for image in images]

    began = time.monotonic()
    after = merged(images, *units)

    assert len(after) == 2 * count
    assert time.monotonic() - began < 60  # a quadratic one would take an hour


# As the run does it


async def test_images_of_failed_units_do_not_get_the_output_types(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    with pytest.raises(RuntimeError) as caught:
        await run(parallel(script("sys.exit(number)"), output_types={"t": True}), dataset=images(2))

    assert [image.types for image in caught.value.dataset.images] == [{"t": True}, {}]  # type: ignore[attr-defined]


async def test_a_new_image_outside_the_zarr_dir_fails_the_task(
    run: Any, parallel: Any, script: Any, images: Any
) -> None:
    body = "write({'image_list_updates': [{'zarr_url': '/z2/x' if number else '/z/0'}]})"

    with pytest.raises(JobExecutionError, match=r"Task 0 \('T'\): Cannot create image if zarr_url") as caught:
        await run(parallel(script(body), output_types={"t": True}), dataset=images(2))

    assert caught.value.dataset == images(2)
    assert (caught.value.workflow_task_id, caught.value.task_name) == (0, "T")
