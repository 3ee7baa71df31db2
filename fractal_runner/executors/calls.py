"""A call on its way through an executor: what is asked, what has become of it.

Apart from `base` because these are data: what travels (`CallOptions`, `TaskInfo`) is frozen, and what
changes (`CallFuture`, `Call`) changes in few ways, each of which can only happen once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from fractal_runner.errors import did_you_mean
from fractal_runner.quantities import argument, parse_count, parse_size, parse_time

ContextFilter = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_CANCELLED = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED})
_DONE = frozenset({*_CANCELLED, FINISHED})
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What a call asks for beyond its function and arguments.

    Attributes:
        key: the caller's durable name of this call; batch executors file what they write under it.
        name: what logs, displays and the worker that runs it show; the function's name if None.
        map_index: the call's place among those of one `map`.
        cpus: CPUs that it keeps busy.
        memory: bytes that it needs; None if it does not say.
        gpus: GPUs.
        time: seconds for which a scheduler should reserve its place.
        queue: a scheduler's queue or partition.
        account: the account or project to charge.
        timeout: seconds after which it is ended, where the executor `kills`.
        context_filter: what of the executor's `context` it gets: names, or a function from the whole
            mapping to the part; None for all of it.
        extra: options of one scheduler, by its own names.
    """

    key: str | None = None
    name: str | None = None
    map_index: int | None = None
    cpus: int = 1
    memory: int | None = None
    gpus: int = 0
    time: float | None = None
    queue: str | None = None
    account: str | None = None
    timeout: float | None = None
    context_filter: ContextFilter | frozenset[str] | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)

    def replaced(self, **changes: Any) -> CallOptions:
        """These options with some others in place: sizes and times as people write them.

        Raises:
            TypeError: if there is no such option, naming the nearest one.
            ValueError: if a value is not what its option takes.
        """
        parsed = {}
        for name, value in changes.items():
            parse = _PARSERS.get(name)
            if parse is None:
                raise TypeError(f"there is no option {name!r}: {did_you_mean(name, _PARSERS)}")
            parsed[name] = argument(name, parse, value)
        return dataclasses.replace(self, **parsed)

    def context_of(self, context: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of `context` that the call gets."""
        if self.context_filter is None:
            return context
        if callable(self.context_filter):
            return self.context_filter(context)
        return {name: value for name, value in context.items() if name in self.context_filter}


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A call as an executor sees it at one moment.

    Attributes:
        id: its number in this process; no other call has it.
        name: its name.
        state: "pending"; "running"; "left running" if its future has ended and it has not.
        submitted: when it was submitted, in seconds since the epoch.
        started: when it started; None if it has not.
        host: the node that it runs on; None if it does not run.
        pid: the process that it runs in: its own where it has one, else the executor's.
        job_id: a scheduler's id of the job that it belongs to.
        cpu: CPU in use by its process and their children, in percent of one CPU, since the snapshot
            before this one; None if it cannot be known.
        rss: memory of its process and their children, in bytes; None if it cannot be known.
        children: how many processes it has started, and they in turn.
        threads: how many threads its processes have.
        key: its key, if it was given one.
    """

    id: int
    name: str
    state: str
    submitted: float
    started: float | None = None
    host: str | None = None
    pid: int | None = None
    job_id: str | None = None
    cpu: float | None = None
    rss: int | None = None
    children: int | None = None
    threads: int | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class CallInfo:
    """A call as it sees itself: what `current_call` tells in a worker.

    Attributes:
        name: its name.
        key: its key, if it was given one.
        map_index: its place among those of one `map`, or what `options(map_index=…)` has said.
        attempt: which start of the call this is, from 1: a job that is started again does those calls once
            more that had started and not ended.
    """

    name: str
    key: str | None
    map_index: int | None
    attempt: int


class Keeper(Protocol):
    """Who keeps account of futures: told of each one's end, and when somebody has its result."""

    def ending(self, future: CallFuture) -> None: ...
    def ended(self, future: CallFuture) -> None: ...
    def asked(self, future: CallFuture) -> None: ...


class CallFuture(Future[Any]):
    """The future of a call.

    It goes by `_condition` and `_state` of its base class, as CPython's own `wait` and `as_completed` do.

    Attributes:
        output: what the call printed, where it ran in a process of its own; whole lines, in order.
    """

    output: str = ""
    asked = False  # whether anybody has its result; the keeper's to set
    _claimed = False  # by the one who ends it

    def __init__(self, keeper: Keeper | None = None) -> None:
        super().__init__()
        self._keeper = keeper

    # One look at the state, which is all that the base class takes its lock for.

    def cancelled(self) -> bool:
        return self._state in _CANCELLED

    def running(self) -> bool:
        return self._state == RUNNING

    def done(self) -> bool:
        return self._state in _DONE

    def cancel(self) -> bool:
        """Cancel the call if it has not started; whoever waits for it is told at once."""
        if not self._claim(PENDING):
            return self.cancelled()
        try:
            super().cancel()
            self.set_running_or_notify_cancel()
        finally:
            self._tell_end()
        return True

    def begin(self) -> bool:
        """Mark the call as running; False if it was cancelled, or ended some other way, before."""
        with self._condition:
            if self._claimed or self._state != PENDING:
                return False
            self._state = RUNNING
            return True

    def end(self, result: Any = None, error: BaseException | None = None) -> bool:
        """End the call, in whatever state it is; False if it had ended before."""
        if not self._claim(PENDING, RUNNING):
            return False
        try:
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
        finally:
            self._tell_end()  # also after a callback that ends its thread, or a Ctrl-C within one
            del error
        return True

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(timeout)
        finally:
            self._was_asked()
            del self  # or a traceback of the exception would keep the future, and it the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self._was_asked()
            del self

    def _claim(self, *states: str) -> bool:
        with self._condition:
            if self._claimed or self._state not in states:
                return False
            self._claimed = True
        if self._keeper is not None:
            self._keeper.ending(self)
        return True

    def _tell_end(self) -> None:
        if self._keeper is not None:
            self._keeper.ended(self)

    def _was_asked(self) -> None:
        if self._keeper is not None and self._state == FINISHED and not self.asked:
            self._keeper.asked(self)


class Call:
    """A function with its arguments, on its way through an executor.

    It may be ended from several sides (its worker, a deadline, `stop`): the first one counts. Its
    function and arguments are let go of as soon as its future ends.

    Attributes:
        id: its number in this process.
        fn, args, kwargs: what to call.
        options: what it asks for.
        name, key: its own, which come before those of the options.
        future: what the caller has of it.
        context: what `current_context` is for it.
        keeper: who keeps account of it; there is one per executor.
        parent: the call of the same executor from within which it was submitted.
        submitted: seconds since the epoch.
        started: the same; None before it starts.
        attempt: which start of it this is, from 1; where it runs.
    """

    __slots__ = (
        *("args", "attempt", "context", "fn", "future", "id", "key", "kwargs", "keeper", "name"),
        *("options", "parent", "started", "submitted"),
    )

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        options: CallOptions,
        context: Mapping[str, Any] = _EMPTY,
        keeper: Keeper | None = None,
        parent: Call | None = None,
        name: str | None = None,
        key: str | None = None,
        attempt: int = 1,
    ) -> None:
        self.id = next(_numbers)
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.options = options
        self.name = name or options.name or name_of(fn)
        self.key = key or options.key
        self.context = context
        self.keeper = keeper
        self.parent = parent
        self.future = CallFuture(keeper)
        self.submitted = time.time()
        self.started: float | None = None
        self.attempt = attempt

    def begin(self) -> bool:
        """Mark it as started. Whoever runs it calls this first, and runs it only if it returns True."""
        if not self.future.begin():
            return False
        self.started = time.time()
        return True

    def succeed(self, result: Any) -> bool:
        """End it with its result; False if it had ended before."""
        return self.future.end(result)

    def fail(self, error: BaseException) -> bool:
        """End it with an error; False if it had ended before."""
        try:
            return self.future.end(error=error)
        finally:
            del error

    def run(self) -> None:
        """Begin, do and end it, here and now: in this thread, with its context."""
        if self.begin():
            self.do()

    def do(self) -> None:
        """Do and end it, once it has begun. Whatever it raises is its own: SystemExit, too."""
        try:
            result = self.returned()
        except BaseException as error:  # also what would end the thread: it is the work's, not ours
            self.fail(error)
        else:
            self.succeed(result)
        finally:
            del self  # the traceback of an exception keeps this frame

    def returned(self) -> Any:
        """What the function returns, called here and now, with the call's context."""
        before, _local.call = running_call(), self
        try:
            if self.options.context_filter is not None:
                self.context = self.options.context_of(self.context)
            return self.fn(*self.args, **self.kwargs)
        finally:
            _local.call = before
            del self, before

    def release(self) -> None:
        """Let go of what it was given, as the future may be kept for long, and of the future itself.

        Whoever still holds the call for a moment holds its result no more.
        """
        self.future = _ended
        self.fn, self.args, self.kwargs, self.context = _released, (), {}, _EMPTY
        self.parent = None


def current_context() -> Mapping[str, Any]:
    """The mapping that the executor shares with its calls, as the call that asks sees it.

    In threads it is the very object that the executor was given; in processes a copy.

    Raises:
        RuntimeError: if it is not a call that asks.
    """
    return _expected("current_context").context


def current_call() -> CallInfo:
    """What there is to know of the call that asks: its name, key, place in a `map`, attempt.

    Raises:
        RuntimeError: if it is not a call that asks.
    """
    call = _expected("current_call")
    return CallInfo(call.name, call.key, call.options.map_index, call.attempt)


def _expected(asker: str) -> Call:
    call = running_call()
    if call is None:
        raise RuntimeError(
            f"{asker}() is for functions that an executor runs: there is no call in this thread"
        )
    return call


def running_call() -> Call | None:
    """The call that this thread is running, if it is."""
    return getattr(_local, "call", None)


_local = threading.local()
_ended = CallFuture()  # in the place of a call's own, once that has ended
_ended.end()


def _released(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a call that has ended is run again")


def name_of(fn: Callable[..., Any]) -> str:
    """What a call of `fn` is called if nothing else is said."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError(f"{value!r} is not a text of at least one character")


def _line(value: Any) -> str | None:
    """What becomes a line of a scheduler's script: with a line's end in it, the rest would be a command."""
    if (text := _text(value)) is not None and not text.isprintable():
        raise ValueError(f"{value!r} is not a line of text")
    return text


def _or_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _context_filter(value: Any) -> Any:
    if value is None or callable(value):
        return value
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{value!r} is neither a function nor a collection of names")
    return frozenset(value)


def _extra(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping of option names to values")
    return MappingProxyType(dict(value))


_from_0 = functools.partial(parse_count, least=0)
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "key": _text,
    "name": _text,
    "map_index": _or_none(_from_0),
    "cpus": parse_count,
    "memory": _or_none(parse_size),
    "gpus": _from_0,
    "time": _or_none(parse_time),
    "queue": _line,
    "account": _line,
    "timeout": _or_none(parse_time),
    "context_filter": _context_filter,
    "extra": _extra,
}
