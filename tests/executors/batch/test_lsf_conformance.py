"""The LSF executor keeps the contract of executors, in the words of both families of LSF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import LsfExecutor
from fractal_runner.testing import ExecutorConformance
from tests.clusters.lsf import LsfCluster


@pytest.fixture(scope="session", autouse=True)
def clusters(openlava_cluster: LsfCluster, ibm_cluster: LsfCluster) -> tuple[LsfCluster, LsfCluster]:
    """Both, from before what looks for things that a module of tests leaves behind: they stay."""
    return openlava_cluster, ibm_cluster


class OnLsf(ExecutorConformance):
    executor_class = LsfExecutor
    many = 20

    @pytest.fixture
    def make(
        self, cluster: LsfCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., Any]]:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        made: list[LsfExecutor] = []

        def make(max_workers: int = 2, **options: Any) -> Any:
            made.append(LsfExecutor(tmp_path / f"jobs{len(made)}", max_workers=max_workers, **options))
            return made[-1]

        yield make
        for executor in made:
            executor.stop()
            executor.shutdown()

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        return LsfExecutor("/nowhere", max_workers=max_workers, **options)


class TestOpenlava(OnLsf):
    @pytest.fixture
    def cluster(self, openlava_cluster: LsfCluster) -> LsfCluster:
        return openlava_cluster


class TestIbm(OnLsf):
    @pytest.fixture
    def cluster(self, ibm_cluster: LsfCluster) -> LsfCluster:
        return ibm_cluster
