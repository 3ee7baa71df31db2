"""How the commands about runs call things: units, moments, and text that somebody else wrote.

What a unit printed, or what a task is called, may hold anything: before a terminal sees it, its control
characters are made visible, so that none of them moves the cursor or says who knows what to the terminal.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

_PICTURES = 0x2400  # Unicode's "Control Pictures": ESC is shown as ␛
_VISIBLE = {
    **{code: _PICTURES + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),  # 8-bit control characters: 0x9B begins sequences, too
}


def printable(text: str) -> str:
    """The text without control characters but line ends and tabulators."""
    return text.translate(_VISIBLE)


def first_line(text: str | None) -> str:
    """The first line of a message, which says what happened; "" if there is none."""
    lines = (text or "").strip().splitlines()
    return printable(lines[0]).replace("\t", " ").rstrip() if lines else ""


def moment(seconds: float) -> str:
    """A time since the epoch, as clocks here show it: "2026-03-04 10:15:02"."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def command(name: str, directory: Path, *options: str) -> str:
    """What is typed to do something with the run in a directory."""
    return shlex.join(["fractal-runner", name, str(directory), *options])


def times(count: int) -> str:
    """ "once", "2 times"."""
    return "once" if count == 1 else f"{count} times"


def row(name: str, value: str) -> str:
    """What is said of one thing about a task, below its title."""
    return f"    {name:<17} {value}"


def unit_title(position: int, task_name: str, stage: str, number: int) -> str:
    """A unit's name: "2 Segment, unit 17"; of a command that runs once, "2 Segment (once)"."""
    which = f", unit {number}" if stage == "par" else " (once)"
    return f"{position} {first_line(task_name)}{which}"
