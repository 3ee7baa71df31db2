"""Calls on their way to a pool's workers, and what each of them becomes."""

from __future__ import annotations

import pickle

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local.reports import report_end

NOT_STARTED_LIMIT = 3  # so many workers may be lost in succession before they have started a call


class Item:
    """A call, as the crew has it. It belongs to the loop's thread.

    Attributes:
        call: itself; what it was given has travelled into `data`.
        id, name: its own.
        data: its function and arguments, pickled.
        context: the number of what it sees of the context.
        retries: how often it may run again after something has happened to it.
        attempt: which start of it this is, from 1.
        not_started: how many workers were lost that it was sent to, before they had started it.
        avoids: workers on which something has happened to it.
        begun: whether it has ever started.
        started: whether it has started where it is now.
        stopped: whether somebody wants it to end.
        host, pid: where it runs.
    """

    __slots__ = (
        *("attempt", "avoids", "begun", "call", "context", "data", "host", "id", "name", "not_started"),
        *("pid", "retries", "started", "stopped", "worker"),
    )

    def __init__(self, call: Call, data: bytes, context: int, retries: int) -> None:
        self.call = call
        self.id = call.id
        self.name = call.name
        self.data = data
        self.context = context
        self.retries = retries
        self.attempt = 1
        self.not_started = 0
        self.avoids: frozenset[str] = frozenset()
        self.begun = self.started = self.stopped = False
        self.worker: str | None = None
        self.host: str | None = None
        self.pid: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether its future has ended, whatever it does."""
        return self.call.future.done()

    def begin(self) -> bool:
        """It has started; False if nobody wants it to run any more."""
        self.started = True
        if self.begun:
            return not self.is_over
        self.begun = self.call.begin()
        return self.begun

    def again(self, worker: str) -> bool:
        """Whether it is to run once more, after something has happened to it there."""
        if self.stopped or self.is_over or self.retries < 1:
            return False
        self.retries -= 1
        self.attempt += 1
        self.avoids |= {worker}
        return True


def end(call: Call, message: bytes, output: str) -> None:
    """End a call as its worker has reported."""
    if not (future := call.future).done():  # else it was cancelled, and what it was given is let go of
        future.output = output
        report_end(call, memoryview(message))


def fail_as_told(call: Call, pickled: bytes, output: str) -> None:
    """End a call with an error that its worker has sent."""
    if (future := call.future).done():
        return
    future.output = output
    try:
        error = pickle.loads(pickled)
    except BaseException as problem:  # it may be of any type, and unpickling runs its own code
        error = ExecutorError(f"How {call.name!r} has ended cannot be unpickled: {problem}")
    call.fail(error)


def lost_error(
    item: Item, worker: str, text: str, returncode: int | None, reason: str | None
) -> JobExecutionError:
    """The error of a call whose worker has ended with it."""
    if item.stopped:
        return stopped_error(item.call)
    where = f" on {item.host}" if item.host else ""
    return JobExecutionError(
        f"The worker {worker}{where} {text}, while it ran {item.name!r}.",
        reason=reason,
        returncode=returncode,
    )


def never_started_error(item: Item, worker: str) -> JobExecutionError:
    """The error of a call that worker after worker was lost with."""
    return JobExecutionError(
        f"The call {item.name!r} was sent to {item.not_started} workers, the last one {worker}, and each was "
        "lost before it had started the call.",
        reason="LOST",
    )
