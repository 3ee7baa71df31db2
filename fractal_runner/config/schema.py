"""Which keys a configuration has: what is common to all, and a section for each executor that there is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Protocol

from fractal_runner.config.keys import Section, Takes
from fractal_runner.errors import did_you_mean
from fractal_runner.quantities import parse_count, parse_size, parse_time

EXECUTOR = "executor"
DEFAULTS = "defaults"
CLASSES = "resource_classes"
RESERVED = frozenset({EXECUTOR, DEFAULTS, CLASSES})  # no executor can have these names

_TEXT = frozenset({str})
_NUMBER_OR_TEXT = frozenset({str, int, float})
SIZE = Takes(scalars=_NUMBER_OR_TEXT, parse=parse_size)
TIME = Takes(scalars=_NUMBER_OR_TEXT, parse=parse_time)
COUNT = Takes(scalars=frozenset({int}), parse=parse_count)
COUNT_FROM_0 = Takes(scalars=frozenset({int}), parse=partial(parse_count, least=0))

RESOURCES: Mapping[str, Takes] = {"cpus": COUNT, "memory": SIZE, "time": TIME}

# What people write who have another system's words in mind.
_OTHER_WORDS = {
    "cores": "cpus",
    "cpus_per_task": "cpus",
    "mem": "memory",
    "walltime": "time",
    "partition": "queue",
}


class Sections(Protocol):
    """The executors that there are, as far as a configuration has to know them."""

    def names(self) -> Collection[str]:
        """Their names."""

    def section(self, name: str) -> Section:
        """What the section of one of them takes.

        Raises:
            ValueError, ImportError: if this executor cannot be had, saying why.
        """

    def extra(self) -> Section | None:
        """What a resource class's `extra` takes: all schedulers' own options; None for anything."""


def root(sections: Sections) -> Section:
    """The keys of a configuration."""
    names = sorted(set(sections.names()) - RESERVED)
    return Section(
        {
            EXECUTOR: Takes(scalars=_TEXT, needed=True, parse=partial(_executor, names)),
            DEFAULTS: Takes(section=lambda: Section(RESOURCES, _without("queue"))),
            CLASSES: Takes(values=Takes(section=partial(_resource_class, sections))),
            **{name: Takes(section=partial(sections.section, name)) for name in names},
        }
    )


def _resource_class(sections: Sections) -> Section:
    extra = sections.extra()
    return Section(
        {
            **RESOURCES,
            "gpus": COUNT_FROM_0,
            "queue": Takes(scalars=_TEXT, parse=_queue),
            "extra": Takes(values=Takes(anything=True)) if extra is None else Takes(section=lambda: extra),
        },
        _OTHER_WORDS,
    )


def _without(name: str) -> Mapping[str, str]:
    return {word: ours for word, ours in _OTHER_WORDS.items() if ours != name}


def _executor(names: Collection[str], value: str) -> str:
    if value not in names:
        raise ValueError(f"there is no executor {value!r}: {did_you_mean(value, names)}")
    return value


def _queue(value: Any) -> Any:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{value!r} is not the name of a queue")
    return value
