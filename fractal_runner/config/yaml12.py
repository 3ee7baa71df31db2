"""YAML 1.2 with line numbers, on top of PyYAML's parser.

PyYAML knows the scalars of YAML 1.1, where `no`, `0123` and `1:30:00` are not what people mean, and takes the
last of two equal keys. Here the scalars are those of the core schema of YAML 1.2 (section 10.3), except
that a number which begins with a needless 0 is text: an account "0123" is not the account 123.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from fractal_runner.config.values import Findings, Items, Node, Origin, Plain, Scalar, Table, dotted, table

REPLACE = "!replace"

_CORE = "tag:yaml.org,2002:"
_STR, _SEQ, _MAP = f"{_CORE}str", f"{_CORE}seq", f"{_CORE}map"
_LARGEST = 4_000_000  # bytes of a file: one that is read may be a device, which never ends
_MOST = 100_000  # values in a file: aliases of aliases can stand for more than any memory holds


def _int(text: str) -> int:
    try:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    except ValueError:  # Python refuses to read numbers that take it long
        raise ValueError(f"a number of {len(text)} digits is too long to be read") from None


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


# By tag: which plain scalars have it, and their value.
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Plain]]] = {
    f"{_CORE}null": (re.compile(r"(?:null|Null|NULL|~|)\Z"), lambda text: None),
    f"{_CORE}bool": (
        re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
        lambda text: text.lower() == "true",
    ),
    f"{_CORE}int": (re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), _int),
    f"{_CORE}float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        lambda text: _float(text.lower()),
    ),
    _STR: (re.compile(r".*\Z", re.DOTALL), str),
}
_TAGS = [tag for tag in _SCALARS if tag != _STR]


class _Schema(BaseResolver):
    """What a plain scalar is."""


for _tag in _TAGS:
    _Schema.add_implicit_resolver(_tag, _SCALARS[_tag][0], None)


class _Loader(Reader, Scanner, Parser, Composer, _Schema):
    """PyYAML's own way from text to nodes, with these scalars; what nodes become is not its business."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Schema.__init__(self)


def scalar(text: str) -> Plain:
    """What a plain scalar means.

    Raises:
        ValueError: if it is a number too long to be read.
    """
    for tag in _TAGS:
        pattern, value_of = _SCALARS[tag]
        if pattern.match(text):
            return value_of(text)
    return text


def read_file(path: Path, layer: str, findings: Findings) -> Table | None:
    """The mapping that a file holds; None if it cannot be read, which `findings` is told.

    Raises:
        OSError: if there is no such file, or it cannot be read.
    """
    data, problem = _bytes_of(path)
    if problem:
        findings.add(Origin(layer, str(path)), "", problem)
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        findings.add(Origin(layer, str(path), line), "", f"it is not UTF-8 text: {error.reason}")
        return None
    return read_text(text, layer, str(path), findings)


def _bytes_of(path: Path) -> tuple[bytes, str]:
    """What a file holds, and why that is not to be taken; "" if it is.

    A pipe may be given where a file is named, but nobody is waited for who does not write to it: a directory
    that somebody else has made can have one in it.
    """
    with open(path, "rb", opener=_opened_at_once) as file:
        os.set_blocking(file.fileno(), True)
        data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            return b"", f"it has more than {_LARGEST:,} bytes: no configuration has"
        is_pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
        return data, "it is a pipe that nobody writes to" if is_pipe and not data else ""


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(text: str, layer: str, source: str, findings: Findings) -> Table | None:
    """The mapping that a text holds; None if it holds none, which `findings` is told.

    What is only wrong in places is told as well; the mapping is then without it, and of no use.
    """
    reading = _Reading(lambda line: Origin(layer, source, line), findings)
    composed, node = reading.compose(text)
    if not composed:
        return None
    if node is None or (isinstance(node, ScalarNode) and not node.value and node.style is None):
        return table({}, {}, Origin(layer, source, 1))  # nothing but comments
    if not isinstance(node, MappingNode):
        what = "a list" if isinstance(node, SequenceNode) else "a single value"
        findings.add(
            Origin(layer, source, node.start_mark.line + 1),
            "",
            f'it holds {what}, and a configuration is a mapping: write "key: value"',
        )
        return None
    found = reading.convert(node, "")
    return found if isinstance(found, Table) else None


def read_value(text: str, origin: Origin, key: str, findings: Findings) -> Node | None:
    """What a word means that stands where no file is: in a variable, or on a command line.

    A list, a mapping, and what is quoted, are YAML; all else is one plain scalar as it stands, so that a `#`
    or a `: ` in it are its own. None if it is neither, which `findings` is told.
    """
    word = text.strip()
    if not word.startswith(("[", "{", '"', "'", "!")):
        try:
            return Scalar(scalar(word), origin)
        except ValueError as error:
            findings.add(origin, key, str(error))
            return None
    reading = _Reading(lambda line: origin, findings)
    composed, node = reading.compose(word, key)
    return reading.convert(node, key) if composed and node is not None else None


class _Reading:
    """One text on its way from PyYAML's nodes to ours."""

    def __init__(self, origin_of: Callable[[int], Origin], findings: Findings) -> None:
        self._origin_of = origin_of
        self._findings = findings
        self._count = 0
        self._open: set[int] = set()  # ids of the nodes around the one that is converted

    def compose(self, text: str, key: str = "") -> tuple[bool, Any]:
        """Whether the text is YAML, and its node."""
        try:
            return True, _Loader(text).get_single_node()
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._add(line, key, f"not valid YAML: {error.reason} (character {error.character!r})")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = "" if mark is None else f" (column {mark.column + 1})"
            around = f", {error.context}" if error.context else ""
            hint = ": indent with spaces" if "\\t" in str(error.problem) else ""
            self._add(
                1 if mark is None else mark.line + 1,
                key,
                f"not valid YAML: {error.problem}{around}{place}{hint}",
            )
        except RecursionError:
            self._add(1, key, "not valid YAML: it is nested too deeply")
        return False, None

    def convert(self, node: Any, key: str) -> Node | None:
        """Our node for one of PyYAML's; None if that is wrong, which is told."""
        self._count += 1
        if self._count == _MOST:
            self._add(
                _line(node), key, f"from here on there are more than {_MOST:,} values: are these aliases?"
            )
        if self._count >= _MOST:
            return None
        if id(node) in self._open:
            self._add(_line(node), key, "it contains itself, by an alias")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, ScalarNode):
                return self._scalar(node, key)
            if isinstance(node, SequenceNode):
                return self._items(node, key)
            return self._table(node, key)
        except RecursionError:
            self._add(_line(node), key, "not valid YAML: it is nested too deeply")
            return None
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: ScalarNode, key: str) -> Scalar | None:
        known = _SCALARS.get(node.tag)
        if known is None:
            what = "a single value" if node.tag in (REPLACE, _SEQ, _MAP) else None
            self._add(_line(node), key, _wrong_tag(node.tag, what))
            return None
        pattern, value_of = known
        if not pattern.match(node.value):
            self._add(_line(node), key, f"{node.value!r} is no {node.tag.removeprefix(_CORE)}")
            return None
        try:
            value = value_of(node.value)
        except ValueError as error:
            self._add(_line(node), key, str(error))
            return None
        if isinstance(value, float) and math.isinf(value) and "inf" not in node.value.lower():
            self._add(_line(node), key, f"{node.value} is larger than any number that can be kept")
            return None
        return Scalar(value, self._origin_of(_line(node)))

    def _items(self, node: SequenceNode, key: str) -> Items | None:
        if node.tag not in (_SEQ, REPLACE):
            self._add(_line(node), key, _wrong_tag(node.tag, "a list" if node.tag == _MAP else None))
            return None
        found = []
        for position, item in enumerate(node.value):
            place = f"{key}[{position}]"
            if item.tag == REPLACE and isinstance(item, SequenceNode):
                self._add(
                    _line(item), place, f"{REPLACE} has no effect on a list within a list: leave it out"
                )
                continue
            found.append(self.convert(item, place))
        whole = tuple(item for item in found if item is not None)
        return Items(whole, self._origin_of(_line(node)), node.tag == REPLACE)

    def _table(self, node: MappingNode, key: str) -> Table | None:
        if node.tag != _MAP:
            what = "a mapping" if node.tag in (REPLACE, _SEQ) else None
            self._add(_line(node), key, _wrong_tag(node.tag, what))
            return None
        entries: dict[str, Node] = {}
        keys: dict[str, Origin] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, ScalarNode) or key_node.tag != _STR:
                name = key_node.value if isinstance(key_node, ScalarNode) else "a list or mapping"
                quoted = f": write '{name}'" if isinstance(key_node, ScalarNode) else ""
                self._add(line, key, f"{name} is no text, and keys are text{quoted}")
                continue
            name = key_node.value
            if name in keys:
                first = "" if keys[name].line is None else f"; the first is in line {keys[name].line}"
                self._add(line, dotted(key, name), f"it stands here a second time{first}")
                continue
            keys[name] = self._origin_of(line)
            value = self.convert(value_node, dotted(key, name))
            if value is not None:
                entries[name] = value
        return table(entries, keys, self._origin_of(_line(node)))

    def _add(self, line: int, key: str, message: str) -> None:
        self._findings.add(self._origin_of(line), key, message)


def _line(node: Any) -> int:
    line: int = node.start_mark.line
    return line + 1


def _wrong_tag(tag: str, what: str | None) -> str:
    shown = tag.replace(_CORE, "!!")
    if what is not None and tag == REPLACE:
        return f"{REPLACE} goes before a list, and this is {what}"
    if what is not None:
        return f"this is {what}, and no {shown}"
    return f"unknown tag {shown!r}: there is {REPLACE!r}, before a list"
