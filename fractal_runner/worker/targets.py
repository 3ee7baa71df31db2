"""Which commands a fork server can run: those that start a Python script or module.

A command is read as the system and the interpreter would read it. What is not understood for certain is
no target, and starts cold.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

_PYTHON = re.compile(r"python(\d+(\.\d+)*)?t?")
_PLAIN_OPTIONS = frozenset("bBEIOPqRsSu")
_HARMLESS_X = frozenset(
    (
        *("cpu_count", "dev", "faulthandler", "frozen_modules", "gil", "int_max_str_digits"),
        *("no_debug_ranges", "pycache_prefix", "utf8", "warn_default_encoding"),
    )
)
_SH_EXEC = re.compile(rb"""'''exec' (.+) "\$0" "\$@"\s*$""")  # pip's, where a shebang would be too long


@dataclass(frozen=True, slots=True)
class Target:
    """What a fork server imports and runs.

    Attributes:
        python: the interpreter, as the command or its first line names it.
        options: the interpreter's own.
        kind: what comes after them.
        name: the script's path, as the interpreter gets it, or the module's name.
        words: how many words of the command stand for all this; the rest are arguments.
        by_env: whether env(1) looks for the interpreter, in the PATH of the unit; else that of whoever starts
            it counts, as posix_spawnp(3) has it.
    """

    python: str
    options: tuple[str, ...]
    kind: Literal["script", "module"]
    name: str
    words: int = field(compare=False)
    by_env: bool = field(default=False, compare=False)


def recognise(words: Sequence[str], path: str | None = None) -> Target | None:
    """Whether a command is a Python script or module, and which.

    Args:
        words: the command: `python [options] script …`, `python [options] -m module …`, or a script whose
            first line names a Python.
        path: where to look for a script without a slash; PATH, if None.

    Returns:
        None for all else, and for what cannot be run by a fork: `-c`, `-i`, archives, options not known.
    """
    if not words or "\0" in "".join(words):
        return None
    if _PYTHON.fullmatch(os.path.basename(words[0])):
        return _interpreted(words[0], words[1:], 1)
    script = words[0] if "/" in words[0] else shutil.which(words[0], path=path)
    interpreter = _interpreter_of(script) if script else None
    if not script or not interpreter or not _PYTHON.fullmatch(os.path.basename(interpreter[0])):
        return None
    target = _interpreted(interpreter[0], [*interpreter[1:], script], 0)
    if target is None or target.kind != "script" or target.name != script:
        return None
    by_env = "/" not in interpreter[0]
    return Target(target.python, target.options, "script", script, 1, by_env)


def _interpreted(python: str, words: Sequence[str], before: int) -> Target | None:
    """The target of what follows an interpreter's name, read as getopt(3) reads it."""
    place = 0
    while place < len(words) and words[place].startswith("-") and words[place] != "-":
        word = words[place]
        place += 1
        if word == "--":
            break
        if word.startswith("--"):
            return None
        for at, letter in enumerate(word[1:], start=1):
            if letter in _PLAIN_OPTIONS:
                continue
            if letter not in "WXm":
                return None
            value = word[at + 1 :]
            if not value:
                if place == len(words):
                    return None
                value = words[place]
                place += 1
            if letter == "m":
                options = _without_module(words[:place])
                return Target(python, options, "module", value, before + place)
            if letter == "X" and value.partition("=")[0] not in _HARMLESS_X:
                return None
            break
    if place == len(words) or words[place] in ("", "-") or words[place].endswith((".pyc", ".pyz", ".zip")):
        return None
    options = tuple(word for word in words[:place] if word != "--")
    return Target(python, options, "script", words[place], before + place + 1)


def _without_module(words: Sequence[str]) -> tuple[str, ...]:
    """The options before `-m module`, in whichever of its spellings: `-m x`, `-mx`, `-um x`."""
    rest = list(words)
    last = rest.pop()
    if not _has_m(last):
        last = rest.pop()
    letters = last[1 : last.index("m")]
    return (*rest, *([f"-{letters}"] if letters else []))


def _has_m(word: str) -> bool:
    return re.fullmatch(r"-[a-zA-Z]*?m.+", word) is not None


def _interpreter_of(script: str) -> list[str] | None:
    """The words that the first line of a script puts before its path."""
    try:
        # Non-blocking, because anything may bear that name, a pipe included.
        fd = os.open(script, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        head = os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)
    lines = head.split(b"\n", 2)
    if not lines[0].startswith(b"#!"):
        return None
    words = os.fsdecode(lines[0][2:].strip()).split(None, 1)  # execve(2): one argument, spaces and all
    if len(words) == 2 and os.path.basename(words[0]) == "env":
        rest = words[1]
        if not rest.startswith("-"):
            return [rest] if " " not in rest else None
        with contextlib.suppress(ValueError):
            found = shlex.split(rest.removeprefix("-S").strip()) if rest.startswith("-S") else []
            return found if found and "=" not in found[0] and not found[0].startswith("-") else None
        return None
    if words and os.path.basename(words[0]) == "sh" and len(lines) > 1:
        match = _SH_EXEC.match(lines[1])
        with contextlib.suppress(ValueError):
            return shlex.split(os.fsdecode(match[1])) if match else None
        return None
    return words or None
