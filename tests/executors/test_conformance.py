"""Every executor keeps the contract that `fractal_runner.testing` holds, as far as it says it can."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fractal_runner.executors.base import Executor
from fractal_runner.executors.calls import Call
from fractal_runner.executors.local.executors import (
    ForkExecutor,
    ProcessExecutor,
    SerialExecutor,
    SpawnExecutor,
    ThreadExecutor,
)
from fractal_runner.testing import ExecutorConformance, needs


class ThreadPerCallExecutor(Executor):
    """A complete executor: a new thread for each call, at most `max_workers` of them at a time."""

    def __init__(self, max_workers: int, **options: Any) -> None:
        super().__init__(max_workers=max_workers, **options)
        self._lock = threading.RLock()  # guards what follows
        self._waiting: deque[Call] = deque()
        self._busy = 0

    def _start(self, call: Call) -> None:
        with self._lock:
            if call.parent is not None:  # which may be waiting for it
                return threading.Thread(target=call.run, daemon=True).start()
            self._waiting.append(call)
            self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._busy < self.max_workers:
            call = self._waiting.popleft()
            self._busy += 1
            call.future.add_done_callback(self._ended)  # not the thread's end: `stop` leaves it running
            threading.Thread(target=call.run, name=call.name, daemon=True).start()

    def _ended(self, _: object) -> None:
        with self._lock:
            self._busy -= 1
            self._go_on()


class TestSerial(ExecutorConformance):
    executor_class = SerialExecutor

    def test_a_keyboard_interrupt_is_the_callers(self, executor: Any) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            executor.submit(interrupt)

        assert executor.submit(pow, 2, 3).result() == 8
        [interrupted] = executor.completed()
        assert isinstance(interrupted.exception(), KeyboardInterrupt)


class TestThread(ExecutorConformance):
    executor_class = ThreadExecutor


class TestProcess(ExecutorConformance):
    executor_class = ProcessExecutor


class TestFork(ExecutorConformance):
    executor_class = ForkExecutor


class TestSpawn(ExecutorConformance):
    executor_class = SpawnExecutor
    many = 8


class TestThreadPerCall(ExecutorConformance):
    executor_class = ThreadPerCallExecutor


class TestStandardLibrary(ExecutorConformance):
    """What is no executor of ours is held to PEP 3148 alone."""

    executor_class = ThreadPoolExecutor


def test_what_an_executor_cannot_do_is_left_out_and_told() -> None:
    assert ExecutorConformance.left_out == {}
    assert TestProcess.left_out == {}
    assert TestThread.left_out["test_a_dying_worker_fails_only_its_own_call"] == ["isolates"]
    assert TestThread.test_a_dying_worker_fails_only_its_own_call is None
    assert {word for words in TestSerial.left_out.values() for word in words} == {
        *("asynchronous", "isolates", "kills")
    }
    assert "additions" in TestStandardLibrary.left_out["test_options_make_views_of_the_same_executor"]


def test_a_capability_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="are no capabilities"):
        needs("teleports")
