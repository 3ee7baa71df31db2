"""The LSF executor keeps the contract of executors, in the words of both families of LSF."""

from __future__ import annotations

import pytest

from fractal_runner import LsfExecutor
from tests.clusters.lsf import LsfCluster
from tests.executors.batch.conformance import OnACluster


@pytest.fixture(scope="session", autouse=True)
def clusters(openlava_cluster: LsfCluster, ibm_cluster: LsfCluster) -> tuple[LsfCluster, LsfCluster]:
    """Both, from before what looks for things that a module of tests leaves behind: they stay."""
    return openlava_cluster, ibm_cluster


class TestOpenlava(OnACluster):
    executor_class = LsfExecutor

    @pytest.fixture
    def cluster(self, openlava_cluster: LsfCluster) -> LsfCluster:
        return openlava_cluster


class TestIbm(OnACluster):
    executor_class = LsfExecutor

    @pytest.fixture
    def cluster(self, ibm_cluster: LsfCluster) -> LsfCluster:
        return ibm_cluster
