"""What tests over Ray share: one instance for all of a module, which takes its seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fractal_runner.executors.adapters.ray import RayExecutor

STORE = "100MB"


@pytest.fixture(scope="session")
def ray_has_settled() -> None:
    """Threads of its core, with their descriptors, stay in a process once it has been connected."""
    RayExecutor(1, object_store_memory=STORE).shutdown()


@pytest.fixture(scope="class")
def ray_instance(ray_has_settled: None) -> Iterator[RayExecutor]:
    """Keeps an instance of two CPUs alive, which the executors of this process share."""
    with RayExecutor(2, object_store_memory=STORE) as executor:
        yield executor
