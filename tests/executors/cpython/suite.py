"""CPython's own tests of executors, pointed at ours.

Runs in an interpreter that ships `test.test_concurrent_futures`, and apart from `__main__` so that worker
processes can import what it defines. CPython's tests are mixins over an `executor_type`; here each is
combined with each of our asynchronous classes, as its `util.create_executor_tests` does with its own.
"""

from __future__ import annotations

import multiprocessing
import time
import unittest
from concurrent.futures.process import BrokenProcessPool
from pickle import PicklingError
from typing import Any
from unittest import mock

from test.test_concurrent_futures import (
    test_as_completed,
    test_deadlock,
    test_init,
    test_process_pool,
    test_shutdown,
    test_thread_pool,
    test_wait,
    util,
)

from fractal_runner.errors import ExecutorError, JobExecutionError
from fractal_runner.executors.local.executors import (
    ForkExecutor,
    ProcessExecutor,
    SpawnExecutor,
    ThreadExecutor,
)

EXECUTORS = {kind.__name__: kind for kind in (ThreadExecutor, ProcessExecutor, ForkExecutor, SpawnExecutor)}

# The classes of tests that are there for a pool of threads, and for one of processes; what holds for
# every executor (ExecutorTest, ExecutorShutdownTest) is in their bases. The rest of CPython's package is
# about the standard library's own: test_future, and FailingInitializerResourcesTest of test_init.
_FOR_ALL = (test_as_completed.AsCompletedTests, test_init.InitializerMixin, test_init.FailingInitializerMixin)
FOR_THREADS = (
    test_thread_pool.ThreadPoolExecutorTest,
    test_shutdown.ThreadPoolShutdownTest,
    test_wait.ThreadPoolWaitTests,
    *_FOR_ALL,
)
FOR_PROCESSES = (
    test_process_pool.ProcessPoolExecutorTest,
    test_shutdown.ProcessPoolShutdownTest,
    test_wait.WaitTests,
    test_deadlock.ExecutorDeadlockTest,
    *_FOR_ALL,
)

# What ours raise where the standard library's pool as a whole is broken: the error of the one call.
_ENDED_WORKER = (BrokenProcessPool, JobExecutionError, ExecutorError)
_NOT_PICKLED = (PicklingError, ExecutorError)


class _Ours(util.ExecutorMixin):
    """Gives a test our executor: what `util.ThreadPoolMixin` and its siblings are there."""

    def get_context(self) -> Any:
        """For a test's own semaphores and managers: our executors themselves take no context."""
        return multiprocessing.get_context("fork")


class _OursShutDown(_Ours):
    """For `test_cancel_futures`, which takes it that some of its calls have started after an instant.

    The busier the machine, the more of them ours have cancelled by then: it is let wait for one.
    """

    def setUp(self) -> None:
        super().setUp()
        if self._testMethodName == "test_cancel_futures":
            self._shutdown = self.executor.shutdown
            self.executor.shutdown = self._shut_down_once_one_runs

    def _shut_down_once_one_runs(self, **how: Any) -> None:
        deadline = time.monotonic() + 30
        while not any(task.state == "running" for task in self.executor.tasks()):
            if time.monotonic() > deadline or not self.executor.pending_count():
                break
            time.sleep(0.001)
        self._shutdown(**how)


class _OursAfterCrashes(_Ours):
    """For the tests of deadlocks, which make their own executors with an `mp_context`."""

    TIMEOUT = 60.0

    def setUp(self) -> None:
        kind = self.executor_type
        self.executor_type = lambda max_workers=None, mp_context=None, **more: kind(max_workers, **more)
        for name, errors in (("BrokenProcessPool", _ENDED_WORKER), ("PicklingError", _NOT_PICKLED)):
            patch = mock.patch.object(test_deadlock, name, errors)
            patch.start()
            self.addCleanup(patch.stop)
        super().setUp()

    def test_exit_during_result_pickle_on_worker(self) -> None:
        # CPython wants SystemExit: ours have one error for all results that cannot be pickled.
        self._check_crash(ExecutorError, test_deadlock._return_instance, test_deadlock.ExitAtPickle)

    def _fail_on_deadlock(self, executor: Any) -> None:
        executor.stop()
        self.fail(f"no end of the call in {self.TIMEOUT} s")


_MIXINS = {
    test_shutdown.ThreadPoolShutdownTest: _OursShutDown,
    test_shutdown.ProcessPoolShutdownTest: _OursShutDown,
    test_deadlock.ExecutorDeadlockTest: _OursAfterCrashes,
}


def _combined(kind: type, tests: type) -> type[unittest.TestCase]:
    """A class of CPython's tests with `kind` as its executor, found by its name in this module."""
    more = () if issubclass(tests, unittest.TestCase) else (util.BaseTestCase,)
    bases = (_MIXINS.get(tests, _Ours), tests, *more)
    name = f"{kind.__name__}_{tests.__name__}"
    globals()[name] = type(name, bases, {"executor_type": kind, "__module__": __name__})
    return globals()[name]


# At import, so that a worker process, which imports this module for a test's own methods, has them too.
CASES = {
    name: {tests.__name__: _combined(kind, tests) for tests in chosen}
    for name, kind in EXECUTORS.items()
    for chosen in [FOR_THREADS if kind is ThreadExecutor else FOR_PROCESSES]
}
