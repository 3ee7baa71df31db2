"""What calls are to know of themselves, over every engine; see `fractal_runner.current_call`."""

from __future__ import annotations

from typing import Any

from fractal_runner import CallInfo, Executor, current_call
from fractal_runner.testing import PATIENCE_S


def whoever(_: Any) -> CallInfo:
    return current_call()


def assert_calls_know_what_they_are(executor: Executor) -> None:
    """Their names, keys, places in a map, and that each has started for the first time."""
    view = executor.options(name="measure", key="run/7", map_index=3)

    assert view.submit(whoever, 1).result(PATIENCE_S) == CallInfo("measure", "run/7", 3, 1)
    assert executor.submit(whoever, 1).result(PATIENCE_S) == CallInfo("whoever", None, None, 1)
    found = list(executor.options(name="part").map(whoever, "ab", timeout=PATIENCE_S))
    assert found == [CallInfo("part", None, place, 1) for place in range(2)]
