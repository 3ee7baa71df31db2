"""What a task's meta says of one of its commands: resources, a limit, an executor, retries.

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
        memories: bytes, one value per attempt; the last one for all further ones. Empty for the
            executor's default.
        gpus: GPUs.
        times_s: seconds for which a scheduler should reserve it; one value per attempt as well.
        timeout_s: seconds after which the unit is ended, over any executor.
        executor: name of the executor it runs on, None for the run's.
        retries: how many times a unit that was ended from outside is tried again.
        retry_any: whether one that failed by itself is, too.
        retry_elsewhere: keep the next attempt off the node where the last one failed, where that can be.
        rerunnable: whether a unit of which nobody knows how far it got may simply be run again.
        unknown: keys of the meta that mean nothing to us.
    """

    cpus: int | None = None
    memories: tuple[int, ...] = ()
    gpus: int | None = None
    times_s: tuple[float, ...] = ()
    timeout_s: float | None = None
    executor: str | None = None
    retries: int = 0
    retry_any: bool = False
    retry_elsewhere: bool = False
    rerunnable: bool = True
    unknown: tuple[str, ...] = ()

    def memory(self, retry: int = 0) -> int | None:
        """Bytes that a unit asks for when it has failed `retry` times."""
        return self.memories[min(retry, len(self.memories) - 1)] if self.memories else None

    def time_s(self, retry: int = 0) -> float | None:
        """Seconds that a unit asks for when it has failed `retry` times."""
        return self.times_s[min(retry, len(self.times_s) - 1)] if self.times_s else None

    def __str__(self) -> str:
        parts = [
            f"{self.cpus} CPU{'' if self.cpus == 1 else 's'}" if self.cpus else "",
            ", then ".join(map(format_size, self.memories)),
            f"{self.gpus} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else "",
            ", then ".join(map(format_time, self.times_s)),
            f"timeout {format_time(self.timeout_s)}" if self.timeout_s else "",
            f"up to {self.retries} retr{'y' if self.retries == 1 else 'ies'}" if self.retries else "",
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


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _whom_to_retry(value: Any) -> bool:
    if value not in ("job", "any"):
        raise ValueError(
            f'{value!r} is neither "job" (what was ended from outside) nor "any" (what failed by itself, too)'
        )
    return bool(value == "any")


def _per_attempt(parse: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """For a value, or a list of values, one per attempt."""

    def parse_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            return (parse(value),)
        if not value:
            raise ValueError("an empty list: give one value per attempt")
        return tuple(map(parse, value))

    return parse_all


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "cpus_per_task": ("cpus", parse_count),
    "mem": ("memories", _per_attempt(parse_size)),
    "gpus": ("gpus", partial(parse_count, least=0)),
    "time": ("times_s", _per_attempt(parse_time)),
    "timeout": ("timeout_s", parse_time),
    "executor": ("executor", _name),
    "retries": ("retries", partial(parse_count, least=0)),
    "retry_on": ("retry_any", _whom_to_retry),
    "retry_elsewhere": ("retry_elsewhere", _flag),
    "rerunnable": ("rerunnable", _flag),
}
