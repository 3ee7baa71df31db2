"""Executors by name, and whatever else a caller may give in place of one.

The one door through which the workflow layer gets its executors: it knows who made each of them, and so
who shuts it down; and what can be asked of executors that are not ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fractal_runner.config import RESERVED, Config, UnitLayer
from fractal_runner.executors import base, factories, sessions
from fractal_runner.executors.cpus import thread_variables
from fractal_runner.executors.factories import (
    check,
    check_options,
    factory_of,
    is_known,
    is_told,
    make,
    missing_of,
    name_of,
    names,
    taken_of,
)
from fractal_runner.executors.sessions import Session

if TYPE_CHECKING:
    from fractal_runner.executors.calls import TaskInfo
    from fractal_runner.executors.preview import Preview, Previewer

T = TypeVar("T")
ExecutorChoice = Executor | type[Executor] | str | tuple[str, Mapping[str, Any]] | None
DEFAULT = "thread"

JOBS_DIR = "jobs"  # in the run's directory
SESSION_DIR = "fractal_jobs"  # in the current one, for what no run has asked for

_DISCARD_S = 30.0


def configuration() -> Config:
    """The configuration of calls from Python: the open session's, or that of the current directory.

    Raises:
        InputFileError: naming every mistake, with its file, line and key.
    """
    if (session := sessions.current()) is not None:
        return session.config
    from fractal_runner.executors import sections

    return sections.load()


def session(**overrides: Any) -> Session:
    """Executors by name, made on first use and shut down together: `with session() as s: s["slurm"]`.

    As long as it is open, `process_workflow` takes its executors, and leaves them open.

    Args:
        overrides: what counts over the configuration: `executor`, `defaults` and `resource_classes`, as they
            are in a file; and for executors, by name, arguments of their constructors. An executor that keeps
            files keeps them in `fractal_jobs` of the current directory, unless its `folder` is given.

    Raises:
        InputFileError, ValueError: naming every mistake of the configuration, or what is wrong with an
            override.
    """
    from fractal_runner.executors import sections

    own = {key: value for key, value in overrides.items() if key in RESERVED}
    given = {name: options for name, options in overrides.items() if name not in RESERVED}
    for name, options in given.items():
        if not isinstance(options, Mapping):
            factory_of(name)
            raise TypeError(f"session({name}={options!r}): a mapping of its constructor's arguments is right")
        check_options(name, options)
    config = sections.load(overrides=own)
    folder = Path.cwd() / SESSION_DIR

    def arguments(name: str) -> dict[str, Any]:
        return _arguments(name, config, given.get(name, {}), {"folder": folder / name})

    return Session(
        config,
        lambda name: _make(name, arguments(name), config, given.get(name, {})),
        starts=is_told,
        given=given,
        arguments=arguments,
    )


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

    What the caller made stays the caller's, also by opening a session: its executors are taken, but for
    those that the run was given options of its own for. What was made here ends with `close`.

    Args:
        choice: the default one; None for what the configuration says.
        config: what it says of executors that are made here; None if there is none.
        directory: the run's. An executor that is made here, and takes a `folder` that it was not given, has
            one below it: the same whenever the run is resumed, so that it finds what it has submitted.
        directory_seen_as: the same directory, as the workers see it; None if they see it as we do. It is
            the `path_map` of an executor that takes one and was given none.
    """

    def __init__(
        self,
        choice: ExecutorChoice,
        *,
        config: Config | None = None,
        directory: str | os.PathLike[str] | None = None,
        directory_seen_as: str | os.PathLike[str] | None = None,
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._seen_as = None if directory_seen_as is None else os.fspath(directory_seen_as)
        self._config = config if config is not None else Config.empty()
        self._session = Session(self._config, self._make, starts=is_told)
        self._around = sessions.current()
        self._given: Executor | None = None
        self._class: type[Executor] | None = None
        self._options: dict[str, Any] = {}
        self._previewers: dict[str, Previewer | None] = {}
        if choice is None:
            choice = self._config.executor
        if isinstance(choice, str):
            self.default = choice
            check(choice)
        elif isinstance(choice, tuple):
            self.default, self._options = choice[0], dict(choice[1])
            check(self.default, self._options)
        else:
            self.default = name_of(choice if isinstance(choice, type) else type(choice))
            if isinstance(choice, type) and issubclass(choice, Executor):
                self._class = choice
            elif isinstance(choice, Executor):
                self._given = choice
            else:
                raise TypeError(
                    f"executor={choice!r} is neither an executor, an executor class, nor a name "
                    f"({', '.join(names())})"
                )

    @property
    def by_name(self) -> tuple[str, Mapping[str, Any]] | None:
        """The name of the default one and what its constructor is given, if it was chosen by name.

        What is given because of where the run is, is not told: it is the same in a resume. That of a session
        is not, so it is told.
        """
        if self._given is not None or self._class is not None:
            return None
        if self._around is not None and not self._options:
            return self.default, self._around.arguments(self.default)
        return self.default, self._config.options(self.default, self._options)

    def unit_layers(self, task: Mapping[str, Any], workflow_task: Mapping[str, Any]) -> Iterable[UnitLayer]:
        """All that is said of what a unit needs, the later over the earlier; see `Config.unit_layers`.

        Args:
            task: the task's meta.
            workflow_task: the workflow task's meta.

        Raises:
            ValueError: if one of them names a resource class that there is not.
        """
        made_here = self._given is None
        return self._config.unit_layers(
            task, workflow_task, executor=self.default if made_here else None, given=self._said_of_default()
        )

    def _said_of_default(self) -> Mapping[str, Any]:
        """Arguments of the default one that were given in Python."""
        around = {} if self._around is None else self._around.given
        return self._options or around.get(self.default, {})

    def check(self, name: str | None) -> None:
        """Whether `get` will find this name.

        Raises:
            ValueError: if not, naming the nearest known one.
        """
        if name is not None and name != self.default:
            check(name)

    def get(self, name: str | None = None) -> Executor:
        """The executor of this name; the run's own for None."""
        if name is None or name == self.default:
            if self._given is not None:
                return self._given
            if self._class is not None or self._options:
                return self._session[self.default]
            name = self.default
        return (self._around if self._around is not None else self._session)[name]

    def preview(
        self,
        count: int,
        name: str | None = None,
        *,
        cpus: int | None = None,
        memory: int | None = None,
        extra: Mapping[str, Any] | None = None,
        **resources: Any,
    ) -> Preview | None:
        """What an executor that is made here makes of calls like those of `submitter`; nothing is done.

        Args:
            count: how many calls.
            name, cpus, memory, extra, resources: see `submitter`.

        Returns:
            It; None if that is known only once there is such an executor.

        Raises:
            InputFileError, ValueError, TypeError, ImportError: if it could not be made, or would refuse them.
        """
        name = self.default if name is None else name
        if name not in self._previewers:
            given = self._options if name == self.default else {}
            arguments = _arguments(name, self._config, given, self._offered(name))
            self._previewers[name] = _made(factories.previewer, name, arguments, self._config, given)
        previewer = self._previewers[name]
        wanted = _asked(resources, cpus, memory) | ({"extra": dict(extra)} if extra else {})
        return None if previewer is None else previewer(count, wanted)

    def unusable(self, name: str) -> str | None:
        """Why the executor of this name cannot be used here; None if nothing is known against it.

        Raises:
            ValueError: if the name is unknown.
        """
        given = self._options if name == self.default else {}
        return factories.unusable(name, self._config.options(name, given))

    def _offered(self, name: str) -> dict[str, Any]:
        """What executors that are made here are given if they can use it, because of where the run is."""
        offered: dict[str, Any] = {}
        if self._directory is not None:
            offered["folder"] = self._directory / JOBS_DIR / name
            if self._seen_as is not None:
                offered["path_map"] = {str(self._directory): self._seen_as}
        return offered

    def _make(self, name: str) -> Executor:
        offered = self._offered(name)
        if name == self.default and self._class is not None and not is_known(self._class, name):
            return self._class(**taken_of(self._class, offered, {}))
        given = self._options if name == self.default else {}
        return _make(name, _arguments(name, self._config, given, offered), self._config, given)

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

    def keeps_workers(self, name: str | None = None) -> bool:
        """Whether calls surely come to the same few threads or processes of this machine."""
        executor = self.get(name)
        kept = isinstance(executor, ProcessPoolExecutor) or getattr(executor, "keeps_workers", False) is True
        return kept or self.shares_process(name)

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
        asked = _asked(resources, cpus, memory)
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
        self._session.close(wait=wait, cancel_futures=True)


def _asked(resources: Mapping[str, Any], cpus: int | None, memory: int | None) -> dict[str, Any]:
    """The options that say what a call needs, without those that say nothing."""
    asked = {**resources, "cpus": cpus, "memory": None if memory is None else f"{memory}B"}
    return {option: value for option, value in asked.items() if value is not None}


def _arguments(
    name: str, config: Config, given: Mapping[str, Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """What an executor's constructor is given.

    Args:
        name: its name.
        config: the configuration.
        given: arguments that count over it.
        offered: arguments that it has if it takes them, and nobody says anything else.
    """
    said = config.options(name, given)
    return {**taken_of(factory_of(name), offered, said), **said}


def _make(name: str, arguments: Mapping[str, Any], config: Config, given: Mapping[str, Any]) -> Executor:
    """An executor as a configuration has it; see `_made`."""
    return _made(make, name, arguments, config, given)


def _made(
    maker: Callable[[str, Mapping[str, Any]], T],
    name: str,
    arguments: Mapping[str, Any],
    config: Config,
    given: Mapping[str, Any],
) -> T:
    """What somebody makes of an executor's name and the arguments that a configuration has for it.

    Args:
        maker: makes it.
        name: the name.
        arguments: what its constructor is given.
        config: the configuration, which has said some of that.
        given: what of it counts over the configuration.

    Raises:
        InputFileError: if its constructor refuses what the configuration says, naming where that is written.
        ValueError, TypeError, ImportError: as `make`.
    """
    if missing := missing_of(factory_of(name), arguments):
        raise ValueError(
            f"the executor {name!r} needs {' and '.join(map(repr, missing))}: the configuration says it as "
            f"{' and '.join(f'{name}.{argument}' for argument in missing)}"
        )
    try:
        return maker(name, arguments)
    except (TypeError, ValueError) as error:
        if _is_about(error, config.options(name).keys() - given.keys(), given):
            raise config.blame(name, error) from error
        raise


def _is_about(error: Exception, said: Collection[str], given: Collection[str]) -> bool:
    """Whether an error is rather about what a configuration has said than about what was given."""
    words = set(re.findall(r"\w+", str(error)))
    return bool(said) and (bool(words & set(said)) or not words & set(given))


def _with_exclusions(extra: dict[str, Any], avoid: tuple[str, ...]) -> dict[str, Any]:
    """A scheduler's options whose `exclude`, text or a list, names these nodes as well."""
    if not avoid:
        return extra
    excluded = extra.get("exclude") or []
    names = [excluded] if isinstance(excluded, str) else list(excluded)
    return {**extra, "exclude": ",".join([*names, *(node for node in avoid if node not in names)])}
