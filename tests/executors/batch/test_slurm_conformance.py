"""The SLURM executor keeps the contract of executors, on a cluster of real nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal_runner import SlurmExecutor
from fractal_runner.testing import ExecutorConformance
from tests.clusters.slurm import SlurmCluster


@pytest.fixture(scope="session", autouse=True)
def cluster(slurm_cluster: SlurmCluster) -> SlurmCluster:
    """From before what looks for things that a module of tests leaves behind: it stays."""
    return slurm_cluster


class TestSlurm(ExecutorConformance):
    executor_class = SlurmExecutor
    many = 20

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def an_idle_cluster(cls, cluster: SlurmCluster) -> None:
        cluster.reset()

    @pytest.fixture
    def make(
        self, cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[..., Any]]:
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        made: list[SlurmExecutor] = []

        def make(max_workers: int = 2, **options: Any) -> Any:
            made.append(SlurmExecutor(tmp_path / f"jobs{len(made)}", max_workers=max_workers, **options))
            return made[-1]

        yield make
        for executor in made:
            executor.stop()
            executor.shutdown()

    def make_executor(self, max_workers: int, **options: Any) -> Any:
        return SlurmExecutor("/nowhere", max_workers=max_workers, **options)
