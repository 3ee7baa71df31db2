"""The program that a job of a cluster runs: it does its share of an array's calls, and writes down how.

It claims its share first, so that of two jobs for the same one only one does anything; the same job,
started again, goes on with the calls that have not ended. Each call runs in a worker process of a local
executor's kind; its start is on record before it runs, its end before the next one starts.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Hashable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle

import fractal_runner
from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.batch.files import ArrayFiles, check_ours
from fractal_runner.executors.batch.payload import PYTHON, Payload, StoredCall
from fractal_runner.executors.batch.records import Kind, RecordLog, Tail
from fractal_runner.executors.batch.scheduler import JobPlace
from fractal_runner.executors.calls import Call, CallOptions
from fractal_runner.executors.local import child
from fractal_runner.executors.local.dispatcher import Budget, Dispatcher
from fractal_runner.executors.local.peers import KILLED_HINT
from fractal_runner.executors.local.pickling import dump
from fractal_runner.executors.local.workers import KeptForkWorker, Surroundings
from fractal_runner.filesystems import is_shared
from fractal_runner.worker import station
from fractal_runner.worker.memory import oom_kills
from fractal_runner.worker.processes import NODE_VARIABLE, host_name

OUT_OF_MEMORY = "OUT_OF_MEMORY"
DONE, DRAINED, STOPPED = "done", "time is nearly over", "stopped"

_LOOK_S, _LOOK_SHARED_S = 0.25, 2.0  # how often the job looks whether it is told something
_LARGEST_RESULT = 2**32 - 2**20  # what a record holds
_PAYLOAD_S = 30.0  # within which the payload has to be seen, over whatever network
_TERM_GRACE_S = 1.0
_SIGNALLED = 128  # a shell adds it to the signal that ended its child
_UNIT_RESULT = b"fractal_runner.worker.spec"  # what the pickle of a unit's result begins with
_ENDING_S = 10.0


def run_job(directory: str, number: int, place: JobPlace) -> None:
    """Do the share of job `number` of the array in `directory`.

    Args:
        directory: the array's, as this node sees it.
        number: which of the array's jobs this is.
        place: what the scheduler says of this job.

    Raises:
        NotOursError: if the directory, or something in it, is another user's.
        OSError: if what happens cannot be written down; then nothing more is done.
    """
    check_ours(directory)
    files = ArrayFiles(directory)
    is_restart = files.claimed_by(number) is not None
    if not files.claim_for(number, place.id, node=place.node, t=time.time()):
        print(f"Nothing to do for {place}: number {number} of {directory} is {files.claimed_by(number)}'s")
        return
    earlier = files.starts().get(number, 0)
    log = _open_log(files, number, 1 if is_restart else 0)
    try:
        log.write(Kind.JOB, id=place.id, node=place.node, host=host_name(), pid=os.getpid(), t=time.time())
        _Job(files, number, place, log, earlier).run()
    finally:
        log.close()


def _open_log(files: ArrayFiles, number: int, start: int) -> RecordLog:
    """The file for this start of the job: the first one is there, empty, and each start has its own."""
    path = files.records(number, start)
    while start > 0 or (os.path.exists(path) and os.path.getsize(path) > 0):
        start = max(start, 1)
        path = files.records(number, start)
        with suppress(FileExistsError):  # by the same job, which may still write where it was cut off
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            break
        start += 1
    return RecordLog(path, sync=is_shared(Path(path)))


class _JobCall(Call):
    """A call of the payload. Its future is the job's own: the executor's hears of it by the records."""

    __slots__ = ("stored",)

    def __init__(self, stored: StoredCall, cpus: int, attempt: int) -> None:
        options = CallOptions(
            name=stored.name, key=stored.key, cpus=cpus, timeout=stored.timeout, map_index=stored.map_index
        )
        super().__init__(len, (), {}, options=options, attempt=attempt)
        self.stored = stored


class _Job:
    """One job, from its claim to its end. The main thread owns all of it but the worker processes' slots."""

    def __init__(self, files: ArrayFiles, number: int, place: JobPlace, log: RecordLog, earlier: int) -> None:
        self._files = files
        self._number = number
        self._place = place
        self._log = log
        self._earlier = earlier
        self._control = Tail(files.control)
        self._listening = threading.Lock()  # guards the next two, and the file that they come from
        self._stopped: set[int] = set()
        self._all_stopped = False
        self._changed = threading.Event()
        self._calls: dict[int, _JobCall] = {}
        self._futures: dict[int, Future[Any]] = {}
        self.has_ended_some = self.has_left_some = False  # the workers set these two
        self._near_end = False  # of the job's time; the signal handlers set these two
        self._ended_by: int | None = None
        self._near_end_at = math.inf if place.warned_at is None else place.warned_at
        self.broken: BaseException | None = None  # why nothing can be written down any more
        self.payload: Payload

    def run(self) -> None:
        try:
            self.payload = self._find_payload()
            calls = self.payload.calls(self._number)
        except FileNotFoundError as error:
            self._log.write(Kind.CLOSE, why=f"the payload is missing: {error}")
            return
        except ExecutorError as error:
            self._log.write(Kind.CLOSE, why=f"the payload cannot be read: {error}")
            return
        if why := _differences(self.payload.header):
            self._log.write(Kind.REFUSE, why=why)
            return
        os.environ[NODE_VARIABLE] = self._place.node
        sys.path.extend(place for place in self.payload.header["search"] if place not in sys.path)
        for name, level in self.payload.header["levels"].items():
            logging.getLogger(name or None).setLevel(level)
        starts, done = self._earlier_records()
        terms = self.payload.terms
        station.serve_this_job(sum(stored.place not in done for stored in calls))
        with self._signals():
            dispatcher = Dispatcher(
                lambda _: _JobWorker(self, self._log),
                max_workers=terms.parallel,
                budget=Budget(cpus=terms.parallel * terms.cpus),
                places=None,
                idle_timeout=None,
                name=f"{self._files.name}-{self._number}",
            )
            for stored in calls:
                if stored.place not in done:
                    call = _JobCall(stored, terms.cpus, starts[stored.place] + 1)
                    self._calls[stored.place], self._futures[stored.place] = call, call.future
            for future in list(self._futures.values()):
                future.add_done_callback(lambda _: self._changed.set())
            self._heed(dispatcher)
            for call in list(self._calls.values()):
                if not call.future.done():
                    dispatcher.put(call)
            why = self._see_through(dispatcher)
            dispatcher.close(wait=self.broken is None)
            station.leave_this_job()
        if self.broken is not None:
            raise self.broken
        if self._ended_by is not None:
            sys.exit(128 + self._ended_by)  # without a last word: why, the scheduler knows
        self._log.write(Kind.CLOSE, why=why)

    def _see_through(self, dispatcher: Dispatcher) -> str:
        """Wait until all calls have ended; why no more are started."""
        why = DONE
        ending_at: float | None = None
        every_s = _LOOK_SHARED_S if is_shared(Path(self._files.control)) else _LOOK_S
        look_at = 0.0
        while any(not future.done() for future in self._futures.values()):
            self._changed.wait(_LOOK_S)
            self._changed.clear()
            self._settle()
            if self.broken is not None:
                why = STOPPED
                if ending_at is None:
                    ending_at = time.monotonic() + _ENDING_S
                    self._stop(dispatcher, list(self._futures))
                elif time.monotonic() > ending_at:
                    break
            elif self.terminating:
                # Whoever ends the job may have told this process alone, and wait for long before it kills.
                self._stop(dispatcher, list(self._futures))
            elif self.takes_no_more:
                why = DRAINED
                for future in self._futures.values():
                    future.cancel()  # those that have not started
            if time.monotonic() >= look_at:
                why = self._heed(dispatcher) or why
                look_at = time.monotonic() + every_s
        self._settle()
        return DRAINED if why == DONE and self.has_left_some else why

    @property
    def terminating(self) -> bool:
        """Whether the scheduler ends this job."""
        return self._ended_by is not None

    def may_have_ended(self, code: int) -> bool:
        """Whether what has left with this code may have got a signal by which the scheduler ends jobs."""
        return (code - _SIGNALLED if code > _SIGNALLED else -code) in self._place.ended_by

    @property
    def takes_no_more(self) -> bool:
        """Whether calls that have not started are left to other jobs.

        One call is done even if time is nearly over from the beginning: or it would never be.
        """
        near_end = self._near_end or time.time() >= self._near_end_at
        return self.broken is not None or self.terminating or (near_end and self.has_ended_some)

    def _settle(self) -> None:
        """Forget the calls that have ended."""
        for place in [place for place, future in self._futures.items() if future.done()]:
            del self._futures[place]
            self._calls.pop(place, None)

    def is_told_to_stop(self, place: int) -> bool:
        """Whether the executor has said that this call is not to be run, as of now. From any thread."""
        self._listen()
        return self._all_stopped or place in self._stopped

    def _listen(self) -> None:
        """Hear what the executor has said since the last look."""
        # Somebody may have removed the file: then there is nothing to be heard.
        with self._listening, suppress(FileNotFoundError):
            for record in self._control.read():
                if record.kind == Kind.STOP and record.fields["n"] == self._number:
                    chosen = record.fields.get("c")
                    self._all_stopped |= chosen is None
                    self._stopped.update(chosen or ())

    def _heed(self, dispatcher: Dispatcher) -> str:
        """Do what the executor has said; why nothing more is started, if it said so."""
        self._listen()
        if self._all_stopped:
            self._stop(dispatcher, list(self._futures))
            return STOPPED
        self._stop(dispatcher, [place for place in list(self._futures) if place in self._stopped])
        return ""

    def _stop(self, dispatcher: Dispatcher, places: list[int]) -> None:
        for place in places:
            call, future = self._calls.get(place), self._futures.get(place)
            if call is None or future is None or future.cancel():
                continue
            for _, slot in dispatcher.slots_of([call]):
                slot.worker.stop(call)

    def _earlier_records(self) -> tuple[Counter[int], set[int]]:
        """Of the earlier starts of this job: how often they started each call, and those that have ended."""
        starts: Counter[int] = Counter()
        done: set[int] = set()
        for start in range(self._earlier):
            with suppress(FileNotFoundError):
                for record in Tail(self._files.records(self._number, start)).read():
                    if record.kind == Kind.START:
                        starts[record.fields["c"]] += 1
                    elif record.kind in (Kind.END, Kind.FAIL):
                        done.add(record.fields["c"])
        return starts, done

    def _find_payload(self) -> Payload:
        deadline = time.monotonic() + _PAYLOAD_S
        while True:
            try:
                return Payload(self._files.payload)
            except FileNotFoundError:
                if time.monotonic() > deadline or not is_shared(Path(self._files.payload)):
                    raise
            time.sleep(1)  # it was there before the job was submitted: this node does not see it yet

    def _signals(self) -> _Signals:
        place = self._place
        return _Signals(
            {
                **dict.fromkeys(place.warned_by, self._on_near_end),
                **dict.fromkeys(place.ended_by, self._on_end),
            }
        )

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        """The scheduler ends this job; it knows why, and will tell."""
        self._ended_by = self._ended_by or number

    def _on_near_end(self, number: int, frame: FrameType | None) -> None:
        self._near_end = True


class _Signals:
    """Handlers of signals, as long as a `with` block lasts."""

    def __init__(self, handlers: dict[int, Any]) -> None:
        self._handlers = handlers
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number, handler in self._handlers.items():
            self._before[number] = signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _JobWorker(KeptForkWorker):
    """A worker process of a job: what its calls do is written down."""

    def __init__(self, job: _Job, log: RecordLog) -> None:
        super().__init__(Surroundings({}))
        self._job = job
        self._log = log
        self._call: Any = None
        self._kills: int | None = None

    def run(self, call: Call) -> None:
        assert isinstance(call, _JobCall)
        if self._job.takes_no_more:
            self._job.has_left_some = True
            call.succeed(None)  # not a word of it: it has not started
            return
        if self._job.is_told_to_stop(call.stored.place):
            call.succeed(None)
            return
        self._call = call
        self._kills = oom_kills()
        try:
            super().run(call)
        except OSError as error:  # of the log: what is not written down must not be done
            self._job.broken = error
            call.fail(error)
        finally:
            self._call = None

    def _announce(self, call: Call) -> None:
        self._write(Kind.START, pid=self.pid, t=time.time())

    def _dump(self, call: Call) -> bytes | memoryview:
        return dump(child.CALL, self._call.stored.bound(*child.about_call(call)))

    def _dump_context(self, call: Call) -> bytes:
        return self._job.payload.blob(self._call.stored.context)

    def _filter(self, call: Call) -> Hashable:
        stored: StoredCall = self._call.stored
        return stored.context

    def _record(self, pickled: memoryview) -> None:
        self._write(Kind.LOG, pickled)

    def _report(self, call: Call, message: memoryview) -> None:
        code = _failure_of(message)
        if code is not None and self._job.may_have_ended(code) and not self._job.terminating:
            time.sleep(_TERM_GRACE_S)  # whoever ends the job ends all of its processes, in any order
        if self._job.terminating and code is not None:
            call.succeed(None)  # what it had started may have been ended as well: the scheduler knows why
            return
        printed = call.future.output.encode()
        if (size := len(printed) + len(message)) > _LARGEST_RESULT:
            self._fail(
                call, ExecutorError(f"The result of {call.name!r} is too large to travel: {size} bytes")
            )
            return
        self._write(Kind.END, printed, message, out=len(printed), t=time.time())
        self._job.has_ended_some = True
        call.succeed(None)

    def _fail(self, call: Call, error: BaseException) -> None:
        code = getattr(error, "returncode", None)
        if code is not None and self._job.may_have_ended(code) and not self._job.terminating:
            time.sleep(_TERM_GRACE_S)  # whoever ends the job ends all of its processes, in any order
        if self._job.terminating or self._job.broken is not None:
            call.fail(error)
            return
        if code == -signal.SIGKILL and self._kills is not None and isinstance(error, JobExecutionError):
            error = _told_who_killed(error, oom=(oom_kills() or 0) > self._kills)
        printed = call.future.output.encode()
        self._write(Kind.FAIL, printed, cloudpickle.dumps(error), out=len(printed), t=time.time())
        self._job.has_ended_some = True
        call.fail(error)

    def _write(self, kind: Kind, *data: bytes | memoryview, **fields: Any) -> None:
        try:
            self._log.write(kind, *data, c=self._call.stored.place, **fields)
        except OSError as error:
            self._job.broken = error
            raise


def _failure_of(message: memoryview) -> int | None:
    """With which code a call has failed, itself or as a unit; None if it has not."""
    if message[:1] != child.RESULT:
        return 1
    if _UNIT_RESULT not in bytes(message[: len(_UNIT_RESULT) + 32]):
        return None
    try:
        result = pickle.loads(message[2:])
    except BaseException:  # unpickling runs the result's own code; whoever waits for it will see
        return None
    code = getattr(result, "returncode", None)
    return None if getattr(result, "succeeded", True) else 1 if code is None else code


def _told_who_killed(error: JobExecutionError, *, oom: bool) -> JobExecutionError:
    """The error of a worker process that was killed: here it is known whether it was for want of memory."""
    what = str(error).replace(KILLED_HINT, "")
    if not oom:
        return JobExecutionError(what, reason=error.reason, returncode=error.returncode)
    return JobExecutionError(
        f"{what} The kernel ended a process of this job for want of memory meanwhile: ask for more memory, "
        "or let fewer calls run at a time.",
        reason=OUT_OF_MEMORY,
        returncode=error.returncode,
    )


def _differences(header: dict[str, Any]) -> str:
    """In which versions this interpreter differs from the one that has pickled the calls."""
    here = f"Python {PYTHON} and fractal_runner {fractal_runner.__version__}"
    there = f"Python {header['python']} and fractal_runner {header['package']}"
    same_python = header["python"].split(".")[:2] == PYTHON.split(".")[:2]
    if same_python and header["package"] == fractal_runner.__version__:
        return ""
    return (
        f"the job runs {here} ({sys.executable} on {host_name()}), and was submitted by {there}: what one "
        "has pickled, the other may not be able to read. Its `python` says what the nodes run."
    )
