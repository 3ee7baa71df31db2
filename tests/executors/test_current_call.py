"""A call knows what it is, wherever it runs: its name, key, place in a map, attempt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import (
    CallInfo,
    Executor,
    ForkExecutor,
    ProcessExecutor,
    SerialExecutor,
    SpawnExecutor,
    ThreadExecutor,
    current_call,
)
from fractal_runner.testing import PATIENCE_S
from tests.executors.batch.faults import FaultyScheduler, executor_over


@pytest.fixture(
    params=[SerialExecutor, ThreadExecutor, ProcessExecutor, ForkExecutor, SpawnExecutor, "batch"]
)
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Executor]:
    """One of each kind."""
    if request.param != "batch":
        with request.param() as one:
            yield one
        return
    scheduler = FaultyScheduler()
    with executor_over(scheduler, tmp_path / "jobs") as one:
        yield one
    scheduler.close()


def asked(executor: Any, fn: Callable[..., Any] = current_call, *args: Any) -> Any:
    return executor.submit(fn, *args).result(PATIENCE_S)


def whoever(_: Any) -> CallInfo:
    return current_call()


def test_options_reach_the_call(executor: Executor) -> None:
    view = executor.options(name="measure", key="run/7", map_index=3)

    assert asked(view) == CallInfo("measure", "run/7", 3, 1)
    assert asked(view.options(key=None, map_index=0)) == CallInfo("measure", None, 0, 1)
    assert asked(executor) == CallInfo("current_call", None, None, 1)
    assert asked(executor, whoever, 1) == CallInfo("whoever", None, None, 1)


def test_a_map_counts_its_calls(executor: Executor) -> None:
    found = list(executor.options(name="part").map(whoever, "abc", timeout=PATIENCE_S))

    assert found == [CallInfo("part", None, place, 1) for place in range(3)]


def test_outside_of_a_call_there_is_none() -> None:
    with pytest.raises(RuntimeError, match=r"current_call\(\) is for functions that an executor runs"):
        current_call()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="no call in this thread"):
        asked(pool)
