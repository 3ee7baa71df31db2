"""What tests of engines share: clusters whose jobs are Dask's workers, a pool that is kept, Ray's own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


Turn = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def own_turn(tmp_path_factory: pytest.TempPathFactory) -> Turn:
    """Makes those who start an engine wait for each other, over all processes of a test run.

    An engine is a dozen processes, which do not come in time if four of them are started at once.
    """
    base = tmp_path_factory.getbasetemp()
    lock = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines.lock"

    @contextmanager
    def turn() -> Iterator[None]:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: each start has a deadline of its own
            yield

    return turn


@pytest.fixture(scope="session")
def kept_pool(tmp_path_factory: pytest.TempPathFactory, own_turn: Turn) -> Iterator[tuple[PoolRecord, Path]]:
    """A pool of ours with two local workers, "shared", and the state directory that it is written down in."""
    from fractal_runner.executors.adapters.daskpool.warm import start_pool, stop_pool

    state = tmp_path_factory.mktemp("state")
    with own_turn():
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
def make_ray(own_turn: Turn) -> Callable[[], RayExecutor]:
    """Makes an executor that starts an instance of two CPUs and 1 GB, or shares the one that there is."""

    def make() -> RayExecutor:
        from fractal_runner.executors.adapters.ray import RayExecutor  # seconds, for those who use it

        with own_turn():
            return RayExecutor(2, max_memory="1GB", object_store_memory=STORE)

    return make


@pytest.fixture(scope="session")
def first_ray(make_ray: Callable[[], RayExecutor]) -> Iterator[list[RayExecutor]]:
    """The instance of the first module that uses one, from before what looks for things that are left behind.

    Once a process has been connected, threads of Ray's core stay there, with their descriptors.
    """
    first = [make_ray()]
    yield first
    for executor in first:  # no module has had it
        executor.shutdown()


@pytest.fixture(scope="module")
def ray_instance(first_ray: list[RayExecutor], make_ray: Callable[[], RayExecutor]) -> Iterator[RayExecutor]:
    """Keeps an instance of two CPUs and 1 GB alive, which the executors of this process share."""
    with first_ray.pop() if first_ray else make_ray() as executor:
        yield executor
