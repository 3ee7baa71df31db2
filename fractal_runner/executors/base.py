"""What our executors add to `concurrent.futures.Executor`, and what a new one has to do for it.

An executor is written by subclassing `Executor` and saying, in `_start`, how a call gets to where it
runs. Everything else is here, the same for all of them: options, futures as arguments, `map`,
`completed`, cancelling, what happens on Ctrl-C. A complete executor of one thread per call:

    class ThreadPerCallExecutor(Executor):
        def _start(self, call):
            threading.Thread(target=call.run).start()
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.calls import Call, CallFuture, CallOptions, TaskInfo, current_call, name_of

T = TypeVar("T")

STOPPED = "CANCELLED"  # the `reason` of a call that `stop` has ended
_UNASKED_LIMIT = 10_000
_LOOK_S = 0.5  # how often who waits looks whether there was a Ctrl-C
_logger = logging.getLogger("fractal_runner")


class Executor(futures.Executor):
    """An executor whose calls carry options, can be watched, and always end.

    For an implementer. `__init__` calls ours. Then:

    - `_start(call)` is called once per call, from any thread, when nothing stands in its way any more
      (its arguments are there). It does not block and does not raise for what the call does. Where the
      call runs, in the end, somebody calls `call.begin()`, leaves it alone if that returns False (it was
      cancelled), and otherwise ends it with `call.succeed(result)` or `call.fail(error)`, whatever
      happens; `call.run()` does all of that in the thread that it is called in.
    - `_stop(calls)` ends calls that run, where `kills` is True, and returns without waiting: each call is
      given its error by whoever sees its end. Without it, `stop` ends the futures only.
    - `_close(wait)` is called once the executor gets no more calls. What it holds is to be let go of when
      the last call has ended; if `wait`, it returns only then, when no call is under way any more.
    - `_infos(calls)` tells `tasks` about calls that run.

    Class attributes tell what the executor can do, for its users and for `fractal_runner.testing`:

    Attributes:
        asynchronous: `submit` returns before the work is done.
        isolates: a call that dies takes no other one with it.
        kills: a call that runs can be ended, by `stop` and by its `timeout`.
        is_remote: calls may run on other machines than this one.
        in_process: calls run in this very process.
        max_workers: how many calls run at a time.
        name: what it is called in logs.

    Args:
        max_workers: see above.
        name: see above; the class's name by default.
        context: a mapping that calls read with `current_context()`.
    """

    asynchronous: bool = True
    isolates: bool = False
    kills: bool = False
    is_remote: bool = False
    in_process: bool = False

    def __init__(
        self,
        *,
        max_workers: int,
        name: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        self.max_workers = at_least_one(max_workers)
        self.name = name or type(self).__name__
        self._context: Mapping[str, Any] = MappingProxyType({}) if context is None else context
        self._options = CallOptions()
        self._calls = _Calls()
        self._pid = os.getpid()

    @abstractmethod
    def _start(self, call: Call) -> None:
        """See to it that `call` is run."""

    def _stop(self, calls: Sequence[Call]) -> None:
        """End these calls, which run; return without waiting for it."""

    def _close(self, wait: bool) -> None:
        """Let go of what this executor holds, as soon as its calls have ended."""

    def _infos(self, calls: Sequence[Call]) -> list[TaskInfo]:
        """What is known of calls that have started."""
        return [info_of(call, state="running", host=os.uname().nodename, pid=os.getpid()) for call in calls]

    def _check_options(self, options: CallOptions) -> None:
        """Whether a call with these options can ever run here.

        Raises:
            ValueError: if not, naming the option, its value and the bound.
        """

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        """As `options`, but what exceeds the executor's bounds is reduced to them.

        Returns:
            The view, and a sentence for each option that was reduced.
        """
        return self.options(**options), []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Schedule `fn(*args, **kwargs)`.

        Arguments that are futures are waited for, without taking a worker, and replaced by their
        results; if one fails or is cancelled, so does this call, with the same exception.

        Returns:
            The future of its result. What goes wrong with the work, or with getting it to a worker and
            back, is in the future.

        Raises:
            RuntimeError: after `shutdown`, and in a process that was forked off this executor's.
        """
        return self._submit(self._options, fn, args, kwargs)

    def options(self, **options: Any) -> Executor:
        """A view of this executor, whose calls carry these options beside those that it has.

        Raises:
            TypeError: for an option that there is not, naming the nearest one.
            ValueError: for a value that does not fit its option, or exceeds what the executor has.
        """
        return View(self, self._checked(self._options.replaced(**options)))

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As the built-in map, the calls being made ahead of their results.

        Args:
            fn: what to call.
            iterables: its arguments, one iterable each.
            timeout: seconds from now within which each result must have come; no bound if None.
            chunksize: how many calls are sent to a worker as one.
            buffersize: how many results may be ahead of the one that was taken last: iterables are read
                only that far. None reads them to their end at once.

        Raises:
            ValueError, TypeError: if chunksize or buffersize is not a positive number.
            TimeoutError: from the iterator.
        """
        return self._map(fn, iterables, timeout=timeout, chunksize=chunksize, buffersize=buffersize)

    async def run(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Submit, and await the result. If the awaiting task is cancelled, the call is stopped."""
        return await self._await(self.submit(fn, *args, **kwargs))

    def tasks(self) -> list[TaskInfo]:
        """A snapshot of the calls that have not ended, those that run first."""
        pending: list[Call] = []
        running: list[Call] = []
        for call in self._calls.all():
            (running if call.started is not None else pending).append(call)
        infos = self._infos(running)
        return infos + [info_of(call, state="pending") for call in pending]

    def pending_count(self) -> int:
        """How many calls were submitted and have neither finished nor been cancelled."""
        return len(self._calls)

    def completed(self, timeout: float | None = None) -> Iterator[Future[Any]]:
        """Futures as their calls finish, each once, cancelled ones never, until none is pending.

        A future whose result was asked for is not given again. Of futures that nobody asked, the last
        10,000 that finished are kept.

        Raises:
            TimeoutError: if `timeout` seconds have passed since the call and calls are still pending.
        """
        return self._calls.completed(timeout)

    def cancel(self) -> int:
        """Cancel what has not started; the number of calls that were cancelled."""
        return sum(call.future.cancel() for call in self._calls.all())

    def stop(self, *futures: Future[Any]) -> int:
        """End what has not started and what runs: all of it, or these calls.

        It does not wait, but every future ends: what ran, with a JobExecutionError whose reason is
        "CANCELLED". Where the executor does not `kills`, the work itself is left running.

        Returns:
            How many calls that were.
        """
        chosen = self._calls.all() if not futures else self._calls.of(futures)
        running = [call for call in chosen if not call.future.cancel() and not call.future.done()]
        if running:
            self._stop(running)
            if not self.kills:
                for call in running:
                    call.fail(stopped_error(call, left_running=True))
        return len(chosen)

    def attach(self, key: str) -> Future[Any] | None:
        """The call that an earlier process submitted under this `key`, if there is one.

        Batch executors have such; what runs on this machine ends with its process.
        """
        return None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and let go of everything once those that there are have ended.

        Args:
            wait: return only then.
            cancel_futures: cancel what has not started.

        Raises:
            RuntimeError: if a call of this executor, or a callback of its future, asks to wait: it would
                wait for itself.
        """
        if os.getpid() != self._pid:
            return  # a forked child's copy: what it refers to is the parent's
        call = current_call()
        if wait and ((call is not None and call.keeper is self._calls) or self._calls.is_ending_one()):
            raise RuntimeError(
                f"{self.name} cannot be shut down, waiting, from within a call of its own or a callback"
            )
        first = self._calls.close()
        if cancel_futures:
            self.cancel()
        if wait:
            self._calls.wait_until_empty()
        if first or wait:
            self._close(wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Shut down, waiting. On Ctrl-C cancel what has not started; on the second one, end what runs."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._end_interrupted()
            return
        try:
            self.shutdown()
        except KeyboardInterrupt:
            self._end_interrupted()
            raise

    def _end_interrupted(self) -> None:
        try:
            cancelled = self.cancel()
            _logger.warning(
                "%s: interrupted: %d call(s) that had not started are cancelled, %d may finish. "
                "Interrupt again to end them.",
                *(self.name, cancelled, self.pending_count()),
            )
            self.shutdown()
        except KeyboardInterrupt:
            _logger.warning("%s: interrupted again: ending what runs.", self.name)
            self.stop()
            self.shutdown()
            raise

    def submit_as(self, name: str, key: str | None, fn: Callable[..., T], /, *args: Any) -> Future[T]:
        """As `options(name=name, key=key).submit(fn, *args)`, for many calls in quick succession."""
        return self._submit(self._options, fn, args, {}, name=name, key=key)

    def _submit(
        self,
        options: CallOptions,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str | None = None,
        key: str | None = None,
    ) -> CallFuture:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"{self.name} belongs to process {self._pid}: a forked child of it cannot submit to it"
            )
        parent = current_call()
        if parent is not None and parent.keeper is not self._calls:
            parent = None
        call = Call(
            *(fn, args, kwargs),
            options=options,
            context=self._context,
            keeper=self._calls,
            parent=parent,
            name=name,
            key=key,
        )
        future = call.future
        if not self._calls.add(call):
            raise RuntimeError(f"cannot schedule new futures after shutdown of {self.name}")
        if (args and any(isinstance(value, Future) for value in args)) or (
            kwargs and any(isinstance(value, Future) for value in kwargs.values())
        ):
            _Arguments(call, self._start_safely).wait()
        else:
            self._start_safely(call)
        return future

    def _start_safely(self, call: Call) -> None:
        try:
            self._start(call)
        except BaseException as error:
            call.fail(error)
            if not isinstance(error, Exception):
                raise

    def _checked(self, options: CallOptions) -> CallOptions:
        self._check_options(options)
        return options

    async def _await(self, future: Future[T]) -> T:
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.stop(future)
            raise

    def _map(
        self,
        fn: Callable[..., T],
        iterables: Sequence[Iterable[Any]],
        *,
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> Iterator[T]:
        if chunksize < 1:
            raise ValueError(f"chunksize must be >= 1, not {chunksize!r}")
        if buffersize is not None:
            if not is_whole(buffersize):
                raise TypeError(f"buffersize must be an integer or None, not {buffersize!r}")
            if buffersize < 1:
                raise ValueError(f"buffersize must be None or > 0, not {buffersize!r}")
        deadline = None if timeout is None else time.monotonic() + timeout
        rows: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        numbers = itertools.count()
        if chunksize == 1:
            named = self._options
        else:
            rows = ((fn, chunk) for chunk in _chunks(rows, chunksize))
            named = self._options.replaced(name=self._options.name or name_of(fn))

        def submit(row: tuple[Any, ...]) -> CallFuture:
            numbered = named.replaced(map_index=next(numbers))
            return self._submit(numbered, fn if chunksize == 1 else _call_chunk, row, {})

        ahead = deque(submit(row) for row in itertools.islice(rows, _in_chunks(buffersize, chunksize)))
        results = _results(ahead, rows if buffersize is not None else iter(()), submit, deadline)
        return results if chunksize == 1 else itertools.chain.from_iterable(results)


class View(Executor):
    """An executor as seen with other options: it has no state of its own but them."""

    def __init__(self, executor: Executor, options: CallOptions) -> None:
        self._executor = executor
        self._options = options
        self.name = executor.name
        self.max_workers = executor.max_workers
        self.asynchronous = executor.asynchronous
        self.isolates = executor.isolates
        self.kills = executor.kills
        self.is_remote = executor.is_remote
        self.in_process = executor.in_process

    def _start(self, call: Call) -> None:
        self._executor._start(call)

    def _submit(
        self,
        options: CallOptions,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str | None = None,
        key: str | None = None,
    ) -> CallFuture:
        return self._executor._submit(options, fn, args, kwargs, name=name, key=key)

    def options(self, **options: Any) -> Executor:
        return View(self._executor, self._executor._checked(self._options.replaced(**options)))

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        view, reduced = self._executor.fitting(**options)
        return View(self._executor, view._options), reduced

    def tasks(self) -> list[TaskInfo]:
        return self._executor.tasks()

    def pending_count(self) -> int:
        return self._executor.pending_count()

    def completed(self, timeout: float | None = None) -> Iterator[Future[Any]]:
        return self._executor.completed(timeout)

    def cancel(self) -> int:
        return self._executor.cancel()

    def stop(self, *futures: Future[Any]) -> int:
        return self._executor.stop(*futures)

    def attach(self, key: str) -> Future[Any] | None:
        return self._executor.attach(key)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.__exit__(kind, error, traceback)


class _Calls:
    """The calls of an executor that have not ended, and those that ended and were not asked.

    A future that has ended is kept only until somebody has its result, so that nothing is held for a
    caller that has let go of it.

    Every call passes here several times, from several threads, so there is no lock on its way: each step
    is one operation on a dictionary, which is atomic, and their order makes up for the rest. (A lock that
    two busy threads share makes each of them wait for the interpreter at every turn.) Only who waits
    takes `_lock`, and is looked for last by whoever changes something.
    """

    def __init__(self) -> None:
        # `with` the lock itself: in the condition's own Python code, a Ctrl-C could leave it locked.
        self._lock = threading.RLock()  # the collector may end a future while it is held
        self._changed = threading.Condition(self._lock)
        self._waiting = 0  # guarded by `_lock`
        self._closed = False
        self._pending: dict[Future[Any], Call] = {}
        self._ending: dict[Future[Any], int] = {}  # on their way out of `_pending` -> by which thread
        self._unasked: dict[CallFuture, None] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def all(self) -> list[Call]:
        return list(self._pending.values())

    def of(self, chosen: Iterable[Future[Any]]) -> list[Call]:
        return [call for future in chosen if (call := self._pending.get(future)) is not None]

    def add(self, call: Call) -> bool:
        """Take in a call; False if no more are taken."""
        self._pending[call.future] = call
        if self._closed:
            self._pending.pop(call.future, None)  # unless it was cancelled in this very moment
            return False
        return True

    def close(self) -> bool:
        """Take no more calls; whether it is the first time that it is said."""
        with self._lock:
            first, self._closed = not self._closed, True
            return first

    def ending(self, future: CallFuture) -> None:
        """Before anybody can see the future's end: whoever sees it does not find it pending."""
        self._ending[future] = threading.get_ident()
        if (call := self._pending.pop(future, None)) is not None:  # None: `add` took it back
            call.release()

    def ended(self, future: CallFuture) -> None:
        """Once the future has ended."""
        if not future.cancelled():
            self._unasked[future] = None
            if future.asked:
                self._unasked.pop(future, None)
            elif len(self._unasked) > _UNASKED_LIMIT:
                self._first_unasked()
        del self._ending[future]
        if self._waiting:
            with self._lock:
                self._changed.notify_all()

    def asked(self, future: CallFuture) -> None:
        """Somebody has the future's result."""
        future.asked = True
        self._unasked.pop(future, None)

    def completed(self, timeout: float | None) -> Iterator[Future[Any]]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (future := self._next_finished(deadline)) is not None:
            yield future
            del future

    def is_ending_one(self) -> bool:
        """Whether this very thread is about to end a future: it calls back."""
        return threading.get_ident() in list(self._ending.values())

    def wait_until_empty(self) -> None:
        while self._pending or self._ending:
            self._wait(lambda: bool(self._pending or self._ending), None)

    def _next_finished(self, deadline: float | None) -> CallFuture | None:
        while (future := self._first_unasked()) is None:
            if not self._pending and not self._ending:
                return self._first_unasked()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{len(self._pending)} call(s) are still pending")
            self._wait(lambda: not self._unasked and bool(self._pending or self._ending), left)
        return future

    def _first_unasked(self) -> CallFuture | None:
        """Take the future that finished first."""
        while True:
            try:
                future = next(iter(self._unasked))
                del self._unasked[future]
            except StopIteration:
                return None
            except (KeyError, RuntimeError):
                continue  # another thread was faster
            return future

    def _wait(self, still: Callable[[], bool], seconds: float | None) -> None:
        """Wait for a change, if there is `still` something to wait for, but not for long.

        A Ctrl-C that comes between a thread's last look at signals and its going to sleep does not wake
        it, so it has to look now and then.
        """
        with self._lock:
            self._waiting += 1
            try:
                if still():
                    self._changed.wait(_LOOK_S if seconds is None else min(seconds, _LOOK_S))
            finally:
                self._waiting -= 1


class _Arguments:
    """The futures among a call's arguments, waited for without a thread. `_lock` guards `_missing`."""

    def __init__(self, call: Call, start: Callable[[Call], None]) -> None:
        self._call = call
        self._start = start
        self._lock = threading.Lock()
        given = [*call.args, *call.kwargs.values()]
        self._futures = [value for value in given if isinstance(value, Future)]
        self._missing = len(self._futures)

    def wait(self) -> None:
        for future in self._futures:
            future.add_done_callback(self._arrived)

    def _arrived(self, _: Future[Any]) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        call = self._call
        if call.future.done():  # cancelled meanwhile
            return
        try:
            call.args = tuple(map(_value_of, call.args))
            call.kwargs = {name: _value_of(value) for name, value in call.kwargs.items()}
        except BaseException as error:
            call.fail(error)
        else:
            self._start(call)


def at_least_one(max_workers: int) -> int:
    """Check a number of workers.

    Raises:
        ValueError: if it is not a positive whole number.
    """
    if not is_whole(max_workers) or max_workers < 1:
        raise ValueError(f"max_workers must be greater than 0 and a whole number, not {max_workers!r}")
    return max_workers


def is_whole(value: object) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def info_of(call: Call, *, state: str, **known: Any) -> TaskInfo:
    """What any executor knows of a call, and what `known` adds."""
    return TaskInfo(
        id=call.id,
        name=call.name,
        state=state,
        submitted=call.submitted,
        started=call.started,
        key=call.key,
        **known,
    )


def stopped_error(call: Call, *, left_running: bool = False) -> JobExecutionError:
    """The error of a call that `stop` has ended."""
    left = " It cannot be ended where it runs, and was left running." if left_running else ""
    return JobExecutionError(f"The call {call.name!r} was stopped.{left}", reason=STOPPED)


def _value_of(argument: Any) -> Any:
    return argument.result() if isinstance(argument, Future) else argument


def _chunks(rows: Iterator[tuple[Any, ...]], size: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    while chunk := tuple(itertools.islice(rows, size)):
        yield chunk


def _call_chunk(fn: Callable[..., T], rows: Sequence[tuple[Any, ...]]) -> list[T]:
    return [fn(*row) for row in rows]


def _in_chunks(buffersize: int | None, chunksize: int) -> int | None:
    return None if buffersize is None else max(1, -(-buffersize // chunksize))


def _results(
    ahead: deque[CallFuture],
    rows: Iterator[tuple[Any, ...]],
    submit: Callable[[tuple[Any, ...]], CallFuture],
    deadline: float | None,
) -> Iterator[Any]:
    """Results in order, one more call being made for each that is taken. What is left is cancelled."""
    try:
        while ahead:
            if (row := next(rows, None)) is not None:
                ahead.append(submit(row))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            # Neither this frame nor the queue may keep a future whose result somebody else has now.
            yield _result_or_cancel(ahead.popleft(), left)
    finally:
        for future in ahead:
            future.cancel()


def _result_or_cancel(future: CallFuture, timeout: float | None) -> Any:
    try:
        try:
            return future.result(timeout)
        finally:
            future.cancel()
    finally:
        del future
