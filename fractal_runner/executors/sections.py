"""What a configuration may say of each executor: its constructor's arguments, by their names and types.

Apart from the registry, which makes executors: this only looks at them. An executor's class is imported when
a configuration has a section of its name, not before.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack, get_args, get_origin

from fractal_runner import config
from fractal_runner.config import Config
from fractal_runner.config.keys import Section, Takes, hints_of, takes
from fractal_runner.config.schema import SIZE
from fractal_runner.executors import factories
from fractal_runner.quantities import parse_count, parse_size, parse_time

_POSITIVE = parse_count
_FROM_0 = partial(parse_count, least=0)
# What the types of our constructors' arguments do not say: a size and a time are both numbers, or text. An
# executor of another package says it by `Annotated[str, parse_size]`.
_PARSERS: Mapping[str, Callable[[Any], object]] = {
    "calls_per_job": _POSITIVE,
    "command_timeout": parse_time,
    "cores": _POSITIVE,
    "cpus_per_task": _POSITIVE,
    "gpus": _FROM_0,
    "grace": parse_time,
    "idle_timeout": parse_time,
    "max_array": _POSITIVE,
    "max_cpus": _POSITIVE,
    "max_cpus_per_job": _POSITIVE,
    "max_jobs": _POSITIVE,
    "max_memory": parse_size,
    "max_memory_per_job": parse_size,
    "max_time": parse_time,
    "max_workers": _POSITIVE,
    "mem": parse_size,
    "memory": parse_size,
    "nodes": _POSITIVE,
    "object_store_memory": parse_size,
    "parallel_calls_per_job": _POSITIVE,
    "pending_timeout": parse_time,
    "poll_interval": parse_time,
    "retries": _FROM_0,
    "submission_timeout": parse_time,
    "target_cpus_per_job": _POSITIVE,
    "target_jobs": _POSITIVE,
    "target_memory_per_job": parse_size,
    "time": parse_time,
    "walltime": parse_time,
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Executors whose calls take the options of `_extra_names`, or none. One of another package may take more.
_OURS = frozenset({"dask", "fork", "lsf", "process", "ray", "serial", "slurm", "spawn", "thread"})


def load(
    *,
    start: str | os.PathLike[str] | None = None,
    executor: str | None = None,
    options: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    recorded: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration, with a section for each executor that there is; see `fractal_runner.config.load`.

    Raises:
        InputFileError: naming every mistake, with its file, line and key.
    """
    return config.load(
        ExecutorSections(),
        start=start,
        executor=executor,
        options=options,
        environ=environ,
        recorded=recorded,
        overrides=overrides,
    )


class ExecutorSections:
    """The sections of all executors that there are; see `fractal_runner.config.Sections`."""

    def __init__(self) -> None:
        self._known: dict[str, Section] = {}

    def names(self) -> list[str]:
        """The executors' names."""
        return factories.names()

    def section(self, name: str) -> Section:
        """What an executor's section takes.

        Raises:
            ValueError: if there is no such executor, naming the nearest one.
                Also if two packages offer it, or it cannot be had.
            ImportError: if one of our own cannot be imported.
        """
        if name not in self._known:
            chosen = factories.factory_of(name)
            self._known[name] = section_of(chosen, getattr(chosen, "other_words", {}))
        return self._known[name]

    def extra(self) -> Section | None:
        """What resource classes may say in `extra`: the options of all our schedulers.

        None, for whatever it is, if there are executors of other packages: what theirs take is not known.
        """
        if set(factories.names()) - _OURS:
            return None
        from fractal_runner.executors.batch import lsf_options, slurm_options
        from fractal_runner.executors.batch.base import PACKING_OPTIONS

        names = {*slurm_options.OPTIONS.parsers, *lsf_options.OPTIONS.parsers, *PACKING_OPTIONS}
        return Section({name: Takes(anything=True) for name in sorted(names)})


def section_of(factory: Callable[..., Any], other_words: Mapping[str, str] | None = None) -> Section:
    """The section of what is called with its values as keyword arguments.

    Args:
        factory: a class, or a function that makes an executor.
        other_words: names that others have for its arguments, each with its own.
    """
    keys: dict[str, Takes] = {}
    python_only: list[str] = []
    others: Takes | None = None
    refused = factories.python_only_of(factory)

    def add(name: str, annotation: Any) -> None:
        expected = None if name in refused else _expected(name, annotation)
        if expected is None:
            python_only.append(name)
        else:
            keys[name] = expected

    for name, parameter in _parameters(factory).items():
        if parameter.kind in _NAMED:
            add(name, parameter.annotation)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if get_origin(parameter.annotation) is Unpack:
                typed = get_args(parameter.annotation)[0]
                for key, annotation in hints_of(typed).items():
                    add(key, annotation)
            else:
                others = Takes(anything=True)
    return Section(keys, other_words or {}, others, frozenset(python_only))


def _expected(name: str, annotation: Any) -> Takes | None:
    """What an argument takes; None if that cannot be written."""
    expected = takes(Any if annotation is inspect.Parameter.empty else annotation)
    if expected is None:
        return None
    parse = _PARSERS.get(name)
    if expected.parse is None and parse is not None and _is_for(parse, expected):
        return replace(expected, parse=parse)
    return expected


def _is_for(parse: Callable[[Any], object], expected: Takes) -> bool:
    """Whether an argument of this type can be what our arguments of its name are."""
    return expected.scalars <= (SIZE.scalars if parse in (parse_size, parse_time) else {int})


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters, with their types; `Any` for a type that is only there for those who check types."""
    found = inspect.signature(factory).parameters.values()
    made_by = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
    names = getattr(inspect.unwrap(made_by), "__globals__", {})
    return {one.name: one.replace(annotation=_resolved(one.annotation, names)) for one in found}


def _resolved(annotation: Any, names: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))  # a module's own text, as inspect and typing read it
    except Exception:  # whatever an expression can raise: it only means that the type is not known
        return Any
