"""Executors by name, and whatever else a caller may give in place of one.

The one door through which the workflow layer gets its executors: it knows who made each of them, and so
who shuts it down; and what can be asked of executors that are not ours.
"""

from __future__ import annotations

import importlib
import inspect
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args, get_origin, get_type_hints

from fractal_runner.errors import did_you_mean
from fractal_runner.executors import base
from fractal_runner.executors.cpus import thread_variables

if TYPE_CHECKING:
    from fractal_runner.executors.calls import TaskInfo

ExecutorChoice = Executor | type[Executor] | str | tuple[str, Mapping[str, Any]] | None
DEFAULT = "thread"

JOBS_DIR = "jobs"  # in the run's directory

_DISCARD_S = 30.0

_LOCAL = "fractal_runner.executors.local.executors"
# By place, not by class: a name costs its import only where it is used.
_PLACES = {
    "fork": f"{_LOCAL}:ForkExecutor",
    "lsf": "fractal_runner.executors.batch.lsf:LsfExecutor",
    "process": f"{_LOCAL}:ProcessExecutor",
    "serial": f"{_LOCAL}:SerialExecutor",
    "slurm": "fractal_runner.executors.batch.slurm:SlurmExecutor",
    "spawn": f"{_LOCAL}:SpawnExecutor",
    "thread": f"{_LOCAL}:ThreadExecutor",
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# What a configuration or a command line cannot give.
_NOT_BY_NAME = frozenset({"context", "slots"})


def names() -> list[str]:
    """The names of the executors that there are."""
    return sorted(_PLACES)


def class_of(name: str) -> type[base.Executor]:
    """The class that bears this name.

    Raises:
        ValueError: if the name is unknown, naming the nearest known one.
    """
    if name not in _PLACES:
        raise ValueError(f"unknown executor {name!r}: {did_you_mean(name, _PLACES)}")
    module, _, attribute = _PLACES[name].partition(":")
    found: type[base.Executor] = getattr(importlib.import_module(module), attribute)
    return found


def check(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Whether `make` would know this name and these options, without making anything.

    Raises:
        ValueError: if the name or an option is unknown, naming the nearest known one.
    """
    chosen = class_of(name)
    known = [option for option in _parameters(chosen) if option not in _NOT_BY_NAME]
    others: Mapping[str, str] = getattr(chosen, "other_words", {})
    for option in options or ():
        if option not in known:
            hint = f"it is {others[option]!r}" if option in others else did_you_mean(option, known)
            raise ValueError(f"unknown option {option!r} of executor {name!r}: {hint}")


def make(name: str, options: Mapping[str, Any] | None = None) -> Executor:
    """A new executor.

    Args:
        name: its registered name.
        options: what its constructor takes.

    Raises:
        ValueError: if the name, an option or an option's value is not valid.
    """
    check(name, options)
    return class_of(name)(**(options or {}))


def by_name(choice: ExecutorChoice) -> tuple[str, Mapping[str, Any]] | None:
    """The name and options of an executor that was chosen by its name, or not at all; else None."""
    if choice is None:
        return DEFAULT, {}
    if isinstance(choice, str):
        return choice, {}
    return choice if isinstance(choice, tuple) else None


@dataclass(frozen=True, slots=True)
class Submitter:
    """Submits calls that ask for the same resources.

    Attributes:
        submit: takes the call's name and key, its function and its one argument.
        reduced: a sentence for each resource that was more than the executor has, and was reduced.
        environment: what a command that such a call starts needs in its environment.
    """

    submit: Callable[[str, str, Callable[[Any], Any], Any], Future[Any]]
    reduced: list[str]
    environment: dict[str, str]


class Executors:
    """The executors of one run: the default one, and others that its tasks name, made on first use.

    What the caller made stays the caller's; what was made here ends with `close`. `_lock` guards `_made`.

    Args:
        choice: the default one.
        directory: the run's. An executor that is made here, and takes a `folder` that it was not given, has
            one below it: the same whenever the run is resumed, so that it finds what it has submitted.
        directory_seen_as: the same directory, as the workers see it; None if they see it as we do. It is
            the `path_map` of an executor that takes one and was given none.
    """

    def __init__(
        self,
        choice: ExecutorChoice,
        *,
        directory: str | os.PathLike[str] | None = None,
        directory_seen_as: str | os.PathLike[str] | None = None,
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._seen_as = None if directory_seen_as is None else os.fspath(directory_seen_as)
        self._lock = threading.Lock()
        self._made: dict[str, Executor] = {}
        self._given: Executor | None = None
        self._class: type[Executor] | None = None
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
            self.default, self._options = _name_of(choice if isinstance(choice, type) else type(choice)), {}
            if isinstance(choice, type) and issubclass(choice, Executor):
                self._class = choice
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
                self._made[name] = self._make(name)
            return self._made[name]

    def _make(self, name: str) -> Executor:
        options = self._options if name == self.default else {}
        if name == self.default and self._class is not None:
            return self._class(**self._offered(self._class, name))
        return make(name, {**self._offered(class_of(name), name), **options})

    def _offered(self, chosen: type[Executor], name: str) -> dict[str, Any]:
        """What this class takes of where the run is."""
        if self._directory is None:
            return {}
        offered: dict[str, Any] = {"folder": self._directory / JOBS_DIR / name}
        if self._seen_as is not None:
            offered["path_map"] = {str(self._directory): self._seen_as}
        return {option: value for option, value in offered.items() if option in _parameters(chosen)}

    def is_local(self, name: str | None = None) -> bool:
        """Whether calls surely run on this machine, seeing this file system and this PATH."""
        executor = self.get(name)
        if isinstance(executor, (ThreadPoolExecutor, ProcessPoolExecutor)):
            return True
        return getattr(executor, "is_remote", True) is False

    def is_asynchronous(self, name: str | None = None) -> bool:
        """Whether the executor's `submit` returns before the work is done; all do that do not deny it."""
        return getattr(self.get(name), "asynchronous", True) is not False

    def shares_process(self, name: str | None = None) -> bool:
        """Whether calls surely run in threads of this process."""
        executor = self.get(name)
        return isinstance(executor, ThreadPoolExecutor) or getattr(executor, "in_process", False) is True

    def packs(self, name: str | None = None) -> bool:
        """Whether the executor puts calls together, the more of them the better."""
        return getattr(self.get(name), "packs", False) is True

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

    def submitter(
        self,
        name: str | None = None,
        *,
        cpus: int | None = None,
        memory: int | None = None,
        extra: Mapping[str, Any] | None = None,
        avoid: tuple[str, ...] = (),
        **resources: Any,
    ) -> Submitter:
        """How to submit calls that ask for these resources, as far as the executor knows of such.

        Args:
            name: the executor's name; the run's own for None.
            cpus: CPUs; the executor's default for None.
            memory: bytes; the same.
            extra: options of a scheduler, by its own names, over those of the executor.
            avoid: nodes that the calls are to be kept off, where the executor can.
            resources: other `CallOptions`; those that are None are left to the executor.
        """
        executor = self.get(name)
        resources |= {"cpus": cpus, "memory": None if memory is None else f"{memory}B"}
        asked = {option: value for option, value in resources.items() if value is not None}
        # In a process of its own the call finds these set; in a thread, only what it starts can have them.
        environment = thread_variables(cpus or 1) if self.shares_process(name) else {}
        if not isinstance(executor, base.Executor):
            return Submitter(lambda _, __, fn, argument: executor.submit(fn, argument), [], environment)
        if extra or avoid:
            asked["extra"] = _with_exclusions({**executor._options.extra, **(extra or {})}, avoid)
        view, reduced = executor.fitting(**asked)
        return Submitter(view.submit_as, reduced, environment)

    def attach(self, key: str, name: str | None = None) -> Future[Any] | None:
        """The call that an earlier process submitted under this key, if it can be taken on."""
        executor = self.get(name)
        return executor.attach(key) if isinstance(executor, base.Executor) else None

    def discard(self, future: Future[Any], name: str | None = None) -> None:
        """End a call that is not wanted any more, and wait, for a while, for its end."""
        executor = self.get(name)
        if not future.cancel() and isinstance(executor, base.Executor):
            executor.stop(future)
        wait([future], timeout=_DISCARD_S)

    def tasks(self, name: str | None = None) -> list[TaskInfo]:
        """What the executor tells of its calls; nothing, if it cannot."""
        executor = self.get(name)
        return executor.tasks() if isinstance(executor, base.Executor) else []

    def close(self, *, wait: bool = True) -> None:
        """Shut down what was made here, the last one first.

        Args:
            wait: False to leave calls behind that cannot be ended.
        """
        with self._lock:
            made, self._made = self._made, {}
        for executor in reversed(made.values()):
            executor.shutdown(wait=wait, cancel_futures=True)


def _parameters(chosen: type[Executor]) -> Collection[str]:
    """What the constructor takes, by name; also of `**options: Unpack[…]`, what stands there."""
    try:
        parameters = inspect.signature(chosen).parameters
    except ValueError:  # of a class that is not written in Python
        return ()
    taken = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    if len(taken) < len(parameters):
        with suppress(NameError):  # of types that are only there for those who check them
            for parameter in inspect.signature(chosen, eval_str=True).parameters.values():
                if get_origin(parameter.annotation) is Unpack:
                    taken += get_type_hints(get_args(parameter.annotation)[0])
    return taken


def _name_of(chosen: type) -> str:
    """The name that this class is registered by; its own if it is not."""
    place = f"{chosen.__module__}:{chosen.__qualname__}"
    return next((name for name, known in _PLACES.items() if known == place), chosen.__name__)


def _with_exclusions(extra: dict[str, Any], avoid: tuple[str, ...]) -> dict[str, Any]:
    """A scheduler's options whose `exclude`, text or a list, names these nodes as well."""
    if not avoid:
        return extra
    excluded = extra.get("exclude") or []
    names = [excluded] if isinstance(excluded, str) else list(excluded)
    return {**extra, "exclude": ",".join([*names, *(node for node in avoid if node not in names)])}
