"""What the tests of executors are made with: a gate for calls, waiting with a bound, small functions."""

from __future__ import annotations

import logging
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.base import Executor

Test = TypeVar("Test", bound=Callable[..., Any])

PATIENCE_S = 60.0  # nothing takes that long; what does, hangs
CAPABILITIES = ("additions", "asynchronous", "isolates", "kills")


def needs(*capabilities: str) -> Callable[[Test], Test]:
    """Mark a test as one for executors with these capabilities.

    Args:
        capabilities: of "asynchronous", "isolates" and "kills", which are attributes of
            `fractal_runner.executors.base.Executor`, and "additions": that the executor is one.

    Raises:
        ValueError: for a word that is none of these.
    """
    if unknown := set(capabilities) - set(CAPABILITIES):
        raise ValueError(f"{sorted(unknown)} are no capabilities: known are {CAPABILITIES}")

    def mark(test: Test) -> Test:
        test.needs = frozenset(capabilities)  # type: ignore[attr-defined]
        return test

    return mark


class Gate:
    """Holds calls up until it is opened, and counts those that have come to it.

    It is made of files, so that calls may run anywhere where the folder is seen.

    Attributes:
        wait: a function for calls: it waits, and returns what it was given.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.wait = _waiting(str(folder), PATIENCE_S)

    def open(self) -> None:
        """Let all calls pass, now and from now on."""
        (self._folder / "open").touch()

    def arrived(self) -> list[int]:
        """The processes of the calls that have come, each as often as it came."""
        names = sorted(path.name for path in self._folder.glob("here-*"))
        return [int(name.split("-")[1]) for name in names]

    def await_arrivals(self, count: int) -> list[int]:
        """Wait until that many have come."""
        wait_until(lambda: len(self.arrived()) >= count, f"{count} call(s) have started")
        return self.arrived()


def await_running(*calls: Future[Any]) -> None:
    """Wait until these calls are known to run: from a cluster, that they have started comes a little late."""
    wait_until(lambda: all(future.running() for future in calls), "they are known to run")


def _waiting(folder: str, patience: float) -> Callable[..., Any]:
    def wait(value: Any = None) -> Any:
        Path(folder, f"here-{os.getpid()}-{uuid.uuid4().hex}").touch()
        deadline = time.monotonic() + patience
        while not Path(folder, "open").exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the gate was not opened")
            time.sleep(0.005)  # a file tells other processes, and wakes nobody
        return value

    return wait


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_S) -> None:
    """Look again and again, for up to `seconds`, whether `condition` holds.

    Raises:
        AssertionError: if it does not in the end, saying `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in {seconds:.0f} s it did not come to be that {what}"
        time.sleep(0.005)  # a condition is asked for, and tells nothing by itself


def is_alive(pid: int) -> bool:
    """Whether the process runs: one that has ended and was not reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def capabilities_of(executor_class: Any) -> frozenset[str]:
    if not (isinstance(executor_class, type) and issubclass(executor_class, Executor)):
        return frozenset({"asynchronous"})
    told = {word for word in CAPABILITIES if getattr(executor_class, word, False)}
    return frozenset(told | {"additions"})


def submit_until_refused(
    executor: futures.Executor, submitted: list[Future[Any]], refused: list[BaseException]
) -> None:
    try:
        while True:
            submitted.append(executor.submit(abs, -1))
    except BaseException as error:  # which one it is, the test says
        refused.append(error)


def nothing(record: logging.LogRecord) -> bool:
    return False


def raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def check_told(error: BaseException | None, type_name: str, message: str) -> None:
    """What cannot travel is told in full by what comes in its place."""
    assert isinstance(error, ExecutorError), error
    assert error.type_name.endswith(type_name)
    assert message in str(error)
    assert "in fail" in error.remote_traceback
