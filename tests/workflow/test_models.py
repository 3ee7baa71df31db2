"""Workflows, tasks, datasets and images: what they take, and how they say what they do not."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from fractal_runner import Dataset, Image, Task, Workflow, WorkflowTask

HALVES = ("non_parallel", "parallel")
NEEDS = {
    "non_parallel": {"non_parallel"},
    "parallel": {"parallel"},
    "compound": {"non_parallel", "parallel"},
    "converter_non_parallel": {"non_parallel"},
    "converter_compound": {"non_parallel", "parallel"},
}
PARALLEL = Task(name="P", command_parallel="p")
COMPOUND = Task(name="C", command_parallel="p", command_non_parallel="n")


@pytest.mark.parametrize("kind", ["command", "function"])
@pytest.mark.parametrize("task_type", NEEDS)
@pytest.mark.parametrize("given", [set(), {"parallel"}, {"non_parallel"}, {"parallel", "non_parallel"}])
def test_a_task_has_the_halves_that_its_type_needs_and_no_others(
    task_type: str, given: set[str], kind: str
) -> None:
    fields = {f"{kind}_{half}": "a.b:c" for half in given}

    if given == NEEDS[task_type]:
        assert Task(name="Seg", type=task_type, **fields).type == task_type
        return
    with pytest.raises(ValidationError, match=f"task 'Seg' is of type {task_type}: it (needs|takes no)"):
        Task(name="Seg", type=task_type, **fields)


def test_a_command_and_a_function_for_one_half_are_one_too_many() -> None:
    with pytest.raises(ValidationError, match="task 'T' has both command_parallel and function_parallel"):
        Task(name="T", command_parallel="x", function_parallel=print)


@pytest.mark.parametrize(
    ("fields", "task_type"),
    [
        ({"command_parallel": "x"}, "parallel"),
        ({"function_non_parallel": print}, "non_parallel"),
        ({"function_non_parallel": print, "command_parallel": "x"}, "compound"),
    ],
)
def test_a_type_that_is_not_given_follows_from_the_commands(fields: Any, task_type: str) -> None:
    assert Task(name="T", **fields).type == task_type


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["zarr_url", "zarr_urls", "zarr_dir", "init_args"])
def test_reserved_names_are_no_arguments(half: str, name: str) -> None:
    with pytest.raises(ValidationError, match=f"the argument '{name}' is reserved"):
        WorkflowTask(task=COMPOUND, **{f"args_{half}": {name: 1}})


def test_arguments_for_a_half_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValidationError, match="args_non_parallel is given, but task 'P' of type parallel"):
        WorkflowTask(task=PARALLEL, args_non_parallel={"x": 1})
    assert WorkflowTask(task=PARALLEL, args_non_parallel={}).args_non_parallel == {}


@pytest.mark.parametrize("value", [{1, 2}, math.nan, [math.inf], b"x", object()])
def test_arguments_that_are_not_json_are_named(value: Any) -> None:
    with pytest.raises(ValidationError, match="the value of 'x' cannot be written as JSON"):
        WorkflowTask(task=PARALLEL, args_parallel={"x": value})


@pytest.mark.parametrize("field", ["args_parallel", "args_non_parallel", "meta_parallel", "type_filters"])
def test_null_stands_for_an_empty_object(field: str) -> None:
    assert getattr(WorkflowTask(task=PARALLEL, **{field: None}), field) == {}


@pytest.mark.parametrize(
    ("make", "wrong", "right"),
    [
        (
            lambda **x: Task(name="T", command_parallel="x", **x),
            "comand_non_parallel",
            "command_non_parallel",
        ),
        (lambda **x: Task(name="T", command_parallel="x", **x), "input_type", "input_types"),
        (lambda **x: WorkflowTask(task=PARALLEL, **x), "arg_parallel", "args_parallel"),
        (lambda **x: Workflow(name="w", task_list=[], **x), "descripton", "description"),
        (lambda **x: Dataset(name="d", zarr_dir="/z", **x), "image", "images"),
        (
            lambda **x: Dataset(name="d", zarr_dir="/z", images=[{"zarr_url": "/z/a", **x}]),
            "attribute",
            "attributes",
        ),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(make: Any, wrong: str, right: str) -> None:
    with pytest.raises(ValidationError, match=f"unknown field '{wrong}': did you mean '{right}'"):
        make(**{wrong: {}})


def test_an_image_takes_no_other_fields() -> None:
    with pytest.raises(ValidationError):
        Image(zarr_url="/z/a", path="/z/a")  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [1, 0, "true", "yes", 1.0, None])
def test_types_are_strict_booleans(value: Any) -> None:
    for make in (
        lambda: Image(zarr_url="/z/a", types={"t": value}),
        lambda: Task(name="T", command_parallel="x", input_types={"t": value}),
        lambda: Task(name="T", command_parallel="x", output_types={"t": value}),
        lambda: WorkflowTask(task=PARALLEL, type_filters={"t": value}),
    ):
        with pytest.raises(ValidationError):
            make()


@pytest.mark.parametrize("value", ["A01", "", 1, 0, -1.5, True, False])
def test_attributes_are_scalars_and_keep_their_type(value: Any) -> None:
    kept = Image(zarr_url="/z/a", attributes={"x": value}).attributes["x"]

    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize("value", [None, [], {}, ["A"], math.nan, math.inf])
def test_other_attributes_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="should be text, a finite number, true or false"):
        Image(zarr_url="/z/a", attributes={"x": value})


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("/data/plate.zarr/", "/data/plate.zarr"),
        ("/data//plate.zarr/./B/03", "/data/plate.zarr/B/03"),
        ("//data", "/data"),
        ("///data", "/data"),
        ("/ data /x ", "/ data /x "),
        ("/data/...", "/data/..."),
        ("s3://bucket/plate.zarr//", "s3://bucket/plate.zarr"),
        ("s3://bucket/a/./b//c", "s3://bucket/a/./b//c"),
    ],
)
def test_urls_are_normalised_wherever_they_stand(given: str, normal: str) -> None:
    dataset = Dataset(name="d", zarr_dir=given, images=[Image(zarr_url=given, origin=given)])

    assert dataset.zarr_dir == dataset.images[0].zarr_url == dataset.images[0].origin == normal


@pytest.mark.parametrize("given", ["", "x/y", "~/x", "/a/..", "/../a", "file:///a", "S3://b", "s3:/b", "a\0"])
def test_other_urls_are_refused_wherever_they_stand(given: str) -> None:
    for make in (
        lambda: Dataset(name="d", zarr_dir=given),
        lambda: Image(zarr_url=given),
        lambda: Image(zarr_url="/a", origin=given),
    ):
        with pytest.raises(ValidationError):
            make()


def test_two_images_of_one_url_are_named() -> None:
    images = [Image(zarr_url="/z/a"), Image(zarr_url="/z/b"), Image(zarr_url="/z/./a/")]

    with pytest.raises(ValidationError, match=r"images\[0\] and images\[2\] have the same zarr_url, '/z/a'"):
        Dataset(name="d", zarr_dir="/z", images=images)


def test_images_may_lie_outside_the_zarr_dir() -> None:
    assert len(Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="/other/a")]).images) == 1


def test_id_and_order_default_to_the_position_and_are_unique() -> None:
    task = WorkflowTask(task=PARALLEL)
    named = WorkflowTask(task=PARALLEL, id="seg", order=4)

    tasks = Workflow(name="w", task_list=[task, named, task]).task_list
    assert [(one.id, one.order) for one in tasks] == [(0, 0), ("seg", 4), (2, 2)]
    with pytest.raises(ValidationError, match="positions 0 and 1 have the same order, 0"):
        Workflow(name="w", task_list=[task, WorkflowTask(task=PARALLEL, order=0)])
    with pytest.raises(ValidationError, match="positions 0 and 1 have the same id, 'seg'"):
        Workflow(name="w", task_list=[named, named])


@pytest.mark.parametrize("order", [-1, "1.5", 1.5])
def test_an_order_is_a_position(order: Any) -> None:
    with pytest.raises(ValidationError):
        WorkflowTask(task=PARALLEL, order=order)


def test_models_cannot_be_changed() -> None:
    dataset = Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="/z/a")])

    with pytest.raises(ValidationError):
        dataset.name = "e"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        dataset.images[0].zarr_url = "/z/b"  # type: ignore[misc]


def test_models_survive_pickle_and_json() -> None:
    dataset = Dataset(name="d", zarr_dir="/z", images=[Image(zarr_url="/z/a", attributes={"n": True})])
    task = Task(name="T", function_parallel=json.dumps)
    workflow = Workflow(name="w", task_list=[WorkflowTask(task=task)])

    assert pickle.loads(pickle.dumps(dataset)) == dataset
    assert pickle.loads(pickle.dumps(workflow)) == workflow
    assert Dataset.model_validate_json(dataset.model_dump_json()) == dataset
    again = Workflow.model_validate_json(workflow.model_dump_json())
    assert again.task_list[0].task.function_parallel == "json:dumps"


@pytest.mark.parametrize("command", ["", "  ", "echo 'open", "a\0b"])
def test_a_command_is_words(command: str) -> None:
    with pytest.raises(ValidationError):
        Task(name="T", command_parallel=command)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"cpus_per_task": 0}, r"Task 0 \('T'\): meta_parallel.cpus_per_task: 0 is not a whole number"),
        ({"mem": "much"}, "meta_parallel.mem: "),
        ({"timeout": -1}, "meta_parallel.timeout: "),
        ({"executor": "slurmm"}, "unknown executor 'slurmm'"),
        ({"executor": 1}, "meta_parallel.executor: 1 is not the name of an executor"),
    ],
)
async def test_a_wrong_meta_is_found_before_anything_runs(
    run: Any, parallel: Any, meta: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        await run(parallel(meta_parallel=meta))


async def test_unknown_meta_keys_are_passed_over_with_a_warning(
    run: Any, parallel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await run(parallel(meta_parallel={"colour": "red", "partition": "main"}), logger_name="mine")

    [record] = [one for one in caplog.records if one.levelname == "WARNING"]
    assert record.name == "mine"
    assert "meta keys unknown here are passed over: colour" in record.getMessage()
