"""What a site's batch system allows whoever asks, in one vocabulary: what `Scheduler.limits` answers.

Apart from `scheduler`, as no executor needs it to run calls: it is for people who set one up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bound:
    """A number that may not be exceeded, and who says so.

    Attributes:
        value: the number.
        word: what the site calls it ("MaxArraySize").
        by: the command that has said it ("scontrol show config").
    """

    value: int
    word: str
    by: str

    def __str__(self) -> str:
        return f"{self.word} {self.value} ({self.by})"


@dataclass(frozen=True, slots=True)
class Queue:
    """A partition of SLURM's, or a queue of LSF's.

    Attributes:
        name: its name.
        state: what the scheduler calls its state ("UP", "Open:Active").
        is_open: whether it takes jobs.
        is_default: whether it is that of jobs which name none.
        max_time: seconds that a job may ask for; None for no bound, or if that is not known.
    """

    name: str
    state: str
    is_open: bool = True
    is_default: bool = False
    max_time: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryUnits:
    """What a scheduler counts memory in that takes plain numbers.

    Attributes:
        used: the unit that it is told numbers in: "MB"; for a limit and a reservation, "KB and MB".
        by: who says that it is this one.
        is_known: whether that is somebody who knows the site: not, for what is merely usual.
        site: the unit that the site itself names; None if it does not.
        site_by: the command that names it.
    """

    used: str
    by: str
    is_known: bool
    site: str | None = None
    site_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLimits:
    """What a scheduler allows, as far as it says.

    Attributes:
        max_array: jobs in an array.
        max_submitted: jobs of this user that may wait or run at a time.
        max_running: jobs of this user that may run at a time; others wait.
        queues: its partitions or queues.
        names_default: whether `queues` would say which of them is the default.
        memory: its units of memory; None where those need no care.
        facts: more that it says, for people.
        unknown: what it has not said, and why; a sentence each.
    """

    max_array: Bound | None = None
    max_submitted: Bound | None = None
    max_running: Bound | None = None
    queues: tuple[Queue, ...] = ()
    names_default: bool = False
    memory: MemoryUnits | None = None
    facts: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def least(bounds: Iterable[Bound | None]) -> Bound | None:
    """The one that is reached first; None if there is none."""
    return min((one for one in bounds if one is not None), key=lambda one: one.value, default=None)
