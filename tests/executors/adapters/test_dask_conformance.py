"""The Dask executor keeps the contract of executors, with workers of its own.

A pool takes seconds to start and to end. So the whole contract is tested by executors that join one which is
kept, where all but its beginning and its end is the same; and a part of it by executors that each make their
own, or with FRACTAL_RUNNER_OWN_POOLS all of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fractal_runner.executors.adapters.dask import DaskExecutor
from fractal_runner.executors.adapters.daskpool.warm import PoolRecord
from fractal_runner.testing import ExecutorConformance

# What depends on whose the workers are: how they come, die, and go.
ALWAYS = {
    "test_a_dying_worker_fails_only_its_own_call",
    "test_another_thread_may_make_it_use_it_and_shut_it_down",
    "test_calls_read_the_context",
    "test_shutdown_without_waiting_lets_all_calls_finish",
    "test_stop_ends_what_has_not_started_and_what_runs",
    "test_the_future_of_a_call_has_its_result",
    "test_what_was_never_used_can_be_shut_down",
}


@pytest.fixture(scope="session", autouse=True)
def kept(kept_pool: tuple[PoolRecord, Path]) -> None:
    """From before what looks for things that a module of tests leaves behind: it stays."""


class TestDask(ExecutorConformance):
    executor_class = DaskExecutor
    many = 20

    @pytest.fixture(autouse=True)
    def _pool(self, pool: PoolRecord) -> None:
        """Where `join` finds it."""

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        return DaskExecutor(max_workers, join="shared", **options)


class TestDaskWithPoolsOfItsOwn(ExecutorConformance):
    executor_class = DaskExecutor
    many = 20


if "FRACTAL_RUNNER_OWN_POOLS" not in os.environ:
    for name in {name for name in dir(TestDaskWithPoolsOfItsOwn) if name.startswith("test_")} - ALWAYS:
        setattr(TestDaskWithPoolsOfItsOwn, name, None)  # pytest collects what can be called


def test_it_is_held_to_all_of_the_contract() -> None:
    assert TestDask.left_out == TestDaskWithPoolsOfItsOwn.left_out == {}
    assert all(callable(getattr(TestDaskWithPoolsOfItsOwn, name)) for name in ALWAYS)
