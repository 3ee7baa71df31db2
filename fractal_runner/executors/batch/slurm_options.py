"""What a call may say to Slurm by `extra`, and a scheduler as its defaults: parsed, and put together.

The names are Fractal's and sbatch's. What is parsed here goes into a script: each value is a printable line,
and nothing in it can become an option or a command that it is not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fractal_runner.errors import did_you_mean
from fractal_runner.quantities import parse_count

# Options that extra lines may not have, as the array could not be found or followed any more.
_OURS = {
    "array": "a",
    "clusters": "M",
    "help": "h",
    "job-name": "J",
    "output": "o",
    "parsable": "",
    "signal": "",
    "test-only": "",
    "usage": "",
    "version": "V",
    "wait": "W",
    "wrap": "",
}


def parse_options(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """These options, parsed. Those that say nothing are left out.

    Raises:
        TypeError: if there is no such option, naming the nearest one.
        ValueError: if a value is not what its option takes.
    """
    parsed = {}
    for name, value in extra.items():
        parse = _OPTIONS.get(name)
        if parse is None:
            raise TypeError(f"SLURM's executor has no option {name!r}: {_hint(name)}")
        if value is None:
            continue
        try:
            known = parse(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if known:
            parsed[name] = known
    return MappingProxyType(parsed)


def merge_options(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call's own options with the defaults, both of them parsed."""
    merged = dict(defaults)
    for name, value in own.items():
        merge = _MERGES.get(name)
        merged[name] = merge(merged[name], value) if merge and name in merged else value
    return merged


def _hint(name: str) -> str:
    if said := _SAID_ELSEWHERE.get(name):
        return f"a call says it by `{said}`"
    return did_you_mean(name, _OPTIONS)


def one_line(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a line of text")
    return value.strip()


def _lines(value: Any) -> tuple[str, ...]:
    """Lines of shell, which may be indented."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is not a list of lines")
    for line in value:
        one_line(line.replace("\t", " ") if isinstance(line, str) else line)
    return tuple(value)


def _names(value: Any) -> str:
    """Nodes: "n1,n[3-5]", or a list of such."""
    return ",".join(
        map(one_line, [value] if isinstance(value, str) or not isinstance(value, Sequence) else value)
    )


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither True nor False")
    return value


def _exports(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping of variables to values")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"{name!r} is not the name of a variable")
    return {name: one_line(str(content)) for name, content in value.items()}


def _sbatch_lines(value: Any) -> tuple[str, ...]:
    """Lines for sbatch, each with its "#SBATCH" in front."""
    return tuple(f"#SBATCH {_sbatch_options(line)}" for line in _lines(value))


def _sbatch_options(line: str) -> str:
    found = re.fullmatch(r"(?:#SBATCH\s+)?(-.*)", line.strip())
    if found is None:
        raise ValueError(
            f'{line!r} is no line for sbatch: write "#SBATCH --option=value", or "--option=value"'
        )
    try:
        parts = shlex.split(found[1])
    except ValueError as error:
        raise ValueError(f"{line!r}: {error}") from None
    for part in parts:
        if ours := _is_ours(part):
            raise ValueError(f"{line!r}: --{ours} is the executor's own to say")
    return found[1]


def _is_ours(word: str) -> str | None:
    """The option of `_OURS` that a word is, if any: in full, cut short as sbatch allows, or a letter."""
    if word.startswith("--"):
        name = word[2:].partition("=")[0]
        return next((ours for ours in _OURS if name and ours.startswith(name)), None)
    letter = word[1:2] if word.startswith("-") else ""
    return next((ours for ours, short in _OURS.items() if letter and short == letter), None)


_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "constraint": one_line,
    "env": _exports,
    "exclude": _names,
    "extra_lines": _sbatch_lines,
    "gres": one_line,
    "needs_gpu": _flag,
    "nodelist": _names,
    "nodes": parse_count,
    "ntasks_per_node": parse_count,
    "pre_submission_commands": _lines,
    "qos": one_line,
    "setup": _lines,
    "teardown": _lines,
    "user_local_exports": _exports,
}
_SAID_ELSEWHERE = {
    "account": "account",
    "cpus_per_task": "cpus",
    "gpus": "gpus",
    "mem": "memory",
    "memory": "memory",
    "partition": "queue",
    "time": "time",
}
# How a call's own goes with the default; for all others, in its place.
_MERGES: dict[str, Callable[[Any, Any], Any]] = {
    "env": lambda default, own: {**default, **own},
    "exclude": lambda default, own: f"{default},{own}",
    "extra_lines": lambda default, own: (*default, *own),
    "setup": lambda default, own: (*default, *own),
    "teardown": lambda default, own: (*own, *default),
}
