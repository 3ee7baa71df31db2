"""What a call may say to its scheduler by `extra`, and a scheduler by its defaults: parsed, and put together.

Each scheduler has a table of its options. What is parsed here goes into scripts: each value is a printable
line, and nothing in it can become an option or a command that it is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fractal_runner.errors import did_you_mean
from fractal_runner.quantities import argument


@dataclass(frozen=True, slots=True)
class OptionTable:
    """The options of one scheduler.

    Attributes:
        scheduler: its name.
        parsers: what parses a value, by the option's name.
        merges: how a call's own value goes with the default; for all others, in its place.
        elsewhere: options that a call has under another name, by their names here.
    """

    scheduler: str
    parsers: Mapping[str, Callable[[Any], Any]]
    merges: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def parse(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """These options, parsed. Those that say nothing are left out.

        Raises:
            TypeError: if there is no such option, naming the nearest one.
            ValueError: if a value is not what its option takes.
        """
        parsed = {}
        for name, value in extra.items():
            parse = self.parsers.get(name)
            if parse is None:
                raise TypeError(f"{self.scheduler}'s executor has no option {name!r}: {self._hint(name)}")
            if value is None:
                continue
            if known := argument(name, parse, value):
                parsed[name] = known
        return MappingProxyType(parsed)

    def merge(self, defaults: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
        """A call's own options with the defaults, both of them parsed."""
        merged = dict(defaults)
        for name, value in own.items():
            merge = self.merges.get(name)
            merged[name] = merge(merged[name], value) if merge and name in merged else value
        return merged

    def _hint(self, name: str) -> str:
        if said := self.elsewhere.get(name):
            return f"a call says it by `{said}`"
        return did_you_mean(name, self.parsers)


def one_line(value: Any) -> str:
    """A printable line.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a line of text")
    return value.strip()


def lines(value: Any) -> tuple[str, ...]:
    """Lines of shell, which may be indented.

    Raises:
        ValueError: if they are none.
    """
    if isinstance(value, str):
        raise ValueError(f"{value!r} is not a list of lines: write {json.dumps([value])}")
    if not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is not a list of lines")
    for line in value:
        one_line(line.replace("\t", " ") if isinstance(line, str) else line)
    return tuple(value)


def names(value: Any) -> tuple[str, ...]:
    """Names of nodes: "n1,n[3-5]", or a list of such.

    Raises:
        ValueError: if they are none.
    """
    return tuple(
        map(one_line, [value] if isinstance(value, str) or not isinstance(value, Sequence) else value)
    )


def flag(value: Any, name: str = "") -> bool:
    """True or False; `name` is for the message, where nobody else says it.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}{': ' if name else ''}{value!r} is neither True nor False")
    return value


def variables(value: Any) -> dict[str, str]:
    """Variables of an environment.

    Raises:
        ValueError: if one has no name that shells take, or a value of several lines.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping of variables to values")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"{name!r} is not the name of a variable")
    return {name: one_line(str(content)) for name, content in value.items()}


def both(default: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """The default's, then the call's own."""
    return (*default, *own)


def own_first(default: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """The call's own, then the default's: what ends first has begun last."""
    return (*own, *default)


def own_over(default: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Both, the call's own over the default's."""
    return {**default, **own}
