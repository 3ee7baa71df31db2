"""Files of workflows and datasets: read what people and fractal-web write, write what a run leaves.

A file with mistakes is answered with all of them at once, each with its place. Keys of older exports are
understood, with a warning.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fractal_runner.errors import InputFileError, JobExecutionError
from fractal_runner.worker.jsontext import encoder
from fractal_runner.workflow.identity import unpacked_text
from fractal_runner.workflow.manifest import TaskLookupError, TaskPackage, find_packages, find_task
from fractal_runner.workflow.models import Dataset, Image, Task, Workflow, describe
from fractal_runner.workflow.outputs import collector_paused

DATASET_FILE = "dataset.json"
FILTERS_FILE = "filters.json"

_LEGACY_DATASET_KEYS = ("filters", "type_filters", "attribute_filters")
_BY_NAME = {"pkg_name", "version", "name"}
_COMMANDS = ("command_non_parallel", "command_parallel", "function_non_parallel", "function_parallel")
_IMAGES_AT_A_TIME = 1000
_encode = encoder()


def load_workflow(
    path: str | os.PathLike[str], *, task_env: str | os.PathLike[str] | None = None
) -> Workflow:
    """Read a workflow file: fractal-web's export format, or one with whole tasks.

    Args:
        path: the JSON file.
        task_env: the Python interpreter (or virtual environment) whose packages the tasks that are
            given by name are taken from; None for this interpreter's.

    Raises:
        InputFileError: naming every mistake and its place.
    """
    data = _object(path, "a workflow")
    problems: list[str] = []
    tasks = data.get("task_list")
    if isinstance(tasks, list):
        packages = _Packages(task_env)
        data["task_list"] = [
            _workflow_task(item, f"task_list[{index}]", path, packages, problems)
            for index, item in enumerate(tasks)
        ]
    try:
        workflow = Workflow.model_validate(data)
    except ValidationError as error:
        problems += _beside(problems, describe(error))
    if problems:
        raise _input_file_error(path, problems)
    return workflow


def load_dataset(path: str | os.PathLike[str], *, zarr_dir: str | None = None) -> Dataset:
    """Read a dataset file in fractal-web's export format.

    Args:
        path: the JSON file.
        zarr_dir: replaces the file's own.

    Raises:
        InputFileError: naming every mistake and its place.
    """
    with collector_paused():
        data = _object(path, "a dataset")
        for key in _LEGACY_DATASET_KEYS:
            if key in data:
                value = data.pop(key)
                if value and any(value.values() if isinstance(value, dict) else [value]):
                    _warn(
                        path,
                        f"{key!r} ({json.dumps(value)}) is a key of older exports and is not applied; "
                        "give filters to the run (--type-filter, --attribute-filter)",
                    )
                else:
                    _warn(path, f"{key!r} is a key of older exports; it is empty and passed over")
        if zarr_dir is not None:
            data["zarr_dir"] = zarr_dir
        try:
            return Dataset.model_validate(data)
        except ValidationError as error:
            raise _input_file_error(path, describe(error)) from None


def write_dataset(path: Path, dataset: Dataset) -> None:
    """Write a dataset in the export format, one image a line, in whole or not at all.

    Raises:
        OSError: if it cannot be written; what was there before is still there.
    """
    write_file(path, dataset_text(dataset))


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file, in whole or not at all."""
    write_file(path, iter([json.dumps(value, indent=2) + "\n"]))


def write_state(
    directory: Path,
    dataset: Dataset,
    type_filters: Mapping[str, bool],
    attribute_filters: Mapping[str, Any],
    text: bytes | None = None,
) -> None:
    """Write where a run is: enough to go on from here in another directory.

    Args:
        directory: the run's.
        dataset: the dataset as it is now.
        type_filters: in force.
        attribute_filters: in force.
        text: the dataset as it was recorded, if it was.

    Raises:
        JobExecutionError: if it cannot be written.
    """
    filters = {"type_filters": dict(type_filters), "attribute_filters": dict(attribute_filters)}
    try:
        write_file(directory / DATASET_FILE, dataset_text(dataset) if text is None else unpacked_text(text))
        write_json(directory / FILTERS_FILE, filters)
    except OSError as error:
        raise JobExecutionError(
            f"The run cannot go on: {error.filename} cannot be written: {error.strerror}.",
            dataset=dataset,
            type_filters=type_filters,
        ) from error


def write_file(path: Path, parts: Iterator[str]) -> None:
    """Write a file beside its place, on disk for good, and then put it in its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the file beside it, nor nothing, as write(2) has it
        raise


def dataset_text(dataset: Dataset) -> Iterator[str]:
    """A dataset in the export format, in parts."""
    head: dict[str, Any] = {"name": dataset.name, "zarr_dir": dataset.zarr_dir}
    if dataset.id is not None:
        head["id"] = dataset.id
    yield json.dumps(head, indent=2)[:-2] + ',\n  "images": ['
    # In small steps: one dump of a million images would keep every other thread waiting.
    for start in range(0, len(dataset.images), _IMAGES_AT_A_TIME):
        images = dataset.images[start : start + _IMAGES_AT_A_TIME]
        yield ("," if start else "") + ",".join(f"\n    {_encode(_plain(image))}" for image in images)
    yield "\n  ]\n}\n" if dataset.images else "]\n}\n"


def _plain(image: Image) -> dict[str, Any]:
    return {
        "zarr_url": image.zarr_url,
        "origin": image.origin,
        "attributes": image.attributes,
        "types": image.types,
    }


class _Packages:
    """The task packages of an environment, looked for once, when a workflow first names one."""

    def __init__(self, task_env: str | os.PathLike[str] | None) -> None:
        self._task_env = task_env
        self._packages: list[TaskPackage] | None = None
        self._problem: TaskLookupError | None = None

    def task(self, pkg_name: str, version: str | None, name: str) -> Task:
        if self._problem is not None:
            raise self._problem
        if self._packages is None:
            try:
                self._packages = find_packages(self._task_env)
            except TaskLookupError as error:
                self._problem = error
                raise
        return find_task(self._packages, pkg_name, version, name)


def _workflow_task(
    item: Any, place: str, path: str | os.PathLike[str], packages: _Packages, problems: list[str]
) -> Any:
    """A workflow task as its model takes it: legacy keys renamed, a task given by name looked up."""
    if not isinstance(item, dict):
        return item
    item = dict(item)
    if "input_filters" in item:
        filters = item.pop("input_filters") or {}
        types = filters.get("types") if isinstance(filters, dict) else None
        _warn(path, f"{place}.input_filters is a key of older exports; its types are taken as type_filters")
        item["type_filters"] = {**(types or {}), **(item.get("type_filters") or {})}
    task = item.get("task")
    if isinstance(task, Mapping) and "name" in task and not any(task.get(key) for key in _COMMANDS):
        if not task.get("pkg_name"):
            problems.append(
                f"{place}.task: {task['name']!r} has neither a command nor a function nor a pkg_name "
                "to look it up by"
            )
            item["task"] = _placeholder(task["name"])
        elif task.keys() <= _BY_NAME:
            try:
                item["task"] = packages.task(task["pkg_name"], task.get("version"), task["name"])
            except TaskLookupError as error:
                problems.append(f"{place}.task: {error}")
                item["task"] = _placeholder(task["name"])
    return item


def _placeholder(name: Any) -> dict[str, Any]:
    """Stands for a task that could not be found, so that the rest of the file is checked as well."""
    return {
        "name": str(name) or "?",
        "type": "compound",
        "command_non_parallel": "missing",
        "command_parallel": "missing",
    }


def _object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise _input_file_error(path, [f"cannot be read: {os.strerror(error.errno or 0)}"]) from None
    except UnicodeDecodeError as error:
        raise _input_file_error(path, [f"is not UTF-8 text: {error.reason} at byte {error.start}"]) from None
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(sorted({name for name in names if names.count(name) > 1}))
        return result

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text.splitlines() else ""
        near = line[max(0, error.colno - 31) : error.colno + 30].strip()
        raise _input_file_error(
            path,
            [f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}, near {near!r}"],
        ) from None
    except RecursionError:
        raise _input_file_error(path, ["not valid JSON: nested too deeply"]) from None
    if twice:
        raise _input_file_error(path, [f"the key {name!r} stands twice in one object" for name in twice])
    if not isinstance(data, dict):
        raise _input_file_error(path, [f"{what} is a JSON object, and this is {_json_name(data)}"])
    return data


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _beside(found: list[str], more: list[str]) -> list[str]:
    """`more`, without what is said of a place that something was found about already."""
    places = tuple(problem.split(": ", 1)[0] for problem in found)
    return [problem for problem in more if not problem.startswith(places)] if places else more


def _warn(path: str | os.PathLike[str], message: str) -> None:
    warnings.warn(f"{os.fspath(path)}: {message}", UserWarning, stacklevel=3)


def _input_file_error(path: str | os.PathLike[str], problems: list[str]) -> InputFileError:
    name = os.fspath(path)
    if len(problems) == 1:
        message = f"{name}: {problems[0]}"
    else:
        message = f"{name}: {len(problems)} mistakes\n" + "\n".join(f"  {problem}" for problem in problems)
    return InputFileError(message, file=name, problems=problems)
