"""The local executors: their names, what they can do, and what they are made of."""

from __future__ import annotations

import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fractal_runner.executors.base import Executor, View, at_least_one
from fractal_runner.executors.calls import Call, CallOptions, TaskInfo
from fractal_runner.executors.cpus import usable_cpus
from fractal_runner.executors.leaving import close_when_gone, wait_at_exit
from fractal_runner.executors.local.dispatcher import Budget, Dispatcher, Worker
from fractal_runner.executors.local.monitor import Monitor
from fractal_runner.executors.local.workers import (
    ForkWorker,
    KeptProcessWorker,
    SpawnWorker,
    Surroundings,
    ThreadWorker,
    fresh_processes,
)
from fractal_runner.executors.preview import Preview, Previewer
from fractal_runner.executors.slots import SlotPool
from fractal_runner.quantities import format_size, optional, parse_count, parse_size, parse_time


class SerialExecutor(Executor):
    """Runs each call in the thread that submits it, then and there: for debugging.

    Args:
        max_workers: taken so that it can stand in for the others; there is one worker.
        context: a mapping that calls read with `current_context()`: the object itself.
        name: what it is called in logs.
    """

    asynchronous = False
    in_process = True

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        context: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if max_workers is not None:
            at_least_one(max_workers)
        super().__init__(max_workers=1, name=name, context=context)

    @classmethod
    def previewer(cls, arguments: Mapping[str, Any]) -> Previewer:
        made = cls(**arguments)
        return lambda count, wanted: _preview(count, 1, made.options(**wanted)._options, [])

    def _start(self, call: Call) -> None:
        thread = threading.current_thread()
        before, thread.name = thread.name, call.name
        try:
            if call.begin():
                call.succeed(call.returned())
        except BaseException as error:  # whatever it is, it is the call's
            call.fail(error)
            if isinstance(error, KeyboardInterrupt):
                raise  # Ctrl-C is the caller's, whose thread this is
        finally:
            thread.name = before


class LocalExecutor(Executor):
    """What the executors of slots and workers on this machine have in common.

    Args:
        max_workers: how many calls run at a time; by default, as many as this process may use CPUs.
        max_cpus: how many CPUs they may keep busy together; by default those that this process may use,
            and no fewer than there are workers.
        max_memory: how much memory they may need together ("16GB", a number of MB); no bound by default.
        context: a mapping that calls read with `current_context()`.
        slots: places shared with other executors: each call that runs takes one.
        idle_timeout: seconds after which a worker without work ends; None for never.
        name: what it is called in logs.

    Raises:
        ValueError: if an argument is not what it should be.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        max_cpus: int | None = None,
        max_memory: int | float | str | None = None,
        context: Mapping[str, Any] | None = None,
        slots: SlotPool | None = None,
        idle_timeout: float | str | None = 60.0,
        name: str | None = None,
    ) -> None:
        workers = usable_cpus() if max_workers is None else at_least_one(max_workers)
        super().__init__(max_workers=workers, name=name, context=context)
        self._budget = Budget(
            cpus=optional("max_cpus", parse_count, max_cpus) or max(usable_cpus(), workers),
            memory=optional("max_memory", parse_size, max_memory),
        )
        self._dispatcher = Dispatcher(
            self._maker(Surroundings(self._context, slots)),
            max_workers=workers,
            budget=self._budget,
            places=slots,
            idle_timeout=optional("idle_timeout", parse_time, idle_timeout),
            name=self.name,
        )
        self._monitor = Monitor()
        self._offered = slots if self.in_process else None
        if self._offered is not None:
            self._offered.offer()
        wait_at_exit(self._dispatcher)
        close_when_gone(self, self._dispatcher)

    @property
    def max_cpus(self) -> int:
        """CPUs that calls may keep busy together."""
        return self._budget.cpus

    @property
    def max_memory(self) -> int | None:
        """Bytes that calls may need together."""
        return self._budget.memory

    @classmethod
    def previewer(cls, arguments: Mapping[str, Any]) -> Previewer:
        made = cls(**arguments)  # which has no worker before its first call
        return made._previewed

    def _previewed(self, count: int, wanted: Mapping[str, Any]) -> Preview:
        view, reduced = self.fitting(**wanted)
        options = view._options
        slots = min(self.max_workers, self.max_cpus // options.cpus)
        if self.max_memory is not None and options.memory:
            slots = min(slots, self.max_memory // options.memory)
        return _preview(count, slots, options, reduced)

    def fitting(self, **options: Any) -> tuple[Executor, list[str]]:
        wanted = self._options.replaced(**options)
        reduced = []
        if wanted.cpus > self._budget.cpus:
            reduced.append(f"{wanted.cpus} CPUs are more than the {self._budget.cpus} of {self.name}")
            options["cpus"] = self._budget.cpus
        memory = self._budget.memory
        if memory is not None and (wanted.memory or 0) > memory:
            asked = format_size(wanted.memory or 0)
            reduced.append(f"{asked} of memory are more than the {format_size(memory)} of {self.name}")
            options["memory"] = f"{memory}B"
        return View(self, self._options.replaced(**options)), reduced

    def _check_options(self, options: CallOptions) -> None:
        if options.cpus > self._budget.cpus:
            raise ValueError(f"cpus={options.cpus} exceeds max_cpus={self._budget.cpus} of {self.name}")
        memory = self._budget.memory
        if memory is not None and (options.memory or 0) > memory:
            raise ValueError(
                f"memory={format_size(options.memory or 0)} exceeds max_memory={format_size(memory)} "
                f"of {self.name}"
            )

    @staticmethod
    @abstractmethod
    def _maker(surroundings: Surroundings) -> Callable[[Dispatcher], Worker]:
        """What makes the worker of a new slot; it must not refer to the executor."""

    def _start(self, call: Call) -> None:
        self._dispatcher.put(call)

    def _stop(self, calls: Sequence[Call]) -> None:
        for call, slot in self._dispatcher.slots_of(calls):
            slot.worker.stop(call)

    def _close(self, wait: bool) -> None:
        self._dispatcher.close(wait)
        offered, self._offered = self._offered, None
        if offered is not None:
            offered.withdraw()

    def tasks(self) -> list[TaskInfo]:
        left = self._monitor.infos(self._dispatcher.left_running(), "left running")
        return super().tasks() + left

    def _infos(self, calls: Sequence[Call]) -> list[TaskInfo]:
        return self._monitor.infos(self._dispatcher.slots_of(calls), "running")


class ThreadExecutor(LocalExecutor):
    """Runs calls in threads of this process, which share all of its memory.

    What runs in a thread cannot be ended: past its `timeout`, and after `stop`, its future ends and the
    thread is left to itself, which `tasks` shows. Arguments: see `LocalExecutor`.
    """

    in_process = True

    @staticmethod
    def _maker(surroundings: Surroundings) -> Callable[[Dispatcher], Worker]:
        return lambda dispatcher: ThreadWorker(dispatcher.abandon)

    def _stop(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._dispatcher.abandon(call)


class ProcessExecutor(LocalExecutor):
    """Runs calls in processes that are kept for the next call; a fresh interpreter each, by loky.

    A process has a copy of `context` as of the process's start; functions and arguments travel by pickle,
    those that it cannot do by cloudpickle. A process that dies takes its own call with it, and no other.
    Arguments: see `LocalExecutor`.
    """

    isolates = True
    kills = True
    keeps_workers = True

    @staticmethod
    def _maker(surroundings: Surroundings) -> Callable[[Dispatcher], Worker]:
        fresh_processes()  # once the interpreter ends, nothing can be loaded any more
        return lambda dispatcher: KeptProcessWorker(surroundings)


class SpawnExecutor(LocalExecutor):
    """Runs each call in a fresh interpreter: nothing of one call is left for the next.

    Arguments: see `LocalExecutor`.
    """

    isolates = True
    kills = True

    @staticmethod
    def _maker(surroundings: Surroundings) -> Callable[[Dispatcher], Worker]:
        fresh_processes()
        return lambda dispatcher: SpawnWorker(surroundings)


class ForkExecutor(LocalExecutor):
    """Runs each call in a fork of this process: it sees all memory as of the call's start.

    Nothing needs to be pickled but results. The usual care with forks applies: a lock that another
    thread of this process holds at that moment stays locked in the child. A child that does not get
    going for it is replaced once; one that meets such a lock later is ended by its `timeout`. Linux
    only. Arguments: see `LocalExecutor`.
    """

    isolates = True
    kills = True

    @classmethod
    def unusable(cls, options: Mapping[str, Any]) -> str | None:
        if hasattr(os, "pidfd_open"):
            return None
        return f"ForkExecutor needs Linux 5.3 or newer, and this is {sys.platform}: take SpawnExecutor"

    @staticmethod
    def _maker(surroundings: Surroundings) -> Callable[[Dispatcher], Worker]:
        if problem := ForkExecutor.unusable({}):
            raise NotImplementedError(problem)
        return lambda dispatcher: ForkWorker(surroundings)


def _preview(count: int, slots: int, options: CallOptions, reduced: Sequence[str]) -> Preview:
    return Preview(
        calls=count,
        slots=slots,
        cpus=options.cpus,
        memory=options.memory,
        gpus=options.gpus,
        reduced=tuple(reduced),
    )
