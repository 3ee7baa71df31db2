"""The executor over Ray keeps the contract of executors, over a local instance."""

from __future__ import annotations

import pytest

from fractal_runner.executors.adapters.ray import RayExecutor
from fractal_runner.testing import ExecutorConformance

# Ray's own: it waits for its daemons by their pids, and leaves files and processes to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture(scope="session", autouse=True)
def settled(first_ray: list[RayExecutor]) -> None:
    """Before what looks for things that a module of tests leaves behind."""


@pytest.mark.usefixtures("ray_instance")
class TestRay(ExecutorConformance):
    executor_class = RayExecutor
    many = 50


def test_it_is_held_to_all_of_the_contract() -> None:
    assert TestRay.left_out == {}
