"""The two layers that are no files: variables of the environment, and options of the command line.

Both are words that name one key each. What the key takes decides how its word is read: a partition called
1234 need not be quoted, as nothing but text can be meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from fractal_runner.config.keys import Section, Takes, accepts, check, section_of
from fractal_runner.config.schema import CLASSES, EXECUTOR
from fractal_runner.config.values import (
    Findings,
    Node,
    Origin,
    Scalar,
    Table,
    dotted,
    empty,
    merge,
    table,
)
from fractal_runner.config.yaml12 import read_value

ENVIRONMENT = "environment"
COMMAND_LINE = "command line"

PREFIX = "FRACTAL_RUNNER"
EXECUTOR_VARIABLE = f"{PREFIX}_EXECUTOR"
INSTALLATION_VARIABLE = f"{PREFIX}_INSTALL_CONFIG"
_KNOWN = (EXECUTOR_VARIABLE, INSTALLATION_VARIABLE)
_SEPARATOR = "__"


def environment_layer(
    environ: Mapping[str, str], root: Takes, classes: Collection[str], findings: Findings
) -> Table:
    """What the environment's variables say: FRACTAL_RUNNER_EXECUTOR, FRACTAL_RUNNER__SLURM__PARTITION.

    Args:
        environ: the environment. A variable that is set to nothing says nothing.
        root: what a configuration takes.
        classes: the resource classes that the layers before this one name.
        findings: is told of every mistake.
    """
    words = _Words(ENVIRONMENT, findings)
    for variable in sorted(environ):
        if not variable.startswith(f"{PREFIX}_") or not environ[variable].strip():
            continue
        origin = Origin(ENVIRONMENT, variable)
        if variable == EXECUTOR_VARIABLE:
            words.add(_Walk(root, origin, findings).into(EXECUTOR), environ[variable])
        elif variable.startswith(PREFIX + _SEPARATOR):
            names = variable.removeprefix(PREFIX + _SEPARATOR).split(_SEPARATOR)
            words.add(_follow_variable(_Walk(root, origin, findings), names, classes), environ[variable])
        elif _SEPARATOR in variable:
            right = PREFIX + _SEPARATOR + variable.removeprefix(f"{PREFIX}_").strip("_")
            findings.add(origin, "", f"keys have two underscores before them: write {right}")
        elif (meant := _nearly(variable, root)) is not None:
            findings.add(origin, "", f"this says nothing: write {meant}")
        # Any other is one of ours that is no key: FRACTAL_RUNNER_DB.
    return words.layer


def _nearly(variable: str, root: Takes) -> str | None:
    """The variable that is meant by one that has too few underscores, or a letter wrong; None if none is."""
    rest = _folded(variable.removeprefix(f"{PREFIX}_"))
    top = root.section().keys if root.section is not None else {}
    for name, expected in top.items():
        if rest.startswith(f"{_folded(name)}_"):
            section = section_of(expected, Origin(ENVIRONMENT, variable), name, Findings())
            key = rest.removeprefix(f"{_folded(name)}_")
            if section is not None and key in map(_folded, section.keys):
                return _SEPARATOR.join((PREFIX, _folded(name).upper(), key.upper()))
    near = difflib.get_close_matches(variable, _KNOWN, n=1, cutoff=0.9)
    return near[0] if near and near[0] != variable else None


def command_line_layer(
    executor: str | None, chosen: str | None, options: Iterable[str], root: Takes, findings: Findings
) -> Table:
    """What a command line says.

    Args:
        executor: what follows `--executor`; None if it was not given.
        chosen: the executor whose options these are; None if that is not known, which is a mistake
            that has been told.
        options: what follows each `--executor-opt`: `partition=main`, `pool.workers=slurm`; the key is one of
            the executor's section, or a whole one, `resource_classes.large.memory=64G`.
        root: what a configuration takes.
        findings: is told of every mistake.
    """
    words = _Words(COMMAND_LINE, findings)
    if executor is not None:
        origin = Origin(COMMAND_LINE, f"--executor {executor}")
        words.add(_Walk(root, origin, findings).into(EXECUTOR), executor)
    for option in options:
        origin = Origin(COMMAND_LINE, f"--executor-opt {option}")
        name, equals, word = option.partition("=")
        if not equals or not name.strip():
            findings.add(origin, "", "it is not of the form KEY=VALUE: write --executor-opt max_workers=4")
        else:
            walk = _follow_option(_Walk(root, origin, findings), name.strip().split("."), chosen)
            words.add(walk, word)
    return words.layer


class _Words:
    """A layer as its words are read, one after the other."""

    def __init__(self, layer: str, findings: Findings) -> None:
        self.layer = empty(Origin(layer, layer))
        self._findings = findings

    def add(self, walk: _Walk, word: str) -> None:
        """Give the key that a walk has come to the value that a word means there."""
        node = None if walk.expected is None else self._read(walk, walk.expected, word)
        if node is not None:
            self.layer = _joined(self.layer, _nested(walk.path, node), self._findings)

    def _read(self, walk: _Walk, expected: Takes, word: str) -> Node | None:
        """What a word means to a key; None if nothing, which is told."""
        trouble = Findings()
        node = read_value(word, walk.origin, walk.key, trouble)
        as_yaml = None if trouble.mistakes else node
        as_text = Scalar(word.strip(), walk.origin)
        for meant in (as_yaml, as_text):
            if meant is not None and accepts(meant, expected):
                return meant
        if as_yaml is None:
            for mistake in trouble.mistakes:
                self._findings.add(mistake.origin, mistake.key, mistake.message)
        else:
            check(as_yaml, expected, walk.key, self._findings)
        return None


class _Walk:
    """The way that a word's name leads from the top of a configuration to a key.

    Attributes:
        path: the names so far.
        expected: what is taken where it has come to; None once it has gone wrong, which has been told.
        origin: the word.
        findings: is told of what goes wrong.
    """

    def __init__(self, root: Takes, origin: Origin, findings: Findings) -> None:
        self.path: tuple[str, ...] = ()
        self.expected: Takes | None = root
        self.origin = origin
        self.findings = findings

    @property
    def key(self) -> str:
        """The dotted key so far."""
        return ".".join(self.path)

    def section(self) -> Section | None:
        """The section that it has come to; None if it is none, or cannot be had, which is told."""
        if self.expected is None or self.expected.section is None:
            return None
        section = section_of(self.expected, self.origin, self.key, self.findings)
        if section is None:
            self.expected = None
        return section

    def into(self, name: str, *, given: str | None = None) -> _Walk:
        """One step further.

        Args:
            name: the entry's name.
            given: the name as it was written, for messages.
        """
        if self.expected is None:
            return self
        if self.expected.section is not None:
            section = self.section()
            if section is None:
                return self
            found = section.of(name)
            if found is None:
                return self.fail(section.unknown(name), name)
        elif self.expected.mapping:
            found = self.expected.values or self.expected
        else:
            return self.fail(f"unknown key: {self.key} takes {self.expected}", given or name)
        self.path, self.expected = (*self.path, name), found
        return self

    def takes_rest(self) -> bool:
        """Whether it has come to a mapping of single values, whose keys are the user's own."""
        inner = None if self.expected is None or self.expected.section else self.expected.values
        return inner is not None and not inner.mapping

    def fail(self, message: str, name: str | None = None) -> _Walk:
        """There is no such key."""
        self.findings.add(self.origin, self.key if name is None else dotted(self.key, name), message)
        self.expected = None
        return self


def _follow_variable(walk: _Walk, names: list[str], classes: Collection[str]) -> _Walk:
    """The key that a variable's parts name."""
    for position, name in enumerate(names):
        if not name:
            return walk.fail("a part of the key is empty: two underscores stand between two parts")
        if walk.takes_rest():
            # Names of the user's own are as they are written; the last of them may have underscores in it.
            return walk.into(_SEPARATOR.join(names[position:]))
        if walk.path == (CLASSES,):
            _into_class(walk, name, classes)
        elif (section := walk.section()) is not None:
            walk.into(next((one for one in section.keys if _folded(one) == _folded(name)), name.lower()))
        else:
            walk.into(name, given=name.lower())
    return walk


def _follow_option(walk: _Walk, names: list[str], chosen: str | None) -> _Walk:
    """The key that an option's parts name: one of its executor's section, or else a whole key."""
    top = walk.section()
    keys = {} if top is None else top.keys
    own = None if chosen is None else section_of(keys[chosen], walk.origin, chosen, walk.findings)
    is_whole = len(names) > 1 and names[0] in keys and (own is None or own.of(names[0]) is None)
    if not is_whole:
        if chosen is None:
            walk.expected = None  # nobody knows whose options these are, which has been told
        else:
            walk.into(chosen)
    for position, name in enumerate(names):
        if walk.takes_rest():
            return walk.into(".".join(names[position:]))  # a path, or a file's name, has dots
        walk.into(name)
    return walk


def _into_class(walk: _Walk, name: str, classes: Collection[str]) -> None:
    """Go on to the resource class that a part of a variable's name means: one that there is, if it can be."""
    near = sorted(one for one in classes if _folded(one) == _folded(name))
    if name in near or not near:
        walk.into(name.lower() if not near and name.isupper() else name)
    elif len(near) == 1:
        walk.into(near[0])
    else:
        names = " and ".join(map(repr, near))
        walk.fail(f"{name!r} can be {names}: write it as one of them is written")


def _folded(name: str) -> str:
    return name.replace("-", "_").casefold()


def _nested(path: tuple[str, ...], node: Node) -> Table:
    """A layer that says this one value."""
    name, *inner = path
    return table({name: _nested(tuple(inner), node) if inner else node}, {name: node.origin}, node.origin)


def _joined(one: Table, other: Table, findings: Findings, key: str = "") -> Table:
    """Two parts of one layer: what both say is said twice, which is a mistake."""
    for name in one.entries.keys() & other.entries.keys():
        first, second = one.entries[name], other.entries[name]
        if isinstance(first, Table) and isinstance(second, Table):
            _joined(first, second, findings, dotted(key, name))
        else:
            place = dotted(key, name)
            findings.add(second.origin, place, f"{place} is given twice; the first time by {first.origin}")
    return merge(one, other, Findings(), key)
