"""A probe: one small call through an executor, which says what it has found where it ran.

What it looks at is in `worker.probe`. Here it is sent, waited for, answered, and ended if it does not start;
what its findings mean is for whoever asks.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.adapters.daskpool.terms import CLUSTERS
from fractal_runner.executors.batch.base import BatchExecutor
from fractal_runner.executors.batch.scheduler import JobState, SchedulerError
from fractal_runner.executors.batch.verdicts import REFUSED
from fractal_runner.executors.registry import Executors
from fractal_runner.quantities import format_time, parse_time
from fractal_runner.worker import probe

ANSWER_S = 10.0  # for which the probe waits there, until what is written here is seen
_END_S = 120.0  # for which a probe that has started may take until its end is known here
_QUEUE_S = 60.0  # for which the scheduler may take to let go of a job
_LOOK_S = 0.1
_LOG_LINES = 20
_PATIENCE = "submission_timeout"
# Evaluated on the worker: any Python from 3.8 on knows `eval` by this name, and the probe as its text.
_EXPRESSION = "(exec(text, names := {'__name__': 'probe'}), names['look'](directory, patience_s))[1]"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a probe has found where it ran.

    Attributes:
        python, implementation, executable: the interpreter's version, "CPython", and its path.
        version, place: of the fractal_runner that it imports; "" if it cannot.
        import_problem: why it cannot.
        host, node: the host's own name, and the scheduler's name for it, if that is another one.
        pid, boot_id: of its process, and of the kernel that it runs on.
        cpus: how many it may use.
        directory_problem: why it does not see the directory; "" if it does.
        is_seen_here: whether what it has written there was seen here.
        is_answered: whether it has seen there what was then written here.
        ahead_s: by how many seconds its clock is ahead of ours, at least and at most; negative if behind.
        start_s: seconds from its submission until it was known to run, or had ended.
        seconds: from its submission to its result.
    """

    python: str
    implementation: str
    executable: str
    version: str
    place: str
    import_problem: str
    host: str
    node: str
    pid: int
    boot_id: str
    cpus: int
    directory_problem: str
    is_seen_here: bool
    is_answered: bool
    ahead_s: tuple[float, float]
    start_s: float
    seconds: float


class ProbeError(RuntimeError):
    """A probe has not come back.

    Attributes:
        words: what the scheduler, or a log, says of it; a line each.
        is_ended: whether nothing of it runs, or will.
        is_of_python: whether a job has refused it, as it runs another Python or fractal_runner.
    """

    def __init__(self, message: str, words: list[str] | None = None) -> None:
        super().__init__(message)
        self.words = words or []
        self.is_ended = True
        self.is_of_python = False


def send(executors: Executors, directory: Path, *, timeout: float, resources: Mapping[str, Any]) -> Seen:
    """Send a probe through the default executor of these, and wait for what it finds.

    Args:
        executors: those of a run.
        directory: the run's, which is there: the probe writes there, and is answered there.
        timeout: seconds within which it has to start.
        resources: what a unit needs that says nothing: see `Executors.submitter`.

    Raises:
        ProbeError: if it does not start in time, or does not end, or fails. It has been ended then, as far as
            the executor can end calls.
    """
    talk = _Talk(directory)
    try:
        sent, began = time.time(), time.monotonic()
        ended_at: list[float] = []
        future = _submitted(executors, directory, resources)
        future.add_done_callback(lambda _: ended_at.append(time.time()))
        try:
            started = _await(executors, future, timeout) - began
        except BaseException as error:  # a Ctrl-C as well: nothing of it is to be left
            if not future.cancel():
                executors.discard(future)
            if isinstance(error, ProbeError):
                error.is_ended = future.done()
            raise
        found = _result_of(future)
    finally:
        talk.end()
    return _seen(
        found,
        is_seen_here=talk.asked,
        moment=(talk.answered_at if found["sight"]["answered"] else sent, ended_at[0]),
        start_s=started,
        seconds=time.monotonic() - began,
    )


def cluster_of(executor: object) -> BatchExecutor | None:
    """The executor whose jobs a batch system runs: this one itself, or that of its workers; None if none."""
    if isinstance(executor, BatchExecutor):
        return executor
    found = getattr(executor, "jobs_of_workers", None)
    return found if isinstance(found, BatchExecutor) else None


def left_in_queue(executor: object) -> dict[str, str]:
    """The ids of jobs that the scheduler still has after a while, each with its words."""
    cluster = cluster_of(executor)
    return {} if cluster is None else cluster.wait_for_jobs(_QUEUE_S)


class _Talk:
    """The files by which a probe and we show each other that both see the directory.

    The thread that answers owns `asked` and `answered_at`; they are read after its end.
    """

    def __init__(self, directory: Path) -> None:
        self.asked = False
        self.answered_at = 0.0
        self._asked, self._answer = directory / "asked", directory / "answer"
        for file in (self._asked, self._answer):
            file.touch()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._respond, name="probe-answer", daemon=True)
        self._thread.start()

    def _respond(self) -> None:
        while not self._look():
            if self._over.wait(_LOOK_S):
                self._look()  # once more: its result may have been faster than the file system
                return

    def _look(self) -> bool:
        try:
            if not self._asked.read_bytes():
                return False
            self.answered_at = time.time()
            self._answer.write_text("answer\n")
        except OSError:  # of a file system that hangs or is full: that it did not answer is what is reported
            return False
        self.asked = True
        return True

    def end(self) -> None:
        self._over.set()
        self._thread.join(_END_S)


def _submitted(executors: Executors, directory: Path, resources: Mapping[str, Any]) -> Future[Any]:
    order = {"text": inspect.getsource(probe), "directory": str(directory), "patience_s": ANSWER_S}
    try:
        submitter = executors.submitter(None, **resources)
        return submitter.submit("probe", "probe", functools.partial(eval, _EXPRESSION), order)
    except Exception as error:  # of whatever executor
        raise ProbeError(f"the probe cannot be submitted: {type(error).__name__}: {error}") from error


def _await(executors: Executors, future: Future[Any], timeout: float) -> float:
    """Wait until the call has ended; when it was first seen to run."""
    deadline = time.monotonic() + timeout
    while not (future.running() or future.done()):
        if time.monotonic() > deadline:
            raise ProbeError(
                f"the probe has not started within {format_time(timeout)}", _reasons(executors.get())
            )
        wait([future], timeout=_LOOK_S)
    started = time.monotonic()
    # The executors of others are not ended by this wait: a running call of theirs is left to them.
    if wait([future], timeout=ANSWER_S + _END_S).not_done:
        raise ProbeError(
            f"the probe has started, and its result has not come within {format_time(ANSWER_S + _END_S)}",
            _reasons(executors.get()),
        )
    return started


def _result_of(future: Future[Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = future.result(timeout=0)
    except JobExecutionError as error:
        told = ProbeError(str(error), _end_of_log(error))
        # What the scheduler refuses has that reason, too, and is no job.
        told.is_of_python = error.reason == REFUSED and error.job_id is not None
        raise told from error
    except Exception as error:  # of whatever executor
        raise ProbeError(f"{type(error).__name__}: {error}") from error
    return found


def _end_of_log(error: JobExecutionError) -> list[str]:
    for name in (error.stderr_file, error.stdout_file):
        if name is not None and name not in str(error):  # where it is named, its end stands there as well
            try:
                lines = Path(name).read_text(errors="replace").strip().splitlines()
            except OSError as problem:
                return [f"its log, {name}, cannot be read: {problem.strerror}"]
            if lines:
                return [f"its log, {name}, ends:", *lines[-_LOG_LINES:]]
    return []


def _reasons(executor: object) -> list[str]:
    """What the scheduler says of the jobs that there are."""
    cluster = cluster_of(executor)
    if cluster is None:
        return []
    scheduler = cluster.scheduler
    try:
        jobs = cluster.jobs()
        states = scheduler.states(jobs)
        reasons = scheduler.reasons({job: name for job, name in jobs.items() if job in states})
    except SchedulerError as error:
        return [str(error)]
    words = [
        f"job {job}: {status.detail or status.state.name}" + (f": {reasons[job]}" if job in reasons else "")
        for job, status in states.items()
        if status.state is not JobState.ENDED
    ]
    return words or [f"{scheduler.name} has no job of it: nothing was submitted, or it has gone"]


def patient(arguments: Mapping[str, Any], taken: Collection[str], timeout: float) -> dict[str, Any]:
    """What an executor is given in addition, to be done with a scheduler that does not answer in time.

    A run waits for long until it gives up a submission; a probe shall know by then what the scheduler says.

    Args:
        arguments: what the configuration says.
        taken: the names of what its constructor takes.
        timeout: of the probe, in seconds.
    """
    given: dict[str, Any] = {}
    if _PATIENCE in taken:
        given[_PATIENCE] = _least(arguments, timeout)
    pool = arguments.get("pool")
    if isinstance(pool, Mapping) and (name := pool.get("workers")) in CLUSTERS:
        jobs = pool.get(name) or {}
        given["pool"] = {**pool, name: {**jobs, _PATIENCE: _least(jobs, timeout)}}
    return given


def _least(arguments: Mapping[str, Any], timeout: float) -> float:
    return min(parse_time(arguments.get(_PATIENCE) or timeout), timeout / 2)


def _seen(
    found: Mapping[str, Any],
    *,
    is_seen_here: bool,
    moment: tuple[float, float],
    start_s: float,
    seconds: float,
) -> Seen:
    """The findings; `moment` is between which times its clock was read, by ours."""
    after, before = moment
    package, sight = found["package"], found["sight"]
    return Seen(
        python=found["python"],
        implementation=found["implementation"],
        executable=found["executable"],
        version=package["version"],
        place=package.get("place", ""),
        import_problem=package.get("problem", ""),
        host=found["host"],
        node=found["node"],
        pid=found["pid"],
        boot_id=found["boot_id"],
        cpus=found["cpus"],
        directory_problem=sight["problem"],
        is_seen_here=is_seen_here,
        is_answered=sight["answered"],
        ahead_s=(found["clock"] - before, found["clock"] - after),
        start_s=start_s,
        seconds=seconds,
    )
