"""What makes two workflow tasks, two datasets or two units the same, from one process to the next.

A history outlives the process that wrote it, and what is given to a resume is read anew. So identity is
told by content, as JSON has it, never by objects.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fractal_runner.errors import HistoryError
from fractal_runner.worker.jsontext import encoder
from fractal_runner.workflow.models import Dataset, WorkflowTask

_sorted_json = encoder(sort_keys=True, separators=(",", ":"))
_encode = encoder()
# What decides what a task's units do; a change in it makes their earlier results void.
_WORK = (
    *("type", "command_non_parallel", "command_parallel", "function_non_parallel", "function_parallel"),
    *("args_non_parallel", "args_parallel"),
)
_ITEMS_AT_A_TIME = 1000
_PART_BYTES = 1 << 20
_ABSENT = object()


def task_content(task: WorkflowTask) -> dict[str, Any]:
    """All of a workflow task that decides which images it gets, what it does, and what comes of it."""
    what = task.task.model_dump(mode="json")
    return {
        "id": task.id,
        "order": task.order,
        "name": what["name"],
        **{name: what[name] for name in _WORK if name in what},
        "args_non_parallel": task.args_non_parallel,
        "args_parallel": task.args_parallel,
        "type_filters": task.type_filters,
        "input_types": what["input_types"],
        "output_types": what["output_types"],
    }


def work_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task's content, what its units do."""
    return {name: content[name] for name in _WORK}


def unit_digest(task: WorkflowTask) -> Callable[[Mapping[str, Any]], str]:
    """A function from the arguments of one of the task's units to the digest of what it does."""
    content = task_content(task)
    base = hashlib.blake2b(_sorted_json(work_of(content)).encode(), digest_size=16)

    def digest(args: Mapping[str, Any]) -> str:
        both = base.copy()
        both.update(_sorted_json(args).encode())
        return both.hexdigest()

    return digest


def task_key(task: WorkflowTask) -> str:
    """Which workflow task it is, over all runs: by its id, where it was given one."""
    if "id" in task.model_fields_set:
        return f"id:{_encode(task.id)}"
    return f"task:{_encode([task.order, task.task.pkg_name, task.task.name])}"


def dataset_key(dataset: Dataset) -> str:
    """Which dataset it is, over all runs: by its id, where it was given one."""
    return f"zarr_dir:{dataset.zarr_dir}" if dataset.id is None else f"id:{_encode(dataset.id)}"


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """Where two JSON values differ first, in words; None if they do not."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            where = f"{place}.{name}" if place else str(name)
            if found := first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), where):
                return found
        return None
    if _is_list(old) and _is_list(new):
        for index in range(max(len(old), len(new))):
            before = old[index] if index < len(old) else _ABSENT
            after = new[index] if index < len(new) else _ABSENT
            if found := first_difference(before, after, f"{place}[{index}]"):
                return found
        return None
    if type(old) is type(new) and old == new:
        return None
    return f"{place} was {_words(old)} and is {_words(new)}"


def packed(parts: Iterable[str]) -> bytes:
    """JSON text, in parts, compressed."""
    compressor = zlib.compressobj(1)
    return b"".join([*(compressor.compress(part.encode()) for part in parts), compressor.flush()])


def unpacked(data: bytes) -> Any:
    """The value that `packed` was given the text of.

    Raises:
        HistoryError: if it is damaged.
    """
    try:
        return json.loads(zlib.decompress(data))
    except (zlib.error, ValueError) as error:
        raise HistoryError(f"What is recorded of a dataset is damaged: {error}.") from error


def unpacked_text(data: bytes) -> Iterator[str]:
    """The text that `packed` was given, in parts: which are not the same, but of ASCII as well."""
    decompressor = zlib.decompressobj()
    while data and not decompressor.eof:
        yield decompressor.decompress(data, _PART_BYTES).decode("ascii")
        data = decompressor.unconsumed_tail


def json_in_steps(value: Mapping[str, Any]) -> str:
    """A unit's output as JSON; long lists in steps, between which other threads have their turn."""
    if not any(_is_list(item) and len(item) > _ITEMS_AT_A_TIME for item in value.values()):
        return _encode(value)
    return "{" + ", ".join(f"{_encode(name)}: {_in_steps(item)}" for name, item in value.items()) + "}"


def _in_steps(value: Any) -> str:
    return "[" + ", ".join(_steps(value)) + "]" if _is_list(value) and value else _encode(value)


def _steps(items: Sequence[Any]) -> Iterator[str]:
    for start in range(0, len(items), _ITEMS_AT_A_TIME):
        yield _encode(items[start : start + _ITEMS_AT_A_TIME])[1:-1]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _words(value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    text = _encode(value)
    return text if len(text) <= 200 else text[:200] + "…"
