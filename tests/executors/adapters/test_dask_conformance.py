"""The Dask executor keeps the contract of executors, with workers of its own."""

from __future__ import annotations

from fractal_runner.executors.adapters.dask import DaskExecutor
from fractal_runner.testing import ExecutorConformance


class TestDask(ExecutorConformance):
    executor_class = DaskExecutor
    many = 20
