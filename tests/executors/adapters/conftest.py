"""What tests of engines share: clusters whose jobs are Dask's workers, a pool that is kept, Ray's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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
    from fractal_runner.executors.adapters.daskpool.warm import PoolRecord
    from fractal_runner.executors.adapters.ray import RayExecutor

STORE = "100MB"  # of objects; what is left out of it goes to disk


@pytest.fixture(scope="session")
def kept_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PoolRecord, Path]]:
    """A pool of ours with two local workers, "shared", and the state directory that it is written down in."""
    from fractal_runner.executors.adapters.daskpool.warm import start_pool, stop_pool

    state = tmp_path_factory.mktemp("state")
    record = start_pool("shared", {"max_workers": 2, "min_workers": 2, "idle_timeout": 600}, state=state)
    yield record, state
    stop_pool("shared", state)


@pytest.fixture
def pool(kept_pool: tuple[PoolRecord, Path], monkeypatch: pytest.MonkeyPatch) -> PoolRecord:
    """The one that is kept, where executors look for it."""
    record, state = kept_pool
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    (state / "fractal-runner").exists() or (state / "fractal-runner").symlink_to(state)
    return record


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
