"""The configuration that all layers make up: what it says, and where each value comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fractal_runner.config.keys import Section, Takes, arguments
from fractal_runner.config.resources import UnitLayer, unit_layers
from fractal_runner.config.schema import CLASSES, DEFAULTS, EXECUTOR
from fractal_runner.config.values import (
    Node,
    Origin,
    Plain,
    Scalar,
    Table,
    leaves,
    plain,
    table,
)
from fractal_runner.config.writing import written
from fractal_runner.errors import InputFileError, did_you_mean

if TYPE_CHECKING:
    from fractal_runner.config.layers import LayerFile


@dataclass(frozen=True, slots=True)
class Row:
    """A final value.

    Attributes:
        key: its dotted key; `key[0]` for a list's element.
        value: the value; an empty list or mapping is one.
        origin: where it was written.
    """

    key: str
    value: Plain | list[Any] | dict[str, Any]
    origin: Origin


class Config:
    """A configuration that has been checked.

    Args:
        merged: all layers.
        root: what its keys take.
        files: the layers that are files, also those that are not there.
    """

    def __init__(self, merged: Table, root: Section, files: tuple[LayerFile, ...] = ()) -> None:
        self._table = merged
        self._root = root
        self.files = files

    @classmethod
    def empty(cls, executor: str = "thread") -> Config:
        """One that says nothing but which executor there is."""
        nowhere = Origin("built-in", "")
        root = Section({CLASSES: Takes(values=Takes())})
        return cls(table({EXECUTOR: Scalar(executor, nowhere)}, {EXECUTOR: nowhere}, nowhere), root)

    @property
    def executor(self) -> str:
        """The name of the executor that runs what says nothing else."""
        return str(plain(self._table.entries[EXECUTOR]))

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What units need that say nothing: of `cpus`, `memory`, `time`, those that are said."""
        return MappingProxyType(self._arguments(DEFAULTS))

    @property
    def resource_classes(self) -> Mapping[str, Mapping[str, Any]]:
        """The resource classes, by name."""
        classes = self._table.entries.get(CLASSES)
        expected = self._root.keys[CLASSES].values
        if not isinstance(classes, Table) or expected is None or expected.section is None:
            return MappingProxyType({})
        section = expected.section()
        return MappingProxyType(
            {name: arguments(one, section) for name, one in classes.entries.items() if isinstance(one, Table)}
        )

    def options(self, executor: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The arguments of an executor's constructor.

        Args:
            executor: its name.
            given: arguments given in Python: each of them takes the place of the configuration's.

        Returns:
            Those that are said; a null is None where the constructor takes it, else it leaves the argument
            to the constructor's default.
        """
        return {**self._arguments(executor), **(given or {})}

    def defaults_of(self, executor: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Those of `defaults` that count on this executor: its own section comes before them."""
        expected = self._root.keys.get(executor)
        section = expected.section() if expected is not None and expected.section is not None else Section({})
        said = {name for name, value in self.options(executor, given).items() if value is not None}
        return {
            name: value
            for name, value in self.defaults.items()
            if (name if name in section.keys else section.other_words.get(name, name)) not in said
        }

    def unit_layers(
        self,
        task: Mapping[str, Any],
        workflow_task: Mapping[str, Any],
        *,
        executor: str | None,
        given: Mapping[str, Any] | None = None,
    ) -> tuple[UnitLayer, ...]:
        """All that is said of a unit's resources, the later over the earlier; see `resources.unit_layers`.

        Args:
            task: the task's meta.
            workflow_task: the workflow task's meta.
            executor: the name of the run's executor; None for one that the caller made, whose arguments come
                before all layers: `defaults` do not count then.
            given: options of the run's executor that were given in Python.

        Raises:
            ValueError: if a meta names a resource class that there is not.
        """
        own = workflow_task.get("executor") or task.get("executor")
        name = own if isinstance(own, str) and own != executor else executor
        known = name is not None and name in self._root.keys
        defaults = self.defaults_of(name, given if name == executor else None) if known and name else {}
        return unit_layers(task, workflow_task, classes=self.resource_classes, defaults=defaults)

    def origin(self, key: str) -> Origin:
        """Where a value was written.

        Raises:
            ValueError: if nothing is said of this key, naming the nearest one.
        """
        return self._find(key).origin

    def rows(self, key: str = "") -> list[Row]:
        """Every final value with its origin; only those of one key and below it, if one is given.

        Raises:
            ValueError: if nothing is said of this key, naming the nearest one.
        """
        return [Row(*leaf) for leaf in leaves(self._find(key) if key else self._table, key)]

    def lines(self, key: str = "", *, origins: bool = False) -> list[str]:
        """The configuration as YAML that can be read again, or what it says of one key.

        Args:
            key: a dotted key; all of it for "".
            origins: whether a comment behind each value says where it was written.

        Raises:
            ValueError: if nothing is said of this key, naming the nearest one.
        """
        node: Node = self._table
        if key:
            node = self._find(key)
            *names, last = self._path(key)
            for name in (last, *reversed(names)):
                node = Table({name: node}, {name: node.origin}, node.origin)
        found = list(written(node))
        if not origins:
            return [line for line, _ in found]
        width = max((len(line) for line, origin in found if origin is not None), default=0)
        return [
            line if origin is None else f"{line:<{width}}  # {origin.layer}: {' '.join(str(origin).split())}"
            for line, origin in found
        ]

    def blame(self, executor: str, problem: Exception) -> InputFileError:
        """An error for what a constructor says of its arguments, which names where they were written.

        Args:
            executor: the executor's name.
            problem: what its constructor raised.
        """
        rows = self.rows(executor) if executor in self._table.entries else []
        named = [row for row in rows if re.search(rf"\b{re.escape(_last(row.key))}\b", str(problem))]
        places = "; ".join(f"{row.key} is from {row.origin}" for row in named or rows)
        message = f"{executor}: {problem}" + (f" ({places})" if places else "")
        file = (named or rows)[0].origin.source if rows else ""
        return InputFileError(f"the configuration is wrong: {message}", file=file, problems=[message])

    def _arguments(self, name: str) -> dict[str, Any]:
        node = self._table.entries.get(name)
        expected = self._root.keys.get(name, Takes())
        if not isinstance(node, Table) or expected.section is None:
            return {}
        return arguments(node, expected.section())

    def _find(self, key: str) -> Node:
        node: Node = self._table
        for name in self._path(key):
            node = node.entries[name] if isinstance(node, Table) else node
        return node

    def _path(self, key: str) -> list[str]:
        """The names that a dotted key is made of: a name may have dots in it."""
        found = _path_in(self._table, key)
        if found is None:
            known = {row.key.partition("[")[0] for row in self.rows()}
            known |= {".".join(one.split(".")[:depth]) for one in known for depth in (1, 2)}
            raise ValueError(f"nothing is said of {key!r}: {did_you_mean(key, known)}")
        return found


def _path_in(node: Node, key: str) -> list[str] | None:
    if isinstance(node, Table):
        for name, value in node.entries.items():
            if key == name:
                return [name]
            if key.startswith(f"{name}.") and (rest := _path_in(value, key[len(name) + 1 :])) is not None:
                return [name, *rest]
    return None


def _last(key: str) -> str:
    return key.partition("[")[0].rpartition(".")[2]
