"""What is said by plain values: by a caller in Python, or by what is recorded of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal_runner.config.values import Findings, Items, Node, Origin, Scalar, Table, dotted, table

PYTHON = "Python"
RECORDED = "the run's history"


def given_layer(layer: str, said: Mapping[str, Any], findings: Findings) -> Table:
    """A layer of plain values: text, numbers, lists, mappings.

    A list takes the place of those of earlier layers: whoever gives one so gives all of it.

    Args:
        layer: the layer's name.
        said: values by key.
        findings: is told of values that are nothing that a configuration can say.
    """
    return _Reader(layer, findings).table(said, "")


class _Reader:
    def __init__(self, layer: str, findings: Findings) -> None:
        self._origin = Origin(layer, layer)
        self._findings = findings

    def table(self, said: Mapping[Any, Any], key: str) -> Table:
        entries: dict[str, Node] = {}
        for name, value in said.items():
            where = dotted(key, str(name))
            if isinstance(name, str):
                entries[name] = self._node(value, where)
            else:
                self._findings.add(self._origin, where, f"a key is text, and not {name!r}")
        origins = dict.fromkeys(entries, self._origin)
        return table(entries, origins, self._origin)

    def _node(self, value: Any, key: str) -> Node:
        if isinstance(value, Mapping):
            return self.table(value, key)
        if isinstance(value, (list, tuple)):
            items = [self._node(item, f"{key}[{place}]") for place, item in enumerate(value)]
            return Items(tuple(items), self._origin, replaces=True)
        if value is not None and not isinstance(value, (str, int, float, bool)):
            self._findings.add(self._origin, key, f"{value!r} is nothing that a configuration can say")
            return Scalar(None, self._origin)
        return Scalar(value, self._origin)
