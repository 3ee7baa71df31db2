"""Run a unit that is a Python function, in the worker itself.

A function has no process of its own that could be ended. In a worker process it is first asked, by an
exception in its thread, and after the grace time its process is killed; in a thread of the coordinator
it can only be left running, and that is what the result then says.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fractal_runner.worker import processes
from fractal_runner.worker.spec import CANCELLED, TIMEOUT, UnitResult, UnitSpec
from fractal_runner.worker.stop import POLL_S, StopRequest

_loaded: dict[bytes, Callable[..., Any]] = {}
_LOADED_LIMIT = 64


class FunctionRef:
    """A Python function on its way to workers: itself within a process, pickled once to others.

    Args:
        target: the function, or its place as "package.module:name", looked up where it runs.
        dumps: how to pickle it; the sender's choice, as a worker has the standard library only.
    """

    __slots__ = ("_dumps", "_pickled", "target")

    def __init__(
        self, target: Callable[..., Any] | str, dumps: Callable[[Any], bytes] = pickle.dumps
    ) -> None:
        self.target = target
        self._dumps = dumps
        self._pickled: bytes | None = None

    def resolve(self) -> Callable[..., Any]:
        """The function itself.

        Raises:
            ImportError, AttributeError, TypeError: if a named one is not there or cannot be called.
        """
        if not isinstance(self.target, str):
            return self.target
        module, _, name = self.target.partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError(f"{self.target} is not a function but {type(found).__name__}")
        return found  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.target, str):
            return FunctionRef, (self.target,)
        if self._pickled is None:
            self._pickled = self._dumps(self.target)
        return _load, (self._pickled,)


class UnitStopped(BaseException):
    """Raised inside a function whose unit has timed out or whose run was told to stop."""


def call_function(spec: UnitSpec, stop: StopRequest) -> UnitResult:
    """Call the unit's function with its arguments; what it raises is the unit's failure."""
    if not _is_here(spec):
        return _call_guarded(spec, stop)
    if spec.timeout_s is not None:
        return _call_with_deadline(spec, spec.timeout_s)
    return _call(spec)


def _is_here(spec: UnitSpec) -> bool:
    return spec.coordinator == (processes.host_name(), os.getpid())


def _call(spec: UnitSpec) -> UnitResult:
    assert spec.function is not None
    started = time.time()
    cpu = time.thread_time()
    output: Any = None
    code = 0
    tail = ""
    try:
        output = spec.function.resolve()(**_own_copy(spec.args))
    except SystemExit as error:
        code, tail = _exit_code(error)
    except KeyboardInterrupt:
        if _is_here(spec) and threading.current_thread() is threading.main_thread():
            raise  # the caller's own thread: it is the caller who was interrupted
        code, tail = -signal.SIGINT, "KeyboardInterrupt"
    except UnitStopped:
        raise
    except BaseException as error:
        code, tail = 1, _traceback_of(error)
    return UnitResult(
        key=spec.key,
        digest=spec.digest,
        returncode=code,
        signal=processes.signal_name(-code) if code < 0 else None,
        output=output,
        log_tail=tail,
        host=processes.node_name(),
        pid=os.getpid(),
        started=started,
        ended=time.time(),
        cpu_s=time.thread_time() - cpu,
    )


def _call_with_deadline(spec: UnitSpec, timeout_s: float) -> UnitResult:
    """In a thread of the coordinator: wait for the function no longer than it may take."""
    results: list[UnitResult] = []
    started = time.time()
    thread = threading.Thread(
        target=lambda: results.append(_call(spec)), name=f"{spec.key} (may be left running)", daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    if results:
        return results[0]
    return UnitResult(
        key=spec.key,
        digest=spec.digest,
        reason=TIMEOUT,
        message=(
            f"It ran longer than its timeout of {timeout_s:g} s. A function in a thread cannot be ended: "
            "it was left running. Over an executor of processes it would have been."
        ),
        host=processes.node_name(),
        pid=os.getpid(),
        started=started,
        ended=time.time(),
        left_running=True,
    )


def _call_guarded(spec: UnitSpec, stop: StopRequest) -> UnitResult:
    """In a process apart from the coordinator: a watchdog sees to limits and requests to stop."""
    started = time.time()
    guard = _Guard(spec, stop)
    try:
        with _watchdog.over(guard):
            return _call(spec)
    except UnitStopped:
        _watchdog.release(guard)  # the exception may have come while it was being released
        return UnitResult(
            key=spec.key,
            digest=spec.digest,
            returncode=-signal.SIGTERM,
            signal="SIGTERM",
            reason=guard.reason,
            message=guard.message,
            host=processes.node_name(),
            pid=os.getpid(),
            started=started,
            ended=time.time(),
        )


class _Guard:
    """One function call under the watchdog; changed by the watchdog's thread alone."""

    def __init__(self, spec: UnitSpec, stop: StopRequest) -> None:
        self.thread = threading.get_ident()
        self.reason: str | None = None
        self.message: str | None = None
        self._stop = stop
        self._grace_s = spec.grace_s
        self._timeout_s = spec.timeout_s
        self._begin = time.monotonic()
        self._kill_at = float("inf")

    def look(self) -> bool:
        """Whether the call must now be asked to end; kills the process once the grace time is over."""
        now = time.monotonic()
        if self.reason is None:
            if self._timeout_s is not None and now - self._begin >= self._timeout_s:
                self.reason = TIMEOUT
                self.message = f"It ran longer than its timeout of {self._timeout_s:g} s."
            elif self._stop.asked():
                self.reason, self.message = CANCELLED, self._stop.reason()
            else:
                return False
            self._kill_at = now + self._grace_s
            return True
        if now >= self._kill_at:
            processes.end_descendants(os.getpid(), grace_s=0)
            os.kill(os.getpid(), signal.SIGKILL)
        return False


class _Watchdog:
    """One thread per worker process that looks after the calls in it. `_lock` guards `_guards`."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._guards: set[_Guard] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, guard: _Guard) -> Iterator[None]:
        with self._lock:
            self._guards.add(guard)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="unit watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            self.release(guard)

    def release(self, guard: _Guard) -> None:
        with self._lock:
            self._guards.discard(guard)
            _raise_in(guard.thread, None)  # one that was raised and not yet delivered

    def _run(self) -> None:
        while True:
            time.sleep(POLL_S)
            with self._lock:
                for guard in self._guards:
                    if guard.look():
                        processes.end_descendants(os.getpid(), grace_s=0)
                        _raise_in(guard.thread, UnitStopped)


_watchdog = _Watchdog()


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(exception) if exception else None
    )


def _load(pickled: bytes) -> FunctionRef:
    """Unpickle a function once per worker, not once per unit."""
    function = _loaded.get(pickled)
    if function is None:
        function = pickle.loads(pickled)
        if len(_loaded) >= _LOADED_LIMIT:
            _loaded.clear()
        _loaded[pickled] = function
    return FunctionRef(function, dumps=lambda _: pickled)


def _own_copy(args: Any) -> Any:
    """The arguments as this call's own: a function that changes them changes no other unit's."""
    if any(isinstance(value, (dict, list)) for value in args.values()):
        return copy.deepcopy(dict(args))
    return args


def _exit_code(error: SystemExit) -> tuple[int, str]:
    """As the interpreter ends a process: None is 0, a number itself modulo 256, all else 1."""
    if error.code is None:
        return 0, ""
    if isinstance(error.code, int):
        return error.code & 0xFF, f"SystemExit: {error.code}"
    return 1, str(error.code)


def _traceback_of(error: BaseException) -> str:
    """The traceback from the function's own frame on, without ours."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__)).strip()
