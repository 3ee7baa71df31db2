"""What the executor knows of its calls and of the jobs that they are in. The manager's thread owns it all."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fractal_runner.executors.batch.files import ArrayFiles
from fractal_runner.executors.batch.payload import PackedCall, Terms
from fractal_runner.executors.batch.records import Record, Tail
from fractal_runner.executors.batch.scheduler import ArrayRequest, JobState, JobStatus
from fractal_runner.executors.calls import Call

LOG_TAIL_BYTES = 4096
_REMEMBERED_JOBS = 10_000
_logger = logging.getLogger("fractal_runner")


class Item:
    """A call on its way: in no job yet, or at a place in one.

    Attributes:
        call, future: it, and its future, which the call itself lets go of.
        packed: it as it travels.
        terms: what its job has to offer; items of equal `group` may share one.
        job, place: where it is.
        starts: how many starts of its job there had been when it started; 0 if it has not.
        pid: the process that runs it.
        stopping: whether its job has been told to end it.
        logged: up to where, and in which start of the job, its log records have been taken.
    """

    __slots__ = (
        *("__weakref__", "call", "future", "group", "job", "logged", "packed", "pid", "place", "starts"),
        *("stopping", "terms", "tries"),
    )

    def __init__(self, call: Call, packed: PackedCall, terms: Terms, group: str) -> None:
        self.call = call
        self.future: Future[Any] = call.future
        self.packed = packed
        self.terms = terms
        self.group = group
        self.tries = packed.tries
        self.job: Job | None = None
        self.place = 0
        self.starts = 0
        self.pid: int | None = None
        self.stopping = False
        self.logged = (0, 0)

    def fail(self, error: BaseException) -> None:
        """End the call with an error."""
        with self.ending():
            self.call.fail(error)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around what ends the call: what its callbacks raise is theirs, and others are still to be ended.

        The standard library logs an Exception of theirs, and lets a SystemExit pass.
        """
        try:
            yield
        except (
            BaseException
        ):  # a SystemExit of somebody's callback, too: it is the manager's thread that runs it
            _logger.exception("at the end of the call %r", self.call.name)

    def travelling(self) -> PackedCall:
        """It as it travels, this time."""
        return self.packed if self.tries == self.packed.tries else replace(self.packed, tries=self.tries)


class Array:
    """Jobs that were, or are being, submitted together.

    Attributes:
        files: theirs.
        request: what the scheduler was asked for.
        jobs: by number.
        lost_since: since when nobody knows whether it was submitted; None if that is known.
        tries: how many times it has been looked for since.
    """

    __slots__ = ("files", "jobs", "lost_since", "request", "terms", "tries", "why_lost")

    def __init__(self, files: ArrayFiles, request: ArrayRequest, terms: Terms) -> None:
        self.files = files
        self.request = request
        self.terms = terms
        self.jobs: list[Job] = []
        self.lost_since: float | None = None
        self.why_lost = ""
        self.tries = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class Job:
    """A job, and what has been heard of it. Times are of the monotonic clock.

    Attributes:
        array, number: which one it is.
        id: the scheduler's; None until that is known.
        items: its calls by place; those that nobody waits for are not there.
        size: how many calls it has, whether or not somebody waits for them.
        tails: its files of records, one per start.
        status: the scheduler's last word.
        node: where it runs, as itself has told.
        unreadable: why its files could not be read the last time; "" if they could.
        closed: why it starts nothing more, as itself has told; None if it has not.
        refused: why it did none of its calls; None if it did not refuse.
        lost_since: since when the scheduler has not known it.
        settle_at: when what is not known by then has to do; None as long as it is under way.
        waiting_since: since when it has waited for something that will not come.
        stop_by: when it is cancelled if it has not ended, having nothing left to do.
        cancelled: whether it was cancelled by us.
        is_claimed: whether it is known to have begun, though it has not said anything.
        undecided_since: since when it is over and nobody can find out what it has done.
        unexplained_since: since when the scheduler is asked why it has ended.
        is_explained: whether that is known, or nobody can tell.
        progressed: whether calls have ended in it.
        unwatched: how many of its calls nobody here waits for; somebody else may.
        places: how many calls it runs at a time.
    """

    array: Array
    number: int
    items: dict[int, Item]
    size: int
    places: int
    id: str | None = None
    tails: list[Tail] = field(default_factory=list)
    status: JobStatus | None = None
    node: str | None = None
    unreadable: str = ""
    closed: str | None = None
    refused: str | None = None
    lost_since: float | None = None
    settle_at: float | None = None
    waiting_since: float | None = None
    stop_by: float | None = None
    cancelled: bool = False
    is_claimed: bool = False
    undecided_since: float | None = None
    unexplained_since: float | None = None
    is_explained: bool = False
    progressed: bool = False
    unwatched: int = 0

    def __post_init__(self) -> None:
        self.tails.append(Tail(self.array.files.records(self.number)))

    @property
    def is_over(self) -> bool:
        """Whether the scheduler says that it has ended, or has forgotten it."""
        return self.settle_at is not None

    @property
    def has_started(self) -> bool:
        """Whether it has said anything."""
        return self.node is not None

    @property
    def was_waiting(self) -> bool:
        """Whether the last that was heard of it is that it waits for its turn."""
        return not self.has_started and self.status is not None and self.status.state is JobState.QUEUED

    @property
    def damage(self) -> str:
        """What is wrong with its files, if anything is."""
        return "; ".join(filter(None, (self.unreadable, *(tail.damage for tail in self.tails))))

    @property
    def log(self) -> str:
        return self.array.files.log(self.number)

    def follow_on(self) -> None:
        """Take it for one that is under way, whatever was thought of it."""
        self.settle_at = self.lost_since = self.undecided_since = self.unexplained_since = None
        self.is_explained = False

    def add_starts(self, count: int) -> None:
        """There are files of so many starts."""
        while len(self.tails) < count:
            self.tails.append(Tail(self.array.files.records(self.number, len(self.tails))))

    def rewind(self) -> None:
        """Hear everything once more."""
        for tail in self.tails:
            tail.rewind()

    def news(self, final: bool = False) -> Iterator[tuple[int, Record]]:
        """What it has written since the last time, and in which of its starts (counted from 1)."""
        for start, tail in enumerate(self.tails, 1):
            with suppress(FileNotFoundError):  # somebody has removed it: there is no news
                for record in tail.read(final=final):
                    yield start, record

    def log_tail(self) -> str:
        """The end of what it has printed; "" if that cannot be read."""
        try:
            with open(self.log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - LOG_TAIL_BYTES))
                text = file.read().decode(errors="replace").strip()
        except OSError:
            return ""
        return text if size <= LOG_TAIL_BYTES else f"[…] {text.partition(chr(10))[2]}"

    @property
    def says(self) -> str:
        """Who it is, in words."""
        node = self.node or (self.status and self.status.node)
        return f"job {self.id}" + (f" on {node}" if node else "")


class Roster:
    """The jobs that are followed: from the moment at which they are about to be submitted.

    Attributes:
        jobs: they, in order.
        places: how many calls they run at a time, together.
        running: calls that are known to run, by id; for whoever looks, from any thread.
        names: of all arrays that were made here.
        submitted: the ids of the jobs that were submitted last, each with the name of its array; likewise.
    """

    def __init__(self) -> None:
        self.jobs: dict[Job, None] = {}
        self.places = 0
        self.running: dict[int, Item] = {}
        self.names: set[str] = set()
        self.submitted: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED_JOBS)

    def add(self, job: Job) -> None:
        if job not in self.jobs:
            self.jobs[job] = None
            self.places += job.places

    def drop(self, job: Job) -> list[Item]:
        """Follow a job no more; those of its calls that have not ended."""
        if job in self.jobs:
            del self.jobs[job]
            self.places -= job.places
        items = list(job.items.values())
        job.items.clear()
        for item in items:
            item.job = None
        return [item for item in items if not item.future.done()]

    @property
    def has_queued_work(self) -> bool:
        """Whether jobs have so much to do that there is no hurry to submit more."""
        return any(len(job.items) > 2 * job.places for job in self.jobs)
