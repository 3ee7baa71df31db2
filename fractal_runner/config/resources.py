"""Who decides what a unit needs: the table of precedence, as a pure function.

The highest first:

    1. the meta of the workflow task
    2. the resource class that it names
    3. the meta of the task, which its package sets
    4. the resource class that this one names
    5. the executor's section
    6. `defaults`

A class stands right below the meta that names it, so the class that a user names for a workflow task is
over what a package has set. The executor's own section (5) is with the executor already, which uses it
where a unit says nothing; so here `defaults` are only those of which that section says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fractal_runner.errors import did_you_mean

RESOURCE_CLASS = "resource_class"  # the key by which a meta names a class

_NOTHING: Mapping[str, Any] = MappingProxyType({})
# What a configuration says of a unit, and how Fractal's meta says the same.
_META_WORDS = {
    "cpus": "cpus_per_task",
    "memory": "mem",
    "time": "time",
    "gpus": "gpus",
    "queue": "partition",
}


@dataclass(frozen=True, slots=True)
class UnitLayer:
    """One of those who say what a unit needs.

    Attributes:
        meta: what it says, in the words of Fractal's meta.
        extra: a class's options for a scheduler, by the scheduler's names, none of which is a word of meta.
    """

    meta: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    extra: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


def unit_layers(
    task: Mapping[str, Any],
    workflow_task: Mapping[str, Any],
    *,
    classes: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> tuple[UnitLayer, ...]:
    """All that is said of a unit's resources, the later over the earlier.

    Args:
        task: the task's meta.
        workflow_task: the workflow task's meta.
        classes: the resource classes, by name.
        defaults: cpus, memory, time for units of which nothing says them.

    Raises:
        ValueError: if a meta names a resource class that there is not, naming the nearest one.
    """
    return (
        UnitLayer(_in_meta_words(defaults)),
        *_with_class(task, classes),
        *_with_class(workflow_task, classes),
    )


def _with_class(
    meta: Mapping[str, Any], classes: Mapping[str, Mapping[str, Any]]
) -> tuple[UnitLayer, UnitLayer]:
    """The class that a meta names, and the meta itself."""
    own = UnitLayer({key: value for key, value in meta.items() if key != RESOURCE_CLASS})
    name = meta.get(RESOURCE_CLASS)
    if name is None:
        return UnitLayer(), own
    if not isinstance(name, str):
        raise ValueError(f"{RESOURCE_CLASS}: {name!r} is not the name of a resource class")
    if name not in classes:
        where = "" if classes else f" (a configuration has them under {'resource_classes'!r})"
        raise ValueError(
            f"{RESOURCE_CLASS}: there is no resource class {name!r}: {did_you_mean(name, classes)}{where}"
        )
    chosen = classes[name]
    return UnitLayer(_in_meta_words(chosen), dict(chosen.get("extra", {}))), own


def _in_meta_words(said: Mapping[str, Any]) -> dict[str, Any]:
    return {word: said[name] for name, word in _META_WORDS.items() if said.get(name) is not None}
