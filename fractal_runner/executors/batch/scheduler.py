"""What a batch system is to the executor above it: jobs are submitted, asked about, cancelled.

Each scheduler has its own words for the life of a job and its own commands. Everything above this module
knows only what stands here; a scheduler's file holds the table from its words to ours.
"""

from __future__ import annotations

import enum
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fractal_runner.executors.batch.limits import SiteLimits
from fractal_runner.executors.preview import Handover


class JobState(enum.IntEnum):
    """Where a job is in its life.

    A later answer counts over an earlier one in one way only: what has ended does not come back.
    """

    QUEUED = 0
    RUNNING = 1  # also suspended or held: such jobs come back
    LOST = 2  # the scheduler does not know it: an end only if that lasts and nothing is heard of the job
    ENDED = 3


class Cause(enum.Enum):
    """What ended a job that did not end well by itself, where its scheduler's word for it says that much."""

    CANCELLED = enum.auto()  # by people, whose word counts: another job would be against it
    DEADLINE = enum.auto()
    MEMORY = enum.auto()
    NODE = enum.auto()  # it failed, or was lost
    PREEMPTED = enum.auto()
    REFUSED = enum.auto()  # not what was submitted: another one would become the same
    TIME = enum.auto()


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One answer of a scheduler about one job.

    Attributes:
        state: where the job is.
        reason: the scheduler's own word for how it ended ("OUT_OF_MEMORY"), or for why it still waits
            ("Priority"); None if it gave none, and for a job that has ended well.
        returncode: the job's, as subprocess reports it: negative for a signal; None if unknown.
        node: where it runs or ran last; None if unknown.
        detail: the scheduler's answer in its own words, for people.
        can_start: False for a job that waits for something that will not come of itself.
        cause: what `reason` means, of a job that has ended; None if it means nothing in particular.
    """

    state: JobState
    reason: str | None = None
    returncode: int | None = None
    node: str | None = None
    detail: str = ""
    can_start: bool = True
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class ArrayRequest:
    """Jobs to be submitted as one array: they differ in their number alone, which counts from 0.

    Attributes:
        name: the array's own name, which no other one has or had: what a lost reply is found by.
        directory: where its files are, as this process sees it.
        seen_as: the same directory, as the nodes see it.
        count: how many jobs.
        cpus: CPUs of each job.
        memory: bytes of each job; None for the scheduler's default.
        gpus: GPUs of each job.
        time: seconds after which a job may be ended; None for the scheduler's default.
        queue, account: where to, on whose account; None for the scheduler's defaults.
        extra: options of the scheduler, by its own names; `Scheduler.check` has seen them.
    """

    name: str
    directory: Path
    seen_as: str
    count: int
    cpus: int
    memory: int | None = None
    gpus: int = 0
    time: float | None = None
    queue: str | None = None
    account: str | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class SchedulerError(RuntimeError):
    """A scheduler's command gave no answer, or none that means anything: it may have done what it was to do.

    The message has the command's own words.
    """


class PartlyExplainedError(SchedulerError):
    """How jobs have ended is not known to the last word.

    Attributes:
        answers: what is known by now.
    """

    def __init__(self, message: str, answers: Mapping[str, JobStatus]) -> None:
        super().__init__(message)
        self.answers = answers


class SubmissionRefusedError(SchedulerError):
    """The scheduler refuses an array, in its own words: it is not submitted, however often it is tried."""


class Scheduler(ABC):
    """A batch system, by its commands. Calls may come from several threads, and may take their time.

    Each method ends: every command that it runs has a timeout.

    Jobs are asked about by their ids together with the names of their arrays: ids come again, in a cluster
    that was set up anew or has counted to its largest number, and names do not.

    Attributes:
        name: what it is called ("SLURM").
        keeps_waiting: whether a job that has waited, and is not known any more though others of its array
            are, was surely taken out by somebody.
        ignores: options that only other schedulers have, and that a task may be carrying.
        done_is_proof: whether a job that has ended well, as it says, has surely done all that it has begun.
    """

    name: str
    keeps_waiting: bool = False
    ignores: frozenset[str] = frozenset()
    done_is_proof: bool = True

    @property
    @abstractmethod
    def max_array(self) -> int:
        """How many jobs an array may have."""

    @abstractmethod
    def check(self, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """These options of one call, by the scheduler's own names, parsed; without those that say nothing.

        Raises:
            TypeError: if there is no such option, naming the nearest one.
            ValueError: if a value is not what its option takes.
        """

    @abstractmethod
    def submit(self, request: ArrayRequest) -> Sequence[str]:
        """Submit an array, whose job number n runs `job.run_job(request.seen_as, n, place)` on a node.

        Returns:
            The ids of the jobs, in their order.

        Raises:
            SubmissionRefusedError: if there is no such array, nor will be.
            SchedulerError: if nobody knows; `find` tells, sooner or later.
        """

    def preview(self, request: ArrayRequest) -> Handover | None:
        """What `submit` would hand over for this array. Nothing is written, and nothing is handed over.

        Returns:
            It, made as `submit` makes it; None if this scheduler does not tell.

        Raises:
            TypeError, ValueError, SchedulerError: as `submit`, if there can be no such array.
        """
        return None

    @abstractmethod
    def find(self, request: ArrayRequest) -> Sequence[Sequence[str]]:
        """The arrays of this request's name that the scheduler knows, whether or not their jobs have ended.

        Returns:
            For each array the ids of its jobs, in their order.

        Raises:
            SchedulerError: if there was no answer; that is not the same as none.
        """

    @abstractmethod
    def states(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        """Ask about all these jobs at once, by one command as long as none of them has ended.

        Args:
            jobs: the ids, each with the name of its array.

        Returns:
            A status per job; `LOST` for one that the scheduler does not know. Of one that is not among them
            nothing was said, this time.

        Raises:
            SchedulerError: if there was no answer. It says nothing about the jobs.
        """

    def explain(self, jobs: Mapping[str, str]) -> Mapping[str, JobStatus]:
        """Ask at length about jobs that have ended, or are lost, and have not said themselves how.

        Args:
            jobs: the ids, each with the name of its array.

        Returns:
            Those of which more can be said than `states` has: how they have ended, or that they have not.

        Raises:
            PartlyExplainedError: if some of the answers are still to come.
            SchedulerError: if there was no answer.
        """
        return {}

    @abstractmethod
    def cancel(self, jobs: Mapping[str, str]) -> None:
        """End these jobs, whether they wait or run. Jobs that have ended are no mistake, nor is none.

        Args:
            jobs: the ids, each with the name of its array.

        Raises:
            SchedulerError: if it could not be said.
        """

    def limits(self, *, queue: str | None = None, account: str | None = None) -> SiteLimits:
        """What the site allows, as far as it says: for people who set an executor up.

        Args:
            queue, account: of the jobs that it is asked for; None for the scheduler's defaults.
        """
        return SiteLimits()

    def reasons(self, jobs: Mapping[str, str]) -> Mapping[str, str]:
        """Why these jobs wait, where `states` does not say it: the scheduler's own words, by id.

        Args:
            jobs: the ids, each with the name of its array. Each of them may take a command.

        Raises:
            SchedulerError: if there was no answer.
        """
        return {}


@dataclass(frozen=True, slots=True)
class JobPlace:
    """Which job it is that runs here, as the scheduler has told it, and how it would tell that it is over.

    Attributes:
        id: the job's id, as `Scheduler.submit` returned it.
        node: the node's name, as the scheduler has it.
        ended_by: signals that the scheduler ends a job with.
        warned_by: signals that tell it that its time is nearly over.
        warned_at: when that is so, in seconds since the epoch, where the scheduler does not tell; None for
            never.
    """

    id: str
    node: str
    ended_by: frozenset[int] = frozenset({signal.SIGTERM})
    warned_by: frozenset[int] = frozenset({signal.SIGUSR2})
    warned_at: float | None = None
