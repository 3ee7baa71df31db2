"""What the scheduler knows of a job."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class State(enum.Enum):
    """bjobs(1), STAT."""

    PEND = "PEND"
    PSUSP = "PSUSP"
    RUN = "RUN"
    USUSP = "USUSP"  # stopped by its user
    SSUSP = "SSUSP"  # stopped by the scheduler: here, resumed and not yet running again
    UNKWN = "UNKWN"  # its host does not answer
    DONE = "DONE"
    EXIT = "EXIT"


WAITING = (State.PEND, State.PSUSP)
STARTED = (State.RUN, State.USUSP, State.SSUSP, State.UNKWN)
ENDED = (State.DONE, State.EXIT)


@dataclass(frozen=True, slots=True)
class Submission:
    """What was asked for, by options, the script and the client's environment.

    Attributes:
        name: as `-J` gave it, an index list included.
        indices: of its elements; none if it is no array.
        at_once: of the elements, at most so many run at a time; 0: any number.
        script: what runs, as it was read.
        command: how the commands show it.
        run_limit: in minutes.
        memory_limit: in bytes, of all its processes.
        output: where its output goes, with %J and %I; None: it would be mailed.
    """

    name: str | None
    script: str
    command: str
    cwd: str
    env: Mapping[str, str]
    queue: str
    default_queue: bool
    indices: tuple[int, ...] = ()
    at_once: int = 0
    slots: int = 1
    held: bool = False
    rerunnable: bool = False
    dependency: str | None = None
    run_limit: int | None = None
    memory_limit: int | None = None
    resources: str | None = None
    project: str = "default"
    host: str | None = None
    output: str | None = None
    errors: str | None = None
    overwrites: bool = False


@dataclass(slots=True)
class Job:
    """A job, or an element of an array.

    Attributes:
        index: 0 if it is no element.
        events: what bhist tells of it, with the times.
        changes: its states, with the times that it entered them.
        starts: how often it was started.
        pid: of its first process, and so of its session; None while none runs.
        unreported: how it ended on a host that is not heard of.
        reason: why the scheduler ended it: "TERM_OWNER".
        ended_run: exit code and whether by a signal, of its last run; None without knowledge of it.
        requeues: whether it is to be pending again once its processes have ended.
    """

    id: int
    index: int
    submission: Submission
    submitted: float
    state: State
    events: list[tuple[float, str]] = field(default_factory=list)
    changes: list[tuple[float, State]] = field(default_factory=list)
    starts: int = 0
    not_before: float = 0.0
    host: str | None = None
    pid: int | None = None
    file: str = ""
    begun: float | None = None
    ended: float | None = None
    ended_run: tuple[int, bool] | None = None
    unreported: tuple[int, bool] | None = None
    reason: str | None = None
    requeues: bool = False
    requeued_by_code: bool = False
    signalled_at_limit: bool = False
    killing: bool = False
    cpu_s: float = 0.0
    memory: list[int] = field(default_factory=list)  # samples, bytes
    pids: tuple[int, ...] = ()
    execution_cwd: str = ""

    @property
    def name(self) -> str:
        """As it is shown: "sim[3]". The command's beginning if it was given none."""
        name = self.submission.name
        if name is None:
            return self.submission.command
        return f"{name.split('[')[0]}[{self.index}]" if self.index else name

    @property
    def label(self) -> str:
        """What stands between `Job <` and `>`."""
        return f"{self.id}[{self.index}]" if self.index else str(self.id)

    @property
    def exec_host(self) -> str:
        """Empty if it has not been on one."""
        if not self.host:
            return ""
        return self.host if self.submission.slots == 1 else f"{self.submission.slots}*{self.host}"

    def enter(self, state: State, now: float) -> None:
        """Change its state."""
        self.state = state
        self.changes.append((now, state))

    def tell(self, now: float, text: str) -> None:
        """Add to its history."""
        self.events.append((now, text))
