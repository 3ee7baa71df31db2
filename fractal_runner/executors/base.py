"""What our executors add to `concurrent.futures.Executor`, and what a new one has to do for it.

An executor is written by subclassing `Executor` and saying, in `_start`, how a call gets to where it
runs. Everything else is here, the same for all of them: options, futures as arguments, `map`,
`completed`, cancelling, what happens on Ctrl-C. A complete executor of one thread per call:

    class ThreadPerCallExecutor(Executor):
        def _start(self, call):
            threading.Thread(target=call.run).start()
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Self, TypeVar

from fractal_runner.errors import JobExecutionError
from fractal_runner.executors.account import Calls
from fractal_runner.executors.arguments import Arguments
from fractal_runner.executors.calls import Call, CallFuture, CallOptions, TaskInfo, name_of, running_call
from fractal_runner.executors.mapping import mapped
from fractal_runner.executors.preview import Previewer
from fractal_runner.quantities import parse_count

T = TypeVar("T")

STOPPED = "CANCELLED"  # the `reason` of a call that `stop` has ended
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
    - `unusable(options)` tells beforehand why it cannot work here, for `fractal-runner executors`, and
      `previewer(arguments)` what it would make of calls, for `fractal-runner run --dry-run`.
    - `declines(options)` names what a run need not offer it by itself: a `folder`, a `path_map`.

    Class attributes tell what the executor can do, for its users and for `fractal_runner.testing`:

    Attributes:
        asynchronous: `submit` returns before the work is done.
        isolates: a call that dies takes no other one with it.
        kills: a call that runs can be ended, by `stop` and by its `timeout`.
        is_remote: calls may run on other machines than this one.
        in_process: calls run in this very process.
        packs: calls are put together: the more of them it sees at a time, the better.
        max_workers: how many calls run at a time.
        name: what it is called in logs.
        python_only: arguments of the constructor that no configuration can give, besides `context`.

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
    packs: bool = False
    python_only: ClassVar[Collection[str]] = ()

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
        self._calls = Calls()
        self._pid = os.getpid()

    @classmethod
    def unusable(cls, options: Mapping[str, Any]) -> str | None:
        """Why an executor of this class cannot work here, as far as that is seen without making one.

        Args:
            options: what its constructor would be given.

        Returns:
            The reason, which says what would help; None if nothing is known against it.
        """
        return None

    @classmethod
    def declines(cls, options: Mapping[str, Any]) -> Collection[str]:
        """Which of its arguments are of no use to it beside these, though it would take them.

        Args:
            options: what its constructor is given.
        """
        return ()

    @classmethod
    def previewer(cls, arguments: Mapping[str, Any]) -> Previewer | None:
        """What tells what an executor of this class would make of some calls, without doing any of it.

        Args:
            arguments: what its constructor would be given.

        Returns:
            It; None if that is known only once there is such an executor.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        return None

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
        chosen = self._options.replaced(**options)
        self._check_options(chosen)
        return View(self, chosen)

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
        named = self._options.replaced(name=self._options.name or name_of(fn))

        def submit(called: Callable[..., Any], row: tuple[Any, ...], index: int) -> Future[Any]:
            return self._submit(named.replaced(map_index=index), called, row, {})

        return mapped(submit, fn, iterables, timeout=timeout, chunksize=chunksize, buffersize=buffersize)

    async def run(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Submit, and await the result. If the awaiting task is cancelled, the call is stopped."""
        import asyncio  # takes longer to load than all the rest; who awaits has loaded it

        future = self.submit(fn, *args, **kwargs)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.stop(future)
            raise

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
        call = running_call()
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
        parent = running_call()
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
            Arguments(call, self._start_safely).wait()
        else:
            self._start_safely(call)
        return future

    def _start_safely(self, call: Call) -> None:
        try:
            self._start(call)
        except BaseException as error:  # a Ctrl-C here, too, must not leave a future without an end
            call.fail(error)
            if not isinstance(error, Exception):
                raise


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
        self.packs = executor.packs

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
        chosen = self._options.replaced(**options)
        self._executor._check_options(chosen)
        return View(self._executor, chosen)

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        view, reduced = self._executor.fitting(**options)
        fitted = {name: getattr(view._options, name) for name in options}
        return View(self._executor, replace(self._options, **fitted)), reduced

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


def at_least_one(max_workers: int) -> int:
    """Check a number of workers.

    Raises:
        ValueError: if it is not a positive whole number.
    """
    try:
        return parse_count(max_workers)
    except ValueError:
        raise ValueError(
            f"max_workers must be greater than 0 and a whole number, not {max_workers!r}"
        ) from None


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
