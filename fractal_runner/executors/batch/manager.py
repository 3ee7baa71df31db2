"""The thread that sees a batch executor's calls through.

It owns all that changes. Other threads leave notes for it and ring its bell; what takes its time at a
scheduler is done by its errands, which leave their answers as notes as well, so that a scheduler that hangs
keeps no result from arriving. What there is to do is elsewhere: `submitting`, `following`, `stopping`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fractal_runner.executors.batch.errands import Errands, Note
from fractal_runner.executors.batch.following import Following
from fractal_runner.executors.batch.jobs import Array, Item, Job, Roster
from fractal_runner.executors.batch.packing import Packing
from fractal_runner.executors.batch.scheduler import Scheduler
from fractal_runner.executors.batch.shares import Limits
from fractal_runner.executors.batch.stopping import Stopping
from fractal_runner.executors.batch.submitting import Submitting
from fractal_runner.filesystems import is_shared

_GRACE_S, _GRACE_SHARED_S = 1.0, 10.0
_LEAVE_S = 1.0
_logger = logging.getLogger("fractal_runner")


class Manager:
    """See the module.

    Args:
        scheduler: the batch system.
        folder: where arrays have their directories.
        seen_as: a path, as the nodes see it.
        packing: how calls go into jobs.
        limits: see there.
        name: the executor's.
        clock: seconds, which never go back.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        folder: Path,
        *,
        seen_as: Callable[[str], str],
        packing: Packing,
        limits: Limits,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._clock = clock
        self._notes: deque[Note] = deque()  # left by anybody
        self._bell = threading.Event()
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards the thread's beginning and end
        self._thread: threading.Thread | None = None
        self._closed = False
        # What follows belongs to the thread.
        sync = is_shared(folder / "any")
        self._roster = roster = Roster()
        self._errands = errands = Errands(name, self.note)
        self._submitting = Submitting(
            scheduler,
            folder,
            seen_as=seen_as,
            packing=packing,
            limits=limits,
            roster=roster,
            errands=errands,
            on_submitted=self._submitted,
            on_void=lambda job: self._following.give_back(job),  # noqa: PLW0108  made below
            name=name,
            clock=clock,
        )
        self._stopping = Stopping(
            scheduler,
            roster=roster,
            errands=errands,
            on_dropped=self._submitting.there_is_room,
            sync=sync,
            name=name,
            clock=clock,
        )
        grace = _GRACE_SHARED_S if sync else _GRACE_S
        self._following = Following(
            scheduler,
            roster=roster,
            errands=errands,
            again=self._submitting.again,
            cancel=self._stopping.cancel,
            withdraw=self._stopping.withdraw,
            on_dropped=self._submitting.there_is_room,
            poll_interval=limits.poll_interval,
            pending_timeout=limits.pending_timeout,
            grace=grace if limits.grace is None else limits.grace,
            name=name,
            clock=clock,
        )
        self._steps = (
            self._do_notes,
            self._submitting.gather,
            self._following.listen,
            self._following.settle,
            self._stopping.say,
            self._submitting.look_for,
            self._following.poll,
        )

    # From any thread

    @property
    def polls(self) -> int:
        """How often the scheduler was asked about jobs."""
        return self._following.polls

    def running(self, call_id: int) -> Item | None:
        """A call that is known to run."""
        return self._roster.running.get(call_id)

    def recent_jobs(self) -> dict[str, str]:
        """The ids of the jobs that were submitted last, each with the name of its array."""
        return dict(list(self._roster.submitted))

    def is_own(self, name: str) -> bool:
        """Whether an array is of this manager's making."""
        return name in self._roster.names

    def put(self, item: Item) -> None:
        """Take a call."""
        item.future.add_done_callback(_Ended(self, item))
        self._submitting.incoming.append(item)
        if self._thread is None or self._closed:  # it may be about to end, having seen nothing of this one
            self._begin()
        if not self._submitting.is_gathering:  # else it looks for more by itself
            self._bell.set()

    def take_on(self, item: Item, job: Job) -> None:
        """Follow a call of a job that an earlier process has submitted."""
        item.future.add_done_callback(_Ended(self, item))
        self.note(lambda: self._following.take_on(item, job))

    def stop(self, items: Sequence[Item]) -> None:
        """End calls that run."""
        self.note(lambda: self._stopping.stop(items))

    def ended(self, call_id: int) -> None:
        """A call has ended."""
        self._roster.running.pop(call_id, None)

    def cancelled(self, item: Item) -> None:
        """A call was cancelled before it was known to have started."""
        self.note(lambda: self._stopping.cancelled(item))

    def note(self, note: Note) -> None:
        """Have something done by the thread."""
        self._notes.append(note)
        self._begin()
        self._bell.set()

    def close(self, wait: bool) -> bool:
        """End the thread once there is nothing left to do; whether there was one to wait for."""
        if os.getpid() != self._pid:
            return False  # a forked child's copy: its lock may be held, and nobody lets go of it
        with self._lock:
            self._closed = True
            thread = self._thread
        self._bell.set()
        if thread is None or thread is threading.current_thread():
            return False
        while wait and thread.is_alive():
            thread.join(0.5)  # in turns: a Ctrl-C does not wake a thread that just goes to sleep
        return True

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"{self._name}-manager", daemon=True)
                thread.start()
                self._thread = thread

    # In the thread

    def _run(self) -> None:
        while True:
            for step in self._steps:
                self._safely(step)
            with self._lock:
                if self._closed and self._is_idle():
                    threads = self._errands.release()
                    self._thread = None  # should another call come, there will be another thread
                    break
            self._bell.wait(self._sleep_s())
            self._bell.clear()
        for thread in threads:
            thread.join(_LEAVE_S)  # one may ask a scheduler that does not answer, which nobody waits for

    def _do_notes(self) -> None:
        while self._notes:
            self._safely(self._notes.popleft())

    def _safely(self, step: Note) -> None:
        try:
            step()
        except BaseException:  # whatever it is
            # A defect of ours, or a SystemExit that somebody's code raises while it is unpickled, must not
            # keep all the other calls from ending.
            _logger.exception("%s: %s failed", self._name, getattr(step, "__qualname__", step))
            time.sleep(0.1)  # it may be so again at once, and then the log is not to be flooded

    def _is_idle(self) -> bool:
        """Whether nothing is left to be done, but for jobs that end by themselves."""
        if self._notes or not (self._submitting.is_idle and self._stopping.is_idle and self._errands.is_idle):
            return False
        return not any(job.items or job.stop_by is not None for job in self._roster.jobs)

    def _sleep_s(self) -> float | None:
        """How long there is nothing to do; None for as long as nobody rings."""
        due = min(self._submitting.due(), self._following.due(), self._stopping.due())
        if self._notes or (self._submitting.incoming and not self._submitting.is_gathering):
            return 0.0
        return None if due == math.inf else max(0.0, due - self._clock())

    def _submitted(self, array: Array) -> None:
        self._roster.submitted.extend(
            (job.id, array.request.name) for job in array.jobs if job.id is not None
        )
        self._stopping.submitted(array)
        self._following.hasten()


class _Ended:
    """Tells the manager that a call has ended, in whatever way."""

    __slots__ = ("_id", "_item", "_manager")

    def __init__(self, manager: Manager, item: Item) -> None:
        self._manager = manager
        self._item: Item | None = item
        self._id = item.call.id

    def __call__(self, future: Future[Any]) -> None:
        item, self._item = self._item, None  # the future keeps this, and not what was given to the call
        self._manager.ended(self._id)
        if item is not None and future.cancelled():
            self._manager.cancelled(item)
