"""The kinds of worker: a thread, a process that is kept, a process for each call."""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.base import stopped_error
from fractal_runner.executors.calls import Call
from fractal_runner.executors.cpus import thread_variables
from fractal_runner.executors.local import child
from fractal_runner.executors.local.dispatcher import Worker
from fractal_runner.executors.local.forking import ForkProcess
from fractal_runner.executors.local.peers import TERM_GRACE_S, NotStartedError, Peer
from fractal_runner.executors.local.reports import dump_call, handle_record, has_output, report_end
from fractal_runner.executors.slots import SlotPool
from fractal_runner.quantities import format_time
from fractal_runner.worker import evidence, processes

_PROCESS_START_S = 60.0  # a fresh interpreter, with what it imports from a slow file system
_FORK_START_S = 10.0
_LEVELS_EVERY_S = 0.05
_CONTEXTS_LIMIT = 32  # a process keeps the contexts of so many different filters
_logger = logging.getLogger("fractal_runner")


class ThreadWorker(Worker):
    """Runs calls in the slot's own thread, under their names.

    Args:
        leave: what becomes of a call that has exceeded its timeout.
    """

    def __init__(self, leave: Callable[[Call], None]) -> None:
        self._leave = leave

    def run(self, call: Call) -> None:
        thread = threading.current_thread()
        before, thread.name = thread.name, call.name
        timer: threading.Timer | None = None
        if call.options.timeout is not None:
            timer = threading.Timer(call.options.timeout, self._exceeded, (call,))
            timer.daemon = True
            timer.start()
        try:
            call.do()
        finally:
            if timer is not None:
                timer.cancel()
            thread.name = before

    def _exceeded(self, call: Call) -> None:
        # In this order: whoever sees the future's end may shut down, which waits for threads not left.
        self._leave(call)
        call.fail(timeout_error(call, "a thread cannot be ended, and was left running"))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What worker processes of an executor have in common.

    Attributes:
        context: what is copied to them, as a whole.
        places: the pool whose places their children may share.
    """

    context: Mapping[str, Any]
    places: SlotPool | None = None

    def environment(self, call: Call) -> dict[str, str]:
        """What is added to the environment of a process that runs `call`."""
        variables = thread_variables(call.options.cpus)
        if self.places is not None:
            variables["MAKEFLAGS"] = self.places.makeflags()
        return variables

    @property
    def inherited(self) -> tuple[int, ...]:
        return () if self.places is None else self.places.inherited


class _ProcessWorker(Worker):
    """Common to workers with processes: one call at a time, to its end, whatever becomes of it.

    The slot's thread owns the peer. `_stopping` is the one thing that others set: the id of the call
    that is to be ended.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._peer: Peer | None = None
        self._leaving: Peer | None = None  # it has done its one call, and is on its way out
        self._stopping = 0

    @property
    def pid(self) -> int | None:
        peer = self._peer
        return None if peer is None else peer.pid

    def stop(self, call: Call) -> None:
        self._stopping = call.id

    def rest(self) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.close()

    def close(self) -> None:
        self.rest()
        self._discard()

    def run(self, call: Call) -> None:
        try:
            deadline = self._send(call)
            self.rest()
            assert self._peer is not None
            message = self._peer.receive(deadline, lambda: self._is_stopped(call))
        except TimeoutError:
            self._end(call, timeout_error(call, "its worker process was ended"))
        except InterruptedError:
            self._end(call, stopped_error(call))
        except (ExecutorError, JobExecutionError, OSError) as error:
            self._discard()
            self._fail(call, error)
        except BaseException as error:
            # The process may go on with this call, and the next one must not be given its result.
            self._end(call, error)
            raise
        else:
            if message is not None:
                if has_output(message):
                    call.future.output = self._peer.take_output()
                self._done()
                # Last of all: whoever then lets go of the result shall find nobody else holding it.
                self._report(call, message)
            else:
                self._end(call, self._peer.death(f"while it ran {call.name!r}"), kill=False)

    @abstractmethod
    def _send(self, call: Call) -> float | None:
        """Get the call to a process; until when it may run, on the monotonic clock.

        Raises:
            ExecutorError, JobExecutionError, OSError: if it cannot be got there.
            TimeoutError, InterruptedError: if it took too long, or was stopped meanwhile.
        """

    def _is_stopped(self, call: Call) -> bool:
        """Whether the call is to be ended; asked often."""
        return self._stopping == call.id

    def _deadline(self, call: Call) -> float | None:
        return None if call.options.timeout is None else time.monotonic() + call.options.timeout

    def _start(
        self, make: Callable[..., BaseProcess], target: Callable[..., None], *more: Any, **how: Any
    ) -> Peer:
        return Peer(
            lambda target, args: make(target=target, args=args),
            target,
            *more,
            ledger=evidence.own_file_name(),
            inherited=self._surroundings.inherited,
            on_record=self._record,
            **how,
        )

    def _end(self, call: Call, error: BaseException, *, kill: bool = True) -> None:
        if self._peer is not None:
            if kill:
                self._peer.kill()
            # What a fork server has started for it is nobody's child here.
            if call.key:
                mark = processes.mark_of(call.key)
                processes.end_found(lambda: processes.bearers(mark), TERM_GRACE_S if kill else 0)
            call.future.output = self._peer.take_output()
        self._discard()
        self._fail(call, error)

    def _report(self, call: Call, message: memoryview) -> None:
        """End the call as its process has reported."""
        report_end(call, message)

    def _fail(self, call: Call, error: BaseException) -> None:
        """End the call with what has happened to its process."""
        call.fail(error)

    def _record(self, pickled: memoryview) -> None:
        """Take a log record of the call that runs."""
        handle_record(pickled)

    def _done(self) -> None:
        """The process has done a call."""

    def _let_go(self) -> None:
        """Let the process end by itself, while the next one is being started."""
        assert self._leaving is None
        self._leaving, self._peer = self._peer, None
        if self._leaving is not None:
            self._leaving.hang_up()

    def _discard(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.close()


class KeptProcessWorker(_ProcessWorker):
    """A fresh interpreter that is kept for the calls that follow, until one of them ends it."""

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._cpus = 0  # for how many its environment is made
        self._contexts: dict[Hashable, int] = {}  # by filter: the context's number in the process
        self._known: tuple[str, int, int] | None = None  # name, context and attempt that were sent last
        self._levels: dict[str, int] | None = None
        self._levels_at = 0.0
        self._root_level = 0

    def _send(self, call: Call) -> float | None:
        message = self._dump(call)
        full = len(self._contexts) >= _CONTEXTS_LIMIT and self._filter(call) not in self._contexts
        if self._peer is not None and (full or call.options.cpus != self._cpus):
            self._discard()  # numerical libraries read once how many threads they may start
        while True:
            fresh = self._peer is None
            if self._peer is None:
                self._cpus = call.options.cpus
                self._contexts, self._known, self._levels = {}, None, None
                self._peer = self._fresh(self._surroundings.environment(call))
            self._announce(call)
            deadline = self._deadline(call)
            settings = self._changed_settings(call)
            messages = (
                [message] if settings is None else [child.SETTINGS + cloudpickle.dumps(settings), message]
            )
            if all(self._peer.send(one, deadline, lambda: self._is_stopped(call)) for one in messages):
                return deadline
            if fresh:
                raise self._peer.death(f"before it took {call.name!r}") from None
            self._discard()  # it died between two calls, before it had read this one: another can do it

    def _announce(self, call: Call) -> None:
        """The call is about to be sent to the process that there is now."""

    def _dump(self, call: Call) -> bytes | memoryview:
        """The call as a message to its process."""
        return dump_call(call, child.about_call(call))

    def _dump_context(self, call: Call) -> bytes:
        """What the call sees of the context, as a pickle."""
        return dump_context(call)

    def _filter(self, call: Call) -> Hashable:
        """What tells the call's filter from others: a function is only ever itself."""
        chosen = call.options.context_filter
        return chosen if chosen is None or isinstance(chosen, frozenset) else _Itself(chosen)

    def _fresh(self, environment: dict[str, str]) -> Peer:
        try:
            return self._start_fresh(environment)
        except NotStartedError as error:
            raise JobExecutionError(f"{error}.") from None

    def _start_fresh(self, environment: dict[str, str]) -> Peer:
        return self._start(
            fresh_processes(),
            child.serve,
            environment=environment,
            start_timeout=_PROCESS_START_S,
        )

    def _changed_settings(self, call: Call) -> child.Settings | None:
        """What the process does not know yet of what the call needs."""
        levels = self._changed_levels()
        chosen = self._filter(call)
        pickled = None
        if chosen not in self._contexts:
            pickled = self._dump_context(call)
            self._contexts[chosen] = len(self._contexts)
        known = call.name, self._contexts[chosen], call.attempt
        if self._known == known and levels is None:
            return None
        self._known = known
        return child.Settings(call.name, (known[1], pickled), levels, call.attempt)

    def _changed_levels(self) -> dict[str, int] | None:
        """The levels of loggers, if they have changed. Those other than root's are looked at now and then."""
        now = time.monotonic()
        looked = self._levels is not None and now < self._levels_at + _LEVELS_EVERY_S
        if looked and logging.root.level == self._root_level:
            return None
        levels = child.levels_in_force()
        self._levels_at, self._root_level = now, logging.root.level
        if levels == self._levels:
            return None
        self._levels = levels
        return levels


class KeptForkWorker(KeptProcessWorker):
    """A fork of this process that is kept as well: there at once, with all that is imported here.

    For a process that has nothing to hide from its calls, and no threads but ours.
    """

    def _start_fresh(self, environment: dict[str, str]) -> Peer:
        make = partial(
            self._start, ForkProcess, child.serve, environment=environment, start_timeout=_FORK_START_S
        )
        try:
            return make(forked=True)
        except NotStartedError as error:
            _logger.warning("%s: forking once more", error)
            return make(forked=True)


class SpawnWorker(KeptProcessWorker):
    """A fresh interpreter for each call."""

    def _done(self) -> None:
        self._let_go()


class ForkWorker(_ProcessWorker):
    """A fork of this process for each call."""

    def _send(self, call: Call) -> float | None:
        try:
            self._peer = self._fork(call)
        except NotStartedError as error:
            # Another thread held a lock when it was forked, and in the child nobody lets go of it.
            _logger.warning("%s: forking once more", error)
            try:
                self._peer = self._fork(call)
            except NotStartedError as again:
                raise JobExecutionError(f"{again}, and neither had the one before it.") from None
        return self._deadline(call)

    def _fork(self, call: Call) -> Peer:
        return self._start(
            ForkProcess,
            child.run_once,
            call,
            environment=self._surroundings.environment(call),
            start_timeout=_FORK_START_S,
            forked=True,
        )

    def _done(self) -> None:
        self._let_go()


def fresh_processes() -> Callable[..., BaseProcess]:
    """What makes fresh interpreters. It takes its time to load, and forks have no need of it."""
    from loky.backend import get_context

    make: Callable[..., BaseProcess] = get_context("loky").Process
    return make


class _Itself:
    """Equal to what holds the same object, which need not be hashable, and must live as long."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def timeout_error(call: Call, what_became_of_it: str) -> TimeoutError:
    """The error of a call that took too long."""
    limit = format_time(call.options.timeout or 0)
    return TimeoutError(
        f"The call {call.name!r} ran longer than its timeout of {limit}: {what_became_of_it}."
    )


def dump_context(call: Call) -> bytes:
    """What a call sees of its executor's context, as a pickle.

    Raises:
        ExecutorError: if it cannot be pickled.
    """
    try:
        pickled: bytes = cloudpickle.dumps(dict(call.options.context_of(call.context)))
    except Exception as error:  # pickling runs anybody's code
        raise ExecutorError(
            f"The context of the call {call.name!r} cannot be sent to a worker process: {error}. "
            "A context_filter leaves out what cannot, or what the call does not need."
        ) from error
    return pickled
