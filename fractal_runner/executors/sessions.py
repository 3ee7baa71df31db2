"""Sessions: named executors that are made on first use, once, and shut down together.

A run has one of its own for what its tasks name; a caller opens one to keep executors over several runs, or
to use them directly. Who makes an executor of a name, the registry says.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Self

from fractal_runner.config import Config

Make = Callable[[str], Executor]

_logger = logging.getLogger("fractal_runner")


class Session:
    """Named executors, each made when it is first asked for, and all shut down at the end.

    `session["slurm"]` gives the executor of this name, from any thread. An executor that a package or
    `register` offers, and that has a method `start`, is told `start(session)` once before its first use; it
    may take other executors from the session, which are shut down after it.

    `_lock` guards `_made`, `_being_made` and `_closed`. It is held while an executor is made, so that nobody
    makes it twice; who finds it made does not wait.

    Args:
        config: the configuration of its executors.
        make: makes an executor of a name.
        starts: whether an executor of this name is told when it starts.
        given: arguments of executors that `make` takes over those of the configuration, by name.
        arguments: all arguments that `make` gives the executor of a name.

    Attributes:
        config, given, arguments: as above.
        is_open: whether it still gives executors.
    """

    def __init__(
        self,
        config: Config,
        make: Make,
        *,
        starts: Callable[[str], bool],
        given: Mapping[str, Mapping[str, Any]] | None = None,
        arguments: Callable[[str], Mapping[str, Any]] | None = None,
    ) -> None:
        self.config = config
        self.given: Mapping[str, Mapping[str, Any]] = given or {}
        self.arguments = arguments or config.options
        self.is_open = True
        self._make = make
        self._starts = starts
        self._lock = threading.RLock()
        self._made: dict[str, Executor] = {}
        self._being_made: list[str] = []
        self._around: Session | None = None
        self._token: Token[Session | None] | None = None

    def __getitem__(self, name: str) -> Executor:
        """The executor of this name; made now, if it is not yet.

        Raises:
            ValueError: if the name, or what the configuration says of it, is not valid.
            RuntimeError: after the end of the session, or if the executor's own start asks for it.
            TypeError: if what was made is no executor.
        """
        if (known := self._made.get(name)) is not None and self.is_open:
            return known
        with self._lock:
            if not self.is_open:
                raise RuntimeError(f"the session has ended: it gives no executor {name!r} any more")
            if name not in self._made:
                self._made[name] = self._fresh(name)
            return self._made[name]

    def names(self) -> list[str]:
        """The names of the executors that have been made, in the order in which they were."""
        return list(self._made)

    def close(self, *, wait: bool = True, cancel_futures: bool = False) -> None:
        """Shut down what was made, the last one first. One that fails to is logged; the others go on.

        Args:
            wait: return only when their calls have ended.
            cancel_futures: cancel what has not started.
        """
        self._end(lambda executor: executor.shutdown(wait=wait, cancel_futures=cancel_futures))

    def __enter__(self) -> Self:
        """Open it for this context.

        Raises:
            RuntimeError: if it has been entered already, or has ended: a session is opened once.
        """
        with self._lock:
            if not self.is_open:
                raise RuntimeError("the session has ended: open a new one, by session()")
            if self._token is not None:  # else it would be around itself, and `current` would find no end
                raise RuntimeError("the session is open already: use it as it is, or open another inside it")
            self._around = current()
            self._token = _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Shut down, waiting, as leaving each executor's own `with` block would."""
        if self._token is not None:
            with suppress(ValueError):  # left in another context: there it is found to be closed
                _current.reset(self._token)
            self._token = None
        self._end(lambda executor: executor.__exit__(kind, error, traceback))

    def _fresh(self, name: str) -> Executor:
        if name in self._being_made:
            way = " → ".join([*self._being_made, name])
            raise RuntimeError(f"the executor {name!r} cannot be started: its own start asks for it ({way})")
        self._being_made.append(name)
        try:
            executor = self._make(name)
            start = getattr(executor, "start", None) if self._starts(name) else None
            if start is not None:
                try:
                    start(self)
                    if not self.is_open:
                        raise RuntimeError(f"the start of the executor {name!r} has ended the session")
                except BaseException:  # whatever it is: nobody else will shut it down
                    self._shut_down(name, executor, lambda one: one.shutdown(wait=False))
                    raise
            return executor
        finally:
            self._being_made.pop()

    def _end(self, shut_down: Callable[[Executor], object]) -> None:
        with self._lock:
            made, self._made = self._made, {}
            self.is_open = False
        interrupted: BaseException | None = None
        for name, executor in reversed(made.items()):
            try:
                self._shut_down(name, executor, shut_down)
            except BaseException as error:  # a Ctrl-C: the others are shut down all the same
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _shut_down(self, name: str, executor: Executor, how: Callable[[Executor], object]) -> None:
        try:
            how(executor)
        except Exception:  # of anybody's executor: it must hide neither what happened before nor the others
            _logger.exception("the executor %r could not be shut down", name)


def current() -> Session | None:
    """The innermost session that is open here, if there is one: in this context, as of `contextvars`."""
    found = _current.get()
    while found is not None and not found.is_open:
        found = found._around
    return found


_current: ContextVar[Session | None] = ContextVar("fractal_runner.session", default=None)
