"""In the place of LSF: answers that are written down, and a note of each command that there was."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fractal_runner.executors.batch.scheduler import ArrayRequest

Given = tuple[int, str, str]
Answer = Given | Exception | None | Callable[[list[str]], Given]

OPEN = (0, "volclava project 2.2\n\nMy cluster name is labcl\nMy master name is vm\n", "")
IBM = (
    0,
    "IBM Spectrum LSF Standard 10.1.0.14, Sep 21 2023\n\nMy cluster name is x\nMy master name is y\n",
    "",
)
SUBMITTED = (0, "Job <12> is submitted to queue <normal>.\n", "")
DOWN = (255, "", "Failed in an LSF library call: LIM is down; try later\n")
NONE_FOUND = (255, "", "No job found\n")
HEADER = "JOBID   USER    STAT  QUEUE      FROM_HOST   EXEC_HOST   JOB_NAME   SUBMIT_TIME\n"

_PROGRAMS = {"bsub", "bjobs", "bkill", "bhist", "lsid"}
_FORMS = {"-l": "long", "-V": "version"}  # of bjobs, that have answers of their own


class Recorded:
    """Runs nothing, and answers what it was given for a command: None if there is no such program.

    Attributes:
        answers: by program; `bjobs_long` is that of `bjobs -l`, `bjobs_version` that of `bjobs -V`.
        commands: those that there were, to the word.
        options: what each of them was run with.
    """

    def __init__(self, **answers: Answer) -> None:
        self.answers: dict[str, Answer] = {"lsid": OPEN, **answers}
        self.commands: list[list[str]] = []
        self.options: list[Mapping[str, Any]] = []

    def __call__(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        self.options.append(options)
        words = self.without_prefix(command)
        answer = self.answers.get(_kind(words))
        if callable(answer):
            answer = answer(words)
        if answer is None:
            if len(words) != len(command):  # then it is a shell or env(1) that does not find it
                return subprocess.CompletedProcess(command, 127, "", "")
            raise FileNotFoundError(2, "No such file or directory", command[0])
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, *answer)

    @staticmethod
    def without_prefix(command: Sequence[str]) -> list[str]:
        """A command's own words, whatever there is in front of them."""
        words = list(command)
        if PurePosixPath(words[0]).name not in _PROGRAMS:
            words = shlex.split(words[-1]) if len(words) == 3 and " " in words[-1] else words
            first = next(n for n, word in enumerate(words) if PurePosixPath(word).name in _PROGRAMS)
            words = words[first:]
        return words

    @property
    def kinds(self) -> list[str]:
        """The commands that there were, by the names of their answers."""
        return [_kind(self.without_prefix(command)) for command in self.commands]

    def of(self, kind: str) -> list[list[str]]:
        """The commands of one kind, to the word."""
        return [command for command, its in zip(self.commands, self.kinds, strict=True) if its == kind]


def _kind(words: Sequence[str]) -> str:
    program = PurePosixPath(words[0]).name
    form = _FORMS.get(words[1]) if program == "bjobs" and len(words) > 1 else None
    return f"{program}_{form}" if form else program


def row(array: int | str, name: str, state: str = "RUN", host: str = "vm") -> str:
    """A row of `bjobs -w` of the open families."""
    return f"{array:<8}ada {state:<5} normal     vm          {host:<11} {name:<10} Nov 21 00:08\n"


def rows(*jobs: str) -> Given:
    """An answer of `bjobs -w`."""
    return 0, HEADER + "".join(jobs), ""


def fields(array: int | str, index: int, name: str, state: str = "RUN", **said: str) -> str:
    """A row of IBM's `bjobs -noheader -o`."""
    values = {"exit_code": "-", "exit_reason": "-", "exec_host": "vm", "max_mem": "-", **said}
    return "^".join([str(array), str(index), state, *values.values(), f"{name}[{index}]"]) + "\n"


def long(job: str, name: str, *events: str, status: str | None = "EXIT", user: str = "ada") -> str:
    """A job as `bjobs -l` has it, or `bhist -l`, which has no status."""
    index = job.partition("[")[2]
    shown = f", Status <{status}>, Queue <normal>" if status else ""
    queue = "" if status else ", to Queue <normal>"
    suffix = f"[{index}" if index else ""
    lines = [
        f"Job <{job}>, Job Name <{name}{suffix}>, User <{user}>, Project <default>{shown}, Command <x>",
        f"Sat Nov 21 00:08:18: Submitted from host <vm>{queue}, CWD <$HOME>, Output File </dev/null>;",
        "Sat Nov 21 00:08:20: Started on <vm>, Execution Home </home/ada>, Execution CWD </home/ada>;",
        *(f"Sat Nov 21 00:08:27: {event}" for event in events),
        "",
        "Summary of time in seconds spent in various states by  Sat Nov 21 00:08:27" if not status else "",
    ]
    return "\n" + "\n".join(lines) + "\n"


def array_request(directory: Path, **changes: Any) -> ArrayRequest:
    """A request for an array, "fr-1" of three jobs of one CPU each."""
    values: dict[str, Any] = {"name": "fr-1", "directory": directory, "count": 3, "cpus": 1, **changes}
    return ArrayRequest(**{"seen_as": str(values["directory"]), **values})
