"""What a run is going to do, as far as it can be known before it does it.

Everything a caller can have got wrong is found here, for the whole range of tasks, before anything runs;
`check` on the command line and `process_workflow` ask the same questions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fractal_runner.errors import did_you_mean
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import AttributeValue, Image, Types, Workflow, WorkflowTask, describe
from fractal_runner.workflow.units import Stage, title

STATUS_FILTER = "__wftask_dataset_image_status__"
STATUSES = ("unset", "submitted", "done", "failed")

_TYPE_FILTERS = TypeAdapter(Types)
_ATTRIBUTE_FILTERS = TypeAdapter(dict[str, list[AttributeValue]])


def task_range(workflow: Workflow, first: int | None, last: int | None) -> range:
    """The positions of the tasks to run, both ends included.

    Raises:
        ValueError: if the range is not one of this workflow's.
    """
    count = len(workflow.task_list)
    if count == 0:
        raise ValueError(f"the workflow {workflow.name!r} has no tasks")
    start = 0 if first is None else first
    end = count - 1 if last is None else last
    for name, value in (("first_task_index", start), ("last_task_index", end)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r} is not a whole number")
        if not 0 <= value < count:
            raise ValueError(
                f"{name}={value} is out of range: the workflow {workflow.name!r} has {count} "
                f"task{'' if count == 1 else 's'}, 0 to {count - 1}"
            )
    if start > end:
        raise ValueError(f"first_task_index={start} is greater than last_task_index={end}")
    return range(start, end + 1)


def check_filters(
    type_filters: Mapping[str, bool] | None,
    attribute_filters: Mapping[str, Sequence[Any]] | None,
    *,
    has_history: bool = False,
) -> tuple[dict[str, bool], dict[str, list[Any]]]:
    """The filters of a run, checked.

    Args:
        type_filters: as the caller has given them.
        attribute_filters: likewise.
        has_history: whether there is a record of earlier runs, which images can be selected by.

    Raises:
        ValueError: naming the filter and its value.
    """
    try:
        types = _TYPE_FILTERS.validate_python(type_filters or {})
    except ValidationError as error:
        raise ValueError(f"job_type_filters={type_filters!r}: {'; '.join(describe(error))}") from None
    try:
        attributes: dict[str, list[Any]] = dict(_ATTRIBUTE_FILTERS.validate_python(attribute_filters or {}))
    except ValidationError as error:
        raise ValueError(
            f"job_attribute_filters={attribute_filters!r}: {'; '.join(describe(error))}"
        ) from None
    if STATUS_FILTER in attributes:
        if not has_history:
            raise ValueError(
                f"the attribute filter {STATUS_FILTER!r} selects images by what earlier runs have come to: "
                "give the history= that holds them (on the command line, --db)"
            )
        for value in attributes[STATUS_FILTER]:
            if value not in STATUSES:
                raise ValueError(
                    f"the attribute filter {STATUS_FILTER!r} knows no status {value!r}: "
                    f"{did_you_mean(str(value), STATUSES)}"
                )
    return types, attributes


def own_type_filters(task: WorkflowTask) -> dict[str, bool]:
    """What the task itself and the workflow ask of the types of its images.

    Raises:
        ValueError: if they contradict each other.
    """
    for name, value in task.type_filters.items():
        wanted = task.task.input_types.get(name, value)
        if wanted != value:
            raise ValueError(
                f"{title(task)}: its type_filters ask for {name}={value}, but the task takes only images "
                f"with {name}={wanted} (input_types)"
            )
    return {**task.task.input_types, **task.type_filters}


def filters_for(task: WorkflowTask, current: Mapping[str, bool]) -> dict[str, bool]:
    """The type filters in force for a task. A converter gets no images, and adds no filters."""
    return dict(current) if task.task.is_converter else {**current, **own_type_filters(task)}


def filters_after(task: WorkflowTask, in_force: Mapping[str, bool]) -> dict[str, bool]:
    """The current type filters once the task has run."""
    return {**in_force, **task.task.output_types}


def select(
    task: WorkflowTask, images: ImageList, types: Mapping[str, bool], attributes: Mapping[str, Sequence[Any]]
) -> list[Image]:
    """The images that a task gets."""
    return [] if task.task.is_converter else images.select(types, attributes)


def no_images(task: WorkflowTask, types: Mapping[str, bool], attributes: Mapping[str, Sequence[Any]]) -> str:
    """What to say of a task that would get no images."""
    return (
        f"Cannot run task '{task.task.name}' for an empty image list "
        f"(type filters in force: {dict(types)}, attribute filters: {dict(attributes)})."
    )


def missing_program(stage: Stage) -> str | None:
    """What is wrong with the first word of the stage's command on this machine; None if nothing is."""
    if stage.command is None or shutil.which(stage.command[0]) is not None:
        return None
    word = stage.command[0]
    where = "there is no such executable file" if "/" in word else "it is not on the PATH"
    half = "parallel" if stage.parallel else "non_parallel"
    return f"{title(stage.task)}: the program {word!r} of command_{half} cannot be executed: {where}."
