"""What a key takes, and whether a value is that.

What a section's keys take is said by type annotations: an executor's constructor has them anyway. The layers
above hand sections in; nothing here knows what they are sections of.
"""

from __future__ import annotations

import collections.abc
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from fractal_runner.config.values import (
    Findings,
    Items,
    Node,
    Origin,
    Plain,
    Scalar,
    Table,
    dotted,
    kind_of,
    plain,
)
from fractal_runner.config.yaml12 import scalar
from fractal_runner.errors import did_you_mean

_NONE: Mapping[str, Any] = MappingProxyType({})
_SCALARS = (str, int, float, bool)
_LONGEST_NUMBER = 30  # characters, of those that a hint is given for
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # as YAML 1.1 had them


@dataclass(frozen=True, slots=True)
class Takes:
    """What a key takes.

    Attributes:
        anything: whatever it is.
        scalars: types of single values: of str, int, float, bool.
        choices: single values that it takes beside those.
        null: whether null is a value of its own. If it is not, null takes back what earlier layers say.
        needed: whether it has to have a value: then null is none.
        items: what each element of a list has to be; None if it takes no list.
        values: what each value of a mapping has to be, whose keys are the user's own; None if it takes none.
        section: makes the section of a mapping whose keys are known; None if it takes none. It may raise
            ValueError or ImportError, if what it is about cannot be had.
        parse: looks at a single value; raises ValueError if it is wrong, saying what would be right.
    """

    anything: bool = False
    scalars: frozenset[type] = frozenset()
    choices: tuple[Plain, ...] = ()
    null: bool = False
    needed: bool = False
    items: Takes | None = None
    values: Takes | None = None
    section: Callable[[], Section] | None = None
    parse: Callable[[Any], object] | None = None

    @property
    def single(self) -> bool:
        """Whether it takes single values."""
        return self.anything or bool(self.scalars or self.choices)

    @property
    def mapping(self) -> bool:
        """Whether it takes mappings."""
        return self.anything or self.values is not None or self.section is not None

    def __str__(self) -> str:
        if self.anything:
            return "anything"
        words = [word for name, word in _WORDS if name in self.scalars]
        if float in self.scalars:
            words.remove("a whole number")
        words += [repr(choice) for choice in self.choices]
        if self.items is not None:
            words.append("a list" if self.items.anything else f"a list of {_plural(self.items)}")
        if self.mapping:
            words.append("a mapping")
        return " or ".join(words)


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping whose keys are known.

    Attributes:
        keys: what each of them takes.
        other_words: keys of others, each with what it is called here.
        others: what keys that are not known take; None if there may be none.
        python_only: names of arguments that can only be given in Python.
        refused: keys that are not to be said here, each with the reason: a sentence about "it".
    """

    keys: Mapping[str, Takes]
    other_words: Mapping[str, str] = field(default_factory=lambda: _NONE)
    others: Takes | None = None
    python_only: Collection[str] = ()
    refused: Mapping[str, str] = field(default_factory=lambda: _NONE)

    def of(self, name: str) -> Takes | None:
        """What this key takes; None if there is none of this name."""
        return self.keys.get(name, self.others)

    def unknown(self, name: str) -> str:
        """What to say of a key that there is not."""
        if name in self.refused:
            return self.refused[name]
        if name in self.other_words:
            return f"unknown key: it is {self.other_words[name]!r} here"
        if name in self.python_only:
            return "it can be given in Python only: no text can say it"
        return f"unknown key: {did_you_mean(name, self.keys)}"


@dataclass(frozen=True, slots=True)
class Keyed:
    """In the `Annotated` type of a mapping: which keys it has.

    Attributes:
        section: makes its section; see `Takes.section`.
    """

    section: Callable[[], Section]


_WORDS: tuple[tuple[type, str], ...] = (
    (int, "a whole number"),
    (float, "a number"),
    (str, "text"),
    (bool, "true or false"),
)


def takes(annotation: Any) -> Takes | None:
    """What a parameter of this type takes; None if nothing that can be written is of that type.

    A callable in an `Annotated` type is its `parse`, a `Keyed` says which keys a mapping has. Types that say
    nothing (`Any`, text that could not be resolved) take anything.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is object or isinstance(annotation, (str, typing.TypeVar)):
        return Takes(anything=True)
    if annotation is None or annotation is type(None):
        return Takes(null=True)
    if isinstance(annotation, type) and annotation in _SCALARS:
        return Takes(scalars=frozenset({annotation, int}) if annotation is float else frozenset({annotation}))
    if is_typeddict(annotation):
        return Takes(section=partial(_section_of, annotation))
    if origin in (Union, types.UnionType):
        return _any_of(arguments)
    if origin is Literal:
        choices = tuple(choice for choice in arguments if choice is not None)
        return Takes(choices=choices, null=None in arguments)
    if origin is typing.Annotated:
        return _annotated(arguments)
    if origin in (typing.Required, typing.NotRequired):
        return takes(arguments[0])
    base = origin or annotation
    if not isinstance(base, type):
        return Takes(anything=True)
    if issubclass(base, collections.abc.Mapping):
        return Takes(values=(takes(arguments[1]) if arguments else None) or Takes(anything=True))
    if issubclass(base, collections.abc.Iterable) and not issubclass(base, (str, bytes)):
        elements = [argument for argument in arguments if argument is not Ellipsis]
        return Takes(items=_any_of(elements) if elements else Takes(anything=True))
    # A path is written as text. Whatever else this is (a cluster, a pool of slots), no text is one.
    return Takes(scalars=frozenset({str})) if issubclass(base, os.PathLike) else None


def check(node: Node, expected: Takes, key: str, findings: Findings) -> None:
    """Tell of all that is wrong with a value."""
    if expected.anything:
        return
    if isinstance(node, Scalar):
        _check_scalar(node, expected, key, findings)
    elif isinstance(node, Items):
        if expected.items is None:
            findings.add(node.origin, key, f"this is a list, and it takes {expected}")
            return
        # In a list there is nothing that null could take back.
        element = replace(expected.items, needed=not expected.items.null)
        for position, item in enumerate(node.items):
            check(item, element, f"{key}[{position}]", findings)
    elif expected.section is not None:
        section = section_of(expected, node.origin, key, findings)
        if section is not None:
            check_section(node, section, key, findings)
    elif expected.values is not None:
        for name, value in node.entries.items():
            check(value, expected.values, dotted(key, name), findings)
    else:
        findings.add(node.origin, key, f"this is a mapping, and it takes {expected}")


def check_section(node: Table, section: Section, key: str, findings: Findings) -> None:
    """Tell of all that is wrong with a mapping whose keys are known."""
    for name, origin in node.keys.items():
        expected = section.of(name)
        if expected is None:
            findings.add(origin, dotted(key, name), section.unknown(name))
        elif name in node.entries:
            check(node.entries[name], expected, dotted(key, name), findings)


def accepts(node: Node, expected: Takes) -> bool:
    """Whether a value is what a key takes."""
    findings = Findings()
    check(node, expected, "", findings)
    return not findings.mistakes


def section_of(expected: Takes, origin: Origin, key: str, findings: Findings) -> Section | None:
    """The section that a key takes; None if it takes none, or if it cannot be had, which is told."""
    if expected.section is None:
        return None
    try:
        return expected.section()
    except (ImportError, ValueError) as error:
        findings.add(origin, key, f"this section cannot be checked: {error}")
        return None


def arguments(node: Table, section: Section) -> dict[str, Any]:
    """A section's values as keyword arguments. A null that takes back what was said is none."""
    return {
        name: _argument(value, expected)
        for name, value in node.entries.items()
        if not _takes_back(value, expected := section.of(name) or Takes(anything=True))
    }


def _argument(value: Node, expected: Takes) -> Any:
    if isinstance(value, Table) and expected.section is not None:
        return arguments(value, expected.section())
    if isinstance(value, Table) and expected.values is not None:
        return arguments(value, Section({}, others=expected.values))
    return plain(value)


def _takes_back(value: Node, expected: Takes) -> bool:
    """Whether a value is a null that only takes back what earlier layers say."""
    return isinstance(value, Scalar) and value.value is None and not (expected.null or expected.anything)


def _check_scalar(node: Scalar, expected: Takes, key: str, findings: Findings) -> None:
    value = node.value
    if value is None:
        if expected.needed:
            findings.add(node.origin, key, f"null is no value here: it takes {expected}")
        elif not expected.single:
            findings.add(
                node.origin,
                key,
                f"null (or nothing) may take the place of single values only, and it takes {expected}: "
                "leave the key out",
            )
        return
    if any(value == choice and type(value) is type(choice) for choice in expected.choices):
        return
    if type(value) not in expected.scalars:
        findings.add(node.origin, key, _wrong_type(node, expected))
        return
    if expected.parse is not None:
        try:
            expected.parse(value)
        except ValueError as error:
            findings.add(node.origin, key, str(error))
        except Exception as error:  # of another package's own check, which is wrong itself
            findings.add(node.origin, key, f"{value!r} is not what it takes: {type(error).__name__}: {error}")


def _wrong_type(node: Scalar, expected: Takes) -> str:
    value = node.value
    written = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    if expected.choices and not expected.scalars and isinstance(value, str):
        near = did_you_mean(value, [choice for choice in expected.choices if isinstance(choice, str)])
        return f"{written} is not what it takes: {near}"
    hint = _hint(node, expected)
    said = "this is" if isinstance(value, bool) else f"{written} is"
    what = written if isinstance(value, bool) else kind_of(node)
    return f"{said} {what}, and it takes {expected}{f': write {hint}' if hint else ''}"


def _hint(node: Scalar, expected: Takes) -> str | None:
    """How to write what is probably meant."""
    value = node.value
    if not isinstance(value, str):
        if str in expected.scalars:
            return f"'{json.dumps(value)}'"
    elif bool in expected.scalars and value.lower() in _SWITCHES:
        return f"{json.dumps(_SWITCHES[value.lower()])} ({value!r} is text in YAML 1.2)"
    elif expected.scalars & {int, float} and len(value) < _LONGEST_NUMBER:
        number = scalar(value.replace("_", "").lstrip("0") or value)
        if type(number) in expected.scalars:
            return json.dumps(number)
    if expected.items is not None and accepts(node, expected.items):
        return json.dumps([value], ensure_ascii=False)
    return None


def _any_of(annotations: typing.Iterable[Any]) -> Takes | None:
    """What takes all that these do; types that cannot be written are left out."""
    found = [one for one in map(takes, annotations) if one is not None]
    if not any(one.single or one.items or one.mapping for one in found):
        return None
    lists = [one.items for one in found if one.items is not None]
    return Takes(
        anything=any(one.anything for one in found),
        scalars=frozenset().union(*(one.scalars for one in found)),
        choices=tuple(choice for one in found for choice in one.choices),
        null=any(one.null for one in found),
        items=Takes(anything=True) if len(lists) > 1 else next(iter(lists), None),
        values=next((one.values for one in found if one.values is not None), None),
        section=next((one.section for one in found if one.section is not None), None),
        parse=next((one.parse for one in found if one.parse is not None), None),
    )


def _annotated(arguments: tuple[Any, ...]) -> Takes | None:
    found = takes(arguments[0])
    if found is None:
        return None
    for extra in arguments[1:]:
        if isinstance(extra, Keyed):
            return replace(found, values=None, section=extra.section)
        if callable(extra) and _takes_one(extra):
            return replace(found, parse=extra)
    return found


def _takes_one(called: Callable[..., object]) -> bool:
    """Whether this can be called with one value; a class that only marks a type can often not."""
    try:
        inspect.signature(called).bind(None)
    except TypeError:
        return False
    except ValueError:  # of what is not written in Python, such as int
        return True
    return True


def _section_of(typed: Any) -> Section:
    hints = hints_of(typed)
    return Section({name: one for name, hint in hints.items() if (one := takes(hint)) is not None})


def hints_of(typed: Any) -> dict[str, Any]:
    """The types of a TypedDict's keys; `Any` for all, if one is only there for those who check types."""
    try:
        return get_type_hints(typed, include_extras=True)
    except Exception:  # whatever an expression can raise: it only means that the types are not known
        return dict.fromkeys((*typed.__required_keys__, *typed.__optional_keys__), Any)


def _plural(expected: Takes) -> str:
    return {"text": "texts", "a whole number": "whole numbers", "a number": "numbers"}.get(
        str(expected), f"elements that are {expected}"
    )
