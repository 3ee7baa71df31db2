"""What tests of engines share: the clusters whose jobs are Dask's workers, and an instance of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.clusters.lsf.fixtures import (  # noqa: F401
    ibm,
    ibm_cluster,
    lsf,
    lsf_cluster,
    openlava,
    openlava_cluster,
)
from tests.clusters.slurm.fixtures import slurm_accounting_cluster, slurm_cluster  # noqa: F401

if TYPE_CHECKING:
    from fractal_runner.executors.adapters.ray import RayExecutor

STORE = "100MB"  # of objects; what is left out of it goes to disk


@pytest.fixture(scope="session")
def ray_has_settled() -> None:
    """Threads of its core, with their descriptors, stay in a process once it has been connected."""
    from fractal_runner.executors.adapters.ray import RayExecutor  # seconds, for those who use it

    RayExecutor(1, object_store_memory=STORE).shutdown()


@pytest.fixture(scope="class")
def ray_instance(ray_has_settled: None) -> Iterator[RayExecutor]:
    """Keeps an instance of two CPUs alive, which the executors of this process share: it starts slowly."""
    from fractal_runner.executors.adapters.ray import RayExecutor

    with RayExecutor(2, object_store_memory=STORE) as executor:
        yield executor
