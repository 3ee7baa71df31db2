"""What LSF allows: its parameters, its queues, this user's share, and the unit that it counts memory in.

Families and versions differ in which of these commands they have, and in what they print: each is asked by
itself, and one that does not answer is told of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fractal_runner.executors.batch import lsf_words as words
from fractal_runner.executors.batch.commands import Commands
from fractal_runner.executors.batch.limits import Bound, MemoryUnits, Queue, SiteLimits, least
from fractal_runner.executors.batch.scheduler import SchedulerError

_ARRAY_WORD = "MAX_JOB_ARRAY_SIZE"
_ARRAY_SIZE = re.compile(rf"\b{_ARRAY_WORD}\s*=\s*(\d{{1,10}})\b")
_DEFAULT_QUEUES = re.compile(r"\bDEFAULT_QUEUE\s*=\s*(.+)|^Default Queues:[ \t]*(.+)$", re.MULTILINE)
_UNIT = re.compile(r"^\s*LSF_UNIT_FOR_LIMITS\s*=\s*[\"']?([KMGTPE])B?\b", re.MULTILINE | re.IGNORECASE)
_REASONS = re.compile(r"^[ \t]*PENDING REASONS:[ \t]*\n((?:[ \t]*\S.*(?:\n|\Z))+)", re.MULTILINE)
_USERS = "USER/GROUP"
_QUEUES = "QUEUE_NAME"
# busers(1): of a user, slots and jobs that may be pending. "-" is no bound.
_RUNNING_COLUMN, _PENDING_COLUMN = "MAX", "MPJOBS"
_SHOW_CONFIG = "badmin showconf mbd all"
_LONGEST = 200


def ask_limits(
    commands: Commands,
    program: Callable[[str], Sequence[str]],
    *,
    dialect: words.Dialect | None,
    stated: str | None,
    in_file: str | None,
) -> SiteLimits:
    """Ask LSF for all of it.

    Args:
        commands: what runs its commands.
        program: the words that run one of its programs, wherever those are.
        dialect: its family; None if that is not known.
        stated: the unit of memory that the executor was told.
        in_file: the one that lsf.conf has, where it can be read.

    What does not answer is told in `unknown`.
    """
    asking = _Asking(commands, program)
    parameters = asking.parameters()
    queues = asking.queues(parameters)
    submitted, running = asking.shares()
    site, site_by = in_file, "lsf.conf"
    if site is None and dialect is words.Dialect.IBM:
        site, site_by = asking.unit_of_site(), _SHOW_CONFIG
    used, by = (stated, "memory_unit") if stated is not None else (in_file, "lsf.conf")
    if used is None:
        used, by = "KB and MB" if dialect is words.Dialect.IBM else "MB", "what is usual"
    return SiteLimits(
        max_array=read_max_array(parameters),
        max_submitted=submitted,
        max_running=running,
        queues=tuple(queues),
        names_default=any(queue.is_default for queue in queues),
        memory=MemoryUnits(used, by, stated is not None or in_file is not None, site, site_by),
        facts=() if dialect is None else (f"it is of the family of {dialect.value}",),
        unknown=tuple(asking.unknown),
    )


@dataclass(slots=True)
class _Asking:
    """Asks command after command, and keeps account of those that do not answer.

    Attributes:
        commands: what runs them.
        program: the words that run a program of LSF's, wherever those are.
        unknown: what was not answered, a sentence each.
    """

    commands: Commands
    program: Callable[[str], Sequence[str]]
    unknown: list[str] = field(default_factory=list)

    def parameters(self) -> str:
        """All that bparams says: at length, as not all of them know of "all"."""
        said = self._text(lambda text: _ARRAY_WORD in text, "bparams", ("-a",), ("-l",))
        return said or self._text(lambda text: bool(text.strip()), "bparams", ())

    def queues(self, parameters: str) -> list[Queue]:
        """Its queues; `parameters` say which are the default ones."""
        return read_queues(self._text(lambda text: _QUEUES in text, "bqueues", ("-w",), ()), parameters)

    def shares(self) -> tuple[Bound | None, Bound | None]:
        """How many jobs this user may have waiting, and how many slots at a time."""
        return read_shares(self._text(lambda text: _USERS in text, "busers", ("-w",), ()))

    def unit_of_site(self) -> str | None:
        """The unit of memory that mbatchd was configured with; None if it does not tell."""
        return read_unit(self._text(lambda text: "=" in text, "badmin", ("showconf", "mbd", "all")))

    def _text(self, is_answer: Callable[[str], bool], program: str, *options: tuple[str, ...]) -> str:
        """What the first of these ways to ask is answered; "" if none is."""
        said = ""
        for words_of_it in options:
            try:
                answer = self.commands(*self.program(program), *words_of_it)
            except SchedulerError as error:
                said = str(error)
                continue
            if is_answer(answer.stdout):
                return answer.stdout
            said = f"{program} was not found" if answer.is_missing else words.without_patience(answer.text)
        if options != ((),):
            shown = " ".join(said.split())[:_LONGEST] or "it says nothing of that"
            self.unknown.append(f"`{' '.join([program, *options[0]])}` gave no answer: {shown}")
        return ""


def read_max_array(text: str) -> Bound | None:
    """How many jobs an array may have, as bparams says it."""
    found = _ARRAY_SIZE.search(text)
    return None if found is None else Bound(int(found[1]), _ARRAY_WORD, "bparams")


def read_queues(text: str, parameters: str) -> list[Queue]:
    """The rows of bqueues, by the columns that it names."""
    found = _DEFAULT_QUEUES.search(parameters)
    default = set((found[1] or found[2]).replace("#", " ").split()) if found else set()
    return [
        Queue(
            row[_QUEUES],
            row.get("STATUS", ""),
            is_open=row.get("STATUS", "").startswith("Open"),
            is_default=row[_QUEUES] in default,
        )
        for row in _rows(text, _QUEUES)
    ]


def read_shares(text: str) -> tuple[Bound | None, Bound | None]:
    """Bounds of the row of busers: jobs that may wait, slots that may be used."""
    rows = _rows(text, _USERS)
    pending = [_bound(row, _PENDING_COLUMN) for row in rows]
    running = [_bound(row, _RUNNING_COLUMN) for row in rows]
    return least(pending), least(running)


def read_unit(text: str) -> str | None:
    """The last LSF_UNIT_FOR_LIMITS of a configuration, "MB"; None if it has none."""
    found = _UNIT.findall(text)
    return f"{found[-1].upper()}B" if found else None


def read_reasons(text: str) -> str | None:
    """Why a job waits, as `bjobs -l` says it; None if it does not."""
    found = _REASONS.search(text)
    return None if found is None else " ".join(found[1].split())


def _rows(text: str, first: str) -> list[dict[str, str]]:
    """The rows of a table below the line that names its columns, the first of which is this one."""
    lines = [line.split() for line in text.splitlines()]
    starts = [place for place, line in enumerate(lines) if line and line[0] == first]
    if not starts:
        return []
    columns = lines[starts[0]]
    rows = (line for line in lines[starts[0] + 1 :] if len(line) == len(columns))
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _bound(row: dict[str, str], column: str) -> Bound | None:
    text = row.get(column, "")
    return Bound(int(text), f"{column} of {row[_USERS]}", "busers") if text.isdecimal() else None
