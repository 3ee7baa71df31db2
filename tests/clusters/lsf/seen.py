"""What tests see of a cluster: the calls of its executables, and its jobs."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ClientCall:
    """A call of one of the executables.

    Attributes:
        stdin: how many bytes bsub read.
        env: of its environment, what a scheduler's client goes by: LSB_NTRIES, BSUB_QUIET, …
        began: as time.time().
        returncode: None while it runs, and if it was killed; `ended` as well.
    """

    program: str
    argv: tuple[str, ...]
    stdin: int
    env: Mapping[str, str]
    began: float
    returncode: int | None
    ended: float | None


@dataclass(frozen=True, slots=True)
class JobSeen:
    """What the scheduler knows of a job or an element: also of those that bjobs has forgotten.

    Attributes:
        index: 0 if it is no element.
        starts: how often it was started.
        exit_code: 128 and the signal's number if that ended it; None if it does well, or nobody knows.
        reason: why the scheduler ended it, also where the dialect does not tell.
    """

    id: int
    index: int
    name: str
    state: str
    starts: int
    host: str | None
    pid: int | None
    queue: str
    slots: int
    reason: str | None
    exit_code: int | None
    cwd: str
    execution_cwd: str
    submitted: float
    begun: float | None
    ended: float | None
    is_forgotten: bool


def read_calls(file: Path) -> list[ClientCall]:
    """The calls that clients wrote down; one that has not ended has only the first of its two lines."""
    try:
        text = file.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be being written
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        record = ast.literal_eval(line)
        found.setdefault(record.pop("call"), {"returncode": None, "ended": None}).update(record)
    return [
        ClientCall(**{**record, "argv": tuple(record["argv"])})
        for record in found.values()
        if "program" in record
    ]


def dangerous_kills(calls: Iterable[ClientCall]) -> list[str]:
    """The calls of bkill that end what they do not name."""
    return [
        f"bkill without the id of a job: {list(call.argv)}"
        for call in calls
        if call.program == "bkill" and (not (ids := _ids(call.argv)) or "0" in ids)
    ]


def _ids(argv: Sequence[str]) -> list[str]:
    """The jobs that a call of bkill names."""
    found, words = [], iter(argv)
    for word in words:
        if word in ("-s", "-J", "-q", "-u", "-m", "-g", "-app"):
            next(words, None)
        elif not word.startswith("-"):
            found.append(word)
    return found
