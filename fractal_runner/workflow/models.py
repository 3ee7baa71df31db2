"""Workflows, tasks, datasets and images, as Fractal (V2) has them.

What users write is checked here, once; everything behind it relies on it. Unknown fields are errors that
name the nearest known one. Images are slotted dataclasses rather than models: a dataset may have a
million of them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from fractal_runner.errors import did_you_mean
from fractal_runner.workflow.urls import normalise_url

TaskType = Literal["non_parallel", "parallel", "compound", "converter_non_parallel", "converter_compound"]

RESERVED_ARGS = frozenset({"zarr_url", "zarr_urls", "zarr_dir", "init_args"})


class _SaysScalar:
    """One sentence for a value that is none of a union's types, instead of one complaint per type."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(
            handler(source),
            custom_error_type="scalar",
            custom_error_message="should be text, a finite number, true or false",
        )


Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
AttributeValue = Annotated[Scalar, _SaysScalar]
ZarrUrl = Annotated[str, AfterValidator(normalise_url)]
Types = dict[str, StrictBool]

DATA_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value  # exports write null for an empty object


def _json_only(value: dict[str, Any]) -> dict[str, Any]:
    """Arguments are written to JSON files: better to say now what could not be."""
    for name, item in value.items():
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the value of {name!r} cannot be written as JSON: {error}") from None
    return value


def _plain_words(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{command!r} cannot be split into words: {error}") from None
    if not words:
        raise ValueError("an empty command: name a program")
    if "\0" in command:
        raise ValueError(f"{command!r} contains a NUL character, which no argument can")
    return command


def _function_place(function: Any) -> Any:
    if isinstance(function, str):
        module, colon, name = function.partition(":")
        if not (colon and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))):
            raise ValueError(f"{function!r} is not the place of a function: write 'package.module:name'")
    return function


_JsonObject = Annotated[dict[str, Any], BeforeValidator(_none_is_empty)]
_Args = Annotated[_JsonObject, AfterValidator(_json_only)]
_Types = Annotated[Types, BeforeValidator(_none_is_empty)]
_Command = Annotated[str, AfterValidator(_plain_words)]
_Function = Annotated[Callable[..., Any] | str, AfterValidator(_function_place)]


@dataclass(slots=True, frozen=True, config=DATA_CONFIG)
class Image:
    """An image of a dataset.

    Attributes:
        zarr_url: where it is: an absolute path or an s3:// URL; its identity in the dataset.
        origin: the zarr_url of the image it was made from.
        attributes: what it can be selected by: strings, numbers or booleans by name ("well": "A01").
        types: flags by name ("is_3D": True); one that is absent is False.
    """

    zarr_url: ZarrUrl
    origin: ZarrUrl | None = None
    attributes: dict[str, AttributeValue] = Field(default_factory=dict)
    types: Types = Field(default_factory=dict)


def image_of(
    zarr_url: str, origin: str | None, attributes: dict[str, Scalar], types: dict[str, bool]
) -> Image:
    """An Image of values that have been checked already."""
    image = _new_image(Image)
    # The slots' own descriptors: a frozen dataclass's `__setattr__` refuses, and a million are made.
    _set_zarr_url(image, zarr_url)
    _set_origin(image, origin)
    _set_attributes(image, attributes)
    _set_types(image, types)
    return image


_new_image = object.__new__
_set_zarr_url, _set_origin, _set_attributes, _set_types = (
    getattr(Image, name).__set__ for name in ("zarr_url", "origin", "attributes", "types")
)


class _Model(BaseModel):
    """A model that users write: immutable, and teaching the right name for a wrong one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    dataclass_fields: ClassVar[Mapping[str, Sequence[str]]] = {}  # of lists of dataclasses, by field

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise teach(error, cls.__name__, list(cls.model_fields), cls.dataclass_fields) from None


def teach(
    error: ValidationError,
    title: str,
    fields: Iterable[str],
    fields_below: Mapping[str, Sequence[str]],
) -> ValidationError:
    """`error`, with the nearest known name wherever it is about an unknown field."""
    lines = []
    for line in error.errors(include_url=False):
        place = line["loc"]
        known = list(fields) if len(place) == 1 else fields_below.get(str(place[0])) if place else None
        kind: str | PydanticCustomError = line["type"]
        context = line.get("ctx", {})
        if line["type"] in ("extra_forbidden", "unexpected_keyword_argument") and known is not None:
            message = f"unknown field {str(place[-1])!r}: {did_you_mean(str(place[-1]), known)}"
            kind = PydanticCustomError("unknown_field", "{message}", {"message": message})
        elif line["type"] in ("value_error", "assertion_error") or line["type"] not in _BUILT_IN_ERRORS:
            # An error of our own: its sentence, without pydantic's "Value error" in front.
            message = str(context.get("error") or line["msg"])
            kind = PydanticCustomError(line["type"], "{message}", {"message": message})
        lines.append(InitErrorDetails(type=kind, loc=place, input=line["input"], ctx=context))
    return ValidationError.from_exception_data(title, lines)


def describe(error: ValidationError, limit: int = 20) -> list[str]:
    """The mistakes that `error` found, a sentence each with its place; at most `limit`, and a count."""
    lines = []
    for line in error.errors(include_url=False, include_context=False, include_input=False)[:limit]:
        place = ""
        for part in line["loc"]:
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        lines.append(f"{place}: {line['msg']}" if place else line["msg"])
    hidden = error.error_count() - len(lines)
    return [*lines, f"and {hidden} more of this kind"] if hidden > 0 else lines


_BUILT_IN_ERRORS = frozenset(get_args(core_schema.ErrorType))
_NEEDS = {  # task type -> (a non-parallel command or function, a parallel one)
    "non_parallel": (True, False),
    "parallel": (False, True),
    "compound": (True, True),
    "converter_non_parallel": (True, False),
    "converter_compound": (True, True),
}


class Task(_Model):
    """What a package offers: one or two commands (or Python functions), and what they work on.

    Attributes:
        name: what people call it; it also names the folder of its files.
        type: which commands it has and what they are run for; follows from the commands if not given.
        command_non_parallel: run once, for all images.
        command_parallel: run once per image, or per element of what the first one lists.
        function_non_parallel: a Python function in place of the command, or "package.module:name".
        function_parallel: likewise.
        input_types: types that an image must have to be given to it.
        output_types: types that its images have afterwards.
        meta_non_parallel: resources (mem, cpus_per_task, timeout, …) of the first command.
        meta_parallel: of the second.
        id, pkg_name, version: where it comes from.
    """

    name: str = Field(min_length=1)
    type: TaskType
    id: int | str | None = None
    command_non_parallel: _Command | None = None
    command_parallel: _Command | None = None
    function_non_parallel: _Function | None = None
    function_parallel: _Function | None = None
    input_types: _Types = Field(default_factory=dict)
    output_types: _Types = Field(default_factory=dict)
    meta_non_parallel: _JsonObject = Field(default_factory=dict)
    meta_parallel: _JsonObject = Field(default_factory=dict)
    pkg_name: str | None = None
    version: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _type_follows_from_the_commands(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("type") is None:
            kind = type_of(_given(value, "non_parallel"), _given(value, "parallel"))
            if kind is not None:
                return {**value, "type": kind}
        return value

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        for half, needed in zip(("non_parallel", "parallel"), _NEEDS[self.type], strict=True):
            given = [
                f"{kind}_{half}"
                for kind in ("command", "function")
                if getattr(self, f"{kind}_{half}") is not None
            ]
            if needed and not given:
                raise ValueError(
                    f"task {self.name!r} is of type {self.type}: it needs command_{half} or function_{half}"
                )
            if not needed and given:
                raise ValueError(f"task {self.name!r} is of type {self.type}: it takes no {given[0]}")
            if len(given) > 1:
                raise ValueError(f"task {self.name!r} has both {given[0]} and {given[1]}: give one of them")
        return self

    @property
    def is_converter(self) -> bool:
        return self.type.startswith("converter_")

    @property
    def is_compound(self) -> bool:
        return self.type.endswith("compound")

    @field_serializer("function_non_parallel", "function_parallel", when_used="json")
    def _place_of_function(self, function: Callable[..., Any] | str | None) -> str | None:
        if function is None or isinstance(function, str):
            return function
        module = getattr(function, "__module__", "?")
        return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


class WorkflowTask(_Model):
    """A task in a workflow, with its arguments.

    Attributes:
        task: the task.
        id: its durable name; its position in the workflow if not given.
        order: its place in the workflow; its position if not given.
        args_non_parallel: arguments of the task's non-parallel command.
        args_parallel: of its parallel one.
        meta_non_parallel: resources that override the task's own.
        meta_parallel: likewise.
        type_filters: types that an image must have, in addition to the task's input_types.
        alias, description: for people.
    """

    task: Task
    id: int | str | None = None
    order: int | None = Field(default=None, ge=0)
    args_non_parallel: _Args = Field(default_factory=dict)
    args_parallel: _Args = Field(default_factory=dict)
    meta_non_parallel: _JsonObject = Field(default_factory=dict)
    meta_parallel: _JsonObject = Field(default_factory=dict)
    type_filters: _Types = Field(default_factory=dict)
    alias: str | None = None
    description: str | None = None

    @field_validator("args_non_parallel", "args_parallel")
    @classmethod
    def _leave_reserved_names(cls, args: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(RESERVED_ARGS & args.keys())
        if taken:
            raise ValueError(
                f"the argument {taken[0]!r} is reserved: its value comes from the dataset; remove it"
            )
        return args

    @model_validator(mode="after")
    def _has_no_arguments_for_nothing(self) -> Self:
        for half, needed in zip(("non_parallel", "parallel"), _NEEDS[self.task.type], strict=True):
            if not needed and getattr(self, f"args_{half}"):
                raise ValueError(
                    f"args_{half} is given, but task {self.task.name!r} of type {self.task.type} "
                    f"has no {half.replace('_', '-')} command to take it"
                )
        return self


class Workflow(_Model):
    """An ordered list of workflow tasks."""

    name: str
    task_list: list[WorkflowTask]
    description: str | None = None

    @field_validator("task_list")
    @classmethod
    def _number_by_position(cls, tasks: list[WorkflowTask]) -> list[WorkflowTask]:
        numbered = [
            task.model_copy(
                update={
                    "id": position if task.id is None else task.id,
                    "order": position if task.order is None else task.order,
                }
            )
            for position, task in enumerate(tasks)
        ]
        for given, task in zip(tasks, numbered, strict=True):
            if given.id is None or "id" not in given.model_fields_set:
                task.model_fields_set.discard("id")  # its position is no name that lasts
        for name in ("id", "order"):
            seen: dict[Any, int] = {}
            for position, task in enumerate(numbered):
                value = getattr(task, name)
                if value in seen:
                    raise ValueError(
                        f"the tasks at positions {seen[value]} and {position} have the same {name}, "
                        f"{value!r}: one that is not given is the position"
                    )
                seen[value] = position
        return numbered


class Dataset(_Model):
    """Images, and the directory that new ones are made in.

    Attributes:
        name: what people call it.
        zarr_dir: the directory that all images that tasks create lie in.
        images: the image list, in order; every zarr_url stands in it once.
        id: its durable name, where it has one.
    """

    name: str
    zarr_dir: ZarrUrl
    images: list[Image] = Field(default_factory=list)
    id: int | str | None = None

    dataclass_fields: ClassVar[Mapping[str, Sequence[str]]] = {
        "images": ("zarr_url", "origin", "attributes", "types")
    }

    @field_validator("images")
    @classmethod
    def _one_image_per_url(cls, images: list[Image]) -> list[Image]:
        if len({image.zarr_url for image in images}) < len(images):
            seen: dict[str, int] = {}
            for position, image in enumerate(images):
                if image.zarr_url in seen:
                    raise ValueError(
                        f"images[{seen[image.zarr_url]}] and images[{position}] have the same zarr_url, "
                        f"{image.zarr_url!r}"
                    )
                seen[image.zarr_url] = position
        return images

    def with_images(self, images: Iterable[Image]) -> Dataset:
        """This dataset with other images, which have been checked already."""
        return self.model_copy(update={"images": list(images)})


def type_of(non_parallel: object, parallel: object) -> TaskType | None:
    """The type of a task that has these commands; None if it has none."""
    if non_parallel and parallel:
        return "compound"
    if non_parallel:
        return "non_parallel"
    return "parallel" if parallel else None


def _given(value: Mapping[str, Any], half: str) -> bool:
    return value.get(f"command_{half}") is not None or value.get(f"function_{half}") is not None
