"""What a task's meta says of one of its commands: resources, a limit, an executor, retries.

The names are Fractal's. Keys that are not known are passed over with a warning, as packages carry keys
for systems that we do not run on; a value that is not what its key takes is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from fractal_runner.config import UnitLayer
from fractal_runner.quantities import argument, format_size, format_time, parse_count, parse_size, parse_time
from fractal_runner.worker.spec import WARM_MODES


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
        queue: a scheduler's queue: Fractal's `partition`.
        account: whom a scheduler charges.
        extra: what only a scheduler understands, by Fractal's names, as JSON has it. It is no mistake where
            there is none.
        executor: name of the executor it runs on, None for the run's.
        retries: how many times a unit that was ended from outside is tried again.
        retry_any: whether one that failed by itself is, too.
        retry_elsewhere: keep the next attempt off the node where the last one failed, where that can be.
        rerunnable: whether a unit of which nobody knows how far it got may simply be run again.
        warm_start: whether units share the imports of their command: "auto", "always", "never"; None if it
            is not said.
        warm_start_timeout_s: seconds that these imports may take.
        unknown: keys of the meta that mean nothing to us.
    """

    cpus: int | None = None
    memories: tuple[int, ...] = ()
    gpus: int | None = None
    times_s: tuple[float, ...] = ()
    timeout_s: float | None = None
    queue: str | None = None
    account: str | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    executor: str | None = None
    retries: int = 0
    retry_any: bool = False
    retry_elsewhere: bool = False
    rerunnable: bool = True
    warm_start: str | None = None
    warm_start_timeout_s: float | None = None
    unknown: tuple[str, ...] = ()

    def memory(self, retry: int = 0) -> int | None:
        """Bytes that a unit asks for when it has failed `retry` times."""
        return self.memories[min(retry, len(self.memories) - 1)] if self.memories else None

    def time_s(self, retry: int = 0) -> float | None:
        """Seconds that a unit asks for when it has failed `retry` times."""
        return self.times_s[min(retry, len(self.times_s) - 1)] if self.times_s else None

    def asked(self, retry: int = 0) -> dict[str, Any]:
        """What a unit asks an executor for when it has failed `retry` times: see `Executors.submitter`."""
        return {
            "cpus": self.cpus,
            "memory": self.memory(retry),
            "gpus": self.gpus,
            "time": self.time_s(retry),
            "queue": self.queue,
            "account": self.account,
            "extra": self.extra,
        }

    @property
    def variants(self) -> int:
        """How many attempts ask for something else than the one before; at least one."""
        return max(len(self.memories), len(self.times_s), 1)

    def __str__(self) -> str:
        parts = [
            f"{self.cpus} CPU{'' if self.cpus == 1 else 's'}" if self.cpus else "",
            ", then ".join(map(format_size, self.memories)),
            f"{self.gpus} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else "",
            ", then ".join(map(format_time, self.times_s)),
            f"timeout {format_time(self.timeout_s)}" if self.timeout_s else "",
            f"up to {self.retries} retr{'y' if self.retries == 1 else 'ies'}" if self.retries else "",
            f"on {self.executor}" if self.executor else "",
            f"warm start: {self.warm_start}" if self.warm_start else "",
            f"partition {self.queue}" if self.queue else "",
            f"account {self.account}" if self.account else "",
            *(f"{key} {_shown(value)}" for key, value in self.extra.items()),
        ]
        return ", ".join(filter(None, parts)) or "the executor's default"


def read_meta(*layers: Mapping[str, Any]) -> Resources:
    """Resources from meta dictionaries, the later over the earlier.

    Raises:
        ValueError: naming the key and the value, if the value is not what the key takes.
    """
    return read_layers(UnitLayer(layer) for layer in layers)


def read_layers(layers: Iterable[UnitLayer]) -> Resources:
    """Resources from all who say something of them, the later over the earlier.

    Raises:
        ValueError: naming the key and the value, if the value is not what the key takes.
    """
    meta: dict[str, Any] = {}
    others: dict[str, Any] = {}  # only for schedulers, and only by a class: a meta has these names as keys
    for layer in layers:
        meta |= {key: value for key, value in layer.meta.items() if value is not None}
        for key, value in layer.extra.items():
            (meta if key in _EXTRA else others)[key] = value
    values = {name: argument(key, parse, meta[key]) for key, (name, parse) in _FIELDS.items() if key in meta}
    extra = {key: argument(key, parse, meta[key]) for key, parse in _EXTRA.items() if key in meta}
    unknown = tuple(sorted(meta.keys() - _FIELDS.keys() - _EXTRA.keys()))
    return Resources(**values, extra=MappingProxyType({**others, **extra}), unknown=unknown)


def _name(of_what: str, value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"{value!r} is not the name of {of_what}")
    return value


def _gpus(value: Any) -> int:
    if isinstance(value, str):  # Fractal has it as text
        if not value.isdecimal():
            raise ValueError(f'{value!r} is not a number of GPUs: one of a kind is "gres": "gpu:kind:1"')
        value = int(value)
    return parse_count(value, least=0)


def _node_names(value: Any) -> str | list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f'{value!r} names no nodes: write "node1,node[3-5]", or a list')
    return value if isinstance(value, str) else names


def _as_it_is(value: Any) -> Any:
    """What only the scheduler's own executor can tell is right."""
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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


def _warm_start(value: Any) -> str:
    if value not in WARM_MODES:
        raise ValueError(f"{value!r} is none of {', '.join(map(json.dumps, WARM_MODES))}")
    return str(value)


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
    "gpus": ("gpus", _gpus),
    "time": ("times_s", _per_attempt(parse_time)),
    "timeout": ("timeout_s", parse_time),
    "partition": ("queue", partial(_name, "a partition")),
    "account": ("account", partial(_name, "an account")),
    "executor": ("executor", partial(_name, "an executor")),
    "retries": ("retries", partial(parse_count, least=0)),
    "retry_on": ("retry_any", _whom_to_retry),
    "retry_elsewhere": ("retry_elsewhere", _flag),
    "rerunnable": ("rerunnable", _flag),
    "warm_start": ("warm_start", _warm_start),
    "warm_start_timeout": ("warm_start_timeout_s", parse_time),
}
# What only a scheduler understands, under the names that Fractal gives it; LSF's are its executor's.
_EXTRA: dict[str, Callable[[Any], Any]] = {
    "bsub_extra": _as_it_is,
    "constraint": _as_it_is,
    "exclude": _node_names,
    "extra_lines": _as_it_is,
    "gres": _as_it_is,
    "needs_gpu": _as_it_is,
    "nodelist": _as_it_is,
    "nodes": _as_it_is,
    "ntasks_per_node": _as_it_is,
    "parallel_tasks_per_job": parse_count,
    "pre_submission_commands": _as_it_is,
    "resource_requirements": _as_it_is,
    "tasks_per_job": parse_count,
    "user_local_exports": _as_it_is,
}
