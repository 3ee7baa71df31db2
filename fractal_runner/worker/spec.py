"""What travels between a coordinator and its workers: a unit to run, and what happened to it.

Frozen dataclasses of plain values, so that they pickle small and load anywhere. Paths are as the worker
sees them, which over a cluster may differ from the coordinator's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractal_runner.worker.function import FunctionRef

# Why a unit ended otherwise than by itself.
TIMEOUT = "TIMEOUT"  # its own `timeout` had passed
CANCELLED = "CANCELLED"  # the run was told to stop, or another coordinator has taken it over
LAUNCH_FAILED = "LAUNCH_FAILED"  # nothing could be started: no process, no file, no space
UNKILLABLE = "UNKILLABLE"  # it outlived SIGKILL: a hanging file system, mostly
SERVER_LOST = "SERVER_LOST"  # the fork server that had started it ended first

# How a unit's command was started.
WARM_MODES = ("auto", "always", "never")
PATH_BYTES = 107  # of a socket (unix(7))
WARM = "warm"  # forked from a process that had its imports already
COLD = "cold"  # by an interpreter of its own, or whatever its command is


class _Travelling:
    """Pickles as a call of its class: twice as fast as the default of such dataclasses, field by field."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        kind: Any = type(self)
        return kind, _values_of(kind)(self)


@functools.cache
def _values_of(kind: Any) -> Callable[[object], tuple[Any, ...]]:
    return attrgetter(*kind.__match_args__)


@dataclass(frozen=True, slots=True)
class Ahead(_Travelling):
    """A stage that comes next, whose server may import while that of this one does.

    Attributes:
        command: its command's words.
        stage: its name, as `WarmStart` has it.
        timeout_s: seconds that its imports may take.
        log: as `WarmStart` has it.
    """

    command: tuple[str, ...]
    stage: str
    timeout_s: float
    log: str


@dataclass(frozen=True, slots=True)
class WarmStart(_Travelling):
    """How a unit's command may be started warm.

    Attributes:
        stage: what the units are of that end together; its servers end then.
        station: the coordinator's, for units that run on its host (`worker.station`).
        ticks: when the coordinator's process started, in clock ticks since boot; 0 if that is not known.
        timeout_s: seconds that the imports of a server may take.
        most: how many servers one owner may have on a host.
        even_single: whether a single unit is started so as well, which shares its imports with nobody.
        log: what the files are called in which servers say what happens to them, but for the host and the
            pid of who starts one.
        ahead: the stage that comes next, if its server may be started beforehand.
    """

    stage: str
    station: str
    ticks: int
    timeout_s: float
    most: int
    even_single: bool
    log: str
    ahead: Ahead | None = None


@dataclass(frozen=True, slots=True)
class UnitSpec(_Travelling):
    """One unit to run.

    Attributes:
        key: the durable name of this execution: run, task, unit, attempt.
        command: the words of its command; None for a Python function.
        function: its Python function; None for a command.
        args: what its args file holds, or its keyword arguments; JSON values.
        run_id: the run it belongs to.
        run_dir: the run's directory, whose files tell the unit to stop (`worker.stop`).
        folder: the directory of the unit's files.
        prefix: what their names begin with.
        env: variables to add to the environment.
        timeout_s: seconds it may take; None for no limit.
        grace_s: seconds between TERM and KILL when it is ended.
        coordinator: host and pid of the process that made this spec.
        epoch: which of the run's coordinators that is: 1 for the first, one more for each that resumes it.
        digest: of its command and arguments, recorded with its start; "" for none.
        warm: how its command may be started warm; None if it is to be started cold.
        is_folder_new: whether the coordinator that made this spec has itself made the folder, so that
            nothing is in it but what units of this stage have left.
    """

    key: str
    command: tuple[str, ...] | None
    function: FunctionRef | None
    args: Mapping[str, Any]
    run_id: str
    run_dir: str
    folder: str
    prefix: str
    env: tuple[tuple[str, str], ...] = ()
    timeout_s: float | None = None
    grace_s: float = 5.0
    coordinator: tuple[str, int] = ("", 0)
    epoch: int = 1
    digest: str = ""
    warm: WarmStart | None = None
    is_folder_new: bool = False

    @property
    def args_file(self) -> str:
        return f"{self.folder}/{self.prefix}-args.json"

    @property
    def out_file(self) -> str:
        return f"{self.folder}/{self.prefix}-metadiff.json"

    @property
    def file_options(self) -> tuple[str, str, str, str]:
        """What is added to the words of its command."""
        return ("--args-json", self.args_file, "--out-json", self.out_file)

    @property
    def log_file(self) -> str:
        return f"{self.folder}/{self.prefix}-log.txt"


@dataclass(frozen=True, slots=True)
class UnitResult(_Travelling):
    """What happened to one unit.

    Attributes:
        key: the key of its spec.
        digest: that of its spec: what this is the result of.
        returncode: as subprocess reports it: negative for a signal; None if nothing was started or its
            end was not seen.
        signal: the signal's name for a negative returncode.
        reason: why it ended otherwise than by itself: TIMEOUT, CANCELLED, LAUNCH_FAILED, UNKILLABLE,
            SERVER_LOST.
        message: in words, what the returncode does not say.
        output: what it left, as read from JSON; None for nothing.
        output_error: why what it left cannot be read as JSON.
        log_tail: the end of its log, if it failed.
        host: the node it ran on.
        pid: its process id; the worker's for a function.
        started: when it started, in seconds since the epoch.
        ended: when it ended.
        cpu_s: CPU seconds of it and the children it waited for.
        peak_bytes: peak memory of its processes; None where it cannot be told.
        left_running: a Python function in a thread that goes on although the unit has ended.
        start: how its command was started: WARM, COLD; None for a function, and for nothing.
        why_cold: why it was not started warm, although it could have been; "" if there is nothing to say.
    """

    key: str
    digest: str = ""
    returncode: int | None = None
    signal: str | None = None
    reason: str | None = None
    message: str | None = None
    output: Any = None
    output_error: str | None = None
    log_tail: str = ""
    host: str = ""
    pid: int | None = None
    started: float | None = None
    ended: float | None = None
    cpu_s: float | None = None
    peak_bytes: int | None = None
    left_running: bool = False
    start: str | None = None
    why_cold: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself, with exit code 0, leaving readable output or none."""
        return self.returncode == 0 and self.reason is None and self.output_error is None
