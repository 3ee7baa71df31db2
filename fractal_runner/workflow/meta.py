"""What a task's meta says of one of its commands: resources, a limit, an executor.

The names are Fractal's. Keys that are not known are passed over with a warning, as packages carry keys
for systems that we do not run on; a value that is not what its key takes is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fractal_runner.quantities import format_size, format_time, parse_count, parse_size, parse_time

# Keys that only a scheduler understands; they mean nothing to a local executor, and are no mistake.
_SCHEDULER_KEYS = frozenset(
    {
        "account",
        "constraint",
        "exclude",
        "extra_lines",
        "gres",
        "needs_gpu",
        "nodelist",
        "nodes",
        "ntasks_per_node",
        "parallel_tasks_per_job",
        "partition",
        "pre_submission_commands",
        "tasks_per_job",
        "user_local_exports",
    }
)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one unit asks for.

    Attributes:
        cpus: CPUs, None for the executor's default.
        memory: bytes.
        gpus: GPUs.
        time_s: seconds for which a scheduler should reserve it.
        timeout_s: seconds after which the unit is ended, over any executor.
        executor: name of the executor it runs on, None for the run's.
        unknown: keys of the meta that mean nothing to us.
    """

    cpus: int | None = None
    memory: int | None = None
    gpus: int | None = None
    time_s: float | None = None
    timeout_s: float | None = None
    executor: str | None = None
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{self.cpus} CPU{'' if self.cpus == 1 else 's'}" if self.cpus else "",
            format_size(self.memory) if self.memory else "",
            f"{self.gpus} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else "",
            format_time(self.time_s) if self.time_s else "",
            f"timeout {format_time(self.timeout_s)}" if self.timeout_s else "",
            f"on {self.executor}" if self.executor else "",
        ]
        return ", ".join(filter(None, parts)) or "the executor's default"


def read_meta(*layers: Mapping[str, Any]) -> Resources:
    """Resources from meta dictionaries, the later over the earlier.

    Raises:
        ValueError: naming the key and the value, if the value is not what the key takes.
    """
    meta = {key: value for layer in layers for key, value in layer.items() if value is not None}
    values: dict[str, Any] = {}
    for key, (field, parse) in _FIELDS.items():
        if key in meta:
            try:
                values[field] = parse(meta[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    return Resources(**values, unknown=tuple(sorted(meta.keys() - _FIELDS.keys() - _SCHEDULER_KEYS)))


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not the name of an executor")
    return value


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "cpus_per_task": ("cpus", parse_count),
    "mem": ("memory", parse_size),
    "gpus": ("gpus", partial(parse_count, least=0)),
    "time": ("time_s", parse_time),
    "timeout": ("timeout_s", parse_time),
    "executor": ("executor", _name),
}
