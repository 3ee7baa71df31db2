"""What tasks return: validate it, and merge it into the image list.

A task's outputs are merged as a whole, once all its units have ended: either all of it is in the new
list, or the list is as it was. Everything is linear in the number of images.
"""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fractal_runner.errors import JobExecutionError, TaskOutputValidationError
from fractal_runner.workflow.images import ImageList
from fractal_runner.workflow.models import (
    DATA_CONFIG,
    AttributeValue,
    Image,
    Scalar,
    TaskType,
    Types,
    ZarrUrl,
    describe,
    image_of,
    teach,
)
from fractal_runner.workflow.urls import is_inside


@dataclass(slots=True, frozen=True, config=DATA_CONFIG)
class ImageUpdate:
    """A new image, or what changes in an existing one. A null attribute removes the attribute."""

    zarr_url: ZarrUrl
    origin: ZarrUrl | None = None
    attributes: dict[str, AttributeValue | None] = Field(default_factory=dict)
    types: Types = Field(default_factory=dict)


@dataclass(slots=True, frozen=True, config=DATA_CONFIG)
class TaskOutput:
    """What a unit of a task returns about images."""

    image_list_updates: list[ImageUpdate] = Field(default_factory=list)
    image_list_removals: list[ZarrUrl] = Field(default_factory=list)


@dataclass(slots=True, frozen=True, config=DATA_CONFIG)
class ComputeItem:
    """One element of a parallelization list: what a compute unit is given."""

    zarr_url: ZarrUrl
    init_args: dict[str, Any] = Field(default_factory=dict)


@dataclass(slots=True, frozen=True, config=DATA_CONFIG)
class InitOutput:
    """What the non-parallel part of a compound task returns."""

    parallelization_list: list[ComputeItem] = Field(default_factory=list)


_T = TypeVar("_T")
_TASK_OUTPUT = TypeAdapter(TaskOutput)
_INIT_OUTPUT = TypeAdapter(InitOutput)
_FIELDS = {
    "image_list_updates": ("zarr_url", "origin", "attributes", "types"),
    "parallelization_list": ("zarr_url", "init_args"),
}


def validate_output(raw: Any) -> TaskOutput | None:
    """The output of a unit as it was read from JSON; None if it is empty.

    Raises:
        ValueError: naming each place that is wrong.
    """
    if not raw and (raw is None or isinstance(raw, dict)):
        return None
    output = _validated(_TASK_OUTPUT, raw, ("image_list_updates", "image_list_removals"))
    return output if output.image_list_updates or output.image_list_removals else None


def validate_init_output(raw: Any) -> list[ComputeItem]:
    """The parallelization list of a compound task's init unit, each element once.

    Raises:
        ValueError: naming each place that is wrong.
    """
    if not raw and (raw is None or isinstance(raw, dict)):
        return []
    output = _validated(_INIT_OUTPUT, raw, ("parallelization_list",))
    return list({_content(item): item for item in output.parallelization_list}.values())


def _validated(adapter: TypeAdapter[_T], raw: Any, fields: Iterable[str]) -> _T:
    if not isinstance(raw, dict):
        raise ValueError(f"should be an object or null, not {type(raw).__name__}")
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise ValueError("; ".join(describe(teach(error, "output", fields, _FIELDS)))) from None


@plain_dataclass(slots=True)
class UnitOutput:
    """A unit that has ended, as merging sees it.

    Attributes:
        zarr_url: the unit's own image, or its element's zarr_url; None for a unit of all images.
        succeeded: whether it ended well.
        output: what it returned, if it succeeded and returned anything.
    """

    zarr_url: str | None
    succeeded: bool
    output: TaskOutput | None = None


def merge(
    images: ImageList,
    units: Iterable[UnitOutput],
    *,
    task_type: TaskType,
    output_types: dict[str, bool],
    zarr_dir: str,
    selected: Iterable[str],
) -> ImageList:
    """The image list after a task.

    Args:
        images: the list before it; it is left as it is.
        units: the units that have ended, in unit order.
        task_type: decides what units without output stand for.
        output_types: laid over the types of every image that is updated.
        zarr_dir: the normalised directory that new images must lie in.
        selected: the zarr_urls of the task's input images.

    Raises:
        TaskOutputValidationError: if the outputs contradict each other.
        JobExecutionError: if an image would be created outside zarr_dir, or one is removed that is not
            there.
    """
    ended = list(units)
    with collector_paused():
        stated, removals = _collect(ended)
        if task_type == "parallel":
            updates = _with_silent_units(ended, stated, removals)
        elif stated or removals:
            updates = list(stated.values())
        else:
            updates = [_touch(url) for url in _all_or_what_succeeded(ended, selected) if url in images]
        merged = images.by_url()
        _apply(merged, updates, output_types, zarr_dir)
        for url in removals:
            if url not in merged:
                raise JobExecutionError(f"Cannot remove missing image (zarr_url={url!r}).")
            del merged[url]
        return ImageList.of(merged)


def _collect(units: list[UnitOutput]) -> tuple[dict[str, ImageUpdate], dict[str, None]]:
    """All updates by zarr_url, in unit order, and all removals; refuses contradictions."""
    updates: dict[str, ImageUpdate] = {}
    removals: dict[str, None] = {}
    for unit in units:
        if unit.output is None:
            continue
        for update in unit.output.image_list_updates:
            first = updates.setdefault(update.zarr_url, update)
            if first is not update and _content(first) != _content(update):
                raise TaskOutputValidationError(
                    f"The task's units update one image in two different ways: {update.zarr_url!r}, once "
                    f"with {_content(first)} and once with {_content(update)}."
                )
        removals.update(dict.fromkeys(unit.output.image_list_removals))
    for url in removals:
        if url in updates:
            raise TaskOutputValidationError(f"The task both updates and removes one image: {url!r}.")
    return updates, removals


def _with_silent_units(
    units: list[UnitOutput], stated: dict[str, ImageUpdate], removals: dict[str, None]
) -> list[ImageUpdate]:
    """The updates of a parallel task, those of units that returned nothing included, in unit order.

    Such a unit stands for an update of its own image, unless some unit went beyond its own image (it
    made new ones): then what returned nothing says nothing.
    """
    own_images_only = all(
        update.zarr_url == unit.zarr_url
        for unit in units
        if unit.output is not None
        for update in unit.output.image_list_updates
    )
    if not own_images_only:
        return list(stated.values())
    updates = dict[str, ImageUpdate]()
    for unit in units:
        if unit.output is not None:
            for update in unit.output.image_list_updates:
                updates.setdefault(update.zarr_url, update)
        elif unit.succeeded and unit.zarr_url is not None and unit.zarr_url not in removals:
            updates.setdefault(unit.zarr_url, stated.get(unit.zarr_url) or _touch(unit.zarr_url))
    return list(updates.values())


def _touch(url: str) -> ImageUpdate:
    """An update that changes nothing but what every update does; the URL has been checked already."""
    update = object.__new__(ImageUpdate)
    for name, value in (("zarr_url", url), ("origin", None), ("attributes", {}), ("types", {})):
        object.__setattr__(update, name, value)
    return update


def _all_or_what_succeeded(units: list[UnitOutput], selected: Iterable[str]) -> Iterator[str]:
    """Which input images count as updated where no unit returned anything."""
    if all(unit.succeeded for unit in units):
        yield from selected
        return
    succeeded = {unit.zarr_url for unit in units if unit.succeeded}
    failed = {unit.zarr_url for unit in units if not unit.succeeded}
    yield from (url for url in selected if url in succeeded and url not in failed)


def _apply(
    images: dict[str, Image], updates: Iterable[ImageUpdate], output_types: dict[str, bool], zarr_dir: str
) -> None:
    """Put what each update makes into `images`, one after the other: a later one may build on it."""
    get = images.get
    for update in updates:
        url = update.zarr_url
        base = get(url)
        if base is not None and (update.origin is None or update.origin == url):
            origin = base.origin
        else:
            if base is None and not is_inside(url, zarr_dir):
                raise JobExecutionError(
                    "Cannot create image if zarr_url is not a subfolder of zarr_dir "
                    f"(zarr_url={url!r}, zarr_dir={zarr_dir!r})."
                )
            origin = update.origin
            base = None if origin is None else get(origin)
        if base is None:
            # An update is read once, so what it brings can become the image's own.
            attributes, types = update.attributes, update.types
            if output_types:
                types = {**types, **output_types}
        else:
            attributes = {**base.attributes, **update.attributes}
            types = {**base.types, **update.types, **output_types}
        if None in attributes.values():
            attributes = {name: value for name, value in attributes.items() if value is not None}
        images[url] = image_of(url, origin, cast("dict[str, Scalar]", attributes), types)


def _content(item: ImageUpdate | ComputeItem) -> str:
    """What two items must have in common to be the same one: their JSON, in which true is not 1."""
    return json.dumps(asdict(item), sort_keys=True)


_pause_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without the cyclic garbage collector, which would walk a million new images again and again.

    It is one per process: paused from the first who asks to the last. `_pause_lock` guards the count.
    """
    global _pauses, _was_enabled  # noqa: PLW0603 - the collector is a global, and so is who paused it
    with _pause_lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _pause_lock:
            _pauses -= 1
            if _pauses == 0 and _was_enabled:
                gc.enable()
