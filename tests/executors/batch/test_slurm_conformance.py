"""The SLURM executor keeps the contract of executors, on a cluster of real nodes."""

from __future__ import annotations

import pytest

from fractal_runner import SlurmExecutor
from tests.clusters.slurm import SlurmCluster
from tests.executors.batch.conformance import OnACluster


@pytest.fixture(scope="session", autouse=True)
def cluster(slurm_cluster: SlurmCluster) -> SlurmCluster:
    """From before what looks for things that a module of tests leaves behind: it stays."""
    return slurm_cluster


class TestSlurm(OnACluster):
    executor_class = SlurmExecutor

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def an_idle_cluster(cls, cluster: SlurmCluster) -> None:
        cluster.reset()
