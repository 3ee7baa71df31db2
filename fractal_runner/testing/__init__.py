"""What every executor has to do, as tests: derive a class, name the executor, and pytest has them all.

    from fractal_runner.testing import ExecutorConformance

    class TestMyExecutor(ExecutorConformance):
        executor_class = MyExecutor

Nothing but pytest is needed. Functions that are sent to workers are closures, which travel by value: a
worker need not have this module's imports.
"""

from __future__ import annotations

from fractal_runner.testing._additions import Additions
from fractal_runner.testing._calls import Calls
from fractal_runner.testing._ends import Ends
from fractal_runner.testing._tools import PATIENCE_S, Gate, is_alive, needs, wait_until
from fractal_runner.testing._travels import Travels

__all__ = ["PATIENCE_S", "ExecutorConformance", "Gate", "is_alive", "needs", "wait_until"]


class ExecutorConformance(Calls, Ends, Additions, Travels):
    """The contract of executors. Tests that an executor cannot pass, as it says itself, are taken out.

    A subclass names its `executor_class`, or says how one is made (`make_executor`) and what it can do
    (`capabilities`).

    Attributes:
        executor_class: a class that takes `max_workers`, and as many of the base's options as are used.
        capabilities: see `needs`; by default those that `executor_class` tells of.
        many: of how many calls tests are made that take many: fewer where a call is expensive.
        left_out: the tests that were taken out, and the capabilities that they need.
    """
