"""Executors by name, and whatever else a caller may give in place of one.

The one door through which the workflow layer gets its executors: it knows who made each of them, and so
who shuts it down.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from fractal_runner.errors import did_you_mean
from fractal_runner.executors.cpus import usable_cpus

ExecutorChoice = Executor | type[Executor] | str | tuple[str, Mapping[str, Any]] | None
DEFAULT = "thread"


def _thread(*, max_workers: int | None = None) -> Executor:
    return ThreadPoolExecutor(_workers(max_workers), thread_name_prefix="fractal-worker")


def _process(*, max_workers: int | None = None) -> Executor:
    # Not by plain fork: this process has threads, whose locks a forked child would find locked.
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    return ProcessPoolExecutor(_workers(max_workers), mp_context=context)


_FACTORIES: dict[str, Callable[..., Executor]] = {"process": _process, "thread": _thread}


def names() -> list[str]:
    """The names of the executors that there are."""
    return sorted(_FACTORIES)


def check(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Whether `make` would take this name and these options, without making anything.

    Raises:
        ValueError: if the name or an option is unknown, naming the nearest known one.
    """
    if name not in _FACTORIES:
        raise ValueError(f"unknown executor {name!r}: {did_you_mean(name, _FACTORIES)}")
    known = list(inspect.signature(_FACTORIES[name]).parameters)
    for option in options or ():
        if option not in known:
            raise ValueError(f"unknown option {option!r} of executor {name!r}: {did_you_mean(option, known)}")


def make(name: str, options: Mapping[str, Any] | None = None) -> Executor:
    """A new executor.

    Args:
        name: its registered name.
        options: what its constructor takes.

    Raises:
        ValueError: if the name, an option or an option's value is not valid.
    """
    check(name, options)
    return _FACTORIES[name](**(options or {}))


class Executors:
    """The executors of one run: the default one, and others that its tasks name, made on first use.

    What the caller made stays the caller's; what was made here ends with `close`. `_lock` guards `_made`.
    """

    def __init__(self, choice: ExecutorChoice) -> None:
        self._lock = threading.Lock()
        self._made: dict[str, Executor] = {}
        self._given: Executor | None = None
        self._factory: Callable[[], Executor] | None = None
        if choice is None:
            choice = DEFAULT
        self._options: dict[str, Any]
        if isinstance(choice, str):
            self.default, self._options = choice, {}
            check(choice)
        elif isinstance(choice, tuple):
            self.default, self._options = choice[0], dict(choice[1])
            check(self.default, self._options)
        else:
            self.default, self._options = getattr(choice, "__name__", type(choice).__name__), {}
            if isinstance(choice, type) and issubclass(choice, Executor):
                self._factory = choice
            elif isinstance(choice, Executor):
                self._given = choice
            else:
                raise TypeError(
                    f"executor={choice!r} is neither an executor, an executor class, nor a name "
                    f"({', '.join(names())})"
                )

    def check(self, name: str | None) -> None:
        """Whether `get` will find this name.

        Raises:
            ValueError: if not, naming the nearest known one.
        """
        if name is not None and name != self.default:
            check(name)

    def get(self, name: str | None = None) -> Executor:
        """The executor of this name; the run's own for None."""
        with self._lock:
            if name is None or name == self.default:
                if self._given is not None:
                    return self._given
                name = self.default
            if name not in self._made:
                if name == self.default and self._factory is not None:
                    self._made[name] = self._factory()
                else:
                    self._made[name] = make(name, self._options if name == self.default else None)
            return self._made[name]

    def is_local(self, name: str | None = None) -> bool:
        """Whether calls surely run on this machine, seeing this file system and this PATH."""
        executor = self.get(name)
        if isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor)):
            return True
        return getattr(executor, "is_remote", True) is False

    def shares_process(self, name: str | None = None) -> bool:
        """Whether calls surely run in threads of this process."""
        return isinstance(self.get(name), ThreadPoolExecutor)

    def takes_back(self, name: str | None = None) -> bool:
        """Whether calls that have not started can be cancelled one by one.

        The standard library's process pool stops serving its other futures if a worker dies after one of
        them was cancelled (its `terminate_broken` meets a future that has ended). Units that are told to
        stop end as soon as they start, so nothing is lost by leaving them there.
        """
        return not isinstance(self.get(name), ProcessPoolExecutor)

    def worker_count(self, name: str | None = None) -> int | None:
        """How many calls run at a time, where the executor tells."""
        executor = self.get(name)
        # The standard library's pools know it under a private name.
        count: object = getattr(executor, "max_workers", getattr(executor, "_max_workers", None))
        return count if isinstance(count, int) else None

    def close(self, *, wait: bool = True) -> None:
        """Shut down what was made here, the last one first.

        Args:
            wait: False to leave calls behind that cannot be ended.
        """
        with self._lock:
            made, self._made = self._made, {}
        for executor in reversed(made.values()):
            executor.shutdown(wait=wait, cancel_futures=True)


def _workers(given: object) -> int:
    if given is None:
        return usable_cpus()
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"max_workers={given!r} is not a whole number of at least 1")
    return given
