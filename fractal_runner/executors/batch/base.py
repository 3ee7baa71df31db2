"""The executor of a batch system: calls are packed into jobs, and followed to their ends.

A batch system is a `Scheduler`; there is nothing here about any of them in particular. The manager's thread
does the work; this is what callers see.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, ClassVar, TypedDict, get_type_hints

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.base import Executor, View, info_of
from fractal_runner.executors.batch.adoption import Adoption
from fractal_runner.executors.batch.commands import parse_words
from fractal_runner.executors.batch.files import make_folder
from fractal_runner.executors.batch.jobs import Item
from fractal_runner.executors.batch.manager import Manager
from fractal_runner.executors.batch.packing import Packing
from fractal_runner.executors.batch.payload import PackedCall, StoredCall, Terms
from fractal_runner.executors.batch.previewing import previews
from fractal_runner.executors.batch.scheduler import JobState, Scheduler, SchedulerError
from fractal_runner.executors.batch.shares import Limits
from fractal_runner.executors.calls import Call, CallOptions, TaskInfo
from fractal_runner.executors.leaving import close_when_gone, wait_at_exit
from fractal_runner.executors.local.pickling import dump
from fractal_runner.executors.local.reports import dump_call
from fractal_runner.executors.local.workers import dump_context
from fractal_runner.executors.preview import Preview, Previewer
from fractal_runner.quantities import argument, optional, parse_count, parse_size, parse_time

MAX_JOBS = 1000
_ASK_EVERY_S = 0.5
PACKING_OPTIONS = frozenset({"tasks_per_job", "parallel_tasks_per_job"})


class BatchOptions(TypedDict, total=False):
    """What all batch executors take, whatever their schedulers' words are; see `BatchExecutor`."""

    max_workers: int | None
    calls_per_job: int | None
    parallel_calls_per_job: int | None
    target_jobs: int | None
    target_cpus_per_job: int | None
    max_cpus_per_job: int | None
    target_memory_per_job: int | float | str | None
    max_memory_per_job: int | float | str | None
    max_jobs: int | None
    max_time: int | float | str | None
    poll_interval: int | float | str
    pending_timeout: int | float | str | None
    grace: int | float | str | None
    submission_timeout: int | float | str
    path_map: Mapping[str, str] | None
    name: str | None
    context: Mapping[str, Any] | None


class BatchExecutor(Executor):
    """Runs calls in the jobs of a batch system, which outlive this process.

    Calls are gathered for a moment, packed into jobs with those that need the same, and submitted as
    arrays. Each job writes down what starts and what ends; its records decide what became of a call, and
    the scheduler is asked about jobs that end without. Functions, arguments and results travel by pickle,
    through `folder`.

    Args:
        scheduler: the batch system.
        folder: where all of that is written: on a file system that the nodes share. It is made with mode
            0700 if need be, and must be this user's own.
        max_workers: how many calls run at a time, over all jobs; by default, as many as the jobs hold.
        cpus, memory, gpus, time, queue, account: what a call needs that does not say; see `CallOptions`.
        calls_per_job, parallel_calls_per_job, target_jobs, target_cpus_per_job, max_cpus_per_job,
            target_memory_per_job, max_memory_per_job: how calls go into jobs; see `Packing`.
        max_jobs: how many jobs wait or run at a time.
        max_array: how many jobs an array may have; by default, as many as the scheduler takes.
        max_time: no job asks for more time than this.
        poll_interval: seconds between two questions to the scheduler when nothing changes; between them
            it is one second at least.
        pending_timeout: seconds for which a job may wait for something that will not come of itself; None
            to let it wait.
        grace: seconds after a job's end within which its last records must be seen; by default 1, or 10 on
            a file system over the network.
        submission_timeout: seconds within which a submission has to succeed whose scheduler does not answer.
        path_map: from paths, as seen here, to the same as the nodes see them.
        name: what it is called in logs.
        context: a mapping that calls read with `current_context()`: a copy, as of each call's submission.

    Raises:
        ValueError: if an argument is not what it should be.
        NotOursError: if the folder belongs to somebody else.
        OSError: if it cannot be made.
    """

    isolates = True
    kills = True
    is_remote = True
    packs = True
    # Arguments of others, each with what it is called here.
    other_words: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        scheduler: Scheduler,
        folder: str | os.PathLike[str],
        *,
        max_workers: int | None = None,
        cpus: int | None = None,
        memory: int | float | str | None = None,
        gpus: int | None = None,
        time: int | float | str | None = None,
        queue: str | None = None,
        account: str | None = None,
        calls_per_job: int | None = None,
        parallel_calls_per_job: int | None = None,
        target_jobs: int | None = None,
        target_cpus_per_job: int | None = None,
        max_cpus_per_job: int | None = None,
        target_memory_per_job: int | float | str | None = None,
        max_memory_per_job: int | float | str | None = None,
        max_jobs: int | None = None,
        max_array: int | None = None,
        max_time: int | float | str | None = None,
        poll_interval: int | float | str = 10.0,
        pending_timeout: int | float | str | None = None,
        grace: int | float | str | None = None,
        submission_timeout: int | float | str = 900.0,
        path_map: Mapping[str, str] | None = None,
        name: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        jobs = optional("max_jobs", parse_count, max_jobs) or MAX_JOBS
        at_a_time = jobs * (parallel_calls_per_job or 1) if max_workers is None else max_workers
        super().__init__(max_workers=at_a_time, name=name, context=context)
        chosen = {"cpus": cpus, "gpus": gpus, "time": time, "queue": queue, "account": account}
        if memory is not None:
            chosen["memory"] = f"{argument('memory', parse_size, memory)}B"
        self._options = self._options.replaced(**{n: v for n, v in chosen.items() if v is not None})
        self._packing = Packing.of(
            calls_per_job=calls_per_job,
            parallel_calls_per_job=parallel_calls_per_job,
            target_jobs=target_jobs,
            max_jobs=max_jobs,
            target_cpus_per_job=target_cpus_per_job,
            max_cpus_per_job=max_cpus_per_job,
            target_memory_per_job=target_memory_per_job,
            max_memory_per_job=max_memory_per_job,
        )
        self._limits = limits = Limits(
            max_workers=sys.maxsize if max_workers is None else self.max_workers,
            max_jobs=jobs,
            max_array=optional("max_array", parse_count, max_array),
            max_time=optional("max_time", parse_time, max_time),
            poll_interval=argument("poll_interval", parse_time, poll_interval),
            pending_timeout=optional("pending_timeout", parse_time, pending_timeout),
            grace=optional("grace", parse_time, grace),
            submission_timeout=argument("submission_timeout", parse_time, submission_timeout),
        )
        self.scheduler = scheduler
        # Not a method of this object: the manager, which has it, must not keep this object from being let go.
        self.seen_as = partial(_seen_as, {str(Path(a)): str(b) for a, b in (path_map or {}).items()})
        self.folder = Path(folder).expanduser().absolute()  # made when something is put there
        self._manager = Manager(
            scheduler,
            self.folder,
            seen_as=self.seen_as,
            packing=self._packing,
            limits=limits,
            name=self.name,
        )
        terms = self._terms_of(self._options)
        self._last_terms = self._options, terms, terms.group  # replaced as a whole, by any thread
        self._functions, self._contexts = _Repeated(), _Repeated()
        self._attaching = threading.Lock()  # guards the next two
        self._adoption: Adoption | None = None
        self._attached: weakref.WeakValueDictionary[str, Future[Any]] = weakref.WeakValueDictionary()
        wait_at_exit(self._manager)
        close_when_gone(self, self._manager)

    @classmethod
    def unusable(cls, options: Mapping[str, Any]) -> str | None:
        prefix = parse_words("command_prefix", options.get("command_prefix") or ())
        # Behind a prefix the commands are somewhere else, and this machine needs only what leads there.
        words = [prefix[0]] if prefix else cls._programs(options)
        missing = [word for word in words if shutil.which(word) is None]
        if not missing:
            return None
        advice = "" if prefix else ": take a login node, or say by command_prefix how to reach one"
        return f"no {missing[0]} on PATH{advice}"

    @classmethod
    def _programs(cls, options: Mapping[str, Any]) -> Sequence[str]:
        """The scheduler's commands that have to be there, given the arguments of the constructor."""
        return ()

    @classmethod
    def _check_words(cls, options: Mapping[str, Any]) -> None:
        """Whether these are all arguments that batch executors take, whatever their schedulers are called.

        Raises:
            TypeError: if one is not, naming what it may have been meant for.
        """
        for name in options.keys() - get_type_hints(BatchOptions):
            hint = f"it is `{said}`" if (said := cls.other_words.get(name)) else "see its documentation"
            raise TypeError(f"{cls.__name__} has no argument {name!r}: {hint}")

    @classmethod
    def previewer(cls, arguments: Mapping[str, Any]) -> Previewer:
        return cls(**arguments).preview  # making one writes nothing, and asks nobody anything

    def preview(self, count: int, wanted: Mapping[str, Any]) -> Preview:
        """What would be submitted of calls that come together, when no job waits or runs yet.

        Args:
            count: how many calls.
            wanted: the options that each of them asks for.

        Raises:
            TypeError, ValueError, SchedulerError: if it could not be submitted.
        """
        view, reduced = self.fitting(**wanted)
        options = view._options
        arrays = previews(
            count,
            self._terms_of(options),
            scheduler=self.scheduler,
            folder=self.folder,
            seen_as=self.seen_as,
            packing=self._packing,
            limits=self._limits,
        )
        return Preview(
            calls=count,
            slots=sum(array.jobs * array.calls_at_a_time for array in arrays),
            cpus=options.cpus,
            memory=options.memory,
            gpus=options.gpus,
            arrays=tuple(arrays),
            waiting=count - sum(array.calls for array in arrays),
            reduced=tuple(reduced),
        )

    def attach(self, key: str) -> Future[Any] | None:
        """The call that an earlier process submitted under this `key` to this folder, if there is one.

        One process at a time may use a folder so.

        Raises:
            JobExecutionError: if nobody can say whether there is, as the scheduler does not answer.
            NotOursError: if something in the folder belongs to somebody else.
        """
        with self._attaching:
            known = self._attached.get(key)
            if known is not None:
                return known
            if self._adoption is None:
                make_folder(self.folder)
                self._adoption = Adoption(
                    self.folder, self.scheduler, seen_as=self.seen_as, own=self._manager.is_own
                )
            found = self._adoption.find(key)
            if found is None:
                return None
            job, stored = found
            call = self._call_of(stored)
            if not self._calls.add(call):
                raise RuntimeError(f"cannot attach to futures after shutdown of {self.name}")
            terms = stored.payload.terms
            item = Item(call, stored.packed(), terms, terms.group)
            item.place = stored.place
            self._attached[key] = item.future
            future = item.future
            self._manager.take_on(item, job)
            return future

    @property
    def limits(self) -> Limits:
        """What bounds it."""
        return self._limits

    def jobs(self) -> dict[str, str]:
        """The ids of the jobs that were submitted last, each with the name of its array."""
        return self._manager.recent_jobs()

    def wait_for_jobs(self, seconds: float) -> dict[str, str]:
        """Wait until the scheduler has no jobs of this executor any more: a job takes a moment to end.

        Args:
            seconds: for which to wait at most.

        Returns:
            The ids of those that it still has, each with the scheduler's words; of all, without an answer.
        """
        jobs = self.jobs()
        deadline = monotonic() + seconds
        while True:
            try:
                states = self.scheduler.states(jobs)
                left = {
                    job: states[job].detail or states[job].state.name
                    for job in jobs
                    if job in states and states[job].state in (JobState.QUEUED, JobState.RUNNING)
                }
            except SchedulerError as error:
                left = dict.fromkeys(jobs, str(error))
            if not left or monotonic() >= deadline:
                return left
            sleep(_ASK_EVERY_S)  # a scheduler tells nobody that a job has ended

    def _call_of(self, stored: StoredCall) -> Call:
        options = CallOptions(key=stored.key, name=stored.name, timeout=stored.timeout)
        return Call(_submitted_earlier, (), {}, options=options, keeper=self._calls)

    def _start(self, call: Call) -> None:
        options, terms, group = self._last_terms
        if options is not call.options:  # else one of many calls with the same
            terms = self._terms_of(call.options)
            group = terms.group
            self._last_terms = call.options, terms, group
        self._manager.put(Item(call, self._packed(call), terms, group))

    def _stop(self, calls: Sequence[Call]) -> None:
        self._manager.stop([item for call in calls if (item := self._manager.running(call.id)) is not None])

    def _close(self, wait: bool) -> None:
        self._manager.close(wait)

    def _infos(self, calls: Sequence[Call]) -> list[TaskInfo]:
        infos = []
        for call in calls:
            item = self._manager.running(call.id)
            job = None if item is None else item.job
            known: dict[str, Any] = {}
            if item is not None and job is not None:
                known = {"host": job.node, "pid": item.pid, "job_id": job.id}
            infos.append(info_of(call, state="running", **known))
        return infos

    def _check_options(self, options: CallOptions) -> None:
        self._parsed_extra(options)
        self._packing_of(options).check(cpus=options.cpus, memory=options.memory)
        try:
            json.dumps(dict(options.extra))
        except TypeError as error:
            raise ValueError(f"extra: {error}: only what JSON can have goes to a scheduler") from None

    def _parsed_extra(self, options: CallOptions) -> dict[str, Any]:
        """What is for the scheduler, as it reads it, and what is for the packing."""
        packing = {name: value for name, value in options.extra.items() if name in PACKING_OPTIONS}
        others = {name: value for name, value in options.extra.items() if name not in PACKING_OPTIONS}
        return {**packing, **self.scheduler.check(others)}

    def _terms_of(self, options: CallOptions) -> Terms:
        return Terms(
            cpus=options.cpus,
            memory=options.memory,
            gpus=options.gpus,
            time=options.time,
            queue=options.queue,
            account=options.account,
            extra=self._parsed_extra(options) or None,
        )

    def _packing_of(self, options: CallOptions) -> Packing:
        extra = options.extra
        return self._packing.replaced(extra.get("tasks_per_job"), extra.get("parallel_tasks_per_job"))

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        """As `options`: jobs are made as large as need be. What only other schedulers have is left out."""
        extra = options.get("extra") or {}
        foreign = sorted(extra.keys() & self.scheduler.ignores)
        if foreign:
            options["extra"] = {name: value for name, value in extra.items() if name not in foreign}
        chosen = self._options.replaced(**options)
        self._check_options(chosen)
        return View(self, chosen), [f"{name} means nothing to {self.scheduler.name}" for name in foreign]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """As every executor; after an exception, what has not started is cancelled: it may be much."""
        if kind is not None:
            self.cancel()
        super().__exit__(kind, error, traceback)

    def _packed(self, call: Call) -> PackedCall:
        try:
            function = self._functions.shared(bytes(dump(b"", call.fn)))
            arguments = bytes(dump(b"", (call.args, call.kwargs)))
        except Exception as error:  # pickling runs anybody's code
            dump_call(call)  # which says what of it cannot
            raise ExecutorError(f"The call {call.name!r} cannot be pickled: {error}") from error
        packed = PackedCall(
            *(call.name, call.key, function, arguments, self._packed_context(call)),
            timeout=call.options.timeout,
            map_index=call.options.map_index,
        )
        call.fn, call.args, call.kwargs = _submitted_earlier, (), {}  # it may wait for long
        return packed

    def _packed_context(self, call: Call) -> bytes:
        if not call.context:
            return _NO_CONTEXT
        return self._contexts.shared(dump_context(call))


class _Repeated:
    """Of equal values in succession the first one, for all of them: thousands of calls have one function."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = b""

    def shared(self, value: bytes) -> bytes:
        last = self._last  # which another thread may replace meanwhile
        if value == last:
            return last
        self._last = value
        return value


def _seen_as(path_map: Mapping[str, str], path: str) -> str:
    """A path, as the nodes see it."""
    for here, there in path_map.items():
        if path == here or path.startswith(f"{here}/"):
            return there + path[len(here) :]
    return path


def _submitted_earlier(*_: Any, **__: Any) -> None:
    raise AssertionError("a call that has travelled is run here")


_NO_CONTEXT = bytes(dump(b"", {}))
