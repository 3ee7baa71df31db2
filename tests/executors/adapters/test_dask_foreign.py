"""The Dask executor on somebody else's Dask: it keeps the contract as far as that allows, and says so."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import dask
import pytest
from distributed import LocalCluster
from distributed.utils import offload

from fractal_runner.errors import ExecutorError
from fractal_runner.executors.adapters.dask import DaskExecutor
from fractal_runner.testing import PATIENCE_S, ExecutorConformance, Gate, wait_until
from tests.executors.adapters.conftest import Turn
from tests.executors.adapters.knowing import assert_calls_know_what_they_are


@pytest.fixture(scope="session", autouse=True)
def cluster(own_turn: Turn) -> Iterator[LocalCluster]:
    """Two workers of many threads: calls that were left running keep theirs. From before what looks for
    things that a module of tests leaves behind: it stays."""
    # Else it would set OMP_NUM_THREADS and the like in this very process, whose other tests mind.
    with own_turn(), dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):
        made = LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=2,
            threads_per_worker=16,
            dashboard_address="127.0.0.1:0",
            resources={"CPU": 16, "GPU": 1},
        )
    asyncio.run(offload(int))  # the thread that takes large messages apart, which Dask keeps
    yield made
    made.close()


class TestDaskOnAnothersScheduler(ExecutorConformance):
    capabilities: ClassVar = frozenset({"additions", "asynchronous"})
    many = 20

    @pytest.fixture(autouse=True)
    def _address(self, cluster: LocalCluster) -> None:
        self.address = cluster.scheduler_address

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        address = getattr(self, "address", "tcp://127.0.0.1:9")
        return DaskExecutor(max_workers, address=address, **options)


@pytest.fixture
def executor(cluster: LocalCluster) -> Iterator[DaskExecutor]:
    executor = DaskExecutor(cluster=cluster)
    yield executor
    executor.stop()
    executor.shutdown()


def test_a_cluster_object_names_its_scheduler_and_its_threads(executor: DaskExecutor) -> None:
    assert executor.max_workers == 32
    assert (executor.asynchronous, executor.isolates, executor.kills) == (True, False, False)
    assert executor.submit(os.getpid).result(PATIENCE_S) != os.getpid()


def test_a_scheduler_file_names_the_scheduler(cluster: LocalCluster, tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    path.write_text(json.dumps({"address": cluster.scheduler_address}))

    with DaskExecutor(1, scheduler_file=path) as executor:
        assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_where_there_is_no_scheduler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractal_runner.executors.adapters.daskpool.foreign._CONNECT_S", 1)

    with pytest.raises(ExecutorError, match=r"There is no Dask scheduler at tcp://127\.0\.0\.1:9"):
        DaskExecutor(1, address="tcp://127.0.0.1:9")


def test_calls_know_what_they_are(executor: DaskExecutor) -> None:
    assert_calls_know_what_they_are(executor)


def test_what_no_worker_declares_enough_of_is_refused_with_the_numbers(executor: DaskExecutor) -> None:
    with pytest.raises(ValueError, match="cpus=17 exceeds the 16 of a worker"):
        executor.options(cpus=17)
    with pytest.raises(ValueError, match="gpus=2 exceeds the 1 of a worker"):
        executor.options(gpus=2)

    # Nobody declares memory, so no call is measured by it.
    assert executor.options(memory="1TB", gpus=1).submit(pow, 2, 3).result(PATIENCE_S) == 8


def test_what_workers_declare_bounds_how_many_calls_run_at_a_time(
    executor: DaskExecutor, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    submitted = [executor.options(gpus=1).submit(gate.wait) for _ in range(3)]
    gate.await_arrivals(2)
    wait_until(lambda: sum(future.running() for future in submitted) == 2, "two of them are known to run")

    assert executor.submit(pow, 2, 3).result(PATIENCE_S) == 8
    assert len(gate.arrived()) == 2
    gate.open()
    assert [future.result(PATIENCE_S) for future in submitted] == [None] * 3
