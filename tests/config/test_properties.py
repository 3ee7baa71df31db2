"""What holds for all layers: they merge in any grouping, as a plain model says, and origins are right."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fractal_runner import config
from fractal_runner.config.keys import Section, Takes
from fractal_runner.config.layers import LAYERS
from fractal_runner.config.values import Findings, Items, Scalar, Table, merge, plain
from fractal_runner.config.yaml12 import read_text

ANYTHING = Section({}, others=Takes(anything=True))
# Single values are made different from each other when a layer is written: then a line tells which one it is.
single = st.sampled_from(["int", "text", "null"])


class Replaced(list[Any]):
    """A list with !replace before it."""


def trees(kind: Callable[[str], st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: kind(name) for name in "abcd"})


lists = st.lists(single | st.lists(single, max_size=2), max_size=3)
value = single | lists | lists.map(Replaced)
# Layers whose kinds agree: `a` and `b` are single values, `c` is a list, `d` a mapping of the same.
agreeing = st.recursive(
    trees(
        lambda name: single if name in "ab" else lists | lists.map(Replaced) if name == "c" else st.just({})
    ),
    lambda inner: st.fixed_dictionaries(
        {}, optional={"a": single, "b": single, "c": lists | lists.map(Replaced), "d": inner}
    ),
    max_leaves=4,
)
# Layers that all say something of one key, of whatever kind: most of them do not go together.
clashing = st.fixed_dictionaries({"a": value | st.fixed_dictionaries({}, optional={"a": value, "b": value})})


class Writer:
    """Writes trees as YAML, block style, each single value on a line of its own and like no other."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1000)

    def write(self, tree: dict[str, Any]) -> tuple[str, Any]:
        """The text, and the tree with the values that stand in it."""
        lines: list[str] = []
        meant = self._table(tree, 0, lines)
        return "\n".join(lines) + "\n", meant

    def _table(self, tree: dict[str, Any], depth: int, lines: list[str]) -> dict[str, Any]:
        meant = {}
        for name, node in tree.items():
            head = f"{'  ' * depth}{name}:"
            if isinstance(node, dict) and node:
                lines.append(head)
                meant[name] = self._table(node, depth + 1, lines)
            elif isinstance(node, dict):
                lines.append(f"{head} {{}}")
                meant[name] = {}
            elif isinstance(node, list):
                meant[name] = self._list(node, depth + 1, head, lines)
            else:
                text, meant[name] = self._single(node)
                lines.append(f"{head} {text}")
        return meant

    def _list(self, node: list[Any], depth: int, head: str, lines: list[str]) -> list[Any]:
        tag = " !replace" if isinstance(node, Replaced) else ""
        lines.append(f"{head}{tag}" if node else f"{head}{tag} []")
        meant = Replaced() if isinstance(node, Replaced) else []
        for item in node:
            if isinstance(item, list):
                pairs = [self._single(one) for one in item]
                lines.append(f"{'  ' * depth}- [{', '.join(text for text, _ in pairs)}]")
                meant.append([one for _, one in pairs])
            else:
                text, one = self._single(item)
                lines.append(f"{'  ' * depth}- {text}")
                meant.append(one)
        return meant

    def _single(self, kind: str) -> tuple[str, Any]:
        number = next(self._numbers)
        if kind == "int":
            return str(number), number
        return ("null", None) if kind == "null" else (f"'{number} text'", f"{number} text")


def read(text: str, layer: str = "layer", source: str = "file") -> Table:
    findings = Findings()
    found = read_text(text, layer, source, findings)
    assert found is not None
    assert not findings.mistakes
    return found


def merged(*layers: Table) -> tuple[Table, bool]:
    findings = Findings()
    return reduce(lambda one, other: merge(one, other, findings), layers), bool(findings.mistakes)


def as_written(table: Table) -> Any:
    """A table with all that it consists of, `!replace` and origins included, as plain values."""

    def shown(node: Any) -> Any:
        if isinstance(node, Scalar):
            return node.value, node.origin
        if isinstance(node, Items):
            return node.replaces, node.origin, [shown(item) for item in node.items]
        return node.origin, {name: (node.keys[name], shown(one)) for name, one in node.entries.items()}

    return shown(table)


def model(earlier: Any, later: Any) -> Any:
    """Merging, said once more, of plain values."""
    if isinstance(earlier, dict) and isinstance(later, dict):
        return earlier | {
            name: model(earlier[name], one) if name in earlier else one for name, one in later.items()
        }
    if isinstance(earlier, list) and isinstance(later, list) and not isinstance(later, Replaced):
        return type(earlier)([*earlier, *later])
    return later


@settings(max_examples=500)
@given(st.lists(agreeing, min_size=3, max_size=3) | st.lists(clashing, min_size=3, max_size=3))
def test_merging_is_associative(layers: list[dict[str, Any]]) -> None:
    writer = Writer()
    one, two, three = (
        read(writer.write(tree)[0] or "{}", layer) for tree, layer in zip(layers, LAYERS, strict=False)
    )

    left, left_is_wrong = merged(one, two)
    left, left_is_wrong_too = merged(left, three)
    right, right_is_wrong = merged(two, three)
    right, right_is_wrong_too = merged(one, right)

    is_wrong = left_is_wrong or left_is_wrong_too
    assert is_wrong == (right_is_wrong or right_is_wrong_too)
    if not is_wrong:
        assert as_written(left) == as_written(right)


@given(st.lists(agreeing, min_size=1, max_size=6))
def test_layers_that_agree_in_kind_merge_as_the_model_says(layers: list[dict[str, Any]]) -> None:
    writer = Writer()
    written = [writer.write(tree) for tree in layers]

    found, is_wrong = merged(*(read(text) for text, _ in written))

    assert not is_wrong
    assert plain(found) == reduce(model, (meant for _, meant in written))


@given(st.lists(agreeing, min_size=1, max_size=4))
def test_each_values_origin_is_the_line_that_holds_it(layers: list[dict[str, Any]]) -> None:
    writer = Writer()
    with tempfile.TemporaryDirectory() as folder:
        files: list[config.LayerFile] = []
        for number, tree in enumerate(layers):
            files.append(config.LayerFile(LAYERS[1 + number % 3], Path(folder) / str(number)))
            said = f"open:\n  z: {number}\n{indented(writer.write(tree)[0])}"
            files[-1].path.write_text("#\n" * number + said)

        found = config.load(OpenSections(), files=files, environ={})

        layer_of = {str(file.path): file.layer for file in files}
        for row in found.rows("open"):
            assert row.origin.line is not None
            line = Path(row.origin.source).read_text().splitlines()[row.origin.line - 1]
            if row.value in ([], {}):
                assert line.endswith(("[]", "{}"))
            else:
                assert json.dumps(row.value).replace('"', "'") in line
            assert row.origin.layer == layer_of[row.origin.source]
        # A single value, null too, comes from the last file that says it.
        for key, node in singles(found._table.entries["open"]):
            sayers = [file for file in files if key in dict(singles(read_open(file.path)))]
            assert node.origin.source == str(sayers[-1].path)


class OpenSections:
    """An executor whose section takes anything."""

    def names(self) -> list[str]:
        return ["open", "thread"]

    def section(self, name: str) -> Section:
        return ANYTHING

    def extra(self) -> None:
        return None


def read_open(path: Path) -> Any:
    return read(path.read_text()).entries["open"]


def singles(node: Any, key: str = "") -> Iterator[tuple[str, Scalar]]:
    """Single values that are not in lists, by key."""
    for name, inner in node.entries.items():
        if isinstance(inner, Scalar):
            yield f"{key}.{name}", inner
        elif isinstance(inner, Table):
            yield from singles(inner, f"{key}.{name}")


def indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
