"""Values that know where they were written, and how one layer's go over another's.

A layer is a `Table`. Merging is a pure function of two tables, and associative: which layers are merged first
makes no difference, so nothing else has to know how many of them there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Plain = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where something was written.

    Attributes:
        layer: the layer's name, `"site"`.
        source: a file's path, the name of an environment's variable, or the words of a command line.
        line: in a file, from 1 on.
    """

    layer: str
    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something that is wrong in a configuration.

    Attributes:
        origin: where it stands.
        key: the dotted key that it is about; "" for a file as a whole.
        message: what is wrong, and what would be right.
    """

    origin: Origin
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (str(self.origin), self.key, self.message)))


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value; null is one, too."""

    value: Plain
    origin: Origin


@dataclass(frozen=True, slots=True)
class Items:
    """A list.

    Attributes:
        items: its elements, each with its own origin.
        origin: where the list was begun.
        replaces: whether it starts anew: what earlier layers say does not belong to it.
    """

    items: tuple[Node, ...]
    origin: Origin
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping.

    Attributes:
        entries: its values, by key.
        keys: where each key stands; a value may begin in a later line.
        origin: where the mapping begins.
    """

    entries: Mapping[str, Node]
    keys: Mapping[str, Origin]
    origin: Origin


Node = Scalar | Items | Table


@dataclass(slots=True)
class Findings:
    """Mistakes as they are found: all of them are told, not only the first."""

    mistakes: list[Mistake] = field(default_factory=list)

    def add(self, origin: Origin, key: str, message: str) -> None:
        """Note a mistake, once: what two layers share is looked at twice."""
        mistake = Mistake(origin, key, message)
        if mistake not in self.mistakes:
            self.mistakes.append(mistake)

    def add_sorted(self, others: Findings) -> None:
        """Note what was found in one file, line by line."""
        for mistake in sorted(others.mistakes, key=lambda one: one.origin.line or 0):
            self.add(mistake.origin, mistake.key, mistake.message)


def table(entries: Mapping[str, Node], keys: Mapping[str, Origin], origin: Origin) -> Table:
    """A table that cannot be changed."""
    return Table(MappingProxyType(dict(entries)), MappingProxyType(dict(keys)), origin)


def empty(origin: Origin) -> Table:
    """A layer that says nothing."""
    return table({}, {}, origin)


def merge(earlier: Table, later: Table, findings: Findings, key: str = "") -> Table:
    """Both, the later over the earlier: mappings merge, single values override, lists accumulate.

    Args:
        earlier: what counts less.
        later: what counts more.
        findings: is told where the two do not go together. What is returned is then of no use.
        key: the dotted key of both.
    """
    entries = dict(earlier.entries)
    for name, value in later.entries.items():
        before = entries.get(name)
        entries[name] = value if before is None else _merged(before, value, findings, dotted(key, name))
    return table(entries, {**earlier.keys, **later.keys}, later.origin)


def dotted(key: str, name: str) -> str:
    """The key of an entry of what has this key."""
    return f"{key}.{name}" if key else name


def plain(node: Node) -> Any:
    """The value alone: text, numbers, lists and dictionaries."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {name: plain(value) for name, value in node.entries.items()}


def leaves(node: Node, key: str = "") -> Iterator[tuple[str, Plain | list[Any] | dict[str, Any], Origin]]:
    """Each single value with its key and origin; a list's elements are `key[0]`, `key[1]`, …

    A list or mapping without anything in it is a value of its own.
    """
    if isinstance(node, Scalar):
        yield key, node.value, node.origin
    elif isinstance(node, Items):
        if not node.items:
            yield key, [], node.origin
        for position, item in enumerate(node.items):
            yield from leaves(item, f"{key}[{position}]")
    else:
        if not node.entries and key:
            yield key, {}, node.origin
        for name, value in node.entries.items():
            yield from leaves(value, dotted(key, name))


def kind_of(node: Node) -> str:
    """What a value is, for messages."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Table):
        return "a mapping"
    if node.value is None:
        return "null"
    if isinstance(node.value, bool):
        return "true or false"
    return "text" if isinstance(node.value, str) else "a number"


def _merged(earlier: Node, later: Node, findings: Findings, key: str) -> Node:
    if isinstance(earlier, Table) and isinstance(later, Table):
        return merge(earlier, later, findings, key)
    if isinstance(earlier, Items) and isinstance(later, Items):
        if later.replaces:
            return later
        # It goes on replacing what is before the earlier one: layers may be merged in any grouping.
        return Items(earlier.items + later.items, later.origin, earlier.replaces)
    # A change of kind is refused in every case, `!replace` or not: if it depended on what lies between,
    # it would also depend on which layers are merged first.
    if type(earlier) is not type(later):
        findings.add(later.origin, key, _why_not(earlier, later))
    return later


def _why_not(earlier: Node, later: Node) -> str:
    there = f"{kind_of(earlier)} at {earlier.origin}"
    if isinstance(later, Scalar) and later.value is None:
        way_out = "write !replace [] for an empty list" if isinstance(earlier, Items) else "say it key by key"
        return f"null may take the place of single values only, and this is {there}: {way_out}"
    way_out = ": write !replace before a list here" if isinstance(earlier, Items) else ""
    return f"it is {kind_of(later)} here, and {there}: all layers have to write it in one way{way_out}"
